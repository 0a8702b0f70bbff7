"""Stage "kernels": every kernel at the shapes of the 572 tile, ours and PyTorch's best, beside the roofline."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from cuda_kernels import Numbers, Work
from cuda_shapes import H200, Case, Ceilings, cases, smallest_cases
from cuda_timing import cache_bytes, measured_ceilings, sets_and_loops, timed, torch_graph
from gpu_stage import Cases, Row, Settings

from fastunet import backends

LIMIT = 60.0
OURS = "fastunet"
MODES = {"PyTorch compile": "default", "PyTorch max-autotune": "max-autotune-no-cudagraphs"}
PEER_ENGINES = ("PyTorch eager", *MODES)
FUSED = (
    *("conv3x3 forward", "upconv2x2 forward", "maxpool2x2 backward", "conv1x1 forward", "head and loss"),
    *("softmax and loss", "gather", "grey values", "scaled image"),
)
"""Where PyTorch's compiler has something to fuse."""
ROOFLINE = "roofline"


def shapes(settings: Settings) -> list[Case]:
    return smallest_cases() if settings.tiny else cases()


def stage(settings: Settings) -> Cases:
    """All of ours first, then PyTorch's ways, the quickest to prepare first: time may not suffice for the last."""
    found: dict[str, Any] = {ROOFLINE: lambda: ceilings(settings)}
    for engine in (OURS, *(PEER_ENGINES[:1] if settings.tiny else PEER_ENGINES)):
        for case in shapes(settings):
            if engine not in MODES or case.operation in FUSED:
                found[f"{engine} | {case.name}"] = functools.partial(measured, settings, engine, case)
    return found


def ceilings(settings: Settings) -> Row:
    if not settings.gpu:
        return {}
    measured = measured_ceilings()
    return {"flops": measured.flops, "bytes": measured.bytes}


class Prepared(NamedTuple):
    """What starts a case's work `times` times, and the address of the stream on which it does: None is PyTorch's."""

    start: Callable[[], Any]
    times: int
    stream: int | None
    kernels: list[str]


def prepared(settings: Settings, engine: str, case: Case) -> Prepared:
    sets, loops = sets_and_loops(case, cache_bytes(settings.gpu))
    if engine != OURS:
        return theirs(settings, engine, case, sets, loops)
    if not settings.gpu:
        importlib.import_module("emulator.conftest")
    table: Any = backends.load(backends.resolve_device(settings.device), "bf16")
    work = Work(table, case, sets, loops, Numbers(0, 1000 if settings.tiny else 2**24))
    return Prepared(work.start, sets * loops, table.device.exchange.stream, work.kernels)


def theirs(settings: Settings, engine: str, case: Case, sets: int, loops: int) -> Prepared:
    import torch
    from cuda_peers import PEERS, maker

    torch.backends.cudnn.benchmark = True
    function, arguments = PEERS[case.operation](case, maker("cuda" if settings.gpu else "cpu"))
    if engine in MODES:
        torch.compiler.reset()
        function = torch.compile(function, mode=MODES[engine])
    data = [arguments() for _ in range(sets)]

    def work() -> list[Any]:
        with torch.set_grad_enabled(case.operation in ("head and loss", "softmax and loss")):
            return [function(*one) for _ in range(loops) for one in data]

    return Prepared(torch_graph(work) if settings.gpu else work, sets * loops, None, [])


def measured(settings: Settings, engine: str, case: Case) -> Row:
    work = prepared(settings, engine, case)
    timing = timed(work.start, settings.gpu, work.stream)
    microseconds = [1e6 * seconds / work.times for seconds in timing]
    row = dict(zip(("us", "least_us", "most_us"), microseconds), times=work.times)
    return {**row, "kernels": work.kernels}


def summary(rows: dict[str, Row], settings: Settings) -> list[str]:
    """A table, a line for each case of ours; what failed says so."""
    measured = rows.get(ROOFLINE, {})
    here = Ceilings(measured.get("flops", H200.flops), measured.get("bytes", H200.bytes))
    said = "as measured" if "flops" in measured else "not measured: an H200's"
    lines = [
        f"roofline {here.flops / 1e12:.0f} TFLOP/s, {here.bytes / 1e12:.2f} TB/s ({said})",
        "kernel | us | TFLOP/s | GB/s | % of roofline | x PyTorch (its best way)",
    ]
    total = floor = 0.0
    for case in shapes(settings):
        one = rows.get(f"{OURS} | {case.name}", {"failure": "not done"})
        if "failure" in one:
            lines.append(f"{case.name} | {one['failure']}")
            continue
        seconds = one["us"] / 1e6
        peers = {
            engine: other["us"]
            for engine in PEER_ENGINES
            if "us" in (other := rows.get(f"{engine} | {case.name}", {}))
        }
        best = min(peers, key=peers.__getitem__, default=None)
        ratio = "-" if best is None else f"{peers[best] / one['us']:.2f} ({best.removeprefix('PyTorch ')})"
        lines.append(
            f"{case.name} | {one['us']:.1f} | {case.flops / seconds / 1e12:.0f} | {case.moved / seconds / 1e9:.0f}"
            f" | {100 * here.floor(case) / seconds:.0f} | {ratio}"
        )
        total, floor = total + seconds, floor + here.floor(case)
    if total:
        lines.append(f"all of ours: {total * 1e3:.2f} ms, {100 * floor / total:.0f} % of roofline")
    failed = [name for name, one in rows.items() if "failure" in one and name.startswith("PyTorch")]
    return [*lines, *(f"{name} | {rows[name]['failure']}" for name in failed)]
