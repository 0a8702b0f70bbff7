"""How a kernel is told what to work on: one structure by value, as its file in kernels/ declares it.

A twin lists the same members in the same order with the functions below; C and ctypes lay them out alike.
"""

import ctypes
from typing import Any

Fields = list[tuple[str, Any]]


def integers(*names: str) -> Fields:
    """`int` members."""
    return [(name, ctypes.c_int) for name in names]


def floats(*names: str) -> Fields:
    """`float` members."""
    return [(name, ctypes.c_float) for name in names]


def longs(*names: str) -> Fields:
    """`long long` members."""
    return [(name, ctypes.c_longlong) for name in names]


def unsigned_longs(*names: str) -> Fields:
    """`unsigned long long` members."""
    return [(name, ctypes.c_ulonglong) for name in names]


def pointers(*names: str) -> Fields:
    """Members that point to device memory; None is null."""
    return [(name, ctypes.c_void_p) for name in names]


class TensorArgument(ctypes.Structure):
    """Tensor<T> of kernels/tensor.cuh; all zero, it stands for a tensor that is not there."""

    _fields_ = [
        *pointers("data"),
        *integers("images", "height", "width", "channels", "pitch", "top", "left", "reserved"),
    ]


def tensors(*names: str) -> Fields:
    """`Tensor<T>` members."""
    return [(name, TensorArgument) for name in names]
