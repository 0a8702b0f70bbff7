"""Data sets: the three layouts, what labels mean, and every real file at hand."""

from pathlib import Path

import numpy as np
import pytest
from skimage import measure

from fastunet.data.datasets import (
    Dataset,
    Meaning,
    dataset_of_arrays,
    open_dataset,
    select,
    validation_split,
)
from fastunet.data.images import FileProblem, read_images, read_labels, write_array
from fastunet.errors import DataError


def folders(root: Path, labels: list[np.ndarray], suffix: str = ".tif", channels: int = 1) -> Path:
    """Write images/ and labels/ with files a0, a1, ... of random pixels."""
    rng = np.random.default_rng(0)
    for number, label in enumerate(labels):
        shape = (*label.shape, channels) if channels > 1 else label.shape
        put(root / "images" / f"a{number}.npy", rng.integers(0, 255, shape).astype(np.uint8))
        put(root / "labels" / f"a{number}{suffix}", label)
    return root


def sequence(root: Path, name: str, frames: list[int], silver: list[int], gold: list[int]) -> None:
    """Write a Cell Tracking Challenge sequence; frame t holds one object numbered t + 1 and one 100."""
    for frame in frames:
        put(root / name / f"t{frame:03}.tif", np.full((8, 9), frame, np.uint8))
    for kind, numbers in (("ST", silver), ("GT", gold)):
        for frame in numbers:
            labels = np.zeros((8, 9), np.uint16)
            labels[1:3, 1:3], labels[5:7, 5:7] = frame + 1, 100 if kind == "ST" else 200
            put(root / f"{name}_{kind}" / "SEG" / f"man_seg{frame:03}.tif", labels)


def put(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_array(path, array)


def opened(path: Path, **options: object) -> tuple[Dataset, str]:
    notices: list[str] = []
    return open_dataset(path, notify=notices.append, **options), "\n".join(notices)  # type: ignore[arg-type]


def block(*values: int, shape: tuple[int, int] = (6, 12)) -> np.ndarray:
    """Labels with one 2x1 object of each value, 2 apart."""
    labels = np.zeros(shape, np.uint16)
    for place, value in enumerate(values):
        labels[1:3, 1 + 2 * place] = value
    return labels


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize(
    "name, layout, kind, images, shape, dtype",
    [
        ("isbi2012", "volume", "binary", 24, (512, 512, 1), "uint8"),
        ("ctc/DIC-C2DH-HeLa", "ctc", "instances", 33, (512, 512, 1), "uint8"),
        ("ctc/PhC-C2DH-U373", "ctc", "instances", 34, (520, 696, 1), "uint8"),
        ("ctc/PhC-C2DL-PSC", "ctc", "instances", 8, (576, 720, 1), "uint8"),
        ("ctc/Fluo-N2DH-GOWT1", "ctc", "instances", 3, (1024, 1024, 1), "uint8"),
        ("ctc/Fluo-N2DL-HeLa", "ctc", "instances", 2, (700, 1100, 1), "uint16"),
        ("dsb2018", "folders", "instances", 180, (256, 256, 1), "uint8"),
        ("bbbc039", "folders", "instances", 40, (520, 696, 1), "uint16"),
    ],
)
def test_real_data_sets(
    data_folder: Path, name: str, layout: str, kind: str, images: int, shape: tuple[int, ...], dtype: str
) -> None:
    dataset, _ = opened(data_folder / name)
    assert (dataset.layout, dataset.kind, len(dataset)) == (layout, kind, images)
    assert (dataset.in_channels, dataset.num_classes, dataset.ignore) == (1, 2, None)
    first = dataset.samples[0]
    assert (first.shape, first.image.shape, first.image.dtype) == (shape, shape, dtype)
    for sample in (first, dataset.samples[-1]):
        np.testing.assert_array_equal(sample.classes > 0, sample.instances > 0)
        assert sample.instances.dtype == np.int32 and sample.classes.dtype == np.uint8
        assert len(np.unique(sample.instances)) > 2


def test_every_real_file_reads(data_folder: Path) -> None:
    files = sorted(data_folder.rglob("*.tif"))
    assert len(files) > 500
    for file in files:
        images = read_images(file)
        assert all(image.pixels.ndim == 3 and image.pixels.shape[2] == 1 for image in images)
        if {"SEG", "labels"} & {file.parent.name} or file.stem == "train-labels":
            assert len(read_labels(file)) == len(images)


def test_the_field_without_a_nucleus_stays_an_instance_image(data_folder: Path) -> None:
    dataset, _ = opened(data_folder / "bbbc039")
    (empty,) = [sample for sample in dataset.samples if sample.name.endswith("L10_s6")]
    assert empty.instances.max() == 0 and empty.classes.max() == 0


def test_gold_truth_on_request(data_folder: Path) -> None:
    dataset, notices = opened(data_folder / "ctc/DIC-C2DH-HeLa", truth="gold")
    assert len(dataset) == 9
    assert "0 may mean not annotated" in notices and "left out" in notices


def test_a_folder_of_data_sets_points_to_one(data_folder: Path) -> None:
    with pytest.raises(DataError, match="give one of the data sets in it, such as .*DIC-C2DH-HeLa"):
        open_dataset(data_folder / "ctc")
    with pytest.raises(DataError, match="give .*DIC-C2DH-HeLa$"):
        open_dataset(data_folder / "ctc" / "DIC-C2DH-HeLa" / "01")


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("high", [1, 255, 7])
def test_two_values_are_binary(tmp_path: Path, rng: np.random.Generator, high: int) -> None:
    masks = [(rng.random((20, 30)) < 0.4) * np.uint8(high) for _ in range(3)]
    dataset, notices = opened(folders(tmp_path, masks))
    assert dataset.kind == "binary" and f"{high} = object" in notices
    for sample, mask in zip(dataset.samples, masks):
        np.testing.assert_array_equal(sample.classes, mask > 0)
        # The same components up to their numbers: every pair of numbers occurs once.
        reference = measure.label(mask > 0, connectivity=1)
        pairs = np.unique(np.stack([sample.instances.ravel(), reference.ravel()]), axis=1)
        assert pairs.shape[1] == reference.max() + 1 == sample.instances.max() + 1


def test_one_object_in_an_image_does_not_make_a_mask(tmp_path: Path) -> None:
    dataset, _ = opened(folders(tmp_path, [block(1), block(), block(3, 8)]))
    assert dataset.kind == "instances"
    assert [sample.instances.max() for sample in dataset.samples] == [1, 0, 8]


def test_an_instance_in_two_pieces_stays_one(tmp_path: Path) -> None:
    dataset, _ = opened(folders(tmp_path, [block(5, 4, 5)]))
    np.testing.assert_array_equal(dataset.samples[0].instances, block(5, 4, 5))


def test_enormous_numbers_become_small_ones(tmp_path: Path) -> None:
    labels = block().astype(np.uint32)
    labels[1, 1], labels[3, 3], labels[4, 4] = 2**32 - 1, 7, 2**31
    put(tmp_path / "images" / "a0.npy", np.zeros((6, 12), np.uint8))
    put(tmp_path / "labels" / "a0.tif", labels)
    instances = opened(tmp_path)[0].samples[0].instances
    assert instances.dtype == np.int32 and sorted(np.unique(instances)) == [0, 1, 2, 3]
    np.testing.assert_array_equal(instances > 0, labels > 0)


def test_classes(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 1, 2], [1, 0, 2, 2], [0, 0, 0, 1]], np.uint8)
    dataset, _ = opened(folders(tmp_path, [labels]), labels="classes")
    assert (dataset.kind, dataset.num_classes) == ("classes", 3)
    assert dataset.class_names == ("background", "class 1", "class 2")
    sample = dataset.samples[0]
    np.testing.assert_array_equal(sample.classes, labels)
    np.testing.assert_array_equal(sample.instances > 0, labels > 0)
    # Four 4-connected regions: of class 1 three (its pixels touch at corners only), of class 2 one.
    assert sample.instances.max() == 4
    for number in range(1, 5):
        assert len(np.unique(labels[sample.instances == number])) == 1
        assert measure.label(sample.instances == number, connectivity=1).max() == 1


def test_named_classes_may_be_absent(tmp_path: Path) -> None:
    folders(tmp_path, [block(1, 3)])
    dataset, _ = opened(tmp_path, labels="classes", class_names=["no", "a", "b", "c"])
    assert dataset.num_classes == 4 and dataset.class_names == ("no", "a", "b", "c")
    with pytest.raises(DataError, match=r"a0\.tif: the label 3, but expected classes 0\.\.2"):
        open_dataset(tmp_path, "classes", class_names=["no", "a", "b"], notify=None)
    with pytest.raises(ValueError, match="3 class names"):
        open_dataset(tmp_path, class_names=["no", "a", "b"], notify=None)


@pytest.mark.parametrize("values", [(1, 3), (85, 170, 255), (1, 2, 300)])
def test_classes_with_gaps_are_refused(tmp_path: Path, values: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"a0\.tif: .*classes 0\.\.K-1.*without gaps"):
        open_dataset(folders(tmp_path, [block(*values)]), "classes", notify=None)


def test_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    labels = np.arange(300, dtype=np.uint16).reshape(15, 20)
    with pytest.raises(DataError, match=r"the label 299, but expected classes 0\.\.255"):
        open_dataset(folders(tmp_path, [labels]), "classes", notify=None)


def test_ignored_pixels(tmp_path: Path) -> None:
    folders(tmp_path, [block(1, 255), block(1)])
    dataset, _ = opened(tmp_path, ignore=255)
    assert (dataset.kind, dataset.ignore) == ("binary", 255)
    sample = dataset.samples[0]
    assert sample.ignored is not None
    np.testing.assert_array_equal(sample.ignored, block(0, 1) > 0)
    np.testing.assert_array_equal(sample.classes, block(1))
    np.testing.assert_array_equal(sample.instances, block(1))
    assert opened(tmp_path)[0].samples[0].ignored is None
    assert "no label has the ignore value 9" in opened(tmp_path, ignore=9)[1]


def test_negative_labels(tmp_path: Path) -> None:
    labels = block(1, 2).astype(np.int16)
    labels[0] = -1
    put(tmp_path / "images" / "a0.npy", np.zeros((6, 12), np.uint8))
    put(tmp_path / "labels" / "a0.tif", labels)
    with pytest.raises(DataError, match="the label -1.*--ignore -1"):
        open_dataset(tmp_path, notify=None)
    dataset, _ = opened(tmp_path, ignore=-1)
    assert dataset.kind == "instances" and dataset.samples[0].instances.min() == 0


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (block(), {}, "labels without any object"),
        (np.where(block(1) > 0, 1, 2), {}, r"the labels 1, 2 and no 0.*save them as 0 and 1"),
        (block(1, 2), {"labels": "binary"}, "masks of two values"),
        (block(1), {"labels": "objects"}, "'objects' is not one of"),
        (block(1), {"truth": "bronze"}, "'bronze' is not one of"),
    ],
)
def test_labels_that_make_no_sense(
    tmp_path: Path, labels: np.ndarray, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(folders(tmp_path, [labels]), notify=None, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ layouts


def test_volume(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = rng.integers(0, 255, (5, 7, 8)).astype(np.uint8)
    masks = np.where(rng.random((5, 7, 8)) < 0.5, 255, 0).astype(np.uint8)
    put(tmp_path / "train-volume.tif", volume)
    put(tmp_path / "train-labels.npy", masks)
    dataset, _ = opened(tmp_path)
    assert (dataset.layout, dataset.kind, len(dataset)) == ("volume", "binary", 5)
    for number, sample in enumerate(dataset.samples):
        assert (sample.name, sample.number) == (f"train-volume[{number}]", number)
        np.testing.assert_array_equal(sample.image[..., 0], volume[number])
        np.testing.assert_array_equal(sample.labels, masks[number])


def test_folders_pair_by_name_in_natural_order(tmp_path: Path) -> None:
    for name in ("b10", "b9", "a"):
        put(tmp_path / "images" / f"{name}.png", np.full((4, 5), len(name), np.uint8))
        put(tmp_path / "masks" / f"{name}.npy", block(len(name), 9, shape=(4, 5)))
    (tmp_path / "images" / "notes.txt").touch()
    (tmp_path / "images" / ".DS_Store").touch()
    dataset, notices = opened(tmp_path)
    assert [sample.name for sample in dataset.samples] == ["a", "b9", "b10"]
    assert all(sample.labels.max() == 9 and len(sample.name) in sample.labels for sample in dataset.samples)
    assert ".txt" in notices and "DS_Store" not in notices


def test_sequences_prefer_silver(tmp_path: Path) -> None:
    sequence(tmp_path, "01", [0, 1, 2, 60], silver=[0, 2, 60], gold=[2])
    sequence(tmp_path, "02", [5, 6], silver=[], gold=[6, 9])
    sequence(tmp_path, "03", [1], silver=[], gold=[])
    dataset, notices = opened(tmp_path)
    assert [sample.name for sample in dataset.samples] == ["01/t000", "01/t002", "01/t060", "02/t006"]
    assert [sample.number for sample in dataset.samples] == [0, 2, 60, 6]
    assert [sample.instances.max() for sample in dataset.samples] == [100, 100, 100, 200]
    assert [sample.image.max() for sample in dataset.samples] == [0, 2, 60, 6]
    for said in ("frames without it are left out: 1", "man_seg009.tif", "03: no silver or gold truth"):
        assert said in notices
    gold, _ = opened(tmp_path, truth="gold")
    assert [sample.name for sample in gold.samples] == ["01/t002", "02/t006"]


def test_a_sequence_of_volumes(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = rng.integers(0, 255, (4, 6, 12)).astype(np.uint8)
    put(tmp_path / "01" / "t000.tif", volume)
    put(tmp_path / "01" / "t001.tif", volume)
    put(tmp_path / "01_GT" / "SEG" / "man_seg000.tif", np.stack([block(1, 2)] * 4))
    put(tmp_path / "01_GT" / "SEG" / "man_seg_001_002.tif", block(1, 2))
    dataset, _ = opened(tmp_path)
    assert [sample.name for sample in dataset.samples[-2:]] == ["01/t000[3]", "01/t001[2]"]
    np.testing.assert_array_equal(dataset.samples[-1].image[..., 0], volume[2])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "an empty folder, but expected train-volume.tif"),
        (lambda root: put(root / "x.tif", block(1)), r"a folder with x\.tif"),
        (lambda root: put(root / "train-volume.tif", block(1)), "train-volume.tif without labels"),
        (lambda root: put(root / "images" / "a.tif", block(1)), "images/ alone"),
        (lambda root: sequence(root, "01", [0], [], []), "frames without any truth"),
    ],
)
def test_unknown_layouts(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(tmp_path, notify=None)
    assert str(tmp_path) in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is there"):
        open_dataset(tmp_path / "none")
    put(tmp_path / "a.tif", block(1))
    with pytest.raises(DataError, match="a file, but expected a folder"):
        open_dataset(tmp_path / "a.tif")


def test_what_does_not_fit_names_both_files(tmp_path: Path) -> None:
    root = folders(tmp_path, [block(1)] * 3)
    put(root / "labels" / "a1.tif", block(1).T.copy())
    with pytest.raises(DataError, match=r"labels/a1\.tif.*12x6.*images/a1\.npy.*6x12.*transpose"):
        open_dataset(root, notify=None)
    put(root / "labels" / "a1.tif", np.stack([block(1)] * 2))
    with pytest.raises(DataError, match=r"labels/a1\.tif: 2 label images for the 1 in .*images/a1\.npy"):
        open_dataset(root, notify=None)
    put(root / "labels" / "a1.tif", block(1))
    put(root / "images" / "a2.npy", np.zeros((6, 12, 3), np.uint8))
    with pytest.raises(
        DataError, match=r"images/a2\.npy: 3 channels, but expected the 1 of .*images/a0\.npy"
    ):
        open_dataset(root, notify=None)


def test_orphans_and_doubles(tmp_path: Path) -> None:
    root = folders(tmp_path, [block(1), block(1)])
    (root / "labels" / "a1.tif").rename(root / "labels" / "b.tif")
    put(root / "labels" / "a0.npy", block(1))
    problems: list[FileProblem] = []
    dataset = open_dataset(root, notify=None, on_problem=problems.append)
    assert [sample.name for sample in dataset.samples] == ["a0"]
    assert sorted(problem.path.name for problem in problems) == ["a0.tif", "a1.npy", "b.tif"]
    assert all(problem.found and problem.expected and problem.fix for problem in problems)
    put(root / "masks" / "a0.tif", block(1))
    with pytest.raises(DataError, match="both labels/ and masks/"):
        open_dataset(root, notify=None)


def test_a_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    root = folders(tmp_path, [block(1, 2)])
    sample = opened(root)[0].samples[0]
    put(root / "labels" / "a0.tif", block(3, 4))
    np.testing.assert_array_equal(sample.labels, block(3, 4))


def test_colour_and_axes(tmp_path: Path) -> None:
    assert opened(folders(tmp_path / "rgb", [block(1)], channels=3))[0].in_channels == 3
    put(tmp_path / "czyx" / "images" / "a.npy", np.zeros((2, 5, 6, 12), np.uint8))
    put(tmp_path / "czyx" / "labels" / "a.npy", np.stack([block(1)] * 5))
    dataset, _ = opened(tmp_path / "czyx", axes="CZYX")
    assert (len(dataset), dataset.in_channels) == (5, 2)


# ------------------------------------------------------------------------------------------------ splits


def numbered(count: int, layout: str = "arrays") -> Dataset:
    images = [np.full((4, 4), number, np.uint8) for number in range(count)]
    dataset = dataset_of_arrays(images, [block(1, shape=(4, 4))] * count, Meaning("binary"))
    return Dataset(layout, dataset.samples, dataset.meaning)


def held_out(pair: tuple[Dataset, Dataset]) -> list[int]:
    train, val = pair
    numbers = [sample.number for sample in val.samples]
    assert sorted([sample.number for sample in train.samples] + numbers) == list(range(len(train) + len(val)))
    return numbers


def test_fractions_are_spread_over_the_stack() -> None:
    assert held_out(numbered(24).split(4 / 24)) == [0, 6, 12, 18]
    assert held_out(numbered(24).split()) == [0, 12]
    assert held_out(numbered(2).split(0.01)) == [0]
    assert held_out(numbered(2).split(0.99)) == [0]
    assert held_out(numbered(1).split(0.5)) == []
    assert held_out(numbered(9).split(0.0)) == []
    for bad in (1, 1.5, -0.1):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            numbered(9).split(bad)


def test_split_by_indices_and_by_another_data_set() -> None:
    assert held_out(numbered(6).split([4, 1, -1])) == [1, 4, 5]
    with pytest.raises(ValueError, match="leave at least one"):
        numbered(2).split([0, 1])
    with pytest.raises(IndexError):
        numbered(2).split([2])
    other = numbered(3)
    train, val = numbered(4).split(other)
    assert (len(train), val) == (4, other)
    colour = dataset_of_arrays([np.zeros((4, 4, 3))], [block(1, shape=(4, 4))], Meaning("binary"))
    with pytest.raises(ValueError, match="3 channels"):
        numbered(4).split(colour)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0,6,12,18", [0, 6, 12, 18]),
        ("18, 6,6", [6, 18]),
        ("20-", [20, 21, 22, 23]),
        ("-2", [0, 1, 2]),
        ("3-5,22-", [3, 4, 5, 22, 23]),
        ("22-99", [22, 23]),
    ],
)
def test_select(text: str, expected: list[int]) -> None:
    assert select(numbered(24), text) == expected
    assert held_out(validation_split(numbered(24), text)) == expected


def test_select_takes_frame_numbers(tmp_path: Path) -> None:
    sequence(tmp_path, "01", [3, 59, 60, 83], silver=[3, 59, 60, 83], gold=[])
    dataset, _ = opened(tmp_path)
    assert select(dataset, "60-") == [2, 3]
    assert select(dataset, "3,83") == [0, 3]
    with pytest.raises(ValueError, match="frames 3 to 83"):
        select(dataset, "4")


@pytest.mark.parametrize("text", ["", "-", "a", "1,,2", "5-3", "24", "1--2", "1.5.2"])
def test_select_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="neither a number nor a range|names no image"):
        select(numbered(24), text)
    with pytest.raises(ValueError, match="--val"):
        validation_split(numbered(24), text)


def test_val_is_a_fraction_or_a_folder(tmp_path: Path) -> None:
    assert held_out(validation_split(numbered(24), "0.1667")) == [0, 6, 12, 18]
    assert held_out(validation_split(numbered(24), "1e-3")) == [0]
    assert held_out(validation_split(numbered(24), "0.0")) == []
    # One object alone would be a mask; it is read as the training labels are.
    train, _ = opened(folders(tmp_path / "train", [block(1, 2)] * 3))
    folders(tmp_path / "val", [block(7)])
    first, second = validation_split(train, str(tmp_path / "val"), notify=None)
    assert (len(first), len(second), second.kind) == (3, 1, "instances")
    assert second.samples[0].instances.max() == 7


def test_arrays_must_fit() -> None:
    with pytest.raises(ValueError, match="must agree"):
        dataset_of_arrays([np.zeros((3, 4))], [np.zeros((4, 3), int)], Meaning("binary"))
    with pytest.raises(ValueError, match="at least 1"):
        dataset_of_arrays([], [], Meaning("binary"))
