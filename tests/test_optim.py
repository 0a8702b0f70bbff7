"""SGD with momentum against torch.optim.SGD."""

import numpy as np
import pytest
import torch
import torch_unet

from fastunet import SGD, UNet, input_size, ops
from fastunet.training_step import TrainingStep


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


@pytest.mark.parametrize(
    "sizes",
    [dict(base_channels=5, depth=1), dict(in_channels=3, num_classes=4, base_channels=16, depth=2)],
    ids=str,
)
def test_steps_made_layer_by_layer_are_bitwise_those_made_at_once(rng, sizes):
    sizes["seed"] = int(rng.integers(2**31))
    at_once, by_layer, as_steps = (UNet(**sizes) for _ in range(3))
    optimizers = [SGD(model, lr=1e-2, momentum=0.9) for model in (at_once, by_layer, as_steps)]
    step = TrainingStep(as_steps, optimizers[2])
    side, depth = input_size(10, at_once.depth), at_once.depth
    before = at_once.state_dict()
    for number in range(4):
        x = rng.standard_normal((1, side, side + 2**depth, at_once.in_channels)).astype(np.float32)
        labels = rng.integers(0, at_once.num_classes, (1, *at_once(x).shape[1:3]))
        at_once.draws -= 1
        weights = rng.random(labels.shape).astype(np.float32)
        for optimizer in optimizers:
            optimizer.lr = 1e-2 / (1 + number)
        optimizers[0].zero_grad()
        wanted = at_once.loss(x, labels, weights)
        wanted.backward()
        optimizers[0].step()
        with optimizers[1].steps_as_gradients_are_made():
            loss = by_layer.loss(x, labels, weights)
            loss.backward()
        assert float(loss) == float(wanted) == step(x, labels, weights)()
    assert not any(
        gradient.any() for model in (by_layer, as_steps) for gradient in model.gradients().values()
    )
    for name, values in at_once.state_dict().items():
        assert np.any(values != before[name]), name
        for model in (by_layer, as_steps):
            np.testing.assert_array_equal(model.state_dict()[name], values, name)
    for name, momentum in optimizers[0].state_dict().items():
        assert momentum.any(), name
        for optimizer in optimizers[1:]:
            np.testing.assert_array_equal(optimizer.state_dict()[name], momentum, name)
    # Outside, gradients are kept again.
    by_layer.loss(x, labels, weights).backward()
    assert all(gradient.any() for gradient in by_layer.gradients().values())


def test_a_step_that_fails_leaves_gradients_to_be_kept(rng):
    model = UNet(base_channels=3, depth=1, dropout=0.0)
    x, labels = rng.standard_normal((1, 32, 32, 1)).astype(np.float32), np.zeros((1, 16, 16), int)
    with pytest.raises(ValueError, match="sum to zero"):
        TrainingStep(model, SGD(model))(x, labels, np.zeros(labels.shape))
    model.loss(x, labels, np.ones(labels.shape)).backward()
    assert model.gradients()["head.bias"].any()


def test_arguments_out_of_range():
    model = UNet(base_channels=1, depth=1)
    with pytest.raises(ValueError, match="learning rate"):
        SGD(model, lr=0)
    with pytest.raises(ValueError, match="momentum"):
        SGD(model, momentum=1.0)
