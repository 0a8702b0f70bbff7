"""The predict command: image files through a trained network into files of the same shape."""

import argparse
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from fastunet import command
from fastunet.data.images import SUFFIXES, find_images
from fastunet.data.sources import Source, open_images
from fastunet.errors import DataError
from fastunet.instances import check_options, find_instances
from fastunet.job import Job, Wanted, begin, file_hash, planned_bytes, resume
from fastunet.journal import finished_tiles, folder_of
from fastunet.memory import format_bytes, parse_bytes, resident_bytes
from fastunet.predictor import Predictor, model_file
from fastunet.speed import seconds_per_flop
from fastunet.tiling import TilePlan, forward_flops
from fastunet.workers import on_dask, on_devices

KINDS = ("probabilities", "classes", "instances")


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser(
        prog="fastunet predict",
        description="Segment images of any size with a trained network; the tile does not change the result.",
        epilog="Probabilities are float32, (K, H, W) per image; classes uint8 and instances uint32, (H, W). "
        "A stack gives a stack. PNG takes classes and instances (uint16) only, of one image per file.",
    )
    parser.add_argument(
        "-m",
        "--model",
        required=True,
        help="model file, run folder of fastunet train, or the name of a shipped model (nuclei)",
    )
    parser.add_argument(
        "-i", "--input", required=True, metavar="IN", help="image or stack, folder of images, or quoted glob"
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="OUT",
        help=f"a file for one input ({', '.join(SUFFIXES)}), or a folder that gets one file per input, named "
        "like it",
    )
    parser.add_argument(
        "--save", choices=KINDS, help="what to write (default: classes where OUT is .png, else probabilities)"
    )
    parser.add_argument(
        "--axes", help="axes of the input arrays, such as ZYX or YXC, where the files do not tell"
    )

    cost = parser.add_argument_group("tiles and rotations")
    cost.add_argument(
        "--tile",
        default="auto",
        metavar="N|auto",
        help="input size of the network, such as 572 (default: auto, the least work that memory allows)",
    )
    cost.add_argument(
        "--memory",
        metavar="BYTES",
        help="the most that this process and its workers may take, such as 2G; on a GPU, of its memory "
        "(default: 0.8 of what is free)",
    )
    cost.add_argument(
        "--rotations",
        type=int,
        default=1,
        choices=(1, 4, 7, 8),
        help="average over so many views of the image: 4 right angles, 8 with mirror images, 7 rotations by "
        "k*360/7 degrees as in the paper (default: 1, the image as it is)",
    )

    running = parser.add_argument_group(
        "stops and workers", "OUT.partial keeps the tiles that are done until OUT is whole."
    )
    begun = running.add_mutually_exclusive_group()
    begun.add_argument("--resume", action="store_true", help="go on with a prediction that was stopped")
    begun.add_argument("--overwrite", action="store_true", help="begin anew where one was stopped")
    among = running.add_mutually_exclusive_group()
    among.add_argument(
        "--devices", metavar="LIST", help="share the tiles among processes: cuda:0,cuda:1 or cpu,cpu"
    )
    among.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="share the tiles among the workers of a Dask cluster (tcp://HOST:8786) that sees the same files",
    )

    instances = parser.add_argument_group("instances (--save instances)")
    instances.add_argument(
        "--min-size", type=int, metavar="PIXELS", help="leave out instances smaller than this (default: 0)"
    )
    instances.add_argument(
        "--fill-holes", action="store_true", help="fill background that a single instance encloses"
    )
    instances.add_argument(
        "--separation-width",
        type=int,
        metavar="PIXELS",
        help="what training cut from each of two touching instances and they grow back (default: 1)",
    )
    command.add_common_options(parser)
    return command.run(parser, _predict_files, argv)


def _predict_files(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    inputs = find_images(arguments.input)
    wanted, outputs = _outputs(arguments, inputs)
    limit = None if arguments.memory is None else parse_bytes(arguments.memory)
    devices = [arguments.device] if arguments.devices is None else _devices(arguments.devices)
    predictor = Predictor(
        arguments.model,
        device=devices[0],
        precision=arguments.precision,
        tile=int(arguments.tile) if arguments.tile.isdecimal() else arguments.tile,
        rotations=arguments.rotations,
        threads=arguments.threads,
    )
    if limit is not None:
        if wanted.kind == "instances":  # what finds them is loaded before it is seen what remains
            find_instances(np.zeros((2, 2), np.uint8), wanted.width, wanted.min_size, wanted.fill_holes)
        predictor.memory = _left_for_tiles(limit, predictor, len(devices))
    outputs[0].parent.mkdir(parents=True, exist_ok=True)
    work = _Work(arguments, predictor, wanted, devices)
    done = 0
    finished = _Finished(outputs, arguments.resume, work.statement)
    for source, target in zip(inputs, outputs):
        if target.name in finished.names and target.exists():
            continue
        done += work.predict(source, target)
        finished.add(target)
    finished.forget()
    if not arguments.quiet:
        where = outputs[0] if len(outputs) == 1 else f"{outputs[0].parent} ({len(outputs)} files)"
        images_done = f"{done} image{'' if done == 1 else 's'}"
        print(f"{where}: {wanted.kind} of {images_done} in {time.perf_counter() - began:.1f} s")


class _Work:
    """What is the same for every file of a command."""

    def __init__(
        self, arguments: argparse.Namespace, predictor: Predictor, wanted: Wanted, devices: list[str]
    ) -> None:
        self._arguments = arguments
        self._predictor = predictor
        self._wanted = wanted
        self._devices = devices
        self._model = model_file(arguments.model)
        self._model_hash = file_hash(self._model)
        self._said: set[str] = set()

    @property
    def statement(self) -> str:
        """What decides the bits of every file's result, but for the file: a line."""
        predictor = self._predictor
        decides = self._model_hash, self._arguments.axes, self._wanted, predictor.rotations, predictor.kernels
        return repr(decides)

    def predict(self, source: Path, target: Path) -> int:
        """Predict a file's images; return their number."""
        images = open_images(source, self._arguments.axes, lambda message: self._say(message, sys.stderr))
        if len({image.shape for _, image in images}) > 1:
            raise DataError(f"{source}: its images differ in size; save each as a file of its own")
        if len(images) > 1 and target.suffix.lower() == ".png":
            raise DataError(f"{source}: a PNG file cannot hold its {len(images)} images; end OUT in .tif")
        folder = folder_of(target)
        if (kept := finished_tiles(folder)) and not (self._arguments.resume or self._arguments.overwrite):
            raise DataError(
                f"{folder}: {len(kept)} tiles of an unfinished prediction are there; --resume goes on with it, "
                "--overwrite begins anew"
            )
        what = self._predictor, self._model, self._model_hash, source, self._arguments.axes
        suffix = target.suffix.lower()
        memory = self._predictor.memory
        job: Job | None = None
        try:
            while True:
                if self._arguments.resume and finished_tiles(folder):
                    job = resume(folder, *what, suffix, self._wanted)
                    plan = job.plan
                    self._say_plan(plan, len(images), len(job) - len(job.remaining()))
                else:
                    plan = self._plan(source, images[0][1])
                    self._say_plan(plan, len(images))
                    job = begin(folder, *what, suffix, self._wanted, images, plan)
                job.journal.lock()
                try:
                    self._run(job, source.name)
                    break
                except MemoryError:  # there was less than the machine had told
                    if job.journal.finished():
                        raise
                    job.journal.close()
                    self._predictor.memory = plan.memory // 2
            job.finish(target)
        except BaseException:
            if job is not None and job.journal.is_locked:  # or another process is at work on it
                if finished_tiles(folder):
                    self._say(
                        f"{folder} keeps what is done; the same command with --resume goes on", sys.stderr
                    )
                else:
                    shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            if job is not None:
                job.journal.close()
        self._predictor.memory = memory
        return len(images)

    def _plan(self, path: Path, source: Source) -> TilePlan:
        try:
            return self._predictor.plan_source(source)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    def _run(self, job: Job, name: str) -> None:
        with tqdm(
            total=len(job),
            initial=len(job) - len(job.remaining()),
            desc=name,
            unit="tile",
            disable=True if self._arguments.quiet else None,
        ) as bar:
            threads = self._arguments.threads
            if self._arguments.dask is not None:
                device = self._predictor.model.device.split(":")[0]
                on_dask(job, self._arguments.dask, device, threads, bar.update)
            elif len(self._devices) > 1:
                on_devices(job, self._devices, threads, bar.update)
            else:
                for _ in job.run(job.remaining()):
                    bar.update(1)

    def _say_plan(self, plan: TilePlan, images: int, done: int = 0) -> None:
        if self._arguments.quiet:
            return
        count = images * len(plan) * self._arguments.rotations
        size = "x".join(map(str, plan.tile))
        text = f"plan: {count} tile{'s' if count > 1 else ''} of {size} pixels, "
        text += f"at most {format_bytes(planned_bytes(plan, self._wanted))}"
        if len(self._devices) > 1:
            text += f" in each of {len(self._devices)} workers"
        if text not in self._said:
            self._said.add(text)
            if count > 1:
                flops = count * forward_flops(*plan.tile, self._predictor.model) / len(self._devices)
                text += f", about {_duration(seconds_per_flop(self._predictor.model, plan)[0] * flops)}"
            if done:
                text += f"; {done} of {images * len(plan)} are done"
            print(text, flush=True)

    def _say(self, message: str, file: TextIO) -> None:
        if message not in self._said and not self._arguments.quiet:
            tqdm.write(f"note: {message}", file=file)
        self._said.add(message)


class _Finished:
    """The outputs of a command of several that are whole, noted beside them until all are."""

    def __init__(self, outputs: list[Path], resumes: bool, statement: str) -> None:
        self._file = outputs[0].parent / ".predicted"
        self._several = len(outputs) > 1
        self.names = set[str]()
        if not self._several:
            return
        lines = self._file.read_text().splitlines() if resumes and self._file.is_file() else []
        if lines:
            if lines[0] != statement:
                raise DataError(
                    f"{self._file.parent}: its files were begun with another model or other options; give the same "
                    "again, or --overwrite instead of --resume"
                )
            self.names.update(lines[1:])
        else:
            self._file.write_text(f"{statement}\n")

    def add(self, output: Path) -> None:
        if self._several:
            with self._file.open("a") as file:
                file.write(f"{output.name}\n")

    def forget(self) -> None:
        if self._several:
            self._file.unlink(missing_ok=True)


def _left_for_tiles(limit: int, predictor: Predictor, workers: int) -> int:
    """Of the memory that fastunet may take, what one worker has beside its interpreter, libraries and network."""
    if predictor.model.device != "cpu":
        return limit
    itself = resident_bytes()
    left = limit - itself if workers == 1 else (limit - itself) // workers - itself
    if left <= 0:
        raise ValueError(
            f"--memory {format_bytes(limit)}: interpreter, libraries and network take {format_bytes(itself)} in each "
            "process before any tile; allow more"
        )
    return left


def _devices(text: str) -> list[str]:
    devices = [device.strip() for device in text.split(",")]
    if len({device.split(":")[0] for device in devices}) > 1:
        raise ValueError(
            f"--devices {text}: different kinds would not give one result; name GPUs, or cpu several times"
        )
    return devices


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"


def _outputs(arguments: argparse.Namespace, inputs: list[Path]) -> tuple[Wanted, list[Path]]:
    """Decide what is written and where, one output per input, before any work is done."""
    out: Path = arguments.output
    suffix = out.suffix.lower()
    to_folder = (
        (out.is_dir() and suffix != ".zarr") or suffix == "" or (len(inputs) > 1 and suffix not in SUFFIXES)
    )
    if len(inputs) > 1 and (not to_folder or out.is_file()):
        raise ValueError(f"{out}: {len(inputs)} inputs need a folder to write to; give one as OUT")
    if not to_folder and suffix not in SUFFIXES:
        raise ValueError(f"{out}: {suffix} cannot be written; end OUT in {', '.join(SUFFIXES)}")
    kind = arguments.save or ("classes" if suffix == ".png" and not to_folder else "probabilities")
    if kind == "probabilities" and suffix == ".png" and not to_folder:
        raise ValueError(f"{out}: PNG cannot hold probabilities; end OUT in .tif or .npy, or save classes")
    options = {
        "--min-size": arguments.min_size is not None,
        "--fill-holes": arguments.fill_holes,
        "--separation-width": arguments.separation_width is not None,
    }
    for option, given in options.items():
        if given and kind != "instances":
            raise ValueError(f"{option} is about instances and {kind} are saved; add --save instances")
    outputs = [out / _output_name(path, kind) for path in inputs] if to_folder else [out]
    times = Counter(outputs)
    for source, target in zip(inputs, outputs):
        if target.exists() and target.samefile(source):
            raise ValueError(f"{target}: the output would replace its input; write somewhere else")
        if times[target] > 1:
            raise ValueError(f"{target}: two inputs would be written to it; give inputs of different names")
    width = 1 if arguments.separation_width is None else arguments.separation_width
    wanted = Wanted(kind, width, arguments.min_size or 0, arguments.fill_holes)
    check_options(wanted.width, wanted.min_size)
    return wanted, outputs


def _output_name(source: Path, kind: str) -> str:
    """Name a file in the folder OUT as its input, but .tif where PNG cannot hold what is saved."""
    is_png = source.suffix.lower() == ".png"
    return source.with_suffix(".tif").name if is_png and kind == "probabilities" else source.name


if __name__ == "__main__":
    sys.exit(main())
