"""The pictures of a run are whole PNG files that show what they were given."""

import os

import numpy as np
import pytest
from PIL import Image

from fastunet.report import PREDICTED_LINE, TRUTH_LINE, chosen_samples, draw_progress, draw_samples
from fastunet.validation import PredictedImage


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def has_colour(picture, colour):
    """Whether any pixel has the colour, to a rounding of 8 bits and what the overlay's resampling leaves."""
    return (np.abs(picture - np.round(255 * np.asarray(colour))) <= 3).all(axis=2).any()


def predicted_image(seed, height=90, width=70, channels=1, classes=2, ignore=False):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    truth = (((y - height / 2) ** 2 + (x - width / 2) ** 2) < (width / 3) ** 2).astype(np.uint8)
    probabilities = np.full((height, width, classes), 0.1, np.float32)
    probabilities[:, :, 0] = 0.9
    probabilities[20:50, 15:40] = 0.1
    probabilities[20:50, 15:40, 1] = 0.9
    probabilities /= probabilities.sum(axis=2, keepdims=True)
    return PredictedImage(
        f"image {seed}",
        rng.integers(0, 60000, (height, width, channels)).astype(np.uint16),
        truth.astype(np.int32),
        (x < 8) if ignore else None,
        truth,
        np.ones((height, width), np.float32),
        probabilities,
    )


def history(steps, validations=(), figures=("loss", "iou", "v_rand", "pixel_error")):
    rng = np.random.default_rng(steps)
    step = np.arange(1, steps + 1, dtype=float)
    columns = {"step": step, "seconds": step / 10, "loss": rng.uniform(0.2, 0.9, steps)}
    columns |= {"running_loss": columns["loss"], "lr": np.full(steps, 1e-3)}
    for figure in figures:
        values = np.full(steps, np.nan)
        for validation in validations:
            values[validation - 1] = rng.uniform(0.1, 1)
        columns[f"val_{figure}"] = values
    return columns


@pytest.mark.parametrize("kind", ["binary", "instances"])
@pytest.mark.parametrize("count", [1, 3])
def test_samples_show_both_outlines(tmp_path, kind, count):
    path = tmp_path / "samples.png"
    draw_samples(path, [predicted_image(seed) for seed in range(count)], kind)
    picture = pixels(path)
    assert picture.shape[1] > 1500 and picture.shape[0] > 400 * count
    right = picture[:, 3 * picture.shape[1] // 4 :]
    assert has_colour(right, TRUTH_LINE) and has_colour(right, PREDICTED_LINE)
    left = picture[:, : 3 * picture.shape[1] // 4]
    assert not has_colour(left, TRUTH_LINE)
    assert os.listdir(tmp_path) == ["samples.png"]


def test_samples_of_classes_colours_and_ignored_pixels(tmp_path):
    path = tmp_path / "samples.png"
    images = [predicted_image(seed, 30, 1000, channels=3, classes=4, ignore=True) for seed in range(2)]
    draw_samples(path, images, "classes")
    assert has_colour(pixels(path), np.array([31, 119, 180]) / 255)


def test_samples_of_constant_images_and_nothing_found(tmp_path):
    flat = predicted_image(0)
    flat.image[:] = 7
    flat.instances[:] = 0
    flat.classes[:] = 0
    flat.probabilities[:] = [1, 0]
    draw_samples(tmp_path / "samples.png", [flat], "instances")
    picture = pixels(tmp_path / "samples.png")
    assert not has_colour(picture, TRUTH_LINE) and not has_colour(picture, PREDICTED_LINE)


@pytest.mark.parametrize("count, expected", [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (10, [0, 3, 6, 9])])
def test_chosen_samples_are_spread_evenly(count, expected):
    assert chosen_samples(count) == expected


@pytest.mark.parametrize(
    "steps, validations", [(1, ()), (1, (1,)), (500, (100, 200, 500)), (30000, (30000,))]
)
def test_progress_of_runs_of_any_length(tmp_path, steps, validations):
    path = tmp_path / "progress.png"
    draw_progress(path, history(steps, validations), "v_rand", validations[-1] if validations else 0)
    picture = pixels(path)
    assert picture.shape[1] > 800
    # The running mean's dark blue and, once validated, the best step's green are there.
    assert has_colour(picture, np.array([0x1F, 0x4E, 0x8C]) / 255)
    assert has_colour(picture, np.array([0x1B, 0x78, 0x37]) / 255) == bool(validations)
    assert os.listdir(tmp_path) == ["progress.png"]


def test_progress_of_a_run_judged_by_its_loss(tmp_path):
    draw_progress(tmp_path / "progress.png", history(50, (50,), ("loss",)), "loss", 50)
    assert has_colour(pixels(tmp_path / "progress.png"), np.array([0x1B, 0x78, 0x37]) / 255)
