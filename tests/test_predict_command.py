"""The predict command: files in, files of the same shape out, mistakes in one sentence."""

import re
import subprocess
import sys

import numpy as np
import pytest
import tifffile

from fastunet import Predictor, UNet
from fastunet.data.images import read_array, write_array
from fastunet.instances import find_instances
from fastunet.predict import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    UNet(1, 3, 4, 2, seed=1).save(path)
    return path


@pytest.fixture
def image(tmp_path, rng):
    path = tmp_path / "cells.tif"
    write_array(path, rng.integers(0, 4000, (40, 57)).astype(np.uint16))
    return path


def predict(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_probabilities_of_one_image(model, image, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    assert predict("-m", model, "-i", image, "-o", out) == 0
    result = read_array(out)
    assert result.dtype == np.float32 and result.shape == (3, 40, 57)
    np.testing.assert_array_equal(result, np.moveaxis(Predictor(model)(read_array(image)), 2, 0))
    if suffix == ".tif":
        with tifffile.TiffFile(out) as file:
            assert file.series[0].axes == "CYX"


@pytest.mark.parametrize("suffix", [".tif", ".npy", ".png"])
@pytest.mark.parametrize("kind", ["classes", "instances"])
def test_classes_and_instances_of_one_image(model, image, tmp_path, suffix, kind):
    out = tmp_path / f"out{suffix}"
    options = ["--min-size", 3, "--fill-holes", "--separation-width", 2] if kind == "instances" else []
    assert predict("-m", model, "-i", image, "-o", out, "--save", kind, *options) == 0
    expected = Predictor(model)(read_array(image)).argmax(axis=2)
    if kind == "instances":
        expected = find_instances(expected, width=2, min_size=3, fill_holes=True)
    result = read_array(out)
    np.testing.assert_array_equal(result, expected)
    assert expected.max() > 1
    of_png = {"classes": np.uint8, "instances": np.uint16}
    assert result.dtype == (of_png if suffix == ".png" else {**of_png, "instances": np.uint32})[kind]


def test_png_holds_classes_when_nothing_else_is_said(model, image, tmp_path):
    assert predict("-m", model, "-i", image, "-o", tmp_path / "out.png") == 0
    assert read_array(tmp_path / "out.png").max() == 2


def test_a_stack_gives_a_stack(model, tmp_path, rng):
    stack = rng.random((3, 30, 41)).astype(np.float32)
    source = tmp_path / "stack.tif"
    write_array(source, stack, axes="ZYX")
    assert predict("-m", model, "-i", source, "-o", tmp_path / "p.tif", "--rotations", 4) == 0
    result = read_array(tmp_path / "p.tif")
    assert result.shape == (3, 3, 30, 41)
    expected = np.moveaxis(Predictor(model, rotations=4)(stack), 3, 1)
    np.testing.assert_allclose(result, expected, atol=1e-5)  # tiles of turned views differ
    assert predict("-m", model, "-i", source, "-o", tmp_path / "c.tif", "--save", "classes") == 0
    assert read_array(tmp_path / "c.tif").shape == (3, 30, 41)


def test_axes_override_what_a_file_seems_to_be(model, tmp_path, rng):
    write_array(tmp_path / "a.npy", rng.random((20, 30, 3)))
    assert predict("-m", model, "-i", tmp_path / "a.npy", "-o", tmp_path / "p.npy", "--axes", "YXZ") == 0
    assert read_array(tmp_path / "p.npy").shape == (3, 3, 20, 30)


def test_a_folder_gives_a_folder_of_the_same_names(model, tmp_path, rng):
    folder = tmp_path / "in"
    folder.mkdir()
    sizes = {"a.png": (20, 30), "b.tif": (25, 16), "c.npy": (1, 1)}
    for name, size in sizes.items():
        write_array(folder / name, rng.integers(0, 255, size).astype(np.uint8))
    assert predict("-m", model, "-i", folder, "-o", tmp_path / "new" / "out", "--save", "instances") == 0
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == set(sizes)
    for name, size in sizes.items():
        assert read_array(tmp_path / "new" / "out" / name).shape == size
    assert predict("-m", model, "-i", str(folder / "*.*"), "-o", tmp_path / "p") == 0
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"a.tif", "b.tif", "c.npy"}
    assert read_array(tmp_path / "p" / "a.tif").shape == (3, 20, 30)
    assert predict("-m", model, "-i", folder / "c.npy", "-o", tmp_path / "p", "--save", "classes") == 0
    assert read_array(tmp_path / "p" / "c.npy").shape == (1, 1)


def test_tile_and_memory_change_nothing_and_a_smaller_tile_is_told(model, image, tmp_path, capsys):
    outs = [tmp_path / f"{n}.npy" for n in range(3)]
    assert predict("-m", model, "-i", image, "-o", outs[0], "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert predict("-m", model, "-i", image, "-o", outs[1], "--tile", 44) == 0
    assert "0.npy" not in capsys.readouterr().out
    assert predict("-m", model, "-i", image, "-o", outs[2], "--memory", "4G") == 0
    told = capsys.readouterr().out
    assert re.search(r"plan: 1 tile of \d+x\d+ pixels, at most \d+ MiB", told)
    assert "probabilities of 1 image in" in told
    for out in outs[1:]:
        np.testing.assert_allclose(read_array(out), read_array(outs[0]), atol=1e-5)


def test_a_run_folder_is_a_model(model, image, tmp_path):
    assert predict("-m", model.parent, "-i", image, "-o", tmp_path / "out.npy") == 0


MISTAKES = {
    "no such model": (["-m", "nowhere"], "nowhere: there is no such model"),
    "no such input": (["-i", "nowhere.tif"], "nowhere.tif: nothing is there"),
    "suffix": (["-o", "out.jpg"], "out.jpg: .jpg cannot be written; end OUT in .tif"),
    "devices": (["--devices", "cpu,cuda"], "different kinds would not give one result"),
    "png": (["-o", "out.png", "--save", "probabilities"], "PNG cannot hold probabilities"),
    "tile": (["--tile", "45"], "tile 45 cannot predict at depth 2"),
    "no tile": (["--tile", "big"], "tile is 'big'; expected 'auto' or"),
    "amount": (["--memory", "much"], "memory is 'much'; expected an amount"),
    "too little": (["--memory", "1K"], "before any tile; allow more"),
    "instances": (["--min-size", "5"], "--min-size is about instances and probabilities are saved"),
    "negative": (["--save", "instances", "--min-size", "-5"], "both must be at least 0"),
    "device": (["--device", "tpu"], "'tpu' is unknown"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_sentence(model, image, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    wrong, sentence = MISTAKES[name]
    arguments = {"-m": model, "-i": image, "-o": "out.tif"} | dict(zip(wrong[::2], wrong[1::2]))
    before = set(tmp_path.iterdir())
    assert predict(*(part for pair in arguments.items() for part in pair)) == 2
    told = capsys.readouterr()
    assert sentence in told.err and told.err.startswith("fastunet predict: error: ")
    assert told.err.count("\n") == 1 and told.out == ""
    assert set(tmp_path.iterdir()) == before


def test_mistakes_in_what_belongs_together(model, image, tmp_path, capsys):
    def sentence(*arguments):
        assert predict("-m", model, *arguments) == 2
        return capsys.readouterr().err

    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "a.tif"):
        write_array(folder / name, np.zeros((9, 9), np.uint8))
    assert "2 inputs need a folder" in sentence("-i", folder, "-o", tmp_path / "out.tif")
    assert "two inputs would be written to it" in sentence("-i", folder, "-o", tmp_path / "out")
    assert "would replace its input" in sentence("-i", folder, "-o", folder, "--save", "classes")
    assert "would replace its input" in sentence("-i", image, "-o", image)
    write_array(tmp_path / "stack.npy", np.zeros((6, 9, 9), np.uint8))
    assert "cannot hold its 6 images" in sentence("-i", tmp_path / "stack.npy", "-o", tmp_path / "out.png")
    colour = tmp_path / "colour.npy"
    write_array(colour, np.zeros((9, 9, 3), np.uint8))
    assert "colour.npy: the image has 3 channels" in sentence("-i", colour, "-o", tmp_path / "p.npy")
    (tmp_path / "broken.tif").write_bytes(b"II*\0 and then nothing")
    assert "broken.tif" in sentence("-i", tmp_path / "broken.tif", "-o", tmp_path / "p.npy")
    assert not (tmp_path / "p.npy").exists()


def test_as_a_module_of_its_own(model, image, tmp_path):
    command = [sys.executable, "-m", "fastunet.predict", "-m", model, "-i", image]
    done = subprocess.run([*command, "-o", tmp_path / "out.tif"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "out.tif: probabilities of 1 image" in done.stdout
    failed = subprocess.run([*command, "-o", tmp_path / "out.gif"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("fastunet predict: error:")
    assert "Traceback" not in failed.stderr
    explained = subprocess.run([*command[:3], "--help"], capture_output=True, text=True)
    assert explained.returncode == 0 and "--rotations" in explained.stdout


def test_real_stacks_and_frames(model, data_folder, tmp_path):
    stack = data_folder / "isbi2012" / "test-volume.tif"
    out = tmp_path / "p.tif"
    assert predict("-m", model, "-i", stack, "-o", out, "--tile", 252, "--quiet") == 0
    result = read_array(out)
    assert result.shape == (4, 3, 512, 512)
    np.testing.assert_allclose(
        np.moveaxis(result[2], 0, 2), Predictor(model)(read_array(stack)[2]), atol=1e-5
    )
    dim = data_folder / "ctc" / "Fluo-N2DL-HeLa" / "01"
    assert predict("-m", model, "-i", dim, "-o", tmp_path / "dim", "--save", "instances", "--quiet") == 0
    assert {path.name for path in (tmp_path / "dim").iterdir()} == {path.name for path in dim.iterdir()}
