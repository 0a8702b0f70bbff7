"""What training is said to take of a device's memory suffices, and less is refused with advice that holds."""

import re

import numpy as np
import pytest

from fastunet import SGD, UNet
from fastunet.training_memory import SCRATCH, check_training_memory, training_bytes
from fastunet.training_step import TrainingStep

SIZES = {"in_channels": 1, "num_classes": 2, "base_channels": 8, "depth": 2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_is_trained_within_what_is_planned(rng, device, monkeypatch, precision):
    if not hasattr(device, "memory"):
        pytest.skip("a real GPU's memory cannot be set")
    planned = training_bytes(44, **SIZES, device="emulator", precision=precision) - SCRATCH
    image = rng.standard_normal((1, 44, 44, 1)).astype(np.float32)
    labels, weights = np.ones((1, 4, 4), np.int32), np.ones((1, 4, 4), np.float32)

    def train(count_bytes):
        monkeypatch.setattr(device, "memory", device.memory - device.free_memory() + int(count_bytes))
        model = UNet(**SIZES, device="emulator", precision=precision)
        step = TrainingStep(model, SGD(model))
        return [step(image, labels, weights)() for _ in range(3)]

    assert np.isfinite(train(planned)).all()
    with pytest.raises(MemoryError):
        train(planned / 1.2)


@pytest.mark.parametrize("available", [300 << 20, 600 << 20])
def test_what_the_message_advises_fits(available):
    where = {"device": "emulator", "precision": "bf16"}
    with pytest.raises(MemoryError, match="tiles of 572 pixels and 64 base channels") as caught:
        check_training_memory(572, 1, 2, 64, 4, available, **where)
    advice = re.findall(r"--(tile|base-channels) (\d+)", str(caught.value))
    assert advice
    for option, value in advice:
        smaller, narrower = (int(value), 64) if option == "tile" else (572, int(value))
        check_training_memory(smaller, 1, 2, narrower, 4, available, **where)
