"""Synthetic microscopy: reproducible, with exact labels, and like the real images it stands for."""

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from skimage import measure

from fastunet.data.datasets import open_dataset
from fastunet.data.separation import separate
from fastunet.data.synthetic import synthetic_cells, synthetic_dataset, synthetic_membranes

Generator = Callable[..., tuple[np.ndarray, np.ndarray]]
GENERATORS = pytest.mark.parametrize("generate", [synthetic_membranes, synthetic_cells])


def digest(generate: Generator, seed: int, size: int) -> str:
    image, labels = generate(seed, size)
    return sha256(image.tobytes() + labels.tobytes()).hexdigest()


@GENERATORS
def test_the_seed_decides(generate: Generator) -> None:
    again = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from hashlib import sha256\nfrom fastunet.data.synthetic import {generate.__name__} as generate\n"
            "image, labels = generate(5, 96)\nprint(sha256(image.tobytes() + labels.tobytes()).hexdigest())",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.strip() == digest(generate, 5, 96) != digest(generate, 6, 96)


@GENERATORS
@pytest.mark.parametrize("size", [1, 2, (3, 40), (201, 17), 64])
def test_any_size(generate: Generator, size: int | tuple[int, int]) -> None:
    image, labels = generate(3, size)
    assert image.shape == labels.shape == ((size, size) if isinstance(size, int) else size)
    assert (image.dtype, labels.dtype) == (np.uint8, np.int32)
    with pytest.raises(ValueError, match="at least 1"):
        generate(3, 0)


@GENERATORS
def test_every_instance_is_one_piece(generate: Generator, rng: np.random.Generator) -> None:
    for seed in rng.integers(2**31, size=2).tolist():
        _, labels = generate(seed, 300)
        assert labels.max() > 20
        np.testing.assert_array_equal(np.unique(labels), np.arange(labels.max() + 1))
        # skimage keeps neighbouring regions of different values apart, so it finds as many pieces as there are numbers.
        assert measure.label(labels, background=0, connectivity=1).max() == labels.max()
        assert np.bincount(labels.ravel()).min() >= 30


def test_membranes_part_the_neurites_and_nuclei_touch(rng: np.random.Generator) -> None:
    for seed in rng.integers(2**31, size=2).tolist():
        _, neurites = synthetic_membranes(seed, 300)
        np.testing.assert_array_equal(separate(neurites), neurites > 0)
        _, nuclei = synthetic_cells(seed, 300)
        assert (separate(nuclei) != (nuclei > 0)).any()


def test_images_show_their_labels(rng: np.random.Generator) -> None:
    for seed in rng.integers(2**31, size=2).tolist():
        image, labels = synthetic_membranes(seed, 300)
        assert image[labels == 0].mean() < image[labels > 0].mean() - 25
        assert image.std() > 20
        image, labels = synthetic_cells(seed, 300)
        assert image[labels == 0].mean() < image[labels > 0].mean() / 2


def test_membranes_are_like_the_real_ones(data_folder: Path, rng: np.random.Generator) -> None:
    # Over a few sections; the tolerances are several times the spread from section to section.
    real = open_dataset(data_folder / "isbi2012", notify=None).samples[::6]
    real_images = np.stack([sample.image[..., 0] for sample in real])
    real_cells = np.stack([sample.classes for sample in real])
    made = [synthetic_membranes(seed) for seed in rng.integers(2**31, size=4).tolist()]
    images = np.stack([image for image, _ in made])
    cells = np.stack([labels > 0 for _, labels in made])
    assert images.mean() == pytest.approx(real_images.mean(), abs=15)
    assert images.std() == pytest.approx(real_images.std(), abs=10)
    assert cells.mean() == pytest.approx(real_cells.mean(), abs=0.06)
    assert np.mean([labels.max() for _, labels in made]) == pytest.approx(
        np.mean([sample.instances.max() for sample in real]), rel=0.4
    )
    assert images[cells].mean() - images[~cells].mean() == pytest.approx(
        real_images[real_cells > 0].mean() - real_images[real_cells == 0].mean(), abs=15
    )


def test_the_stack_of_training_without_data() -> None:
    dataset = synthetic_dataset(3, (64, 80), seed=2)
    assert (len(dataset), dataset.kind, dataset.num_classes, dataset.in_channels) == (3, "instances", 2, 1)
    assert dataset.class_names == ("membrane", "cell")
    images = [sample.image for sample in dataset.samples]
    assert all(image.shape == (64, 80, 1) for image in images)
    assert not np.array_equal(images[0], images[1])
    other = synthetic_dataset(3, (64, 80), seed=3)
    assert not any(np.array_equal(one.image, image) for one in other.samples for image in images)
    with pytest.raises(ValueError, match="at least 1"):
        synthetic_dataset(0)
