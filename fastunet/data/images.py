"""Image files: TIFF, PNG, NPY and Zarr read into arrays, arrays written into files that appear only when whole."""

import errno
import logging
import os
import re
import secrets
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
from PIL import Image as pillow
from PIL.PngImagePlugin import PngImageFile

from fastunet.data.zarr_arrays import create_zarr, open_zarr
from fastunet.errors import FileProblem

TIFF_SUFFIXES = (".tif", ".tiff")
SUFFIXES = (*TIFF_SUFFIXES, ".png", ".npy", ".zarr")
READABLE = "a TIFF (.tif, .tiff), PNG (.png), NumPy (.npy) or Zarr (.zarr) file"

# No codec squeezes pixels this far (deflate's limit is 1032, zeros in zstd reach some 30,000): a header that
# declares more is damaged, and believing it would ask the machine for terabytes.
LARGEST_RATIO = 50_000
ALWAYS_READABLE_BYTES = 2**26

_GREY, _COLOUR, _GREY_ALPHA, _COLOUR_ALPHA = 0, 2, 4, 6  # colour types in a PNG header


@dataclass(frozen=True)
class Image:
    """One 2-D image: `pixels` (H, W, C) in the file's type; `name` is its stem, with [page] in a stack."""

    name: str
    path: Path
    pixels: np.ndarray


def notice(message: str) -> None:
    """Tell the user something worth knowing that is no error (the default of every `notify` argument)."""
    print(message, file=sys.stderr)


def stem(path: Path) -> str:
    """Return a file's name without its suffix; .ome.tif counts as one suffix."""
    return path.stem.removesuffix(".ome")


def natural_key(path: Path | str) -> tuple[list[tuple[int, str]], str]:
    """Sort key under which t2 comes before t10."""
    pieces = re.split(r"([0-9]+)", str(path).casefold())
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], str(path)


def find_images(pattern: Path | str) -> list[Path]:
    """Find the images a path means, naturally sorted: a file, all of a folder's, or those a glob matches.

    Raises
    ------
    DataError
        If there is none.
    """
    path = Path(pattern)
    if path.is_dir() and not is_image(path):
        found = [entry for entry in path.iterdir() if is_image(entry)]
    elif path.exists():
        found = [path]
    elif has_magic(str(pattern)):
        found = [Path(entry) for entry in glob(str(pattern), recursive=True) if is_image(Path(entry))]
    else:
        raise FileProblem(path, "nothing is there", "a file, a folder or a glob", "check the path")
    if not found:
        raise FileProblem(path, "no image was found", READABLE, "check the path or convert the images")
    return sorted(found, key=natural_key)


def is_image(path: Path) -> bool:
    """Whether the name is that of a file this module reads (of a folder, for Zarr); hidden ones are not."""
    suffix = path.suffix.lower()
    there = path.is_dir() if suffix == ".zarr" else path.is_file()
    return there and suffix in SUFFIXES and not path.name.startswith(".")


def read_array(path: Path | str) -> np.ndarray:
    """Read a file's array exactly as it is stored.

    Parameters
    ----------
    path : path
        TIFF (its pages stacked on axis 0), PNG (palette indices, not colours), NPY or Zarr.

    Returns
    -------
    ndarray
        Boolean, integer or floating-point, native byte order, at least one element.

    Raises
    ------
    DataError
        If the file is missing, damaged, of another kind, too large for the machine, or a TIFF of pages that
        differ in size.
    """
    path = Path(path)
    parts = _read_parts(path)
    if len({(array.shape, array.dtype) for array, _ in parts}) > 1:
        sizes = ", ".join(sorted({"x".join(map(str, array.shape)) for array, _ in parts}))
        raise FileProblem(
            path, f"pages of different sizes ({sizes})", "pages of one size", "save each by itself"
        )
    return parts[0][0] if len(parts) == 1 else np.stack([array for array, _ in parts])


def read_images(
    path: Path | str, axes: str | None = None, notify: Callable[[str], None] = notice
) -> list[Image]:
    """Read every 2-D image of a file.

    Parameters
    ----------
    path : path
        TIFF, PNG, NPY or Zarr.
    axes : str, optional
        What the axes of the stored array are, overriding the file: Y and X, C or S for channels, any other
        letter for one image after another ("ZYX", "TCYX"). By default TIFF and Zarr metadata decide; without, a
        3-D array is (H, W, C) when its last axis is at most 4 and (N, H, W) otherwise, 4-D (N, H, W, C).
    notify : callable
        Takes the notice that an alpha channel was dropped.

    Returns
    -------
    list of Image
        Pixels (H, W, C) with the file's type.

    Raises
    ------
    DataError
        As `read_array`, and for values that are not finite or axes that do not fit.
    """
    path = Path(path)
    images = [
        Image(name, path, pixels)
        for name, pixels in _split(path, _read_parts(path, colours=True, notify=notify), axes)
    ]
    for image in images:
        if image.pixels.dtype.kind == "f" and not np.isfinite(image.pixels).all():
            count = image.pixels.size - np.count_nonzero(np.isfinite(image.pixels))
            found = f"{count} values are NaN or infinite in {image.name}"
            raise FileProblem(path, found, "finite values", "replace them by numbers")
    return images


def read_labels(path: Path | str, axes: str | None = None) -> list[Image]:
    """Read every 2-D label image of a file.

    Palette indices are labels, and a grey picture saved as colour counts as one channel. `axes` is as in
    `read_images`; the letters C and S are dropped where the labels have no channel axis.

    Returns
    -------
    list of Image
        Pixels (H, W) of an integer type; floating-point labels become int64 when all are whole.

    Raises
    ------
    DataError
        As `read_array`, and for colours and values that are not whole numbers.
    """
    path = Path(path)
    parts = _read_parts(path)
    if axes is not None and all(array.ndim == len(axes) - 1 for array, _ in parts):
        axes = re.sub("[CScs]", "", axes)
    labels = []
    for name, pixels in _split(path, parts, axes):
        first = pixels[..., 0]
        # An alpha channel (the last of 2 or 4) says nothing about labels.
        colours = pixels[..., 1 : pixels.shape[2] - (pixels.shape[2] in (2, 4))]
        if (colours != first[..., None]).any():
            found = f"{pixels.shape[2]} channels that differ in {name}"
            fix = "save labels as one channel of whole numbers, or give --axes if these are several images"
            raise FileProblem(path, found, "one label per pixel", fix)
        if first.dtype.kind == "b":
            first = first.astype(np.uint8)
        elif first.dtype.kind == "f":
            if not (np.abs(first) < 2**53).all() or (first != np.rint(first)).any():
                found = f"labels in {name} are not whole numbers (range {first.min():g} to {first.max():g})"
                raise FileProblem(path, found, "whole numbers, 0 = background", "save labels as integers")
            first = first.astype(np.int64)
        labels.append(Image(name, path, first))
    return labels


def write_array(path: Path | str, array: np.ndarray, axes: str | None = None) -> None:
    """Write an array in the format its suffix names; the file appears only when it is whole.

    Parameters
    ----------
    path : path
        .tif or .tiff (integers are deflated), .png, .npy or .zarr, in a folder that exists.
    array : ndarray
        For PNG integers of shape (H, W), written as uint8 where that is the type and as uint16 otherwise, or
        uint8 colours of shape (H, W, 3).
    axes : str, optional
        TIFF or Zarr axes; by default YX, IYX for integers (a stack), CYX for floats (probabilities), ICYX.

    Raises
    ------
    ValueError
        If the suffix is another or PNG cannot hold the array.
    DataError
        If the folder does not exist.
    """
    path = Path(path)
    array = np.asarray(array)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    suffix = path.suffix.lower()
    if suffix == ".png":
        array = _for_png(path, array)
    elif suffix not in SUFFIXES:
        raise ValueError(f"{path}: suffix {suffix!r} cannot be written; use {', '.join(SUFFIXES)}")
    if suffix == ".zarr":
        axes = axes or axes_of_result(array.ndim, array.dtype)
        with whole_folder(path) as folder:
            create_zarr(folder, array.shape, array.dtype, axes)[...] = array
        return
    with whole_file(path) as file:
        if suffix == ".npy":
            np.lib.format.write_array(file, array, allow_pickle=False)
        elif suffix == ".png":
            pillow.fromarray(array).save(file, format="png")
        else:
            tifffile.imwrite(
                file,
                array,
                photometric="minisblack",
                compression=None if array.dtype.kind == "f" else "zlib",
                bigtiff=array.nbytes > 2**32 - 2**25,
                metadata={"axes": axes or axes_of_result(array.ndim, array.dtype)},
            )


def axes_of_result(dimensions: int, dtype: np.dtype | type) -> str:
    """Name the axes of an array that nothing else is known of: floats are probabilities, integers labels."""
    stack = "CYX" if np.dtype(dtype).kind == "f" else "IYX"
    return {2: "YX", 3: stack, 4: "ICYX"}[dimensions]


def check_folder(path: Path | str) -> None:
    """Raise DataError unless the folder that a file is to be written to exists."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileProblem(path, f"no folder {path.parent}", "a folder that exists", "create it first")


@contextmanager
def whole_file(path: Path | str) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing and give it that name once the block has ended well.

    Raises
    ------
    DataError
        If the folder does not exist.
    """
    path = Path(path)
    check_folder(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """`whole_file` for what is a folder, such as Zarr."""
    path = Path(path)
    check_folder(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace(source: Path, target: Path) -> None:
    """Give a file or folder a name; what had it before goes, but for a folder where a file is to be."""
    if target.is_dir():
        if not source.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        old = source.with_name(f".{source.name}.old")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        if source.is_dir():
            target.unlink(missing_ok=True)
        os.replace(source, target)


def _read_parts(
    path: Path, colours: bool = False, notify: Callable[[str], None] = notice
) -> list[tuple[np.ndarray, str | None]]:
    """Read a file's arrays with the axes its metadata name (None where it has none).

    `colours` asks for a picture's colours (palettes resolved, alpha dropped) rather than for what is stored.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        found = f"suffix {suffix!r}" if suffix else "a name without suffix"
        raise FileProblem(path, found, READABLE, "convert the file")
    parts: list[tuple[np.ndarray, str | None]]
    with decoding(path):
        if suffix == ".npy":
            parts = [(_read_npy(path), None)]
        elif suffix == ".png":
            parts = [_read_png(path, colours, notify)]
        elif suffix == ".zarr":
            array, axes = open_zarr(path)
            check_memory(path, array.nbytes)
            parts = [(np.asarray(array[...]), axes)]
        else:
            parts = _read_tiff(path)
    for array, _ in parts:
        check_pixels(path, array.shape, array.dtype)
    return [(array.astype(array.dtype.newbyteorder("="), copy=False), axes) for array, axes in parts]


def check_pixels(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise DataError unless these are pixels: numbers, and at least one."""
    if dtype.kind not in "buif":
        raise FileProblem(path, f"type {dtype}", "numbers", "convert the values")
    if 0 in shape:
        raise FileProblem(path, f"shape {shape}", "at least one pixel", "replace the empty file")


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Tell whatever goes wrong with a file's bytes as a DataError."""
    try:
        yield
    except FileProblem:
        raise
    except FileNotFoundError:
        raise FileProblem(path, "no such file", READABLE, "check the path") from None
    except MemoryError:
        raise FileProblem(path, "it does not fit into memory", "a smaller file", "split it") from None
    # The decoders raise whatever the damaged bytes lead them to, from struct.error to RecursionError.
    except Exception as error:
        if "imagecodecs" in str(error):
            found = f"{str(error).split(' requires')[0]} compression"
            fix = "pip install imagecodecs or save it uncompressed"
            raise FileProblem(path, found, "a codec that is installed", fix) from error
        found = f"it cannot be decoded ({_one_line(error)})"
        expected = f"a whole {path.suffix[1:].upper()} file"
        raise FileProblem(path, found, expected, "replace the damaged file") from error


def mapped_npy(path: Path) -> np.memmap:
    """The array of an NPY file, of which nothing is read yet; its header has been compared with the file's length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged header may look like one of Python 2
        return np.lib.format.open_memmap(path, mode="r")


def _read_npy(path: Path) -> np.ndarray:
    mapped = mapped_npy(path)
    check_memory(path, mapped.nbytes)
    return np.array(mapped)


def _read_png(path: Path, colours: bool, notify: Callable[[str], None]) -> tuple[np.ndarray, str]:
    with path.open("rb") as file:
        header = file.read(26)
        depth, colour_type = header[24], header[25]
        file.seek(0)
        # Not pillow.open, which takes any format and refuses large pictures.
        with PngImageFile(file) as picture:
            declared = 8 * picture.width * picture.height
            _check_ratio(path, declared)
            check_memory(path, declared)
            if depth == 16 and colour_type != _GREY:
                found = "16-bit colour, of which 8 bits would be lost"
                raise FileProblem(path, found, "8-bit colour or 16-bit grey", "save it as TIFF")
            if colours and picture.mode == "P":
                array = np.asarray(picture.convert("RGB"))
                array = array[..., 0] if (array == array[..., :1]).all() else array
            else:
                array = np.array(picture)
    if depth == 16:
        array = array.astype(np.uint16)
    elif colour_type == _GREY and depth in (2, 4):
        array = array // (255 // (2**depth - 1))  # Pillow stretches them over 0..255
    if colours and colour_type in (_GREY_ALPHA, _COLOUR_ALPHA):
        notify(f"{path}: the alpha channel is left out")
        array = array[..., 0] if colour_type == _GREY_ALPHA else array[..., :3]
    return array, "YX" if array.ndim == 2 else "YXS"


def _read_tiff(path: Path) -> list[tuple[np.ndarray, str | None]]:
    with open_tiff(path) as series:
        check_memory(path, sum(_declared_bytes(one) for one in series))
        # One worker: callers read several files at a time.
        return [(np.asarray(one.asarray(maxworkers=1)), tiff_axes(one)) for one in series]


@contextmanager
def open_tiff(path: Path) -> Iterator[list[tifffile.TiffPageSeries]]:
    """The images of a TIFF file whose header and page list are sound, and whose pixels lie within it."""
    # tifffile reports a page list that breaks off only to its log, and returns the pages before the damage.
    with _tifffile_errors() as errors, tifffile.TiffFile(path, _multifile=False) as file:
        series = list(file.series)
        if errors or not series:
            raise tifffile.TiffFileError(errors[0] if errors else "no page")
        _check_ratio(path, sum(_declared_bytes(one) for one in series))
        _check_segments(path, series)
        yield series
    if errors:
        raise tifffile.TiffFileError(errors[0])


def tiff_axes(series: tifffile.TiffPageSeries) -> str | None:
    """The axes a series names; None where the file does not tell."""
    # Q is what tifffile calls an axis of which nothing is known.
    return None if "Q" in series.axes or len(series.axes) != len(series.shape) else series.axes


def _declared_bytes(series: tifffile.TiffPageSeries) -> int:
    return int(np.prod(series.shape, dtype=object)) * series.dtype.itemsize


def _check_segments(path: Path, series: list[tifffile.TiffPageSeries]) -> None:
    """Refuse pixels beyond the file's end: tifffile may take what is left of a tile for the whole of it."""
    pages = [page for one in series for page in one.pages if page is not None]
    ends = [a + b for page in pages for a, b in zip(page.dataoffsets, page.databytecounts)]
    if max(ends, default=0) > path.stat().st_size:
        raise tifffile.TiffFileError("it ends before its pixels do")


@contextmanager
def _tifffile_errors() -> Iterator[list[str]]:
    """Collect the errors tifffile logs in this thread, but for tags: a damaged one is private or raises."""
    thread, messages = threading.get_ident(), list[str]()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if record.thread == thread and record.levelno >= logging.ERROR and "TiffTag" not in message:
                messages.append(message)

    logger, collector = logging.getLogger("tifffile"), Collector()
    logger.addHandler(collector)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)


def _check_ratio(path: Path, declared: int) -> None:
    """Refuse a header that declares more bytes than the file can hold."""
    stored = path.stat().st_size
    if declared > max(ALWAYS_READABLE_BYTES, LARGEST_RATIO * stored):
        found = f"its header declares {declared:,} bytes of pixels, the file has {stored:,}"
        raise FileProblem(path, found, "a header that fits the file", "replace the damaged file")


def check_memory(path: Path, declared: int) -> None:
    """Refuse more bytes than the machine has."""
    if declared > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        found = f"{declared / 2**30:,.0f} GiB of pixels"
        raise FileProblem(path, found, "what fits into memory", "split it into several files")


def _split(
    path: Path, parts: list[tuple[np.ndarray, str | None]], axes: str | None
) -> list[tuple[str, np.ndarray]]:
    """Split arrays into named 2-D images (H, W, C)."""
    pages: list[np.ndarray] = []
    for array, stored_axes in parts:
        pages.extend(_pages(path, array, axes or stored_axes or axes_of_shape(path, array.shape)))
    return list(zip(page_names(path, len(pages)), pages))


def page_names(path: Path, count: int) -> list[str]:
    """Name the images of a file."""
    name = stem(path)
    return [name] if count == 1 else [f"{name}[{number}]" for number in range(count)]


def axes_of_shape(path: Path, shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "YXC" if shape[2] <= 4 else "IYX"
    if len(shape) not in (2, 4):
        fix = "give --axes" if len(shape) > 4 else "save it as a picture"
        raise FileProblem(path, f"{len(shape)} axes {shape}", "2 to 4 axes", fix)
    return "YX" if len(shape) == 2 else "IYXC"


def image_order(path: Path, shape: tuple[int, ...], axes: str) -> tuple[str, list[str]]:
    """Check the axes of an array, in capitals; and name them in the order images, rows, columns, channels."""
    axes = axes.upper()
    if len(axes) != len(shape) or len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes):
        sizes = "x".join(map(str, shape))
        fix = "give --axes with Y, X and one letter for each other axis, such as ZYX or TCYX"
        raise FileProblem(path, f"axes {axes!r} for an array of {sizes}", f"{len(shape)} different axes", fix)
    others = [axis for axis in axes if axis not in "YXCS"]
    channels = [axis for axis in axes if axis in "CS"]
    return axes, [*others, "Y", "X", *channels]


def _pages(path: Path, array: np.ndarray, axes: str) -> np.ndarray:
    """Reorder an array to (N, H, W, C)."""
    axes, names = image_order(path, array.shape, axes)
    order = [axes.index(axis) for axis in names]
    others = names[: names.index("Y")]
    height, width = array.shape[axes.index("Y")], array.shape[axes.index("X")]
    images = int(np.prod([array.shape[axes.index(axis)] for axis in others], dtype=np.int64))
    return np.ascontiguousarray(array.transpose(order)).reshape(images, height, width, -1)


def _for_png(path: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
        return array
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: PNG holds one image of integers (classes or instances), not {array.dtype} of shape "
            f"{array.shape}; write a .tif or .npy file"
        )
    if array.size and (array.min() < 0 or array.max() > 65535):
        raise ValueError(
            f"{path}: PNG holds 0 to 65535, not {array.min()} to {array.max()}; write a .tif or .npy file"
        )
    return array if array.dtype == np.uint8 else array.astype(np.uint16)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:117] + "..." if len(text) > 120 else text) or type(error).__name__
