"""The command `weightmap`: the numbers are those of the library, the picture is one to look at."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image as pillow

from fastunet import weightmap
from fastunet.data.images import read_array, write_array
from fastunet.data.separation import separate
from fastunet.data.synthetic import synthetic_cells
from fastunet.data.weight_map import weight_map


@pytest.fixture
def stack(rng: np.random.Generator) -> np.ndarray:
    return np.stack([synthetic_cells(seed, (90, 130))[1] for seed in rng.integers(2**31, size=3).tolist()])


def run(*arguments: object) -> int:
    return weightmap.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_one_image(tmp_path: Path, stack: np.ndarray, suffix: str) -> None:
    write_array(tmp_path / "labels.png", stack[0])
    out = tmp_path / f"weights{suffix}"
    assert run(tmp_path / "labels.png", "-o", out, "--quiet") == 0
    weights = read_array(out)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, weight_map(stack[0], separate(stack[0])))


def test_options_reach_the_formula(tmp_path: Path, stack: np.ndarray) -> None:
    write_array(tmp_path / "labels.npy", stack[0])
    out = tmp_path / "weights.npy"
    options = ("--w0", 7, "--sigma", 3, "--class-weights", "1,4", "--separation-width", 2, "--quiet")
    assert run(tmp_path / "labels.npy", "-o", out, *options) == 0
    expected = weight_map(stack[0], separate(stack[0], 2), w0=7, sigma=3, class_weights=[1, 4])
    np.testing.assert_array_equal(read_array(out), expected)

    assert run(tmp_path / "labels.npy", "-o", out, "--preset", "falk2019", "--quiet") == 0
    expected = weight_map(stack[0], separate(stack[0]), class_weights=None, preset="falk2019")
    np.testing.assert_array_equal(read_array(out), expected)

    assert run(tmp_path / "labels.npy", "-o", out, "--class-weights", "none", "--ignore", 1, "--quiet") == 0
    labels = np.where(stack[0] == 1, 0, stack[0])
    expected = weight_map(labels, separate(labels), class_weights=None, ignore=stack[0] == 1)
    np.testing.assert_array_equal(read_array(out), expected)
    assert (read_array(out)[stack[0] == 1] == 0).all()


def test_a_stack_is_balanced_as_a_whole(tmp_path: Path, stack: np.ndarray) -> None:
    write_array(tmp_path / "labels.tif", stack)
    assert run(tmp_path / "labels.tif", "-o", tmp_path / "weights.tif", "--w0", 0, "--quiet") == 0
    weights = read_array(tmp_path / "weights.tif")
    assert weights.shape == stack.shape
    masks = np.stack([separate(labels) for labels in stack])
    # Balanced: both classes have the same sum, and the mean weight is 1.
    assert weights[masks == 0].sum(dtype=float) == pytest.approx(
        weights[masks == 1].sum(dtype=float), rel=1e-5
    )
    assert weights.mean(dtype=float) == pytest.approx(1, rel=1e-5)
    assert run(tmp_path / "labels.tif", "-o", tmp_path / "one.tif", "--w0", 0, "--page", 1, "--quiet") == 0
    np.testing.assert_array_equal(read_array(tmp_path / "one.tif"), weights[1])


def test_classes_that_abut_stay_so(tmp_path: Path) -> None:
    labels = np.repeat(np.array([[0, 0, 1, 1, 2, 2]], np.uint8), 4, 0)
    write_array(tmp_path / "labels.npy", labels)
    options = ("--labels", "classes", "--class-weights", "5,1,2", "--w0", 0, "--quiet")
    assert run(tmp_path / "labels.npy", "-o", tmp_path / "weights.npy", *options) == 0
    np.testing.assert_array_equal(
        read_array(tmp_path / "weights.npy"), np.array([5, 1, 2], np.float32)[labels]
    )


def test_the_picture_shows_every_pixel(tmp_path: Path) -> None:
    labels = synthetic_cells(4, (300, 420))[1]
    write_array(tmp_path / "labels.tif", labels)
    out = tmp_path / "weights.png"
    assert run(tmp_path / "labels.tif", "-o", out, "--quiet") == 0
    weights = weight_map(labels, separate(labels))
    picture = np.asarray(pillow.open(out).convert("RGB"))
    assert picture.shape[0] == 300 and picture.shape[1] > 420
    expected = colormaps["turbo"](weights / weights.max(), bytes=True)[..., :3]
    # Neighbours in the colour table differ by up to 8; a shift by a pixel would differ by far more.
    difference = np.abs(picture[:, :420].astype(int) - expected).max(2)
    assert (difference <= 8).mean() > 0.999
    assert (picture[:, 425:] < 100).all(2).any(), "a colour scale with numbers"


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (40, 30)])
def test_pictures_of_small_images_are_magnified(tmp_path: Path, shape: tuple[int, int]) -> None:
    write_array(tmp_path / "labels.npy", np.ones(shape, np.uint8))
    assert run(tmp_path / "labels.npy", "-o", tmp_path / "weights.png", "--quiet") == 0
    assert min(pillow.open(tmp_path / "weights.png").size) >= 256


def test_real_labels(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = data_folder / "isbi2012" / "train-labels.tif"
    assert run(labels, "-o", tmp_path / "weights.tif", "--page", 5) == 0
    weights = read_array(tmp_path / "weights.tif")
    membranes = read_array(labels)[5] == 0
    assert weights.shape == (512, 512)
    assert weights[membranes].mean() > 3 * weights[~membranes].mean()
    err = capsys.readouterr().err
    assert "0 = background and 255 = object" in err and "weights.tif: weights" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("labels.tif", "-o", "weights.jpg"), "suffix '.jpg'"),
        (("labels.tif", "-o", "weights.png"), "give --page N"),
        (("labels.tif", "-o", "weights.png", "--page", "3"), "pages 0 to 2"),
        (("labels.tif", "-o", "weights.npy", "--sigma", "0"), "sigma is 0"),
        (("labels.tif", "-o", "none/weights.npy"), "create it first"),
        (("labels.tif", "-o", "labels.tif"), "would replace the labels"),
        (("labels.tif", "-o", "./labels.tif", "--page", "1"), "would replace the labels"),
        (("none.tif", "-o", "weights.npy"), "none.tif: no such file"),
        (("labels.tif", "-o", "weights.npy", "--labels", "binary"), "masks of two values"),
        (("labels.tif", "-o", "weights.npy", "--axes", "YX"), "axes 'YX'"),
        (("labels.tif", "-o", "weights.npy", "--separation-width", "-1"), "width is -1"),
        (("labels.tif", "-o", "weights.npy", "--class-weights", "1,2,3"), "3 numbers for 2 classes"),
    ],
)
def test_mistakes_end_in_one_sentence(
    tmp_path: Path,
    stack: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_array(tmp_path / "labels.tif", stack)
    assert run(*arguments, "--quiet") == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("fastunet weightmap: error: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["labels.tif"]
    np.testing.assert_array_equal(read_array(tmp_path / "labels.tif"), stack)
