"""Stage "checks": the tests on the device, the emulator's results beside it, and what must not change from run to run.

A race that no emulator shows is one that changes the result: the same step is repeated a hundred times and every
gradient compared bit by bit.
"""

import functools
import importlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from cuda_kernels import Numbers, operation
from cuda_shapes import Case, smallest_cases
from gpu_network import sizes, tile
from gpu_stage import Cases, Row, Settings

from fastunet.backends.cuda.arrays import Array, Buffer

LIMIT = 240.0
REPEATS = 100
BOUNDS = {"bf16": 1e-2, "fp32": 1e-5}
"""Of ||device - emulator|| / ||emulator||: sums in another order, and then an element rounded the other way."""
TESTS = {
    "the table's and the network's tests": [
        "tests/emulator/test_table.py",
        "tests/emulator/test_training_step.py",
    ],
    "tests of operations at full size": ["tests/test_ops_cuda.py"],
    "tests of single kernels": ["tests/emulator", "--ignore=tests/emulator/test_table.py"],
    "tests of the Numba kernels": ["tests/test_numba_cuda.py", "-k", "on_the_gpu"],
}
TINY_TESTS = {"tests of single kernels": ["tests/emulator/test_sgd_momentum.py"]}


def stage(settings: Settings) -> Cases:
    listed = (TINY_TESTS if settings.tiny else TESTS).items()
    found: dict[str, Any] = {
        name: functools.partial(tests, settings, arguments) for name, arguments in listed
    }
    for precision in BOUNDS:
        found[f"gradients bitwise the same, {precision}"] = functools.partial(repeated, settings, precision)
        found[f"trainings bitwise the same, {precision}"] = functools.partial(
            trained_twice, settings, precision
        )
    for precision in BOUNDS:  # last: the emulator has first to be compiled
        name = f"same as on the emulator, {precision}"
        found[name] = functools.partial(beside_the_emulator, settings, precision)
    return found


def tests(settings: Settings, arguments: list[str]) -> Row:
    """Run pytest on the device; raises unless something passed and nothing failed."""
    environment = {**os.environ, "FASTUNET_TEST_DEVICE": settings.device}
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT - 10)
    print(done.stdout, done.stderr, flush=True)
    counts = {
        what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
    }
    if done.returncode != 0 or not counts.get("passed"):
        failed = re.findall(r"^FAILED \S+", done.stdout, re.MULTILINE)
        raise RuntimeError(f"pytest ended with {done.returncode}, {counts}: {'; '.join(failed[:5])}")
    return {"found": ", ".join(f"{count} {what}" for what, count in counts.items())}


def table(settings: Settings, precision: str) -> Any:
    from fastunet import backends

    if not settings.gpu:
        importlib.import_module("emulator.conftest")
    return backends.load(backends.resolve_device(settings.device), precision)


def numbers(table: Any, case: Case) -> list[np.ndarray]:
    """What an operation gives, from the same random data each time."""
    found = operation(table, case, Numbers(1, 2**16))()
    read = {np.ndarray: lambda one: one, Array: table.numpy, Buffer: table.read}
    return [read[type(one)](one) for one in found]


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0))


def beside_the_emulator(settings: Settings, precision: str) -> Row:
    from emulator.device import EmulatorDevice

    from fastunet.backends.cuda.table import CudaBackend

    device, chosen = table(settings, precision), smallest_cases()

    def emulated(case: Case) -> list[np.ndarray]:
        return numbers(CudaBackend(EmulatorDevice(seed=1), precision), case)

    errors = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compilers take their time
        for case, found in zip(chosen, pool.map(emulated, chosen)):
            pairs = zip(numbers(device, case), found, strict=True)
            errors[case.name] = max(relative_error(one, wanted) for one, wanted in pairs)
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    if not errors[worst] <= BOUNDS[precision]:
        raise RuntimeError(f"{worst} is off by {errors[worst]:.1e}, more than {BOUNDS[precision]:.0e}")
    return {"found": f"{len(errors)} operations, worst {errors[worst]:.1e} ({worst})"}


def network(settings: Settings, precision: str) -> tuple[Any, Any]:
    from fastunet import SGD, UNet

    table(settings, precision)
    base, _, depth = sizes(settings)
    model = UNet(base_channels=base, depth=depth, seed=1, device=settings.device, precision=precision)
    return model, SGD(model, lr=1e-3, momentum=0.9)


def repeated(settings: Settings, precision: str) -> Row:
    """The gradients of one step, again and again."""
    model, optimizer = network(settings, precision)
    given, gradients = tile(settings), model.parameters().gradients_buffer
    first, differing, count = None, 0, 2 if settings.tiny else REPEATS
    for _ in range(count):
        model.draws = 0
        optimizer.zero_grad()
        model.loss(*given).backward()
        bits = model.backend.read(gradients).view(np.uint32)
        first = bits if first is None else first
        differing += not np.array_equal(bits, first)
    if differing or not np.isfinite(first.view(np.float32)).all() or not first.any():
        raise RuntimeError(f"{differing} of {count} repetitions differ, or no gradient is finite")
    return {"found": f"{count} repetitions, {len(first)} numbers each"}


def trained_twice(settings: Settings, precision: str) -> Row:
    """Two trainings by recorded steps and one by single operations end with the same bits."""
    from fastunet.training_step import TrainingStep

    count, ends = 4 if settings.tiny else REPEATS // 2, []
    given = tile(settings)
    for recorded in (True, True, False):
        model, optimizer = network(settings, precision)
        step, losses = TrainingStep(model, optimizer), []
        for _ in range(count):
            if recorded:
                losses.append(step(*given)())
            else:
                optimizer.zero_grad()
                loss = model.loss(*given)
                loss.backward()
                optimizer.step()
                losses.append(float(loss))
        ends.append((losses, model.backend.read(model.parameters().values_buffer).view(np.uint32)))
    for (losses, bits), what in zip(ends[1:], ("a second training", "the training by single operations")):
        if losses != ends[0][0] or not np.array_equal(bits, ends[0][1]):
            first = next((i for i, (a, b) in enumerate(zip(losses, ends[0][0])) if a != b), count)
            raise RuntimeError(f"{what} differs from step {first + 1} on")
    return {"found": f"{count} steps, loss {ends[0][0][0]:.4f} to {ends[0][0][-1]:.4f}"}


def summary(rows: dict[str, Row], settings: Settings) -> list[str]:
    lines = ["check | found"]
    for name, row in rows.items():
        lines.append(f"{name} | {row.get('found', 'FAILED: ' + str(row.get('failure')))}")
    return lines
