"""Scores of a network on whole held-out images, through the predictor that users run.

Each figure compares with the classes that the network is trained to give, gaps between touching objects
included; `seg` compares the instances found with the annotated ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastunet import metrics
from fastunet.data.datasets import Dataset
from fastunet.data.samples import PreparedImage
from fastunet.instances import find_instances

SMALLEST_PROBABILITY = 1e-7

BEST_BY_KIND = {"binary": "v_rand", "instances": "seg", "classes": "iou"}
SCORES_BY_KIND = {
    "binary": ("loss", "iou", "pixel_error", "v_rand"),
    "instances": ("loss", "iou", "seg"),
    "classes": ("loss", "iou"),
}


@dataclass(frozen=True)
class HeldOutImage:
    """An image to predict and what is known of it, read once.

    Attributes
    ----------
    name : str
    image : (H, W, C)
        As the file has it; the predictor normalises.
    instances : (H, W) int32
    ignored : (H, W) bool or None
    classes, weights : (H, W) uint8, float32
        As the loss sees them (`PreparedImage`).
    separation_width : int
        Pixels cut from each of two touching instances, which the instances found grow back.
    """

    name: str
    image: np.ndarray
    instances: np.ndarray
    ignored: np.ndarray | None
    classes: np.ndarray
    weights: np.ndarray
    separation_width: int = field(default=1, kw_only=True)


@dataclass(frozen=True)
class PredictedImage(HeldOutImage):
    """A held-out image with the probabilities (H, W, K) that a network gives its pixels."""

    probabilities: np.ndarray


def hold_out(
    dataset: Dataset, prepared: Sequence[PreparedImage], separation_width: int = 1
) -> list[HeldOutImage]:
    """Keep what validation needs of a data set's images."""
    return [
        HeldOutImage(
            s.name,
            s.image,
            s.instances,
            s.ignored,
            p.classes,
            p.weights,
            separation_width=separation_width,
        )
        for s, p in zip(dataset.samples, prepared)
    ]


def predict_images(
    predictor: Callable[[np.ndarray], np.ndarray], images: Sequence[HeldOutImage]
) -> list[PredictedImage]:
    """Predict whole images."""
    return [PredictedImage(**vars(image), probabilities=predictor(image.image)) for image in images]


def score(images: Sequence[PredictedImage], names: Sequence[str]) -> dict[str, float]:
    """Figures of a set of predicted images.

    Parameters
    ----------
    images : sequence of PredictedImage
    names : sequence of str
        "loss": weighted cross-entropy, sum over all images of w * -log p / sum of w.
        "iou": mean over the foreground classes of intersection over union, pooled over all images; ignored
        pixels and classes that occur neither in the truth nor in the prediction do not count.
        "pixel_error", "v_rand": the challenge's (`fastunet.metrics`), of
        the foreground.
        "seg": the Cell Tracking Challenge's, mean over all annotated objects.

    Returns
    -------
    dict of str to float
        In the order of `names`; NaN where nothing can be measured.
    """
    measures = {"loss": _loss, "iou": _iou, "pixel_error": _pixel_error, "v_rand": _v_rand, "seg": _seg}
    return {name: float(measures[name](images)) for name in names}


def larger_is_better(name: str, value: float) -> float:
    """Sign a figure such that the larger is the better one; NaN is the worst."""
    if math.isnan(value):
        return -math.inf
    return -value if name in ("loss", "pixel_error") else value


def _loss(images: Sequence[PredictedImage]) -> float:
    total = weight = 0.0
    for image in images:
        labels = image.classes[:, :, None].astype(np.intp)
        p = np.take_along_axis(image.probabilities, labels, axis=2)[:, :, 0]
        w = image.weights.astype(np.float64)
        total -= float((w * np.log(np.maximum(p, SMALLEST_PROBABILITY))).sum())
        weight += float(w.sum())
    return total / weight if weight else math.nan


def _iou(images: Sequence[PredictedImage]) -> float:
    truth = [_without_ignored(image.classes, image) for image in images]
    predicted = [_without_ignored(image.probabilities.argmax(axis=2), image) for image in images]
    foreground = metrics.iou_per_class(truth, predicted, images[0].probabilities.shape[2])[1:]
    present = ~np.isnan(foreground)
    return float(foreground[present].mean()) if present.any() else math.nan


def _pixel_error(images: Sequence[PredictedImage]) -> float:
    return metrics.pixel_error(*_foreground(images))


def _v_rand(images: Sequence[PredictedImage]) -> float:
    return metrics.v_rand(*_foreground(images))


def _seg(images: Sequence[PredictedImage]) -> float:
    found = [find_instances(image.probabilities.argmax(axis=2), image.separation_width) for image in images]
    truth = [_without_ignored(image.instances, image) for image in images]
    return metrics.seg(truth, [_without_ignored(*pair) for pair in zip(found, images)])


def _foreground(images: Sequence[PredictedImage]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    truth = [_without_ignored(image.classes > 0, image) for image in images]
    return truth, [_without_ignored(1 - image.probabilities[:, :, 0], image) for image in images]


def _without_ignored(values: np.ndarray, image: PredictedImage) -> np.ndarray:
    """Background in truth and prediction alike, so that no figure counts the pixel."""
    return values if image.ignored is None else np.where(image.ignored, 0, values)
