"""Rotation, flip, shift, elastic deformation, crop and grey-value change in one resampling.

Output pixel p = (row, column) of a tile of side n shows the image at

    centre + R F (p + d(p) - c),    c = (n - 1) / 2,

R the rotation, F the flip of the columns and d the displacement field: the interpolating cubic spline through
3 x 3 vectors whose corner nodes lie on the corners of the tile (Ronneberger et al. 2015, section 3.1). With
mirror ends a spline through three values f0, f1, f2 at u = -1, 0, 1 is

    f1 + (f2 - f0)/2 (3u - u^3)/2 + ((f0 + f2)/2 - f1) (3u^2 - 2|u|^3),

so that along a row the field is a sum of two fixed curves and is evaluated where it is needed, never stored.

The scalar functions decorated by `_scalar` are the mathematics of one pixel; they use neither NumPy nor
memory of their own, so that a kernel for another device can compile the same ones.
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
    if order not in ("linear", "cubic"):
        raise ValueError(f"order {order!r} is not known; 'linear' or 'cubic' is expected")
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    _check(image, labels, weights)
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

    axes, splines = _in_image_axes(warp)
    centre = np.floor(warp.centre)
    arguments = (
        image.shape,
        np.ascontiguousarray(image).ravel(),
        np.ascontiguousarray(labels).ravel(),
        np.ascontiguousarray(weights).ravel(),
        order == "cubic",
        centre.astype(np.float32),
        np.asarray(warp.centre) - centre,
        axes,
        splines,
        np.float32(warp.gain),
        np.float32(warp.offset),
        x,
        y,
        w,
    )
    in_strips(tile, threads, lambda low, high: _warp_rows(low, high, *arguments))
    return x, y, w


def _check(image: NDArray[np.float32], labels: NDArray[Any], weights: NDArray[np.float32]) -> None:
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


def _in_image_axes(warp: Warp) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """R F, (2, 2), and the factors of the curves (1, odd, even) down and across, (3, 3, 2), turned by it."""
    cosine, sine = math.cos(warp.angle), math.sin(warp.angle)
    axes = np.array([[cosine, -sine], [sine, cosine]])
    if warp.flip:
        axes[:, 1] *= -1
    to_curves = np.array([[0, 1, 0], [-0.5, 0, 0.5], [0.5, -1, 0.5]])
    return axes, np.einsum("ai,bj,ijd,ed->abe", to_curves, to_curves, warp.displacement, axes)


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
def whole_part(position):  # type: ignore[no-untyped-def]
    """Floor of a float32 within the range of int32; math.floor would leave vectors of float32."""
    toward_zero = np.float32(np.int32(position))
    return toward_zero - _ONE if position < toward_zero else toward_zero


@_scalar
def fold(index, last, turns_per_pixel):  # type: ignore[no-untyped-def]
    """Mirror a whole number into 0..last, again and again, in float32.

    One turn there and back is 2 * last pixels; `turns_per_pixel` is its inverse, or 0 where last is 0.
    """
    return min(abs(index - _TWO * last * whole_part(index * turns_per_pixel + _HALF)), last)


@_scalar
def linear(at, beside, below, across, right, down):  # type: ignore[no-untyped-def]
    """Interpolate between four pixels at the fractions `right` and `down`."""
    upper = at + right * (beside - at)
    lower = below + right * (across - below)
    return upper + down * (lower - upper)


@_scalar
def cubic_weights(t):  # type: ignore[no-untyped-def]
    """Cubic B-spline weights of the coefficients at -1, 0, 1 and 2 for the fraction t."""
    s = _ONE - t
    before, after = s * s * s * _SIXTH, t * t * t * _SIXTH
    at = _FOUR * _SIXTH - t * t * (_ONE - _HALF * t)
    return before, at, _FOUR * _SIXTH - s * s * (_ONE - _HALF * s), after


@_kernel
def _along_row(axis, row, fraction, axes, splines, curves):  # type: ignore[no-untyped-def]
    """Coordinate `axis` along a row of the tile: the constant, and the factors of place, odd and even."""
    place, odd, even = curves
    constant, along_odd, along_even = (
        splines[0, 0, axis] + splines[1, 0, axis] * odd[row] + splines[2, 0, axis] * even[row],
        splines[0, 1, axis] + splines[1, 1, axis] * odd[row] + splines[2, 1, axis] * even[row],
        splines[0, 2, axis] + splines[1, 2, axis] * odd[row] + splines[2, 2, axis] * even[row],
    )
    begin = fraction[axis] + axes[axis, 0] * place[row] + constant
    return np.float32(begin), (np.float32(axes[axis, 1]), np.float32(along_odd), np.float32(along_even))


@_kernel
def _locate(begin, factors, curves, centre, size, stride, absolute, fraction, taps):  # type: ignore[no-untyped-def]
    """Image coordinate of each pixel of a row along one axis: its fraction, and the memory offsets around it.

    taps[i] are the pixels i - 1 (of four) or i (of two) after the whole part, mirrored into the image. The
    whole centre is added last: relative to it float32 keeps about 2^-15 pixels in an image of any size.
    """
    place, odd, even = curves
    step, along_odd, along_even = factors
    last = np.float32(size - 1)
    turns_per_pixel = _HALF / last if last > 0 else np.float32(0)
    for j in range(place.size):
        position = begin + step * place[j] + along_odd * odd[j] + along_even * even[j]
        whole = whole_part(position)
        fraction[j] = position - whole
        absolute[j] = whole + centre
    for tap in range(taps.shape[0]):
        line = taps[tap]
        shift = np.float32(tap + 1 - taps.shape[0] // 2)
        for j in range(place.size):
            folded = np.uint32(np.int32(fold(absolute[j] + shift, last, turns_per_pixel)))
            line[j] = np.uint32(folded * np.uint32(stride))


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
        w0, w1, w2, w3 = cubic_weights(right[j])
        v0, v1, v2, v3 = cubic_weights(down[j])
        value = np.float32(0)
        for tap, weight in ((0, v0), (1, v1), (2, v2), (3, v3)):
            row = np.uint32(rows[tap, j] + channel)
            value += weight * (
                w0 * image[np.uint32(row + columns[0, j])]
                + w1 * image[np.uint32(row + columns[1, j])]
                + w2 * image[np.uint32(row + columns[2, j])]
                + w3 * image[np.uint32(row + columns[3, j])]
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
        nearest_row = next_row if down[j] >= _HALF else row
        nearest_column = next_column if right[j] >= _HALF else column
        y[j] = labels[np.uint32(nearest_row + nearest_column)]


@_kernel
def _warp_rows(  # type: ignore[no-untyped-def]
    low, high, shape, image, labels, weights, cubic, whole, fraction, axes, splines, gain, offset, x, y, w
):
    """Fill rows low to high of the tile. Images are flat; offsets stay uint32, which Numba does not wrap."""
    height, width, channels = shape
    tile, output = x.shape[0], y.shape[0]
    border = (tile - output) // 2
    inside = slice(border, border + output)
    middle = (tile - 1) / 2
    place = np.empty(tile, np.float32)
    odd = np.empty(tile, np.float32)
    even = np.empty(tile, np.float32)
    for j in range(tile):
        place[j] = j - middle
        u = np.float32(place[j] / max(middle, 0.5))
        odd[j] = odd_curve(u)
        even[j] = even_curve(u)

    count = 4 if cubic else 2
    here, after = count // 2 - 1, count // 2
    rows, columns = np.empty((count, tile), np.uint32), np.empty((count, tile), np.uint32)
    down, right = np.empty(tile, np.float32), np.empty(tile, np.float32)
    curves = (place, odd, even)
    scratch = np.empty(tile, np.float32)
    for i in range(low, high):
        down_begin, down_factors = _along_row(0, i, fraction, axes, splines, curves)
        right_begin, right_factors = _along_row(1, i, fraction, axes, splines, curves)
        _locate(down_begin, down_factors, curves, whole[0], height, width, scratch, down, rows)
        _locate(right_begin, right_factors, curves, whole[1], width, 1, scratch, right, columns)
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
