"""The device of the tests in this folder, also by name: UNet(device="emulator").

FASTUNET_TEST_DEVICE=cuda puts a real GPU in the emulator's place, and leaves out the tests of the emulator itself.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest

from emulator.device import EmulatorDevice
from fastunet import backends
from fastunet.backends.cuda.table import CudaBackend

DEVICE = os.environ.get("FASTUNET_TEST_DEVICE", "emulator")
collect_ignore = [] if DEVICE == "emulator" else ["test_emulator.py"]


@functools.cache
def emulator() -> EmulatorDevice:
    return EmulatorDevice()


@functools.cache
def table(precision: str) -> CudaBackend:
    if DEVICE == "emulator":
        return CudaBackend(emulator(), precision)
    return backends.load(backends.resolve_device(DEVICE), precision)


backends.register("emulator", table)


@pytest.fixture(scope="session")
def device() -> Any:
    return table("fp32").device


@pytest.fixture(scope="session")
def device_of() -> Callable[..., Any]:
    """Gives a device of an architecture, whose blocks and warps take turns by a seed; or the GPU, whatever it is."""

    @functools.cache
    def made(architecture: str, seed: int = 0) -> Any:
        return EmulatorDevice(architecture, seed=seed) if DEVICE == "emulator" else table("bf16").device

    return made
