"""Checkpoints come back bit for bit, are whole or absent, and nothing else is taken for one."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastunet.checkpoint import Checkpoint, RunState
from fastunet.errors import DataError


def random_checkpoint(seed, **state):
    rng = np.random.default_rng(seed)
    shapes = {
        "encoder.0.conv1.weight": (4, 1, 3, 3),
        "head.bias": (2,),
        "decoder.0.upconv.weight": (8, 4, 2, 2),
    }
    return Checkpoint(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
        RunState(**state),
    )


@pytest.mark.parametrize("seed", range(3))
def test_comes_back_bit_for_bit(tmp_path, seed):
    rng = np.random.default_rng(seed)
    written = random_checkpoint(
        seed,
        step=int(rng.integers(1, 10**7)),
        seconds=float(rng.uniform()),
        draws=int(rng.integers(1, 2**62)),
        running_loss=float(rng.uniform()),
        best_score=float(rng.normal()),
        scores={"loss": float(rng.uniform()), "iou": float("nan")},
    )
    written.save(tmp_path / "c.safetensors")
    read = Checkpoint.load(tmp_path / "c.safetensors")
    for part in ("weights", "momentum"):
        assert getattr(written, part).keys() == getattr(read, part).keys()
        for name, array in getattr(written, part).items():
            assert getattr(read, part)[name].tobytes() == array.tobytes()
            assert getattr(read, part)[name].shape == array.shape
    assert repr(read.state) == repr(written.state)


def test_the_state_before_the_first_validation_comes_back(tmp_path):
    random_checkpoint(0).save(tmp_path / "c.safetensors")
    assert Checkpoint.load(tmp_path / "c.safetensors").state == RunState(best_score=-float("inf"))


def test_a_failed_write_leaves_the_old_one_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    random_checkpoint(0, step=1).save(path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        random_checkpoint(1, step=2).save(path)
    monkeypatch.undo()
    assert Checkpoint.load(path).state.step == 1
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_damaged_files_end_in_one_sentence(tmp_path):
    path = tmp_path / "c.safetensors"
    random_checkpoint(0).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng()
    for cut in [0, 1, 7, 8, 9, len(whole) - 1, *rng.integers(0, len(whole), 20)]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"c\.safetensors: "):
            Checkpoint.load(path)
    for _ in range(40):
        spoilt = bytearray(whole)
        spoilt[int(rng.integers(0, 400))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(spoilt)
        try:
            Checkpoint.load(path)
        except DataError as error:
            assert str(path) in str(error)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(DataError, match=r"m\.safetensors"):
        Checkpoint.load(path)
    save_file({"head.bias": np.zeros(2, np.float32)}, path, {"format": "fastunet"})
    with pytest.raises(DataError, match="holds 'fastunet', expected a checkpoint"):
        Checkpoint.load(path)
    state = '{"step": 1, "colour": 2}'
    save_file({"model.a": np.zeros(2, np.float32)}, path, {"format": "fastunet-checkpoint", "state": state})
    with pytest.raises(DataError, match="colour"):
        Checkpoint.load(path)
    save_file({"weights.a": np.zeros(2, np.float32)}, path, {"format": "fastunet-checkpoint", "state": "{}"})
    with pytest.raises(DataError, match=r"'weights\.a'"):
        Checkpoint.load(path)
