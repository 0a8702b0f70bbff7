"""`fastunet.train` from the outside: what a run leaves, how it goes on after a kill, what it says to mistakes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from safetensors.numpy import load_file

from fastunet import backends, train, training
from fastunet.history import read_history
from fastunet.unet import UNet

SMALL = ["--base-channels", "2", "--depth", "1", "--tile", "46", "--threads", "2"]
EASY = ["--base-channels", "8", "--lr", "0.01", "--momentum", "0.9", "--w0", "1"]


def blobs(rng, size=64, channels=None):
    """Bright discs on a dark, noisy ground: (image uint8, instances uint16)."""
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.uint16)
    for label in range(1, 7):
        cy, cx, radius = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(5, 12)
        labels[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = label
    shape = (size, size) if channels is None else (size, size, channels)
    bright = (labels > 0) if channels is None else (labels > 0)[..., None]
    image = 60 + 120 * bright + rng.normal(0, 20, shape)
    return np.clip(image, 0, 255).astype(np.uint8), labels


def write_data(folder, count=4, seed=0, channels=None, change=lambda labels: labels):
    rng = np.random.default_rng(seed)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for k in range(count):
        image, labels = blobs(rng, channels=channels)
        axes = {"photometric": "rgb"} if channels == 3 else {}
        tifffile.imwrite(folder / "images" / f"{k:02}.tif", image, **axes)
        tifffile.imwrite(folder / "labels" / f"{k:02}.tif", change(labels))
    return folder


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def run(*arguments):
    return train.main([str(argument) for argument in arguments])


def rows(run_folder):
    """metrics.csv without its column of times."""
    table = [line.split(",") for line in (Path(run_folder) / "metrics.csv").read_text().splitlines()]
    column = table[0].index("seconds")
    return [row[:column] + row[column + 1 :] for row in table]


def assert_same_run(one, other):
    assert rows(one) == rows(other)
    for name in ("model.safetensors", "checkpoint-latest.safetensors", "checkpoint-best.safetensors"):
        a, b = load_file(Path(one) / name), load_file(Path(other) / name)
        assert a.keys() == b.keys()
        assert all(a[key].tobytes() == b[key].tobytes() for key in a), name


def test_a_run_leaves_a_whole_folder_and_a_network_that_has_learnt(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(data, "--out", out, "--steps", 200, *SMALL, *EASY) == 0
    assert sorted(os.listdir(out)) == sorted(training.FILES)
    history = read_history(out / "metrics.csv")
    assert history["step"].tolist() == list(range(1, 201))
    assert np.isfinite(history["val_iou"]).sum() == 4  # every 50 steps
    assert history["running_loss"][-1] < 0.75 * history["running_loss"][20]
    assert np.nanmax(history["val_iou"]) > 0.7
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["best"] == "seg" and config["settings"]["steps"] == 200
    assert config["data"]["training"] + config["data"]["validation"] == ["01", "02", "03", "00"]
    seg = history["val_seg"]
    best = int(history["step"][seg == np.nanmax(seg)][-1])
    assert f"best of 200 steps by seg: step {best}," in capsys.readouterr().out
    model = UNet.load(out / "model.safetensors")
    assert (model.base_channels, model.depth, model.normalization) == (8, 1, "zscore")
    kept = load_file(out / "checkpoint-best.safetensors")
    assert all(np.array_equal(kept[f"model.{name}"], value) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_run_and_another_one_another(data, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert run(data, "--out", tmp_path / name, "--steps", 12, "--seed", seed, "--quiet", *SMALL) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


@pytest.mark.parametrize("attempt", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
def test_resumes_bitwise_after_kill_9_at_a_random_step(data, tmp_path, rng, attempt):
    options = [data, "--steps", 90, "--checkpoint-every", 7, "--val", "0.3", "--seed", 3, *SMALL]
    assert run(*options, "--out", tmp_path / "whole", "--quiet") == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "fastunet.train", *map(str, options), "--out", str(killed)]
    stop_at = int(rng.integers(1, 80))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics = killed / "metrics.csv"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") > stop_at:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert run("--resume", killed, "--quiet") == 0
    assert_same_run(tmp_path / "whole", killed)
    assert not list(killed.glob(".*.tmp"))
    # A run that has ended is resumed to the same end.
    assert run("--resume", killed, "--quiet") == 0
    assert_same_run(tmp_path / "whole", killed)


def test_a_run_killed_before_its_first_checkpoint_begins_again(data, tmp_path, capsys):
    options = [data, "--steps", 10, *SMALL]
    assert run(*options, "--out", tmp_path / "whole") == 0
    assert run(*options, "--out", tmp_path / "cut") == 0
    for name in set(training.FILES) - {"config.json"}:
        (tmp_path / "cut" / name).unlink()
    assert run("--resume", tmp_path / "cut") == 0
    assert "starting at step 0" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_the_last_whole_step(data, tmp_path, number, capsys, monkeypatch):
    options = [data, "--steps", 30, *SMALL]
    assert run(*options, "--out", tmp_path / "whole") == 0
    append = training.History.append

    def interrupting(self, row):
        append(self, row)
        if row["step"] == 11:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training.History, "append", interrupting)
    before = signal.getsignal(number)
    assert run(*options, "--out", tmp_path / "cut") == 130
    assert signal.getsignal(number) is before
    said = capsys.readouterr()
    # The row of a step is written while the next is under way; that one is finished too.
    assert "stopped after step 12; continue with --resume" in said.out and "interrupted" in said.err
    assert read_history(tmp_path / "cut" / "metrics.csv")["step"][-1] == 12
    monkeypatch.undo()
    assert run("--resume", tmp_path / "cut") == 0
    assert "at step 12" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def mistake(capsys, *arguments):
    """The one line on stderr that a mistake ends in."""
    capsys.readouterr()
    with contextlib.suppress(SystemExit):  # argparse's own way out
        assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and "Traceback" not in "".join(lines)
    assert lines[-1].startswith("fastunet train: error: ")
    return lines[-1]


def test_a_folder_that_holds_a_run_is_refused_or_overwritten(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(data, "--out", out, "--steps", 3, *SMALL) == 0
    said = mistake(capsys, data, "--out", out, "--steps", 4, *SMALL)
    assert f"{out} holds a run" in said and "--resume" in said and "--overwrite" in said
    (out / "notes.txt").write_text("mine")
    assert run(data, "--out", out, "--steps", 4, "--overwrite", *SMALL) == 0
    assert len(rows(out)) == 5
    assert (out / "notes.txt").read_text() == "mine"


def test_resume_takes_its_own_options_and_its_own_data(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(data, "--out", out, "--steps", 3, "--lr", "0.002", *SMALL) == 0
    said = mistake(capsys, "--resume", out, "--lr", "0.1")
    assert "--lr was given" in said and "begun with 0.002" in said
    assert "begun with 3;" in mistake(capsys, "--resume", out, "--steps", 5)
    assert "--minutes" in mistake(capsys, "--resume", out, "--minutes", 5)
    assert run("--resume", out, "--lr", "0.002", "--steps", 3, "--threads", 1) == 0
    moved = data.rename(tmp_path / "elsewhere")
    assert str(data) in mistake(capsys, "--resume", out)
    assert run(moved, "--resume", out) == 0
    image = tifffile.imread(moved / "images" / "02.tif")
    image[3, 4] ^= 1
    tifffile.imwrite(moved / "images" / "02.tif", image)
    assert "other images or labels" in mistake(capsys, moved, "--resume", out)
    assert "nothing-here" in mistake(capsys, "--resume", tmp_path / "nothing-here")
    checkpoint = out / "checkpoint-latest.safetensors"
    image[3, 4] ^= 1
    tifffile.imwrite(moved / "images" / "02.tif", image)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    assert "checkpoint-latest.safetensors" in mistake(capsys, moved, "--resume", out)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(data, tmp_path, capsys):
    out = tmp_path / "run"
    said = mistake(capsys, data, "--out", out, "--steps", 200, "--lr", "1e6", "--checkpoint-every", 1, *SMALL)
    assert "diverged" in said and "step" in said and "smaller --lr such as 3e+05" in said
    saved = load_file(out / "checkpoint-latest.safetensors")
    assert all(np.isfinite(array).all() for array in saved.values())


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--tile", "47"], "the nearest valid sizes are 46 and 48"),
        (["--tile", "47"], "--tile 47: "),
        (["--lr", "-1"], "--lr is -1.0, expected a positive number"),
        (["--momentum", "1"], "--momentum is 1.0"),
        (["--dropout", "1"], "--dropout is 1.0"),
        (["--sigma", "0"], "--sigma is 0.0"),
        (["--minutes", "0"], "--minutes is 0.0"),
        (["--class-names", "a,b,c"], "give 2 names"),
        (["--normalization", "1,2;3,4"], "one per channel"),
        (["--normalization", "1,2;3,4"], "--normalization: "),
        (["--seed", "-1"], "--seed is -1, expected a whole number from 0"),
        (["--seed", str(2**64)], "--seed is 18446744073709551616, expected a whole number from 0"),
        (["--threads", "100000"], "1 to 1024 threads are expected"),
        (["--steps", "many"], "'many' was given, a whole number of at least 1 is expected"),
        (["--normalization", "rank"], "'rank' was given"),
        (["--val", "90-"], "names no image"),
        (["--val", "1.5"], "--val 1.5: a validation fraction of 1.5"),
        (["--val", "0-3"], "leave at least one for training"),
        (["--steps", "3", "--minutes", "1"], "not allowed with"),
        (["--init", "no-such-model"], "there is no such model"),
        (["--tensorboard"], "pip install 'fastunet[tensorboard]'"),
    ],
)
def test_mistakes_end_in_one_sentence_and_no_folder(data, tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    out = tmp_path / "run"
    assert expected in mistake(capsys, data, "--out", out, *SMALL, *options)
    assert not out.exists()


def test_a_place_that_cannot_be_a_run_folder_is_refused_before_data_is_read(data, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "run"):
        said = mistake(capsys, tmp_path / "no-data", "--out", out, *SMALL)
        assert f"--out {out}: {file} is a file" in said and "name another folder" in said
    assert file.read_text() == "mine"
    assert run(data, "--out", tmp_path / "run", "--steps", 1, *SMALL) == 0
    assert "holds a run" in mistake(capsys, tmp_path / "no-data", "--out", tmp_path / "run")


def test_validation_images_of_other_channels_are_refused_by_name(data, tmp_path, capsys):
    colour = write_data(tmp_path / "colour", channels=3)
    said = mistake(capsys, data, "--val", colour, "--out", tmp_path / "run", *SMALL)
    assert f"--val {colour}: " in said and "3 channels" in said


@pytest.mark.parametrize("option", [("--labels", "classes"), ("--ignore", "3"), ("--axes", "ZYX")])
def test_options_about_data_without_data_are_refused(tmp_path, capsys, option):
    said = mistake(capsys, "--out", tmp_path / "run", "--steps", 1, *SMALL, *option)
    assert f"{' '.join(option)} is about DATA" in said and "none was given" in said


def test_resume_knows_its_own_options_by_relative_paths(data, tmp_path, capsys, monkeypatch):
    other = write_data(tmp_path / "other", seed=1)
    out = tmp_path / "run"
    assert run(data, "--val", other, "--out", out, "--steps", 2, *SMALL) == 0
    monkeypatch.chdir(tmp_path)
    assert run("--resume", out, "--val", "other") == 0
    assert "was begun with " + str(other) in mistake(capsys, "--resume", out, "--val", "data")
    assert "was begun without it" in mistake(capsys, "--resume", out, "--ignore", 3)
    assert "was begun without it" in mistake(capsys, "--resume", out, "--tensorboard")


def test_a_tile_that_does_not_fit_is_refused_with_one_that_does(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(backends.load("cpu"), "free_memory", lambda: 600 << 20)
    out = tmp_path / "run"
    said = mistake(capsys, data, "--out", out, "--base-channels", 64, "--depth", 4, "--tile", 572)
    assert "600 MiB are available" in said and "--base-channels" in said
    assert not out.exists()


def test_fine_tuning_begins_with_the_weights_given(data, tmp_path, capsys):
    assert run(data, "--out", tmp_path / "a", "--steps", 5, "--normalization", "minmax", *SMALL) == 0
    first = load_file(tmp_path / "a" / "model.safetensors")
    tuning = ["--steps", 1, "--lr", "1e-12", "--threads", 2, "--tile", 46]
    assert run(data, "--out", tmp_path / "b", "--init", tmp_path / "a", *tuning) == 0
    second = load_file(tmp_path / "b" / "model.safetensors")
    # One step at a rate of 1e-12 / 200 is far below float32's rounding of any weight that is not almost 0.
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6, atol=1e-9)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["settings"]["normalization"] == "minmax"
    assert "has 2; leave the option out" in mistake(
        capsys, data, "--out", tmp_path / "c", "--init", tmp_path / "a", "--base-channels", 8
    )
    colour = write_data(tmp_path / "colour", channels=3)
    said = mistake(capsys, colour, "--out", tmp_path / "c", "--init", tmp_path / "a", *tuning)
    assert "takes images of 1 channels and the data has 3" in said


def test_fine_tuning_for_other_classes_starts_the_last_layer_anew(data, tmp_path, capsys):
    assert run(data, "--out", tmp_path / "a", "--steps", 5, *SMALL) == 0
    classes = write_data(tmp_path / "classes", change=lambda labels: labels % 3)
    tuning = ["--steps", 1, "--lr", "1e-12", "--threads", 2, "--tile", 46, "--labels", "classes"]
    assert run(classes, "--out", tmp_path / "b", "--init", tmp_path / "a" / "model.safetensors", *tuning) == 0
    assert "its last layer starts anew" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert second["head.weight"].shape == (3, 2, 1, 1)
    for name in set(first) - {"head.weight", "head.bias"}:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6, atol=1e-9)


def test_classes_with_names_and_an_ignored_value(tmp_path):
    def change(labels):
        return np.where(labels == 6, 77, labels % 3).astype(np.uint8)

    data = write_data(tmp_path / "data", change=change)
    options = ["--labels", "classes", "--ignore", 77, "--class-names", "ground,odd,even", "--steps", 5]
    assert run(data, "--out", tmp_path / "run", *options, *SMALL) == 0
    model = UNet.load(tmp_path / "run" / "model.safetensors")
    assert list(model.class_names) == ["ground", "odd", "even"] and model.num_classes == 3
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["best"] == "iou" and config["source"]["ignore"] == 77


def test_colour_images_binary_masks_and_the_other_preset(tmp_path):
    data = write_data(tmp_path / "data", channels=3, change=lambda labels: np.uint8(255) * (labels > 0))
    options = ["--steps", 3, "--preset", "falk2019", "--best", "loss", "--normalization", "minmax"]
    assert run(data, "--out", tmp_path / "run", *options, *SMALL) == 0
    history = read_history(tmp_path / "run" / "metrics.csv")
    assert {"val_loss", "val_iou", "val_v_rand", "val_pixel_error"} <= history.keys()
    assert UNet.load(tmp_path / "run" / "model.safetensors").in_channels == 3


def test_a_single_image_is_scored_on_itself_and_says_so(tmp_path, capsys):
    data = write_data(tmp_path / "data", count=1)
    assert run(data, "--out", tmp_path / "run", "--steps", 3, *SMALL) == 0
    assert "scores are those of the training images" in capsys.readouterr().out


def test_held_out_images_without_an_object_cannot_choose_and_that_is_said_once(data, tmp_path, capsys):
    label = data / "labels" / "00.tif"
    tifffile.imwrite(label, np.zeros_like(tifffile.imread(label)))
    assert run(data, "--val", "0", "--out", tmp_path / "run", "--steps", 120, *SMALL) == 0
    out = capsys.readouterr().out
    assert out.count("held out: loss") == 2
    assert out.count("seg cannot be measured on the held-out images") == 1
    assert run(data, "--val", "1", "--out", tmp_path / "other", "--steps", 1, *SMALL) == 0
    assert "cannot be measured" not in capsys.readouterr().out


def test_another_folder_for_validation(data, tmp_path):
    other = write_data(tmp_path / "other", count=2, seed=9)
    assert run(data, "--val", other, "--out", tmp_path / "run", "--steps", 3, *SMALL) == 0
    described = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert len(described["training"]) == 4 and len(described["validation"]) == 2


def test_minutes_end_the_run_and_bring_the_rate_down(data, tmp_path):
    began = time.monotonic()
    assert run(data, "--out", tmp_path / "run", "--minutes", 0.05, *SMALL) == 0
    history = read_history(tmp_path / "run" / "metrics.csv")
    assert 3 <= history["seconds"][-1] < 6 and time.monotonic() - began < 30
    assert history["lr"][-1] < 0.05 * history["lr"].max()
    assert np.isfinite(history["val_loss"][-1])


def test_without_data_it_trains_on_the_synthetic_stack(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "SYNTHETIC_IMAGES", 3)
    monkeypatch.setattr(train, "SYNTHETIC_SIZE", 128)
    assert run("--out", tmp_path / "run", "--steps", 3, *SMALL) == 0
    assert "3 synthetic images of 128 pixels" in capsys.readouterr().out
    assert run("--resume", tmp_path / "run") == 0


def test_defaults_are_chosen_and_said(data, tmp_path, capsys):
    assert run(data, "--out", tmp_path / "run", "--steps", 1, "--device", "cpu") == 0
    said = capsys.readouterr().out
    # 64-pixel images: the smallest tile whose output covers them, 252 -> 68.
    assert "16 base channels, depth 4, tiles of 252 pixels in and 68 out, on cpu" in said


@pytest.mark.parametrize(("side", "tile"), [(20, 316), (60, 364), (150, 572)])
def test_three_objects_fit_into_a_tile(rng, tmp_path, capsys, side, tile):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    labels = np.zeros((400, 400), np.uint16)
    for number, column in enumerate((10, 200), 1):
        labels[20 : 20 + side, column : column + side] = number
    tifffile.imwrite(tmp_path / "labels" / "a.tif", labels)
    tifffile.imwrite(tmp_path / "images" / "a.tif", rng.random((400, 400), np.float32))
    arguments = ["--labels", "instances", "--base-channels", "1", "--steps", "1", "--device", "cpu"]
    assert run(tmp_path, "--out", tmp_path / "run", *arguments) == 0
    assert f"tiles of {tile} pixels" in capsys.readouterr().out


def test_quiet_says_nothing(data, tmp_path, capsys):
    assert run(data, "--out", tmp_path / "run", "--steps", 2, "--quiet", *SMALL) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err == ""


def test_tensorboard_receives_the_numbers_of_the_table(data, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        """Stands in for tensorboardX's, which is an extra."""

        def __init__(self, folder, purge_step):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *error):
            written.append("closed")

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    module = type(sys)("tensorboardX")
    module.SummaryWriter = SummaryWriter
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    assert run(data, "--out", tmp_path / "run", "--steps", 20, "--tensorboard", *SMALL) == 0
    history = read_history(tmp_path / "run" / "metrics.csv")
    assert ("loss", history["loss"][9], 10) in written
    assert ("val_iou", history["val_iou"][19], 20) in written
    assert written[-1] == "closed"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for field in training.Settings.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in said
    for option in ("--out", "--resume", "--overwrite", "--val", "--labels", "--ignore", "--axes", "--quiet"):
        assert option in said
    assert "examples:" in said
