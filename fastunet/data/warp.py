"""Rotation, flip, shift, elastic deformation, crop and grey-value change in one resampling.

Output pixel p = (row, column) of a tile of side n shows the image at

    centre + R F (p + d(p) - c),    c = (n - 1) / 2,

R the rotation, F the flip of the columns and d the displacement field: the interpolating cubic spline through
3 x 3 vectors whose corner nodes lie on the corners of the tile (Ronneberger et al. 2015, section 3.1). With
mirror ends a spline through three values f0, f1, f2 at u = -1, 0, 1 is

    f1 + (f2 - f0)/2 (3u - u^3)/2 + ((f0 + f2)/2 - f1) (3u^2 - 2|u|^3),

so that along a row the field is a sum of two fixed curves and is evaluated where it is needed, never stored.

The functions decorated by `_scalar` are the mathematics of one pixel; they use neither NumPy arrays nor memory of
their own, so that `fastunet.data.warp_cuda` compiles the same ones for a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.ndimage import spline_filter1d

from fastunet.data.strips import in_strips

FULL_DISPLACEMENT = 10.0  # standard deviation in pixels (Ronneberger et al. 2015, section 3.1)
FULL_DISPLACEMENT_TILE = 512  # smaller tiles take proportionally smaller vectors, so that nothing folds
GAIN = (0.8, 1.2)
OFFSET = (-0.5, 0.5)

# Strict but for what leaves an identity exact: products may be fused, infinities and NaNs need not be minded.
_FLOAT = {"contract", "nsz", "nnan", "ninf"}
_HALF, _ONE, _TWO, _THREE = np.float32(0.5), np.float32(1), np.float32(2), np.float32(3)
_FOUR, _SIXTH = np.float32(4), np.float32(1 / 6)


@dataclass(frozen=True, eq=False)
class Warp:
    """Where a tile lies in an image and how it is deformed.

    Attributes
    ----------
    tile, output : int
        Side of the network's input and of its output, the centre of the input; their difference is even.
    centre : (float, float)
        Row and column of the image at the middle of the tile.
    angle : float
        Rotation in radians.
    flip : bool
        Whether columns are mirrored, before the rotation.
    displacement : (3, 3, 2) float64
        Vectors (row, column) in pixels of the tile, at the nodes from its first to its last row and column.
    gain, offset : float
        Grey values become gain * value + offset.
    """

    tile: int
    output: int
    centre: tuple[float, float]
    angle: float = 0.0
    flip: bool = False
    displacement: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 3, 2)))
    gain: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.output <= self.tile or (self.tile - self.output) % 2:
            raise ValueError(
                f"output {self.output} does not lie in the centre of tile {self.tile}; "
                "an output from 1 to the tile with the same border on every side is expected"
            )
        if np.shape(self.displacement) != (3, 3, 2):
            raise ValueError(f"displacement has shape {np.shape(self.displacement)}; (3, 3, 2) is expected")
        numbers = (*self.centre, self.angle, self.gain, self.offset, *np.ravel(self.displacement))
        if not np.isfinite(numbers).all():
            raise ValueError(f"{self} holds a number that is not finite; only finite ones describe a warp")


def draw_warp(
    rng: np.random.Generator | Sequence[int],
    image_shape: Sequence[int],
    tile: int,
    output: int,
    displacement: float | None = None,
    gain: tuple[float, float] = GAIN,
    offset: tuple[float, float] = OFFSET,
) -> Warp:
    """Draw a random warp.

    The centre is uniform over the image. As the image goes on mirrored beyond its border, every part of it,
    borders and corners included, is then as likely to be in the output. Rotation is uniform over the circle,
    a flip has probability 1/2, displacement vectors are normal.

    Parameters
    ----------
    rng : Generator or (seed, index)
        A pair gives the same warp at any time and on any device.
    image_shape : (H, W, ...)
    tile, output : int
        Sides of the network's input and output.
    displacement : float, optional
        Standard deviation in pixels; 10 for tiles of 512 and more and 10 * tile / 512 below when not given.
    gain, offset : (low, high)
        Ranges of the grey-value change. The default offset is in units of a standard deviation, for images
        normalised to mean 0 and standard deviation 1: half of one is about 0.1 of the range of an 8-bit
        micrograph.
    """
    generator = np.random.default_rng(rng)
    if displacement is None:
        displacement = FULL_DISPLACEMENT * min(tile, FULL_DISPLACEMENT_TILE) / FULL_DISPLACEMENT_TILE
    return Warp(
        tile=tile,
        output=output,
        centre=(generator.uniform(0, image_shape[0] - 1), generator.uniform(0, image_shape[1] - 1)),
        angle=generator.uniform(0, 2 * math.pi),
        flip=bool(generator.uniform() < 0.5),
        gain=generator.uniform(*gain),
        offset=generator.uniform(*offset),
        displacement=generator.normal(0, displacement, (3, 3, 2)),
    )


def spline_coefficients(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Coefficients of the interpolating cubic B-spline of (H, W, C), with mirror ends; for order "cubic"."""
    rows = spline_filter1d(image, 3, axis=0, output=np.float32, mode="mirror")
    return spline_filter1d(rows, 3, axis=1, output=np.float32, mode="mirror")


def apply_warp(
    image: NDArray[np.float32],
    labels: NDArray[Any],
    weights: NDArray[np.float32],
    warp: Warp,
    order: str = "linear",
    prefilter: bool = True,
    out: tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float32]] | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float32]]:
    """Resample image, labels and weights into a tile, in one pass and without the GIL.

    Beyond its border the image is mirrored as by numpy's "reflect", again and again.

    Parameters
    ----------
    image : (H, W, C) float32
        Normalised grey values.
    labels : (H, W) integers
        Classes or instances; the nearest pixel is taken.
    weights : (H, W) float32
        Interpolated linearly.
    order : "linear" or "cubic"
        Interpolation of the image; cubic is the interpolating B-spline.
    prefilter : bool
        With order "cubic": whether to compute the `spline_coefficients` of the image here. With False `image`
        holds them already, which saves time where many tiles are taken from one image.
    out : (x, y, w), optional
        C-contiguous arrays to fill, of the shapes and types returned.
    threads : int
        Rows are shared out among so many threads; the result does not depend on it.

    Returns
    -------
    x : (tile, tile, C) float32
    y : (output, output), the type of the labels
    w : (output, output) float32
        y and w show the centre of the tile.

    Raises
    ------
    ValueError
        On shapes or types other than these.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    check_arrays(image, labels, weights, order)
    tile, output = warp.tile, warp.output
    channels = image.shape[2]
    expected = (
        ("x", (tile, tile, channels), image.dtype),
        ("y", (output, output), labels.dtype),
        ("w", (output, output), weights.dtype),
    )
    if out is None:
        x, y, w = (np.empty(shape, dtype) for _, shape, dtype in expected)
    else:
        x, y, w = out
        for array, (name, shape, dtype) in zip(out, expected, strict=True):
            if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(
                    f"out {name} is {array.dtype} of shape {array.shape}; "
                    f"C-contiguous {dtype} of shape {shape} is expected"
                )
    if order == "cubic" and prefilter:
        image = spline_coefficients(image)

    whole, motion = in_image_axes(warp)
    arguments = (
        image.shape,
        np.ascontiguousarray(image).ravel(),
        np.ascontiguousarray(labels).ravel(),
        np.ascontiguousarray(weights).ravel(),
        order == "cubic",
        whole,
        motion,
        np.float32(warp.gain),
        np.float32(warp.offset),
        x,
        y,
        w,
    )
    in_strips(tile, threads, lambda low, high: _warp_rows(low, high, *arguments))
    return x, y, w


def check_arrays(image: Any, labels: Any, weights: Any, order: str) -> None:
    """Raise ValueError unless these are arrays, on any device, of the shapes and types `apply_warp` takes."""
    if order not in ("linear", "cubic"):
        raise ValueError(f"order {order!r} is not known; 'linear' or 'cubic' is expected")
    if image.ndim != 3 or image.dtype != np.float32 or not 0 < image.size < 2**32:
        raise ValueError(
            f"image is {image.dtype} of shape {image.shape}; "
            "float32 of shape (H, W, C) with 1 to 2**32 - 1 values is expected"
        )
    if labels.shape != image.shape[:2] or labels.dtype.kind not in "bui":
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}; "
            f"integers of shape {image.shape[:2]} are expected"
        )
    if weights.shape != image.shape[:2] or weights.dtype != np.float32:
        raise ValueError(
            f"weights are {weights.dtype} of shape {weights.shape}; "
            f"float32 of shape {image.shape[:2]} is expected"
        )


def in_image_axes(warp: Warp) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Centre and motion of a warp along the axes of the image, as the functions of one pixel take them.

    Returns
    -------
    whole : (2,) float32
        The centre rounded down.
    motion : (2, 12) float64
        For each axis of the image the rest of the centre, R F (2), and the factors of the curves (1, odd, even)
        across the tile times those down it, (3, 3), turned by R F.
    """
    cosine, sine = math.cos(warp.angle), math.sin(warp.angle)
    axes = np.array([[cosine, -sine], [sine, cosine]])
    if warp.flip:
        axes[:, 1] *= -1
    to_curves = np.array([[0, 1, 0], [-0.5, 0, 0.5], [0.5, -1, 0.5]])
    splines = np.einsum("ai,bj,ijd,ed->eba", to_curves, to_curves, warp.displacement, axes)
    whole = np.floor(warp.centre)
    rest = np.asarray(warp.centre) - whole
    return whole.astype(np.float32), np.concatenate([rest[:, None], axes, splines.reshape(2, 9)], axis=1)


_scalar = njit(nogil=True, cache=True, inline="always", fastmath=_FLOAT, error_model="numpy")
_kernel = njit(nogil=True, cache=True, fastmath=_FLOAT, error_model="numpy")


@_scalar
def odd_curve(u):  # type: ignore[no-untyped-def]
    """Spline through (-1, 0, 1) at u = -1, 0, 1."""
    return _HALF * (_THREE * u - u * u * u)


@_scalar
def even_curve(u):  # type: ignore[no-untyped-def]
    """Spline through (1, 0, 1) at u = -1, 0, 1."""
    return u * u * (_THREE - _TWO * abs(u))


@_scalar
def curves(index, middle):  # type: ignore[no-untyped-def]
    """Place of a row or column of the tile relative to its middle, and the two curves there."""
    place = np.float32(index) - middle
    u = place / max(middle, _HALF)
    return place, odd_curve(u), even_curve(u)


@_scalar
def along_row(motion, place, odd, even):  # type: ignore[no-untyped-def]
    """One coordinate along the row of the tile at `place`: its begin, and the factors of place, odd and even."""
    begin = motion[0] + motion[1] * place + (motion[3] + motion[4] * odd + motion[5] * even)
    along_odd = motion[6] + motion[7] * odd + motion[8] * even
    along_even = motion[9] + motion[10] * odd + motion[11] * even
    return np.float32(begin), np.float32(motion[2]), np.float32(along_odd), np.float32(along_even)


@_scalar
def whole_part(position):  # type: ignore[no-untyped-def]
    """Floor of a float32 within the range of int32; math.floor would leave vectors of float32."""
    toward_zero = np.float32(np.int32(position))
    return toward_zero - _ONE if position < toward_zero else toward_zero


@_scalar
def locate(row, place, odd, even, centre):  # type: ignore[no-untyped-def]
    """Coordinate of a pixel of the row (see `along_row`): its whole part, and the fraction beyond it.

    The whole centre is added last: relative to it float32 keeps about 2^-15 pixels in an image of any size.
    """
    begin, step, along_odd, along_even = row
    position = begin + step * place + along_odd * odd + along_even * even
    whole = whole_part(position)
    return whole + centre, position - whole


@_scalar
def turns_per_pixel(last):  # type: ignore[no-untyped-def]
    """Inverse of the way from pixel 0 to the last one and back; 0 where they are the same."""
    return _HALF / last if last > 0 else np.float32(0)


@_scalar
def fold(index, last, turns):  # type: ignore[no-untyped-def]
    """Mirror a whole number into 0..last, again and again, in float32; `turns` is turns_per_pixel(last)."""
    return np.uint32(np.int32(min(abs(index - _TWO * last * whole_part(index * turns + _HALF)), last)))


@_scalar
def linear(at, beside, below, across, right, down):  # type: ignore[no-untyped-def]
    """Interpolate between four pixels at the fractions `right` and `down`."""
    upper = at + right * (beside - at)
    lower = below + right * (across - below)
    return upper + down * (lower - upper)


@_scalar
def nearest(at, after, fraction):  # type: ignore[no-untyped-def]
    """Whichever of two neighbouring pixels is nearer."""
    return after if fraction >= _HALF else at


@_scalar
def cubic_weights(t):  # type: ignore[no-untyped-def]
    """Cubic B-spline weights of the coefficients at -1, 0, 1 and 2 for the fraction t."""
    s = _ONE - t
    before, after = s * s * s * _SIXTH, t * t * t * _SIXTH
    at = _FOUR * _SIXTH - t * t * (_ONE - _HALF * t)
    return before, at, _FOUR * _SIXTH - s * s * (_ONE - _HALF * s), after


@_scalar
def cubic(before, at, after, beyond, weights):  # type: ignore[no-untyped-def]
    """Interpolate between four coefficients with their `cubic_weights`."""
    return weights[0] * before + weights[1] * at + weights[2] * after + weights[3] * beyond


@_kernel
def _locate_row(row, columns, centre, size, stride, absolute, fraction, taps):  # type: ignore[no-untyped-def]
    """Image coordinate of each pixel of a row along one axis: its fraction, and the memory offsets around it.

    taps[i] are the pixels i - 1 (of four) or i (of two) after the whole part, mirrored into the image.
    """
    place, odd, even = columns
    for j in range(place.size):
        absolute[j], fraction[j] = locate(row, place[j], odd[j], even[j], centre)
    last = np.float32(size - 1)
    turns = turns_per_pixel(last)
    for tap in range(taps.shape[0]):
        line = taps[tap]
        shift = np.float32(tap + 1 - taps.shape[0] // 2)
        for j in range(place.size):
            line[j] = np.uint32(fold(absolute[j] + shift, last, turns) * np.uint32(stride))


@_kernel
def _sample_linear(image, channel, gain, offset, down, right, rows, columns, x):  # type: ignore[no-untyped-def]
    upper, lower, left, beyond = rows[0], rows[1], columns[0], columns[1]
    for j in range(down.size):
        row, next_row = np.uint32(upper[j] + channel), np.uint32(lower[j] + channel)
        value = linear(
            image[np.uint32(row + left[j])],
            image[np.uint32(row + beyond[j])],
            image[np.uint32(next_row + left[j])],
            image[np.uint32(next_row + beyond[j])],
            right[j],
            down[j],
        )
        x[j, channel] = gain * value + offset


@_kernel
def _sample_cubic(image, channel, gain, offset, down, right, rows, columns, x):  # type: ignore[no-untyped-def]
    for j in range(down.size):
        weights = cubic_weights(right[j])
        value = np.float32(0)
        for tap, weight in enumerate(cubic_weights(down[j])):
            row = np.uint32(rows[tap, j] + channel)
            value += weight * cubic(
                image[np.uint32(row + columns[0, j])],
                image[np.uint32(row + columns[1, j])],
                image[np.uint32(row + columns[2, j])],
                image[np.uint32(row + columns[3, j])],
                weights,
            )
        x[j, channel] = gain * value + offset


@_kernel
def _sample_targets(labels, weights, down, right, upper, lower, left, beyond, y, w):  # type: ignore[no-untyped-def]
    for j in range(down.size):
        row, next_row, column, next_column = upper[j], lower[j], left[j], beyond[j]
        w[j] = linear(
            weights[np.uint32(row + column)],
            weights[np.uint32(row + next_column)],
            weights[np.uint32(next_row + column)],
            weights[np.uint32(next_row + next_column)],
            right[j],
            down[j],
        )
        y[j] = labels[np.uint32(nearest(row, next_row, down[j]) + nearest(column, next_column, right[j]))]


@_kernel
def _warp_rows(  # type: ignore[no-untyped-def]
    low, high, shape, image, labels, weights, cubic, whole, motion, gain, offset, x, y, w
):
    """Fill rows low to high of the tile. Images are flat; offsets stay uint32, which Numba does not wrap."""
    height, width, channels = shape
    tile, output = x.shape[0], y.shape[0]
    border = (tile - output) // 2
    inside = slice(border, border + output)
    middle = np.float32((tile - 1) / 2)
    place = np.empty(tile, np.float32)
    odd = np.empty(tile, np.float32)
    even = np.empty(tile, np.float32)
    for j in range(tile):
        place[j], odd[j], even[j] = curves(j, middle)

    count = 4 if cubic else 2
    here, after = count // 2 - 1, count // 2
    rows, columns = np.empty((count, tile), np.uint32), np.empty((count, tile), np.uint32)
    down, right = np.empty(tile, np.float32), np.empty(tile, np.float32)
    scratch = np.empty(tile, np.float32)
    for i in range(low, high):
        down_row = along_row(motion[0], place[i], odd[i], even[i])
        right_row = along_row(motion[1], place[i], odd[i], even[i])
        _locate_row(down_row, (place, odd, even), whole[0], height, width, scratch, down, rows)
        _locate_row(right_row, (place, odd, even), whole[1], width, 1, scratch, right, columns)
        if border <= i < border + output:
            _sample_targets(
                labels,
                weights,
                down[inside],
                right[inside],
                rows[here][inside],
                rows[after][inside],
                columns[here][inside],
                columns[after][inside],
                y[i - border],
                w[i - border],
            )
        if channels > 1:
            rows *= np.uint32(channels)
            columns *= np.uint32(channels)
        for channel in range(channels):
            if cubic:
                _sample_cubic(image, np.uint32(channel), gain, offset, down, right, rows, columns, x[i])
            else:
                _sample_linear(image, np.uint32(channel), gain, offset, down, right, rows, columns, x[i])
