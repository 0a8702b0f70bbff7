"""Training steps recorded and replayed give bitwise what the operations give one by one."""

import numpy as np
import pytest
import torch

from fastunet import SGD, UNet
from fastunet.backends.cuda.recording import Lifetime, plan
from fastunet.training_step import TrainingStep


def samples(rng, count):
    """Tiles 44 -> 4 of depth 2."""
    return [
        (
            rng.standard_normal((1, 44, 44, 1)).astype(np.float32),
            rng.integers(0, 2, (1, 4, 4)).astype(np.uint8),
            rng.random((1, 4, 4)).astype(np.float32) + 0.1,
        )
        for _ in range(count)
    ]


def as_they_are(image, labels, weights):
    """Copies of the host's, for they are poisoned when a step has been started with them."""
    return image.copy(), labels.copy(), weights.copy()


def on_device(image, labels, weights):
    """What lies in the device's memory, in an order and types of another library."""
    planes = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    reversed_rows = torch.from_numpy(labels.transpose(0, 2, 1).astype(np.int64))
    return planes.permute(0, 2, 3, 1), reversed_rows.transpose(1, 2), torch.from_numpy(weights.copy())


def poison(tile):
    """What a step reads later than it says, it would read as this."""
    for array, value in zip(tile, (np.nan, 7, -1)):
        array[...] = value


@pytest.mark.parametrize("given", [as_they_are, on_device])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_are_those_of_the_operations(rng, precision, given):
    sizes = dict(base_channels=4, depth=2, dropout=0.4, seed=int(rng.integers(2**31)))
    tiles = samples(rng, 5)
    results = []
    for replayed in (True, False):
        model = UNet(device="emulator", precision=precision, **sizes)
        optimizer = SGD(model, momentum=0.9)
        step = TrainingStep(model, optimizer)
        losses, waiting = [], []
        for number, tile in enumerate(tiles):
            optimizer.lr = 0.01 / (1 + number)
            if replayed:
                arrays = given(*tile)
                waiting.append(step(*arrays))
                poison(arrays)
                if len(waiting) == 2:  # one is under way while the next is started
                    losses.append(waiting.pop(0)())
            else:
                optimizer.zero_grad()
                loss = model.loss(*tile)
                loss.backward()
                optimizer.step()
                losses.append(float(loss))
        losses += [wait() for wait in waiting]
        results.append((losses, model.state_dict(), optimizer.state_dict(), model.draws))
    (losses, weights, momenta, draws), (wanted_losses, wanted_weights, wanted_momenta, wanted_draws) = results
    assert losses == wanted_losses and draws == wanted_draws == 5
    assert len(set(losses)) == 5
    for name, wanted in wanted_weights.items():
        np.testing.assert_array_equal(weights[name], wanted)
        np.testing.assert_array_equal(momenta[name], wanted_momenta[name])


def test_a_replayed_step_tells_a_loss_that_is_none(rng):
    model = UNet(device="emulator", precision="fp32", base_channels=1, depth=1, dropout=0.0)
    step = TrainingStep(model, SGD(model))
    image = rng.standard_normal((1, 20, 20, 1)).astype(np.float32)
    labels, weights = np.ones((1, 4, 4), np.int32), np.ones((1, 4, 4), np.float32)
    for _ in range(3):
        assert np.isfinite(step(image, labels, weights)())
    with pytest.raises(ValueError, match="sum to zero"):
        step(image, labels, 0 * weights)()
    with pytest.raises(ValueError, match="16 pixels whose label is not in 0..1"):
        step(image, labels + 1, weights)()


def test_tiles_of_host_and_device_may_alternate_and_must_be_of_one_size(rng):
    results = []
    for ways in ((as_they_are, on_device), (as_they_are, as_they_are)):
        model = UNet(device="emulator", precision="bf16", base_channels=1, depth=2, seed=3)
        step = TrainingStep(model, SGD(model))
        drawn = samples(np.random.default_rng(5), 6)
        results.append([step(*ways[number % 2](*tile))() for number, tile in enumerate(drawn)])
        with pytest.raises(ValueError, match=r"shape \(1, 4, 5\) was given; \(1, 4, 4\) is expected"):
            step(drawn[0][0], np.zeros((1, 4, 5), int), drawn[0][2])
    assert results[0] == results[1]


def test_a_plan_lets_nothing_overlap_that_lives_together(rng):
    lifetimes = []
    for _ in range(200):
        begin = int(rng.integers(100))
        lifetimes.append(Lifetime(int(rng.integers(1, 5000)), begin, begin + int(rng.integers(1, 20))))
    offsets, total = plan(lifetimes)
    for i, one in enumerate(lifetimes):
        assert offsets[i] % 256 == 0 and offsets[i] + one.count_bytes <= total
        for j, other in enumerate(lifetimes[:i]):
            if one.begin < other.end and other.begin < one.end:
                assert (
                    offsets[i] + one.count_bytes <= offsets[j] or offsets[j] + other.count_bytes <= offsets[i]
                )
    needed = max(sum(x.count_bytes for x in lifetimes if x.begin <= t < x.end) for t in range(120))
    assert needed <= total <= 1.5 * needed
