"""Results written by rectangles, in any order, and by strips from the top.

NPY, uncompressed TIFF tiles and Zarr take rectangles where they belong, from several processes at a time; each process
opens the file, which was created once. Deflated TIFF, PNG and whatever is made in a pass over the image are written
from the top.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import tifffile
from numpy.typing import NDArray

from fastunet.data.images import TIFF_SUFFIXES, axes_of_result, write_array
from fastunet.data.zarr_arrays import LEVEL, create_zarr

CHUNK = 512  # longest side of a Zarr chunk written by tiles
TILE = 256  # side of a TIFF tile, and of a Zarr chunk written by strips
SHARD = 16  # chunks side by side in a file


class Sink(Protocol):
    """A file of planes (H, W) that is written by rectangles."""

    def write(self, plane: int, top: int, left: int, values: NDArray) -> None:
        """Write values (planes, h, w) of the planes from `plane` on."""

    def flush(self) -> None:
        """Return when what was written so far outlives the machine."""


def create(path: Path, shape: tuple[int, ...], dtype: np.dtype | type, stride: tuple[int, int]) -> None:
    """Create a file whose rectangles come; sparse where the file system can.

    Parameters
    ----------
    path : .npy, .tif, .tiff or .zarr
    shape : ends in height and width; before these the planes, in the order of `Sink.write`
    stride : rectangles begin at multiples of it: no file of a Zarr store is written by two of them
    """
    axes = axes_of_result(len(shape), dtype)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        with path.open("wb") as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + _bytes(shape, dtype))
    elif suffix in TIFF_SUFFIXES:
        tile = [min(TILE, -(-side // 16) * 16) for side in shape[-2:]]
        whole_tiles = (-(-side // step) * step for side, step in zip(shape[-2:], tile))
        tifffile.imwrite(
            path,
            shape=shape,
            dtype=dtype,
            tile=tuple(tile),
            photometric="minisblack",
            bigtiff=_bytes((*shape[:-2], *whole_tiles), dtype) > 2**32 - 2**25,
            metadata={"axes": axes},
        )
    else:
        shard, chunk = [], []
        for step, side in zip(stride, shape[-2:]):
            if step < side:  # one process writes to a shard
                chunk.append(next(step // n for n in range(-(-step // CHUNK), step + 1) if step % n == 0))
                shard.append(step)
            else:
                parts = -(-side // CHUNK)
                chunk.append(-(-side // parts))
                shard.append(parts * chunk[-1])
        planes = (1,) * (len(shape) - 2)
        create_zarr(path, shape, dtype, axes, (*planes, *chunk), (*planes, *shard))


def open_sink(path: Path) -> Sink:
    """Open a file that `create` made."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _NpySink(path)
    return _TiffSink(path) if suffix in TIFF_SUFFIXES else _ZarrSink(path)


class _NpySink:
    def __init__(self, path: Path) -> None:
        mapped = np.lib.format.open_memmap(path, mode="r")
        self._offset, self._dtype = mapped.offset, mapped.dtype
        self._height, self._width = mapped.shape[-2:]
        self._file = path.open("r+b", buffering=0)

    def write(self, plane: int, top: int, left: int, values: NDArray) -> None:
        for number, one in enumerate(values):
            first = ((plane + number) * self._height + top) * self._width + left
            _write_rows(
                self._file, self._offset + first * self._dtype.itemsize, one.astype(self._dtype), self._width
            )

    def flush(self) -> None:
        os.fsync(self._file.fileno())


class _TiffSink:
    def __init__(self, path: Path) -> None:
        with tifffile.TiffFile(path) as file:
            key: Any = file.pages.first
            self._dtype = np.dtype(file.byteorder + key.dtype.char)
            self._tile = key.tilelength, key.tilewidth
            self._columns = -(-key.imagewidth // key.tilewidth)
            self._offsets = [page.dataoffsets for page in file.pages]
        self._file = path.open("r+b", buffering=0)

    def write(self, plane: int, top: int, left: int, values: NDArray) -> None:
        high, wide = self._tile
        _, height, width = values.shape
        for number, one in enumerate(values):
            for row in range(top // high, -(-(top + height) // high)):
                for column in range(left // wide, -(-(left + width) // wide)):
                    low, begin = max(top, row * high), max(left, column * wide)
                    part = one[low - top : (row + 1) * high - top, begin - left : (column + 1) * wide - left]
                    inside = (low - row * high) * wide + begin - column * wide
                    offset = self._offsets[plane + number][row * self._columns + column]
                    _write_rows(
                        self._file, offset + inside * self._dtype.itemsize, part.astype(self._dtype), wide
                    )

    def flush(self) -> None:
        os.fsync(self._file.fileno())


class _ZarrSink:
    def __init__(self, path: Path) -> None:
        import zarr

        group: Any = zarr.open(path, mode="r+")
        self._array = group[LEVEL]

    def write(self, plane: int, top: int, left: int, values: NDArray) -> None:
        for number, one in enumerate(values):
            index = np.unravel_index(plane + number, self._array.shape[:-2]) if self._array.ndim > 2 else ()
            self._array[(*index, slice(top, top + one.shape[0]), slice(left, left + one.shape[1]))] = one

    def flush(self) -> None:
        """The store writes each file under another name and renames it; a power cut may lose what was written last."""


def _write_rows(file: BinaryIO, offset: int, values: NDArray, width: int) -> None:
    """Write values (h, w) into an array of rows of `width` that lies in a file, from `offset` bytes on."""
    values = np.ascontiguousarray(values)
    if values.shape[1] == width:
        values = values.reshape(1, -1)
    for number, row in enumerate(values):
        _write(file, offset + number * width * values.itemsize, row.data.cast("B"))


def _write(file: BinaryIO, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        offset, data = offset + written, data[written:]


def write_strips(
    path: Path, shape: tuple[int, ...], dtype: np.dtype | type, strips: Iterable[NDArray]
) -> None:
    """Write planes that come as strips (h, W) from the top, plane after plane; integers are deflated in TIFF.

    A PNG file is put together in memory, of others as many rows as a tile or chunk has.
    """
    height, width = shape[-2:]
    axes = axes_of_result(len(shape), dtype)
    suffix = path.suffix.lower()
    if suffix == ".png":
        write_array(path, np.concatenate(list(strips)))
    elif suffix in TIFF_SUFFIXES:
        side = [min(TILE, -(-length // 16) * 16) for length in shape[-2:]]
        tifffile.imwrite(
            path,
            _tiles(_rows(strips, height, side[0]), side[0], side[1], dtype),
            shape=shape,
            dtype=dtype,
            tile=tuple(side),
            photometric="minisblack",
            compression="zlib",
            bigtiff=_bytes(shape, dtype) > 2**32 - 2**25,
            metadata={"axes": axes},
        )
    else:
        if suffix == ".npy":
            create(path, shape, dtype, (height, width))
        else:
            chunk = [min(TILE, side) for side in shape[-2:]]
            planes = (1,) * (len(shape) - 2)
            shard = chunk[0], chunk[1] * min(SHARD, -(-width // chunk[1]))
            create_zarr(path, shape, dtype, axes, (*planes, *chunk), (*planes, *shard))
        sink, row = open_sink(path), 0
        for strip in _rows(strips, height, TILE):
            sink.write(row // height, row % height, 0, strip[None])
            row += len(strip)
        sink.flush()


def _rows(strips: Iterable[NDArray], height: int, count: int) -> Iterator[NDArray]:
    """Strips of `count` rows each, but for the last of a plane."""
    row, waiting = 0, list[NDArray]()
    for strip in strips:
        while len(strip):
            have = sum(map(len, waiting))
            taken = strip[: min(count, height - row) - have]
            strip = strip[len(taken) :]
            waiting.append(taken)
            if have + len(taken) == min(count, height - row):
                yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
                row, waiting = (row + have + len(taken)) % height, []


def _tiles(strips: Iterable[NDArray], high: int, wide: int, dtype: np.dtype | type) -> Iterator[NDArray]:
    for strip in strips:
        for left in range(0, strip.shape[1], wide):
            part = strip[:, left : left + wide]
            tile = np.zeros((high, wide), dtype)
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def _bytes(shape: tuple[int, ...], dtype: np.dtype | type) -> int:
    return int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize


def whole_array(path: Path) -> NDArray:
    """The array of an NPY file that `create` made, of which nothing is read yet."""
    return np.lib.format.open_memmap(path, mode="r")
