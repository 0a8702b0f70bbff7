"""bench/peers.py measures what it says: small networks through its engines, and tables whose figures are known."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import peers  # noqa: E402
import peers_accuracy  # noqa: E402
import peers_engines  # noqa: E402
import peers_table  # noqa: E402
import peers_turns  # noqa: E402

LOGITS = np.random.default_rng(0).standard_normal((1, 2, 4, 4))


@pytest.fixture
def task(tmp_path: Path) -> peers_engines.Task:
    """The smallest tile of a small network."""
    found = peers_engines.Task(tmp_path, base=3, tile=188, threads=1)
    peers_engines.prepare(found)
    return found


def giving(task: peers_engines.Task, factor: float = 1.0) -> peers_engines.Pass:
    """An engine that gives what it is to give, off by a factor."""
    return lambda: factor * LOGITS


def dying(task: peers_engines.Task) -> peers_engines.Pass:
    """An engine that ends its process in its first turn."""
    passes = []

    def one() -> np.ndarray:
        passes.append(1)
        return LOGITS if len(passes) <= peers_turns.FIRST_PASSES else os._exit(3)

    return one


def keeping(task: peers_engines.Task, megabytes: int) -> peers_engines.Pass:
    """An engine that is built with ten times the memory it keeps, and takes as much again for a pass."""
    values = np.ones((10 * megabytes, 10**6 // 4), np.float32)[:megabytes].copy()
    return lambda: values + 1


REFERENCE = peers_engines.Engine(peers.REFERENCE, giving, packages=("numpy",))


def test_the_script_times_what_it_has_checked(tmp_path):
    out = tmp_path / "peers.json"
    command = [sys.executable, BENCH / "peers.py", "--base", "3", "--tile", "188", "--threads", "1"]
    command += ["--rounds", "2", "--only", "nothing else", "--no-accuracy", "--readme", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    rows = {(row["what"], row["engine"]): row for row in results["rows"]}
    assert {engine for what, engine in rows if what == "training step"} == {"fastunet", peers.REFERENCE}
    assert {"fastunet", "fastunet, direct", peers.REFERENCE} <= {engine for what, engine in rows}
    assert ("inference", "fastunet, one thread") not in rows
    for (what, engine), row in rows.items():
        if engine != "fastunet, AVX2":  # not every processor has it
            assert len(row["ms"]) == 2 and min(row["ms"]) > 0, (what, engine)
            assert row["difference"] < (1e-4 if what == "inference" else 1e-3)
    assert rows["inference", "fastunet"]["difference"] > 0
    assert done.stdout.endswith(peers_table.readme(results) + "\n")
    again = subprocess.run([*command[:2], "--again", out], capture_output=True, text=True, check=True)
    assert again.stdout == peers_table.terminal(results) + "\n"


def test_who_fails_or_computes_something_else_is_left_out(task):
    engines = [
        REFERENCE,
        replace(REFERENCE, name="right", build=partial(giving, factor=1 + 5e-5)),
        replace(REFERENCE, name="wrong", build=partial(giving, factor=1.001)),
        replace(REFERENCE, name="not a number", build=partial(giving, factor=float("nan"))),
        replace(REFERENCE, name="dying", build=dying),
        replace(REFERENCE, name="absent", packages=("no_such_engine", "no_such_converter")),
        replace(REFERENCE, name="not converted", convert=Path.unlink),
    ]
    rows = {row["engine"]: row for row in peers.measured(engines, task, 2, float("inf"))}
    assert len(rows[REFERENCE.name]["ms"]) == len(rows["right"]["ms"]) == 2
    reasons = {name: row["left_out"] for name, row in rows.items() if "ms" not in row}
    assert reasons.keys() == {"wrong", "not a number", "dying", "absent", "not converted"}
    assert "something else" in reasons["wrong"] and "something else" in reasons["not a number"]
    assert reasons["dying"] == "its process ended with 3"
    assert reasons["absent"] == "not installed: pip install no_such_engine no_such_converter"
    assert reasons["not converted"].startswith("the network cannot be converted: ")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_memory_is_what_stays_and_what_a_pass_takes(task, rng):
    megabytes = int(rng.integers(20, 40))
    worker = peers_turns.Worker(replace(REFERENCE, build=partial(keeping, megabytes=megabytes)), task)
    worker.close()
    # Beside the weights the results of all first passes are kept; the interpreter takes a few MB of its own.
    assert worker.peak_mb == pytest.approx((1 + peers_turns.FIRST_PASSES) * megabytes, abs=5)


def test_accuracy_is_float32_s(task):
    errors = peers_accuracy.accuracy(task)
    for name in ("logits", "gradients"):
        for engine in ("fastunet", "PyTorch"):
            assert 1e-8 < errors[name][engine] < 1e-3


def test_ratios_are_of_one_round_and_judged():
    """The machine is twice as slow in the second round: no ratio changes by it."""

    def row(engine: str, ms: list[float], peak: float, what: str = "inference") -> dict[str, object]:
        return {"what": what, "base": 64, "engine": engine, "ms": ms, "peak_mb": peak}

    results = {
        "machine": "a machine",
        "versions": {"PyTorch": "2"},
        "date": "2026-01-01 00:00",
        "tile": 572,
        "threads": 2,
        "rows": [
            row("fastunet", [100, 200, 100], 330),
            row("PyTorch, channels_last", [410, 800, 400], 500),
            row("ncnn", [150, 300, 170], 900),
            row("OpenVINO", [290, 560, 290], 900),
            {
                "what": "inference",
                "base": 64,
                "engine": "ONNX Runtime",
                "left_out": "not installed: pip install it",
            },
            row("fastunet", [1000, 1000], 700, "training step"),
            row("PyTorch, channels_last", [3600, 3600], 1000, "training step"),
        ],
        "accuracy": {
            "base": 64,
            "logits": {"fastunet": 2e-6, "PyTorch": 1e-6},
            "gradients": {"fastunet": 4e-5, "PyTorch": 1e-5},
        },
    }
    lines = [
        [cell.strip() for cell in line.split("|")] for line in peers_table.terminal(results).splitlines()
    ]
    for expected in (
        ["PyTorch, channels_last", "410.0", "4.00", "4.00 to 4.10", "3.6", "4", "aim reached", "500"],
        ["ncnn", "170.0", "1.50", "1.50 to 1.70", "1.6", "1.8", "MISSED", "900"],
        ["OpenVINO", "290.0", "2.90", "2.80 to 2.90", "2.8", "3.2", "reached", "900"],
        ["PyTorch, channels_last", "3600.0", "3.60", "3.60 to 3.60", "3.6", "4.2", "reached", "1000"],
        ["ONNX Runtime: left out, not installed: pip install it"],
        ["peak memory 330 MB, at most 320: MISSED"],
        ["peak memory 0.70 of PyTorch's in channels_last, at most 0.85, aim 0.65: reached"],
    ):
        assert expected in lines
    logits, gradients = peers_table.terminal(results).splitlines()[-2:]
    assert logits.endswith(": reached") and gradients.endswith(": MISSED")
    assert "| ncnn | 170 ms (1.5x) | 900 |" in peers_table.readme(results).splitlines()
