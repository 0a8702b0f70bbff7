"""The table of kernels of NVIDIA GPUs: one for each GPU and precision, made when first asked for."""

import functools
import threading

from fastunet.backends.cuda.device import CupyDevice
from fastunet.backends.cuda.table import CudaBackend

_making = threading.Lock()


def backend(device: str, precision: str) -> CudaBackend:
    """Return the table of "cuda:N" for "bf16" or "fp32".

    Raises
    ------
    ValueError
        As `CupyDevice`.
    """
    with _making:
        return _backend(device, precision)


def check(device: str) -> None:
    """Raise a ValueError that says in one sentence what is missing where "cuda:N" cannot be used."""
    with _making:
        _device(device)


@functools.cache
def _device(device: str) -> CupyDevice:
    return CupyDevice(int(device.partition(":")[2]))


@functools.cache
def _backend(device: str, precision: str) -> CudaBackend:
    return CudaBackend(_device(device), precision)
