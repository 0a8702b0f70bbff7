"""Times of the metrics on one core and on all, and of the libraries that compute some of them.

The workload is what a challenge scores: 30 slices of 512 x 512, made by repeating real membranes, or discs where the
real images are absent. `pytest bench/test_metrics_speed.py --benchmark-only` prints one line for each.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from ctc_metrics.metrics import seg as ctc_seg
from ctc_metrics.scripts.evaluate import match_computed_to_reference_masks
from scipy import ndimage
from skimage.metrics import adapted_rand_error

from fastunet import metrics

DATA = Path(os.environ.get("FASTUNET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SLICES = 30


@pytest.fixture(scope="module")
def stack():
    """Truth (30, 512, 512) and a blurred, noisy probability of it."""
    rng = np.random.default_rng(0)
    volume = DATA / "isbi2012" / "train-labels.tif"
    if volume.exists():
        truth = tifffile.imread(volume) > 0
    else:
        y, x = np.indices((512, 512))
        truth = np.hypot(y % 40 - 20, x % 40 - 20)[None] < 19
    truth = truth[np.arange(SLICES) % len(truth)]
    prob = np.empty(truth.shape, np.float32)
    for inside, out in zip(truth, prob):
        noise = ndimage.gaussian_filter(rng.normal(size=inside.shape), 1.5)
        out[:] = np.clip(ndimage.gaussian_filter(inside.astype(float), 2) + 0.35 * noise, 0, 1)
    return truth, prob


@pytest.fixture(scope="module")
def labels(stack):
    """Instances (30, 512, 512) uint16 in truth and prediction."""
    truth, prob = stack
    return tuple(
        np.stack([ndimage.label(mask)[0] for mask in masks]).astype(np.uint16)
        for masks in (truth, prob > 0.5)
    )


CURVES = {
    "pixel error": metrics.pixel_curve,
    "Rand error": lambda *stack, threads: metrics.overlaps(*stack, threads=threads).rand_error(),
    "V^Rand thinned": lambda *stack, threads: metrics.overlaps(
        *stack, thinned=True, threads=threads
    ).v_rand(),
    "warping error": metrics.warping_curve,
}


@pytest.mark.parametrize("threads", [1, None], ids=["one core", "all cores"])
@pytest.mark.parametrize("name", CURVES)
def test_over_all_thresholds(benchmark, stack, name, threads):
    benchmark.group = name
    benchmark.pedantic(CURVES[name], stack, {"threads": threads}, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("metric", [metrics.iou, metrics.dice])
def test_overlap_of_masks(benchmark, stack, metric):
    benchmark.group = "IoU and Dice"
    truth, prob = stack
    benchmark(metric, truth, prob)


@pytest.mark.parametrize("threads", [1, None], ids=["one core", "all cores"])
def test_seg(benchmark, labels, threads):
    benchmark.group = "SEG"
    benchmark.pedantic(metrics.seg_objects, labels, {"threads": threads}, rounds=10, warmup_rounds=1)


def test_seg_of_py_ctcmetrics(benchmark, labels, tmp_path):
    """With the time to read its files, from memory."""
    benchmark.group = "SEG"
    paths = []
    for index, pair in enumerate(zip(*labels)):
        paths.append([str(tmp_path / f"{side}{index}.tif") for side in ("truth", "pred")])
        for path, image in zip(paths[-1], pair):
            tifffile.imwrite(path, image)

    def score():
        matched = match_computed_to_reference_masks(*zip(*paths), threads=1)
        return ctc_seg(matched["labels_ref"], matched["ious"])

    assert benchmark.pedantic(score, rounds=2) == pytest.approx(metrics.seg(*labels))


def test_rand_of_one_threshold(benchmark, stack):
    benchmark.group = "Rand scores at one threshold"
    benchmark.pedantic(
        metrics.overlaps, stack, {"thresholds": [0.5], "threads": 1}, rounds=3, warmup_rounds=1
    )


def test_adapted_rand_error_of_scikit_image(benchmark, labels):
    """Of labels that are there already."""
    benchmark.group = "Rand scores at one threshold"
    benchmark.pedantic(lambda: [adapted_rand_error(*pair) for pair in zip(*labels)], rounds=2)


def test_validation_of_four_slices(benchmark, stack):
    """What a training run computes now and then."""
    truth, prob = (images[:4] for images in stack)

    def validate():
        return metrics.v_rand(truth, prob), metrics.iou(truth, prob), metrics.pixel_error(truth, prob)

    benchmark.group = "validation"
    benchmark.pedantic(validate, rounds=5, warmup_rounds=1)
