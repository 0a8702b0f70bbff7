"""The command `verify`: read every file of a data set, report all that is wrong and what the images hold."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from fastunet import command
from fastunet.data.datasets import LABELS, TRUTHS, Dataset, Sample, open_dataset
from fastunet.data.images import FileProblem

SPECK = 4  # pixels; smaller objects are more often slips of the pen than cells


@dataclass(frozen=True)
class Facts:
    """What one annotated image holds.

    Attributes
    ----------
    objects, touching : int
        Instances, and how many of them have another among their 8-neighbours.
    pixels : (K,) int64
        Pixels of each class, ignored ones left out.
    remarks : list of str
        What is no error and yet worth a look.
    digest : bytes
        Equal for images of equal pixels.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    low: float
    high: float
    objects: int
    touching: int
    pixels: np.ndarray
    remarks: list[str]
    digest: bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 when nothing is wrong, 2 otherwise."""
    parser = command.Parser(
        prog="fastunet verify",
        description="Read every file of a data set, list what each image holds, and report every problem: the "
        "file, what was found, what was expected and how to fix it.",
        epilog="The exit status is 0 when nothing is wrong and 2 otherwise. DATA is a folder with "
        "train-volume.tif and train-labels.tif, a Cell Tracking Challenge data set (01/, 01_ST/SEG, "
        "01_GT/SEG), or one with images/ and labels/ (or masks/) paired by name.",
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of the data set")
    parser.add_argument(
        "--labels",
        choices=LABELS,
        default="auto",
        help="what the labels mean; auto: two values are binary masks, more are instances (default)",
    )
    parser.add_argument("--ignore", type=int, metavar="VALUE", help="label of pixels without truth")
    parser.add_argument("--axes", help="axes of the images, such as ZYX, overriding their metadata")
    parser.add_argument(
        "--truth", choices=TRUTHS, help="Cell Tracking Challenge truth (default: silver where there is any)"
    )
    command.add_common_options(parser, device=False)
    return command.run(parser, _verify, argv)


def _verify(arguments: argparse.Namespace) -> int:
    problems: list[FileProblem] = []
    notices: list[str] = []
    facts: list[Facts] = []
    try:
        dataset = open_dataset(
            arguments.data,
            arguments.labels,
            arguments.ignore,
            arguments.axes,
            arguments.truth,
            notify=None if arguments.quiet else notices.append,
            on_problem=problems.append,
        )
        facts = [
            examine(sample)
            for sample in tqdm(
                dataset.samples, "examining", leave=False, delay=1, disable=True if arguments.quiet else None
            )
        ]
        if not arguments.quiet:
            print("\n".join(_describe(dataset, facts, notices)))
    except FileProblem as problem:
        problems.append(problem)
    if problems or not arguments.quiet:
        print("\n".join(_tell_problems(problems)), file=sys.stderr if problems else sys.stdout)
    return command.USER_MISTAKE if problems else 0


def examine(sample: Sample) -> Facts:
    """Gather the facts of one annotated image."""
    image, instances, classes, ignored = sample.image, sample.instances, sample.classes, sample.ignored
    known = classes.ravel() if ignored is None else classes[~ignored]
    windows = ndimage.find_objects(instances)
    numbers = [number for number, window in enumerate(windows, 1) if window is not None]
    sizes = np.bincount(instances.ravel())
    low, high = image.min(), image.max()

    remarks = []
    if low == high:
        remarks.append(f"every pixel is {low}")
    if not known.size:
        remarks.append("every pixel is ignored")
    elif not numbers:
        remarks.append("no object")
    elif (known > 0).all():
        remarks.append("no background")
    if sample.meaning.kind == "instances":
        scattered = [
            number
            for number in numbers
            if ndimage.label(instances[windows[number - 1]] == number, np.ones((3, 3)))[1] > 1
        ]
        if scattered:
            remarks.append(f"{_count(scattered, 'object')} in several pieces ({_some(scattered)})")
    specks = [number for number in numbers if sizes[number] < SPECK]
    if specks:
        remarks.append(f"{_count(specks, 'object')} of fewer than {SPECK} pixels")
    return Facts(
        sample.name,
        sample.shape,
        image.dtype,
        low.item(),
        high.item(),
        len(numbers),
        len(_touching(instances)),
        np.bincount(known, minlength=len(sample.meaning.class_names)),
        remarks,
        blake2b(np.ascontiguousarray(image), digest_size=16, key=str(image.shape).encode()).digest(),
    )


def _touching(instances: np.ndarray) -> set[int]:
    """Numbers of the instances that have another among their 8-neighbours."""
    found: set[int] = set()
    height, width = instances.shape
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one = instances[: height - down, max(0, -right) : width - max(0, right)]
        other = instances[down:, max(0, right) : width - max(0, -right)]
        meet = (one != other) & (one > 0) & (other > 0)
        found.update(one[meet].tolist(), other[meet].tolist())
    return found


def _describe(dataset: Dataset, facts: Sequence[Facts], notices: Iterable[str]) -> list[str]:
    rows = [("image", "size", "type", "range", "objects", "touching", "object", "remarks")]
    for one in facts:
        height, width, channels = one.shape
        size = f"{height}x{width}" + (f"x{channels}" if channels > 1 else "")
        share = f"{one.pixels[1:].sum() / max(1, one.pixels.sum()):.1%}"
        row = (
            one.name,
            size,
            str(one.dtype),
            f"{one.low:g}..{one.high:g}",
            str(one.objects),
            str(one.touching),
        )
        rows.append((*row, share, "; ".join(one.remarks)))
    pixels = np.sum([one.pixels for one in facts], axis=0)
    balance = ", ".join(
        f"{name} {count / max(1, pixels.sum()):.1%}" for name, count in zip(dataset.class_names, pixels)
    )
    touching, objects = sum(one.touching for one in facts), sum(one.objects for one in facts)
    lines = [
        *notices,
        *_table(rows, left=(0, 7)),
        "",
        f"{_count(facts, 'image')} ({dataset.layout}, {dataset.kind}); {objects} objects, {touching} touching",
        f"pixels: {balance}",
    ]
    first: dict[bytes, str] = {}
    for one in facts:
        if one.digest in first:
            lines.append(
                f"{one.name} is the same image as {first[one.digest]}: keep both on one side of a split"
            )
        first.setdefault(one.digest, one.name)
    return lines


def _table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Align columns: those named in `left` to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def _tell_problems(problems: Sequence[FileProblem]) -> list[str]:
    if not problems:
        return ["no problem was found"]
    lines = []
    for problem in problems:
        rows = (
            ("file", str(problem.path)),
            ("found", problem.found),
            ("expected", problem.expected),
            ("fix", problem.fix),
        )
        lines += [*_table(rows, left=(0, 1)), ""]
    return [*lines, f"{_count(problems, 'problem')}"]


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")


if __name__ == "__main__":
    sys.exit(main())
