"""kernels/conv3x3_sm80.cu, conv3x3_weight_sm80.cu and reduce.cu against PyTorch in float64, on operands of bfloat16.

Errors of float32 are relative to the largest reference value: products of bfloat16 are exact in it, and sums of n of
them err by about sqrt(n) * 6e-8. What is stored in bfloat16 is rounded once more, by at most 2**-8 of itself.
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emulator.tensors import assert_close, empty, put, put_flat, rounded, run, to_bfloat16
from fastunet.backends.cuda import conv3x3_sm80, parameters
from fastunet.backends.cuda.arguments import TensorArgument
from fastunet.backends.cuda.table import CudaBackend

TOLERANCE = 1e-5
ABSENT = TensorArgument()
CASES = [
    # architecture, images, height, width, channels of x, of the skip (0: none), outputs
    (
        "sm_80",
        6,
        3,
        3,
        16,
        0,
        16,
    ),  # one output pixel, often enough that the largest is not itself a rounding error
    ("sm_90a", 1, 20, 20, 48, 0, 80),
    ("sm_80", 1, 19, 20, 80, 16, 20),  # twelve steps through a ring of four
    ("sm_80", 1, 19, 20, 32, 0, 64),
    ("sm_86", 2, 11, 20, 5, 70, 33),  # little shared memory, and padding everywhere
]


class Convolution:
    """Operands of a case, on the device and in PyTorch: x and the skip as a ReLU left them."""

    def __init__(self, device_of, rng, case) -> None:
        architecture, images, height, width, channels, skip_channels, outputs = case
        self.device = device_of(architecture)
        self.machine = self.device.multiprocessors, self.device.shared_memory
        self.table = CudaBackend(self.device, "bf16")
        self.inputs = (skip_channels, channels) if skip_channels else (channels,)
        draw = lambda *shape: rounded(rng.standard_normal(shape, np.float32), 16)  # noqa: E731
        weight = draw(outputs, sum(self.inputs), 3, 3)
        bias = rng.standard_normal(outputs, np.float32)
        joined = [np.maximum(draw(images, height, width, channels), 0)]
        self.x = put(self.device, joined[0], 16)
        self.skip, self.skip_argument = None, ABSENT
        if skip_channels:
            skip = np.maximum(draw(images, height + 5, width + 2, skip_channels), 0)
            self.skip = put(self.device, skip, 16)
            self.skip_argument = self.skip.argument(2, 1)
            joined.insert(0, skip[:, 2 : 2 + height, 1 : 1 + width])
        packed = self.table.pack(weight, "conv", self.inputs)
        self.weights = len(packed)
        self.weight = put_flat(self.device, to_bfloat16(packed))
        self.bias = put_flat(self.device, self.table.pack(bias, "bias", ()))
        self.gradient = draw(images, height - 2, width - 2, outputs)
        to_torch = lambda values: torch.tensor(values.astype(np.float64), requires_grad=True)  # noqa: E731
        self.torch_input = to_torch(np.concatenate(joined, 3).transpose(0, 3, 1, 2))
        self.torch_weight, self.torch_bias = to_torch(weight), to_torch(bias)
        self.expected = F.conv2d(self.torch_input, self.torch_weight, self.torch_bias)

    def forward(self, relu: bool, pools: bool, device: Any = None):
        """Y, and what it is pooled to."""
        images, height, width, outputs = self.gradient.shape
        y = empty(self.device, self.gradient.shape, 16)
        pooled = empty(self.device, (images, height // 2, width // 2, outputs), 16) if pools else None
        arguments = conv3x3_sm80.ForwardArguments(
            self.skip_argument,
            self.x.argument(),
            y.argument(),
            pooled.argument() if pooled else ABSENT,
            self.weight.pointer,
            self.bias.pointer,
            relu,
        )
        run(device or self.device, conv3x3_sm80.forward(y.argument(), *self.machine), 16, arguments)
        return y, pooled

    def data_gradient(self, rectified: bool, device: Any = None) -> np.ndarray:
        """The gradients of the skip's centre and of x, side by side."""
        gradient = put(self.device, self.gradient, 16)
        targets = [empty(self.device, (*self.x.shape[:3], channels), 16) for channels in self.inputs]
        arguments = conv3x3_sm80.DataGradientArguments(
            gradient.argument(),
            self.skip_argument if rectified else ABSENT,
            self.x.argument() if rectified else ABSENT,
            targets[0].argument() if self.skip else ABSENT,
            targets[-1].argument(),
            self.weight.pointer,
        )
        launch = conv3x3_sm80.data_gradient(arguments.skip_gradient, arguments.x_gradient, *self.machine)
        run(device or self.device, launch, 16, arguments)
        return np.concatenate([target.numpy() for target in targets], 3)

    def weight_gradient(self, device: Any = None) -> np.ndarray:
        """The sums of each split: packed weights, then biases."""
        gradient = put(self.device, self.gradient, 16)
        operands = gradient.argument(), self.skip_argument, self.x.argument()
        launch = conv3x3_sm80.weight_gradient(*operands, self.device.multiprocessors)
        count = self.weights + gradient.pitch
        workspace = self.device.allocate(4 * launch.grid[2] * count)
        arguments = conv3x3_sm80.WeightGradientArguments(*operands, workspace.pointer)
        run(device or self.device, launch, 16, arguments)
        return self.device.download(workspace.pointer, (launch.grid[2], count), np.float32)


def channels_last(values: torch.Tensor) -> np.ndarray:
    return values.detach().permute(0, 2, 3, 1).numpy()


def channels_first(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values.astype(np.float64)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(device_of, rng, case, relu):
    given = Convolution(device_of, rng, case)
    y, pooled = given.forward(relu, pools=min(given.gradient.shape[1:3]) > 1)
    expected = F.relu(given.expected) if relu else given.expected
    assert_close(y.numpy(), channels_last(expected), TOLERANCE, 16, "y")
    if pooled:
        np.testing.assert_array_equal(
            pooled.numpy(), channels_last(F.max_pool2d(channels_first(y.numpy()), 2))
        )


@pytest.mark.parametrize("corner", [0, -1])  # the first of its pooling window, and the last
def test_forward_does_not_hide_a_value_that_is_no_number(device_of, rng, corner):
    given = Convolution(device_of, rng, ("sm_80", 1, 6, 6, 16, 0, 16))
    values = given.x.numpy()
    values[0, corner, corner, 3] = np.nan  # of y, only this corner sees it
    given.x = put(given.device, values, 16)
    for found in given.forward(relu=True, pools=True):
        assert np.isnan(found.numpy()[0, corner, corner]).all() and np.isnan(found.numpy()).sum() == 16


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_data_gradient(device_of, rng, case, rectified):
    given = Convolution(device_of, rng, case)
    found = given.data_gradient(rectified)
    given.expected.backward(channels_first(given.gradient))
    expected = channels_last(given.torch_input.grad)
    if rectified:
        expected = expected * (channels_last(given.torch_input) > 0)
        np.testing.assert_array_equal(found[expected == 0], 0)
    assert_close(found, expected, TOLERANCE, 16, "gradient of the inputs")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_gradient(device_of, rng, case):
    given = Convolution(device_of, rng, case)
    packed = given.weight_gradient().sum(0, dtype=np.float64).astype(np.float32)
    outputs, shape = given.gradient.shape[3], tuple(given.torch_weight.shape)
    found, bias = packed[: given.weights], packed[given.weights :]
    weight = given.table.unpack(found, "conv", given.inputs, shape)
    given.expected.backward(channels_first(given.gradient))
    assert_close(weight, given.torch_weight.grad.numpy(), TOLERANCE, what="weight gradient")
    assert_close(bias[:outputs], given.torch_bias.grad.numpy(), TOLERANCE, what="bias gradient")
    # What is packed again from its logical part is the same: padding has no gradient.
    np.testing.assert_array_equal(given.table.pack(weight, "conv", given.inputs), found)
    assert not bias[outputs:].any()


def test_the_order_of_blocks_and_warps_changes_no_bit(device_of, rng):
    case = CASES[3]
    given = Convolution(device_of, rng, case)
    other = device_of(case[0], seed=1)
    for once, again in (
        (given.forward(True, True)[1].numpy(), given.forward(True, True, other)[1].numpy()),
        (given.data_gradient(True), given.data_gradient(True, other)),
        (given.weight_gradient(), given.weight_gradient(other)),
    ):
        np.testing.assert_array_equal(once.view(np.uint32), again.view(np.uint32))


def test_every_tile_is_met(device_of, rng):
    """By the cases above, with rings of every length, where the machines are as many as the cases name."""
    if len({device_of(case[0]).architecture for case in CASES}) == 1:
        pytest.skip("a real GPU is of one architecture")
    tiles, rings = set(), set()
    for case in CASES:
        given = Convolution(device_of, rng, case)
        x, skip = given.x.argument(), given.skip_argument
        y = TensorArgument(0, *given.gradient.shape, given.bias.bytes // 4)
        for launch in (
            conv3x3_sm80.forward(y, *given.machine),
            conv3x3_sm80.data_gradient(skip, x, *given.machine),
        ):
            *tile, ring = launch.defines
            tiles.add((launch.kernel, *tile))
            rings.add(ring)
        launch = conv3x3_sm80.weight_gradient(y, skip, x, given.device.multiprocessors)
        tiles.add((launch.kernel, *launch.defines))
    assert len(tiles) == 4 + 4 + 4 and len(rings) == 3


@pytest.mark.parametrize("weights, biases, splits", [(144, 16, 1), (9 * 32 * 48, 32, 7), (2304, 16, 130)])
def test_reduce(device, rng, weights, biases, splits):
    """Added to what is there; float32 sums of `splits` numbers err by about sqrt(splits) * 6e-8 of the largest."""
    workspace = rng.standard_normal((splits, weights + biases), np.float32)
    before = rng.standard_normal(weights + biases, np.float32)
    weight, bias = put_flat(device, before[:weights]), put_flat(device, before[weights:])
    memory = put_flat(device, workspace)
    arguments = parameters.ReduceArguments(
        weight.pointer, bias.pointer, memory.pointer, weights, biases, splits
    )
    run(device, parameters.reduce(weights, biases), 32, arguments)
    found = [device.download(weight.pointer, (weights,), np.float32)]
    found.append(device.download(bias.pointer, (biases,), np.float32))
    expected = before + workspace.sum(0, dtype=np.float64)
    assert_close(np.concatenate(found), expected, TOLERANCE, what="gradients")
