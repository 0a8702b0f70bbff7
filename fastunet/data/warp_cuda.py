"""The warp of `fastunet.data.warp` on a GPU: image, labels and weights of a tile in one kernel.

The mathematics of a pixel are the functions of `fastunet.data.warp` themselves, compiled a second time: a seed gives
the same sample as on the CPU, up to float32 rounding of a coordinate (2^-15 pixels), and other labels only where that
rounding decides which of two pixels is nearer. Tested against the CPU's and against SciPy.

Cost of a tile: one thread a pixel, 40 float32 operations a coordinate; it reads 4 (linear) or 16 (cubic) values a
channel, 4 weights and a label, and writes each value once. The float64 factors of a row are computed once for 8
pixels.
"""

# mypy: disable-error-code="call-arg,var-annotated,operator"
# The types of numba.cuda.grid and its like are those that the compiler sees.

from typing import Any

import numpy as np
from numba import cuda

from fastunet.data import warp as pixel
from fastunet.data.launch_cuda import device_array, launch, on_device
from fastunet.data.warp import Warp, check_arrays, in_image_axes

# A warp covers 8 x 4 pixels, not 32 x 1: wherever a rotation sends them they lie close together in the image, and 8
# float32 fill a sector of 32 bytes.
_BLOCK = (8, 32)
_NO_LABEL = -(2**63)

_curves, _along_row, _locate, _nearest = map(
    on_device, (pixel.curves, pixel.along_row, pixel.locate, pixel.nearest)
)
_turns_per_pixel, _fold, _linear = map(on_device, (pixel.turns_per_pixel, pixel.fold, pixel.linear))
_cubic_weights, _cubic = map(on_device, (pixel.cubic_weights, pixel.cubic))


def apply_warp(
    image: Any,
    labels: Any,
    weights: Any,
    warp: Warp,
    out: tuple[Any, Any, Any],
    order: str = "linear",
    ignored: int | None = None,
    weighted: Any = None,
    stream: Any = 0,
) -> None:
    """Start the resampling of image, labels and weights into a tile; as `fastunet.data.warp.apply_warp`.

    All arrays are on the device: anything with __cuda_array_interface__. Nothing is allocated or waited for; the
    arrays must live until the stream has come past.

    Parameters
    ----------
    image : (H, W, C) float32
        Normalised grey values; with order "cubic" their `spline_coefficients`.
    labels : (H, W) integers
    weights : (H, W) float32
    warp : Warp
    out : (x, y, w)
        To be filled: x (tile, tile, C) float32, or uint16 for the bits of bfloat16; y (output, output) of the labels'
        type; w (output, output) float32.
    order : "linear" or "cubic"
    ignored : int, optional
        A label to be left out of the loss: it becomes 0, and its weight 0.
    weighted : (1,) int32, optional
        Set to 1 if any weight of the tile is not 0, and left alone otherwise.
    stream : int or stream of Numba
        Address of the CUDA stream; 0 is the default one.

    Raises
    ------
    ValueError
        On shapes or types other than these.
    """
    image, labels, weights, weighted = map(device_array, (image, labels, weights, weighted))
    x, y, w = map(device_array, out)
    check_arrays(image, labels, weights, order)
    tile, output = warp.tile, warp.output
    for name, array, shape, types in (
        ("x", x, (tile, tile, image.shape[2]), (np.float32, np.uint16)),
        ("y", y, (output, output), (labels.dtype,)),
        ("w", w, (output, output), (np.float32,)),
    ):
        if array.shape != shape or array.dtype not in types:
            raise ValueError(
                f"out {name} is {array.dtype} of shape {array.shape}; "
                f"{' or '.join(str(np.dtype(kind)) for kind in types)} of shape {shape} is expected"
            )
    whole, motion = in_image_axes(warp)
    launch(
        _warp_pixel,
        (tile, tile),
        _BLOCK,
        stream,
        image,
        labels,
        weights,
        order == "cubic",
        tuple(whole),
        tuple(motion[0].tolist()),
        tuple(motion[1].tolist()),
        np.float32(warp.gain),
        np.float32(warp.offset),
        _NO_LABEL if ignored is None else ignored,
        x,
        y,
        w,
        weighted,
    )


@cuda.jit(device=True)
def _bfloat16_bits(value):  # type: ignore[no-untyped-def]
    """Round a finite float32 to the nearest bfloat16, ties to even."""
    bits = value.view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@cuda.jit(device=True)
def _along_four(image, row, columns, channel, weights):  # type: ignore[no-untyped-def]
    return _cubic(
        image[row, columns[0], channel],
        image[row, columns[1], channel],
        image[row, columns[2], channel],
        image[row, columns[3], channel],
        weights,
    )


@cuda.jit(device=True)
def _four_taps(whole, last, turns):  # type: ignore[no-untyped-def]
    return (
        _fold(whole - np.float32(1), last, turns),
        _fold(whole, last, turns),
        _fold(whole + np.float32(1), last, turns),
        _fold(whole + np.float32(2), last, turns),
    )


@cuda.jit
def _warp_pixel(  # type: ignore[no-untyped-def]
    image, labels, weights, cubic, centre, motion_down, motion_right, gain, offset, ignored, x, y, w, weighted
):
    height, width, channels = image.shape
    tile, output = x.shape[0], y.shape[0]
    middle = np.float32(tile - 1) * np.float32(0.5)
    j, i = cuda.grid(2)

    rows = cuda.shared.array((_BLOCK[1], 8), np.float32)
    row = rows[cuda.threadIdx.y]
    if cuda.threadIdx.x == 0:
        place, odd, even = _curves(i, middle)
        row[0], row[1], row[2], row[3] = _along_row(motion_down, place, odd, even)
        row[4], row[5], row[6], row[7] = _along_row(motion_right, place, odd, even)
    cuda.syncthreads()
    if i >= tile or j >= tile:
        return

    place, odd, even = _curves(j, middle)
    whole_down, down = _locate((row[0], row[1], row[2], row[3]), place, odd, even, centre[0])
    whole_right, right = _locate((row[4], row[5], row[6], row[7]), place, odd, even, centre[1])
    last_row, last_column = np.float32(height - 1), np.float32(width - 1)
    turns_down, turns_right = _turns_per_pixel(last_row), _turns_per_pixel(last_column)
    upper, lower = (
        _fold(whole_down, last_row, turns_down),
        _fold(whole_down + np.float32(1), last_row, turns_down),
    )
    left, beyond = (
        _fold(whole_right, last_column, turns_right),
        _fold(whole_right + np.float32(1), last_column, turns_right),
    )

    if cubic:
        columns = _four_taps(whole_right, last_column, turns_right)
        taps = _four_taps(whole_down, last_row, turns_down)
        across, along = _cubic_weights(right), _cubic_weights(down)
    for channel in range(channels):
        if cubic:
            value = _cubic(
                _along_four(image, taps[0], columns, channel, across),
                _along_four(image, taps[1], columns, channel, across),
                _along_four(image, taps[2], columns, channel, across),
                _along_four(image, taps[3], columns, channel, across),
                along,
            )
        else:
            value = _linear(
                image[upper, left, channel],
                image[upper, beyond, channel],
                image[lower, left, channel],
                image[lower, beyond, channel],
                right,
                down,
            )
        value = gain * value + offset
        if x.itemsize == 2:
            x[i, j, channel] = _bfloat16_bits(value)
        else:
            x[i, j, channel] = value

    i -= (tile - output) // 2
    j -= (tile - output) // 2
    if 0 <= i < output and 0 <= j < output:
        label = labels[_nearest(upper, lower, down), _nearest(left, beyond, right)]
        weight = _linear(
            weights[upper, left],
            weights[upper, beyond],
            weights[lower, left],
            weights[lower, beyond],
            right,
            down,
        )
        if label == ignored:
            y[i, j] = 0
            w[i, j] = 0
        else:
            y[i, j] = label
            w[i, j] = weight
            if weighted is not None:
                if weight != 0:
                    weighted[0] = 1  # whichever pixel comes first: they all write the same
