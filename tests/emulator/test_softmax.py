"""kernels/softmax.cu against PyTorch in float64.

exp and the division are float32: 1e-5 of the largest gradient or probability, 1e-6 of the loss, whose logarithm is of
1 + something rounded to float32.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emulator.tensors import assert_close, put_flat, run
from fastunet.backends.cuda import softmax

SHAPES = [(1, 1, 1, 2), (2, 9, 37, 2), (1, 13, 21, 5), (1, 4, 60, 37)]


class Truth:
    """Labels and weights on the device, the weights summed, and what PyTorch makes of given logits."""

    def __init__(self, device, labels: np.ndarray, weights: np.ndarray) -> None:
        self.device = device
        self.pixels = labels.size
        self.labels = put_flat(device, labels.astype(np.int32))
        self.weights = put_flat(device, weights.astype(np.float32))
        self.weight_parts = device.allocate(8 * softmax.WEIGHT_PARTS)
        arguments = softmax.WeightSumsArguments(self.weights.pointer, self.weight_parts.pointer, self.pixels)
        run(device, softmax.weight_sums(), 32, arguments)

    def total(self, loss_parts, parts: int) -> np.ndarray:
        """Sum of losses, sum of weights, pixels of an invalid label; the loss itself is what these say."""
        total, value = self.device.allocate(24), self.device.allocate(4)
        pointers = loss_parts.pointer, self.weight_parts.pointer, total.pointer, value.pointer
        run(self.device, softmax.total_loss(), 32, softmax.TotalLossArguments(*pointers, parts))
        loss, weight, invalid = totals = self.device.download(total.pointer, (3,), np.float64)
        expected = loss / weight if weight and not invalid else np.nan
        np.testing.assert_array_equal(
            self.device.download(value.pointer, (), np.float32), np.float32(expected)
        )
        return totals


def random_truth(rng, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights (N, H, W) for K classes, three of ten pixels ignored, but not the first."""
    labels = rng.integers(0, shape[3], shape[:3])
    weights = rng.random(shape[:3]).astype(np.float32) * 10 + np.float32(0.1)
    weights[rng.random(shape[:3]) < 0.3] = 0
    weights[0, 0, 0] = 1
    return labels, weights


def loss_by_torch(logits: torch.Tensor, labels: np.ndarray, weights: np.ndarray) -> torch.Tensor:
    """Of logits (N, H, W, K)."""
    losses = F.cross_entropy(logits.permute(0, 3, 1, 2), torch.tensor(labels), reduction="none")
    heavy = torch.tensor(weights.astype(np.float64))
    return (losses * heavy).sum() / heavy.sum()


def cross_entropy(device, values, labels, weights, wants_gradient=True, parts=None):
    """Totals, as `Truth.total`, and the gradient of the logits."""
    logits, truth = put_flat(device, values), Truth(device, labels, weights)
    gradient = device.allocate(values.nbytes)
    launch = softmax.softmax_cross_entropy(truth.pixels, device.multiprocessors)
    launch = launch if parts is None else launch._replace(grid=(parts, 1, 1))
    loss_parts = device.allocate(softmax.LOSS_PART_BYTES * launch.grid[0])
    arguments = softmax.CrossEntropyArguments(
        logits.pointer,
        gradient.pointer if wants_gradient else None,
        truth.labels.pointer,
        truth.weights.pointer,
        truth.weight_parts.pointer,
        loss_parts.pointer,
        truth.pixels,
        values.shape[3],
    )
    run(device, launch, 32, arguments)
    return truth.total(loss_parts, launch.grid[0]), device.download(
        gradient.pointer, values.shape, np.float32
    )


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(device, rng, shape, scale):
    values = (rng.standard_normal(shape) * scale).clip(-1e4, 1e4).astype(np.float32)
    logits, probabilities = put_flat(device, values), device.allocate(values.nbytes)
    pixels = values.size // shape[3]
    arguments = softmax.SoftmaxArguments(logits.pointer, probabilities.pointer, pixels, shape[3])
    run(device, softmax.softmax(pixels), 32, arguments)
    found = device.download(probabilities.pointer, shape, np.float32)
    assert_close(found, torch.softmax(torch.tensor(values.astype(np.float64)), 3).numpy(), 1e-5)


@pytest.mark.parametrize("parts", [None, 1])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(device, rng, shape, scale, parts):
    values = (rng.standard_normal(shape) * scale).clip(-1e4, 1e4).astype(np.float32)
    labels, weights = random_truth(rng, shape)
    labels[0, 0, 0] = values[0, 0, 0].argmin()  # a gradient that float32 can tell from 0
    logits = torch.tensor(values.astype(np.float64), requires_grad=True)
    expected = loss_by_torch(logits, labels, weights)
    expected.backward()
    labels[weights == 0] = 255  # no class: must not matter
    (loss, weight, invalid), gradient = cross_entropy(device, values, labels, weights, parts=parts)
    assert weight == pytest.approx(weights.sum(dtype=np.float64), rel=1e-12)
    assert invalid == 0
    assert loss / weight == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    assert_close(gradient, logits.grad.numpy(), 1e-5)
    np.testing.assert_array_equal(gradient[weights == 0], 0)
    without, _ = cross_entropy(device, values, labels, weights, wants_gradient=False, parts=parts)
    assert tuple(without) == (loss, weight, invalid)


@pytest.mark.parametrize("pair", [(1e4, 1e4), (-1e4, -9999.0), (20.0, 14.0), (-1e4, 1e4)], ids=str)
def test_little_is_lost_of_a_loss_small_beside_its_logits(device, pair):
    values = np.array(pair, np.float32).reshape(1, 1, 1, 2)
    (loss, *_), _ = cross_entropy(device, values, np.zeros((1, 1, 1), int), np.ones((1, 1, 1)))
    assert loss == pytest.approx(np.logaddexp(0, pair[1] - pair[0]), rel=2e-7, abs=6e-8)


def test_labels_of_no_class_are_counted_and_give_no_gradient(device, rng):
    values = rng.standard_normal((1, 20, 30, 3)).astype(np.float32)
    labels, weights = random_truth(rng, values.shape)
    wrong = rng.random(labels.shape) < 0.1
    labels[wrong] = rng.choice([-1, 3, 255], wrong.sum())
    (_, _, invalid), gradient = cross_entropy(device, values, labels, weights)
    assert invalid == np.count_nonzero(wrong & (weights != 0))
    np.testing.assert_array_equal(gradient[wrong], 0)


def test_without_weights_there_is_no_loss_and_no_gradient(device, rng):
    values = rng.standard_normal((1, 4, 5, 3)).astype(np.float32)
    labels, _ = random_truth(rng, values.shape)
    totals, gradient = cross_entropy(device, values, labels, np.zeros(labels.shape))
    assert tuple(totals) == (0, 0, 0)
    np.testing.assert_array_equal(gradient, 0)
