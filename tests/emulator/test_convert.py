"""kernels/convert.cu against NumPy: exactly, but for the rounding of each result."""

import numpy as np
import pytest

from emulator.tensors import empty, put, rounded, run
from fastunet.backends.cuda import pointwise
from fastunet.backends.cuda.arguments import TensorArgument

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 3), (3, 4, 7, 16), (1, 5, 300, 21)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("plain", ["source", "target", "both", "neither"])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("source_bits", [16, 32])
def test_convert(device, rng, source_bits, bits, plain, shape):
    values = rounded(rng.standard_normal(shape), source_bits)
    source = put(device, values, source_bits, shape[3] if plain in ("source", "both") else None)
    target = empty(device, shape, bits, shape[3] if plain in ("target", "both") else None)
    arguments = pointwise.ConvertArguments(source.argument(), target.argument())
    run(device, pointwise.convert(source_bits, arguments.target), bits, arguments)
    np.testing.assert_array_equal(target.numpy(), rounded(values, bits))


def test_convert_crops(device, rng):
    values = rounded(rng.standard_normal((2, 9, 8, 5)), 16)
    source, target = put(device, values, 16), empty(device, (2, 4, 3, 5), 16)
    arguments = pointwise.ConvertArguments(source.argument(2, 3), target.argument())
    run(device, pointwise.convert(16, arguments.target), 16, arguments)
    np.testing.assert_array_equal(target.numpy(), values[:, 2:6, 3:6])


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("channels, pitch", [(1, 16), (5, 5), (16, 16), (18, 32)])
def test_sum_of_a_whole_and_a_centre(device, rng, bits, channels, pitch):
    shape = (2, 7, 9, channels)
    one = rounded(rng.standard_normal(shape), bits)
    other = rounded(rng.standard_normal((2, 4, 5, channels)), bits)
    expected = one.copy()
    expected[:, 1:5, 2:7] += other
    centre, total = put(device, other, bits, pitch), put(device, one, bits, pitch)
    arguments = pointwise.SumArguments(total.argument(), centre.argument(-1, -2), total.argument())
    run(device, pointwise.combine("sum", arguments.total), bits, arguments)
    np.testing.assert_array_equal(total.numpy(), rounded(expected, bits))


@pytest.mark.parametrize("bits", [16, 32])
def test_sum_puts_a_centre_among_zeros(device, rng, bits):
    values = rounded(rng.standard_normal((2, 4, 5, 18)), bits)
    centre, total = put(device, values, bits), empty(device, (2, 7, 9, 18), bits)
    arguments = pointwise.SumArguments(centre.argument(-1, -2), TensorArgument(), total.argument())
    run(device, pointwise.combine("sum", arguments.total), bits, arguments)
    expected = np.pad(values, ((0, 0), (1, 2), (2, 2), (0, 0)))
    np.testing.assert_array_equal(total.numpy(), expected)


def test_more_rows_and_images_than_a_grid_has(device, rng):
    values = rng.standard_normal((5, 7, 3, 4)).astype(np.float32)
    source, target = put(device, values, 32), empty(device, values.shape, 32)
    arguments = pointwise.ConvertArguments(source.argument(), target.argument())
    run(device, pointwise.convert(32, arguments.target)._replace(grid=(1, 3, 2)), 32, arguments)
    np.testing.assert_array_equal(target.numpy(), values)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_and_scale(device, rng, bits, shape):
    gradient = rounded(rng.standard_normal(shape), bits)
    output = rounded(np.maximum(rng.standard_normal(shape), 0), bits)
    x, y, masked = put(device, gradient, bits), put(device, output, bits), empty(device, shape, bits)
    arguments = pointwise.MaskArguments(x.argument(), y.argument(), masked.argument())
    run(device, pointwise.combine("mask", arguments.masked), bits, arguments)
    np.testing.assert_array_equal(masked.numpy(), np.where(output > 0, gradient, 0))
    factor = np.float32(rng.random())
    scale = pointwise.ScaleArguments(x.argument(), x.argument(), factor)
    run(device, pointwise.combine("scale", scale.scaled), bits, scale)
    np.testing.assert_array_equal(x.numpy(), rounded(gradient * factor, bits))
