"""kernels/conv3x3_fp32.cu against PyTorch in float64.

Errors are relative to the largest reference value: float32 sums of n products err by about sqrt(n) * 6e-8 of it.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emulator.tensors import assert_close, empty, put, put_flat, run
from fastunet.backends.cuda import conv3x3_fp32
from fastunet.backends.cuda.arguments import TensorArgument
from fastunet.backends.cuda.table import CudaBackend

TOLERANCE = 1e-5
ABSENT = TensorArgument()
CASES = [
    # images, height, width, channels of x, of the skip (0: none), outputs
    (6, 3, 3, 1, 0, 1),  # one output pixel, often enough that the largest is not itself a rounding error
    (1, 12, 23, 20, 0, 40),
    (2, 11, 7, 16, 5, 33),
    (1, 5, 36, 3, 70, 16),
]


def to_torch(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values.astype(np.float64), requires_grad=True)


class Convolution:
    """Operands of a case, on the device and in PyTorch."""

    def __init__(self, device, rng, case) -> None:
        images, height, width, channels, skip_channels, outputs = case
        self.table = CudaBackend(device, "fp32")
        self.inputs = (skip_channels, channels) if skip_channels else (channels,)
        x = rng.standard_normal((images, height, width, channels), np.float32)
        weight = rng.standard_normal((outputs, sum(self.inputs), 3, 3), np.float32)
        bias = rng.standard_normal(outputs, np.float32)
        self.x = put(device, np.maximum(x, 0), 32)  # the output of a ReLU
        self.skip, self.skip_argument, joined = None, ABSENT, [np.maximum(x, 0)]
        if skip_channels:
            skip = np.maximum(
                rng.standard_normal((images, height + 5, width + 2, skip_channels), np.float32), 0
            )
            self.skip = put(device, skip, 32)
            self.skip_argument = self.skip.argument(2, 1)
            joined.insert(0, skip[:, 2 : 2 + height, 1 : 1 + width])
        self.weight = put_flat(device, self.table.pack(weight, "conv", self.inputs))
        self.bias = put_flat(device, self.table.pack(bias, "bias", ()))
        self.output = (images, height - 2, width - 2, outputs)
        self.torch_input = to_torch(np.concatenate(joined, 3).transpose(0, 3, 1, 2))
        self.torch_weight, self.torch_bias = to_torch(weight), to_torch(bias)
        self.expected = F.conv2d(self.torch_input, self.torch_weight, self.torch_bias)


def channels_last(values: torch.Tensor) -> np.ndarray:
    return values.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(device, rng, case, relu):
    given = Convolution(device, rng, case)
    images, height, width, outputs = given.output
    y = empty(device, given.output, 32)
    pools = height > 1 and width > 1 and relu
    pooled = empty(device, (images, height // 2, width // 2, outputs), 32) if pools else None
    run(
        device,
        conv3x3_fp32.forward(y.argument()),
        32,
        conv3x3_fp32.ForwardArguments(
            given.skip_argument,
            given.x.argument(),
            y.argument(),
            pooled.argument() if pooled else ABSENT,
            given.weight.pointer,
            given.bias.pointer,
            relu,
        ),
    )
    expected = F.relu(given.expected) if relu else given.expected
    assert_close(y.numpy(), channels_last(expected), TOLERANCE, what="y")
    if pooled:
        np.testing.assert_array_equal(
            pooled.numpy(), channels_last(F.max_pool2d(torch.tensor(y.numpy()).permute(0, 3, 1, 2), 2))
        )


def test_forward_does_not_hide_a_value_that_is_no_number(device, rng):
    given = Convolution(device, rng, (4, 4, 4, 16, 0, 16))
    values = given.x.numpy().copy()
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]  # of y, one pixel sees a corner of x
    for image, (row, column) in enumerate(places):
        values[image, 3 * row, 3 * column, 5] = np.nan
    x, y, pooled = (
        put(device, values, 32),
        empty(device, given.output, 32),
        empty(device, (4, 1, 1, 16), 32),
    )
    weight, bias = given.weight.pointer, given.bias.pointer
    arguments = conv3x3_fp32.ForwardArguments(
        ABSENT, x.argument(), y.argument(), pooled.argument(), weight, bias, 1
    )
    run(device, conv3x3_fp32.forward(y.argument()), 32, arguments)
    found = np.isnan(y.numpy()).all(3)
    np.testing.assert_array_equal(
        found, [[[(i, j) == place for j in (0, 1)] for i in (0, 1)] for place in places]
    )
    assert np.isnan(pooled.numpy()).all()


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_data_gradient(device, rng, case, rectified):
    given = Convolution(device, rng, case)
    values = rng.standard_normal(given.output, np.float32)
    gradient = put(device, values, 32)
    x_gradient = empty(device, given.x.shape, 32)
    skip_gradient = empty(device, (*given.x.shape[:3], given.inputs[0]), 32) if given.skip else None
    skip_argument = skip_gradient.argument() if skip_gradient else ABSENT
    run(
        device,
        conv3x3_fp32.data_gradient(skip_argument, x_gradient.argument()),
        32,
        conv3x3_fp32.DataGradientArguments(
            gradient.argument(),
            given.skip_argument if rectified else ABSENT,
            given.x.argument() if rectified else ABSENT,
            skip_argument,
            x_gradient.argument(),
            given.weight.pointer,
        ),
    )
    given.expected.backward(torch.tensor(values.astype(np.float64)).permute(0, 3, 1, 2))
    expected = channels_last(given.torch_input.grad)
    if rectified:
        expected = expected * (channels_last(given.torch_input) > 0)
    found = [tensor.numpy() for tensor in (skip_gradient, x_gradient) if tensor]
    assert_close(np.concatenate(found, 3), expected, TOLERANCE, what="gradient of the inputs")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_gradient(device, rng, case):
    given = Convolution(device, rng, case)
    values = rng.standard_normal(given.output, np.float32)
    gradient = put(device, values, 32)
    operands = gradient.argument(), given.skip_argument, given.x.argument()
    launch = conv3x3_fp32.weight_gradient(*operands, device.multiprocessors)
    splits, weights = launch.grid[2], given.weight.bytes // 4
    workspace = device.allocate(4 * splits * (weights + gradient.pitch))
    run(device, launch, 32, conv3x3_fp32.WeightGradientArguments(*operands, workspace.pointer))
    packed = device.download(workspace.pointer, (splits, weights + gradient.pitch), np.float32).sum(0)
    shape = tuple(given.torch_weight.shape)
    found = given.table.unpack(packed[:weights], "conv", given.inputs, shape)
    given.expected.backward(torch.tensor(values.astype(np.float64)).permute(0, 3, 1, 2))
    assert_close(found, given.torch_weight.grad.numpy(), TOLERANCE, what="weight gradient")
    assert_close(packed[weights:][: shape[0]], given.torch_bias.grad.numpy(), TOLERANCE, what="bias gradient")
    # What is packed again from its logical part is the same: padding has no gradient.
    np.testing.assert_array_equal(given.table.pack(found, "conv", given.inputs), packed[:weights])
    assert not packed[weights + shape[0] :].any()
