"""The weight map of `fastunet.data.weight_map` on a GPU: the same exact distances, one thread a pixel.

columns  Each pixel looks up and down its column, ever further, until it has met two labels or is `reach` away.
rows     Each pixel looks left and right at what its row's columns found, and merges it (`two_nearest_of`) until no
         site so far away can be nearer than the second instance.

Threads of a warp read neighbouring pixels, and no thread waits for another. Cost: at most 2 reach + 1 labels and as
many triples of the column pass for each background pixel, from the first-level cache; fewer where instances are near.
reach is 31 pixels for paper2015 and 58 for falk2019 with their own w0 and sigma, so that the time is proportional to
the pixels; without a radius it is at most (H + W) steps a pixel. Memory traffic: a label and 12 bytes of scratch
written and read for each pixel, and the weight. Distances are compared as integers and are exact; d1, d2 and the
weight are computed in float64 by the CPU's own functions. Tested against the CPU's and against SciPy.
"""

# mypy: disable-error-code="call-arg,var-annotated,operator"
# The types of numba.cuda.grid and its like are those that the compiler sees.

import math
from typing import Any

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from fastunet.data import weight_map as pixel
from fastunet.data.launch_cuda import device_array, launch, on_device
from fastunet.data.weight_map import (
    FALK2019,
    FALK_BACKGROUND,
    FAR,
    OWN_CLASS_WEIGHTS,
    PAPER2015,
    border_terms,
)

_BLOCK = (32, 8)
_MOST_CLASSES = _BLOCK[0] * _BLOCK[1]  # a thread of the block counts for each
_FAR = np.int32(FAR)

_two_nearest_of, _add_border = map(on_device, (pixel.two_nearest_of, pixel.add_border))


def weight_map(
    labels: Any,
    out: Any,
    scratch: Any,
    mask: Any = None,
    w0: float | None = None,
    sigma: float | None = None,
    class_weights: Any = None,
    ignored: Any = None,
    preset: str = PAPER2015,
    stream: int = 0,
) -> None:
    """Start computing the weight of each pixel in the loss; as `fastunet.data.weight_map.weight_map`.

    All arrays are on the device: anything with __cuda_array_interface__. Nothing is allocated or waited for, so that
    values cannot be refused; the arrays must live until the stream has come past.

    Parameters
    ----------
    labels : (H, W) integers of at most 32 bits
        Instances, 0 is background.
    out : (H, W) float32
        To be filled.
    scratch : (3, H, W) int32
        Overwritten.
    mask : (H, W) integers, optional
        Classes 0..K-1 after gaps are cut; labels > 0 when not given.
    w0, sigma : float, optional
        The preset's own when not given.
    class_weights : (K,) float64, optional
        w_c, for example from `balanced_class_weights`; 1 for every class when not given. A pixel whose class is
        beyond them becomes NaN.
    ignored : (H, W) booleans, optional
        Pixels of weight 0.
    preset : "paper2015" or "falk2019"
    stream : int
        Address of the CUDA stream; 0 is the default one.

    Raises
    ------
    ValueError
        On shapes or types other than these, or parameters out of range.
    """
    border = border_terms(preset, w0, sigma)
    if preset == FALK2019 and class_weights is not None:
        raise ValueError(OWN_CLASS_WEIGHTS)
    labels, out, scratch, mask, class_weights, ignored = map(
        device_array, (labels, out, scratch, mask, class_weights, ignored)
    )
    _check("labels", labels, labels.shape, "bui")
    _check("out", out, labels.shape, "f")
    _check("mask", mask, labels.shape, "bui")
    _check("ignored", ignored, labels.shape, "b")
    if class_weights is not None and (class_weights.dtype != np.float64 or class_weights.ndim != 1):
        raise ValueError(
            f"class_weights are {class_weights.dtype} of shape {class_weights.shape}; float64 (K,) is expected"
        )
    _search_columns(labels, scratch, border[-1], stream)
    launch(
        _weigh,
        labels.shape,
        _BLOCK,
        stream,
        scratch,
        _reach(border[-1], labels.shape),
        labels,
        mask,
        ignored,
        class_weights,
        FALK_BACKGROUND if preset == FALK2019 else 1.0,
        border,
        out,
    )


def weight_map_of_host(
    gpu: int,
    labels: NDArray[np.integer],
    mask: NDArray[np.integer],
    w0: float | None,
    sigma: float | None,
    class_weights: NDArray[np.float64] | None,
    ignore: NDArray[np.bool_] | None,
    preset: str,
) -> NDArray[np.float32]:
    """`fastunet.data.weight_map.weight_map` of arrays of the host, computed on a GPU."""

    def sent(array: NDArray[Any] | None) -> Any:
        return None if array is None else cuda.to_device(np.ascontiguousarray(array))

    with cuda.gpus[gpu]:
        out = cuda.device_array(labels.shape, np.float32)
        scratch = cuda.device_array((3, *labels.shape), np.int32)
        weight_map(
            sent(labels), out, scratch, sent(mask), w0, sigma, sent(class_weights), sent(ignore), preset
        )
        return out.copy_to_host()


def two_nearest(
    labels: Any, d1: Any, d2: Any, scratch: Any, radius: float = math.inf, stream: int = 0
) -> None:
    """Start computing the distances to the nearest and to the second nearest instance, exact.

    As `fastunet.data.weight_map.two_nearest`, into d1 and d2, (H, W) float32 on the device; the other arrays and the
    stream are those of `weight_map`.
    """
    if not radius >= 0:
        raise ValueError(f"radius is {radius}; it must be a number of pixels of at least 0")
    labels, d1, d2, scratch = map(device_array, (labels, d1, d2, scratch))
    _check("labels", labels, labels.shape, "bui")
    _check("d1", d1, labels.shape, "f")
    _check("d2", d2, labels.shape, "f")
    _search_columns(labels, scratch, radius, stream)
    reach = _reach(radius, labels.shape)
    launch(
        _measure, labels.shape, _BLOCK, stream, scratch, reach, float(min(radius, sum(labels.shape))), d1, d2
    )


def count_classes(mask: Any, counts: Any, ignored: Any = None, stream: int = 0) -> None:
    """Start adding the pixels of each class 0..K-1 that are not ignored to counts, (K,) int64 on the device.

    A training set adds these up over its images; K is at most 256.
    """
    mask, counts, ignored = map(device_array, (mask, counts, ignored))
    _check("mask", mask, mask.shape, "bui")
    _check("ignored", ignored, mask.shape, "b")
    if counts.dtype != np.int64 or counts.ndim != 1 or not 1 <= counts.size <= _MOST_CLASSES:
        raise ValueError(
            f"counts is {counts.dtype} of shape {counts.shape}; int64 of 1 to {_MOST_CLASSES} classes is expected"
        )
    launch(_count, mask.shape, _BLOCK, stream, mask, ignored, counts)


def balanced_class_weights(counts: Any, out: Any, stream: int = 0) -> None:
    """Start computing w_c = N / (K N_c) from counts (K,) int64 into out (K,) float64; 0 for an absent class."""
    counts, out = map(device_array, (counts, out))
    if out.shape != counts.shape or out.dtype != np.float64:
        raise ValueError(
            f"out is {out.dtype} of shape {out.shape}; float64 of shape {counts.shape} is expected"
        )
    launch(_balance, (1, counts.size), _BLOCK, stream, counts, out)


def _check(name: str, array: Any, shape: tuple[int, ...], kinds: str) -> None:
    if array is not None and (
        len(shape) != 2 or array.shape != shape or array.dtype.kind not in kinds or array.dtype.itemsize > 4
    ):
        kind = {"bui": "integers", "f": "float32", "b": "booleans"}[kinds]
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; {kind} of at most 32 bits and "
            f"of shape {shape if len(shape) == 2 else '(H, W)'} are expected"
        )


def _reach(radius: float, shape: tuple[int, int]) -> int:
    return int(min(radius, sum(shape)))


def _search_columns(labels: Any, scratch: Any, radius: float, stream: int) -> None:
    if scratch.shape != (3, *labels.shape) or scratch.dtype != np.int32:
        raise ValueError(
            f"scratch is {scratch.dtype} of shape {scratch.shape}; "
            f"int32 of shape {(3, *labels.shape)} is expected"
        )
    launch(_search_column, labels.shape, _BLOCK, stream, labels, _reach(radius, labels.shape), scratch)


@cuda.jit
def _search_column(labels, reach, columns):  # type: ignore[no-untyped-def]
    height, width = labels.shape
    x, y = cuda.grid(2)
    if x >= width or y >= height:
        return
    owner = labels[y, x]
    first = _FAR if owner == 0 else np.int32(0)
    second = _FAR
    for distance in range(1, min(reach, max(y, height - 1 - y)) + 1):
        if second < _FAR:
            break
        near = np.int32(distance)
        if distance <= y:
            label = labels[y - distance, x]
            if label != 0:
                owner, first, second = _two_nearest_of(owner, first, second, label, near, _FAR)
        if y + distance < height:
            label = labels[y + distance, x]
            if label != 0:
                owner, first, second = _two_nearest_of(owner, first, second, label, near, _FAR)
    columns[0, y, x] = owner
    columns[1, y, x] = first
    columns[2, y, x] = second


@cuda.jit(device=True)
def _site(columns, y, x, square):  # type: ignore[no-untyped-def]
    """What column x found from row y, with squared distances from a pixel of that row `square` away."""
    first, second = np.int64(columns[1, y, x]), np.int64(columns[2, y, x])
    return columns[0, y, x], first * first + square, second * second + square


@cuda.jit(device=True)
def _search_row(columns, y, x, reach):  # type: ignore[no-untyped-def]
    """Squared d1 and d2 of a pixel; FAR^2 or more where there is no such instance within reach."""
    width = columns.shape[2]
    owner, near, other = _site(columns, y, x, np.int64(0))
    for distance in range(1, min(reach, max(x, width - 1 - x)) + 1):
        square = np.int64(distance) * np.int64(distance)
        if square >= other:
            break
        if distance <= x:
            owner, near, other = _two_nearest_of(owner, near, other, *_site(columns, y, x - distance, square))
        if x + distance < width:
            owner, near, other = _two_nearest_of(owner, near, other, *_site(columns, y, x + distance, square))
    return near, other


@cuda.jit
def _measure(columns, reach, radius, d1, d2):  # type: ignore[no-untyped-def]
    x, y = cuda.grid(2)
    if x >= d1.shape[1] or y >= d1.shape[0]:
        return
    near, other = _search_row(columns, y, x, reach)
    d1[y, x] = math.sqrt(near) if near <= radius * radius else math.inf
    d2[y, x] = math.sqrt(other) if other <= radius * radius else math.inf


@cuda.jit
def _weigh(  # type: ignore[no-untyped-def]
    columns, reach, labels, mask, ignored, class_weights, background, border, weights
):
    x, y = cuda.grid(2)
    if x >= labels.shape[1] or y >= labels.shape[0]:
        return
    if ignored is not None:
        if ignored[y, x]:
            weights[y, x] = 0
            return
    if mask is None:
        index = 1 if labels[y, x] != 0 else 0
    else:
        index = int(mask[y, x])
    if class_weights is None:
        weight = 1.0 if index != 0 else background
    else:
        weight = class_weights[index] if index < class_weights.size else math.nan
    if index == 0:
        near, other = _search_row(columns, y, x, reach)
        weight = _add_border(weight, float(near), float(other), border)
    weights[y, x] = weight


@cuda.jit
def _count(mask, ignored, counts):  # type: ignore[no-untyped-def]
    of_block = cuda.shared.array(_MOST_CLASSES, np.int32)
    thread = cuda.threadIdx.y * _BLOCK[0] + cuda.threadIdx.x
    of_block[thread] = 0
    cuda.syncthreads()
    x, y = cuda.grid(2)
    if x < mask.shape[1] and y < mask.shape[0]:
        index = int(mask[y, x])
        if ignored is not None:
            if ignored[y, x]:
                index = counts.size
        if index < counts.size:
            cuda.atomic.add(of_block, index, 1)
    cuda.syncthreads()
    if thread < counts.size:
        cuda.atomic.add(counts, thread, np.int64(of_block[thread]))


@cuda.jit
def _balance(counts, weights):  # type: ignore[no-untyped-def]
    index, row = cuda.grid(2)
    if row > 0 or index >= counts.size:
        return
    pixels = 0.0
    for other in range(counts.size):
        pixels += counts[other]
    share = float(counts.size) * float(counts[index])
    weights[index] = pixels / share if share > 0 else 0.0
