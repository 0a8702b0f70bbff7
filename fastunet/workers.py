"""The tiles of one job shared out: among processes with a device each, or over a Dask cluster.

A worker needs nothing but the job's folder. It takes a few tiles at a time and notes each itself, so that those of a
worker that dies are done again by another, except what it had finished.
"""

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from fastunet.errors import DataError
from fastunet.job import Job
from fastunet.journal import WORK, Journal
from fastunet.predictor import Predictor

TILES_AT_A_TIME = 4
DEATHS = 3
"""Workers that may die while no tile is finished before the job is given up."""

_device = "cpu"
_turn = threading.Lock()  # a Dask worker may have several threads, and the CPU engine is shared by all


def on_devices(job: Job, devices: Sequence[str], threads: int | None, done: Callable[[int], None]) -> None:
    """Do what is left of a job in one process per device.

    Parameters
    ----------
    devices : such as ["cuda:0", "cuda:1"] or ["cpu", "cpu"]
    threads : CPU threads of each
    done : is told how many tiles more are done

    Raises
    ------
    DataError
        If workers die again and again.
    """
    spawn = multiprocessing.get_context("spawn")
    deaths, left = 0, len(job.remaining())
    while left:
        names = spawn.Queue()
        for device in devices:
            names.put(device)
        try:
            with ProcessPoolExecutor(len(devices), spawn, _begin, (names,)) as pool:
                _share(pool, job, None, threads, done)
        except BrokenProcessPool:
            before, left = left, len(job.remaining())
            deaths = deaths + 1 if left == before else 0
            if deaths == DEATHS:
                raise DataError(
                    f"{job.journal.folder}: {DEATHS} times a worker died before any tile was done; allow less memory "
                    "by --memory, then --resume"
                ) from None
        else:
            left = len(job.remaining())


def on_dask(job: Job, address: str, device: str, threads: int | None, done: Callable[[int], None]) -> None:
    """Do what is left of a job on the workers of a Dask cluster, which see the same files under the same names.

    Raises
    ------
    DataError
        If dask is not installed, nothing answers at the address, or workers die again and again.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise DataError("--dask: dask is not installed; pip install 'fastunet[dask]'") from None
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--dask {address}: no scheduler answers ({error}); give its address, tcp://HOST:8786"
        ) from None
    try:
        with client, client.get_executor(retries=DEATHS, pure=False) as pool:
            _share(pool, job, device, threads, done)
    except KilledWorker as error:
        raise DataError(
            f"{job.journal.folder}: its workers died ({error}); give them less by --memory, then --resume"
        ) from None


def _share(
    pool: Executor, job: Job, device: str | None, threads: int | None, done: Callable[[int], None]
) -> None:
    left = job.remaining()
    folder = str(job.journal.folder.resolve())
    precision = job.predictor.model.precision
    futures = [
        pool.submit(_work, folder, device, precision, threads, left[first : first + TILES_AT_A_TIME])
        for first in range(0, len(left), TILES_AT_A_TIME)
    ]
    try:
        for future in as_completed(futures):
            done(future.result())
    finally:
        for future in futures:
            future.cancel()


def _begin(names: Any) -> None:
    """In a process of ours: take a device, and end when the process that began us has ended."""
    global _device
    _device = names.get()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _work(folder: str, device: str | None, precision: str, threads: int | None, chosen: list[int]) -> int:
    """Do those of the tiles that are not done yet; return how many were asked for."""
    with _turn:
        stamp = os.stat(Path(folder) / WORK).st_mtime_ns
        job = _job(folder, stamp, device or _device, precision, threads)
        finished = job.journal.finished()
        for _ in job.run([number for number in chosen if number not in finished]):
            pass
    return len(chosen)


@functools.lru_cache(maxsize=1)
def _job(folder: str, stamp: int, device: str, precision: str, threads: int | None) -> Job:
    journal = Journal(Path(folder))
    work = journal.work
    predictor = Predictor(work["model"], device, precision, rotations=work["rotations"], threads=threads)
    if predictor.kernels != work["kernels"]:
        raise DataError(
            f"{folder}: it was begun with {work['kernels']} and this worker has {predictor.kernels}; give workers of "
            "one kind"
        )
    return Job(journal, predictor)
