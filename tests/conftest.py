"""Shared by all tests: where the real images are, and a random generator that differs from run to run."""

import contextlib
import os
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.configuration
import numpy as np
import pytest

hypothesis.settings.register_profile("fastunet", database=None)
hypothesis.settings.load_profile("fastunet")
_hypothesis_folder = tempfile.TemporaryDirectory()  # a run of the tests leaves nothing behind
hypothesis.configuration.set_hypothesis_home_dir(_hypothesis_folder.name)

# What a test of the CPU leaves to be chosen is the CPU, where there is a GPU too.
os.environ["FASTUNET_DEVICE"] = "cpu"

DATA = Path(os.environ.get("FASTUNET_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real microscopy images, or a skip that says it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real images are absent: {DATA} (set FASTUNET_DATA)")
    return DATA


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh numbers in every run; FASTUNET_TEST_SEED repeats those that a failure printed."""
    seed = int(os.environ.get("FASTUNET_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
    print(f"FASTUNET_TEST_SEED={seed}")
    return np.random.default_rng(seed)


def pytest_unconfigure() -> None:
    with contextlib.suppress(OSError):  # pytest-benchmark makes it whether or not there is anything to keep
        Path(".benchmarks").rmdir()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests the absence of real images left out."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if "real images are absent" in str(report.longrepr)
    ]
    terminalreporter.write_line(f"{len(skipped)} tests skipped for want of real images")
