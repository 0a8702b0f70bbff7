"""Host side of the kernels that touch every element once (kernels/pointwise.cuh): convert, maxpool2x2, dropout."""

import ctypes

from fastunet.backends.cuda.arguments import (
    TensorArgument,
    floats,
    integers,
    pointers,
    tensors,
    unsigned_longs,
)
from fastunet.backends.cuda.launch import Launch, blocks

MOST_BLOCKS = 65535  # along a grid's second and third sides


class ConvertArguments(ctypes.Structure):
    _fields_ = tensors("source", "target")


class SumArguments(ctypes.Structure):
    _fields_ = tensors("one", "other", "total")


class MaskArguments(ctypes.Structure):
    _fields_ = tensors("gradient", "output", "masked")


class ScaleArguments(ctypes.Structure):
    _fields_ = [*tensors("source", "scaled"), *floats("factor")]


class MaxpoolForwardArguments(ctypes.Structure):
    _fields_ = tensors("x", "pooled")


class MaxpoolBackwardArguments(ctypes.Structure):
    _fields_ = [*tensors("gradient", "x", "present", "total"), *integers("rectified")]


class DropoutArguments(ctypes.Structure):
    _fields_ = [
        *tensors("input", "output"),
        *pointers("steps"),
        *unsigned_longs("seed", "draw"),
        *floats("rate"),
    ]


def convert(source_bits: int, target: TensorArgument) -> Launch:
    """Launch of convert, from elements of so many bits."""
    return _over("convert.cu", "convert", target, (f"-DSOURCE_BITS={source_bits}",))


def combine(kernel: str, target: TensorArgument) -> Launch:
    """Launch of convert.cu's sum, mask or scale."""
    return _over("convert.cu", kernel, target, ("-DSOURCE_BITS=32",))


def maxpool2x2_forward(pooled: TensorArgument) -> Launch:
    return _over("maxpool2x2.cu", "maxpool2x2_forward", pooled)


def maxpool2x2_backward(total: TensorArgument) -> Launch:
    return _over("maxpool2x2.cu", "maxpool2x2_backward", total, pixel=2)


def dropout(output: TensorArgument) -> Launch:
    return _over("dropout.cu", "dropout", output)


def _over(
    file: str, kernel: str, tensor: TensorArgument, defines: tuple[str, ...] = (), pixel: int = 1
) -> Launch:
    """A thread has eight channels of a pixel, or of a square of `pixel` x `pixel`."""
    row = blocks(tensor.width, pixel) * blocks(tensor.pitch, 8)
    rows = blocks(tensor.height, pixel)
    grid = blocks(row, 256), min(rows, MOST_BLOCKS), min(tensor.images, MOST_BLOCKS)
    return Launch(file, kernel, defines, grid, 256, 0)
