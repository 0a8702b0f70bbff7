"""The device of the tests in this folder, also by name: UNet(device="emulator")."""

import functools

import pytest

from emulator.device import EmulatorDevice
from fastunet import backends
from fastunet.backends.cuda.table import CudaBackend


@functools.cache
def emulator() -> EmulatorDevice:
    return EmulatorDevice()


@functools.cache
def table(precision: str) -> CudaBackend:
    return CudaBackend(emulator(), precision)


backends.register("emulator", table)


@pytest.fixture(scope="session")
def device() -> EmulatorDevice:
    return emulator()
