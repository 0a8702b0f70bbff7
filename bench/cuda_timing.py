"""How long a device works: medians by CUDA events, ours and PyTorch's alike; by the host's clock without a GPU."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_shapes import H200, Case, Ceilings

Work = Callable[[], Any]
LAUNCHED_AT_ONCE = 1e-3
"""Seconds of work between two events, beside which what it takes to start it does not count."""


class Timing(NamedTuple):
    """Seconds: the median of some rounds, and the shortest and longest."""

    median: float
    least: float
    most: float


def sets_and_loops(case: Case, cache_bytes: int) -> tuple[int, int]:
    """Sets of data for a case, so many that none is in the cache when its turn comes again, and turns in a row.

    Without a cache, on the host: one of each.
    """
    if cache_bytes == 0:
        return 1, 1
    sets = int(min(64, max(2, -(-3 * cache_bytes // case.moved))))
    once = sets * max(H200.floor(case), 2e-6)
    return sets, max(1, round(LAUNCHED_AT_ONCE / once))


def cache_bytes(gpu: bool) -> int:
    if not gpu:
        return 0
    import torch

    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def timed(start: Work, gpu: bool, stream: int | None = None, rounds: int = 15) -> Timing:
    """Of work that `start` starts on a stream, given by its address, or on PyTorch's own."""
    seconds = _by_events(start, stream, rounds) if gpu else _by_the_host(start)
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def _by_events(start: Work, stream: int | None, rounds: int) -> list[float]:
    import torch

    on = torch.cuda.current_stream() if stream is None else torch.cuda.ExternalStream(stream)
    start()
    seconds = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start()  # the device is busy while the host prepares what is timed
        begin.record(on)
        start()
        end.record(on)
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return seconds


def _by_the_host(start: Work) -> list[float]:
    begin = time.perf_counter()
    start()
    return [time.perf_counter() - begin]


def torch_graph(work: Work) -> Work:
    """A CUDA graph of PyTorch's work, whose results it keeps."""
    import torch

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def measured_ceilings() -> Ceilings:
    """Of this GPU, on random data."""
    import torch

    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: one @ other, gpu=True)
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), gpu=True)
    return Ceilings(2 * 8192**3 / product.median, 2 * source.nbytes / copy.median)
