"""kernels/dropout.cu against the CPU engine, bit for bit."""

import numpy as np
import pytest

from emulator.tensors import empty, put, put_flat, rounded, run
from fastunet import backends
from fastunet.backends.cuda import pointwise


def dropped_by_cpu(values: np.ndarray, rate: float, seed: int, draw: int) -> np.ndarray:
    cpu = backends.load("cpu")
    return cpu.numpy(cpu.dropout(cpu.array(values), rate, seed, draw))


def drop(x, y, rate: float, seed: int, draw: int, steps=None) -> np.ndarray:
    pointer = None if steps is None else steps.pointer
    arguments = pointwise.DropoutArguments(x.argument(), y.argument(), pointer, seed, draw, rate)
    run(x.device, pointwise.dropout(arguments.output), x.bits, arguments)
    return y.numpy()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 3, 18), (3, 5, 5, 32)], ids=str)
@pytest.mark.parametrize("bits", [16, 32])
def test_as_on_the_cpu(device, rng, bits, shape):
    seed, draw, rate = int(rng.integers(2**63)), int(rng.integers(2**63)), 0.9 * float(rng.random())
    values = rounded(rng.standard_normal(shape), bits)
    expected = rounded(dropped_by_cpu(values, rate, seed, draw), bits)
    x = put(device, values, bits)
    np.testing.assert_array_equal(drop(x, empty(device, shape, bits), rate, seed, draw), expected)
    np.testing.assert_array_equal(drop(x, x, rate, seed, draw), expected, "in place")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_image_without_padding(device, rng, channels):
    values = rng.standard_normal((2, 3, 5, channels)).astype(np.float32)
    found = drop(put(device, values, 32, channels), empty(device, values.shape, 32, channels), 0.5, 7, 8)
    np.testing.assert_array_equal(found, dropped_by_cpu(values, 0.5, 7, 8))


def test_steps_of_a_graph_are_added_to_the_draw(device, rng):
    values = rng.standard_normal((1, 3, 5, 16)).astype(np.float32)
    steps = put_flat(device, np.array([6], np.uint64))
    found = drop(put(device, values, 32), empty(device, values.shape, 32), 0.5, 7, 2**63 - 3, steps)
    np.testing.assert_array_equal(found, dropped_by_cpu(values, 0.5, 7, 2**63 + 3))
