"""The device of the tests in this folder, also by name: UNet(device="emulator").

FASTUNET_TEST_DEVICE=cuda puts a real GPU in the emulator's place, and leaves out the files that make emulators of their
own.
"""

import functools
import os
from typing import Any

import pytest

from emulator.device import EmulatorDevice
from fastunet import backends
from fastunet.backends.cuda.table import CudaBackend

DEVICE = os.environ.get("FASTUNET_TEST_DEVICE", "emulator")
collect_ignore = [] if DEVICE == "emulator" else ["test_emulator.py", "test_conv3x3_sm80.py"]


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
