"""Tensors of kernels/tensor.cuh in a device's memory, for tests that launch a kernel directly.

Memory is freed with the object that owns it, not with the last argument that points to it.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastunet.backends.cuda.arguments import TensorArgument
from fastunet.backends.cuda.launch import Launch


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to bfloat16 (to nearest, ties to even), as its 16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """What an element of so many bits keeps of float32 values."""
    return from_bfloat16(to_bfloat16(values)) if bits == 16 else np.asarray(values, np.float32)


@dataclass
class DeviceTensor:
    """A tensor (N, H, W, C) of elements of 16 or 32 bits, `pitch` of them stored for each pixel."""

    device: Any
    memory: Any
    shape: tuple[int, int, int, int]
    bits: int
    pitch: int

    @property
    def pointer(self) -> int:
        return self.memory.pointer

    def argument(self, top: int = 0, left: int = 0) -> TensorArgument:
        return TensorArgument(self.pointer, *self.shape, self.pitch, top, left, 0)

    def numpy(self) -> np.ndarray:
        """The values, once the padding is found to be zero."""
        stored = self.device.download(
            self.pointer, (*self.shape[:3], self.pitch), np.uint16 if self.bits == 16 else np.float32
        )
        stored = from_bfloat16(stored) if self.bits == 16 else stored
        np.testing.assert_array_equal(stored[..., self.shape[3] :], 0, "padding")
        return stored[..., : self.shape[3]]


def empty(device: Any, shape: tuple[int, ...], bits: int, pitch: int | None = None) -> DeviceTensor:
    """A tensor of poison; by default of the pitch of an activation."""
    images, height, width, channels = shape
    pitch = math.ceil(channels / 16) * 16 if pitch is None else pitch
    memory = device.allocate(images * height * width * pitch * bits // 8)
    return DeviceTensor(device, memory, (images, height, width, channels), bits, pitch)


def put(device: Any, values: np.ndarray, bits: int, pitch: int | None = None) -> DeviceTensor:
    """A tensor of these values, and of zeros in the padding."""
    tensor = empty(device, values.shape, bits, pitch)
    stored = np.pad(values.astype(np.float32), [(0, 0)] * 3 + [(0, tensor.pitch - values.shape[3])])
    device.upload(tensor.pointer, to_bfloat16(stored) if bits == 16 else stored)
    return tensor


def put_flat(device: Any, values: np.ndarray) -> Any:
    """Memory that holds these values as they are."""
    memory = device.allocate(values.nbytes)
    device.upload(memory.pointer, values)
    return memory


def run(device: Any, launch: Launch, bits: int, arguments: ctypes.Structure) -> None:
    """Launch as a kernel's host side says, built for elements of so many bits."""
    kernel = device.kernel(launch.file, launch.kernel, (f"-DELEMENT_BITS={bits}", *launch.defines))
    device.launch(kernel, launch.grid, launch.threads, launch.shared_bytes, arguments)


def assert_close(
    found: np.ndarray,
    expected: np.ndarray,
    tolerance: float,
    bits: int = 32,
    what: str = "",
    terms: np.ndarray | None = None,
) -> None:
    """Errors of at most `tolerance` of the largest expected value, and of bfloat16's rounding of each.

    With `terms`, the sums of the absolute values of what each result is the sum of, errors are relative to the largest
    of those: few results may all be small by cancellation.
    """
    assert found.shape == expected.shape, what
    scale = np.abs(expected if terms is None else terms).max() or 1.0
    allowed = tolerance * scale + (2**-8 * np.abs(expected) if bits == 16 else 0)
    excess = np.abs(found - expected) - allowed
    assert (excess <= 0).all(), f"{what}: beyond what is allowed by {excess.max():.2e}"
