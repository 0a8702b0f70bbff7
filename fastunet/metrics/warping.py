"""The warping error of ISBI 2012: what remains after the truth was bent towards the proposal.

The truth is changed pixel by pixel where it differs from the proposal, as long as its topology stays the same
(foreground 4-connected, background 8-connected). Shifted borders vanish in this way; what remains are splits,
mergers, holes and whole objects (Jain 2010).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from fastunet.metrics.components import label_components
from fastunet.metrics.curve import THRESHOLDS, Curve, index_of_best
from fastunet.metrics.slices import Slices, foreground_and_probability, map_slices

# Not 1: nothing is left to be split or merged in an empty proposal.
WARPING_THRESHOLDS: NDArray[np.float64] = THRESHOLDS[:10]

_MERGER, _SPLIT, _HOLE_ADDITION, _HOLE_DELETION, _OBJECT_ADDITION, _OBJECT_DELETION = range(6)

# The neighbours in a circle, those that share an edge at even places.
_DY = (0, -1, -1, -1, 0, 1, 1, 1)
_DX = (1, 1, 0, -1, -1, -1, 0, 1)


def yokoi_number(neighbourhood: int) -> int:
    """Compute Yokoi's connectivity number C4 of 8 neighbours, given as bits in a circle from an edge.

    The number of pieces the foreground around a pixel has in the pixel's 4-connected view; a pixel can be
    flipped without changing the topology where it is 1.
    """
    bits = [neighbourhood >> place & 1 for place in range(8)]
    return sum(bits[k] - bits[k] * bits[k + 1] * bits[(k + 2) % 8] for k in (0, 2, 4, 6))


SIMPLE: NDArray[np.bool_] = np.array([yokoi_number(neighbourhood) == 1 for neighbourhood in range(256)])


@dataclass(frozen=True)
class Warping:
    """What remained after warping, in every slice at every threshold.

    Attributes
    ----------
    thresholds : (T,) float64
    counts : (N, T, 6) int64
        Remaining pixels of each of `KINDS`.
    pixels : (N,) int64
        Pixels of each slice.
    """

    thresholds: NDArray[np.float64]
    counts: NDArray[np.int64]
    pixels: NDArray[np.int64]

    KINDS: ClassVar[tuple[str, ...]] = (
        "mergers",
        "splits",
        "hole additions",
        "hole deletions",
        "object additions",
        "object deletions",
    )

    def splits_and_mergers(self) -> Curve:
        """Split and merger pixels as a share of all pixels, pooled over the slices."""
        wrong = self.counts[..., [_MERGER, _SPLIT]].sum(axis=-1)
        return self._curve(wrong.sum(axis=0) / self.pixels.sum(), wrong / self.pixels[:, None])

    def plain(self) -> Curve:
        """All remaining pixels as a share of all pixels, mean over the slices."""
        slices = self.counts.sum(axis=-1) / self.pixels[:, None]
        return self._curve(slices.mean(axis=0), slices)

    def _curve(self, figures: NDArray[np.float64], slices: NDArray[np.float64]) -> Curve:
        return Curve(self.thresholds, figures, slices, None, None, index_of_best(figures, largest=False))


def warping_error(truth: Slices, prob: Slices, plain: bool = False) -> float:
    """Warping error of ISBI 2012 at the best threshold.

    Parameters
    ----------
    truth : bool or integer, (H, W), (N, H, W) or a sequence of (H, W)
        Foreground (the inside of cells) where greater than 0.
    prob : float, of the same shape
        Probability of foreground.
    plain : bool
        False: pixels that split or merge cells, the figure of the 2012 table; True: all pixels that remain.

    Returns
    -------
    float
        Share of all pixels; 0 is perfect.

    References
    ----------
    Jain et al., "Boundary learning by optimization with topological constraints" (2010); Yokoi et al.,
    "An analysis of topological properties of digitized binary pictures using local features" (1975).
    """
    warping = warping_curve(truth, prob)
    return (warping.plain() if plain else warping.splits_and_mergers()).figure


def warping_curve(
    truth: Slices, prob: Slices, *, thresholds: ArrayLike = WARPING_THRESHOLDS, threads: int | None = None
) -> Warping:
    """Warp the truth towards the proposal at every threshold; parameters as for `rand.overlaps`."""
    thresholds = np.asarray(thresholds, np.float64)
    pairs = foreground_and_probability(truth, prob)
    # The definition visits x in the outer loop. The topology of the transposed image is the same, and its
    # raster order is just that.
    turned = [
        (np.ascontiguousarray(foreground.T), np.ascontiguousarray(probability.T), thresholds)
        for foreground, probability in pairs
    ]
    return Warping(
        thresholds,
        np.stack(map_slices(_remaining, turned, threads)),
        np.array([foreground.size for foreground, _ in pairs]),
    )


@njit(nogil=True, cache=True)
def _remaining(
    truth: NDArray[np.bool_], prob: NDArray[np.floating], thresholds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Count what remains, (T, 6)."""
    height, width = truth.shape
    counts = np.zeros((len(thresholds), 6), np.int64)
    warped = np.zeros((height + 2, width + 2), np.bool_)
    flat = warped.ravel()
    places = np.empty(height * width, np.int32)
    distances = np.empty(height * width)
    for k in range(len(thresholds)):
        threshold = thresholds[k]
        many = 0
        for y in range(height):
            for x in range(width):
                warped[y + 1, x + 1] = truth[y, x]
                if truth[y, x] != (prob[y, x] > threshold):
                    places[many] = (y + 1) * (width + 2) + x + 1
                    distances[many] = -abs(prob[y, x] - threshold)
                    many += 1
        queue = places[:many][np.argsort(distances[:many], kind="mergesort")]
        left = _warp(flat, width + 2, queue)
        _classify(warped, queue[:left], counts[k])
    return counts


@njit(nogil=True, cache=True)
def _warp(warped: NDArray[np.bool_], across: int, queue: NDArray[np.int32]) -> int:
    """Flip the simple pixels among `queue` until none is left; those that remain move to its front."""
    left = len(queue)
    while True:
        kept = 0
        for i in range(left):
            pixel = queue[i]
            if SIMPLE[_neighbourhood(warped, across, pixel)]:
                warped[pixel] = not warped[pixel]
            else:
                queue[kept] = pixel
                kept += 1
        if kept == left:
            return left
        left = kept


@njit(nogil=True, cache=True, inline="always")
def _neighbourhood(warped: NDArray[np.bool_], across: int, pixel: int) -> int:
    above, below = pixel - across, pixel + across
    return (
        int(warped[pixel + 1])
        | int(warped[above + 1]) << 1
        | int(warped[above]) << 2
        | int(warped[above - 1]) << 3
        | int(warped[pixel - 1]) << 4
        | int(warped[below - 1]) << 5
        | int(warped[below]) << 6
        | int(warped[below + 1]) << 7
    )


@njit(nogil=True, cache=True)
def _classify(warped: NDArray[np.bool_], remaining: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
    """Count `remaining` by kind, from the objects (4-connected) among each pixel's 8 neighbours."""
    if len(remaining) == 0:
        return
    across = warped.shape[1]
    objects, _ = label_components(warped, False)
    background = objects  # labelled when the first pixel needs it
    labelled = False
    for pixel in remaining:
        y, x = pixel // across, pixel % across
        first = second = -1
        more = False
        for k in range(8):
            label = objects[y + _DY[k], x + _DX[k]]
            if first == -1 or label == first:
                first = label
            elif second == -1 or label == second:
                second = label
            else:
                more = True
        white = warped[y, x]
        if more:
            counts[_SPLIT if white else _MERGER] += 1
        elif second == -1:
            if first == 0:
                counts[_OBJECT_DELETION if white else _OBJECT_ADDITION] += 1
            else:
                counts[_HOLE_ADDITION if white else _HOLE_DELETION] += 1
        elif not white:
            counts[_HOLE_ADDITION] += 1
        else:
            if not labelled:
                background, _ = label_components(~warped, True)
                labelled = True
            counts[_SPLIT if _splits(warped, background, y, x) else _HOLE_DELETION] += 1


@njit(nogil=True, cache=True)
def _splits(warped: NDArray[np.bool_], background: NDArray[np.int32], y: int, x: int) -> bool:
    """Whether removing the foreground pixel (y, x) cuts its object in two.

    The pixel parts the background around it into arcs. Its removal joins them, and every arc joined that was
    not connected before closes a hole; every arc that was connected before goes around a piece of the object,
    which is then cut off. (The Euler characteristic changes by a number known from the neighbourhood alone.)
    So no relabelling is needed.
    """
    arcs = np.empty(4, np.int32)
    many = 0
    for k in (0, 2, 4, 6):
        if not warped[y + _DY[k], x + _DX[k]]:
            continue
        for following in (k + 1, (k + 2) % 8):
            if not warped[y + _DY[following], x + _DX[following]]:
                arc = background[y + _DY[following], x + _DX[following]]
                for known in arcs[:many]:
                    if known == arc:
                        return True
                arcs[many] = arc
                many += 1
                break
    return False
