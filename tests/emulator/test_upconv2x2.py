"""kernels/upconv2x2_sm80.cu and _fp32.cu against PyTorch in float64 on the same elements.

Errors are relative to the largest reference value: float32 sums of n products err by about sqrt(n) * 6e-8 of it.
A result kept in bfloat16 has one further rounding, of up to 2**-8 of itself.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emulator.tensors import assert_close, empty, put, put_flat, rounded, run, to_bfloat16
from fastunet.backends.cuda import upconv2x2
from fastunet.backends.cuda.arguments import TensorArgument
from fastunet.backends.cuda.table import CudaBackend

TOLERANCE = 1e-5
ABSENT = TensorArgument()
CASES = [
    # images, height, width, channels, outputs
    (8, 1, 1, 1, 1),  # one pixel, often enough that the largest is not itself a rounding error
    (2, 5, 3, 16, 8),
    (1, 9, 30, 33, 17),
    (3, 4, 11, 150, 48),
]


def to_torch(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values.astype(np.float64), requires_grad=True)


class Upconvolution:
    """Operands of a case, on the device and in PyTorch."""

    def __init__(self, device, rng, case, bits) -> None:
        images, height, width, channels, outputs = case
        self.table = CudaBackend(device, "fp32")
        x = rounded(rng.standard_normal((images, height, width, channels), np.float32), bits)
        x = np.maximum(x, 0)  # the output of a ReLU
        weight = rounded(rng.standard_normal((channels, outputs, 2, 2), np.float32), bits)
        bias = rng.standard_normal(outputs, np.float32)
        self.x = put(device, x, bits)
        self.packed_weight = self.table.pack(weight, "upconv", (channels,))
        self.weight = put_flat(device, to_bfloat16(self.packed_weight) if bits == 16 else self.packed_weight)
        self.bias = put_flat(device, self.table.pack(bias, "bias", ()))
        self.output = (images, 2 * height, 2 * width, outputs)
        self.torch_input = to_torch(x.transpose(0, 3, 1, 2))
        self.torch_weight, self.torch_bias = to_torch(weight), to_torch(bias)
        self.expected = F.conv_transpose2d(self.torch_input, self.torch_weight, self.torch_bias, stride=2)


def channels_last(values: torch.Tensor) -> np.ndarray:
    return values.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(device, rng, case, bits):
    given = Upconvolution(device, rng, case, bits)
    y = empty(device, given.output, bits)
    x, weight, bias = given.x.argument(), given.weight.pointer, given.bias.pointer
    arguments = upconv2x2.ForwardArguments(x, y.argument(), weight, bias)
    run(device, upconv2x2.forward(x, y.argument(), bits), bits, arguments)
    assert_close(y.numpy(), channels_last(given.expected), TOLERANCE, bits, "y")


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_data_gradient(device, rng, case, bits):
    given = Upconvolution(device, rng, case, bits)
    values = rounded(rng.standard_normal(given.output, np.float32), bits)
    gradient = put(device, values, bits)
    given.expected.backward(torch.tensor(values.astype(np.float64)).permute(0, 3, 1, 2))
    expected = channels_last(given.torch_input.grad)
    for rectified in (False, True):
        x_gradient = empty(device, given.x.shape, bits)
        x = given.x.argument() if rectified else ABSENT
        arguments = upconv2x2.DataGradientArguments(
            gradient.argument(), x, x_gradient.argument(), given.weight.pointer
        )
        run(device, upconv2x2.data_gradient(x_gradient.argument(), bits), bits, arguments)
        masked = expected * (given.x.numpy() > 0) if rectified else expected
        assert_close(x_gradient.numpy(), masked, TOLERANCE, bits, "gradient of x")


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_gradient(device, rng, case, bits):
    given = Upconvolution(device, rng, case, bits)
    values = rounded(rng.standard_normal(given.output, np.float32), bits)
    gradient = put(device, values, bits)
    operands = gradient.argument(), given.x.argument()
    launch = upconv2x2.weight_gradient(*operands, bits, device.multiprocessors)
    splits, weights = launch.grid[2], given.packed_weight.size
    workspace = device.allocate(4 * splits * (weights + gradient.pitch))
    run(device, launch, bits, upconv2x2.WeightGradientArguments(*operands, workspace.pointer))
    packed = device.download(workspace.pointer, (splits, weights + gradient.pitch), np.float32).sum(0)
    shape = tuple(given.torch_weight.shape)
    found = given.table.unpack(packed[:weights], "upconv", shape[:1], shape)
    given.expected.backward(torch.tensor(values.astype(np.float64)).permute(0, 3, 1, 2))
    assert_close(found, given.torch_weight.grad.numpy(), TOLERANCE, what="weight gradient")
    assert_close(packed[weights:][: shape[1]], given.torch_bias.grad.numpy(), TOLERANCE, what="bias gradient")
    # What is packed again from its logical part is the same: padding has no gradient.
    np.testing.assert_array_equal(given.table.pack(found, "upconv", shape[:1]), packed[:weights])
    assert not packed[weights + shape[1] :].any()
