"""kernels/image.cu against fastunet.normalization on the host: any type, any strides, the same numbers.

Sums of integers are exact. Those of floats err by a few hundred roundings of double precision at most, one after the
other, of numbers of one order: 1e-13 of what is summed.
"""

import numpy as np
import pytest

from emulator.tensors import from_bfloat16, put_flat, to_bfloat16
from fastunet import backends
from fastunet.backends.cuda import image as host
from fastunet.backends.cuda import strided
from fastunet.backends.cuda.exchange import View
from fastunet.backends.cuda.prediction import Plane
from fastunet.normalization import scaled, statistics

DTYPES = {kind: kind for kind in strided.TYPES if kind != "bfloat16"} | {"bfloat16": "uint16"}
"""What NumPy has for each type: of bfloat16 the bits."""


@pytest.fixture
def table():
    return backends.load("emulator", "fp32")


def drawn(rng, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    if kind == "bfloat16":
        return to_bfloat16(rng.standard_normal(shape) * 100)
    if kind.startswith("float"):
        return (rng.standard_normal(shape) + 1000).astype(kind)
    limits = np.iinfo(kind)
    return rng.integers(max(limits.min, -(2**40)), min(limits.max, 2**40), shape, kind, endpoint=True)


def as_float(values: np.ndarray, kind: str) -> np.ndarray:
    return (from_bfloat16(values) if kind == "bfloat16" else values).astype(np.float64)


def laid_out(device, rng, kind: str, shape: tuple[int, int, int], layout: str) -> tuple[View, np.ndarray]:
    """An image on the device and what it holds; as it comes, channels first, or part of every other pixel backwards."""
    height, width, channels = shape
    if layout == "channels first":
        whole = drawn(rng, kind, (channels, height, width))
        seen = whole.transpose(1, 2, 0)
    elif layout == "backwards":
        whole = drawn(rng, kind, (height, 2 * width + 3, channels + 1))
        seen = whole[::-1, ::-2, :channels][:, :width]
    else:
        whole = seen = drawn(rng, kind, shape)
    memory = put_flat(device, whole)
    first = seen.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    strides = tuple(stride // whole.itemsize for stride in seen.strides)
    return View(memory, memory.pointer + first, shape, strides, kind), as_float(seen, kind)


LAYOUTS = ["as it comes", "channels first", "backwards"]
# One pixel, fewer than a block has threads in a row, several parts, and rows longer than a block.
SHAPES = [(1, 1, 1), (7, 3, 2), (67, 100, 1), (5, 700, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", strided.TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grey_values(table, rng, kind, shape, layout):
    view, values = laid_out(table.device, rng, kind, shape, layout)
    found = table.grey_values(view, True)
    assert len(found) == shape[2]
    for channel, (one, expected) in enumerate(zip(found, statistics(values, True))):
        assert (one.low, one.high, one.bad) == (expected.low, expected.high, 0)
        terms = np.abs(values[..., channel]).mean()
        assert one.mean == pytest.approx(expected.mean, rel=0, abs=1e-13 * terms)
        assert one.deviation == pytest.approx(values[..., channel].std(), rel=1e-12, abs=1e-13 * terms)
        if "int" in kind:
            assert one.mean == values[..., channel].sum() / values[..., channel].size
    assert [one.deviation for one in table.grey_values(view, False)] == [0.0] * shape[2]


def test_the_order_of_blocks_changes_no_bit(table, rng, monkeypatch):
    """Nor that of two parts or three for each thread of the last sum."""
    monkeypatch.setattr(host, "PIXELS_OF_A_PART", 5)
    view, values = laid_out(table.device, rng, "float64", (50, 60, 1), "as it comes")
    assert host.grey_parts(*view.shape).grid[0] == 600
    found = []
    for seed in range(3):
        monkeypatch.setattr(table.device, "seed", seed, raising=False)
        found += table.grey_values(view, True)
    assert found[0] == found[1] == found[2]
    (expected,) = statistics(values, True)
    assert (found[0].low, found[0].high) == (expected.low, expected.high)
    assert found[0].mean == pytest.approx(expected.mean, rel=1e-13)
    assert found[0].deviation == pytest.approx(expected.deviation, rel=1e-12)


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16"])
def test_values_that_are_no_numbers_are_counted(table, rng, kind):
    shape = 60, 70, 2
    whole = drawn(rng, kind, shape)
    bad = {"float32": np.array([0x7F800000, 0xFF800000, 0x7FC00001], np.uint32).view(np.float32)}
    bad["float64"] = np.array([np.inf, -np.inf, np.nan])
    bad["bfloat16"] = np.array([0x7F80, 0xFF80, 0x7FC0], np.uint16)
    count = int(rng.integers(1, 9))
    places = rng.choice(60 * 70, count, replace=False)
    whole[places // 70, places % 70, 1] = bad[kind][rng.integers(3, size=count)]
    memory = put_flat(table.device, whole)
    view = View(memory, memory.pointer, shape, (140, 2, 1), kind)
    found = table.grey_values(view, True)
    assert [one.bad for one in found] == [0, count]
    finite = as_float(whole, kind)[..., 1]
    finite = finite[np.isfinite(finite)]
    assert (found[1].low, found[1].high) == (finite.min(), finite.max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", strided.TYPES)
def test_scaled(table, rng, kind, layout, monkeypatch):
    """To the bit: one rounding to double of each of two operations, one to float."""
    monkeypatch.setattr(host, "MOST_BLOCKS", 3)  # fewer rows than the image's
    shape = 5, 130, 3
    view, values = laid_out(table.device, rng, kind, shape, layout)
    scales = rng.standard_normal((3, 2)) * 100
    target = Plane.allocate(table.device, shape, np.float32)
    table.scaled_image(view, put_flat(table.device, scales), target)
    found = table.device.download(target.pointer, shape, np.float32)
    np.testing.assert_array_equal(found, scaled(values, scales))
