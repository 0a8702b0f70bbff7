"""Validation figures against the same figures computed pixel by pixel, and without the ignored pixels."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fastunet import metrics
from fastunet.instances import find_instances
from fastunet.validation import PredictedImage, larger_is_better, score


def random_image(rng, classes=2, ignore=False):
    height, width = (int(side) for side in rng.integers(20, 60, 2))
    truth = rng.integers(0, classes, (-(-height // 6), -(-width // 6))).astype(np.uint8)
    truth = np.kron(truth, np.ones((6, 6), np.uint8))[:height, :width]
    logits = rng.normal(size=(height, width, classes)) + 1.5 * np.eye(classes)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    ignored = rng.uniform(size=truth.shape) < 0.3 if ignore else None
    weights = rng.uniform(0.5, 5, truth.shape).astype(np.float32)
    if ignored is not None:
        weights[ignored] = 0
    instances = metrics.components.label_components(truth > 0, False)[0].astype(np.int32)
    return PredictedImage("a", truth, instances, ignored, truth, weights, probabilities.astype(np.float32))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("ignore", [False, True])
def test_loss_and_iou_pixel_by_pixel(rng, classes, ignore):
    images = [random_image(rng, classes, ignore) for _ in range(3)]
    total = weight = 0.0
    both, either = np.zeros(classes), np.zeros(classes)
    for image in images:
        for y, x in np.ndindex(image.classes.shape):
            if image.ignored is not None and image.ignored[y, x]:
                continue
            label, predicted = int(image.classes[y, x]), int(np.argmax(image.probabilities[y, x]))
            total -= float(image.weights[y, x]) * math.log(image.probabilities[y, x, label])
            weight += float(image.weights[y, x])
            for k in range(classes):
                both[k] += label == predicted == k
                either[k] += k in (label, predicted)
    figures = score(images, ("loss", "iou"))
    assert list(figures) == ["loss", "iou"]
    # The logarithm is of float32 probabilities on one side: relative rounding of 1e-7 each.
    assert figures["loss"] == pytest.approx(total / weight, rel=1e-5)
    assert figures["iou"] == pytest.approx((both / either)[1:].mean(), rel=1e-12)


def test_challenge_figures_are_those_of_the_metrics(rng):
    images = [random_image(rng) for _ in range(3)]
    truth = [image.classes > 0 for image in images]
    foreground = [1 - image.probabilities[:, :, 0] for image in images]
    figures = score(images, ("pixel_error", "v_rand", "seg"))
    assert figures["pixel_error"] == metrics.pixel_error(truth, foreground)
    assert figures["v_rand"] == metrics.v_rand(truth, foreground)
    found = [find_instances(image.probabilities.argmax(axis=2)) for image in images]
    assert figures["seg"] == metrics.seg([image.instances for image in images], found)


@pytest.mark.parametrize("name", ["loss", "iou", "pixel_error", "v_rand", "seg"])
def test_what_is_predicted_on_ignored_pixels_changes_nothing(rng, name):
    image = random_image(rng, ignore=True)
    # A block, so that connectivity elsewhere does not run through it.
    ignored = np.zeros_like(image.ignored)
    ignored[:, :10] = True
    image = replace(image, ignored=ignored, weights=np.where(ignored, 0, image.weights))
    other = image.probabilities.copy()
    other[:, :9] = other[:, :9, ::-1]
    if name == "seg":  # an object is found as a whole: keep the border of the block as it is
        other[:, :10] = [1, 0]
        image.probabilities[:, :10] = [1, 0]
        other[:, :8] = [0, 1]
    changed = replace(image, probabilities=other)
    assert score([image], (name,)) == score([changed], (name,))


def test_a_sure_mistake_costs_much_but_not_infinity(rng):
    image = random_image(rng)
    sure = np.eye(2, dtype=np.float32)[1 - image.classes]
    assert score([replace(image, probabilities=sure)], ("loss",))["loss"] == pytest.approx(
        -math.log(1e-7), rel=1e-3
    )


def test_nothing_to_measure_is_nan_and_the_worst(rng):
    image = random_image(rng)
    empty = np.zeros_like(image.classes)
    nothing = replace(
        image,
        classes=empty,
        instances=empty.astype(np.int32),
        weights=empty.astype(np.float32),
        probabilities=np.stack([empty + 1, empty], axis=2).astype(np.float32),
    )
    figures = score([nothing], ("loss", "iou", "seg"))
    assert all(math.isnan(value) for value in figures.values())
    assert larger_is_better("iou", math.nan) == -math.inf
    assert larger_is_better("loss", 0.3) > larger_is_better("loss", 0.4)
    assert larger_is_better("v_rand", 0.4) > larger_is_better("v_rand", 0.3)
