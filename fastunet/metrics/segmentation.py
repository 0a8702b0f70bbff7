"""SEG, the segmentation measure of the Cell Tracking Challenge."""

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fastunet.metrics.slices import Slices, label_pairs, map_slices


@dataclass(frozen=True)
class Objects:
    """Every reference object and how well it was found.

    Attributes
    ----------
    slices : (R,) int64
        The slice an object lies in; an object of another slice is another object, whatever its label.
    labels : (R,) int64
        Its label in the truth.
    scores : (R,) float64
        Its Jaccard index with the predicted object that covers more than half of it, 0 where there is none.
    """

    slices: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]

    @property
    def figure(self) -> float:
        """SEG: the mean score, NaN without reference objects."""
        return float(self.scores.mean()) if len(self.scores) else float("nan")

    @property
    def found(self) -> int:
        """Reference objects that have a match."""
        return int(np.count_nonzero(self.scores))


def seg(truth_labels: Slices, pred_labels: Slices) -> float:
    """SEG: the mean Jaccard index over all reference objects of all slices.

    A reference object R matches the predicted object S where |R and S| > |R| / 2; there is at most one. Only
    reference objects count, so truth that leaves some cells out (gold truth) can be used.

    Parameters
    ----------
    truth_labels, pred_labels : integer, (H, W), (N, H, W) or a sequence of (H, W)
        Instances; 0 is background or not annotated.

    Returns
    -------
    float
        1 is perfect. NaN where the truth holds no object.

    Raises
    ------
    ValueError
        If the shapes differ or a label is negative or not an integer.

    References
    ----------
    Maska et al., "A benchmark for comparison of cell tracking algorithms", Bioinformatics 30 (2014).
    """
    return seg_objects(truth_labels, pred_labels).figure


def seg_objects(truth_labels: Slices, pred_labels: Slices, *, threads: int | None = None) -> Objects:
    """Score every reference object; parameters and errors as for `seg`."""
    pairs = label_pairs(truth_labels, pred_labels)
    scored = map_slices(_score_slice, pairs, threads)
    return Objects(
        np.repeat(np.arange(len(pairs)), [len(labels) for labels, _ in scored]),
        np.concatenate([labels for labels, _ in scored]),
        np.concatenate([scores for _, scores in scored]),
    )


def _score_slice(
    truth: NDArray[np.integer], pred: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    names: NDArray[np.integer] | None = None
    if truth.max() > truth.size:
        names, truth = _rank(truth)
    if pred.max() > pred.size:
        _, pred = _rank(pred)
    areas, scores = _jaccard(truth.ravel(), pred.ravel(), int(truth.max()), int(pred.max()))
    labels = np.flatnonzero(areas)
    return (labels if names is None else names[labels].astype(np.int64)), scores[labels]


def _rank(labels: NDArray[np.integer]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Replace large labels by their ranks, 0 staying 0."""
    values = np.unique(np.append(labels.ravel(), labels.dtype.type(0)))
    return values, np.searchsorted(values, labels)


@njit(nogil=True, cache=True)
def _jaccard(
    truth: NDArray[np.integer], pred: NDArray[np.integer], truth_count: int, pred_count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Areas of the truth's labels 0..truth_count (0 for the background) and their scores.

    A match covers a strict majority of its object, so Boyer and Moore's vote finds the only candidate, and a
    second look counts their common pixels. Both go run by run: pixels in a row that carry the same two labels.
    """
    starts = np.empty(len(truth) + 1, np.int32)
    starts[0] = 0
    runs = 1
    for i in range(1, len(truth)):
        starts[runs] = (
            i  # kept where a run does start; no branch, which would be mispredicted at every outline
        )
        runs += int((truth[i] != truth[i - 1]) | (pred[i] != pred[i - 1]))
    starts[runs] = len(truth)
    truth_area = np.zeros(truth_count + 1, np.int64)
    pred_area = np.zeros(pred_count + 1, np.int64)
    candidate = np.zeros(truth_count + 1, np.int64)
    lead = np.zeros(truth_count + 1, np.int64)
    for k in range(runs):
        r, s, run = int(truth[starts[k]]), int(pred[starts[k]]), starts[k + 1] - starts[k]
        truth_area[r] += run
        pred_area[s] += run
        if candidate[r] == s:
            lead[r] += run
        elif lead[r] >= run:
            lead[r] -= run
        else:
            candidate[r] = s
            lead[r] = run - lead[r]
    truth_area[0] = 0
    common = np.zeros(truth_count + 1, np.int64)
    for k in range(runs):
        r, s = int(truth[starts[k]]), int(pred[starts[k]])
        if candidate[r] == s:
            common[r] += starts[k + 1] - starts[k]
    scores = np.zeros(truth_count + 1)
    for r in range(1, truth_count + 1):
        if candidate[r] > 0 and 2 * common[r] > truth_area[r]:
            scores[r] = common[r] / (truth_area[r] + pred_area[candidate[r]] - common[r])
    return truth_area, scores
