"""Cut a gap of background between touching instances, so that a classifier of pixels can tell them apart.

The cut is morphological: `width` times, each instance loses the pixels next to what it touches. What must not
be lost is given back, and the neighbour's side of the cut alone keeps the two apart: all of a component that
would vanish, and the shortest bridges between the fragments of one that would fall apart. Nothing depends on
the numbers of the instances or on the direction in which the image is read.
"""

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from fastunet.data.weight_map import instance_labels
from fastunet.metrics.components import label_components, root

_BACKGROUND, _OBJECT, _CANDIDATE, _CUT, _KEPT = (
    np.uint8(0),
    np.uint8(1),
    np.uint8(2),
    np.uint8(3),
    np.uint8(4),
)
_NOT_REACHED = np.int32(-1)


def separate(labels: ArrayLike, width: int = 1) -> NDArray[np.uint8]:
    """Classes (0 background, 1 object) with gaps cut between touching instances.

    Parameters
    ----------
    labels : (H, W) integers
        Instances, 0 is background. Two touch where pixels of theirs are 8-neighbours.
    width : int
        Pixels taken from each of the two where they touch: 1 leaves a gap of two pixels. 0 cuts nothing.

    Returns
    -------
    (H, W) uint8
        Every component of an instance is still there in one piece, with 4- and with 8-connectivity. Two
        instances still touch only where each would otherwise vanish or fall apart; pixels further than
        `width` steps from a contact are untouched.

    Raises
    ------
    ValueError
        If `labels` is not a 2-D array of integers of at least 0, or `width` is negative.
    """
    if width < 0:
        raise ValueError(f"width is {width}; it must be a whole number of pixels of at least 0")
    instances = instance_labels(labels)
    state = (instances != 0).astype(np.uint8)
    if width == 0 or not _mark_contacts(instances, state):
        return state
    pieces, _ = label_components(instances)
    _keep_corner_links(instances, pieces, state)
    _settle(pieces, state)
    for _ in range(width - 1):
        _mark_beside_cut(instances, state)
        _settle(pieces, state)
    return ((state == _OBJECT) | (state == _KEPT)).astype(np.uint8)


def _settle(pieces: NDArray[np.int32], state: NDArray[np.uint8]) -> None:
    """Turn every candidate into cut, or into given back where its component cannot do without it."""
    fragments, _ = label_components(np.where((state == _OBJECT) | (state == _KEPT), pieces, 0))
    _give_back(pieces, fragments, state)
    state[state == _CANDIDATE] = _CUT


@njit(nogil=True, cache=True)
def _mark_contacts(instances, state):  # type: ignore[no-untyped-def]
    """Make candidates of the pixels with an 8-neighbour of another instance; whether there are any."""
    height, width = instances.shape
    found = False
    for y in range(height):
        for x in range(width):
            label = instances[y, x]
            if label == 0:
                continue
            touches = False
            for v in range(max(y - 1, 0), min(y + 2, height)):
                for u in range(max(x - 1, 0), min(x + 2, width)):
                    touches |= instances[v, u] != 0 and instances[v, u] != label
            if touches:
                state[y, x] = _CANDIDATE
                found = True
    return found


@njit(nogil=True, cache=True)
def _mark_beside_cut(instances, state):  # type: ignore[no-untyped-def]
    """Make candidates of the object pixels with a cut 8-neighbour of their own instance."""
    height, width = instances.shape
    for y in range(height):
        for x in range(width):
            if state[y, x] != _OBJECT:
                continue
            for v in range(max(y - 1, 0), min(y + 2, height)):
                for u in range(max(x - 1, 0), min(x + 2, width)):
                    if state[v, u] == _CUT and instances[v, u] == instances[y, x]:
                        state[y, x] = _CANDIDATE


@njit(nogil=True, cache=True)
def _keep_corner_links(instances, pieces, state):  # type: ignore[no-untyped-def]
    """Keep pairs of pixels that join two 4-connected components of an instance by a corner only."""
    height, width = instances.shape
    for y in range(height - 1):
        for x in range(width - 1):
            for left, right in ((x, x + 1), (x + 1, x)):
                label = instances[y, left]
                if (
                    label != 0
                    and label == instances[y + 1, right]
                    and pieces[y, left] != pieces[y + 1, right]
                ):
                    state[y, left] = _KEPT
                    state[y + 1, right] = _KEPT


@njit(nogil=True, cache=True)
def _give_back(pieces, fragments, state):  # type: ignore[no-untyped-def]
    """Give back components without a fragment, and the shortest bridges between fragments of one.

    Wave fronts from all fragments run through the candidates of their component; where two meet, the path
    lengths add up to that of a bridge. Bridges are taken by length as in Kruskal's minimum spanning tree, but
    all of one length together, so that the result does not depend on their order.
    """
    height, width = pieces.shape
    alive = np.zeros(pieces.max() + 1, np.bool_)
    several = np.zeros(pieces.max() + 1, np.bool_)
    first_fragment = np.zeros(pieces.max() + 1, np.int32)
    for y in range(height):
        for x in range(width):
            if fragments[y, x] != 0:
                piece = pieces[y, x]
                alive[piece] = True
                if first_fragment[piece] == 0:
                    first_fragment[piece] = fragments[y, x]
                several[piece] |= first_fragment[piece] != fragments[y, x]

    loose = 0
    for y in range(height):
        for x in range(width):
            if state[y, x] == _CANDIDATE:
                if not alive[pieces[y, x]]:
                    state[y, x] = _KEPT
                elif several[pieces[y, x]]:
                    loose += 1
    if loose == 0:
        return

    steps = ((-1, 0), (1, 0), (0, -1), (0, 1))
    distance = np.full((height, width), _NOT_REACHED)
    origin = np.zeros((height, width), np.int32)  # the fragment a front came from
    queue = np.empty((5 * loose, 2), np.int32)  # candidates and the fragments' pixels beside them
    tail = 0
    for y in range(height):
        for x in range(width):
            if state[y, x] != _CANDIDATE or not several[pieces[y, x]]:
                continue
            for step_y, step_x in steps:
                v, u = y + step_y, x + step_x
                if not (0 <= v < height and 0 <= u < width) or distance[v, u] == 0:
                    continue
                if fragments[v, u] != 0 and pieces[v, u] == pieces[y, x]:
                    distance[v, u] = 0
                    origin[v, u] = fragments[v, u]
                    queue[tail, 0], queue[tail, 1] = v, u
                    tail += 1
    head = 0
    longest = 0
    while head < tail:
        y, x = queue[head]
        head += 1
        longest = distance[y, x]
        for step_y, step_x in steps:
            v, u = y + step_y, x + step_x
            if not (0 <= v < height and 0 <= u < width):
                continue
            if state[v, u] == _CANDIDATE and pieces[v, u] == pieces[y, x] and distance[v, u] == _NOT_REACHED:
                distance[v, u] = distance[y, x] + 1
                origin[v, u] = origin[y, x]
                queue[tail, 0], queue[tail, 1] = v, u
                tail += 1

    # Bridges by length: pairs of neighbours that fronts of two fragments reached.
    by_length = np.zeros(2 * longest + 3, np.int64)
    bridges = np.empty((2 * tail, 5), np.int32)
    count = 0
    for index in range(tail):
        y, x = queue[index]
        for step_y, step_x in ((1, 0), (0, 1)):
            v, u = y + step_y, x + step_x
            if v < height and u < width and pieces[v, u] == pieces[y, x] and distance[v, u] != _NOT_REACHED:
                if origin[v, u] != origin[y, x]:
                    length = distance[v, u] + distance[y, x] + 1
                    bridges[count] = np.array((length, y, x, v, u), np.int32)
                    by_length[length + 1] += 1
                    count += 1
    place = np.cumsum(by_length)
    begin = place.copy()
    order = np.empty(count, np.int64)
    for index in range(count):
        order[place[bridges[index, 0]]] = index
        place[bridges[index, 0]] += 1

    parent = np.arange(fragments.max() + 1).astype(np.int32)
    path = np.empty((4 * tail + 2, 2), np.int32)
    for length in range(by_length.size - 1):
        needed = np.empty(begin[length + 1] - begin[length], np.bool_)
        for slot in range(needed.size):
            _, y, x, v, u = bridges[order[begin[length] + slot]]
            needed[slot] = root(parent, origin[y, x]) != root(parent, origin[v, u])
        for slot in range(needed.size):
            if not needed[slot]:
                continue
            _, y, x, v, u = bridges[order[begin[length] + slot]]
            a, b = root(parent, origin[y, x]), root(parent, origin[v, u])
            parent[max(a, b)] = min(a, b)
            path[0, 0], path[0, 1] = y, x
            path[1, 0], path[1, 1] = v, u
            top = 2
            while top > 0:  # back along every shortest path to the fragments
                top -= 1
                y, x = path[top]
                if state[y, x] != _CANDIDATE:
                    continue
                state[y, x] = _KEPT
                for step_y, step_x in steps:
                    v, u = y + step_y, x + step_x
                    if 0 <= v < height and 0 <= u < width and pieces[v, u] == pieces[y, x]:
                        if distance[v, u] == distance[y, x] - 1:
                            path[top, 0], path[top, 1] = v, u
                            top += 1
