"""Arrays of other libraries on the same device, in and out without a way through the host.

In: anything with `__dlpack__` (PyTorch, CuPy, JAX) or `__cuda_array_interface__` (version 3; Numba) becomes a `View`.
Out: `Exported` has both. Either way the later stream waits for the earlier one on the device, as the protocols ask.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastunet.backends import on_host
from fastunet.backends.cuda.device import Exchange, Memory
from fastunet.backends.cuda.strided import BYTES

CUDA, CUDA_MANAGED = 2, 13  # DLDeviceType
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "uint"}  # DLDataTypeCode; 6 are booleans


@dataclass(frozen=True)
class View:
    """An array on the device by address.

    Attributes
    ----------
    memory : Memory
        What keeps it.
    pointer : int
        Of its first element.
    shape, strides : tuple of int
        In elements.
    type : str
        Of `strided.TYPES`.
    """

    memory: Memory
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    type: str

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: Any) -> "View":
        """As of an ndarray: what lies at an index of the first axis, or with [..., None] one more axis at the end."""
        if place == (..., None):
            return replace(self, shape=(*self.shape, 1), strides=(*self.strides, 1))
        if not 0 <= place < len(self):
            raise IndexError(f"index {place} of an array of shape {self.shape}")
        pointer = self.pointer + place * self.strides[0] * BYTES[self.type]
        return replace(self, pointer=pointer, shape=self.shape[1:], strides=self.strides[1:])

    def part(self, axis: int, first: int, count: int) -> "View":
        """So many indices of an axis from `first` on."""
        return replace(
            self,
            pointer=self.pointer + first * self.strides[axis] * BYTES[self.type],
            shape=(*self.shape[:axis], count, *self.shape[axis + 1 :]),
        )

    def is_contiguous(self) -> bool:
        """Whether it lies as C arrays do and may be read 16 bytes at once."""
        expected = contiguous(self.shape)
        placed = (stride == e for n, stride, e in zip(self.shape, self.strides, expected) if n > 1)
        return all(placed) and self.pointer % 16 == 0


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a C array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class Exported:
    """Contiguous float32 in device memory as other libraries take it: DLPack, and on a GPU the CUDA array interface.

    The memory is shared, and kept while they use it.
    """

    exchange: Exchange
    memory: Memory
    shape: tuple[int, ...]

    def __dlpack__(self, **options: Any) -> Any:
        return self.exchange.dlpack(self.memory, self.shape, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.exchange.place

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.exchange.place[0] != CUDA:
            raise AttributeError("only memory of a GPU has a CUDA array interface")
        return {
            "shape": self.shape,
            "typestr": "<f4",
            "data": (self.memory.pointer, False),
            "strides": None,
            "stream": self.exchange.stream,
            "version": 3,
        }


def taken(values: Any, exchange: Exchange, name: str) -> View | np.ndarray:
    """A view of an array on the device called `name`; an ndarray itself, and whatever else is on the host as one.

    Raises
    ------
    ValueError
        If the array is on another GPU, or its type is not one of `strided.TYPES`.
    """
    if isinstance(values, View | np.ndarray):
        return values
    if hasattr(values, "__dlpack_device__"):
        kind, number = map(int, values.__dlpack_device__())
        here = exchange.place
        if (kind, number) == here or (kind == CUDA_MANAGED and here == (CUDA, number)):
            return _from_dlpack(values.__dlpack__(stream=exchange.stream), exchange)
    elif hasattr(values, "__cuda_array_interface__"):
        description = values.__cuda_array_interface__
        if exchange.holds(description["data"][0]):
            return _from_interface(description, values, exchange)
    found = on_host(values)
    if found is None:
        where = f"device {number} (DLPack type {kind})" if hasattr(values, "__dlpack_device__") else "a GPU"
        raise ValueError(f"an array on {where} was given to {name}; move it there, or to the host, first")
    return found


class _DLTensor(ctypes.Structure):
    """As in dlpack.h; a capsule named "dltensor" points to it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _from_dlpack(capsule: Any, exchange: Exchange) -> View:
    """A capsule that nobody consumes frees its array when it goes itself: so it is the owner."""
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous(shape)
    kind = f"{_CODES.get(tensor.code, f'DLPack type {tensor.code} of ')}{tensor.bits}"
    if tensor.lanes != 1:
        kind += f"x{tensor.lanes}"
    return _view((tensor.data or 0) + tensor.byte_offset, shape, strides, kind, capsule, exchange)


def _from_interface(description: dict[str, Any], owner: Any, exchange: Exchange) -> View:
    if description.get("mask") is not None:
        raise ValueError("a masked array was given; an array of which every number counts is expected")
    if description.get("stream") is not None:
        exchange.wait_for(description["stream"])
    dtype = np.dtype(description["typestr"])
    shape = tuple(description["shape"])
    given = description.get("strides")
    if any(stride % dtype.itemsize for stride in given or ()):
        raise ValueError(
            f"an array with strides of {given} bytes was given; multiples of {dtype.itemsize} are expected"
        )
    strides = contiguous(shape) if given is None else tuple(stride // dtype.itemsize for stride in given)
    kind = "uint8" if dtype.kind == "b" else dtype.name if dtype.isnative else dtype.str
    return _view(description["data"][0], shape, strides, kind, owner, exchange)


def _view(
    pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: str, owner: Any, exchange: Exchange
) -> View:
    if kind not in BYTES:
        raise ValueError(f"an array of {kind} was given; {', '.join(BYTES)} are what can be read")
    reach = [(n - 1) * stride * BYTES[kind] for n, stride in zip(shape, strides) if n > 0]
    before, after = (sum(f(0, part) for part in reach) for f in (min, max))
    memory = exchange.borrow(pointer + before, after - before + BYTES[kind], owner)
    return View(memory, pointer, shape, strides, kind)
