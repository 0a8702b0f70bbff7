"""The figures of paired truth and prediction: each pair seen as the metrics need it, then the metrics.

A pair is seen as foreground, as foreground with gaps between touching instances, and as instances; or as
classes. A figure is a dictionary, ready for JSON: "figure", what stands behind it, and "per_image".
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastunet import metrics
from fastunet.data.separation import separate
from fastunet.errors import DataError
from fastunet.instances import connected_components
from fastunet.pairs import Pair, is_tracking_truth

Figure = dict[str, Any]

METRICS = ("pixel_error", "rand_error", "warping_error", "v_rand", "v_info", "seg", "iou", "dice")
CLASS_METRICS = ("iou", "dice")
LARGEST_CLASS = 255


@dataclass(frozen=True)
class View:
    """A pair of images as the metrics see it, ignored pixels taken out.

    Attributes
    ----------
    foreground, prob : (H, W)
        The truth's foreground as given, and the predicted probability of foreground (0 and 1 for labels).
    parted, parted_prob : (H, W)
        The same with gaps cut between touching instances.
    instances, found : (H, W)
        Instances in truth and prediction.
    """

    foreground: NDArray[np.bool_]
    prob: NDArray[np.floating]
    parted: NDArray[np.bool_]
    parted_prob: NDArray[np.floating]
    instances: NDArray[np.integer]
    found: NDArray[np.integer]


@dataclass(frozen=True)
class Views:
    """Views of all pairs, and what truth ("mask", "instances") and prediction (also "probabilities") are."""

    images: list[View]
    truth_kind: str
    pred_kind: str

    def both(self, truth: str, pred: str) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
        """Return two attributes of every view."""
        return [getattr(view, truth) for view in self.images], [getattr(view, pred) for view in self.images]


def view_pairs(
    pairs: Sequence[Pair],
    instances: bool,
    ignore: int | None,
    find: Callable[[NDArray[np.floating]], NDArray[np.integer]],
    quiet: bool = False,
) -> Views:
    """See pairs as foreground and instances.

    Parameters
    ----------
    pairs : sequence of Pair
        Predictions all probabilities or all labels.
    instances : bool
        Labels are instances, even those of two values. Otherwise those of two values are masks, but not the
        truth of the Cell Tracking Challenge.
    ignore : int, optional
        The label of pixels without truth.
    find : callable
        Takes a probability of foreground (H, W) and returns the instances (H, W).
    quiet : bool
        No progress bar.

    Raises
    ------
    DataError
        If a label is negative.
    """
    truths = [np.where(pair.ignored(ignore), 0, pair.truth.pixels) for pair in pairs]
    predictions = [pair.prediction for pair in pairs]
    for pair, labels in zip(pairs, truths):
        _check_labels(pair.truth.path, labels)
    if instances or is_tracking_truth(pairs[0].truth.path) or not _two_values(truths):
        truth_kind = "instances"
    else:
        truth_kind = "mask"
    if predictions[0].dtype.kind == "f":
        pred_kind = "probabilities"
    else:
        for pair in pairs:
            _check_labels(pair.path, pair.prediction)
        pred_kind = "instances" if instances or not _two_values(predictions) else "mask"

    views = []
    for pair, labels in zip(tqdm(pairs, "instances", leave=False, delay=1, disable=quiet or None), truths):
        foreground, known = labels > 0, ~pair.ignored(ignore)
        parted = separate(labels) > 0 if truth_kind == "instances" else foreground
        if pred_kind == "instances":
            found: NDArray[np.integer] = pair.prediction
            prob = (found > 0).astype(np.float32)
            parted_prob = separate(found).astype(np.float32)
        else:
            floats = pred_kind == "probabilities"
            prob = pair.prediction[-1] if floats else (pair.prediction > 0).astype(np.float32)
            parted_prob, found = prob, find(prob)
        views.append(
            View(
                foreground,
                prob * known,
                parted,
                parted_prob,
                labels if truth_kind == "instances" else connected_components(foreground),
                np.where(known, found, 0),
            )
        )
    return Views(views, truth_kind, pred_kind)


def _two_values(images: Sequence[NDArray[Any]]) -> bool:
    values: set[int] = set()
    for image in images:
        values.update(np.unique(image).tolist())
    return len(values - {0}) < 2


def _check_labels(path: Path, labels: NDArray[Any]) -> None:
    if labels.min() < 0:
        raise DataError(
            f"{path}: holds the label {labels.min()}, labels from 0 (background) up are expected; give "
            f"--ignore={labels.min()} if it marks pixels of the truth that do not count"
        )


def foreground_figures(
    views: Views, wanted: Collection[str], threads: int | None = None, quiet: bool = False
) -> dict[str, Figure]:
    """Compute the figures named in `wanted` (`METRICS`), in that order.

    The warping error comes with "warping_error_plain", the scores of segments with "_unthinned" ones.
    """
    steps: list[tuple[str, Callable[[], dict[str, Figure]]]] = []
    # Of a mask every threshold below 1 makes the same proposal.
    one = {} if views.pred_kind == "probabilities" else {"thresholds": [0.5]}

    def pixel() -> dict[str, Figure]:
        curve = metrics.pixel_curve(*views.both("foreground", "prob"), threads=threads, **one)
        return {"pixel_error": _of_curve(curve)}

    def segments(thinned: bool) -> dict[str, Figure]:
        if views.pred_kind == "instances":
            pairs = views.both("instances", "found")
            overlaps = metrics.label_overlaps(*pairs, thinned=thinned, threads=threads)
        else:
            pairs = views.both("parted", "parted_prob")
            overlaps = metrics.overlaps(*pairs, thinned=thinned, threads=threads, **one)
        ending = "" if thinned else "_unthinned"
        figures = {}
        if "rand_error" in wanted and not thinned:
            figures["rand_error"] = _of_curve(overlaps.rand_error())
        if "v_rand" in wanted:
            figures[f"v_rand{ending}"] = _of_curve(overlaps.v_rand())
        if "v_info" in wanted:
            figures[f"v_info{ending}"] = _of_curve(overlaps.v_info())
        return figures

    def warping() -> dict[str, Figure]:
        warped = metrics.warping_curve(*views.both("parted", "parted_prob"), threads=threads, **one)
        curves = {"warping_error": warped.splits_and_mergers(), "warping_error_plain": warped.plain()}
        figures = {}
        for name, curve in curves.items():
            remaining = warped.counts[:, curve.best].sum(axis=0).tolist()
            figures[name] = _of_curve(curve) | {"pixels": dict(zip(warped.KINDS, remaining))}
        return figures

    def seg() -> dict[str, Figure]:
        objects = metrics.seg_objects(*views.both("instances", "found"), threads=threads)
        by_image = [objects.scores[objects.slices == index] for index in range(len(views.images))]
        counts = {"objects": len(objects.scores), "found": objects.found}
        per_image = [_mean(scores) for scores in by_image]
        return {"seg": {"figure": objects.figure, **counts, "per_image": per_image}}

    def overlap() -> dict[str, Figure]:
        truths, probs = views.both("foreground", "prob")
        figures = {}
        for name, metric in (("iou", metrics.iou), ("dice", metrics.dice)):
            if name in wanted:
                per_image = [metric(*pair) for pair in zip(truths, probs)]
                figures[name] = {"figure": metric(truths, probs), "per_image": per_image}
        return figures

    if "pixel_error" in wanted:
        steps.append(("pixel error", pixel))
    if {"rand_error", "v_rand", "v_info"} & set(wanted):
        steps.append(("segments", lambda: segments(False)))
    if "warping_error" in wanted:
        steps.append(("warping error", warping))
    if {"v_rand", "v_info"} & set(wanted):
        steps.append(("thinned segments", lambda: segments(True)))
    if "seg" in wanted:
        steps.append(("SEG", seg))
    if {"iou", "dice"} & set(wanted):
        steps.append(("overlap", overlap))
    figures: dict[str, Figure] = {}
    with tqdm(steps, leave=False, delay=1, disable=quiet or None) as bar:
        for title, step in bar:
            bar.set_description(title)
            figures |= step()
    return figures


def _of_curve(curve: metrics.Curve) -> Figure:
    figure: Figure = {"figure": curve.figure, "threshold": curve.threshold}
    if curve.precision is not None and curve.recall is not None:
        figure["precision"] = float(curve.precision[curve.best])
        figure["recall"] = float(curve.recall[curve.best])
    return figure | {
        "per_image": curve.per_slice.tolist(),
        "thresholds": curve.thresholds.tolist(),
        "figures": curve.figures.tolist(),
    }


def class_figures(
    pairs: Sequence[Pair], wanted: Collection[str], ignore: int | None = None
) -> dict[str, Figure]:
    """Compute IoU and Dice of each class, pooled over the images, and their mean over the classes that occur.

    Raises
    ------
    DataError
        If labels are no classes (0..255), or a prediction holds a single probability per pixel.
    """
    truths, predictions = [], []
    num_classes = 2
    for pair in pairs:
        classes = pair.prediction
        if classes.dtype.kind == "f":
            if len(classes) < 2:
                raise DataError(
                    f"{pair.path}: holds one probability per pixel, one for each class is expected with "
                    "--labels classes; save (K, H, W), or drop the option"
                )
            num_classes = max(num_classes, len(classes))
            classes = classes.argmax(axis=0)
        # The order of pixels does not matter here: those that count make one row.
        known = ~pair.ignored(ignore)
        truths.append(pair.truth.pixels[known][None])
        predictions.append(classes[known][None])
        for path, labels in ((pair.truth.path, truths[-1]), (pair.path, predictions[-1])):
            if labels.size == 0:
                continue
            if labels.min() < 0 or labels.max() > LARGEST_CLASS:
                raise DataError(
                    f"{path}: holds labels from {labels.min()} to {labels.max()}, classes from 0 to "
                    f"{LARGEST_CLASS} are expected; drop --labels classes if these are instances"
                )
            num_classes = max(num_classes, int(labels.max()) + 1)
    images = list(zip(truths, predictions))
    everything = (np.concatenate(truths, axis=1), np.concatenate(predictions, axis=1))
    figures = {}
    for name, metric in (("iou", metrics.iou_per_class), ("dice", metrics.dice_per_class)):
        if name not in wanted:
            continue
        pooled, *scores = (
            metric(truth, found, num_classes) if truth.size else np.full(num_classes, np.nan)
            for truth, found in (everything, *images)
        )
        figures[name] = {
            "figure": _mean(pooled),
            "per_class": pooled.tolist(),
            "per_image": [_mean(score) for score in scores],
        }
    return figures


def _mean(scores: NDArray[np.float64]) -> float:
    """Mean of those that are defined, NaN where none is."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if len(defined) else math.nan
