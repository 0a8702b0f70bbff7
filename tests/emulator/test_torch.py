"""fastunet.torch over the CUDA kernels' sources: PyTorch's tensors on the CPU are in the emulated device's memory."""

import pytest
import torch
from test_torch import (  # noqa: F401
    network,
    sample,
    test_a_loss_that_does_not_exist,
    test_a_relu_is_convolved_with,
    test_convolutions_and_their_gradients,
    test_dropout_follows_the_modules_mode_and_draws_anew,
    test_it_is_the_engines_network,
    test_maxpool2x2_and_dropout,
    test_training_sees_what_pytorch_sees,
    test_weighted_cross_entropy,
    test_what_does_not_fit_is_refused,
)

import fastunet.torch
from emulator.conftest import DEVICE
from fastunet import backends

pytestmark = pytest.mark.skipif(DEVICE != "emulator", reason="PyTorch's CPU tensors are in no GPU's memory")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def device(monkeypatch) -> str:
    """Tensors of this machine's memory go to the emulator."""
    real = backends.resolve_device
    monkeypatch.setattr(backends, "resolve_device", lambda name: "emulator" if name == "cpu" else real(name))
    return "emulator"


@pytest.fixture
def host_is_idle(device, monkeypatch):
    """Called, it forbids all that passes through the host or waits for the device."""

    def refuse(*arguments):
        raise AssertionError("the host takes part")

    def forbid():
        emulator = backends.load("emulator", "fp32").device
        for way in ("upload", "download", "read_back", "synchronize", "mark"):
            monkeypatch.setattr(emulator, way, refuse)

    return forbid


@pytest.mark.parametrize("head_in_the_loss", [True, False])
def test_nobody_waits_for_a_training_step(device, dtype, rng, host_is_idle, head_in_the_loss):
    model, (x, labels, weights) = network(rng, device, dtype, dropout=0.5), sample(rng)
    x.requires_grad_()

    def step(factor: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.draws = 0
        if head_in_the_loss:
            loss = model.loss(x, labels, weights)
        else:
            loss = fastunet.torch.weighted_cross_entropy(model(x), labels, weights)
        return loss, torch.autograd.grad(loss * factor, [x, *model.parameters()])

    host_is_idle()
    loss, gradients = step(1)
    half, halves = step(0.5)
    assert loss.shape == () and loss.dtype == torch.float32 and loss == half and loss > 0
    for one, other in zip(gradients, halves, strict=True):
        assert torch.equal(0.5 * one, other) and one.any()


def test_the_way_back_follows_what_pytorch_was_given_before(device, dtype, rng, monkeypatch):
    """A gradient that is taken orders the streams: before the first kernel, though a loss's is not read."""
    model, (x, labels, weights) = network(rng, device, dtype), sample(rng)
    loss = model.loss(x, labels, weights)
    table, log = model._engine.backend, []
    for owner, name in ((table, "given"), (table.device, "launch")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, name=name, real=real: log.append((name, *given)) or real(*given)
        )
    loss.backward()
    name, gradient = log[0]
    assert name == "given" and isinstance(gradient, torch.Tensor) and gradient.shape == ()
    assert log[-1][0] == "launch"


def test_tensors_are_read_where_they_are(device, dtype, monkeypatch, host_is_idle):
    """In channels_last and the kernels' type; weights are packed and results given without the host."""
    host_is_idle()
    seen = []
    real = fastunet.ops.conv3x3
    monkeypatch.setattr(
        fastunet.torch.ops, "conv3x3", lambda x, *rest: seen.append(x.array.pointer) or real(x, *rest)
    )
    x = torch.ones(1, 16, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.ones(3, 16, 3, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    y = fastunet.torch.conv3x3(x, weight, bias)
    assert seen == [x.data_ptr()]
    assert (y == 144).all()
    y.sum().backward()
    assert (weight.grad == 12).all() and (bias.grad == 12).all()
    assert x.grad[0, 0, 0, 0] == 3 and x.grad[0, 0, 2, 3] == 27
