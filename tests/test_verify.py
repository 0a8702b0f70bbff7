"""The command `verify`: all problems at once, and the facts of every image."""

from pathlib import Path

import numpy as np
import pytest

from fastunet import verify
from fastunet.data.datasets import Meaning, dataset_of_arrays
from fastunet.data.images import write_array
from fastunet.verify import examine


def put(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_array(path, array)


def good_folder(root: Path, count: int = 3) -> Path:
    rng = np.random.default_rng(1)
    for number in range(count):
        labels = np.zeros((20, 30), np.uint16)
        labels[2:8, 2:8], labels[8:12, 5:12], labels[15:19, 20:29] = 1, 2, 5
        put(root / "images" / f"a{number}.tif", rng.integers(10, 200, (20, 30)).astype(np.uint8))
        put(root / "labels" / f"a{number}.tif", labels)
    return root


def test_a_good_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(good_folder(tmp_path))]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (row,) = [line for line in out.splitlines() if line.startswith("a1 ")]
    # 36 + 28 + 36 of 600 pixels; instances 1 and 2 meet along a side.
    assert row.split()[1:] == ["20x30", "uint8", row.split()[3], "3", "2", "16.7%"]
    assert "3 images (folders, instances); 9 objects, 6 touching" in out
    assert "background 83.3%, object 16.7%" in out
    assert "no problem was found" in out


def test_all_problems_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = good_folder(tmp_path, 8)
    whole = (root / "images" / "a1.tif").read_bytes()
    (root / "images" / "a1.tif").write_bytes(whole[: len(whole) // 2])  # damaged
    (root / "labels" / "a2.tif").unlink()  # missing
    put(root / "labels" / "a3.tif", np.ones((30, 20), np.uint8))  # transposed
    put(root / "images" / "a4.tif", np.full((20, 30), np.nan, np.float32))  # not finite
    put(root / "labels" / "a5.tif", np.full((20, 30), 0.5, np.float32))  # not whole
    put(root / "images" / "a6.tif", np.zeros((20, 30, 3), np.uint8))  # axes that make it 20 images
    assert verify.main([str(root)]) == 2
    out, err = capsys.readouterr()
    assert "2 images" in out
    assert "6 problems" in err
    for name in ("images/a1.tif", "images/a2.tif", "a3.tif", "images/a4.tif", "labels/a5.tif", "a6.tif"):
        assert f"{root}/" in err and name in err
    for field in ("file", "found", "expected", "fix"):
        assert sum(line.startswith(f"{field} ") for line in err.splitlines()) == 6


def test_no_data_set_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "an empty folder" in err and "1 problem" in err


def test_labels_of_the_wrong_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(good_folder(tmp_path)), "--labels", "classes"]) == 2
    assert "without gaps" in capsys.readouterr().err


def test_quiet_prints_problems_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(good_folder(tmp_path)), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_same_image_twice_is_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = good_folder(tmp_path)
    (root / "images" / "a2.tif").write_bytes((root / "images" / "a0.tif").read_bytes())
    assert verify.main([str(root)]) == 0
    out = capsys.readouterr().out
    assert "a2 is the same image as a0" in out and "a1 is the same" not in out


def facts(labels: np.ndarray, meaning: Meaning, image: np.ndarray | None = None) -> verify.Facts:
    pixels = np.arange(labels.size).reshape(labels.shape) if image is None else image
    return examine(dataset_of_arrays([pixels], [labels], meaning).samples[0])


def test_touching_counts_corners() -> None:
    labels = np.zeros((8, 8), np.uint8)
    labels[0, 0], labels[1, 1] = 1, 2  # corner to corner
    labels[0, 6], labels[1, 5] = 3, 4  # the other diagonal
    labels[5, 0:2], labels[5, 2] = 5, 6  # side by side
    labels[7, 7] = 7
    assert facts(labels, Meaning("instances")).touching == 6
    assert facts(labels, Meaning("instances")).objects == 7


def test_remarks() -> None:
    instances = Meaning("instances")
    labels = np.zeros((9, 9), np.uint8)
    assert facts(labels, instances).remarks == ["no object"]
    assert facts(labels + 1, instances).remarks == ["no background"]
    labels[0:3, 0:3] = labels[5:8, 5:8] = 4
    assert facts(labels, instances).remarks == ["1 object in several pieces (4)"]
    assert facts(labels, Meaning("binary")).remarks == []
    labels[0, 8] = 9
    assert "1 object of fewer than 4 pixels" in facts(labels, instances).remarks
    assert "every pixel is 3" in facts(labels, instances, np.full((9, 9), 3)).remarks
    assert facts(labels * 0 + 7, Meaning("instances", ignore=7)).remarks == ["every pixel is ignored"]


def test_ignored_pixels_belong_to_no_class() -> None:
    labels = np.array([[0, 1, 2, 2], [0, 255, 255, 1]], np.uint8)
    found = facts(labels, Meaning("classes", ("a", "b", "c"), ignore=255))
    assert found.pixels.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "name, summary",
    [
        ("isbi2012", "24 images (volume, binary)"),
        ("bbbc039", "40 images (folders, instances); 4863 objects"),
        ("ctc/Fluo-N2DL-HeLa", "2 images (ctc, instances)"),
    ],
)
def test_real_data_sets_are_in_order(
    data_folder: Path, capsys: pytest.CaptureFixture[str], name: str, summary: str
) -> None:
    assert verify.main([str(data_folder / name)]) == 0
    out = capsys.readouterr().out
    assert summary in out and "no problem was found" in out
    if name == "bbbc039":
        (row,) = [line for line in out.splitlines() if "L10_s6" in line]
        assert row.endswith("no object")
