"""Figures that compare pixel with pixel: the pixel error of ISBI 2012, IoU and Dice."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from fastunet.metrics.curve import THRESHOLDS, Curve, index_of_best, ratio
from fastunet.metrics.slices import (
    Slices,
    check_labels,
    check_shapes,
    foreground_and_probability,
    map_slices,
    split_slices,
)


def pixel_error(truth: Slices, prob: Slices) -> float:
    """Pixel error of ISBI 2012: 1 - the best F-score of the foreground, pooled over the slices.

    Parameters
    ----------
    truth : bool or integer, (H, W), (N, H, W) or a sequence of (H, W)
        Foreground where greater than 0.
    prob : float, of the same shape
        Probability of foreground; a pixel is on where it is greater than the threshold.

    Returns
    -------
    float
        0 is perfect, also where there is nothing on either side.
    """
    return pixel_curve(truth, prob).figure


def pixel_curve(
    truth: Slices, prob: Slices, *, thresholds: ArrayLike = THRESHOLDS, threads: int | None = None
) -> Curve:
    """Pixel error at every threshold; parameters and errors as for `rand.overlaps`."""
    thresholds = np.asarray(thresholds, np.float64)
    pairs = foreground_and_probability(truth, prob)
    found = np.stack(map_slices(_found, [(*pair, thresholds) for pair in pairs], threads)).astype(np.float64)
    pooled = found.sum(axis=0)
    scores = _f_score(pooled)
    return Curve(
        thresholds,
        1 - scores,
        1 - _f_score(found),
        ratio(pooled[:, 0], pooled[:, 1], 1),
        ratio(pooled[:, 0], pooled[:, 2], 1),
        index_of_best(scores, largest=True),
    )


def _f_score(found: NDArray[np.float64]) -> NDArray[np.float64]:
    return ratio(2 * found[..., 0], found[..., 1] + found[..., 2], 1)


@njit(nogil=True, cache=True)
def _found(
    truth: NDArray[np.bool_], prob: NDArray[np.floating], thresholds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Pixels that are on and true, that are on, and that are true, (T, 3)."""
    # below[k] counts values that exceed exactly k thresholds; those above threshold k exceed k + 1 or more.
    below = np.zeros((len(thresholds) + 1, 2), np.int64)
    for y in range(truth.shape[0]):
        for x in range(truth.shape[1]):
            exceeded = 0
            for threshold in thresholds:
                exceeded += prob[y, x] > threshold
            below[exceeded, int(truth[y, x])] += 1
    found = np.zeros((len(thresholds), 3), np.int64)
    on = on_and_true = 0
    for k in range(len(thresholds) - 1, -1, -1):
        on += below[k + 1, 0] + below[k + 1, 1]
        on_and_true += below[k + 1, 1]
        found[k, 0], found[k, 1] = on_and_true, on
    found[:, 2] = below[:, 1].sum()
    return found


def iou(truth: Slices, pred: Slices) -> float:
    """Intersection over union of the foreground, pooled over the slices.

    Parameters
    ----------
    truth : bool or integer, (H, W), (N, H, W) or a sequence of (H, W)
        Foreground where greater than 0.
    pred : of the same shape
        Labels (foreground where greater than 0) or, where floating-point, the probability of foreground
        (foreground where greater than 0.5).

    Returns
    -------
    float
        1 is perfect, also where there is nothing on either side.

    Raises
    ------
    ValueError
        If the shapes differ or the truth is not made of labels.
    """
    both, truths, preds = _foreground_counts(truth, pred)
    union = truths + preds - both
    return both / union if union else 1.0


def dice(truth: Slices, pred: Slices) -> float:
    """Dice coefficient (F-score) of the foreground, pooled over the slices; parameters as for `iou`."""
    both, truths, preds = _foreground_counts(truth, pred)
    return 2 * both / (truths + preds) if truths + preds else 1.0


def _foreground_counts(truth: Slices, pred: Slices) -> tuple[int, int, int]:
    truths, preds = split_slices(truth, "truth"), split_slices(pred, "pred")
    check_shapes(truths, preds, "pred")
    both = true = on = 0
    for labels, found in zip(truths, preds):
        check_labels(labels, "truth")
        inside = labels > 0
        marked = found > (0.5 if found.dtype.kind == "f" else 0)
        both += int(np.count_nonzero(inside & marked))
        true += int(np.count_nonzero(inside))
        on += int(np.count_nonzero(marked))
    return both, true, on


def iou_per_class(truth: Slices, pred: Slices, num_classes: int) -> NDArray[np.float64]:
    """Intersection over union of every class, pooled over the slices.

    Parameters
    ----------
    truth, pred : integer classes 0..num_classes-1, (H, W), (N, H, W) or a sequence of (H, W)
    num_classes : int

    Returns
    -------
    (num_classes,) float64
        NaN for a class that occurs on neither side.

    Raises
    ------
    ValueError
        If the shapes differ or a class is outside 0..num_classes-1.
    """
    both, truths, preds = _class_counts(truth, pred, num_classes)
    return ratio(both, truths + preds - both, np.nan)


def dice_per_class(truth: Slices, pred: Slices, num_classes: int) -> NDArray[np.float64]:
    """Dice coefficient of every class, pooled over the slices; parameters as for `iou_per_class`."""
    both, truths, preds = _class_counts(truth, pred, num_classes)
    return ratio(2 * both, truths + preds, np.nan)


def _class_counts(truth: Slices, pred: Slices, num_classes: int) -> tuple[NDArray[np.float64], ...]:
    truths, preds = split_slices(truth, "truth"), split_slices(pred, "pred")
    check_shapes(truths, preds, "pred")
    confusion = np.zeros((num_classes, num_classes))
    for labels, found in zip(truths, preds):
        _check_classes(labels, "truth", num_classes)
        _check_classes(found, "pred", num_classes)
        pair = labels.astype(np.int64) * num_classes + found
        confusion += np.bincount(pair.ravel(), minlength=num_classes**2).reshape(confusion.shape)
    return confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)


def _check_classes(labels: NDArray[Any], name: str, num_classes: int) -> None:
    check_labels(labels, name)
    if labels.max() >= num_classes:
        raise ValueError(
            f"{name} holds the class {labels.max()}, classes from 0 to {num_classes - 1} are expected"
        )
