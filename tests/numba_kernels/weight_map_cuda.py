"""The weight map under Numba's simulator or on a GPU; started by tests/test_numba_cuda.py."""

import math

import numpy as np
import pytest
from numba import cuda
from test_weight_map import ROUNDING, nearest_by_instance

from fastunet import separate, weight_map
from fastunet.data import weight_map_cuda
from fastunet.data.weight_map import balanced_class_weights, count_classes, two_nearest


def random_labels(rng, kind=np.uint16):
    """Specks, blocks and stripes of up to eight labels, which need be neither connected nor consecutive."""
    shape = rng.integers(1, 13, 2)
    names = np.concatenate([[0], rng.choice(np.arange(1, 60000), 8, replace=False)])
    labels = rng.integers(1, rng.integers(2, 10), shape)
    labels[rng.random(shape) > rng.choice([0.05, 0.3, 0.9, 1.0])] = 0
    block = [(1, 1), (3, 2), (1, 5), (2, 2)][rng.integers(4)]
    return names[np.kron(labels, np.ones(block, int))].astype(kind)


def poisoned(shape, dtype=np.float32):
    return cuda.to_device(np.full(shape, 77, dtype))


def scratch_for(labels):
    return poisoned((3, *labels.shape), np.int32)


def distances_on_device(labels, radius=math.inf):
    d1, d2 = poisoned(labels.shape), poisoned(labels.shape)
    weight_map_cuda.two_nearest(cuda.to_device(labels), d1, d2, scratch_for(labels), radius)
    return d1.copy_to_host(), d2.copy_to_host()


def weights_on_device(labels, **options):
    out = poisoned(labels.shape)
    arrays = {
        name: cuda.to_device(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    weight_map_cuda.weight_map(cuda.to_device(labels), out, scratch_for(labels), **arrays)
    return out.copy_to_host()


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.uint32] * 3)
def test_distances_are_exactly_those_of_scipy_and_of_the_cpu(rng, kind):
    labels = random_labels(rng, kind)
    radius = rng.choice([math.inf, rng.uniform(0, 12)])
    found = distances_on_device(labels, radius)
    for distance, reference in zip(found, nearest_by_instance(labels)):
        expected = np.where(reference <= radius, reference, np.inf).astype(np.float32)
        np.testing.assert_array_equal(distance, expected)
    for distance, reference in zip(found, two_nearest(labels, radius)):
        np.testing.assert_array_equal(distance, reference)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (9, 33)])
@pytest.mark.parametrize("instances", [0, 1, 2])
def test_few_instances_far_apart(shape, instances):
    labels = np.zeros(shape, np.uint8)
    labels.flat[: instances > 0] = 1
    labels.flat[-1] = instances
    for distance, reference in zip(distances_on_device(labels), nearest_by_instance(labels)):
        np.testing.assert_array_equal(distance, reference.astype(np.float32))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_paper2015_is_its_formula_and_the_weights_of_the_cpu(rng, cut, hidden):
    labels = random_labels(rng)
    mask = separate(labels).astype(np.uint8) if cut else None
    ignored = rng.random(labels.shape) < 0.2 if hidden else None
    classes = (labels > 0).astype(np.uint8) if mask is None else mask
    w0, sigma = rng.uniform(0, 50), rng.uniform(0.5, 8)

    counts = cuda.to_device(np.zeros(2, np.int64))
    class_weights = poisoned(2, np.float64)
    ignored_on_device = None if ignored is None else cuda.to_device(ignored)
    weight_map_cuda.count_classes(cuda.to_device(classes), counts, ignored_on_device)
    weight_map_cuda.balanced_class_weights(counts, class_weights)
    found = weights_on_device(
        labels, mask=mask, w0=w0, sigma=sigma, class_weights=class_weights, ignored=ignored
    )

    expected = weight_map(labels, mask, w0=w0, sigma=sigma, ignore=ignored)
    np.testing.assert_allclose(found, expected, **ROUNDING)
    d1, d2 = nearest_by_instance(labels)
    base = balanced_class_weights(count_classes(classes, 2, ignored))
    formula = base[classes] + np.where(classes == 0, w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)), 0)
    np.testing.assert_allclose(
        found, formula if ignored is None else np.where(ignored, 0, formula), **ROUNDING
    )


def test_falk2019_is_its_formula_and_the_weights_of_the_cpu(rng):
    for _ in range(3):
        labels = random_labels(rng)
        found = weights_on_device(labels, preset="falk2019")
        np.testing.assert_allclose(found, weight_map(labels, preset="falk2019"), **ROUNDING)
        d1, d2 = nearest_by_instance(labels)
        background = 0.1 + 50 * np.exp(-((d1 + d2) ** 2) / (2 * 6**2)) + 0.9 * np.exp(-(d1**2) / (2 * 10**2))
        np.testing.assert_allclose(found, np.where(labels > 0, 1, background), **ROUNDING)


def test_class_weights_are_none_or_numbers_and_a_class_without_one_is_seen():
    labels = np.array([[1, 1, 0, 2, 2]], np.uint8)
    border = 10 * math.exp(-4 / 50)
    np.testing.assert_allclose(weights_on_device(labels), [[1, 1, 1 + border, 1, 1]], rtol=1e-6)
    mask = np.array([[1, 1, 0, 2, 2]], np.uint8)
    found = weights_on_device(labels, mask=mask, class_weights=np.array([0.5, 3]))
    np.testing.assert_allclose(found, [[3, 3, 0.5 + border, np.nan, np.nan]], rtol=1e-6)


def test_class_counts_add_up_over_a_set(rng):
    counts = cuda.to_device(np.zeros(5, np.int64))
    expected = np.zeros(5, np.int64)
    for _ in range(2):
        mask = rng.choice([0, 1, 2, 4], rng.integers(1, 40, 2)).astype(np.uint8)
        ignored = rng.random(mask.shape) < 0.3
        weight_map_cuda.count_classes(cuda.to_device(mask), counts, cuda.to_device(ignored))
        expected += count_classes(mask, 5, ignored)
    np.testing.assert_array_equal(counts.copy_to_host(), expected)
    weights = poisoned(5, np.float64)
    weight_map_cuda.balanced_class_weights(counts, weights)
    assert weights.copy_to_host()[3] == 0
    # One division of the same two whole numbers.
    np.testing.assert_array_equal(weights.copy_to_host(), balanced_class_weights(expected))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.zeros((3, 3))}, "labels .*integers"),
        ({"labels": np.zeros((3, 3), np.int64)}, "labels .*32 bits"),
        ({"labels": np.zeros((2, 3, 3), np.uint8)}, r"labels .*\(H, W\)"),
        ({"out": np.zeros((3, 4), np.float32)}, "out .*float32"),
        ({"scratch": np.zeros((2, 3, 3), np.int32)}, r"scratch .*\(3, 3, 3\)"),
        ({"mask": np.zeros((3, 4), np.uint8)}, "mask"),
        ({"ignored": np.zeros((3, 3), np.uint8)}, "ignored .*booleans"),
        ({"class_weights": np.zeros(2, np.float32)}, "class_weights .*float64"),
        ({"class_weights": np.ones(2), "preset": "falk2019"}, "falk2019"),
        ({"preset": "paper2016"}, "paper2015"),
        ({"sigma": 0}, "sigma"),
    ],
)
def test_mistakes_are_told(changes, words):
    arguments = {
        "labels": np.eye(3, dtype=np.uint8),
        "out": np.zeros((3, 3), np.float32),
        "scratch": np.zeros((3, 3, 3), np.int32),
        **changes,
    }
    arguments = {
        name: cuda.to_device(value) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=words):
        weight_map_cuda.weight_map(**arguments)
