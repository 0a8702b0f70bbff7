"""Instances from predicted classes: components of a class, and the gap between them given back.

The network learns classes in which a gap of background separates touching instances
(fastunet.data.separation). Back again: 4-connected components of the predicted class are the instances,
and where the background between two of them is no wider than such a gap, they grow until they touch again. An
instance's free outline, where nothing was cut, stays as predicted.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from fastunet.metrics.components import join, label_components, root


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
    if classes.dtype.kind == "f":
        classes = classes > 0.5
    values = np.ascontiguousarray(classes)
    height, columns = values.shape
    strips = instances_by_strips(
        lambda top, bottom: values[top:bottom], height, columns, height, width, min_size, fill_holes
    )
    return next(strips)


def check_options(width: int, min_size: int) -> None:
    """Raise ValueError unless these are options of `find_instances`."""
    if width < 0 or min_size < 0:
        raise ValueError(f"width is {width} and min_size {min_size}; both must be at least 0")


def instances_by_strips(
    read: Callable[[int, int], NDArray],
    height: int,
    columns: int,
    strip: int,
    width: int = 1,
    min_size: int = 0,
    fill_holes: bool = False,
) -> Iterator[NDArray[np.uint32]]:
    """Find the instances of an image that does not fit into memory: `find_instances`, to the same numbers.

    The image is read twice, three times where holes are filled. At any time a strip is in memory, at most
    `strip_bytes`, and up to 40 bytes for each component of a class and, to fill holes, 48 for each of the background.

    Parameters
    ----------
    read : returns the classes, integers or booleans, of the rows from the first to before the second
    height, columns : size of the image
    strip : rows at a time, which decide nothing else
    width, min_size, fill_holes : as in `find_instances`

    Yields
    ------
    (rows, columns) uint32, from the top; not necessarily `strip` rows at a time
    """
    check_options(width, min_size)
    spans = [(top, min(top + strip, height)) for top in range(0, height, strip)]
    objects = _Components(False)
    for top, bottom in spans:
        objects.add(read(top, bottom))
    label_of = objects.merged(min_size)

    def labelled() -> Iterator[NDArray[np.uint32]]:
        for number, (top, bottom) in enumerate(spans):
            yield objects.numbered(number, read(top, bottom), label_of)

    strips = _filled(labelled, height) if fill_holes else labelled()
    if width > 0:
        strips = _grown(strips, height, width)
    number_of, found = np.zeros(len(label_of), np.uint32), 0
    for labels in strips:
        found = _number(labels, number_of, found)
        yield labels


def strip_bytes(columns: int, rows: int, width: int) -> int:
    """Memory that `instances_by_strips` takes for its strips."""
    # Classes, components, their parents, labels; background and its components; strip and neighbours, grown.
    return columns * (26 * rows + 12 * (rows + 4 * width))


class _Components:
    """Connected components of equal values over strips that come from the top; union-find over the seams."""

    def __init__(self, diagonal: bool) -> None:
        self.diagonal = diagonal
        self.count = 0
        self.parent = np.zeros(1024, np.int64)
        self._sizes = np.zeros(1024, np.int64)
        self._first = [0]  # of each strip, how many components were before it
        self._above: tuple[NDArray, NDArray] | None = None

    def add(self, values: NDArray) -> NDArray[np.int32]:
        """Take the next strip; return the components of its pixels, 0 where the value is 0."""
        local, count = label_components(np.ascontiguousarray(values), self.diagonal)
        first, self.count = self.count, self.count + count
        self._first.append(self.count)
        while len(self.parent) <= self.count:
            self.parent = np.concatenate([self.parent, np.zeros_like(self.parent)])
            self._sizes = np.concatenate([self._sizes, np.zeros_like(self._sizes)])
        self.parent[first + 1 : self.count + 1] = np.arange(first + 1, self.count + 1)
        self._sizes[first + 1 : self.count + 1] = np.bincount(local.ravel(), minlength=count + 1)[1:]
        top = local[0] + np.where(local[0] > 0, first, 0)
        if self._above is not None:
            _join_rows(self.parent, *self._above, values[0], top, self.diagonal)
        self._above = values[-1].copy(), local[-1] + np.where(local[-1] > 0, first, 0)
        return local

    def merged(self, min_size: int = 0) -> NDArray[np.uint32]:
        """Once all strips are there: of each component the label, that of its first pixel; 0 where it is too small."""
        return _merge(self.parent, self._sizes, self.count, min_size)

    def first(self, strip: int) -> int:
        return self._first[strip]

    def numbered(self, strip: int, values: NDArray, label_of: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """The labels of the pixels of a strip that was added before."""
        local, _ = label_components(np.ascontiguousarray(values), self.diagonal)
        first = self._first[strip]
        table = np.concatenate([[np.uint32(0)], label_of[first + 1 : self._first[strip + 1] + 1]])
        return table[local]


def _filled(strips: Callable[[], Iterator[NDArray[np.uint32]]], height: int) -> Iterator[NDArray[np.uint32]]:
    """Fill background that one single instance encloses."""
    regions = _Components(True)
    owners, top = np.zeros(1024, np.int64), 0
    above: tuple[NDArray, NDArray, int] | None = None
    for labels in strips():
        first = regions.count
        local = regions.add(labels == 0)
        while len(owners) <= regions.count:
            owners = np.concatenate([owners, np.zeros_like(owners)])
        _find_owners(labels, local, first, owners, top == 0, top + len(labels) == height)
        if above is not None:
            _find_owners_across(*above, labels[0], local[0], first, owners)
        above = labels[-1].copy(), local[-1].copy(), first
        top += len(labels)
    _merge_owners(regions.parent, owners, regions.count)
    for strip, labels in enumerate(strips()):
        local, _ = label_components(labels == 0, True)
        _fill(labels, local, regions.first(strip), owners)
        yield labels


def _grown(strips: Iterator[NDArray[np.uint32]], height: int, width: int) -> Iterator[NDArray[np.uint32]]:
    """Close the gaps of an image in strips: what is 2 * width rows away, and no more, has a say in a row."""
    reach = 2 * width
    low = done = 0  # row of the image at which `kept` begins; rows that are through
    kept: NDArray[np.uint32] | None = None
    for labels in strips:
        kept = labels if kept is None else np.concatenate([kept, labels])
        have = low + len(kept)
        ready = height if have == height else have - reach
        if ready <= done:
            continue
        grown = _close_gaps(kept, width)
        yield grown[done - low : ready - low]
        done = ready
        drop = max(0, done - reach - low)
        kept, low = kept[drop:].copy(), low + drop


def connected_components(values: ArrayLike) -> NDArray[np.uint32]:
    """Label the 4-connected components of equal nonzero values of (H, W) from 1 in raster order."""
    return label_components(np.ascontiguousarray(values))[0].astype(np.uint32)


@njit(nogil=True, cache=True)
def _join_rows(parent, values, components, below_values, below_components, diagonal):  # type: ignore[no-untyped-def]
    """Join the components of two rows, one below the other, that touch and are of one value."""
    reach = 1 if diagonal else 0
    for x in range(len(values)):
        if components[x] == 0:
            continue
        for u in range(max(0, x - reach), min(len(values), x + reach + 1)):
            if below_components[u] != 0 and below_values[u] == values[x]:
                join(parent, components[x], below_components[u])


@njit(nogil=True, cache=True)
def _merge(parent, sizes, count, min_size):  # type: ignore[no-untyped-def]
    label_of = np.zeros(count + 1, np.uint32)
    for component in range(1, count + 1):
        top = root(parent, component)
        if top != component:
            sizes[top] += sizes[component]
    for component in range(1, count + 1):
        top = root(parent, component)
        label_of[component] = top if sizes[top] >= min_size else 0
    return label_of


@njit(nogil=True, cache=True)
def _find_owners(labels, regions, first, owners, is_top, is_bottom):  # type: ignore[no-untyped-def]
    """Note of each region which single instance it touches; -1: several, or the border of the image."""
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            if regions[y, x] == 0:
                continue
            region = first + regions[y, x]
            if x == 0 or x == width - 1 or (is_top and y == 0) or (is_bottom and y == height - 1):
                owners[region] = -1
                continue
            for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
                if 0 <= y + dy < height:
                    _touch(owners, region, np.int64(labels[y + dy, x + dx]))


@njit(nogil=True, cache=True)
def _find_owners_across(labels, regions, first, below_labels, below_regions, below_first, owners):  # type: ignore[no-untyped-def]
    for x in range(len(labels)):
        if regions[x] != 0:
            _touch(owners, first + regions[x], np.int64(below_labels[x]))
        if below_regions[x] != 0:
            _touch(owners, below_first + below_regions[x], np.int64(labels[x]))


@njit(nogil=True, cache=True, inline="always")
def _touch(owners, region, label):  # type: ignore[no-untyped-def]
    if label != 0 and owners[region] != label:
        owners[region] = label if owners[region] == 0 else -1


@njit(nogil=True, cache=True)
def _merge_owners(parent, owners, count):  # type: ignore[no-untyped-def]
    for region in range(1, count + 1):
        top = root(parent, region)
        if top != region:
            _touch(owners, top, owners[region])
    for region in range(1, count + 1):
        owners[region] = owners[root(parent, region)]


@njit(nogil=True, cache=True)
def _fill(labels, regions, first, owners):  # type: ignore[no-untyped-def]
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            if regions[y, x] != 0 and owners[first + regions[y, x]] > 0:
                labels[y, x] = owners[first + regions[y, x]]


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
def _number(labels, number_of, found):  # type: ignore[no-untyped-def]
    """Renumber the labels in raster order, after those that were found above; return how many there are by now."""
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            label = labels[y, x]
            if label != 0:
                if number_of[label] == 0:
                    found += 1
                    number_of[label] = found
                labels[y, x] = number_of[label]
    return found
