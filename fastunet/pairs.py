"""Truth and prediction files, paired image by image."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastunet.data.images import Image, find_images, is_image, read_array, read_labels, stem
from fastunet.errors import DataError

# Softmax in float32 and means over rotations may overshoot 0..1 by rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Pair:
    """A truth image and its prediction.

    Attributes
    ----------
    truth : Image
        Labels (H, W).
    path : Path
        The prediction's file.
    prediction : (H, W) integer labels, or (K, H, W) probabilities
    """

    truth: Image
    path: Path
    prediction: NDArray[Any]

    def ignored(self, value: int | None) -> NDArray[np.bool_]:
        """Pixels (H, W) whose truth is the ignore value."""
        return np.zeros(self.truth.pixels.shape, bool) if value is None else self.truth.pixels == value


def read_pairs(truth: Path, pred: Path, selection: str | None = None, quiet: bool = False) -> list[Pair]:
    """Read truth and prediction and pair them image by image.

    Parameters
    ----------
    truth, pred : Path
        Each a file, a stack or a folder. One file on each side is a pair; Cell Tracking Challenge truth
        (man_seg012.tif) pairs by the number that ends a prediction's name, other files by their stem.
    selection : str, optional
        The images to read, such as "0,6,12" or "60-": frame numbers of a Cell Tracking Challenge folder, else
        positions from 0. A stack of predictions then holds all images of the truth or just these.
    quiet : bool
        No progress bar.

    Raises
    ------
    DataError
        If a file cannot be read, a truth has no prediction, or they differ in number or size.
    ValueError
        If the selection is malformed or names no image.
    """
    truth_files, pred_files = find_images(_label_folder(truth)), find_images(_label_folder(pred))
    by_frame = all(is_tracking_truth(path) for path in truth_files)
    if len(truth_files) == len(pred_files) == 1:
        partners = {truth_files[0]: pred_files[0]}
    else:
        partners = _partners(truth_files, pred_files, _frame_number if by_frame else stem)

    pages = {
        path: read_labels(path)
        for path in tqdm(truth_files, "reading truth", leave=False, delay=1, disable=quiet or None)
    }
    numbers: list[tuple[Path, int]] = []
    for path in truth_files:
        for _ in pages[path]:
            numbers.append((path, _frame_number(path) if by_frame else len(numbers)))
    chosen = _select([number for _, number in numbers], selection)

    pairs: list[Pair] = []
    first = 0
    for path in tqdm(truth_files, "reading prediction", leave=False, delay=1, disable=quiet or None):
        truths = pages[path]
        kept = [page for page in range(len(truths)) if first + page in chosen]
        first += len(truths)
        if not kept:
            continue
        if path not in partners:
            what = f"a name that ends in {_frame_number(path):03d}" if by_frame else f"the name {stem(path)}"
            raise DataError(
                f"{pred}: no prediction for {path}, a file of {what} is expected; predict it too, or score "
                "other images only with --select"
            )
        predictions = _read_predictions(partners[path], truths, kept)
        pairs.extend(Pair(truths[page], partners[path], found) for page, found in zip(kept, predictions))
    if len({pair.prediction.dtype.kind == "f" for pair in pairs}) > 1:
        raise DataError(f"{pred}: some files hold probabilities and others labels; give one kind")
    return pairs


def is_tracking_truth(path: Path) -> bool:
    """Whether a file is named as truth of the Cell Tracking Challenge."""
    return re.fullmatch(r"man_seg[0-9]+", stem(path)) is not None


def _label_folder(path: Path) -> Path:
    """Descend from a data set's folder to its labels: the stack's, or a folder's that has no images of its own."""
    if (path / "train-labels.tif").is_file():
        return path / "train-labels.tif"
    if path.is_dir() and not any(is_image(entry) for entry in path.iterdir()):
        for name in ("SEG", "labels", "masks"):
            if (path / name).is_dir():
                return path / name
    return path


def _partners(
    truth_files: list[Path], pred_files: list[Path], key: Callable[[Path], int | str]
) -> dict[Path, Path]:
    by_key: dict[int | str, Path] = {}
    for path in pred_files:
        other = by_key.setdefault(key(path), path)
        if other != path and key(path) != -1:
            raise DataError(
                f"{path}: {other.name} pairs with the same truth; leave one prediction for each in the folder"
            )
    return {path: by_key[key(path)] for path in truth_files if key(path) in by_key}


def _frame_number(path: Path) -> int:
    """Return the number that ends a file's name, -1 where there is none."""
    match = re.search(r"[0-9]+$", stem(path))
    return int(match[0]) if match else -1


def _select(numbers: list[int], text: str | None) -> set[int]:
    """Find the indices of the images whose numbers a list such as "0,6,10-12,60-" names."""
    if text is None:
        return set(range(len(numbers)))
    chosen: set[int] = set()
    for piece in (piece.strip() for piece in text.split(",")):
        match = re.fullmatch(r"([0-9]+)|([0-9]*)-([0-9]*)", piece)
        if match is None or piece == "-":
            raise ValueError(f"--select {text}: {piece!r} is no number and no range such as 10-19 or 60-")
        low, high = int(match[1] or match[2] or 0), int(match[1] or match[3] or max(numbers))
        found = {index for index, number in enumerate(numbers) if low <= number <= high}
        if not found:
            raise ValueError(
                f"--select {text}: {piece!r} names no image; the truth has {min(numbers)} to {max(numbers)}"
            )
        chosen |= found
    return chosen


def _read_predictions(path: Path, truths: list[Image], kept: list[int]) -> list[NDArray[Any]]:
    """Read the predictions (H, W) or (K, H, W) of the `kept` ones among the images of a truth file."""
    array = read_array(path)
    if array.dtype.kind == "f":
        images = _probabilities(path, array, truths, kept)
    else:
        images = [image.pixels for image in read_labels(path)]
    if len(images) == len(truths):
        images = [images[page] for page in kept]
    elif len(images) != len(kept):
        raise DataError(
            f"{path}: holds {len(images)} images (its array is {_size(array.shape)}) and the truth "
            f"{truths[0].path} {len(truths)}; predict the same images, or choose among them with --select"
        )
    for page, image in zip(kept, images):
        if image.shape[-2:] != truths[page].pixels.shape:
            raise DataError(
                f"{path}: an image is {_size(image.shape[-2:])} pixels (its array is {_size(array.shape)}) "
                f"and in the truth {truths[page].path} {_size(truths[page].pixels.shape)}; predict the image "
                "that was annotated, or crop the truth likewise"
            )
    return images


def _probabilities(
    path: Path, array: NDArray[Any], truths: list[Image], kept: list[int]
) -> list[NDArray[Any]]:
    """Split an array of probabilities into images (K, H, W)."""
    size = truths[0].pixels.shape
    if array.ndim in (3, 4) and array.shape[-2:] != size and array.shape[-3:-1] == size:
        array = np.moveaxis(array, -1, -3)  # classes last, as the Predictor returns them
    low, high = float(array.min()), float(array.max())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        found = "NaN" if math.isnan(low) else f"floating-point values from {low:g} to {high:g}"
        raise DataError(
            f"{path}: holds {found}, probabilities from 0 to 1 are expected; save probabilities after the "
            "softmax, and labels as integers"
        )
    if array.ndim == 2:
        return [array[None]]
    if array.ndim == 4:
        return list(array)
    if array.ndim != 3:
        raise DataError(
            f"{path}: its array is {_size(array.shape)}, (K, H, W) for an image or (N, K, H, W) for a stack "
            "is expected; save it so"
        )
    # The images of a stack of foreground probabilities, or the classes of one image.
    is_stack = len(truths) > 1 and len(array) in (len(truths), len(kept))
    return list(array[:, None]) if is_stack else [array]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
