"""fastunet on the CPU beside every peer, each in its best configuration: time, memory and accuracy, in one run.

    pip install '.[peers]'
    python bench/peers.py [--base 16 32 64] [--tile 572] [--threads N] [--rounds 7] [--minutes M] [--readme]

Every engine has a process of its own and works only in its turn, once a round, in an order drawn anew each round. A
turn is a pass that is not timed, then 0.3 s of passes or one longer one, and counts their median. Ratios are of two
times of the same round, and their median is told. What an engine computes is held against PyTorch's float32 before it
is timed: logits within 1e-4 of their standard deviation (bfloat16 5e-2), in training the first loss and the fall of
the losses within 1e-3 (5e-2).
A step of training is forward, weighted cross-entropy, backward and SGD with momentum, without dropout. Memory is what
peers_turns.py counts, accuracy what peers_accuracy.py does. A peer that is not installed is left out, and named.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import peers_accuracy
import peers_table
import peers_turns
from peers_engines import ENGINES, Engine, Task, prepare
from peers_table import Results, Row
from peers_turns import LeftOut, Worker, difference

REFERENCE = "PyTorch, contiguous"
PACKAGES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "ncnn": "ncnn"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--tile", type=int, default=572)
    parser.add_argument(
        "--threads", type=int, default=cores(), help="default: the cores this process may use"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, help="timing ends after about this, with fewer rounds")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="fastunet, and engines with a WORD in the name"
    )
    parser.add_argument("--no-accuracy", action="store_true", help="leave out the passes in float64")
    parser.add_argument("--readme", action="store_true", help="print Markdown for the README as well")
    parser.add_argument("--out", type=Path, help="default: bench/results/peers-DATE-TIME.json")
    parser.add_argument("--again", type=Path, metavar="JSON", help="print an earlier run, measure nothing")
    options = parser.parse_args()
    if options.again:
        results = json.loads(options.again.read_text())
        print(peers_table.terminal(results))
    else:
        results = run(options)
        name = f"peers-{results['date'].replace(':', '').replace(' ', '-')}.json"
        path = options.out or Path(__file__).parent / "results" / name
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten to {path}")
    if options.readme:
        print(f"\n{peers_table.readme(results)}")


def run(options: argparse.Namespace) -> Results:
    """Measure all, printing each section as it is done."""
    from fastunet import backends

    backends.set_threads(options.threads)
    results: Results = {
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "machine": f"{processor()} ({backends.describe()})",
        "versions": versions(),
        "tile": options.tile,
        "threads": options.threads,
        "rows": [],
    }
    print(peers_table.heading(results), flush=True)
    bases = sorted(set(options.base))
    sections = [(base, what) for base in bases for what in ENGINES]
    ends = time.monotonic() + 60 * (options.minutes or float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        tasks = {base: Task(Path(folder) / str(base), base, options.tile, options.threads) for base in bases}
        for index, (base, what) in enumerate(sections):
            if not tasks[base].folder.exists():
                tasks[base].folder.mkdir()
                peers_turns.call(prepare, tasks[base])
            engines = [engine for engine in ENGINES[what] if wanted(engine, options)]
            share = max(0.0, ends - time.monotonic()) / (len(sections) - index)
            rows = measured(engines, tasks[base], options.rounds, time.monotonic() + share)
            results["rows"] += [{"what": what, "base": base, **row} for row in rows]
            print(f"\n{peers_table.section(results, what, base)}", flush=True)
        if not options.no_accuracy:
            results["accuracy"] = {"base": bases[-1], **peers_accuracy.accuracy(tasks[bases[-1]])}
            print(f"\n{peers_table.accuracy(results)}")
    return results


def wanted(engine: Engine, options: argparse.Namespace) -> bool:
    if engine.threads == options.threads:
        return False
    return not options.only or any(word in engine.name for word in ("fastunet", REFERENCE, *options.only))


def measured(engines: list[Engine], task: Task, rounds: int, until: float) -> list[Row]:
    """Start the engines, check what they compute, and time them in turns: at least one round, none begun too late."""
    rows: dict[str, Row] = {engine.name: {"engine": engine.name} for engine in engines}
    workers: list[Worker] = []
    with contextlib.ExitStack() as stack:
        for engine in sorted(engines, key=lambda engine: engine.name != REFERENCE):
            try:
                worker = Worker(engine, task)
                stack.callback(worker.close)
                error = difference(worker.result, workers[0].result) if workers else 0.0
                if error > engine.tolerance:
                    raise LeftOut(f"it computes something else: off by {error:.1e} of {engine.tolerance:.0e}")
            except LeftOut as reason:
                rows[engine.name]["left_out"] = str(reason)
                continue
            rows[engine.name] |= {"peak_mb": worker.peak_mb, "difference": error, "ms": []}
            workers.append(worker)
        for index in range(rounds):
            if index and time.monotonic() > until:
                break
            for worker in random.sample(workers, len(workers)):
                try:
                    rows[worker.engine.name]["ms"].append(worker.turn())
                except LeftOut as reason:
                    workers.remove(worker)
                    rows[worker.engine.name] = {"engine": worker.engine.name, "left_out": str(reason)}
    return list(rows.values())


def cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for package, name in PACKAGES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(package)
    return found


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
