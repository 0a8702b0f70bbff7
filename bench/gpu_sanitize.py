"""Every kernel once at its smallest shapes, in both precisions, under compute-sanitizer (bench/gpu.py --sanitize).

Each tensor has memory of its own, not a piece of a pool, so that a step beside it is seen.
"""

import functools
from typing import Any

from cuda_kernels import Numbers, operation
from cuda_shapes import smallest_cases
from gpu_checks import table
from gpu_stage import Cases, Row, Settings

LIMIT = 300.0


def stage(settings: Settings) -> Cases:
    if settings.gpu:
        import cupy

        cupy.cuda.set_allocator(None)
    found: dict[str, Any] = {}
    for precision in ("bf16", "fp32"):
        for case in smallest_cases():
            found[f"{precision} {case.name}"] = functools.partial(launched, settings, precision, case)
    return found


def launched(settings: Settings, precision: str, case: Any) -> Row:
    backend = table(settings, precision)
    operation(backend, case, Numbers(0, 2**14))()
    backend.device.synchronize()
    return {}


def summary(rows: dict[str, Row], settings: Settings) -> list[str]:
    """What failed; the tool's own words are in the stage's log."""
    failed = {name: row["failure"] for name, row in rows.items() if "failure" in row}
    lines = [f"{len(rows) - len(failed)} operations launched and watched"]
    return lines + [f"{name} | {text}" for name, text in failed.items()]
