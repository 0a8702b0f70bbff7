"""The prediction of one file, out of core: made tile by tile, taken up again after a stop, and named when whole.

Everything is made in the folder OUT.partial (fastunet.journal). Probabilities, and classes where the format has room to
put rectangles where they belong, are written in place; other results are made of the classes in passes from the top.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastunet.data.images import replace
from fastunet.data.sinks import create, open_sink, whole_array, write_strips
from fastunet.data.sources import Source, open_images
from fastunet.errors import DataError
from fastunet.instances import instances_by_strips, strip_bytes
from fastunet.journal import Journal
from fastunet.memory import format_bytes
from fastunet.predictor import SCRATCH, Predictor
from fastunet.tiling import Tile, TilePlan

RANDOM_ACCESS = (".npy", ".zarr")
LEAST_STRIP, MOST_STRIP = 16, 1024
BAND = 64


@dataclass(frozen=True)
class Wanted:
    """What is to be saved.

    Attributes
    ----------
    kind : probabilities, classes or instances
    width, min_size, fill_holes : of instances, as `fastunet.instances.find_instances` takes them
    """

    kind: str
    width: int = 1
    min_size: int = 0
    fill_holes: bool = False


class Job:
    """A file's prediction under way in its folder.

    Parameters
    ----------
    journal : Journal
    predictor : Predictor
        Of the model the journal names.
    """

    def __init__(self, journal: Journal, predictor: Predictor) -> None:
        work = journal.work
        self.journal = journal
        self.predictor = predictor
        self.wanted = Wanted(**work["wanted"])
        self.plan = TilePlan(**{name: _tuple(value) for name, value in work["plan"].items()})
        self._scales = [np.array(scales) for scales in work["scales"]]
        self._tiles = _tiles(self.plan, predictor)
        self._images: int = work["images"]
        self._source = Path(work["image"]["path"])
        self._axes: str | None = work["axes"]
        self._suffix: str = work["suffix"]
        self._opened: list[tuple[str, Source]] | None = None

    @property
    def _result(self) -> Path:
        """The file that tiles are written to."""
        in_place = _in_place(self.wanted.kind, self._suffix)
        return self.journal.folder / (f"result{self._suffix}" if in_place else "classes.npy")

    def __len__(self) -> int:
        return self._images * len(self._tiles)

    def remaining(self) -> list[int]:
        """Numbers of the tiles that are to be done."""
        finished = self.journal.finished()
        return [number for number in range(len(self)) if number not in finished]

    def run(self, chosen: Sequence[int]) -> Iterator[int]:
        """Do tiles: yields the number of each once it is done. One is read and one written while one is predicted."""
        if not chosen:
            return  # the result may have its name already
        if self._opened is None:
            self._opened = open_images(self._source, self._axes, _ignore)
        sink = open_sink(self._result)
        planes = self.predictor.model.num_classes if self.wanted.kind == "probabilities" else 1

        def save(number: int, tile: Tile, probabilities: NDArray[np.float32]) -> int:
            plane = number // len(self._tiles) * planes
            sink.write(plane, tile.top, tile.left, _as_saved(probabilities, self.wanted.kind))
            sink.flush()
            self.journal.record(number)
            return number

        saved: Future[int] | None = None
        with ThreadPoolExecutor(1) as writer:
            for image, numbers in groupby(chosen, lambda number: number // len(self._tiles)):
                batch = list(numbers)
                _, source = self._opened[image]
                tiles = [self._tiles[number % len(self._tiles)] for number in batch]
                made = self.predictor.tiles(source, self._scales[image], self.plan, tiles)
                for number in batch:
                    tile, probabilities = next(made)
                    if saved is not None:
                        yield saved.result()
                    saved = writer.submit(save, number, tile, probabilities)
                    del probabilities
                made.close()
            if saved is not None:
                yield saved.result()

    def finish(self, target: Path) -> None:
        """Once all tiles are done: make what is made in passes, and give the result its name."""
        whole = self._result
        if not _in_place(self.wanted.kind, self._suffix):
            whole = self.journal.folder / f"result{self._suffix}"
            _remove(whole)
            self.predictor.release()
            self._write_strips(whole)
        if whole.exists():  # or it has its name already, and only the folder was left
            if whole.is_file():
                with whole.open("rb") as file:
                    os.fsync(file.fileno())
            replace(whole, target)
        shutil.rmtree(self.journal.folder)

    def _write_strips(self, whole: Path) -> None:
        classes = whole_array(self._result)
        planes = classes.reshape(-1, *classes.shape[-2:])
        height, width = self.plan.image
        wanted = self.wanted
        rows = _strip_rows(width, wanted, self.plan.memory)

        def strips() -> Iterator[NDArray]:
            for plane in planes:
                if wanted.kind == "classes":
                    yield from (np.array(plane[top : top + rows]) for top in range(0, height, rows))
                else:
                    options = wanted.width, wanted.min_size, wanted.fill_holes
                    read = lambda top, bottom, plane=plane: np.array(plane[top:bottom])  # noqa: E731
                    yield from instances_by_strips(read, height, width, rows, *options)

        write_strips(whole, classes.shape, _dtype(wanted.kind), strips())


def begin(
    folder: Path, predictor: Predictor, model: Path, model_hash: str, path: Path, axes: str | None, suffix: str,
    wanted: Wanted, images: list[tuple[str, Source]], plan: TilePlan,
) -> Job:  # fmt: skip
    """Begin the prediction of a file's images in a folder: one pass over each tells how its grey values are scaled."""
    scales = []
    for name, source in images:
        try:
            scales.append(predictor.scales(source).tolist())
        except ValueError as error:
            raise DataError(f"{path}: {name}: {error}" if len(images) > 1 else f"{path}: {error}") from error
    kind, in_place = wanted.kind, _in_place(wanted.kind, suffix)
    stack = (len(images),) if len(images) > 1 else ()
    classes = (predictor.model.num_classes,) if kind == "probabilities" else ()
    shape = (*stack, *classes, *plan.image)
    dtype = _dtype(kind) if in_place else np.uint8
    needed = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(
            f"{folder}: the {kind} come to {format_bytes(needed)} and {format_bytes(free)} are free on the disk; free "
            "some, name a place on another, or save classes"
        )
    work = {
        **statement(model, model_hash, predictor, path, axes, wanted, suffix),
        "images": len(images),
        "plan": asdict(plan),
        "scales": scales,
    }
    job = Job(Journal.begin(folder, work), predictor)
    stride = plan.stride if predictor.is_tiled else plan.image
    try:
        create(job._result, shape, dtype, stride)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return job


def resume(
    folder: Path, predictor: Predictor, model: Path, model_hash: str, path: Path, axes: str | None, suffix: str,
    wanted: Wanted,
) -> Job:  # fmt: skip
    """Take up a prediction again.

    Raises
    ------
    DataError
        If it was begun with another model, image or option, or needs more memory than is allowed now.
    """
    journal = Journal(folder)
    asked = statement(model, model_hash, predictor, path, axes, wanted, suffix)
    for name, now in asked.items():
        then = journal.work.get(name)
        if name == "model" or then == now:
            continue
        raise DataError(
            f"{folder}: it was begun with another {name} ({_short(then)}, now {_short(now)}); give the same again, or "
            "--overwrite to begin anew"
        )
    job = Job(journal, predictor)
    if predictor.tile != "auto" and max(job.plan.tile) > int(predictor.tile):
        tile = "x".join(map(str, job.plan.tile))
        raise DataError(f"{folder}: it was begun with tiles of {tile}; leave --tile out, or use --overwrite")
    if predictor.memory is not None and job.plan.memory > predictor.memory:
        raise DataError(
            f"{folder}: its tiles take {format_bytes(job.plan.memory)} and {format_bytes(predictor.memory)} are "
            "allowed; allow more, or use --overwrite to begin anew"
        )
    return job


def statement(
    model: Path, model_hash: str, predictor: Predictor, path: Path, axes: str | None, wanted: Wanted, suffix: str
) -> dict[str, Any]:  # fmt: skip
    """What decides the result's bits."""
    state = (path / "zarr.json" if (path / "zarr.json").is_file() else path).stat()
    return {
        "model": str(model.resolve()),
        "model file": model_hash,
        "image": {"path": str(path.resolve()), "bytes": state.st_size, "modified": state.st_mtime_ns},
        "axes": axes,
        "suffix": suffix,
        "wanted": asdict(wanted),
        "rotations": predictor.rotations,
        "kernels": predictor.kernels,
    }


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def planned_bytes(plan: TilePlan, wanted: Wanted) -> int:
    """The most memory that a job takes at any time: for its tiles, or for instances thereafter."""
    if wanted.kind != "instances":
        return plan.memory
    return max(
        plan.memory, _strips_bytes(plan.image[1], _strip_rows(plan.image[1], wanted, plan.memory), wanted)
    )


def _strip_rows(columns: int, wanted: Wanted, memory: int) -> int:
    """Rows of a strip, of which everything fits into memory."""
    rows = MOST_STRIP
    while rows > LEAST_STRIP and _strips_bytes(columns, rows, wanted) > memory:
        rows //= 2
    return rows


def _strips_bytes(columns: int, rows: int, wanted: Wanted) -> int:
    waiting = 8 * 256 * columns  # rows of the tiles of a file, gathered from strips
    return strip_bytes(columns, rows, wanted.width) + waiting + SCRATCH


def _tiles(plan: TilePlan, predictor: Predictor) -> list[Tile]:
    return list(plan) if predictor.is_tiled else [Tile(0, 0, *plan.image)]


def _in_place(kind: str, suffix: str) -> bool:
    return kind == "probabilities" or (kind == "classes" and suffix in RANDOM_ACCESS)


def _dtype(kind: str) -> type:
    return {"probabilities": np.float32, "classes": np.uint8, "instances": np.uint32}[kind]


def _as_saved(probabilities: NDArray[np.float32], kind: str) -> NDArray:
    """From (h, w, K) to the planes saved: K of probabilities, one of classes."""
    if kind == "probabilities":
        return np.moveaxis(probabilities, 2, 0)
    classes = np.empty(probabilities.shape[:2], np.uint8)
    for top in range(0, len(classes), BAND):
        classes[top : top + BAND] = probabilities[top : top + BAND].argmax(axis=2)
    return classes[None]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _ignore(message: str) -> None:
    pass
