"""SGD with momentum against torch.optim.SGD."""

import numpy as np
import pytest
import torch
import torch_unet

from fastunet import SGD, UNet, ops


def test_ten_steps_follow_torch(rng):
    """Its SGD in float64 is given our gradients: a ReLU that rounding turns would part two trainings for good."""
    model = UNet(base_channels=4, depth=2, dropout=0.0, seed=int(rng.integers(2**31)))
    optimiser = SGD(model, lr=1e-2, momentum=0.99)
    t = {name: torch.tensor(v.astype(np.float64)) for name, v in model.state_dict().items()}
    reference = torch.optim.SGD(t.values(), lr=1e-2, momentum=0.99)
    for _ in range(10):
        x = rng.standard_normal((1, 60, 44, 1)).astype(np.float32)
        labels, weights = rng.integers(0, 2, (1, 20, 4)), rng.random((1, 20, 4)).astype(np.float32) + 0.1
        expected = torch_unet.weighted_cross_entropy(
            torch_unet.forward(t, torch.tensor(x.astype(np.float64)).permute(0, 3, 1, 2), 2),
            torch.tensor(labels),
            torch.tensor(weights.astype(np.float64)),
        )
        optimiser.zero_grad()
        loss = ops.softmax_cross_entropy(model(x), labels, weights)
        assert float(loss) == pytest.approx(expected.item(), rel=1e-4)
        loss.backward()
        optimiser.step()
        for name, gradient in model.gradients().items():
            t[name].grad = torch.tensor(gradient.astype(np.float64))
        reference.step()
    for name, values in model.state_dict().items():
        wanted = t[name].numpy()
        assert np.abs(values - wanted).max() <= 1e-5 * np.abs(wanted).max() + 1e-7, name


def test_state_travels(rng):
    model = UNet(base_channels=3, depth=1)
    x = rng.standard_normal((1, 32, 32, 1)).astype(np.float32)

    def step(model, optimiser):
        optimiser.zero_grad()
        loss = ops.softmax_cross_entropy(model(x), np.zeros((1, 16, 16), int), np.ones((1, 16, 16)))
        loss.backward()
        optimiser.step()

    optimiser = SGD(model, 1e-2, 0.9)
    step(model, optimiser)
    other = UNet(base_channels=3, depth=1)
    other.load_state_dict(model.state_dict())
    other.draws = model.draws
    other_optimiser = SGD(other, 1e-2, 0.9)
    other_optimiser.load_state_dict(optimiser.state_dict())
    step(model, optimiser)
    step(other, other_optimiser)
    for name, values in model.state_dict().items():
        np.testing.assert_array_equal(values, other.state_dict()[name])
    with pytest.raises(ValueError, match="another network"):
        other_optimiser.load_state_dict({})


def test_the_same_seed_is_bitwise_the_same_training(rng):
    data = [rng.standard_normal((1, 76, 60, 1)).astype(np.float32) for _ in range(4)]

    def train():
        model = UNet(base_channels=16, depth=2, seed=9)
        optimiser = SGD(model, 1e-3)
        for x in data:
            optimiser.zero_grad()
            logits = model(x)
            labels = (np.abs(x[:, 20:-20, 20:-20, 0]) > 1).astype(int)
            ops.softmax_cross_entropy(logits, labels, np.ones(labels.shape)).backward()
            optimiser.step()
        return model.state_dict()

    one, other = train(), train()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_arguments_out_of_range():
    model = UNet(base_channels=1, depth=1)
    with pytest.raises(ValueError, match="learning rate"):
        SGD(model, lr=0)
    with pytest.raises(ValueError, match="momentum"):
        SGD(model, momentum=1.0)
