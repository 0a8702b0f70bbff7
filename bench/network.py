"""Forward pass and training step of the whole network against PyTorch, float32, on this machine's CPU.

    python bench/network.py [--base 16 32 64] [--tile 572] [--rounds 5] [--json FILE]

Engines take turns within one process, so that what else the machine does hits all alike; medians and their ratios are
printed. Memory is the peak resident memory of a process of its own, less that after the imports (Linux). A training
step is forward, weighted cross-entropy, backward and SGD with momentum 0.99.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

ENGINES = ("fastunet", "torch channels_last", "torch contiguous")


def engine(name: str, base: int, tile: int, threads: int) -> dict[str, Callable[[], object]]:
    """The forward pass and the training step of one engine, as functions without arguments."""
    from fastunet import SGD, UNet, backends, no_grad, output_size

    generator = np.random.default_rng(0)
    side = output_size(tile)
    x = generator.standard_normal((1, tile, tile, 1)).astype(np.float32)
    labels = generator.integers(0, 2, (1, side, side)).astype(np.int32)
    weights = generator.random((1, side, side)).astype(np.float32)
    if name == "fastunet":
        backends.set_threads(threads)
        model = UNet(base_channels=base, dropout=0.0)
        optimiser = SGD(model, lr=1e-6)

        def forward() -> None:
            with no_grad():
                model(x)

        def step() -> None:
            optimiser.zero_grad()
            model.loss(x, labels, weights).backward()
            optimiser.step()

        return {"forward": forward, "training step": step}

    import torch
    import torch_unet

    torch.set_num_threads(threads)
    layout = torch.channels_last if name.endswith("channels_last") else torch.contiguous_format
    parameters = {}
    for key, shape in {k: v.shape for k, v in UNet(base_channels=base).parameters().items()}.items():
        values = torch.randn(shape) * 0.05
        parameters[key] = (
            values.contiguous(memory_format=layout) if values.ndim == 4 else values
        ).requires_grad_()
    torch_optimiser = torch.optim.SGD(parameters.values(), lr=1e-6, momentum=0.99)
    torch_x = torch.tensor(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    torch_labels, torch_weights = torch.tensor(labels).long(), torch.tensor(weights)

    def torch_forward() -> None:
        with torch.no_grad():
            torch_unet.forward(parameters, torch_x, 4)

    def torch_step() -> None:
        torch_optimiser.zero_grad()
        logits = torch_unet.forward(parameters, torch_x, 4)
        torch_unet.weighted_cross_entropy(logits, torch_labels, torch_weights).backward()
        torch_optimiser.step()

    return {"forward": torch_forward, "training step": torch_step}


def peak_memory(name: str, base: int, tile: int, threads: int, what: str) -> float:
    """Peak resident MB of `what`, in a process of its own, beyond the imports'."""
    arguments = [name, str(base), str(tile), str(threads), what]
    output = subprocess.run(
        [sys.executable, __file__, "--peak-memory", *arguments], capture_output=True, text=True, check=True
    )
    return float(output.stdout)


def print_peak_memory(name: str, base: str, tile: str, threads: str, what: str) -> None:
    import torch  # noqa: F401

    import fastunet.unet  # noqa: F401

    def resident(field: str) -> float:
        line = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)
        )
        return float(line.split()[1]) / 1024

    before = resident("VmRSS")
    functions = engine(name, int(base), int(tile), int(threads))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(2):
        functions[what]()
    print(resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--tile", type=int, default=572)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-memory", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_memory:
        print_peak_memory(*arguments.peak_memory)
        return

    import torch

    from fastunet import backends

    threads = arguments.threads or backends.get_threads()
    machine = f"{processor()}, {threads} threads, {backends.describe()}, PyTorch {torch.__version__}"
    print(f"{machine}\ntile {arguments.tile}, {arguments.rounds} rounds\n")
    print("| base | what | engine | ms | x fastunet | peak MB |\n|---|---|---|---|---|---|")
    rows = []
    for base in arguments.base:
        for what in ("forward", "training step"):
            functions = {name: engine(name, base, arguments.tile, threads)[what] for name in ENGINES}
            times: dict[str, list[float]] = {name: [] for name in ENGINES}
            for turn in range(arguments.rounds + 1):
                for name, function in functions.items():
                    start = time.perf_counter()
                    function()
                    if turn:  # the first is a warm-up
                        times[name].append(time.perf_counter() - start)
            for name in ENGINES:
                milliseconds = statistics.median(times[name]) * 1e3
                ratio = statistics.median(a / b for a, b in zip(times[name], times["fastunet"], strict=True))
                memory = peak_memory(name, base, arguments.tile, threads, what)
                row = dict(base=base, what=what, engine=name, ms=milliseconds, ratio=ratio, peak_mb=memory)
                rows.append(row)
                print(
                    f"| {base} | {what} | {name} | {milliseconds:.0f} | {ratio:.2f} | {memory:.0f} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine, "tile": arguments.tile, "rows": rows}, indent=1)
        )


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
