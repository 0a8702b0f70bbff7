"""bench/gpu.py works, as far as a machine without a GPU can tell: through the emulator, at the smallest shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import cuda_shapes  # noqa: E402
import gpu_sanitize  # noqa: E402
import gpu_stage  # noqa: E402
from test_compile import NotingDevice, intended_blocks  # noqa: E402

from fastunet.backends.cuda.table import CudaBackend  # noqa: E402


def test_shapes_are_those_of_the_paper():
    """Sums that were also found by hand for the network as a whole."""
    found = cuda_shapes.cases()
    forward = [case for case in found if case.operation.endswith("forward")]
    assert sum(case.flops for case in forward) == pytest.approx(300.9e9, rel=1e-3)
    assert found[-1].inputs == (31_030_658,)
    floors = [cuda_shapes.H200.floor(case) for case in forward if case.layer != "head"]
    assert sum(floors) == pytest.approx(395e-6, rel=0.01)
    sides = {case.side for case in found if case.layer.startswith("decoder.3")}
    assert sides == {196, 392, 390}
    assert next(case.side for case in found if case.layer == "head") == 388
    smallest = cuda_shapes.smallest_cases()
    assert {case.operation for case in smallest} == {case.operation for case in found}


def kernels_of(cases, precision: str) -> set[tuple[str, str]]:
    """File and name of what the cases' own kernels are."""
    import cuda_kernels

    device = NotingDevice("sm_80")
    table, found = CudaBackend(device, precision), set()
    for case in cases:
        device.launches.clear()
        cuda_kernels.operation(table, case, cuda_kernels.Numbers(0, 2**14))()
        found |= {(one.file, one.name) for one in device.launches if cuda_kernels.belongs(one.name, case)}
    return found


def test_no_kernel_is_left_out():
    """Each is timed, but those in float32; and each runs under the sanitizer."""
    written = {(file, name) for file, name, _ in intended_blocks()}
    cases = cuda_shapes.smallest_cases()
    timed = kernels_of(cases, "bf16")
    assert timed == {(file, name) for file, name in written if not file.endswith("_fp32.cu")}
    assert timed | kernels_of(cases, "fp32") == written
    settings = gpu_stage.Settings("emulator", True, "", "", 60)
    watched = gpu_sanitize.stage(settings)
    assert set(watched) == {f"{precision} {case.name}" for precision in ("bf16", "fp32") for case in cases}


def test_kernels_and_network_through_the_emulator(tmp_path):
    command = [sys.executable, BENCH / "gpu.py", "--device", "emulator", "--tiny", "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--stages", "kernels,network"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    logs = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    kernels = set()
    for case in cuda_shapes.smallest_cases():
        ours, theirs = (
            stages["kernels"][f"{engine} | {case.name}"] for engine in ("fastunet", "PyTorch eager")
        )
        assert ours["us"] > 0 and theirs["us"] > 0
        kernels |= set(ours["kernels"])
        assert any(line.startswith(f"{case.name} | ") for line in done.stdout.splitlines())
    assert kernels == {name for _, name in kernels_of(cuda_shapes.smallest_cases(), "bf16")}
    for what in ("forward", "training step"):
        for engine in ("fastunet", "fastunet, not recorded", "eager"):
            assert stages["network"][f"{what} | {engine}"]["ms"] > 0
    assert "geometric mean: " in done.stdout
    assert (tmp_path / "gpu.txt").read_text() == done.stdout


def test_samples_are_timed_beside_steps(tmp_path):
    import gpu_training

    settings = gpu_stage.Settings("emulator", True, "", str(tmp_path), 60)
    row = gpu_training.stage(settings)[gpu_training.SAMPLES]()
    assert row["made"] == "HostSamples" and min(row[f"{what}_ms"] for what in ("sample", "step", "both")) > 0
    lines = gpu_training.summary({gpu_training.SAMPLES: row}, settings)
    assert lines[0].startswith("HostSamples take ") and len(lines) == 2


def test_the_emulators_results_are_compared_and_tests_are_run(tmp_path):
    import gpu_checks

    settings = gpu_stage.Settings("emulator", True, "", str(tmp_path), 60)
    names = "same as on the emulator, bf16", "trainings bitwise the same, fp32", "tests of single kernels"
    cases = {name: gpu_checks.stage(settings)[name] for name in names}
    assert gpu_stage.do(cases, tmp_path / "log", 60)
    rows = gpu_stage.read(tmp_path / "log")
    assert list(rows) == list(names) and all(row["found"] for row in rows.values())


def test_a_result_that_is_off_fails_the_check(monkeypatch):
    import gpu_checks

    numbers, calls = gpu_checks.numbers, []

    def moved(table, case):
        calls.append(case)
        return [values * (1 + 0.02 * (len(calls) == 1)) for values in numbers(table, case)]

    monkeypatch.setattr(gpu_checks, "numbers", moved)
    monkeypatch.setattr(gpu_checks, "smallest_cases", lambda: cuda_shapes.smallest_cases()[:1])
    with pytest.raises(RuntimeError, match=r"image in 44\^2 1 -> 1 is off by 2.0e-02"):
        gpu_checks.beside_the_emulator(gpu_stage.Settings("emulator", True, "", "", 60), "bf16")


def test_a_failure_is_written_down_and_the_rest_goes_on(tmp_path):
    """As after a CUDA error: the process ends, and the next begins behind the case that failed."""
    done = []

    def case(name, fails=False):
        def run():
            done.append(name)
            if fails:
                raise RuntimeError("an illegal memory access was encountered")
            return {"us": 1.0}

        return run

    cases = {"a": case("a"), "b": case("b", fails=True), "c": case("c")}
    log = tmp_path / "log"
    assert not gpu_stage.do(cases, log, 60)
    assert gpu_stage.do(cases, log, 60)
    assert done == ["a", "b", "c"]
    rows = gpu_stage.read(log)
    assert rows["a"]["us"] == rows["c"]["us"] == 1.0
    assert rows["b"] == {"failure": "RuntimeError: an illegal memory access was encountered"}


def test_a_case_that_hangs_ends_its_process(tmp_path):
    code = (
        "import pathlib, sys, time; from gpu_stage import do; "
        "do({'hangs': lambda: time.sleep(60)}, pathlib.Path(sys.argv[1]), 0.2)"
    )
    command = [sys.executable, "-c", code, tmp_path / "log"]
    child = subprocess.run(command, cwd=BENCH, capture_output=True, timeout=30)
    assert child.returncode == 1
    assert gpu_stage.read(tmp_path / "log") == {
        "hangs": {"failure": "ended its process, or took more than 0 s"}
    }


def test_what_cannot_be_used_is_said(tmp_path):
    command = [sys.executable, BENCH / "gpu.py", "--out", tmp_path]
    done = subprocess.run([*command, "--stages", "kernels,speed"], capture_output=True, text=True)
    assert done.returncode == 2 and "--stages has 'speed'" in done.stderr
    done = subprocess.run([*command, "--device", "cuda:99"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("device 'cuda:99' was asked for, but ") and done.stderr.count("\n") == 1
