"""kernels/conv1x1.cu against PyTorch in float64 on the same elements: float32 sums, 1e-5 of their terms."""

import numpy as np
import pytest
import torch

from emulator.tensors import DeviceTensor, assert_close, empty, put, put_flat, rounded, run
from fastunet.backends.cuda import conv1x1, parameters

CASES = [(1, 1, 1, 1, 2), (2, 23, 15, 40, 3), (1, 6, 6, 16, 40), (1, 5, 7, 600, 9)]


def padded(count: int) -> int:
    return -(-count // 16) * 16


class Layer:
    """Weight (K, C) and bias of a 1x1 convolution, packed on the device, and its gradients summed up there."""

    def __init__(self, device, weight: np.ndarray, bias: np.ndarray) -> None:
        self.device = device
        self.outputs, self.inputs = weight.shape
        self.sizes = padded(self.outputs), padded(self.inputs)
        packed = np.pad(weight, [(0, padded(size) - size) for size in weight.shape])
        self.weight = put_flat(device, packed.astype(np.float32))
        self.bias = put_flat(device, np.pad(bias, (0, self.sizes[0] - len(bias))).astype(np.float32))

    def workspace(self, splits: int):
        return self.device.allocate(4 * splits * self.sizes[0] * (self.sizes[1] + 1))

    def gradients(self, workspace, splits: int) -> tuple[np.ndarray, np.ndarray]:
        """Of weight and bias, once the padding is found to be zero."""
        weight, bias = np.zeros(self.sizes, np.float32), np.zeros(self.sizes[0], np.float32)
        memory = put_flat(self.device, weight), put_flat(self.device, bias)
        arguments = parameters.ReduceArguments(
            memory[0].pointer, memory[1].pointer, workspace.pointer, weight.size, bias.size, splits
        )
        run(self.device, parameters.reduce(weight.size, bias.size), 32, arguments)
        weight = self.device.download(memory[0].pointer, weight.shape, np.float32)
        bias = self.device.download(memory[1].pointer, bias.shape, np.float32)
        for padding in (weight[self.outputs :], weight[:, self.inputs :], bias[self.outputs :]):
            np.testing.assert_array_equal(padding, 0)
        return weight[: self.outputs, : self.inputs], bias[: self.outputs]


def to_torch(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values.astype(np.float64), requires_grad=True)


@pytest.mark.parametrize("blocks", [None, 1])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_directions(device, rng, case, bits, blocks):
    """As many blocks as the host side asks for, and a single one, which goes over all the pixels."""
    *extent, channels, outputs = case
    values = rounded(np.maximum(rng.standard_normal((*extent, channels)), 0), bits)
    weight, bias = rng.standard_normal((outputs, channels)), rng.standard_normal(outputs)
    weight, bias = weight.astype(np.float32), bias.astype(np.float32)
    gradient = rng.standard_normal((*extent, outputs)).astype(np.float32)
    torch_x, torch_weight, torch_bias = map(to_torch, (values, weight, bias))
    expected = torch_x @ torch_weight.T + torch_bias
    expected.backward(torch.tensor(gradient.astype(np.float64)))

    layer, x = Layer(device, weight, bias), put(device, values, bits)
    pixels = int(np.prod(extent))

    def go(launch, arguments) -> int:
        grid = (launch.grid[0] if blocks is None else blocks, *launch.grid[1:])
        run(device, launch._replace(grid=grid), bits, arguments)
        return grid[0]

    y = empty(device, expected.shape, 32, outputs)
    pointers = x.pointer, layer.weight.pointer, layer.bias.pointer, y.pointer
    go(
        conv1x1.forward(x.argument(), device.multiprocessors),
        conv1x1.ForwardArguments(*pointers, pixels, outputs),
    )
    terms = values @ abs(weight).T + abs(bias)
    assert_close(y.numpy(), expected.detach().numpy(), 1e-5, what="forward", terms=terms)

    g = put(device, gradient, 32, outputs)
    for rectified in (False, True):
        x_gradient: DeviceTensor = empty(device, values.shape, bits)
        pointers = g.pointer, x.pointer, layer.weight.pointer, x_gradient.pointer
        go(
            conv1x1.data_gradient(x.argument(), device.multiprocessors),
            conv1x1.DataGradientArguments(*pointers, pixels, outputs, rectified),
        )
        wanted = torch_x.grad.numpy() * (values > 0 if rectified else 1)
        what, terms = f"data gradient, rectified {rectified}", abs(gradient) @ abs(weight)
        assert_close(x_gradient.numpy(), wanted, 1e-5, bits, what, terms)

    launch = conv1x1.weight_gradient(x.argument(), outputs, device.multiprocessors)
    workspace = layer.workspace(launch.grid[0])
    splits = go(
        launch,
        conv1x1.WeightGradientArguments(g.pointer, x.pointer, workspace.pointer, pixels, outputs),
    )
    weight_gradient, bias_gradient = layer.gradients(workspace, splits)
    terms = abs(gradient).reshape(pixels, -1).T @ values.reshape(pixels, -1)
    assert_close(weight_gradient, torch_weight.grad.numpy(), 1e-5, what="weight gradient", terms=terms)
    terms = abs(gradient).sum((0, 1, 2))
    assert_close(bias_gradient, torch_bias.grad.numpy(), 1e-5, what="bias gradient", terms=terms)
