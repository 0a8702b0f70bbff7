"""Stage "training": short runs of `fastunet train`, the same on the GPU and the CPU, and one at the paper's size.

And what its samples cost at that size: a step takes the same tile again and again, or a new one each time.
"""

import csv
import functools
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_stage import Cases, Row, Settings

LIMIT = 400.0
LAST = 50
"""Steps whose mean loss is told."""
SAMPLES = "samples and steps"


def stage(settings: Settings) -> Cases:
    """The two that are to be compared have the same settings and seed, so the same tiles and masks of dropout."""
    data = os.path.join(settings.data, "isbi2012")
    given = [data] if os.path.isdir(data) else []
    small = "--base-channels 16 --tile 316 --steps 600"
    minutes = max(0.5, settings.seconds / 60 * 0.4)
    runs = {
        "GPU": f"--device {settings.device} {small}",
        "CPU": f"--device cpu {small}",
        "GPU, base 64, tile 572": f"--device {settings.device} --minutes {minutes:.2f}",
    }
    if settings.tiny:  # a command knows no emulator
        runs = {"CPU": "--device cpu --base-channels 1 --depth 1 --tile 20 --steps 2"}
    trainings = {name: trained([*given, *options.split()]) for name, options in runs.items()}
    return {SAMPLES: functools.partial(samples_and_steps, settings), **trainings}


def samples_and_steps(settings: Settings) -> Row:
    """Milliseconds of a sample alone, of a step on the same tile, and of a step on a new one."""
    from fastunet import SGD, UNet, output_size
    from fastunet.data.samples import open_samples, prepare
    from fastunet.data.synthetic import synthetic_dataset
    from fastunet.training_step import TrainingStep

    if not settings.gpu:
        importlib.import_module("emulator.conftest")
    base, side, depth, count = (1, 20, 1, 2) if settings.tiny else (64, 572, 4, 100)
    model = UNet(base_channels=base, depth=depth, device=settings.device, precision="bf16")
    backend: Any = model.backend
    step = TrainingStep(model, SGD(model, lr=1e-6))
    images, _ = prepare(synthetic_dataset(4, 64 if settings.tiny else 512, 0), "zscore", quiet=True)
    where = {"stream": backend.stream, "room": backend.free_memory() // 2}

    def milliseconds(one: Callable[[], Any]) -> float:
        for _ in range(4):
            one()
        backend.device.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            one()
        backend.device.synchronize()
        return 1e3 * (time.perf_counter() - begin) / count

    with open_samples(images, side, output_size(side, depth), **where) as samples:
        kept = vars(next(samples)).values()
        row = {
            "step_ms": milliseconds(lambda: step(*kept)),
            "both_ms": milliseconds(lambda: step(*vars(next(samples)).values())),
            "sample_ms": milliseconds(lambda: next(samples)),
        }
    return {"made": type(samples).__name__, **row}


def trained(options: list[str]) -> Callable[[], Row]:
    def case() -> Row:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, "-m", "fastunet", "train", *options, "--out", str(out)]
            subprocess.run(command, check=True, timeout=LIMIT - 10)
            with open(out / "metrics.csv") as file:
                rows = list(csv.DictReader(file))
        losses = [float(row["loss"]) for row in rows]
        return {
            "losses": losses,
            "took": float(rows[-1]["seconds"]),
            "validation": last_validation(rows),
        }

    return case


def last_validation(rows: list[dict[str, str]]) -> dict[str, float]:
    """The figures of the last step that has any."""
    found: dict[str, float] = {}
    for row in rows:
        found |= {key: float(value) for key, value in row.items() if key.startswith("val_") and value}
    return found


def summary(rows: dict[str, Row], settings: Settings) -> list[str]:
    lines = []
    runs = dict(rows)
    row = runs.pop(SAMPLES, {"failure": "was not done"})
    lines.append(
        row.get("failure")
        or f"{row['made']} take {row['sample_ms']:.3f} ms each, a step {row['step_ms']:.3f} on the same tile, "
        f"{row['both_ms']:.3f} on new ones"
    )
    lines += [f"training | steps | s | steps/s | mean loss of the first and last {LAST} | validation"]
    for name, row in runs.items():
        if "failure" in row:
            lines.append(f"{name} | {row['failure']}")
            continue
        losses, took = row["losses"], row["took"]
        ends = " to ".join(f"{statistics.mean(part):.4f}" for part in (losses[:LAST], losses[-LAST:]))
        figures = ", ".join(
            f"{key.removeprefix('val_')} {value:.4f}" for key, value in row["validation"].items()
        )
        rate = len(losses) / took if took else float("nan")
        lines.append(f"{name} | {len(losses)} | {took:.0f} | {rate:.1f} | {ends} | {figures}")
    draw(
        {name: row["losses"] for name, row in runs.items() if "losses" in row},
        Path(settings.out) / "curves.png",
    )
    return lines


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Losses by step, each the mean of those around it."""
    if not curves:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for name, losses in curves.items():
        width = max(1, len(losses) // 40)
        means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        axes.plot(np.arange(len(means)) + 1 + width // 2, means, label=name)
    axes.set(xlabel="step", ylabel="loss", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
