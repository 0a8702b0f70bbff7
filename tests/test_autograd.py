"""The tape: any graph of the operations, gradients that add, memory that goes."""

import gc

import _fastunet
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastunet import backends, ops
from fastunet.autograd import Tensor, no_grad
from fastunet.parameters import ParameterSet

BACKEND = backends.load("cpu")


def parameter_set(rng, channels=8):
    shapes = {"w": ("conv", (channels, channels, 3, 3), (channels,)), "b": ("bias", (channels,), ())}
    result = ParameterSet(BACKEND, shapes)
    for parameter in result.values():
        parameter.assign(rng.standard_normal(parameter.shape))
    return result


def test_a_graph_with_shared_tensors_and_a_shared_parameter(rng):
    """One tensor read three times, at its full size and by its centre; one weight used twice."""
    shapes = {
        "w": ("conv", (8, 8, 3, 3), (8,)),
        "b": ("bias", (8,), ()),
        "j": ("conv", (8, 16, 3, 3), (8, 8)),
    }
    p = ParameterSet(BACKEND, shapes)
    for parameter in p.values():
        parameter.assign(rng.standard_normal(parameter.shape))
    values = rng.standard_normal((1, 18, 20, 8)).astype(np.float32)
    x = Tensor.from_numpy(values, BACKEND, requires_gradient=True)
    a = ops.conv3x3(x, p["w"], p["b"])
    b = ops.conv3x3(a, p["w"], p["b"])
    c = ops.conv3x3(b, p["j"], p["b"], skip=a)
    d = ops.conv3x3(c, p["j"], p["b"], skip=x)
    total = ops.add(d, ops.conv3x3(ops.conv3x3(b, p["w"], p["b"]), p["w"], p["b"]))
    gradient = rng.standard_normal(total.shape).astype(np.float32)
    total.backward(gradient)

    t = {name: torch.tensor(q.numpy().astype(np.float64), requires_grad=True) for name, q in p.items()}
    tx = torch.tensor(values.astype(np.float64)).permute(0, 3, 1, 2).requires_grad_()

    def centre(z, like):
        m = (z.shape[2] - like.shape[2]) // 2
        return z[:, :, m : m + like.shape[2], m : m + like.shape[3]]

    ta = F.conv2d(tx, t["w"], t["b"])
    tb = F.conv2d(ta, t["w"], t["b"])
    tc = F.conv2d(torch.cat([centre(ta, tb), tb], 1), t["j"], t["b"])
    td = F.conv2d(torch.cat([centre(tx, tc), tc], 1), t["j"], t["b"])
    expected = td + F.conv2d(F.conv2d(tb, t["w"], t["b"]), t["w"], t["b"])
    expected.backward(torch.tensor(gradient.astype(np.float64)).permute(0, 3, 1, 2))
    # Five layers deep: float32 rounding grows with the values; 2e-5 of the largest.
    for found, wanted in [(x.gradient, tx.grad.permute(0, 2, 3, 1))] + [
        (q.numpy(q.gradient), t[n].grad) for n, q in p.items()
    ]:
        assert np.abs(found - wanted.numpy()).max() <= 2e-5 * np.abs(wanted.numpy()).max()


def test_losses_add_and_gradients_accumulate(rng):
    p = parameter_set(rng)
    values = rng.standard_normal((2, 1, 10, 10, 8)).astype(np.float32)
    labels, weights = rng.integers(0, 8, (1, 8, 8)), np.ones((1, 8, 8), np.float32)

    def loss(one):
        return ops.softmax_cross_entropy(
            ops.conv3x3(Tensor.from_numpy(one, BACKEND), p["w"], p["b"]), labels, weights
        )

    first, second = loss(values[0]), loss(values[1])
    together = ops.add(first, second)
    assert float(together) == pytest.approx(float(first) + float(second))
    together.backward()
    at_once = p.gradients_buffer.copy()
    p.gradients_buffer[...] = 0
    loss(values[0]).backward()
    loss(values[1]).backward()
    # The same sums in another order.
    np.testing.assert_allclose(p.gradients_buffer, at_once, rtol=1e-5, atol=1e-6)
    assert np.abs(at_once).max() > 0


def test_a_leaf_accumulates_over_passes(rng):
    p = parameter_set(rng)
    x = Tensor.from_numpy(rng.standard_normal((1, 9, 9, 8)), BACKEND, requires_gradient=True)
    gradient = rng.standard_normal((1, 7, 7, 8)).astype(np.float32)
    ops.conv3x3(x, p["w"], p["b"]).backward(gradient)
    once = x.gradient
    ops.conv3x3(x, p["w"], p["b"]).backward(gradient)
    np.testing.assert_allclose(x.gradient, 2 * once, rtol=1e-6)


def test_no_grad_records_nothing(rng):
    p = parameter_set(rng)
    x = Tensor.from_numpy(rng.standard_normal((1, 9, 9, 8)), BACKEND, requires_gradient=True)
    with no_grad():
        y = ops.conv3x3(x, p["w"], p["b"])
    with pytest.raises(ValueError, match="no recorded operation"):
        y.backward(np.ones(y.shape, np.float32))
    assert ops.conv3x3(x, p["w"], p["b"]).requires_gradient


def test_a_second_walk_is_refused(rng):
    p = parameter_set(rng)
    x = Tensor.from_numpy(rng.standard_normal((1, 9, 9, 8)), BACKEND)
    y = ops.conv3x3(x, p["w"], p["b"])
    y.backward(np.ones(y.shape, np.float32))
    with pytest.raises(ValueError, match="twice"):
        y.backward(np.ones(y.shape, np.float32))


def test_a_gradient_of_the_right_kind_is_asked_for(rng):
    p = parameter_set(rng)
    y = ops.conv3x3(Tensor.from_numpy(rng.standard_normal((1, 9, 9, 8)), BACKEND), p["w"], p["b"])
    with pytest.raises(ValueError, match="needs a gradient of that shape"):
        y.backward()
    with pytest.raises(ValueError, match="needs a gradient of that shape"):
        y.backward(np.ones((1, 5, 5, 8), np.float32))  # not taken for a centre
    with pytest.raises(ValueError, match="not a single number"):
        float(y)


def test_buffers_are_freed_as_soon_as_they_are_used(rng):
    """A chain of n layers holds n activations before the way back, and about two gradients at any moment on it."""
    p = parameter_set(rng, channels=16)
    layers, side = 12, 120

    def walk():
        x = Tensor.from_numpy(rng.standard_normal((1, side, side, 16)), BACKEND)
        for _ in range(layers):
            x = ops.conv3x3(x, p["w"], p["b"], relu=True)
        held = _fastunet.allocated_bytes()
        _fastunet.reset_peak()
        gradient = np.ones(x.shape, np.float32)
        x.backward(gradient)
        return held, _fastunet.peak_allocated_bytes()

    gc.collect()
    start = _fastunet.allocated_bytes()
    held, peak = walk()
    gc.collect()
    activation = side * side * 16 * 4
    assert held - start > 0.7 * layers * activation
    assert peak - held < 4 * activation
    assert _fastunet.allocated_bytes() == start
