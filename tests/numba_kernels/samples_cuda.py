"""Samples made on a device: under Numba's simulator or on a GPU; started by tests/test_numba_cuda.py."""

import csv
import itertools
import os

import numpy as np
import pytest
from emulator import conftest  # noqa: F401  registers the emulator
from numba import cuda
from test_weight_map import ROUNDING

from fastunet import training
from fastunet.backends.cuda.table import CudaBackend
from fastunet.data import samples as on_host
from fastunet.data import samples_cuda
from fastunet.data.datasets import Meaning, dataset_of_arrays
from fastunet.data.samples import (
    DRAWS,
    HostSamples,
    PreparedImage,
    TrainingSample,
    WeightSettings,
    open_samples,
    prepare,
)
from fastunet.data.samples_cuda import DeviceSamples
from fastunet.data.warp import apply_warp
from fastunet.errors import DataError

TILE, OUTPUT = 8, 4
ROOM = 1 << 30
STREAM = 0, 0
DEVICE = "emulator" if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" else "cuda:0"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory full of 77, and few samples ahead: the simulator takes half a second for each."""
    monkeypatch.setattr(samples_cuda, "AHEAD", 2)
    for name, place in (("device_array", cuda.to_device), ("pinned_array", lambda array: array)):
        monkeypatch.setattr(
            cuda, name, lambda shape, dtype, place=place, **_: place(np.full(shape, 77, dtype))
        )


def prepared_images(rng, channels=1):
    """Smooth pictures, so that the rounding of a coordinate moves no grey value far; in one, ignored pixels."""
    images = []
    for number in range(2):
        height, width = rng.integers(9, 20, 2)
        rows, columns = np.mgrid[:height, :width]
        image = np.stack([np.sin(rows / 7 + k) + np.cos(columns / 5 - k) for k in range(channels)], axis=-1)
        classes = np.full((height, width), number, np.uint8)
        weights = (1 + np.sin(rows / 6) / 2).astype(np.float32)
        ignored = columns < width // 2 if number else None
        if ignored is not None:
            weights[ignored] = 0
        images.append(PreparedImage(f"image {number}", image.astype(np.float32), classes, weights, ignored))
    return images


def on_device(images, start=0, seed=0, room=ROOM):
    return DeviceSamples(images, TILE, OUTPUT, seed, start, 0, 0, room)


def fetched(sample):
    return TrainingSample(*(array.copy_to_host() for array in vars(sample).values()))


def assert_same(found, expected):
    """Coordinates differ by at most 2^-15 pixels (fastunet.data.warp), and a pixel by less than 1."""
    bound = 2.0**-12
    for one, other in zip(vars(found).values(), vars(expected).values()):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    np.testing.assert_allclose(found.image, expected.image, atol=bound, rtol=0)
    # Where the rounding decides which pixel is nearest, it may be an ignored one on one device alone.
    sure = (found.labels == expected.labels) & ((found.weights == 0) == (expected.weights == 0))
    assert sure.mean() > 0.7
    np.testing.assert_allclose(found.weights[sure], expected.weights[sure], atol=bound, rtol=0)


@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_those_of_the_cpu(rng, channels):
    images, seed, start = prepared_images(rng, channels), int(rng.integers(1000)), int(rng.integers(50))
    with on_device(images, start, seed) as found, HostSamples(images, TILE, OUTPUT, seed, start) as expected:
        for _ in range(4):
            assert_same(fetched(next(found)), next(expected))
        one = start + int(rng.integers(9))
        assert_same(fetched(found.sample(one)), expected.sample(one))


def test_a_tile_without_weight_is_drawn_again_as_on_the_cpu(rng):
    weights = np.zeros((30, 30), np.float32)
    weights[:, 10:14] = 1
    stripe = PreparedImage("stripe", np.ones((30, 30, 1), np.float32), weights.astype(np.uint8), weights)
    while True:
        seed = int(rng.integers(1 << 30))
        with HostSamples([stripe], TILE, OUTPUT, seed) as expected:
            _, first = next(expected._draws(0))
            if not apply_warp(stripe.image, stripe.classes, weights, first)[2].any():
                break
    with on_device([stripe], 0, seed) as found:
        sample = fetched(next(found))
    assert sample.weights.any()
    assert_same(sample, expected.sample(0))


@pytest.mark.parametrize("preset", ["paper2015", "falk2019"])
def test_images_are_prepared_as_on_the_cpu(rng, preset, monkeypatch):
    labels = np.kron(rng.integers(0, 4, (3, 4)), np.ones((3, 3), int))
    labels[:2] = 9
    image = rng.integers(0, 200, labels.shape).astype(np.uint8)
    data = dataset_of_arrays([image], [labels], Meaning("instances", ignore=9))
    weighting = WeightSettings(preset=preset)
    (expected,), class_weights = prepare(data, "zscore", weighting, quiet=True)
    monkeypatch.setattr(on_host, "weight_map", lambda *given, **options: pytest.fail("the CPU weighs"))
    (found,), same_weights = prepare(data, "zscore", weighting, quiet=True, stream=STREAM)
    np.testing.assert_array_equal(same_weights, class_weights)
    np.testing.assert_allclose(found.weights, expected.weights, **ROUNDING)
    assert (found.weights[:2] == 0).all() and (found.weights[2:] > 0).all()
    for name in ("image", "classes", "ignored"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_an_image_whose_weight_is_never_met_is_named():
    weights = np.zeros((400, 400), np.float32)
    weights[200, 200] = 1
    speck = PreparedImage("speck", np.ones((400, 400, 1), np.float32), weights.astype(np.uint8), weights)
    with on_device([speck]) as found:
        found._draws = lambda index, draws=found._draws: itertools.chain(
            itertools.islice(draws(index), 1), itertools.islice(draws(index), DRAWS, None)
        )
        with pytest.raises(DataError, match="speck: 1000 random tiles of 4 pixels held no pixel"):
            found.sample(0)


def test_a_buffer_is_filled_again_only_after_what_was_given_to_its_reader(rng, monkeypatch):
    """A sample stays as it is until the next is asked for; then the warps wait for the reader. Nothing is allocated."""
    notes, everywhere = [], np.ones((12, 15), np.float32)
    grey = rng.standard_normal((12, 15, 1)).astype(np.float32)
    images = [PreparedImage("a", grey, everywhere.astype(np.uint8), everywhere)]

    class Noted:
        """An event of which is noted what it follows, and what waits for it."""

        def __init__(self, event=cuda.event):
            self.event = event()

        def record(self, stream):
            notes.append(("record", stream))
            self.event.record(stream)

        def wait(self, stream):
            notes.append(("wait", stream))
            self.event.wait(stream)

        def synchronize(self):
            self.event.synchronize()

    monkeypatch.setattr(cuda, "event", Noted)
    with on_device(images) as found:
        warp = samples_cuda.apply_warp

        def noted_warp(*arrays, stream, **options):
            notes.append(("warp", stream))
            warp(*arrays, stream=stream, **options)

        monkeypatch.setattr(samples_cuda, "apply_warp", noted_warp)
        for name in ("device_array", "pinned_array", "to_device"):
            monkeypatch.delattr(cuda, name)
        handed, held = [], []
        for _ in range(5):
            if handed:
                assert_same(fetched(handed[-1]), held[-1])
            notes.clear()
            handed.append(next(found))
            held.append(fetched(handed[-1]))
            order = (
                ("record", 0),
                ("wait", found._stream),
                ("warp", found._stream),
                ("record", found._stream),
            )
            assert tuple(notes) == order
            if handed[1:]:  # the new warp went to what was read before
                assert found._buffers[(found._next - 1) % 3].sample is handed[-2]
        places = [id(sample) for sample in handed]
        assert len(set(places[:3])) == 3 and places[3:] == places[:2]


def test_the_cpu_weighs_what_does_not_fit(monkeypatch):
    def no_memory(*given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cuda, "to_device", no_memory)
    data = dataset_of_arrays([np.eye(9)], [np.eye(9, dtype=np.uint8)], Meaning("binary"))
    (found,), (expected,) = (prepare(data, "zscore", quiet=True, stream=at)[0] for at in (STREAM, None))
    np.testing.assert_array_equal(found.weights, expected.weights)


def test_images_that_do_not_fit_are_left_to_the_cpu(rng):
    images, told = prepared_images(rng), []
    with pytest.raises(MemoryError, match=r"^they take .* on GPU 0, where 1 KiB are left for them$"):
        on_device(images, room=1024)
    chosen = dict(stream=STREAM, notify=told.append)
    with open_samples(images, TILE, OUTPUT, room=1024, **chosen) as samples:
        assert isinstance(samples, HostSamples)
    assert len(told) == 1 and told[0].startswith("the CPU warps the training samples: they take ")
    with open_samples(images, TILE, OUTPUT, room=ROOM, **chosen) as samples:
        assert isinstance(samples, DeviceSamples)
    assert len(told) == 1


def test_a_run_learns_from_them_what_it_learns_from_the_cpus(rng, tmp_path, monkeypatch):
    """The emulated device reads the simulator's arrays where they lie, as a GPU its own."""
    monkeypatch.setattr(samples_cuda, "AHEAD", 1)
    if DEVICE == "emulator":
        monkeypatch.setattr(CudaBackend, "stream", STREAM)
        monkeypatch.setitem(training.OUTPUT_BY_DEVICE, "emulator", 4)
    opened = []
    monkeypatch.setattr(
        training,
        "open_samples",
        lambda *given, **options: opened.append(open_samples(*given, **options)) or opened[-1],
    )
    rows, columns = np.mgrid[:24, :24]
    image = (100 + 50 * np.sin(rows / 4) + 50 * np.cos(columns / 5)).astype(np.uint8)
    data = dataset_of_arrays([image], [(image > 100).astype(np.uint8)], Meaning("binary"))
    settings = training.Settings(
        steps=2, base_channels=1, depth=1, tile=20, device=DEVICE, precision="fp32", threads=1
    )
    losses = []
    for kind in (DeviceSamples, HostSamples):
        out = tmp_path / kind.__name__
        training.train(data, None, out, settings, quiet=True, notify=lambda line: None)
        with open(out / "metrics.csv") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
        assert type(opened[-1]) is kind
        monkeypatch.setattr(CudaBackend, "stream", None)
    assert len(set(losses[0])) == 2
    # Grey values of one standard deviation, off by 2^-12, and a label or two of 16 that another pixel decides.
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)
