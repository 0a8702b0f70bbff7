"""Annotated data sets: folders in one of three layouts, recognised by itself, as pairs of image and labels.

- volume: `train-volume.tif` and `train-labels.tif`, stacks of the same length (ISBI 2012);
- ctc: sequences `01/t000.tif` with silver truth in `01_ST/SEG/man_seg000.tif` or gold truth in `01_GT/SEG`
  (Cell Tracking Challenge);
- folders: `images/` with `labels/` or `masks/`, paired by name.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from fastunet.data.images import (
    SUFFIXES,
    FileProblem,
    Image,
    is_image,
    natural_key,
    notice,
    read_images,
    read_labels,
    stem,
)

LABELS = ("auto", "binary", "instances", "classes")
TRUTHS = {"silver": "ST", "gold": "GT"}
LAYOUTS = (
    "train-volume.tif + train-labels.tif, or 01/t000.tif + 01_ST/SEG or 01_GT/SEG (Cell Tracking Challenge), "
    "or images/ + labels/ (or masks/) paired by name"
)
TWO_CLASSES = ("background", "object")
LARGE_LABEL = 65535  # up to here a table with one entry for each label is small


@dataclass(frozen=True)
class Meaning:
    """What the numbers in a data set's labels mean.

    Attributes
    ----------
    kind : "binary", "instances" or "classes"
    class_names : tuple of str
        One for each class; its length is the number of classes.
    ignore : int or None
        The label of pixels without truth.
    """

    kind: str
    class_names: tuple[str, ...] = TWO_CLASSES
    ignore: int | None = None

    def ignored(self, labels: np.ndarray) -> np.ndarray | None:
        """Pixels (H, W) bool without truth, or None where there is no ignore value."""
        return None if self.ignore is None else labels == self.ignore

    def classes(self, labels: np.ndarray) -> np.ndarray:
        """Classes (H, W) uint8, without gaps between touching objects; ignored pixels are 0."""
        known = self._known(labels)
        return (known if self.kind == "classes" else known != 0).astype(np.uint8)

    def instances(self, labels: np.ndarray) -> np.ndarray:
        """Instances (H, W) int32, 0 = background or ignored.

        Those of a binary mask and of each foreground class are its 4-connected components. Labels get other
        numbers only where they exceed both the number of pixels and 65535.
        """
        if self.kind == "instances":
            known = self._known(labels)
            if known.max() > max(known.size, LARGE_LABEL):
                values, numbers = np.unique(known, return_inverse=True)
                known = numbers.reshape(known.shape) + (values[0] != 0)
            return known.astype(np.int32)
        classes = self.classes(labels)
        instances, count = np.zeros(labels.shape, np.int32), 0
        for value in range(1, len(self.class_names)):
            components, found = ndimage.label(classes == value)
            instances += np.where(components > 0, components + count, 0).astype(np.int32)
            count += found
        return instances

    def _known(self, labels: np.ndarray) -> np.ndarray:
        return labels if self.ignore is None else np.where(labels == self.ignore, 0, labels)


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated image. Its files are read when an array is asked for; do not write into the arrays.

    Attributes
    ----------
    name : str
    number : int
        The frame number in the file's name (Cell Tracking Challenge), else the position in sorted order.
    shape : (H, W, C)
    files : tuple of Path
        Image and labels; empty where the arrays came from memory.
    """

    name: str
    number: int
    shape: tuple[int, int, int]
    files: tuple[Path, ...]
    meaning: Meaning
    load_image: Callable[[], np.ndarray]
    load_labels: Callable[[], np.ndarray]

    @property
    def image(self) -> np.ndarray:
        """Pixels (H, W, C) of the file's type."""
        return self.load_image()

    @property
    def labels(self) -> np.ndarray:
        """Labels (H, W) as they are stored."""
        return self.load_labels()

    @property
    def ignored(self) -> np.ndarray | None:
        """Pixels (H, W) bool without truth, or None where the data set has no ignore value."""
        return self.meaning.ignored(self.labels)

    @property
    def classes(self) -> np.ndarray:
        """Classes (H, W) uint8, as `Meaning.classes`."""
        return self.meaning.classes(self.labels)

    @property
    def instances(self) -> np.ndarray:
        """Instances (H, W) int32, as `Meaning.instances`."""
        return self.meaning.instances(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Annotated images with labels of one meaning.

    Attributes
    ----------
    layout : "volume", "ctc", "folders" or "arrays"
    samples : list of Sample
    meaning : Meaning
    """

    layout: str
    samples: list[Sample]
    meaning: Meaning

    @property
    def kind(self) -> str:
        """What labels are: "binary", "instances" or "classes"."""
        return self.meaning.kind

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name for each class, background first."""
        return self.meaning.class_names

    @property
    def num_classes(self) -> int:
        """Classes, background included: 2 for binary masks and instances."""
        return len(self.meaning.class_names)

    @property
    def ignore(self) -> int | None:
        """The label of pixels without truth."""
        return self.meaning.ignore

    @property
    def in_channels(self) -> int:
        """Channels of every image."""
        return self.samples[0].shape[2]

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, indices: Sequence[int]) -> "Dataset":
        """Return the data set of these samples, in the order given."""
        return replace(self, samples=[self.samples[index] for index in indices])

    def split(self, val: "float | Sequence[int] | Dataset" = 0.1) -> tuple["Dataset", "Dataset"]:
        """Split into training and validation images.

        Parameters
        ----------
        val : float, sequence of int or Dataset
            A fraction: every so many images, spread over the whole (neighbours in a stack look alike, its two
            ends may not), at least one of two or more. Indices: these. A data set: that one; all of this is
            for training.

        Returns
        -------
        train, val : Dataset
            `val` is empty for the fraction 0 and for a single image.

        Raises
        ------
        ValueError
            If the fraction is not in [0, 1), nothing is left for training, or the other data set has other
            channels or classes.
        IndexError
            If an index does not exist.
        """
        if isinstance(val, Dataset):
            if (val.in_channels, val.num_classes) != (self.in_channels, self.num_classes):
                raise ValueError(
                    f"the validation images have {val.in_channels} channels and {val.num_classes} classes, "
                    f"the training images {self.in_channels} and {self.num_classes}; both must be the same"
                )
            return self, val
        total = len(self.samples)
        if isinstance(val, (float, int)):
            if not 0 <= val < 1:
                raise ValueError(
                    f"a validation fraction of {val} was given; it must be at least 0 and below 1"
                )
            count = min(max(1, round(val * total)), total - 1) if val else 0
            held_out = [k * total // count for k in range(count)]
        else:
            held_out = sorted({range(total)[index] for index in val})
        chosen = set(held_out)
        rest = [index for index in range(total) if index not in chosen]
        if not rest:
            raise ValueError(
                f"all {total} images were chosen for validation; leave at least one for training"
            )
        return self.subset(rest), self.subset(held_out)


def open_dataset(
    path: Path | str,
    labels: str = "auto",
    ignore: int | None = None,
    axes: str | None = None,
    truth: str | None = None,
    class_names: Sequence[str] | None = None,
    notify: Callable[[str], None] | None = notice,
    on_problem: Callable[[FileProblem], None] | None = None,
) -> Dataset:
    """Open a folder of annotated images and check every file in it.

    Parameters
    ----------
    path : path
        A folder in one of the three layouts.
    labels : "auto", "binary", "instances" or "classes"
        auto: labels of at most one value besides 0 in the whole data set are binary masks, others instances.
        classes: 0..K-1.
    ignore : int, optional
        The label of pixels without truth.
    axes : str, optional
        Axes of the images, as in `fastunet.data.images.read_images`.
    truth : "silver" or "gold", optional
        Cell Tracking Challenge only; by default silver for each sequence that has it, else gold.
    class_names : sequence of str, optional
        Background first. With `labels` = "classes" they fix the number of classes.
    notify : callable or None
        Takes what is worth knowing; None: neither notices nor a progress bar.
    on_problem : callable, optional
        Takes each problem with a file, which is then left out; by default the first is raised.

    Returns
    -------
    Dataset
        Samples in natural order.

    Raises
    ------
    DataError
        If the folder has no known layout or no usable pair, and for the first problem with a file.
    ValueError
        If an argument is not one of those above.
    """
    path = Path(path)
    if labels not in LABELS:
        raise ValueError(f"labels {labels!r} is not one of {', '.join(LABELS)}")
    if truth not in (None, *TRUTHS):
        raise ValueError(f"truth {truth!r} is not one of {', '.join(TRUTHS)}")
    tell = notify or _nothing
    report = on_problem or _raise
    layout, pairs = _find_pairs(path, truth, tell, report)

    unfinished: list[Sample] = []
    seen: dict[int, Path] = {}  # every label with the first file that holds it
    for pair in tqdm(
        pairs, desc="reading", unit="file", leave=False, delay=1, disable=True if notify is None else None
    ):
        try:
            for sample in _read_pair(pair, axes, len(unfinished), layout, tell):
                if unfinished and sample.shape[2] != unfinished[0].shape[2]:
                    raise FileProblem(
                        sample.files[0],
                        f"{sample.shape[2]} channels",
                        f"the {unfinished[0].shape[2]} of {unfinished[0].files[0]}",
                        "give all images the same channels, or say with --axes what the axes are",
                    )
                for value in np.unique(sample.labels).tolist():
                    seen.setdefault(value, sample.files[1])
                unfinished.append(sample)
        except FileProblem as problem:
            report(problem)
    if not unfinished:
        raise FileProblem(path, "no usable pair of image and labels", "at least one", "mend its files")
    meaning = find_meaning(path, seen, labels, ignore, class_names, tell)
    return Dataset(layout, [replace(sample, meaning=meaning) for sample in unfinished], meaning)


def find_meaning(
    path: Path,
    seen: Mapping[int, Path],
    labels: str = "auto",
    ignore: int | None = None,
    class_names: Sequence[str] | None = None,
    notify: Callable[[str], None] = notice,
) -> Meaning:
    """Decide what labels mean from all that occur.

    Parameters
    ----------
    path : path
        What the labels belong to, for notices.
    seen : mapping of int to path
        Every label with a file that holds it.
    labels, ignore, class_names, notify
        As in `open_dataset`.

    Raises
    ------
    DataError
        If the labels are not of the kind asked for.
    ValueError
        If there are other names than classes.
    """
    if ignore is not None and ignore not in seen:
        notify(f"{path}: no label has the ignore value {ignore}")
    values = sorted(seen.keys() - {ignore})
    foreground = [value for value in values if value != 0]
    text = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
    if not foreground:
        raise FileProblem(
            path, "labels without any object", "labels other than 0 somewhere", "label some objects"
        )
    if values[0] < 0:
        fix = f"give --ignore {values[0]} if it marks pixels without truth"
        raise FileProblem(seen[values[0]], f"the label {values[0]}", "labels of at least 0", fix)
    if labels == "auto" and len(values) == 2 and 0 not in seen:
        file = seen[values[0]]
        fix = "save them as 0 and 1, or give --labels instances"
        raise FileProblem(file, f"the labels {text} and no 0 in any file", "0 for the background", fix)

    if labels == "classes":
        if class_names is None and len(foreground) != values[-1]:
            fix = "number the classes from 0 without gaps, or name them all with --class-names"
            raise FileProblem(
                seen[values[-1]], f"the labels {text} up to {values[-1]}", "classes 0..K-1", fix
            )
        count = len(class_names) if class_names else values[-1] + 1
        if values[-1] >= min(count, 256):
            fix = "number the classes from 0 without gaps, or give --labels instances"
            raise FileProblem(
                seen[values[-1]], f"the label {values[-1]}", f"classes 0..{min(count, 256) - 1}", fix
            )
        names = class_names or ("background", *(f"class {value}" for value in range(1, count)))
        return Meaning("classes", tuple(names), ignore)
    if class_names is not None and len(class_names) != 2:
        raise ValueError(
            f"{len(class_names)} class names were given ({', '.join(class_names)}), {labels} labels have 2; "
            "give 2 names or --labels classes"
        )
    names = tuple(class_names or TWO_CLASSES)
    if labels == "binary" or (labels == "auto" and len(foreground) == 1):
        if len(foreground) > 1:
            fix = "give --labels instances or classes"
            raise FileProblem(seen[values[-1]], f"the labels {text}", "masks of two values", fix)
        notify(f"{path}: labels are masks of two values, 0 = {names[0]} and {foreground[0]} = {names[1]}")
        return Meaning("binary", names, ignore)
    if labels == "auto":
        notify(f"{path}: labels are instances (up to {values[-1]}), each value one object")
    return Meaning("instances", names, ignore)


def dataset_of_arrays(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    meaning: Meaning,
    names: Sequence[str] | None = None,
) -> Dataset:
    """Make a data set of arrays in memory.

    Parameters
    ----------
    images : sequence of (H, W) or (H, W, C)
    labels : sequence of (H, W) integers
    meaning : Meaning
    names : sequence of str, optional
        Default: "image 0" and so on.

    Raises
    ------
    ValueError
        If there is no image, or an image and its labels differ in size.
    """
    if not images or len(images) != len(labels):
        raise ValueError(
            f"{len(images)} images and {len(labels)} labels were given; they must be as many, at least 1"
        )
    samples = []
    for number, (image, label) in enumerate(zip(images, labels)):
        pixels = image[..., None] if image.ndim == 2 else image
        name = names[number] if names else f"image {number}"
        if pixels.shape[:2] != label.shape:
            raise ValueError(f"{name} is {pixels.shape[:2]}, its labels are {label.shape}; they must agree")
        samples.append(Sample(name, number, pixels.shape, (), meaning, _constant(pixels), _constant(label)))
    return Dataset("arrays", samples, meaning)


def select(dataset: Dataset, text: str) -> list[int]:
    """Find the samples that a list of numbers and ranges names.

    Parameters
    ----------
    dataset : Dataset
    text : str
        Such as "0,6,12", "10-19", "60-" or "-9", both ends included. Numbers are those of the file names
        in a Cell Tracking Challenge data set, positions from 0 in all others.

    Returns
    -------
    list of int
        Indices, ascending.

    Raises
    ------
    ValueError
        If the text is something else, or names no image.
    """
    numbers = [sample.number for sample in dataset.samples]
    chosen: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*|\s*([0-9]*)\s*-\s*([0-9]*)\s*", piece)
        if not match or piece.strip() in ("", "-"):
            raise ValueError(
                f"{piece!r} in {text!r} is neither a number nor a range such as 10-19, 60- or -9"
            )
        one, first, last = match.groups()
        low = int(one or first or 0)
        high = int(one or last or max(numbers))
        found = {index for index, number in enumerate(numbers) if low <= number <= high}
        if not found:
            kind = "frames" if dataset.layout == "ctc" else "images"
            raise ValueError(
                f"{piece.strip()!r} names no image; {kind} {min(numbers)} to {max(numbers)} are there"
            )
        chosen |= found
    return sorted(chosen)


def validation_split(
    dataset: Dataset,
    text: str,
    axes: str | None = None,
    truth: str | None = None,
    notify: Callable[[str], None] | None = notice,
) -> tuple[Dataset, Dataset]:
    """Split as the option --val says.

    Parameters
    ----------
    dataset : Dataset
    text : str
        A folder (another data set), a fraction (written with a point: "0.1"), or what `select` takes.
    axes, truth, notify
        As in `open_dataset`, for a folder.

    Returns
    -------
    train, val : Dataset

    Raises
    ------
    DataError, ValueError
        As `open_dataset`, `select` and `Dataset.split`.
    """
    if text and Path(text).is_dir():
        other = open_dataset(text, dataset.kind, dataset.ignore, axes, truth, dataset.class_names, notify)
        try:
            return dataset.split(other)
        except ValueError as error:
            raise ValueError(f"--val {text}: {error}") from None
    if re.fullmatch(r"[0-9]*\.[0-9]*|[0-9.]+e-?[0-9]+", text) and text != ".":
        try:
            return dataset.split(float(text))
        except ValueError as error:
            raise ValueError(f"--val {text}: {error}") from None
    try:
        return dataset.split(select(dataset, text))
    except ValueError as error:
        raise ValueError(f"--val: {error}; a fraction (0.1) or a folder will do, too") from None


@dataclass(frozen=True)
class _Pair:
    """An image file and the file of its labels, before either is read."""

    prefix: str
    image: Path
    labels: Path
    frame: int = 0
    plane: int | None = None  # the only annotated one of a 3-D frame


def _find_pairs(
    path: Path, truth: str | None, tell: Callable[[str], None], report: Callable[[FileProblem], None]
) -> tuple[str, list[_Pair]]:
    """Recognise the layout of a folder and pair its files."""
    layout = _layout(path)
    if layout == "volume":
        volume, labels = _volume_file(path, "train-volume"), _volume_file(path, "train-labels")
        assert volume is not None
        if labels is None:
            raise FileProblem(
                path, f"{volume.name} without labels", "train-labels.tif beside it", "add the labels"
            )
        return layout, [_Pair("", volume, labels)]
    if layout == "folders":
        return layout, _pair_folders(path, tell, report)
    if layout == "ctc":
        return layout, _pair_sequences(path, truth, tell)
    raise _unknown_layout(path)


def _layout(path: Path) -> str | None:
    if _volume_file(path, "train-volume"):
        return "volume"
    if (path / "images").is_dir():
        return "folders"
    return "ctc" if path.is_dir() and _sequences(path) else None


def _unknown_layout(path: Path) -> FileProblem:
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing is there"
        return FileProblem(path, found, f"a folder with {LAYOUTS}", "give the folder of a data set")
    entries = sorted((entry for entry in path.iterdir() if not entry.name.startswith(".")), key=natural_key)
    names = [entry.name + "/" * entry.is_dir() for entry in entries]
    found = (
        f"a folder with {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        if names
        else "an empty folder"
    )
    inside = next((entry for entry in entries if entry.is_dir() and _layout(entry)), None)
    fix = f"give one of the data sets in it, such as {inside}" if inside else "arrange the files so"
    if not inside and path.parent != path and _layout(path.parent):
        fix = f"give {path.parent}"
    return FileProblem(path, found, LAYOUTS, fix)


def _volume_file(path: Path, name: str) -> Path | None:
    return next((path / (name + suffix) for suffix in SUFFIXES if (path / (name + suffix)).is_file()), None)


def _pair_folders(
    path: Path, tell: Callable[[str], None], report: Callable[[FileProblem], None]
) -> list[_Pair]:
    folders = [folder for folder in (path / "labels", path / "masks") if folder.is_dir()]
    if len(folders) != 1:
        found = "images/ with both labels/ and masks/" if folders else "images/ alone"
        raise FileProblem(
            path, found, "images/ with labels/ or masks/", "keep one" if folders else "add the labels"
        )
    images = _by_stem(path / "images", tell, report)
    labels = _by_stem(folders[0], tell, report)
    for name in sorted(images.keys() ^ labels.keys(), key=natural_key):
        alone, missing = (images, folders[0]) if name in images else (labels, path / "images")
        expected = f"{missing / name}.tif, .png or .npy"
        report(
            FileProblem(
                alone[name], "no file of that name to pair it with", expected, "add it or take this out"
            )
        )
    return [
        _Pair("", images[name], labels[name])
        for name in sorted(images.keys() & labels.keys(), key=natural_key)
    ]


def _by_stem(
    folder: Path, tell: Callable[[str], None], report: Callable[[FileProblem], None]
) -> dict[str, Path]:
    files: dict[str, Path] = {}
    others = set()
    for file in sorted(folder.iterdir(), key=natural_key):
        if not is_image(file):
            if not file.name.startswith("."):
                others.add(file.suffix or file.name)
        elif stem(file) in files:
            report(
                FileProblem(
                    file, "a second file of this name", f"only {files[stem(file)].name}", "take one out"
                )
            )
        else:
            files[stem(file)] = file
    if others:
        tell(f"{folder}: left out what is no TIFF, PNG or NPY file ({', '.join(sorted(others))})")
    return files


def _sequences(path: Path) -> list[Path]:
    """Folders of frames t000.tif, t001.tif, ... of a Cell Tracking Challenge data set."""
    return sorted(
        folder
        for folder in path.iterdir()
        if re.fullmatch("[0-9]{2,}", folder.name) and folder.is_dir() and any(_numbered(folder, "t([0-9]+)"))
    )


def _numbered(folder: Path, pattern: str) -> Iterator[tuple[re.Match[str], Path]]:
    """Image files whose stem matches, in natural order."""
    for file in sorted(folder.iterdir() if folder.is_dir() else (), key=natural_key):
        match = re.fullmatch(pattern, stem(file))
        if match and is_image(file):
            yield match, file


def _pair_sequences(path: Path, truth: str | None, tell: Callable[[str], None]) -> list[_Pair]:
    pairs = []
    for sequence in _sequences(path):
        frames = {int(match[1]): file for match, file in _numbered(sequence, "t([0-9]+)")}
        labels: list[tuple[re.Match[str], Path]] = []
        for name in (truth,) if truth else TRUTHS:
            labels = list(
                _numbered(path / f"{sequence.name}_{TRUTHS[name]}" / "SEG", "man_seg_?([0-9]+)(?:_([0-9]+))?")
            )
            if labels:
                break
        if not labels:
            tell(f"{sequence}: no {truth or 'silver or gold'} truth, left out")
            continue
        kind = f"{name} truth" + (" (0 may mean not annotated)" if name == "gold" else "")
        unlabelled = sorted(frames.keys() - {int(match[1]) for match, _ in labels})
        left_out = f"; frames without it are left out: {_ranges(unlabelled)}" if unlabelled else ""
        tell(f"{sequence}: {kind} from {labels[0][1].parent}{left_out}")
        orphans = [file.name for match, file in labels if int(match[1]) not in frames]
        if orphans:
            tell(f"{labels[0][1].parent}: labels without a frame are left out: {', '.join(orphans)}")
        for match, file in labels:
            frame = int(match[1])
            if frame in frames:
                plane = None if match[2] is None else int(match[2])
                pairs.append(_Pair(f"{sequence.name}/", frames[frame], file, frame, plane))
    if not pairs:
        expected = "labels such as 01_ST/SEG/man_seg000.tif or 01_GT/SEG/man_seg000.tif for frame 01/t000.tif"
        found = f"frames without any {truth + ' ' if truth else ''}truth"
        raise FileProblem(
            path, found, expected, "add the labels" if truth is None else "choose the other truth"
        )
    return pairs


def _read_pair(
    pair: _Pair, axes: str | None, position: int, layout: str, tell: Callable[[str], None]
) -> list[Sample]:
    """Read a pair of files once to check that they fit; samples read them again."""
    images = read_images(pair.image, axes, tell)
    labels = read_labels(pair.labels, axes)
    if pair.plane is not None:
        if pair.plane >= len(images):
            found = f"labels of plane {pair.plane} for the {len(images)} of {pair.image}"
            raise FileProblem(pair.labels, found, "a plane the frame has", "take the file out")
        images = images[pair.plane : pair.plane + 1]
    if len(images) != len(labels):
        found = f"{len(labels)} label images for the {len(images)} in {pair.image}"
        raise FileProblem(pair.labels, found, "as many", "pair them page by page, or give --axes")
    samples = []
    for page, (image, label) in enumerate(zip(images, labels)):
        height, width = image.pixels.shape[:2]
        if label.pixels.shape != (height, width):
            sizes = _size(label.pixels), _size(image.pixels)
            found = f"{label.name} is {sizes[0]}, {image.name} in {pair.image} is {sizes[1]}"
            fix = "transpose the labels" if label.pixels.shape == (width, height) else "resample the labels"
            raise FileProblem(pair.labels, found, "labels of the image's size", fix)
        samples.append(
            Sample(
                name=pair.prefix + image.name,
                number=pair.frame if layout == "ctc" else position + page,
                shape=(height, width, image.pixels.shape[2]),
                files=(pair.image, pair.labels),
                meaning=Meaning("binary"),  # the caller puts in the right one when it has seen all labels
                load_image=_page_of(pair.image, axes, page + (pair.plane or 0), labels=False),
                load_labels=_page_of(pair.labels, axes, page, labels=True),
            )
        )
    return samples


@lru_cache(maxsize=8)
def _cached(path: Path, changed: int, axes: str | None, labels: bool) -> list[Image]:
    """Read a file's images once for all of its pages; a file `changed` later is read again."""
    return read_labels(path, axes) if labels else read_images(path, axes, _nothing)


def _page_of(path: Path, axes: str | None, page: int, labels: bool) -> Callable[[], np.ndarray]:
    return lambda: _cached(path, path.stat().st_mtime_ns, axes, labels)[page].pixels


def _constant(array: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: array


def _nothing(message: str) -> None:
    pass


def _raise(problem: FileProblem) -> None:
    raise problem


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
