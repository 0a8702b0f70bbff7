"""A short run of the fuzzing targets (fuzz/CMakeLists.txt) under the sanitizers; longer ones are run by hand."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from cmake_build import build, run

FOLDER = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FOLDER))
from seeds import write_seeds  # noqa: E402

pytestmark = pytest.mark.slow

# By libFuzzer, and by the driver for compilers that have none.
COMPILERS = {
    "libFuzzer": ("clang++", *(f"clang++-{version}" for version in range(25, 11, -1))),
    "driver": ("g++",),
}
RUNS = {"fuzz_model": 5000, "fuzz_predict": 500}


@pytest.fixture(scope="module", params=COMPILERS)
def targets(request, tmp_path_factory):
    """A folder with the built targets."""
    compiler = next(filter(None, map(shutil.which, COMPILERS[request.param])), None)
    if compiler is None:
        pytest.skip(f"no compiler of {COMPILERS[request.param][0]} is there")
    folder = build(FOLDER, tmp_path_factory.mktemp("fuzz"), f"-DCMAKE_CXX_COMPILER={compiler}")
    has_it = re.search(r"HAS_LIBFUZZER:INTERNAL=(\w*)", (folder / "CMakeCache.txt").read_text())
    if request.param == "libFuzzer" and not (has_it and has_it[1]):
        pytest.skip(f"{compiler} lacks libFuzzer (Debian: libclang-rt-dev)")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_no_input_leads_astray(rng, targets, tmp_path, name):
    model = write_seeds(tmp_path)
    options = (f"-runs={RUNS[name]}", f"-seed={rng.integers(1, 2**31)}", "-max_len=4096")
    environment = os.environ | {"FUZZ_MODEL": str(model)}
    seeds = tmp_path / name.removeprefix("fuzz_")
    done = run(targets / name, *options, seeds, cwd=tmp_path, env=environment)
    assert f"Done {RUNS[name]} runs" in done.stderr
