"""Connected components by union-find: two passes over the image."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(nogil=True, cache=True, inline="always")
def root(parent: NDArray[np.int32], label: int) -> int:
    """Root of a label's tree, which is flattened on the way."""
    while parent[label] != label:
        parent[label] = parent[parent[label]]
        label = parent[label]
    return label


@njit(nogil=True, cache=True, inline="always")
def join(parent: NDArray[np.int32], first: int, second: int) -> int:
    """Put two trees under the smaller of their roots, and return it."""
    first, second = root(parent, first), root(parent, second)
    if first < second:
        parent[second] = first
        return first
    parent[first] = second
    return second


@njit(nogil=True, cache=True)
def label_components(values: NDArray[Any], diagonal: bool = False) -> tuple[NDArray[np.int32], int]:
    """Label the connected components of equal nonzero values.

    Parameters
    ----------
    values : (H, W) bool or integers
    diagonal : bool
        False: 4-connected; True: 8-connected.

    Returns
    -------
    labels : (H, W) int32
        0 where the value is 0, components 1, 2, ... in the raster order of their first pixels.
    count : int
    """
    height, width = values.shape
    labels = np.zeros((height, width), np.int32)
    parent = np.empty(height * width + 1, np.int32)
    parent[0] = 0
    provisional = 0
    for y in range(height):
        for x in range(width):
            value = values[y, x]
            if value == 0:
                continue
            label: Any = np.int32(0)
            if x > 0 and values[y, x - 1] == value:
                label = labels[y, x - 1]
            if y > 0 and values[y - 1, x] == value:
                # Its diagonal neighbours of this value are its own component's already.
                above = labels[y - 1, x]
                label = above if label == 0 or label == above else join(parent, label, above)
            elif y > 0 and diagonal:
                if label == 0 and x > 0 and values[y - 1, x - 1] == value:
                    label = labels[y - 1, x - 1]
                if x + 1 < width and values[y - 1, x + 1] == value:
                    right = labels[y - 1, x + 1]
                    label = right if label == 0 or label == right else join(parent, label, right)
            if label == 0:
                provisional += 1
                label = np.int32(provisional)
                parent[label] = label
            labels[y, x] = label
    # A root is the smallest label of its tree, so parents are final before their children are met.
    count = 0
    for number in range(1, provisional + 1):
        if parent[number] == number:
            count += 1
            parent[number] = count
        else:
            parent[number] = parent[parent[number]]
    for y in range(height):
        for x in range(width):
            labels[y, x] = parent[labels[y, x]]
    return labels, count
