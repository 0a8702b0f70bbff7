"""Instances from predicted classes: components of a class, and the gap between them given back.

The network learns classes in which a gap of background separates touching instances
(fastunet.data.separation). Back again: 4-connected components of the predicted class are the instances,
and where the background between two of them is no wider than such a gap, they grow until they touch again. An
instance's free outline, where nothing was cut, stays as predicted.
"""

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from fastunet.metrics.components import label_components


def find_instances(
    classes: ArrayLike, width: int = 1, min_size: int = 0, fill_holes: bool = False
) -> NDArray[np.uint32]:
    """Find the instances in an image of predicted classes.

    In this order: 4-connected components of equal class are instances; those with fewer than `min_size`
    pixels become background; holes are filled; the gaps are given back.

    Parameters
    ----------
    classes : (H, W) integers, 0 = background, or booleans, or floats (foreground where above 0.5)
    width : width in pixels of the gap that was cut from each of two touching instances; 0 gives nothing back.
        A background pixel joins the nearest instance when that is at most `width` pixels away (8-neighbourhood)
        and another one lies opposite, so near that the gap between the two is at most 2 * width wide.
    min_size : pixels an instance must have as predicted
    fill_holes : whether background that one single instance encloses becomes part of it

    Returns
    -------
    (H, W) uint32, 0 = background, instances numbered from 1 in the order in which rows from the top meet them

    Raises
    ------
    ValueError
        If `classes` is not two-dimensional or holds complex numbers or no numbers, or `width` or `min_size`
        is negative.
    """
    classes = np.asarray(classes)
    if classes.ndim != 2 or classes.size == 0 or classes.dtype.kind not in "buif":
        raise ValueError(
            f"classes have shape {classes.shape} and type {classes.dtype}; expected (H, W) integers or "
            "booleans, or foreground probabilities"
        )
    if width < 0 or min_size < 0:
        raise ValueError(f"width is {width} and min_size {min_size}; both must be at least 0")
    if classes.dtype.kind == "f":
        classes = classes > 0.5
    labels = connected_components(classes)
    if min_size > 1:
        _drop_small(labels, min_size)
    if fill_holes:
        _fill_holes(labels, label_components(labels == 0, True)[0])
    if width > 0:
        labels = _close_gaps(labels, width)
    return _number(labels)


def connected_components(values: ArrayLike) -> NDArray[np.uint32]:
    """Label the 4-connected components of equal nonzero values of (H, W) from 1 in raster order."""
    return label_components(np.ascontiguousarray(values))[0].astype(np.uint32)


@njit(nogil=True, cache=True)
def _drop_small(labels, min_size):  # type: ignore[no-untyped-def]
    sizes = np.zeros(labels.max() + 1, np.int64)
    for label in labels.flat:
        sizes[label] += 1
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            if sizes[labels[y, x]] < min_size:
                labels[y, x] = 0


@njit(nogil=True, cache=True)
def _fill_holes(labels, background):  # type: ignore[no-untyped-def]
    """Give each region of `background` that one single instance encloses to that instance."""
    height, width = labels.shape
    owners = np.zeros(background.max() + 1, np.int64)
    for y in range(height):
        for x in range(width):
            region = background[y, x]
            if region == 0:
                continue
            if y == 0 or x == 0 or y == height - 1 or x == width - 1:
                owners[region] = -1
                continue
            for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
                neighbour = np.int64(labels[y + dy, x + dx])
                if neighbour != 0 and owners[region] != neighbour:
                    owners[region] = neighbour if owners[region] == 0 else -1
    for y in range(height):
        for x in range(width):
            region = background[y, x]
            if region != 0 and owners[region] > 0:
                labels[y, x] = owners[region]


@njit(nogil=True, cache=True)
def _close_gaps(labels, width):  # type: ignore[no-untyped-def]
    """Grow instances into background between two of them that is at most 2 * width wide."""
    height, columns = labels.shape
    grown = labels.copy()
    for y in range(height):
        for x in range(columns):
            if labels[y, x] != 0:
                continue
            # Nearest instance by Euclidean distance among those at most `width` away in the 8-neighbourhood.
            nearest, least, steps = np.uint32(0), 2 * width * width + 1, 0
            for v in range(max(0, y - width), min(height, y + width + 1)):
                for u in range(max(0, x - width), min(columns, x + width + 1)):
                    label = labels[v, u]
                    if label == 0:
                        continue
                    distance = (v - y) ** 2 + (u - x) ** 2
                    if distance < least or (distance == least and label < nearest):
                        nearest, least = label, distance
                        steps = max(abs(v - y), abs(u - x))
            if nearest == 0:
                continue
            # Towards the nearest instance: another one counts where it lies on the opposite side.
            toward_y = toward_x = 0
            for v in range(max(0, y - width), min(height, y + width + 1)):
                for u in range(max(0, x - width), min(columns, x + width + 1)):
                    if labels[v, u] == nearest:
                        toward_y += v - y
                        toward_x += u - x
            reach = 2 * width + 1 - steps
            for v in range(max(0, y - reach), min(height, y + reach + 1)):
                for u in range(max(0, x - reach), min(columns, x + reach + 1)):
                    opposite = toward_y * (v - y) + toward_x * (u - x) <= 0
                    if opposite and labels[v, u] != 0 and labels[v, u] != nearest:
                        grown[y, x] = nearest
    return grown


@njit(nogil=True, cache=True)
def _number(labels):  # type: ignore[no-untyped-def]
    """Renumber the labels from 1 in raster order."""
    number = np.zeros(labels.max() + 1, np.uint32)
    found = 0
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            label = labels[y, x]
            if label != 0:
                if number[label] == 0:
                    found += 1
                    number[label] = found
                labels[y, x] = number[label]
    return labels
