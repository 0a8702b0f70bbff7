"""What only a GPU can tell, in one call of less than ten minutes: is it right, how fast is it, does it learn.

    python bench/gpu.py [--stages checks,kernels,network,training] [--minutes 9] [--data DIR] [--out DIR]
    python bench/gpu.py --sanitize
    python bench/gpu.py --device emulator --tiny

checks    tests of operations, kernels and Numba on the GPU, the emulator beside it, 100 steps bit by bit
kernels   every kernel at the shapes of the 572 tile: us, TFLOP/s, GB/s, % of the roofline as measured, x PyTorch
network   forward pass and training step against PyTorch's ways in bfloat16, and the memory of each
training  the same short training on GPU and CPU, and one at the paper's size; DIR/isbi2012, or synthetic images

--sanitize runs compute-sanitizer's four tools over every kernel at its smallest shapes instead.

Stages run in processes of their own, each within its share of the minutes; what a stage does not need, the next has. A
failure is written down and the rest goes on; the exit status is 1 if there was one. The C++ engine is built where it
cannot be imported. The tables are printed last and written to --out (default: $OUT, or runs/gpu) beside gpu.json, logs
and curves.png. Without a GPU --device emulator --tiny shows that the scripts work; its numbers mean nothing.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_stage import Row, Settings, do, read

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"checks": 3.0, "kernels": 3.0, "network": 2.0, "training": 2.0}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99
"""What the sanitizer exits with where it found something."""
SANITIZE = "sanitize"
ENDS = ("time", "process", "tool")
"""Rows that say why a whole stage ended early."""
SEARCH = (ROOT, ROOT / "bench", ROOT / "tests", ROOT / "build" / "gpu")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default=",".join(SHARES))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--data", default=os.environ.get("FASTUNET_DATA", str(ROOT / ".." / "shared" / "data"))
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "SECONDS", "LOG"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out, arguments.data = arguments.out.resolve(), os.path.abspath(arguments.data)
    if arguments.child:
        stage, seconds, log = arguments.child
        return run_child(stage, settings_of(arguments, float(seconds)), Path(log))
    stages = [f"{SANITIZE} {tool}" for tool in TOOLS] if arguments.sanitize else arguments.stages.split(",")
    unknown = [] if arguments.sanitize else [stage for stage in stages if stage not in SHARES]
    if unknown:
        parser.error(f"--stages has {unknown[0]!r}; {', '.join(SHARES)} are known")
    return run(arguments, stages)


def settings_of(arguments: argparse.Namespace, seconds: float) -> Settings:
    return Settings(arguments.device, arguments.tiny, arguments.data, str(arguments.out), seconds)


def run_child(stage: str, settings: Settings, log: Path) -> int:
    module = importlib.import_module(f"gpu_{stage}")
    return 0 if do(module.stage(settings), log, min(module.LIMIT, settings.seconds)) else 1


def run(arguments: argparse.Namespace, stages: list[str]) -> int:
    end = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    built = build_engine(arguments.out / "build.log")
    if arguments.device != "emulator":
        try:
            importlib.import_module("fastunet.backends").resolve_device(arguments.device)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    result: dict[str, object] = {"machine": machine(), "engine": built, "stages": {}}
    text = [str(result["machine"]), f"C++ engine: {built}"]
    failed = False
    with tempfile.TemporaryDirectory() as logs:
        for number, stage in enumerate(stages):
            shares = [SHARES.get(name, 1.0) for name in stages[number:]]
            seconds = (end - time.monotonic()) * shares[0] / sum(shares)
            settings = settings_of(arguments, seconds)
            rows = run_stage(stage, settings, Path(logs) / f"{stage}.jsonl")
            failed |= any("failure" in row for row in rows.values())
            result["stages"][stage] = rows  # type: ignore[index]
            (arguments.out / "gpu.json").write_text(json.dumps(result, indent=1))
            ends = {name: rows.pop(name) for name in ENDS if name in rows}
            text += ["", f"## {stage}", *summary(stage, rows, settings)]
            text += [f"{name}: {row['failure']}" for name, row in ends.items()]
    (arguments.out / "gpu.txt").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    return int(failed)


def summary(stage: str, rows: dict[str, Row], settings: Settings) -> list[str]:
    return importlib.import_module(f"gpu_{stage.partition(' ')[0]}").summary(rows, settings)


def run_stage(stage: str, settings: Settings, log: Path) -> dict[str, Row]:
    """Start the stage's process, and again after a failure, until all is done or the time is up."""
    end = time.monotonic() + settings.seconds
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SEARCH)), "PYTHONUNBUFFERED": "1"}
    output = Path(settings.out) / f"{stage.replace(' ', '-')}.log"
    with open(output, "w") as file:
        while True:
            known = len(read(log))
            try:
                child = subprocess.Popen(
                    command(stage, settings, end - time.monotonic(), log),
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:  # there is no compute-sanitizer
                return {"process": {"failure": str(error)}}
            try:
                status = child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                return {
                    **read(log),
                    "time": {"failure": f"{settings.seconds:.0f} s were not enough; see {output}"},
                }
            if status == 0:
                return read(log)
            if status == FOUND:
                return {**read(log), "tool": {"failure": f"it found errors; see {output}"}}
            if len(read(log)) == known:  # it does not even begin, or ends after its last case
                return {**read(log), "process": {"failure": f"ended with {status}; see {output}"}}


def command(stage: str, settings: Settings, seconds: float, log: Path) -> list[str]:
    name, _, tool = stage.partition(" ")
    options = ["--device", settings.device, "--data", settings.data, "--out", settings.out]
    child = [sys.executable, str(Path(__file__).resolve()), *options, "--child", name, str(seconds), str(log)]
    if settings.tiny:
        child.append("--tiny")
    if not tool:
        return child
    padding = ["--padding", "256"] if tool == "memcheck" else []
    options = ["--tool", tool, *padding, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    return ["compute-sanitizer", *options, *child]


def build_engine(log: Path) -> str:
    """Build the C++ engine for this Python with CMake, unless it is there; say how that went."""
    sys.path[:0] = map(str, SEARCH)
    if importlib.util.find_spec("_fastunet") is not None:
        return "found"
    if importlib.util.find_spec("pybind11") is None or shutil.which("cmake") is None:
        return "FAILED: CMake or pybind11 is missing; what needs the CPU's table fails"
    folder = ROOT / "build" / "gpu"
    place = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    configure = ["cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    steps = (
        [*configure, f"-Dpybind11_DIR={place.stdout.strip()}", "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", folder, "--parallel", str(os.cpu_count())],
    )
    with open(log, "w") as file:
        for step in steps:
            try:
                subprocess.run(step, stdout=file, stderr=subprocess.STDOUT, check=True, timeout=180)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                return f"FAILED ({error}); see {log}; what needs the CPU's table fails"
    return "built"


def machine() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = ""
    if shutil.which(query[0]):
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return f"{gpu or 'no GPU'}; {os.cpu_count()} CPU cores; Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
