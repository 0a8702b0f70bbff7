"""kernels/maxpool2x2.cu against PyTorch: exactly, but for the rounding of a sum."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emulator.tensors import empty, put, rounded, run
from fastunet.backends.cuda import pointwise
from fastunet.backends.cuda.arguments import TensorArgument

SHAPES = [(1, 2, 2, 1), (2, 3, 5, 3), (1, 17, 9, 16), (3, 10, 12, 40), (1, 6, 71, 80)]


def pooled_by_torch(values: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = torch.tensor(values.astype(np.float64)).permute(0, 3, 1, 2).contiguous().requires_grad_()
    y = F.max_pool2d(x, 2)
    y.backward(torch.tensor(gradient.astype(np.float64)).permute(0, 3, 1, 2))
    return y.detach().permute(0, 2, 3, 1).numpy(), x.grad.permute(0, 2, 3, 1).numpy()


def pool(device, values, bits, pitch=None):
    x = put(device, values, bits, pitch)
    images, height, width, channels = values.shape
    pooled = empty(device, (images, height // 2, width // 2, channels), bits, pitch)
    arguments = pointwise.MaxpoolForwardArguments(x.argument(), pooled.argument())
    run(device, pointwise.maxpool2x2_forward(arguments.pooled), bits, arguments)
    return x, pooled


def unpool(gradient, x, present, rectified, total) -> None:
    _, height, width, _ = total.shape
    if present is None:
        placed = TensorArgument()
    else:
        placed = present.argument(-((height - present.shape[1]) // 2), -((width - present.shape[2]) // 2))
    arguments = pointwise.MaxpoolBackwardArguments(
        gradient.argument(), x.argument(), placed, total.argument(), rectified
    )
    run(total.device, pointwise.maxpool2x2_backward(arguments.total), total.bits, arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [16, 32])
def test_forward_and_backward(device, rng, bits, shape):
    values = rng.integers(-2, 3, shape).astype(np.float32)  # ties everywhere
    images, height, width, channels = shape
    gradient = rounded(rng.standard_normal((images, height // 2, width // 2, channels)), bits)
    expected, expected_gradient = pooled_by_torch(values, gradient)
    x, pooled = pool(device, values, bits)
    np.testing.assert_array_equal(pooled.numpy(), expected)
    total = empty(device, shape, bits)
    unpool(put(device, gradient, bits), x, None, False, total)
    np.testing.assert_array_equal(total.numpy(), expected_gradient)


@pytest.mark.parametrize("present_shape", ["whole", "centre", "in place"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("bits", [16, 32])
def test_backward_adds_what_is_present_and_masks(device, rng, bits, shape, present_shape):
    values = np.maximum(rng.integers(-2, 3, shape), 0).astype(np.float32)  # the output of a ReLU
    images, height, width, channels = shape
    gradient = rounded(rng.standard_normal((images, height // 2, width // 2, channels)), bits)
    less = 1 if present_shape == "centre" else 0
    present = rounded(rng.standard_normal((images, height - 2 * less, width - 3 * less, channels)), bits)
    _, expected = pooled_by_torch(values, gradient)
    top, left = less, (3 * less) // 2
    expected = expected.astype(np.float32)
    expected[:, top : top + present.shape[1], left : left + present.shape[2]] += present
    expected = rounded(np.where(values > 0, expected, 0), bits)
    x, placed = put(device, values, bits), put(device, present, bits)
    total = placed if present_shape == "in place" else empty(device, shape, bits)
    unpool(put(device, gradient, bits), x, placed, True, total)
    np.testing.assert_array_equal(total.numpy(), expected)


@pytest.mark.parametrize("pitch", [1, 3, 4])
def test_an_image_is_pooled_without_padding(device, rng, pitch):
    values = rounded(rng.standard_normal((2, 4, 7, pitch)), 16)
    gradient = rounded(rng.standard_normal((2, 2, 3, pitch)), 16)
    expected, expected_gradient = pooled_by_torch(values, gradient)
    x, pooled = pool(device, values, 16, pitch)
    np.testing.assert_array_equal(pooled.numpy(), expected)
    total = empty(device, values.shape, 16, pitch)
    unpool(put(device, gradient, 16, pitch), x, None, False, total)
    np.testing.assert_array_equal(total.numpy(), expected_gradient)


@pytest.mark.parametrize("place", list(np.ndindex(2, 2)), ids=str)
def test_a_value_that_is_no_number_wins(device, rng, place):
    values = np.full((1, 2, 2, 1), np.inf, np.float32)
    values[0, *place, 0] = np.nan
    x, pooled = pool(device, values, 32)
    assert np.isnan(pooled.numpy()).all()
    total = empty(device, values.shape, 32)
    unpool(put(device, np.ones((1, 1, 1, 1)), 32), x, None, False, total)
    np.testing.assert_array_equal(total.numpy(), np.isnan(values))
