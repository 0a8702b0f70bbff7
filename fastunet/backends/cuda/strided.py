"""Host side of kernels/strided.cu: copies between arrays of any type and strides."""

import ctypes
import math

from fastunet.backends.cuda.arguments import Fields, integers, pointers
from fastunet.backends.cuda.launch import Launch, blocks

THREADS = 256
AXES = 4

TYPES = ("float32", "bfloat16", "int32", "int64", "uint8", "uint16", "int16", "int8", "float64")
"""What is read, by the number that the kernel knows it by; the first three can be written too."""
BYTES = dict(zip(TYPES, (4, 2, 4, 8, 1, 2, 2, 1, 8)))

_LONGS: Fields = [(name, ctypes.c_longlong * AXES) for name in ("source_strides", "target_strides")]


class CopyArguments(ctypes.Structure):
    _fields_ = [
        *pointers("source", "target"),
        *_LONGS,
        ("extents", ctypes.c_int * AXES),
        *integers("source_type", "target_type"),
    ]


def copy(shape: tuple[int, ...]) -> Launch:
    """Launch of copy, of arrays of a shape."""
    count = math.prod(shape)
    # The last block's threads count up to a multiple of their number.
    defines = ("-DINDEX_BITS=32",) if count <= 2**32 - THREADS else ("-DINDEX_BITS=64",)
    return Launch("strided.cu", "copy", defines, (blocks(count, THREADS), 1, 1), THREADS, 0)
