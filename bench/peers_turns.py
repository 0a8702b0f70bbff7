"""Engines that take turns, each in a process of its own: it works only when it is told.

So no engine's threads, memory or environment meet another's, and what else the machine does hits all alike.
"""

import contextlib
import gc
import importlib
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from peers_engines import Engine, Task

FIRST_PASSES = 3
TURN_SECONDS = 0.3
REST_SECONDS = 0.05
"""Between turns: the threads of the one before have gone to sleep."""

_SPAWN = multiprocessing.get_context("spawn")


class LeftOut(Exception):
    """Why an engine is not in the table."""


class Worker:
    """An engine ready to work on a task.

    Attributes
    ----------
    result : ndarray
        Of inference the logits, of training the losses of the first steps.
    peak_mb : float or None
        The most memory of the first passes, in 10^6 bytes (`_serve` says what is counted); None where Linux is not.

    Raises
    ------
    LeftOut
        If the engine is not installed or fails.
    """

    def __init__(self, engine: Engine, task: Task) -> None:
        self.engine = engine
        missing = [name for name in engine.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise LeftOut(f"not installed: pip install {' '.join(missing)}")
        if engine.convert:
            try:
                call(engine.convert, task)
            except Exception as error:
                raise LeftOut(f"the network cannot be converted: {_sentence(error)}") from error
        threads = engine.threads or task.threads
        self._pipe, other = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(engine, replace(task, threads=threads), other))
        with environment({"OMP_NUM_THREADS": str(threads), **engine.environment}):
            self._process.start()
        other.close()
        self.result: np.ndarray
        self.peak_mb: float | None
        self.result, self.peak_mb = self._receive()

    def turn(self) -> float:
        """Milliseconds of a pass: the median of as many as go into a turn."""
        time.sleep(REST_SECONDS)
        self._pipe.send(TURN_SECONDS)
        return self._receive()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self.close()
            raise LeftOut(f"its process ended with {self._process.exitcode}") from None
        if isinstance(answer, LeftOut):
            self.close()
            raise answer
        return answer


def _serve(engine: Engine, task: Task, pipe: Connection) -> None:
    """Build, make the first passes, then a turn for each number of seconds that comes through the pipe.

    A turn begins with a pass that is not timed: caches and pages are the others' by then, and threads asleep.

    Memory is the peak of the process (VmHWM) during the first passes, less what was resident when the libraries had
    been imported (VmRSS), less the pages of files, the libraries' code, that were read since (RssFile). So weights,
    activations, gradients, momenta and whatever the engine keeps for itself count; what building it took, and gave
    back, does not.
    """
    try:
        for module in (engine.packages[0], *engine.imports):
            importlib.import_module(module)
        before, files = _resident_mb("VmRSS"), _resident_mb("RssFile")
        work = engine.build(task)
        gc.collect()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        results = [work() for _ in range(FIRST_PASSES)]
        peak = _resident_mb("VmHWM") - before - (_resident_mb("RssFile") - files) if before else None
        pipe.send((results[-1] if np.ndim(results[-1]) else np.array(results), peak))
        del results
        while True:
            pipe.send(_turn(work, pipe.recv()))
    except EOFError:
        return
    except Exception as error:
        pipe.send(LeftOut(_sentence(error)))


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _turn(work: Callable[[], Any], seconds: float) -> float:
    work()
    times = []
    begin = now = time.perf_counter()
    while now < begin + seconds:
        before = now
        work()
        now = time.perf_counter()
        times.append(now - before)
    return 1e3 * statistics.median(times)


def _resident_mb(kind: str) -> float:
    """A line of Linux's account of this process; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{kind}:"))


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started within."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def call(function: Callable[..., Any], *arguments: Any, **variables: str) -> Any:
    """The function's result, in a process of its own with these variables in its environment, without its output."""
    with environment(variables), ProcessPoolExecutor(1, _SPAWN, initializer=_hush) as pool:
        return pool.submit(function, *arguments).result()


def _hush() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def difference(result: np.ndarray, reference: np.ndarray) -> float:
    """How far an engine's result is from the reference's.

    Of logits the rms error over the reference's standard deviation; of the losses of successive steps the greater of
    the relative errors of the first and of their fall, which has the gradients in it.
    """
    if result.shape != reference.shape or not np.isfinite(result).all():
        return float("inf")
    if result.ndim > 1:
        return float(np.sqrt(np.mean((result - reference) ** 2)) / reference.std())
    fall, expected = (losses[0] - losses[-1] for losses in (result, reference))
    return float(max(abs(result[0] / reference[0] - 1), abs(fall / expected - 1)))
