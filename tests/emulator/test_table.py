"""The CUDA table of kernels, every operation and a whole network's training, through the kernels' own sources.

What tests/test_ops.py asks of the CPU is asked here of float32 and of bfloat16, on shapes that an emulated GPU has time
for.
"""

import numpy as np
import pytest
import test_ops
import torch
import torch_unet
from test_ops import (  # noqa: F401
    test_a_value_that_is_no_number_in_a_pixel_without_weight,
    test_dropout_mask_is_philox,
    test_head_cross_entropy_is_the_two_one_after_the_other,
    test_little_is_lost_of_a_loss_small_beside_its_logits,
    test_maxpool2x2,
    test_maxpool2x2_adds_to_a_gradient_that_is_there,
    test_maxpool2x2_does_not_hide_a_value_that_is_no_number,
    test_shapes_that_do_not_fit_are_refused,
    test_softmax_cross_entropy,
    test_softmax_cross_entropy_refuses_what_has_no_loss,
)

from fastunet import SGD, UNet, backends, input_size, ops
from fastunet.autograd import Tensor

PRECISIONS = ("fp32", "bf16")


@pytest.fixture(params=PRECISIONS)
def backend(request):
    return backends.load("emulator", request.param)


CONVOLUTIONS = [
    # images, height, width, channels of x, of the skip (0: none), outputs, ReLU
    (8, 3, 3, 1, 0, 1, False),
    (1, 3, 40, 2, 0, 16, True),
    (2, 20, 13, 3, 0, 24, True),
    (1, 13, 12, 4, 4, 7, True),
    (3, 11, 13, 16, 16, 16, False),
    (1, 25, 19, 40, 24, 48, True),
    (1, 8, 8, 16, 144, 33, True),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv3x3(backend, rng, case):
    test_ops.check_conv3x3(backend, rng, case)


@pytest.mark.parametrize("size", [(1, 8, 8, 1, 1), (1, 13, 10, 20, 17)], ids=str)
def test_conv3x3_maxpool2x2_is_the_two_one_after_the_other(backend, rng, size):
    test_ops.test_conv3x3_maxpool2x2_is_the_two_one_after_the_other(backend, rng, size)


@pytest.mark.parametrize("case", [(1, 1, 1, 1, 1), (2, 5, 3, 16, 8), (1, 9, 15, 33, 17)], ids=str)
def test_upconv2x2(backend, rng, case):
    test_ops.check_upconv2x2(backend, rng, case)


@pytest.mark.parametrize("case", [(1, 1, 1, 1, 2), (2, 7, 5, 20, 3), (1, 6, 6, 16, 40)], ids=str)
def test_conv1x1(backend, rng, case):
    test_ops.test_conv1x1(backend, rng, case)


def test_a_value_that_is_no_number_is_not_hidden_by_relu(backend, rng):
    test_ops.test_a_value_that_is_no_number_is_not_hidden_by_relu(backend, rng)


def test_head_of_more_classes_than_its_kernel_has_registers_for(backend, rng):
    test_ops.test_head_cross_entropy_is_the_two_one_after_the_other(backend, rng, (1, 5, 4, 16, 19))


def error_of_a_sum_of_relus(backend, rng) -> float:
    """Of the inputs' gradients beside the CPU's, where what two ReLUs give is added and one of them used again."""
    layers = [test_ops.parameters(backend, rng, "conv", 16, (16,), 3) for _ in range(3)]
    on_cpu = [test_ops.parameters(backends.load("cpu"), rng, "conv", 16, (16,), 3) for _ in range(3)]
    for here, there in zip(layers, on_cpu, strict=True):
        for source, parameter in zip(here, there, strict=True):
            parameter.assign(source.numpy())
    values = [test_ops.normal(backend, rng, (1, 9, 8, 16)) for _ in range(2)]
    gradient = test_ops.normal(backend, rng, (1, 5, 4, 16))

    def run(backend, first, second, last) -> np.ndarray:
        x, y = (Tensor.from_numpy(value, backend, requires_gradient=True) for value in values)
        a, b = ops.conv3x3(x, *first, relu=True), ops.conv3x3(y, *second, relu=True)
        ops.add(ops.conv3x3(ops.add(a, b), *last), ops.conv3x3(a, *last)).backward(gradient)
        return np.concatenate([x.gradient, y.gradient])

    found, expected = run(backend, *layers), run(backends.load("cpu"), *on_cpu)
    return distance(found, expected)


def test_a_gradient_of_a_sum_is_masked_by_the_relus_behind_it(backend, rng):
    # Rounding is near 1e-6, in bfloat16 near 2e-3; now and then it makes another ReLU's result 0.
    bound = {32: 1e-5, 16: 0.02}[backend.bits]
    assert any(error_of_a_sum_of_relus(backend, rng) <= bound for _ in range(3))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    # As in test_torch.py; a gradient that is amiss is farther off than it is long.
    "precision, loss_bound, gradient_bound",
    [("fp32", 2e-6, 2e-5), ("bf16", 0.006, 0.3)],
)
def test_training_sees_what_pytorch_sees(rng, depth, precision, loss_bound, gradient_bound):
    """Three steps, each beside PyTorch in float64 from where ours stands; and its SGD, which is given our gradients."""
    seed = int(rng.integers(2**31))
    model = UNet(2, 3, 16, depth, dropout=0.0, seed=seed, device="emulator", precision=precision)
    optimizer = SGD(model, lr=0.02, momentum=0.9)
    masters = {name: torch.tensor(v.astype(np.float64)) for name, v in model.state_dict().items()}
    reference = torch.optim.SGD(list(masters.values()), lr=0.02, momentum=0.9)
    height, width = input_size(17, depth), input_size(20, depth)
    distances = []
    for _ in range(3):
        twin = {
            name: torch.tensor(test_ops.rounded(model.backend, v) if v.ndim == 4 else v, dtype=torch.float64)
            for name, v in model.state_dict().items()
        }
        for values in twin.values():
            values.requires_grad_()
        x = test_ops.normal(model.backend, rng, (1, height, width, 2))
        logits = torch_unet.forward(twin, torch.tensor(x.astype(np.float64)).permute(0, 3, 1, 2), depth)
        labels = rng.integers(0, 3, (1, *logits.shape[2:]))
        weights = rng.random(labels.shape).astype(np.float32) + 0.1
        truth = torch_unet.weighted_cross_entropy(
            logits, torch.tensor(labels), torch.tensor(weights.astype(np.float64))
        )
        truth.backward()
        loss = model.loss(x, labels, weights)
        assert float(loss) == pytest.approx(truth.item(), rel=loss_bound)
        optimizer.zero_grad()
        loss.backward()
        gradients = model.gradients()
        distances.append(max(distance(gradients[name], v.grad.numpy()) for name, v in twin.items()))
        optimizer.step()
        for name, values in masters.items():
            values.grad = torch.tensor(gradients[name].astype(np.float64))
        reference.step()
        for name, values in model.state_dict().items():
            assert distance(values, masters[name].numpy()) <= 1e-5, name
    assert min(distances) <= gradient_bound, distances


def networks(rng, precision: str, **sizes) -> tuple[UNet, UNet]:
    """The same network on the CPU and on the emulator."""
    seed = int(rng.integers(2**31))
    on_cpu = UNet(1, 2, 16, 1, seed=seed, device="cpu", **sizes)
    return on_cpu, UNet(1, 2, 16, 1, seed=seed, device="emulator", precision=precision, **sizes)


def test_dropout_in_a_network_is_the_cpus(rng):
    on_cpu, on_emulator = networks(rng, "fp32", dropout=0.5)
    x = rng.standard_normal((1, 20, 22, 1)).astype(np.float32)
    for _ in range(2):
        expected = on_cpu(x).numpy()
        # One element dropped on one side alone would be a thousand times this.
        assert np.abs(on_emulator(x).numpy() - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parameters_travel_between_devices_unchanged(rng, precision):
    on_cpu, on_emulator = networks(rng, precision)
    state = {name: rng.standard_normal(v.shape).astype(np.float32) for name, v in on_cpu.state_dict().items()}
    on_emulator.load_state_dict(state)
    on_cpu.load_state_dict(on_emulator.state_dict())
    momenta = SGD(on_emulator)
    momenta.load_state_dict(state)
    for there in (on_cpu.state_dict(), momenta.state_dict()):
        for name, values in state.items():
            np.testing.assert_array_equal(there[name], values, name)


def test_kernels_read_weights_that_were_set_or_stepped_since(rng):
    """The copy in bfloat16 follows its masters."""
    _, model = networks(rng, "bf16", dropout=0.0)
    x = rng.standard_normal((1, 20, 20, 1)).astype(np.float32)
    labels, weights = np.zeros((1, 4, 4), int), np.ones((1, 4, 4))
    optimizer = SGD(model, lr=0.5)
    losses = []
    for _ in range(2):
        loss = model.loss(x, labels, weights)
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
    again = UNet(1, 2, 16, 1, dropout=0.0, seed=1, device="emulator", precision="bf16")
    before = again(x).numpy()
    again.load_state_dict(model.state_dict())
    assert losses[1] < losses[0]
    np.testing.assert_array_equal(again(x).numpy(), model(x).numpy())
    assert np.abs(again(x).numpy() - before).max() > 0.01
