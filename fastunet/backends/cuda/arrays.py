"""What the kernels work on, in device memory: channels-last tensors, and flat buffers of parameters."""

import math
from dataclasses import dataclass
from typing import Any

from fastunet.backends.cuda.arguments import TensorArgument
from fastunet.backends.cuda.device import Device, Memory

BLOCK = 16
"""Channels are padded to a multiple of this many; those beyond the last are zero."""
IMAGE_CHANNELS = 4
"""A tensor from outside of at most this many channels is an image: not padded."""


def padded(channels: int) -> int:
    """`channels` rounded up to a multiple of BLOCK."""
    return -(-channels // BLOCK) * BLOCK


@dataclass
class Array:
    """A tensor (N, H, W, C) in device memory, each pixel's channels side by side.

    Attributes
    ----------
    memory : Memory
    shape : tuple of int
    pitch : int
        Stored channels of a pixel; those beyond C are zero.
    bits : int
        16 (bfloat16) or 32 (float32).
    rectified : bool
        Whether it is the output of a ReLU, so that its producer needs no gradient where it is 0.
    masked : bool
        Whether it is a gradient, and already 0 where the ReLU it belongs to gave 0.
    """

    memory: Memory
    shape: tuple[int, int, int, int]
    pitch: int
    bits: int
    rectified: bool = False
    masked: bool = False

    @classmethod
    def allocate(
        cls, device: Device, shape: tuple[int, ...], bits: int, pitch: int | None = None, **marks: bool
    ) -> "Array":
        """Undefined contents; the pitch is that of an activation unless given."""
        images, height, width, channels = shape
        if min(shape) < 1:
            raise ValueError(f"an array of shape {shape} was asked for; every axis must be at least 1")
        pitch = padded(channels) if pitch is None else pitch
        memory = device.allocate(images * height * width * pitch * bits // 8)
        return cls(memory, (images, height, width, channels), pitch, bits, **marks)

    @property
    def pointer(self) -> int:
        return self.memory.pointer

    @property
    def pixels(self) -> int:
        return math.prod(self.shape[:3])

    def argument(self, top: int = 0, left: int = 0) -> TensorArgument:
        """What a kernel is told: the tensor, and where in it a smaller one begins."""
        return TensorArgument(self.pointer, *self.shape, self.pitch, top, left, 0)


@dataclass
class Storage:
    """Memory of a flat buffer of floats, and of the same numbers in bfloat16 from when a kernel first reads those."""

    memory: Memory
    shadow: Memory | None = None


class Buffer:
    """A flat float32 buffer in device memory, or a slice of one, which shares its storage.

    Parameters
    ----------
    device : Device
    storage : Storage
    first, count : int
        Its place in the storage, in floats.
    """

    def __init__(self, device: Device, storage: Storage, first: int, count: int) -> None:
        self.device = device
        self.storage = storage
        self.first = first
        self.count = count

    @property
    def pointer(self) -> int:
        return self.storage.memory.pointer + 4 * self.first

    @property
    def shadow_pointer(self) -> int | None:
        """Where this slice's numbers are in bfloat16, or None where they are not."""
        return None if self.storage.shadow is None else self.storage.shadow.pointer + 2 * self.first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: slice) -> "Buffer":
        first, end, _ = place.indices(self.count)
        return Buffer(self.device, self.storage, self.first + first, end - first)

    def __setitem__(self, place: Any, value: float) -> None:
        """`buffer[...] = 0`: nothing else is needed."""
        if place is not ... or value != 0:
            raise ValueError("a buffer on a CUDA device can be set to zero as a whole only: buffer[...] = 0")
        self.device.zero(self.pointer, 4 * self.count)
