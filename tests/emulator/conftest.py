"""The device of the tests in this folder."""

import pytest

from emulator.device import EmulatorDevice


@pytest.fixture(scope="session")
def device() -> EmulatorDevice:
    return EmulatorDevice()
