"""Images of which any rectangle is read without the rest: files larger than memory.

NPY files and TIFF images that lie in one piece are mapped; TIFF strips and tiles, compressed or not, and Zarr chunks
are read and decoded one by one. What has none of these (PNG, and TIFFs of an unusual order) is read whole.
"""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import tifffile
from numpy.typing import NDArray

from fastunet.data.images import (
    axes_of_shape,
    check_pixels,
    decoding,
    image_order,
    mapped_npy,
    notice,
    open_tiff,
    page_names,
    read_images,
    tiff_axes,
)
from fastunet.data.zarr_arrays import open_zarr

Sides = TypeVar("Sides", int, NDArray[np.int64])

BAND = 64  # rows copied at a time from a mapped file, whose pages stay in memory no longer


class Source(Protocol):
    """One image, wherever it is.

    Attributes
    ----------
    shape : height, width, channels
    dtype : booleans, integers or floats, in native byte order
    """

    shape: tuple[int, int, int]
    dtype: np.dtype

    def read(self, top: int, left: int, bottom: int, right: int) -> NDArray:
        """Return the rectangle's pixels, (bottom - top, right - left, C)."""

    def held_bytes(self, height: Sides, width: Sides) -> Sides:
        """Bytes kept from one rectangle of this size, or of each of these, to the next, and taken while it is read."""


def open_images(
    path: Path | str, axes: str | None = None, notify: Callable[[str], None] = notice
) -> list[tuple[str, Source]]:
    """Open every 2-D image of a file: its name, as `fastunet.data.images.read_images` has it, and its source.

    Raises
    ------
    DataError
        As `read_images`; that values are not finite or cannot be decoded is only found when they are read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    sources: list[Source] | None = None
    if path.exists():
        with decoding(path):
            if suffix == ".npy":
                array = mapped_npy(path)
                check_pixels(path, array.shape, array.dtype)
                sources = _mapped(path, array, axes)
            elif suffix == ".zarr":
                sources = _zarr_images(path, axes)
            elif suffix in (".tif", ".tiff"):
                sources = _tiff_images(path, axes)
    if sources is None:
        images = read_images(path, axes, notify)
        together = sum(image.pixels.nbytes for image in images)
        return [(image.name, Loaded(image.pixels, together)) for image in images]
    return list(zip(page_names(path, len(sources)), sources))


class Loaded:
    """An image (H, W, C) in memory, where it takes so many bytes with all that were read with it."""

    def __init__(self, pixels: NDArray, together: int) -> None:
        self.pixels = pixels
        self.together = together
        self.shape = pixels.shape
        self.dtype = pixels.dtype

    def read(self, top: int, left: int, bottom: int, right: int) -> NDArray:
        return self.pixels[top:bottom, left:right]

    def held_bytes(self, height: Sides, width: Sides) -> Sides:
        return 0 * height + self.together


class Mapped:
    """An image that lies in one piece in a file, seen by a mapped array (H, W, C) in any order of its axes."""

    def __init__(self, mapped: np.memmap, seen: NDArray) -> None:
        self._mapped = mapped
        self._seen = seen
        self.shape = seen.shape
        self.dtype = seen.dtype.newbyteorder("=")

    def read(self, top: int, left: int, bottom: int, right: int) -> NDArray:
        pixels = np.empty((bottom - top, right - left, self.shape[2]), self.dtype)
        for low in range(top, bottom, BAND):
            high = min(low + BAND, bottom)
            pixels[low - top : high - top] = self._seen[low:high, left:right]
            self._forget()
        return pixels

    def _forget(self) -> None:
        """Pages of the file that were touched count as memory of the process until they are given back."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def held_bytes(self, height: Sides, width: Sides) -> Sides:
        return 0 * height


class Segmented:
    """An image that is stored in segments of one size (the last of a row or column may be less).

    The segments that the last rectangle touched are kept: the next one to the right shares some of them, all where
    segments are strips.

    Parameters
    ----------
    shape, dtype : as in `Source`
    segment : height and width
    decode : reads the segment in row and column of the grid, (h, w, C)
    decoded_bytes : what decoding one segment takes besides
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: np.dtype,
        segment: tuple[int, int],
        decode: Callable[[int, int], NDArray],
        decoded_bytes: int,
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype).newbyteorder("=")
        self._segment = segment
        self._decode = decode
        self._decoded_bytes = decoded_bytes
        self._kept: dict[tuple[int, int], NDArray] = {}

    def read(self, top: int, left: int, bottom: int, right: int) -> NDArray:
        high, wide = self._segment
        pixels = np.empty((bottom - top, right - left, self.shape[2]), self.dtype)
        touched = [
            (row, column)
            for row in range(top // high, -(-bottom // high))
            for column in range(left // wide, -(-right // wide))
        ]
        self._kept = {place: self._kept[place] for place in touched if place in self._kept}
        for place in touched:
            if place not in self._kept:
                self._kept[place] = self._decode(*place)
            first, start = place[0] * high, place[1] * wide
            low, begin = max(top, first), max(left, start)
            part = self._kept[place][low - first : bottom - first, begin - start : right - start]
            pixels[low - top : low - top + part.shape[0], begin - left : begin - left + part.shape[1]] = part
        return pixels

    def held_bytes(self, height: Sides, width: Sides) -> Sides:
        touched: Any = 1
        for asked, side, segment in zip((height, width), self.shape, self._segment):
            touched *= np.minimum(-(-side // segment), -(-(asked - 1) // segment) + 1)
        of_one = self._segment[0] * self._segment[1] * self.shape[2] * self.dtype.itemsize
        return touched * of_one + self._decoded_bytes


def _mapped(path: Path, array: np.memmap, axes: str | None) -> list[Source] | None:
    axes, names = image_order(path, array.shape, axes or axes_of_shape(path, array.shape))
    images = names[: names.index("Y")]
    if len(names) - len(images) > 3:
        return None  # two axes of channels
    ordered: NDArray = array.transpose([axes.index(name) for name in names])
    if len(names) - len(images) == 2:
        ordered = ordered[..., None]
    return [Mapped(array, ordered[index]) for index in np.ndindex(ordered.shape[: len(images)])]


def _zarr_images(path: Path, axes: str | None) -> list[Source]:
    array, stored_axes = open_zarr(path)
    check_pixels(path, array.shape, array.dtype)
    axes, names = image_order(path, array.shape, axes or stored_axes or axes_of_shape(path, array.shape))
    order = [axes.index(name) for name in names]
    images = names.index("Y")
    shape = [array.shape[axis] for axis in order]
    chunks = [array.chunks[axis] for axis in order]
    high, wide = chunks[images : images + 2]
    height, width = shape[images : images + 2]
    channels = int(np.prod(shape[images + 2 :]))
    # A chunk may hold several images' pixels, and be decoded beside the pixels asked for.
    decoded = 2 * int(np.prod(chunks)) * array.dtype.itemsize

    def segment(index: tuple[int, ...]) -> Callable[[int, int], NDArray]:
        def decode(row: int, column: int) -> NDArray:
            rows, columns = slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide)
            chosen = dict(zip(names, (*index, rows, columns, *(slice(None) for _ in names[images + 2 :]))))
            with decoding(path):
                part = np.asarray(array[tuple(chosen[name] for name in axes)])
            left = [name for name in axes if name in names[images:]]
            part = part.transpose([left.index(name) for name in names[images:]])
            return part.reshape(*part.shape[:2], channels)

        return decode

    return [
        Segmented((height, width, channels), array.dtype, (high, wide), segment(index), decoded)
        for index in np.ndindex(*shape[:images])
    ]


def _tiff_images(path: Path, axes: str | None) -> list[Source] | None:
    found: list[Source] = []
    with open_tiff(path) as series:
        for one in series:
            check_pixels(path, one.shape, one.dtype)
            named = axes or tiff_axes(one) or axes_of_shape(path, one.shape)
            if one.dataoffset is None:
                images = _tiff_segments(path, one, named)
            else:
                dtype = one.dtype.newbyteorder(one.keyframe.parent.byteorder)
                mapped: np.memmap = np.memmap(path, dtype, "r", one.dataoffset, one.shape)
                images = _mapped(path, mapped, named)
            if images is None:
                return None
            found += images
    return found


def _tiff_segments(path: Path, series: tifffile.TiffPageSeries, axes: str) -> list[Source] | None:
    """The images of a series by the segments of its pages; None where pages are not planes of rows and columns."""
    axes, names = image_order(path, series.shape, axes)
    pages = list(series.pages)
    key: Any = series.keyframe
    interleaved = key.samplesperpixel > 1 and key.planarconfig == 1
    in_page = ("YX" + axes[-1:]) if interleaved else "YX"
    if (
        any(page is None for page in pages)
        or key.imagedepth > 1
        or not axes.endswith(in_page)
        or in_page[2:] not in ("", "S", "C")
        or (key.samplesperpixel > 1 and not interleaved)
    ):
        return None
    outer = axes[: len(axes) - len(in_page)]
    if len(pages) != int(np.prod(series.shape[: len(outer)])) or (interleaved and set(outer) & set("CS")):
        return None
    height, width = key.imagelength, key.imagewidth
    high, wide = (key.tilelength, key.tilewidth) if key.is_tiled else (min(key.rowsperstrip, height), width)
    columns = -(-width // wide)
    numbers = np.arange(len(pages)).reshape(series.shape[: len(outer)])
    images = [name for name in names[: names.index("Y")]]
    channel = [name for name in outer if name in "CS"]
    if len(channel) > 1:
        return None
    numbers = numbers.transpose([outer.index(name) for name in (*images, *channel)])
    numbers = numbers.reshape(*numbers.shape[: len(images)], -1)
    channels = numbers.shape[-1] * (key.samplesperpixel if interleaved else 1)

    def segment(planes: NDArray) -> Callable[[int, int], NDArray]:
        def decode(row: int, column: int) -> NDArray:
            parts = []
            with decoding(path), tifffile.FileHandle(path) as file:
                for number in planes:
                    page, index = pages[number], row * columns + column
                    file.seek(page.dataoffsets[index])
                    stored = file.read(page.databytecounts[index]) or None
                    values, _, size = key.decode(stored, index, jpegtables=key.jpegtables)
                    if values is None:
                        values = np.full(size, key.nodata, key.dtype)
                    parts.append(values[0, : size[1], : size[2]])
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)

        return decode

    decoded = 3 * high * wide * channels * key.dtype.itemsize
    shape = height, width, channels
    return [
        Segmented(shape, key.dtype, (high, wide), segment(numbers[index]), decoded)
        for index in np.ndindex(numbers.shape[:-1])
    ]
