"""kernels/head.cu against PyTorch in float64 on the same elements.

Logits are float32 sums, exp and the division float32: 1e-5 of a gradient's terms, 1e-6 of the loss.
"""

import numpy as np
import pytest

from emulator.tensors import assert_close, empty, put, rounded, run
from emulator.test_conv1x1 import Layer, to_torch
from emulator.test_softmax import Truth, loss_by_torch, random_truth
from fastunet.backends.cuda import conv1x1, softmax

CASES = [
    (1, 1, 1, 1, 2),
    (2, 7, 5, 40, 3),
    (1, 24, 31, 64, 2),
    (1, 6, 6, 16, 8),
    (1, 5, 7, 600, 2),
]


class Head:
    """A head at work on one input."""

    def __init__(self, device, values, weight, bias, labels, weights, bits, blocks=None, wants_gradient=True):
        x, layer, truth = (
            put(device, values, bits),
            Layer(device, weight, bias),
            Truth(device, labels, weights),
        )
        launch = conv1x1.head_cross_entropy(x.argument(), len(bias), device.multiprocessors)
        splits = launch.grid[0] if blocks is None else blocks
        loss_parts = device.allocate(softmax.LOSS_PART_BYTES * splits)
        x_gradient, workspace = empty(device, values.shape, bits), layer.workspace(splits)
        arguments = conv1x1.HeadArguments(
            x.pointer,
            layer.weight.pointer,
            layer.bias.pointer,
            truth.labels.pointer,
            truth.weights.pointer,
            truth.weight_parts.pointer,
            loss_parts.pointer,
            x_gradient.pointer if wants_gradient else None,
            workspace.pointer if wants_gradient else None,
            truth.pixels,
            True,
        )
        run(device, launch._replace(grid=(splits, 1, 1)), bits, arguments)
        self.loss, self.weight, self.invalid = truth.total(loss_parts, splits)
        if wants_gradient:
            self.x_gradient = x_gradient.numpy()
            self.weight_gradient, self.bias_gradient = layer.gradients(workspace, splits)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("blocks", [None, 1])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients(device, rng, case, bits, blocks, scale):
    *extent, channels, classes = case
    values = rounded(np.maximum(rng.standard_normal((*extent, channels)), 0), bits)  # the output of a ReLU
    weight = (rng.standard_normal((classes, channels)) * scale).astype(np.float32)
    bias = rng.standard_normal(classes).astype(np.float32)
    labels, weights = random_truth(rng, (*extent, classes))
    torch_x, torch_weight, torch_bias = map(to_torch, (values, weight, bias))
    logits = torch_x @ torch_weight.T + torch_bias
    logits.retain_grad()
    labels[0, 0, 0] = logits[0, 0, 0].argmin()  # a gradient that float32 can tell from 0
    expected = loss_by_torch(logits, labels, weights)
    expected.backward()
    labels[weights == 0] = -7  # no class: must not matter

    found = Head(device, values, weight, bias, labels, weights, bits, blocks)
    # A logit errs by float32's sum, more beside a probability the larger the logits are.
    tolerance = 1e-5 + 1e-6 * float(logits.detach().abs().max())
    assert found.weight == pytest.approx(weights.sum(dtype=np.float64), rel=1e-12)
    assert found.invalid == 0
    assert found.loss / found.weight == pytest.approx(expected.item(), rel=1e-6, abs=1e-6 * scale)
    wanted = torch_x.grad.numpy() * (values > 0)
    g, pixels = logits.grad.abs().numpy(), labels.size
    assert_close(found.x_gradient, wanted, tolerance, bits, "data gradient", g @ abs(weight))
    np.testing.assert_array_equal(found.x_gradient[weights == 0], 0)
    for what, result, expected, terms in (
        ("weight", found.weight_gradient, torch_weight, g.reshape(pixels, -1).T @ values.reshape(pixels, -1)),
        ("bias", found.bias_gradient, torch_bias, g.sum((0, 1, 2))),
    ):
        assert_close(result, expected.grad.numpy(), tolerance, what=f"{what} gradient", terms=terms)

    without = Head(device, values, weight, bias, labels, weights, bits, blocks, wants_gradient=False)
    assert without.loss == found.loss


def test_logits_of_ten_thousand(device):
    """All four numbers of a loss that float32 sums do not blur: 1e4 and -1e4 in either order."""
    values = np.ones((1, 2, 2, 1), np.float32)
    weight, bias = np.array([[1e4], [-1e4]], np.float32), np.zeros(2, np.float32)
    labels, weights = np.array([[[0, 1], [1, 0]]]), np.array([[[1, 2], [0, 3]]])
    found = Head(device, values, weight, bias, labels, weights, 32)
    assert found.loss / found.weight == 2 * 2e4 / 6
    np.testing.assert_array_equal(found.bias_gradient, np.float32([2 / 6, -2 / 6]))


def test_labels_of_no_class_are_counted_and_give_no_gradient(device, rng):
    values = rng.random((1, 20, 30, 16)).astype(np.float32)
    labels, weights = random_truth(rng, (1, 20, 30, 3))
    wrong = rng.random(labels.shape) < 0.1
    labels[wrong] = rng.choice([-1, 3, 255], wrong.sum())
    weight = rng.standard_normal((3, 16)).astype(np.float32)
    found = Head(device, values, weight, np.zeros(3), labels, weights, 32)
    assert found.invalid == np.count_nonzero(wrong & (weights != 0))
    np.testing.assert_array_equal(found.x_gradient[wrong], 0)
