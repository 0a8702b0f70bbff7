"""Predict what does not fit into memory: a mosaic under a memory limit, killed twice and resumed, and a strip of 10^10.

    python bench/mosaic.py [--side 20000] [--memory 1G] [--model nuclei] [--threads 1] [--folder DIR]

The mosaic is the ISBI 2012 test slices side by side, in deflated TIFF tiles. It is predicted once without a stop and
once with two kills at random moments, and the two files are compared byte by byte. Then an image of 100,000 x 100,000
bytes (a sparse file) is planned, and its first row of tiles is predicted. Nothing but the table stays.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastunet.data.images import read_array
from fastunet.data.sinks import write_strips
from fastunet.data.sources import open_images
from fastunet.data.synthetic import synthetic_membranes
from fastunet.job import Wanted, begin, file_hash
from fastunet.journal import finished_tiles, folder_of
from fastunet.memory import format_bytes, parse_bytes, resident_bytes
from fastunet.predictor import Predictor, model_file

DATA = Path(os.environ.get("FASTUNET_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))
LARGE = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--side", type=int, default=20_000, help="pixels of a side of the mosaic (default: 20000)"
    )
    parser.add_argument("--memory", default="1G", help="limit for the mosaic (default: 1G)")
    parser.add_argument("--model", default="nuclei", help="model to predict with (default: nuclei, base 16)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--folder", type=Path, help="where the files are for the time being (default: /tmp)")
    parser.add_argument("--only", choices=("mosaic", "large"), help="one of the two")
    parser.add_argument("--strip", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.strip:
        predict_strip(arguments)
        return
    print("| what | tiles | predicted, with the process | measured | seconds of CPU |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.only != "large":
            predict_mosaic(arguments, Path(folder))
        if arguments.only != "mosaic":
            predict_large(arguments, Path(folder))


def predict_mosaic(arguments: argparse.Namespace, folder: Path) -> None:
    mosaic = folder / "mosaic.tif"
    write_strips(mosaic, (arguments.side,) * 2, np.uint8, rows_of_mosaic(arguments.side))
    name = f"mosaic of {arguments.side:,} x {arguments.side:,} under {arguments.memory}"
    whole, stopped = folder / "whole.tif", folder / "stopped.tif"
    command = [
        sys.executable,
        "-m",
        "fastunet.predict",
        "-m",
        arguments.model,
        "-i",
        mosaic,
        "--save",
        "instances",
    ]
    command += ["--memory", arguments.memory, "--threads", str(arguments.threads), "--device", "cpu"]
    status, plan, peak, seconds = watched([*command, "-o", whole])
    assert status == 0
    print(
        f"| {name} | {plan} | at most {arguments.memory} | {format_bytes(peak)} | {seconds:.0f} |", flush=True
    )
    peaks, total = [], 0.0
    tiles = int(plan.split()[0])
    for kill_at in sorted(random.sample(range(1, tiles), 2)):
        status, _, peak, seconds = watched([*command, "-o", stopped, "--resume"], folder_of(stopped), kill_at)
        assert status == -signal.SIGKILL and not stopped.exists()
        peaks, total = [*peaks, peak], total + seconds
    status, _, peak, seconds = watched([*command, "-o", stopped, "--resume"])
    assert status == 0
    same = "the same bytes" if whole.read_bytes() == stopped.read_bytes() else "OTHER BYTES"
    worst = format_bytes(max([*peaks, peak]))
    print(f"| the same, killed twice and resumed: {same} | | | {worst} | {total + seconds:.0f} |", flush=True)


def rows_of_mosaic(side: int) -> Iterator[np.ndarray]:
    file = DATA / "isbi2012" / "test-volume.tif"
    slices = read_array(file) if file.is_file() else np.stack([synthetic_membranes(n)[0] for n in range(4)])
    high, wide = slices.shape[1:]
    for row in range(-(-side // high)):
        across = [slices[(row + column) % len(slices)] for column in range(-(-side // wide))]
        yield np.concatenate(across, axis=1)[: side - row * high, :side]


def watched(command: list, folder: Path | None = None, kill_at: int = 0) -> tuple[int, str, int, float]:
    """Run a command, and kill it once its folder has so many tiles; status, plan, peak memory and CPU seconds."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while folder is not None and os.waitid(os.P_PID, process.pid, ended) is None:
        if len(finished_tiles(folder)) >= kill_at:
            time.sleep(random.random())
            process.kill()
            break
        time.sleep(0.02)
    told = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    plan = next((line[6:].split(",")[0] for line in told.splitlines() if line.startswith("plan: ")), "")
    return os.waitstatus_to_exitcode(status), plan, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def predict_large(arguments: argparse.Namespace, folder: Path) -> None:
    image = folder / "large.npy"
    with image.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (LARGE, LARGE)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.truncate(start + LARGE**2)
        file.seek(start)
        for band in rows_of_mosaic(LARGE):
            file.write(band.tobytes())
            if file.tell() - start > 4000 * LARGE:
                break
    options = ["--model", arguments.model, "--memory", "1.8G", "--threads", str(arguments.threads)]
    command = [sys.executable, __file__, "--strip", "--folder", folder, *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    told = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    plan, predicted = told.strip().split(";")
    peak, seconds = format_bytes(usage.ru_maxrss * 1024), usage.ru_utime + usage.ru_stime
    print(f"| first row of tiles of {LARGE:,} x {LARGE:,} | {plan} | {predicted} | {peak} | {seconds:.0f} |")


def predict_strip(arguments: argparse.Namespace) -> None:
    """In a process of its own: plan the large image within the limit, and predict its first row of tiles."""
    path = model_file(arguments.model)
    predictor = Predictor(path, device="cpu", threads=arguments.threads)
    itself = resident_bytes()
    predictor.memory = parse_bytes(arguments.memory) - itself
    image = arguments.folder / "large.npy"
    images = open_images(image)
    plan = predictor.plan_source(images[0][1])
    out = arguments.folder / "large-classes.npy"
    what = folder_of(out), predictor, path, file_hash(path), image, None, ".npy"
    job = begin(*what, Wanted("classes"), images, plan)
    row = job.remaining()[: plan.grid[1]]
    assert list(job.run(row)) == row
    size = "x".join(map(str, plan.tile))
    print(f"{len(row)} of {len(plan)} of {size}; {format_bytes(plan.memory + itself)}")


if __name__ == "__main__":
    main()
