"""How two segmentations overlap: the Rand error of 2012, and V^Rand and V^Info of 2015.

All three compare the segments of the truth's foreground with those of the proposal, and each proposal
background pixel is a segment of its own. All three follow from the same eight sums per slice and threshold,
collected here in one pass over the pixels of each truth segment.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from fastunet.metrics.components import label_components
from fastunet.metrics.curve import THRESHOLDS, Curve, index_of_best, ratio
from fastunet.metrics.slices import Slices, foreground_and_probability, label_pairs, map_slices
from fastunet.metrics.thinning import thin_borders

# a, b and ab count pixels of a truth segment, a proposal segment, and both; singletons are left out of b and
# ab.
_PIXELS, _SINGLETONS, _A2, _B2, _AB2, _A_LOG_A, _B_LOG_B, _AB_LOG_AB = range(8)

# Entropies, in nats, that are rounding and nothing else.
_NO_ENTROPY = 1e-12


@dataclass(frozen=True)
class Overlaps:
    """How truth and proposal overlap in every slice at every threshold.

    Attributes
    ----------
    thresholds : (T,) float64
    sums : (N, T, 8) float64
        Foreground pixels of the truth, those of them the proposal calls background, then over all segments
        sum a^2, sum b^2, sum ab^2, sum a ln a, sum b ln b, sum ab ln ab.
    """

    thresholds: NDArray[np.float64]
    sums: NDArray[np.float64]

    def rand_error(self) -> Curve:
        """1 - F of pair precision and recall, pairs pooled over the slices (ISBI 2012; Jain 2010)."""
        pooled, recall, precision = _pair_scores(self.sums.sum(axis=0))
        slices = 1 - _pair_scores(self.sums)[0]
        return Curve(
            self.thresholds, 1 - pooled, slices, precision, recall, index_of_best(pooled, largest=True)
        )

    def v_rand(self) -> Curve:
        """Foreground-restricted Rand F-score, mean over the slices (Arganda-Carreras 2015, eqs. 3-5)."""
        singletons = self.sums[..., _SINGLETONS]
        joint = self.sums[..., _AB2] + singletons
        truth = self.sums[..., _A2]
        proposal = self.sums[..., _B2] + singletons
        return self._mean_curve(
            ratio(2 * joint, truth + proposal, np.nan),
            ratio(joint, proposal, np.nan),
            ratio(joint, truth, np.nan),
        )

    def v_info(self) -> Curve:
        """Foreground-restricted information F-score, mean over the slices (ibid., eqs. 6-8)."""
        pixels = self.sums[..., _PIXELS]
        count = np.maximum(pixels, 1)
        log = np.log(count)
        truth = _entropy(log - self.sums[..., _A_LOG_A] / count)
        proposal = _entropy(log - self.sums[..., _B_LOG_B] / count)
        joint = _entropy(log - self.sums[..., _AB_LOG_AB] / count)
        shared = _entropy(truth + proposal - joint)
        undefined = np.where(pixels == 0, np.nan, 1.0)
        return self._mean_curve(
            undefined * ratio(2 * shared, truth + proposal, 1),
            undefined * ratio(shared, proposal, 1),
            undefined * ratio(shared, truth, 1),
        )

    def _mean_curve(
        self, score: NDArray[np.float64], precision: NDArray[np.float64], recall: NDArray[np.float64]
    ) -> Curve:
        figures = _mean_of_defined(score)
        return Curve(
            self.thresholds,
            figures,
            score,
            _mean_of_defined(precision),
            _mean_of_defined(recall),
            index_of_best(figures, largest=True),
        )


def _pair_scores(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """F, recall and precision of the pairs of pixels that share a segment; NaN without truth foreground."""
    pixels, grouped = sums[..., _PIXELS], sums[..., _PIXELS] - sums[..., _SINGLETONS]
    truth = (sums[..., _A2] - pixels) / 2
    proposal = (sums[..., _B2] - grouped) / 2
    joint = (sums[..., _AB2] - grouped) / 2
    undefined = np.where(pixels == 0, np.nan, 1.0)
    return (
        undefined * ratio(2 * joint, truth + proposal, 1),
        undefined * ratio(joint, truth, 1),
        undefined * ratio(joint, proposal, 1),
    )


def _entropy(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(value < _NO_ENTROPY, 0, value)


def _mean_of_defined(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    defined = ~np.isnan(scores)
    return ratio(np.where(defined, scores, 0).sum(axis=0), defined.sum(axis=0).astype(np.float64), np.nan)


def overlaps(
    truth: Slices,
    prob: Slices,
    *,
    thinned: bool = False,
    thresholds: ArrayLike = THRESHOLDS,
    threads: int | None = None,
) -> Overlaps:
    """Compare the segments of the truth with those of the thresholded proposal.

    Segments are 4-connected components on both sides.

    Parameters
    ----------
    truth : bool or integer, (H, W), (N, H, W) or a sequence of (H, W)
        Foreground (the inside of cells) where greater than 0.
    prob : float, of the same shape
        Probability of foreground.
    thinned : bool
        Thin the proposal's borders first (`thinning.thin_borders`).
    thresholds : (T,) ascending
    threads : int, optional
        Slices are shared among so many threads (default: the cores this process may use).

    Raises
    ------
    ValueError
        As `slices.foreground_and_probability` says.
    """
    thresholds = np.asarray(thresholds, np.float64)
    pairs = foreground_and_probability(truth, prob)
    sums = map_slices(_sums_of_slice, [(*pair, thresholds, thinned) for pair in pairs], threads)
    return Overlaps(thresholds, np.stack(sums))


def label_overlaps(
    truth_labels: Slices, pred_labels: Slices, *, thinned: bool = False, threads: int | None = None
) -> Overlaps:
    """Compare the segments of two label images as they are given, touching or not.

    Parameters
    ----------
    truth_labels, pred_labels : integer, (H, W), (N, H, W) or a sequence of (H, W)
        Segments from 1, background 0.
    thinned : bool
        Grow the predicted segments first until lines separate them. Segments that touch keep touching.
    threads : int, optional
        As in `overlaps`.

    Returns
    -------
    Overlaps
        With a single threshold, NaN.

    Raises
    ------
    ValueError
        As `slices.label_pairs` says.
    """
    pairs = [(_consecutive(t), _consecutive(p), thinned) for t, p in label_pairs(truth_labels, pred_labels)]
    return Overlaps(np.array([np.nan]), np.stack(map_slices(_sums_of_labels, pairs, threads))[:, None])


def _consecutive(labels: NDArray[np.integer]) -> NDArray[np.int32]:
    if labels.max() > labels.size:
        values = np.unique(np.append(labels.ravel(), 0))
        labels = np.searchsorted(values, labels)
    return np.ascontiguousarray(labels, np.int32)


def rand_error(truth: Slices, prob: Slices) -> float:
    """Rand error of ISBI 2012: 1 - the best foreground-restricted F of pair precision and recall.

    Pairs are pooled over the slices and the threshold is the same for all of them.

    Parameters
    ----------
    truth : bool or integer, (H, W), (N, H, W) or a sequence of (H, W)
        Foreground where greater than 0; its 4-connected components are the segments.
    prob : float, of the same shape
        Probability of foreground.

    Returns
    -------
    float
        0 is perfect. NaN where the truth has no foreground: the figure says nothing there.

    References
    ----------
    Jain et al., "Boundary learning by optimization with topological constraints" (2010).
    """
    return overlaps(truth, prob).rand_error().figure


def v_rand(truth: Slices, prob: Slices, thinned: bool = True) -> float:
    """V^Rand: the foreground-restricted Rand score at the best threshold, the mean of the slices.

    With p_ij the share of the truth's foreground in truth segment i and proposal segment j, every proposal
    background pixel a segment of its own, V = 2 sum p_ij^2 / (sum_i p_i^2 + sum_j p_j^2).

    Parameters
    ----------
    truth : bool or integer, (H, W), (N, H, W) or a sequence of (H, W)
        Foreground where greater than 0; its 4-connected components are the segments.
    prob : float, of the same shape
        Probability of foreground.
    thinned : bool
        Thin the proposal's borders by a watershed first, as the challenge's ranking does.

    Returns
    -------
    float
        1 is perfect. Slices without foreground in the truth are left out; NaN where there is no other.

    References
    ----------
    Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for connectomics",
    Frontiers in Neuroanatomy 9 (2015), eqs. 3-5.
    """
    return overlaps(truth, prob, thinned=thinned).v_rand().figure


def v_info(truth: Slices, prob: Slices, thinned: bool = True) -> float:
    """V^Info: the foreground-restricted information score at the best threshold, the mean of the slices.

    The harmonic mean of I / H(truth) and I / H(proposal), with I the mutual information of the two
    segmentations.

    Parameters
    ----------
    truth, prob, thinned
        As for `v_rand`.

    Returns
    -------
    float
        1 is perfect. Slices without foreground in the truth are left out; NaN where there is no other.

    References
    ----------
    Arganda-Carreras et al. (2015), eqs. 6-8.
    """
    return overlaps(truth, prob, thinned=thinned).v_info().figure


@njit(nogil=True, cache=True)
def _sums_of_slice(
    truth: NDArray[np.bool_], prob: NDArray[np.floating], thresholds: NDArray[np.float64], thinned: bool
) -> NDArray[np.float64]:
    truth_labels, count = label_components(truth, False)
    order, start = _pixels_by_label(truth_labels.ravel(), count)
    sums = np.zeros((len(thresholds), 8))
    previous = -1
    for k in range(len(thresholds)):
        proposal = prob > thresholds[k]
        on = proposal.sum()
        if on == previous:  # proposals shrink as thresholds rise, so as many pixels are the same pixels
            sums[k] = sums[k - 1]
            continue
        previous = on
        labels, segments = label_components(proposal, False)
        if thinned:
            labels = thin_borders(labels)
        _add_overlaps(order, start, labels.ravel(), segments, sums[k])
    return sums


@njit(nogil=True, cache=True)
def _sums_of_labels(truth: NDArray[np.int32], pred: NDArray[np.int32], thinned: bool) -> NDArray[np.float64]:
    order, start = _pixels_by_label(truth.ravel(), truth.max())
    sums = np.zeros(8)
    if thinned:
        pred = thin_borders(pred)
    _add_overlaps(order, start, pred.ravel(), pred.max(), sums)
    return sums


@njit(nogil=True, cache=True)
def _pixels_by_label(labels: NDArray[np.int32], count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Sort the pixels of labels 1..count by label: label i's are order[start[i]:start[i + 1]]."""
    start = np.zeros(count + 2, np.int64)
    for label in labels:
        if label > 0:
            start[label + 1] += 1
    for label in range(1, count + 2):
        start[label] += start[label - 1]
    following = start.copy()
    order = np.empty(start[-1], np.int32)
    for pixel in range(len(labels)):
        label = labels[pixel]
        if label > 0:
            order[following[label]] = pixel
            following[label] += 1
    return order, start


@njit(nogil=True, cache=True)
def _add_overlaps(
    order: NDArray[np.int32],
    start: NDArray[np.int64],
    proposal: NDArray[np.int32],
    segments: int,
    sums: NDArray[np.float64],
) -> None:
    inside = np.zeros(segments + 1, np.int64)
    shared = np.zeros(segments + 1, np.int64)
    met = np.empty(segments + 1, np.int32)
    for i in range(1, len(start) - 1):
        many = 0
        for pixel in order[start[i] : start[i + 1]]:
            segment = proposal[pixel]
            if shared[segment] == 0:
                met[many] = segment
                many += 1
            shared[segment] += 1
        for segment in met[:many]:
            both = float(shared[segment])
            shared[segment] = 0
            if segment == 0:
                sums[_SINGLETONS] += both
            else:
                inside[segment] += int(both)
                sums[_AB2] += both * both
                sums[_AB_LOG_AB] += both * np.log(both)
        size = float(start[i + 1] - start[i])
        if size > 0:
            sums[_A2] += size * size
            sums[_A_LOG_A] += size * np.log(size)
    for segment in range(1, segments + 1):
        size = float(inside[segment])
        if size > 0:
            sums[_B2] += size * size
            sums[_B_LOG_B] += size * np.log(size)
    sums[_PIXELS] = float(len(order))
