"""Every CUDA kernel at the shapes of the 572 tile, beside PyTorch's: `pytest bench --benchmark-only`, with a GPU.

A round is a CUDA graph that does the operation several times on data that no cache holds; the group says how often.
bench/gpu.py times the same by events and makes the table.
"""

import pytest
from cuda_shapes import cases
from gpu_kernels import OURS, PEER_ENGINES, measured_ceilings, prepared
from gpu_stage import Settings

from fastunet import backends

SETTINGS = Settings("cuda", tiny=False, data="", out="", seconds=0)


@pytest.fixture(scope="module")
def ceilings():
    try:
        backends.resolve_device("cuda")
    except ValueError as error:
        pytest.skip(str(error))
    return measured_ceilings()


@pytest.mark.parametrize("engine", [OURS, PEER_ENGINES[0]])
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_kernel(benchmark, ceilings, case, engine):
    import torch

    work = prepared(SETTINGS, engine, case)
    benchmark.group = f"{case.name}, {work.times} times"

    def run():
        work.start()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    seconds = benchmark.stats.stats.median / work.times
    benchmark.extra_info["GFLOP/s"] = round(case.flops / seconds / 1e9)
    benchmark.extra_info["GB/s"] = round(case.moved / seconds / 1e9)
    benchmark.extra_info["% of roofline"] = round(100 * ceilings.floor(case) / seconds)
