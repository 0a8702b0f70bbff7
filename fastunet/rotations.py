"""The views of an image over which a prediction is averaged: turned, mirrored or rotated, and back.

A view says how large it is, hands out parts of the seen image (continued by mirroring without end, so that a
part may lie anywhere) and brings a prediction of the view back onto the image. Four right angles and their
mirror images only move pixels; the paper's seven rotations (Ronneberger et al. 2015, section 4: "rotated
versions of the input data") resample: the image by cubic splines, which keep it sharp, the probabilities
linearly, which keeps them between 0 and 1 and their sum 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, cos, radians, sin

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Image = NDArray[np.float32]
Reader = Callable[[int, int, int, int], Image]
Rectangle = tuple[int, int, int, int]


def views(rotations: int) -> "list[Turn | Rotation]":
    """List the views to average: 1, 4 (right angles), 8 (and their mirror images) or 7 (k * 360/7 degrees).

    Raises
    ------
    ValueError
        If `rotations` is none of these.
    """
    if rotations == 7:
        return [Turn(), *(Rotation(k * 360 / 7) for k in range(1, 7))]
    if rotations not in (1, 4, 8):
        raise ValueError(f"rotations is {rotations!r}; expected 1, 4, 7 or 8")
    mirrors = (False, True) if rotations == 8 else (False,)
    return [Turn(quarters, mirror) for mirror in mirrors for quarters in range(min(rotations, 4))]


@dataclass(frozen=True)
class Turn:
    """The image turned by quarters of a full turn, then mirrored left to right where `mirror`."""

    quarters: int = 0
    mirror: bool = False

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the view of an image of height x width pixels."""
        return (width, height) if self.quarters % 2 else (height, width)

    def turned(self, image: NDArray) -> NDArray:
        """What the view shows of an image (H, W, ...): the same memory in another order."""
        seen = np.rot90(image, self.quarters)
        return seen[:, ::-1] if self.mirror else seen

    def onto_view(self, top: int, left: int, bottom: int, right: int, height: int, width: int) -> Rectangle:
        """The rectangle of the view that shows one of an image of height x width pixels; either may reach beyond."""
        for _ in range(self.quarters):
            top, left, bottom, right = width - right, top, width - left, bottom
            height, width = width, height
        return (top, width - right, bottom, width - left) if self.mirror else (top, left, bottom, right)

    def onto_image(self, top: int, left: int, bottom: int, right: int, height: int, width: int) -> Rectangle:
        """The rectangle of an image of height x width pixels that one of the view shows; either may reach beyond."""
        height, width = self.size(height, width)
        if self.mirror:
            left, right = width - right, width - left
        return Turn(-self.quarters % 4).onto_view(top, left, bottom, right, height, width)

    def reader(self, image: Image) -> Reader:
        """Return read(top, left, height, width) -> (height, width, C): any part of the image's view."""
        seen = self.turned(image)

        def pixels(top: int, left: int, bottom: int, right: int) -> Image:
            return seen[top:bottom, left:right]

        def read(top: int, left: int, height: int, width: int) -> Image:
            rows, columns = seen.shape[:2]
            return read_mirrored(pixels, rows, columns, top, left, top + height, left + width)

        return read

    def undo(self, prediction: Image, height: int, width: int) -> Image:
        """Bring a prediction of the view, (h, w, K), back onto the image: (height, width, K)."""
        prediction = prediction[:, ::-1] if self.mirror else prediction
        return np.rot90(prediction, -self.quarters)


@dataclass(frozen=True)
class Rotation:
    """The image rotated counterclockwise about its middle, in a view that holds every pixel of it."""

    degrees: float

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the view of an image of height x width pixels."""
        c, s = abs(cos(radians(self.degrees))), abs(sin(radians(self.degrees)))
        # Rounding must not add a row where the angle is right.
        rows = ceil((height - 1) * c + (width - 1) * s - 1e-9) + 1
        return rows, ceil((height - 1) * s + (width - 1) * c - 1e-9) + 1

    def reader(self, image: Image) -> Reader:
        """Return read(top, left, height, width) -> (height, width, C): any part of the image's view."""
        splines = [
            ndimage.spline_filter(image[:, :, channel], order=3, output=np.float32, mode="mirror")
            for channel in range(image.shape[2])
        ]
        matrix, offset = self._onto_image(*image.shape[:2])

        def read(top: int, left: int, height: int, width: int) -> Image:
            part = np.empty((height, width, len(splines)), np.float32)
            for channel, spline in enumerate(splines):
                part[:, :, channel] = ndimage.affine_transform(
                    spline,
                    matrix,
                    offset + matrix @ (top, left),
                    output_shape=(height, width),
                    output=np.float32,
                    order=3,
                    mode="mirror",
                    prefilter=False,
                )
            return part

        return read

    def undo(self, prediction: Image, height: int, width: int) -> Image:
        """Bring a prediction of the view, (h, w, K), back onto the image: (height, width, K)."""
        matrix, offset = self._onto_image(height, width)
        back = np.empty((height, width, prediction.shape[2]), np.float32)
        for channel in range(prediction.shape[2]):
            # "nearest" only meets coordinates that rounding has put a hair outside.
            back[:, :, channel] = ndimage.affine_transform(
                prediction[:, :, channel],
                matrix.T,
                -matrix.T @ offset,
                output_shape=(height, width),
                output=np.float32,
                order=1,
                mode="nearest",
            )
        return back

    def _onto_image(self, height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Matrix and offset that take a position in the view to its position in the image."""
        c, s = cos(radians(self.degrees)), sin(radians(self.degrees))
        matrix = np.array([[c, s], [-s, c]])
        middle = (np.array(self.size(height, width)) - 1) / 2
        return matrix, (np.array([height, width]) - 1) / 2 - matrix @ middle


def read_mirrored(
    read: Callable[[int, int, int, int], NDArray],
    height: int,
    width: int,
    top: int,
    left: int,
    bottom: int,
    right: int,
) -> NDArray:
    """Read a rectangle of an image of height x width pixels that is mirrored beyond its border.

    `read(top, left, bottom, right)` returns pixels (h, w, C) within the image.
    """
    if top >= 0 and left >= 0 and bottom <= height and right <= width:
        return read(top, left, bottom, right)
    rows, columns = mirrored(top, bottom, height), mirrored(left, right, width)
    first, start = int(rows.min()), int(columns.min())
    pixels = read(first, start, int(rows.max()) + 1, int(columns.max()) + 1)
    # Most columns are as they are: only those beyond the border are looked up one by one.
    wide = np.empty((len(pixels), right - left, pixels.shape[2]), pixels.dtype)
    low = min(max(left, 0), right)
    high = max(min(right, width), low)
    wide[:, low - left : high - left] = pixels[:, low - start : high - start]
    for beyond in (slice(0, low - left), slice(high - left, right - left)):
        wide[:, beyond] = pixels[:, columns[beyond] - start]
    return wide[rows - first]


def mirrored(start: int, stop: int, size: int) -> NDArray[np.int64]:
    """Positions in an axis of `size` pixels that the mirrored axis shows at start..stop (stop excluded).

    Mirrored as numpy.pad's "reflect" does, about the middle of the first and the last pixel, again and again
    where the border exceeds the image; an axis of one pixel repeats it.
    """
    period = max(1, 2 * size - 2)
    position = np.arange(start, stop) % period
    return np.minimum(position, period - position) if size > 1 else np.zeros(stop - start, np.int64)
