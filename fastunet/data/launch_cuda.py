"""Run Numba-CUDA kernels on the arrays and streams of other libraries, without ever waiting for the device.

Imported only by the CUDA versions of the data side's kernels.
"""

import importlib.util
from typing import Any

if importlib.util.find_spec("numba_cuda") is None:
    raise ImportError("numba-cuda is not installed; pip install 'fastunet[cuda13]' or 'fastunet[cuda12]'")

from numba import cuda
from numba.cuda.core import config
from numba.cuda.cudadrv import error as errors
from numba.cuda.cudadrv.devicearray import is_cuda_ndarray

FAILURES: tuple[type[Exception], ...] = (
    ImportError,
    RuntimeError,
    *(getattr(errors, name, RuntimeError) for name in ("CudaDriverError", "NvvmError", "NvrtcError")),
)
"""What Numba raises where driver, compiler or memory do not do; its simulator lacks some of them."""

# A small image is a small grid, and there is nothing to warn of.
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0


def on_device(function: Any) -> Any:
    """Device function of the same Python source as a Numba function of the CPU's.

    Products may be fused there too, but no more is relaxed; what it calls in turn, Numba-CUDA compiles by itself, and
    with any relaxation the CPU's version asks for.
    """
    return cuda.jit(device=True)(function.py_func)


def device_array(array: Any) -> Any:
    """View of anything with __cuda_array_interface__; the caller's streams are in order, so none is waited for."""
    return array if array is None or is_cuda_ndarray(array) else cuda.as_cuda_array(array, sync=False)


def numba_stream(stream: Any) -> Any:
    """The stream of an address, as CuPy's `stream.ptr`; 0 is the default one. Numba's own are taken as they are."""
    return cuda.external_stream(stream) if isinstance(stream, int) and stream else stream


def launch(
    kernel: Any,
    shape: tuple[int, int],
    block: tuple[int, int],
    stream: Any,
    *arguments: Any,
) -> None:
    """Start a kernel with a thread for each pixel of `shape` (rows, columns) and return at once.

    Parameters
    ----------
    kernel : Numba-CUDA kernel
    shape : (rows, columns)
    block : (columns, rows)
        Of the threads of a block.
    stream : int or stream of Numba
        As for `numba_stream`.
    *arguments
    """
    grid = (-(-shape[1] // block[0]), -(-shape[0] // block[1]))
    if all(grid):
        kernel[grid, block, numba_stream(stream)](*arguments)
