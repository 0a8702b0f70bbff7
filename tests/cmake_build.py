"""Programs in C++ that tests build with CMake."""

import subprocess
from pathlib import Path
from typing import Any

import pytest


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """What a command prints; that it fails is shown with all of that."""
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(sources: Path, folder: Path, *options: str) -> Path:
    """Build the CMake project in `sources` in `folder`, which is returned."""
    cmake, ninja = pytest.importorskip("cmake"), pytest.importorskip("ninja")
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}")
    run(program, "-S", sources, "-B", folder, *generator, *options)
    run(program, "--build", folder)
    return folder
