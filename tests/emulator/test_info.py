"""The info command on the CUDA kernels' device: what it says of memory is what is planned there."""

import re

import pytest

from fastunet import UNet
from fastunet.backends.cuda.prediction import BETWEEN
from fastunet.info import main
from fastunet.tiling import prediction_bytes
from fastunet.training_memory import SCRATCH, check_training_memory, largest_training_tile

SIZES = {"in_channels": 2, "num_classes": 3, "base_channels": 4, "depth": 2}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    UNet(*SIZES.values(), device="cpu").save(path)
    return str(path)


@pytest.fixture
def few_bytes(device, monkeypatch):
    """The device has so many more than are used."""
    if not hasattr(device, "memory"):
        pytest.skip("a real GPU's memory cannot be set")

    def leave(count_bytes: int) -> None:
        monkeypatch.setattr(device, "memory", device.memory - device.free_memory() + count_bytes)

    return leave


def test_the_machine(device, capsys):
    assert main(["--device", "emulator"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["device"] == f"emulator: {device.describe()}" and rows["precision"] == "bf16"
    assert " available on emulator, " in rows["memory"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_on_the_device(device, model, capsys, few_bytes, precision):
    few_bytes(SCRATCH + (3 << 20))
    assert main([model, "--device", "emulator", "--precision", precision, "--image", "50x70"]) == 0
    out = capsys.readouterr().out
    assert f"emulator: {device.describe()}\n" in out
    tile = tuple(map(int, re.search(rf"on emulator, {precision}: 1 tile of (\d+)x(\d+) ->", out).groups()))
    network = UNet(*SIZES.values(), device="cpu")
    needed = prediction_bytes(50, 70, *tile, network, BETWEEN * {"fp32": 4, "bf16": 2}[precision])
    assert f"{needed / 2**20:.0f} MiB beyond the network" in out
    fits = int(re.search(r"training on emulator: tiles of up to (\d+)x", out)[1])
    where = {**SIZES, "device": "emulator", "precision": precision}
    available = device.free_memory()  # the network of the command is gone
    found = largest_training_tile(available, **where)
    assert abs(found - fits) <= 4
    check_training_memory(found, available=available, **where)
    with pytest.raises(MemoryError):
        check_training_memory(found + 4, available=available, **where)


def test_a_device_too_small_to_train_on(model, capsys, few_bytes):
    few_bytes(SCRATCH)
    assert main([model, "--device", "emulator", "--image", "9"]) == 0
    assert "training on emulator: not even the smallest tile fits into" in capsys.readouterr().out
