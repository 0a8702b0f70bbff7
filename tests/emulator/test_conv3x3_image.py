"""kernels/conv3x3_image.cu against PyTorch in float64 on the same elements.

Errors are relative to the largest reference value: float32 sums of n products err by about sqrt(n) * 6e-8 of it.
A result kept in bfloat16 has one further rounding, of up to 2**-8 of itself.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emulator.tensors import assert_close, empty, put, put_flat, rounded, run, to_bfloat16
from fastunet.backends.cuda import conv3x3_image
from fastunet.backends.cuda.table import CudaBackend

TOLERANCE = 1e-5
CASES = [
    # images, height, width, channels, their pitch, outputs
    (6, 3, 3, 1, 1, 1),  # one output pixel, often enough that the largest is not itself a rounding error
    (1, 20, 37, 1, 1, 64),
    (2, 7, 36, 2, 2, 40),
    (1, 19, 11, 3, 16, 70),
    (1, 5, 9, 4, 4, 16),
]


def to_torch(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values.astype(np.float64), requires_grad=True)


class Convolution:
    """Operands of a case, on the device and in PyTorch."""

    def __init__(self, device, rng, case, bits) -> None:
        images, height, width, channels, pitch, outputs = case
        self.table = CudaBackend(device, "fp32")
        x = rounded(rng.standard_normal((images, height, width, channels), np.float32), bits)
        weight = rounded(rng.standard_normal((outputs, channels, 3, 3), np.float32), bits)
        bias = rng.standard_normal(outputs, np.float32)
        self.x = put(device, x, bits, pitch)
        self.packed_weight = self.table.pack(weight, "conv", (channels,))
        self.weight = put_flat(device, to_bfloat16(self.packed_weight) if bits == 16 else self.packed_weight)
        self.bias = put_flat(device, self.table.pack(bias, "bias", ()))
        self.output = (images, height - 2, width - 2, outputs)
        self.torch_weight, self.torch_bias = to_torch(weight), to_torch(bias)
        self.expected = F.conv2d(to_torch(x.transpose(0, 3, 1, 2)), self.torch_weight, self.torch_bias)


def channels_last(values: torch.Tensor) -> np.ndarray:
    return values.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(device, rng, case, bits):
    given = Convolution(device, rng, case, bits)
    for relu in (False, True):
        y = empty(device, given.output, bits)
        x, weight, bias = given.x.argument(), given.weight.pointer, given.bias.pointer
        arguments = conv3x3_image.ForwardArguments(x, y.argument(), weight, bias, relu)
        run(device, conv3x3_image.forward(x, y.argument()), bits, arguments)
        expected = F.relu(given.expected) if relu else given.expected
        assert_close(y.numpy(), channels_last(expected), TOLERANCE, bits, "y")


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_gradient(device, rng, case, bits):
    given = Convolution(device, rng, case, bits)
    values = rounded(rng.standard_normal(given.output, np.float32), bits)
    gradient = put(device, values, bits)
    operands = gradient.argument(), given.x.argument()
    launch = conv3x3_image.weight_gradient(*operands, device.multiprocessors)
    splits, weights = launch.grid[2], given.packed_weight.size
    workspace = device.allocate(4 * splits * (weights + gradient.pitch))
    run(device, launch, bits, conv3x3_image.WeightGradientArguments(*operands, workspace.pointer))
    packed = device.download(workspace.pointer, (splits, weights + gradient.pitch), np.float32).sum(0)
    shape = tuple(given.torch_weight.shape)
    found = given.table.unpack(packed[:weights], "conv", shape[1:2], shape)
    given.expected.backward(torch.tensor(values.astype(np.float64)).permute(0, 3, 1, 2))
    assert_close(found, given.torch_weight.grad.numpy(), TOLERANCE, what="weight gradient")
    assert_close(packed[weights:][: shape[0]], given.torch_bias.grad.numpy(), TOLERANCE, what="bias gradient")
    # What is packed again from its logical part is the same: padding has no gradient.
    np.testing.assert_array_equal(given.table.pack(found, "conv", shape[1:2]), packed[:weights])
    assert not packed[weights + shape[0] :].any()
