"""Zarr: the array of a store with the axes its OME metadata name, and new OME-Zarr stores.

Versions 2 and 3 are read (OME-NGFF 0.4 and 0.5: of a multiscale image level 0), version 3 with OME-NGFF 0.5 is written.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastunet.errors import FileProblem

AXIS_NAMES = {"I": "t", "C": "c", "Y": "y", "X": "x"}
AXIS_TYPES = {"t": "time", "c": "channel", "y": "space", "x": "space"}
LEVEL = "0"


def open_zarr(path: Path) -> tuple[Any, str | None]:
    """Open a store: its array, nothing of which is read yet, and its axes (None where it does not tell).

    Raises
    ------
    DataError
        If there is no such folder, zarr is not installed, or the store is a group without an image.
    """
    zarr = _zarr(path)
    if not path.is_dir():
        raise FileProblem(path, "no such folder", "a Zarr store", "check the path")
    store = zarr.open(path, mode="r")
    if isinstance(store, zarr.Array):
        names = getattr(store.metadata, "dimension_names", None)
        return store, "".join(names).upper() if names and all(
            len(name or "") == 1 for name in names
        ) else None
    multiscales = dict(store.attrs).get("ome", store.attrs).get("multiscales")
    if not multiscales:
        found = f"a group of {', '.join(sorted(store.keys())) or 'nothing'} without OME metadata"
        raise FileProblem(path, found, "an array or a multiscale image", "name the image or array within it")
    image = multiscales[0]
    axes = "".join(axis["name"] if isinstance(axis, dict) else axis for axis in image.get("axes", ""))
    return store[image["datasets"][0]["path"]], axes.upper() or None


def create_zarr(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    axes: str,
    chunks: tuple[int, ...] | None = None,
    shards: tuple[int, ...] | None = None,
) -> Any:
    """Create a store with OME metadata and the array of its only level, filled with 0.

    Parameters
    ----------
    axes : of I (images), C, Y and X
    chunks, shards : what is compressed together, and what lies in one file; default: as zarr sees fit

    Raises
    ------
    DataError
        If zarr is not installed.
    """
    zarr = _zarr(path)
    names = [AXIS_NAMES.get(axis, axis.lower()) for axis in axes]
    group = zarr.create_group(path)
    scale = {"type": "scale", "scale": [1.0] * len(names)}
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [
            {
                "name": path.stem,
                "axes": [{"name": name, "type": AXIS_TYPES.get(name, "space")} for name in names],
                "datasets": [{"path": LEVEL, "coordinateTransformations": [scale]}],
            }
        ],
    }
    return group.create_array(
        LEVEL, shape=shape, dtype=dtype, chunks=chunks or "auto", shards=shards, dimension_names=names
    )


def _zarr(path: Path) -> Any:
    try:
        import zarr
    except ImportError:
        fix = "pip install 'fastunet[zarr]' or use a TIFF file"
        raise FileProblem(path, "zarr is not installed", "the package zarr", fix) from None
    return zarr
