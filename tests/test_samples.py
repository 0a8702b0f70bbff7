"""Training samples: what the loss sees, the same for the same seed and index whatever the threads do."""

import itertools
import sys
import threading

import numpy as np
import pytest

from fastunet.data import samples as module
from fastunet.data.datasets import Meaning, dataset_of_arrays
from fastunet.data.samples import (
    HostSamples,
    PreparedImage,
    WeightSettings,
    open_samples,
    prepare,
    separated_classes,
)
from fastunet.data.separation import separate
from fastunet.data.weight_map import weight_map
from fastunet.errors import DataError
from fastunet.normalization import normalize

TILE, OUTPUT = 60, 28


def random_instances(rng, height, width, count=8):
    """Discs that touch and overlap, the later above the earlier."""
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.int32)
    for label in range(1, count + 1):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 12)
        labels[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = label
    return labels


def random_dataset(seed, count=3, kind="instances", **meaning):
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(20, 90)), int(rng.integers(20, 90))) for _ in range(count)]
    labels = [random_instances(rng, *shape) for shape in shapes]
    images = [rng.integers(0, 4000, shape).astype(np.uint16) for shape in shapes]
    return dataset_of_arrays(images, labels, Meaning(kind, **meaning))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


def take(count, **arguments):
    with HostSamples(**arguments) as samples:
        return [next(samples) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_prepared_images_are_normalised_separated_and_weighed_over_the_whole_set(seed):
    dataset = random_dataset(seed)
    images, class_weights = prepare(dataset, "zscore", quiet=True)
    classes = [separated_classes(sample, "instances") for sample in dataset.samples]
    pixels = np.concatenate([labels.ravel() for labels in classes])
    balanced = len(pixels) / (2 * np.array([np.sum(pixels == 0), np.sum(pixels == 1)]))
    np.testing.assert_allclose(class_weights, balanced, rtol=1e-12)
    for image, sample, labels in zip(images, dataset.samples, classes):
        np.testing.assert_array_equal(image.image, normalize(sample.image, "zscore"))
        np.testing.assert_array_equal(image.classes, labels)
        expected = weight_map(sample.instances, mask=labels, class_weights=balanced)
        # The same formula on the same numbers: only the summation of the class weights may round differently.
        np.testing.assert_allclose(image.weights, expected, rtol=1e-6)
        # On objects there is no border term.
        np.testing.assert_allclose(image.weights[labels == 1], balanced[1], rtol=1e-6)


def test_held_out_images_take_the_class_weights_of_the_training_set():
    training, held_out = random_dataset(1), random_dataset(2)
    _, class_weights = prepare(training, "zscore", quiet=True)
    images, kept = prepare(held_out, "zscore", None, class_weights, quiet=True)
    np.testing.assert_array_equal(kept, class_weights)
    for image in images:
        np.testing.assert_allclose(image.weights[image.classes == 1], class_weights[1], rtol=1e-6)


def test_falk2019_has_weights_of_its_own():
    images, _ = prepare(random_dataset(3), "zscore", WeightSettings(preset="falk2019"), quiet=True)
    for image in images:
        np.testing.assert_array_equal(image.weights[image.classes == 1], 1)
        assert image.weights[image.classes == 0].min() >= np.float32(0.1)
        assert image.weights.max() > 1


def test_classes_are_not_cut_where_two_of_them_meet():
    labels = np.zeros((30, 30), np.uint8)
    labels[5:25, 5:15], labels[5:25, 15:25] = 1, 2
    meaning = Meaning("classes", ("background", "cell", "nucleus"))
    dataset = dataset_of_arrays([labels], [labels], meaning)
    np.testing.assert_array_equal(separated_classes(dataset.samples[0], "classes"), labels)
    touching = dataset_of_arrays([labels], [labels], Meaning("instances"))
    assert (separated_classes(touching.samples[0], "instances")[10, 13:17] == [1, 0, 0, 1]).all()


def test_an_image_that_cannot_be_normalised_is_named():
    image = np.full((20, 20), np.nan, np.float32)
    dataset = dataset_of_arrays([image], [np.eye(20, dtype=np.uint8)], Meaning("binary"), names=["cells-07"])
    with pytest.raises(DataError, match="cells-07: .*NaN"):
        prepare(dataset, "zscore", quiet=True)


@pytest.mark.parametrize("seed", range(3))
def test_sample_i_depends_on_seed_and_i_alone(seed):
    images, _ = prepare(random_dataset(seed), "zscore", quiet=True)
    arguments = {"images": images, "tile": TILE, "output": OUTPUT, "seed": seed}
    whole = take(12, **arguments)
    assert all(same(a, b) for a, b in zip(whole, take(12, threads=3, **arguments)))
    start = int(np.random.default_rng(seed).integers(1, 11))
    assert all(same(a, b) for a, b in zip(whole[start:], take(12 - start, start=start, **arguments)))
    other = take(12, **(arguments | {"seed": seed + 1}))
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(whole, other))
    assert not any(np.array_equal(a.image, b.image) for a, b in itertools.pairwise(whole))


def test_samples_have_the_shapes_and_types_of_the_network():
    rng = np.random.default_rng(5)
    image = rng.normal(size=(40, 50, 3)).astype(np.float32)
    prepared = PreparedImage("a", image, np.ones((40, 50), np.uint8), np.ones((40, 50), np.float32))
    (sample,) = take(1, images=[prepared], tile=TILE, output=OUTPUT)
    assert (sample.image.shape, sample.image.dtype) == ((1, TILE, TILE, 3), np.float32)
    assert (sample.labels.shape, sample.labels.dtype) == ((1, OUTPUT, OUTPUT), np.uint8)
    assert (sample.weights.shape, sample.weights.dtype) == ((1, OUTPUT, OUTPUT), np.float32)


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    flat = np.ones((40, 40), np.float32)
    images = [PreparedImage(str(k), flat[..., None], np.full((40, 40), k, np.uint8), flat) for k in range(6)]
    seen = [int(sample.labels.max()) for sample in take(30, images=images, tile=TILE, output=OUTPUT, seed=1)]
    epochs = [seen[k : k + 6] for k in range(0, 30, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_tile_without_weight_is_drawn_again():
    weights = np.zeros((400, 400), np.float32)
    weights[100:130, 250:280] = 1
    prepared = PreparedImage(
        "a", np.zeros((400, 400, 1), np.float32), np.zeros((400, 400), np.uint8), weights
    )
    first, again = (take(20, images=[prepared], tile=TILE, output=OUTPUT, seed=s) for s in (3, 3))
    assert all(sample.weights.any() for sample in first)
    assert all(same(a, b) for a, b in zip(first, again))


def test_images_without_any_weight_are_left_out_and_a_set_of_them_refused():
    flat = np.zeros((40, 40), np.float32)
    empty = PreparedImage("empty", flat[..., None], np.full((40, 40), 1, np.uint8), flat)
    full = PreparedImage("full", flat[..., None], np.full((40, 40), 2, np.uint8), flat + 1)
    for sample in take(5, images=[empty, full], tile=TILE, output=OUTPUT):
        assert (sample.labels == 2).all()
    with pytest.raises(DataError, match="1 training images has a pixel to learn from"):
        HostSamples([empty], TILE, OUTPUT)


@pytest.mark.parametrize("seed", range(3))
def test_ignored_pixels_have_no_weight_at_all_after_the_warp(seed):
    rng = np.random.default_rng(seed)
    labels = random_instances(rng, 80, 70)
    labels[rng.uniform(size=labels.shape) < 0.2] = 99
    # The grey value says whether a pixel is ignored, and the warp samples it as it does the weights.
    image = (labels == 99).astype(np.uint8) * 200
    dataset = dataset_of_arrays([image], [labels], Meaning("instances", ignore=99))
    images, class_weights = prepare(dataset, "none", quiet=True)
    assert (images[0].weights[labels == 99] == 0).all() and (images[0].weights[labels != 99] > 0).all()
    known = labels != 99
    share = np.bincount(images[0].classes[known], minlength=2)
    np.testing.assert_allclose(class_weights, known.sum() / (2 * share), rtol=1e-12)
    margin = (TILE - OUTPUT) // 2
    silent = 0
    for sample in take(8, images=images, tile=TILE, output=OUTPUT, seed=seed):
        assert sample.labels.max() <= 1
        weights = sample.weights[0]
        centre = sample.image[0, margin:-margin, margin:-margin, 0]
        grey = (centre - centre.min()) / (centre.max() - centre.min())
        # Linear interpolation gives the nearest pixel at least a quarter: above 3/4 it must be an ignored one.
        assert (weights[grey > 0.76] == 0).all()
        silent += int((weights == 0).sum())
    assert silent > 0


def test_an_error_in_a_thread_surfaces_in_the_loop(monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("in the thread")

    monkeypatch.setattr(module, "apply_warp", broken)
    flat = np.ones((40, 40), np.float32)
    images = [PreparedImage("a", flat[..., None], np.ones((40, 40), np.uint8), flat)]
    with (
        HostSamples(images, TILE, OUTPUT) as samples,
        pytest.raises(ZeroDivisionError, match="in the thread"),
    ):
        next(samples)


def test_few_samples_wait_and_close_ends_the_threads(monkeypatch):
    computed = []
    original = HostSamples.sample
    monkeypatch.setattr(HostSamples, "sample", lambda self, i: computed.append(i) or original(self, i))
    flat = np.ones((40, 40), np.float32)
    images = [PreparedImage("a", flat[..., None], np.ones((40, 40), np.uint8), flat)]
    with HostSamples(images, TILE, OUTPUT, threads=2) as samples:
        for _ in range(5):
            next(samples)
    assert 5 <= len(computed) <= 5 + 8
    assert not [t for t in threading.enumerate() if t.name.startswith("augmentation")]


@pytest.mark.parametrize("seed", range(3))
def test_the_grey_value_change_is_in_proportion_to_the_image(seed):
    """Whatever normalisation left of the range: 100 times the image gives 100 times the tile."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((50, 60, 1)).astype(np.float32)
    classes, weights = np.zeros((50, 60), np.uint8), np.ones((50, 60), np.float32)
    both = [
        PreparedImage("a", factor * image, classes, weights) for factor in (np.float32(1), np.float32(100))
    ]
    one, other = (take(3, images=[each], tile=TILE, output=OUTPUT, seed=seed) for each in both)
    for small, large in zip(one, other):
        # The standard deviation is rounded to float32 in each.
        np.testing.assert_allclose(large.image, 100 * small.image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [0, 1, 3])
def test_the_gap_is_as_wide_as_asked(width):
    dataset = random_dataset(1)
    images, _ = prepare(dataset, "zscore", separation_width=width, quiet=True)
    for image, sample in zip(images, dataset.samples):
        np.testing.assert_array_equal(image.classes, separate(sample.instances, width))


def test_samples_for_a_gpu_are_made_on_the_cpu_where_numba_lacks_it(monkeypatch):
    """And on the CPU for the CPU, of which nothing is said; tests/numba_kernels/samples_cuda.py has the rest."""
    flat = np.ones((40, 40), np.float32)
    images = [PreparedImage("a", flat[..., None], np.ones((40, 40), np.uint8), flat)]
    monkeypatch.setitem(sys.modules, "fastunet.data.samples_cuda", None)
    told = []
    *_, expected = take(6, images=images, tile=TILE, output=OUTPUT, seed=2)
    for where in ({}, {"stream": (0, 7), "room": 1 << 30}):
        with open_samples(images, TILE, OUTPUT, seed=2, start=5, notify=told.append, **where) as samples:
            assert same(next(samples), expected)
    assert len(told) == 1
    assert told[0].startswith(
        "the CPU warps the training samples: import of fastunet.data.samples_cuda halted"
    )
