"""What every metric takes: pairs of slices, checked, and threads to work on them."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Slices = ArrayLike | Sequence[NDArray[Any]]
Result = TypeVar("Result")

# Softmax in float32 and the mean over rotations may overshoot 1 by rounding.
_ROUNDING = 1e-5


def split_slices(images: Slices, name: str) -> list[NDArray[Any]]:
    """Split (H, W), (N, H, W) or a sequence of (H, W) arrays into its slices.

    Raises
    ------
    ValueError
        If `images` has another number of axes or no pixel at all.
    """
    if isinstance(images, list | tuple) and all(isinstance(image, np.ndarray) for image in images):
        slices = list(images)
    else:
        stack = np.asarray(images)
        slices = [stack] if stack.ndim == 2 else list(stack) if stack.ndim == 3 else [stack]
    for image in slices:
        if image.ndim != 2:
            raise ValueError(f"{name} has a shape of {image.shape}, (H, W) or (N, H, W) is expected")
        if image.size == 0:
            raise ValueError(f"{name} has a shape of {image.shape}, which holds no pixel")
    if not slices:
        raise ValueError(f"{name} holds no slice, at least one is expected")
    return slices


def foreground_and_probability(truth: Slices, prob: Slices) -> list[tuple[NDArray[np.bool_], NDArray[Any]]]:
    """Pair the truth's foreground with the probability of foreground, slice by slice.

    Parameters
    ----------
    truth : bool or integer, (H, W), (N, H, W) or a sequence of (H, W)
        Foreground where greater than 0.
    prob : float in 0..1, of the same shape
        Masks (bool, or integers 0 and 1) are taken as probabilities 0 and 1.

    Returns
    -------
    list of (bool (H, W), float32 or float64 (H, W)), C-contiguous

    Raises
    ------
    ValueError
        If shapes differ, the truth is not made of labels, or a probability is not within 0..1.
    """
    truths, probs = split_slices(truth, "truth"), split_slices(prob, "prob")
    check_shapes(truths, probs, "prob")
    pairs = []
    for labels, probability in zip(truths, probs):
        check_labels(labels, "truth")
        pairs.append((np.ascontiguousarray(labels > 0), _probability(probability)))
    return pairs


def _probability(prob: NDArray[Any]) -> NDArray[Any]:
    if prob.dtype.kind not in "fbiu":
        raise ValueError(f"prob holds {prob.dtype}, numbers between 0 and 1 are expected")
    if prob.dtype not in (np.float32, np.float64):
        prob = prob.astype(np.float32)
    low, high = float(prob.min()), float(prob.max())
    if np.isnan(low):
        raise ValueError("prob holds NaN, probabilities between 0 and 1 are expected")
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(
            f"prob ranges from {low:g} to {high:g}, probabilities between 0 and 1 are expected: "
            "apply the softmax, or divide by the largest value that can occur"
        )
    return np.ascontiguousarray(prob if high <= 1 else np.minimum(prob, 1))


def label_pairs(truth_labels: Slices, pred_labels: Slices) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Pair integer labels, slice by slice, C-contiguous and of the same shape.

    Raises
    ------
    ValueError
        If shapes differ or a label is negative or not an integer.
    """
    truths, preds = split_slices(truth_labels, "truth_labels"), split_slices(pred_labels, "pred_labels")
    check_shapes(truths, preds, "pred_labels")
    for truth, pred in zip(truths, preds):
        check_labels(truth, "truth_labels")
        check_labels(pred, "pred_labels")
    return [(np.ascontiguousarray(truth), np.ascontiguousarray(pred)) for truth, pred in zip(truths, preds)]


def check_labels(labels: NDArray[Any], name: str) -> None:
    """Raise ValueError unless `labels` holds booleans or integers from 0 up."""
    if labels.dtype.kind not in "biu":
        raise ValueError(
            f"{name} holds {labels.dtype}, labels (bool or integers) are expected: the truth comes first, "
            "then the prediction"
        )
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise ValueError(f"{name} holds the label {labels.min()}, labels from 0 (background) up are expected")


def check_shapes(truths: list[NDArray[Any]], preds: list[NDArray[Any]], name: str) -> None:
    """Raise ValueError unless both sides have as many slices, of the same shapes."""
    if len(truths) != len(preds):
        raise ValueError(f"truth has {len(truths)} slices and {name} {len(preds)}, as many are expected")
    for truth, pred in zip(truths, preds):
        if truth.shape != pred.shape:
            raise ValueError(f"truth is {truth.shape} and {name} {pred.shape}, the same shape is expected")


def map_slices(
    function: Callable[..., Result], pairs: Sequence[tuple[Any, ...]], threads: int | None
) -> list[Result]:
    """Call `function(*pair)` on every pair, in threads (default: as many as cores that may be used)."""
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(threads, len(pairs))
    if threads <= 1:
        return [function(*pair) for pair in pairs]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda pair: function(*pair), pairs))
