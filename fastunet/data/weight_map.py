"""The per-pixel loss weights of the 2015 U-Net: class balance plus a border term between touching instances.

The border term needs, at each pixel, the distances to the nearest and to the second nearest instance. Both
are exact and take two passes whose time is proportional to the pixels, however many instances there are:

columns  Sweeping down and up, each pixel keeps the nearest site of its column and the nearest one of another
         label. Two suffice: a label that is neither of the two has two others at least as near.
rows     The lower envelope of the parabolas over the first entries (Felzenszwalb and Huttenlocher 2012,
         section 2) gives d1 and the label that owns it. For each run of one owner a second envelope, over the
         entries of other labels, gives d2. Beyond the site of the neighbouring run no parabola can win, so
         all the windows together are at most a few rows long.

The functions decorated by `_scalar` are the mathematics of one pixel, which `fastunet.data.weight_map_cuda` compiles
for a GPU too.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from fastunet.data.strips import in_strips

PAPER2015 = "paper2015"
FALK2019 = "falk2019"
PRESETS = (PAPER2015, FALK2019)

_BORDER = {PAPER2015: (10.0, 5.0), FALK2019: (50.0, 6.0)}  # w0, sigma
FALK_BACKGROUND = 0.1
_FALK_HALO_SIGMA = 10.0
FAR = 1 << 30  # a column distance that means "no site"; adding any image height to it stays within int32
_PIXELS_PER_THREAD = 1 << 15

OWN_CLASS_WEIGHTS = (
    "class_weights are given and preset is 'falk2019', which has its own; "
    "leave class_weights out or take preset='paper2015'"
)


def weight_map(
    labels: ArrayLike,
    mask: ArrayLike | None = None,
    w0: float | None = None,
    sigma: float | None = None,
    class_weights: str | Sequence[float] | NDArray[np.floating] | None = "balanced",
    ignore: int | NDArray[np.bool_] | None = None,
    preset: str = PAPER2015,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Weight of each pixel in the loss.

    "paper2015" (Ronneberger et al. 2015, equation 2): w = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), the
    second term on background pixels only and 0 where there are fewer than two instances.
    "falk2019" (Falk et al. 2019, methods): 1 on objects; r + w0 exp(-(d1 + d2)^2 / (2 sigma^2))
    + (1 - r) exp(-d1^2 / (2 * 10^2)) on background, r = 0.1.

    Parameters
    ----------
    labels : (H, W) integers
        Instances, 0 is background. d1 and d2 are the Euclidean distances, in pixels, to the nearest pixel of
        the nearest and of the second nearest instance as given here, before gaps are cut.
    mask : (H, W) integers, optional
        Classes 0..K-1 after gaps are cut, 0 is background; labels > 0 when not given.
    w0, sigma : float, optional
        Height, and width in pixels, of the border term; the preset's own when not given (10 and 5, or 50 and
        6).
    class_weights : "balanced", sequence of K numbers or None
        w_c. "balanced" is `balanced_class_weights` of this image alone (a training set passes its own
        numbers), None is 1 for every class. falk2019 has weights of its own and takes no sequence.
    ignore : int or (H, W) booleans, optional
        Pixels of weight 0 that count for no class: those whose label is this value (it is then no instance),
        or those marked.
    threads : int, optional
        The cores this process may use when not given. The result does not depend on it.

    Returns
    -------
    (H, W) float32

    Raises
    ------
    ValueError
        On shapes that differ, values that are not integers or negative, or parameters out of range.
    """
    border = border_terms(preset, w0, sigma)
    labels, ignored = _without_ignored(labels, ignore)
    instances = instance_labels(labels)
    classes = _class_indices(mask, instances)
    if ignored is not None:
        classes[ignored] = -1

    if preset == FALK2019:
        if class_weights is not None and not isinstance(class_weights, str):
            raise ValueError(OWN_CLASS_WEIGHTS)
        base = np.ones(max(2, int(classes.max(initial=0)) + 1))
        base[0] = FALK_BACKGROUND
    else:
        base = _base_weights(class_weights, classes)

    weights = np.empty(instances.shape, np.float32)
    columns = _column_pass(instances, threads)
    in_strips(
        instances.shape[0],
        _thread_count(threads, instances.size),
        lambda low, high: _weigh_rows(*columns, low, high, classes, base, border, weights),
    )
    return weights


def two_nearest(
    labels: ArrayLike, radius: float = math.inf, threads: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Distances from each pixel to the nearest and to the second nearest instance, exact.

    Parameters
    ----------
    labels : (H, W) integers
        Instances, 0 is background; an instance need not be connected.
    radius : float
        Distances beyond it, in pixels, come out as infinity; a small radius saves time.
    threads : int, optional
        The cores this process may use when not given.

    Returns
    -------
    d1, d2 : (H, W) float32
        In pixels; 0 <= d1 <= d2, infinite where there is no such instance. On an instance d1 is 0.
    """
    if not radius >= 0:
        raise ValueError(f"radius is {radius}; it must be a number of pixels of at least 0")
    instances = instance_labels(labels)
    first = np.empty(instances.shape, np.float32)
    second = np.empty(instances.shape, np.float32)
    columns = _column_pass(instances, threads)
    in_strips(
        instances.shape[0],
        _thread_count(threads, instances.size),
        lambda low, high: _measure_rows(*columns, low, high, radius, first, second),
    )
    return first, second


def count_classes(
    mask: ArrayLike, classes: int = 2, ignored: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Pixels of each class 0..K-1 that are not ignored: (H, W) integers -> (K,), K at least `classes`.

    A training set adds these up over its images and gives the sum to `balanced_class_weights`.
    """
    values = np.asarray(mask)
    kept = values[~ignored] if ignored is not None else values.ravel()
    return np.bincount(kept, minlength=classes).astype(np.int64, copy=False)


def balanced_class_weights(counts: ArrayLike) -> NDArray[np.float64]:
    """w_c = N / (K N_c) from the pixels N_c of each of K classes, N their sum; 0 for an absent class."""
    pixels = np.asarray(counts, np.float64)
    share = pixels.size * pixels
    return np.divide(pixels.sum(), share, out=np.zeros_like(pixels), where=share > 0)


def instance_labels(labels: ArrayLike) -> NDArray[np.int32]:
    """Instances as C-contiguous (H, W) int32, renumbered where they do not fit; 0 stays 0.

    Raises
    ------
    ValueError
        If `labels` is not a 2-D array of integers or holds a negative one.
    """
    values = np.asarray(labels)
    if values.ndim != 2:
        raise ValueError(f"labels have shape {values.shape}; one image (H, W) is expected")
    if values.dtype.kind not in "bui":
        raise ValueError(f"labels are {values.dtype}; integers are expected, 0 for background")
    if values.dtype.kind == "i" and values.size and values.min() < 0:
        raise ValueError(
            f"labels hold {values.min()}; 0 is background and instances are positive: "
            "mark unknown pixels with ignore"
        )
    if values.dtype.itemsize > 4 and values.size and values.max() > np.iinfo(np.int32).max:
        distinct, numbers = np.unique(values, return_inverse=True)
        values = numbers.reshape(values.shape) + (distinct[0] != 0)
    return np.ascontiguousarray(values, np.int32)


def _without_ignored(
    labels: ArrayLike, ignore: int | NDArray[np.bool_] | None
) -> tuple[NDArray[np.integer], NDArray[np.bool_] | None]:
    values = np.asarray(labels)
    if ignore is None:
        return values, None
    marked = np.asarray(ignore)
    if marked.ndim == 0:
        marked = values == marked
        return np.where(marked, 0, values).astype(values.dtype), marked
    if marked.shape != values.shape or marked.dtype != bool:
        raise ValueError(
            f"ignore is {marked.dtype} of shape {marked.shape}; a label value or booleans "
            f"of the labels' shape {values.shape} are expected"
        )
    return values, marked


def _class_indices(mask: ArrayLike | None, instances: NDArray[np.int32]) -> NDArray[np.int32]:
    if mask is None:
        return (instances > 0).astype(np.int32)
    values = np.asarray(mask)
    if values.shape != instances.shape:
        raise ValueError(f"mask has shape {values.shape} and labels {instances.shape}; they must be the same")
    if values.dtype.kind not in "bui":
        raise ValueError(f"mask is {values.dtype}; integers are expected, the classes 0..K-1")
    if values.dtype.kind == "i" and values.size and values.min() < 0:
        raise ValueError(
            f"mask holds {values.min()}; the classes are 0..K-1: mark unknown pixels with ignore"
        )
    return values.astype(np.int32)


def _base_weights(
    class_weights: str | Sequence[float] | NDArray[np.floating] | None, classes: NDArray[np.int32]
) -> NDArray[np.float64]:
    present = max(2, int(classes.max(initial=0)) + 1)
    if class_weights is None:
        return np.ones(present)
    if isinstance(class_weights, str):
        if class_weights != "balanced":
            raise ValueError(f"class_weights is {class_weights!r}; 'balanced', numbers or None are expected")
        return balanced_class_weights(_count(classes, present))
    numbers = np.array(class_weights, np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all() or (numbers < 0).any():
        raise ValueError(
            f"class_weights are {class_weights}; one number of at least 0 for each class is expected"
        )
    if numbers.size < int(classes.max(initial=0)) + 1:
        raise ValueError(
            f"{numbers.size} class_weights are given and the mask holds class {classes.max()}; "
            "give one for each class"
        )
    return numbers


def border_terms(
    preset: str, w0: float | None, sigma: float | None
) -> tuple[float, float, float, float, float, float]:
    """What a preset adds to the class weights of background, as `add_border` takes it.

    Returns
    -------
    w0, sigma, reach, halo, halo_sigma, radius : float
        w0 exp(-(d1 + d2)^2 / (2 sigma^2)) where d1 + d2 <= reach, and halo exp(-d1^2 / (2 halo_sigma^2)) where
        d1 <= radius, the distance beyond which float32 shows neither.

    Raises
    ------
    ValueError
        If the preset is unknown, or w0 or sigma out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not known; the presets are {' and '.join(PRESETS)}")
    w0 = _BORDER[preset][0] if w0 is None else float(w0)
    sigma = _BORDER[preset][1] if sigma is None else float(sigma)
    if not (math.isfinite(w0) and w0 >= 0):
        raise ValueError(f"w0 is {w0}; it must be a finite number of at least 0")
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma is {sigma}; it must be a finite number of pixels above 0")
    halo, halo_sigma = (1 - FALK_BACKGROUND, _FALK_HALO_SIGMA) if preset == FALK2019 else (0.0, 1.0)
    reach = _reach(w0, sigma)
    return w0, sigma, reach, halo, halo_sigma, max(reach, _reach(halo, halo_sigma))


def _reach(height: float, sigma: float) -> float:
    """Distance beyond which height * exp(-d^2 / (2 sigma^2)) is below 2^-24, lost in float32 beside w_c."""
    return sigma * math.sqrt(2 * math.log(height * 2**24)) if height > 2**-24 else 0.0


def _thread_count(threads: int | None, pixels: int) -> int:
    if threads is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(available, pixels // _PIXELS_PER_THREAD))
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    return threads


def _column_pass(
    instances: NDArray[np.int32], threads: int | None
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Nearest label in each pixel's column, its distance, the distance to another label: (H, W) int32."""
    owner, first, second = (np.empty(instances.shape, np.int32) for _ in range(3))
    in_strips(
        instances.shape[1],
        _thread_count(threads, instances.size),
        lambda low, high: _sweep_columns(instances, low, high, owner, first, second),
    )
    return owner, first, second


_scalar = njit(nogil=True, cache=True, inline="always")


@_scalar
def two_nearest_of(owner, first, second, label, near, other):  # type: ignore[no-untyped-def]
    """Nearest instance, its distance and that of any other one, from two such triples for parts of the image."""
    wins = near < first
    loser = first if wins else near
    runner_up = other if wins else second
    nearest_others = min(second, other) if label == owner else min(runner_up, loser)
    return label if wins else owner, near if wins else first, nearest_others


@_scalar
def add_border(weight, near, other, border):  # type: ignore[no-untyped-def]
    """Weight of a background pixel from its class weight, d1^2, d2^2 and `border_terms`."""
    w0, sigma, reach, halo, halo_sigma, radius = border
    d1 = math.sqrt(near)
    d2 = math.sqrt(other)
    if d1 + d2 <= reach:
        weight += w0 * math.exp(-((d1 + d2) ** 2) / (2.0 * sigma * sigma))
    if halo > 0.0 and d1 <= radius:
        weight += halo * math.exp(-(d1**2) / (2.0 * halo_sigma * halo_sigma))
    return weight


@njit(nogil=True, cache=True)
def _count(classes, present):  # type: ignore[no-untyped-def]
    counts = np.zeros(present, np.int64)
    for index in classes.ravel():
        if index >= 0:
            counts[index] += 1
    return counts


@njit(nogil=True, cache=True)
def _sweep_columns(instances, low, high, owner, first, second):  # type: ignore[no-untyped-def]
    height = instances.shape[0]
    below_owner = np.zeros(high - low, np.int32)
    below_first = np.full(high - low, np.int32(FAR))
    below_second = np.full(high - low, np.int32(FAR))
    for y in range(height):
        for x in range(low, high):
            label = instances[y, x]
            last = owner[y - 1, x] if y > 0 else np.int32(0)
            near = first[y - 1, x] + np.int32(1) if y > 0 else np.int32(FAR)
            other = second[y - 1, x] + np.int32(1) if y > 0 else np.int32(FAR)
            owner[y, x] = label if label != 0 else last
            first[y, x] = np.int32(0) if label != 0 else near
            second[y, x] = near if label != 0 and label != last else other
    for y in range(height - 1, -1, -1):
        for x in range(low, high):
            label = instances[y, x]
            last = below_owner[x - low]
            near = below_first[x - low] + np.int32(1)
            other = below_second[x - low] + np.int32(1)
            other = near if label != 0 and label != last else other
            near = np.int32(0) if label != 0 else near
            last = label if label != 0 else last
            below_owner[x - low] = last
            below_first[x - low] = near
            below_second[x - low] = other

            owner[y, x], first[y, x], second[y, x] = two_nearest_of(
                owner[y, x], first[y, x], second[y, x], last, near, other
            )


@njit(nogil=True, cache=True, inline="always")
def _push(column, distance, count, site, start, height):  # type: ignore[no-untyped-def]
    """Add a parabola to the lower envelope and return its new length.

    Entry i is the parabola of column site[i], lowest from pixel start[i] on; height is distance^2 + column^2.
    """
    apex = float(distance) * float(distance) + float(column) * float(column)
    begin = 0
    while count > 0:
        begin = math.floor((apex - height[count - 1]) / (2.0 * (column - site[count - 1]))) + 1
        if begin > start[count - 1]:
            break
        count -= 1
        begin = 0
    site[count] = column
    start[count] = begin
    height[count] = apex
    return count + 1


@njit(nogil=True, cache=True)
def _measure_row(owner, first, second, wanted, reach, scratch, heights, d1, d2):  # type: ignore[no-untyped-def]
    """Squared d1 and d2 of one row, at its wanted pixels; sites further than `reach` are left out."""
    width = owner.size
    site, start, other_site, other_start = scratch[0], scratch[1], scratch[2], scratch[3]
    d1[:] = np.inf
    d2[:] = np.inf
    count = 0
    for x in range(width):
        if (
            first[x] == 0 and x > 0 and first[x - 1] == 0
        ):  # within an instance: the last entry is x - 1, and wins there
            site[count] = x
            start[count] = x
            heights[0, count] = float(x) * float(x)
            count += 1
        elif first[x] <= reach:
            count = _push(x, first[x], count, site, start, heights[0])
    entry = 0
    while entry < count:
        label = owner[site[entry]]
        after = entry
        begin = width
        end = 0
        while after < count and owner[site[after]] == label:
            column = site[after]
            for x in range(start[after], min(start[after + 1] if after + 1 < count else width, width)):
                if wanted[x]:
                    begin = min(begin, x)
                    end = x + 1
                    d1[x] = float(x - column) ** 2 + float(first[column]) ** 2
            after += 1
        if begin < end:
            low = max(begin - reach, site[entry - 1] if entry > 0 else 0)
            high = min(end - 1 + reach, site[after] if after < count else width - 1)
            rivals = 0
            for x in range(low, high + 1):
                distance = second[x] if owner[x] == label else first[x]
                if distance <= reach:
                    rivals = _push(x, distance, rivals, other_site, other_start, heights[1])
            for rival in range(rivals):
                column = other_site[rival]
                apex = heights[1, rival] - float(column) * float(column)
                stop = min(other_start[rival + 1] if rival + 1 < rivals else end, end)
                for x in range(max(begin, other_start[rival]), stop):
                    d2[x] = float(x - column) ** 2 + apex
        entry = after


@njit(nogil=True, cache=True)
def _measure_rows(owner, first, second, low, high, radius, d1, d2):  # type: ignore[no-untyped-def]
    height, width = owner.shape
    reach = int(min(radius, height + width))
    scratch = np.empty((4, width), np.int64)
    heights = np.empty((2, width))
    near, other = np.empty(width), np.empty(width)
    wanted = np.ones(width, np.bool_)
    for y in range(low, high):
        _measure_row(owner[y], first[y], second[y], wanted, reach, scratch, heights, near, other)
        for x in range(width):
            d1[y, x] = math.sqrt(near[x]) if near[x] <= radius * radius else np.inf
            d2[y, x] = math.sqrt(other[x]) if other[x] <= radius * radius else np.inf


@njit(nogil=True, cache=True)
def _weigh_rows(owner, first, second, low, high, classes, base, border, weights):  # type: ignore[no-untyped-def]
    height, width = owner.shape
    reach = int(min(border[-1], height + width))
    scratch = np.empty((4, width), np.int64)
    heights = np.empty((2, width))
    near, other = np.empty(width), np.empty(width)
    wanted = np.empty(width, np.bool_)
    for y in range(low, high):
        for x in range(width):
            wanted[x] = classes[y, x] == 0
        _measure_row(owner[y], first[y], second[y], wanted, reach, scratch, heights, near, other)
        for x in range(width):
            weight = base[classes[y, x]] if classes[y, x] >= 0 else 0.0
            weights[y, x] = add_border(weight, near[x], other[x], border) if wanted[x] else weight
