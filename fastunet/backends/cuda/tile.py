"""Host side of kernels/tile.cu: a tile's pixels out of an image, its probabilities into the prediction."""

import ctypes

from fastunet.backends.cuda.arguments import TensorArgument, integers, pointers, tensors
from fastunet.backends.cuda.launch import Launch, blocks
from fastunet.backends.cuda.pointwise import MOST_BLOCKS

THREADS = 256


class GatherArguments(ctypes.Structure):
    _fields_ = [
        *pointers("image", "normalization"),
        *tensors("tile"),
        *integers("height", "width", "row_step", "column_step", "top", "left"),
    ]


class StitchArguments(ctypes.Structure):
    _fields_ = [
        *tensors("probabilities"),
        *pointers("prediction"),
        *integers("row_step", "column_step", "rows", "columns", "top", "left"),
    ]


def gather(tile: TensorArgument, image_bits: int) -> Launch:
    """Launch of gather, from an image of uint8 (8), uint16 (16) or float32 (32)."""
    grid = blocks(tile.width * tile.pitch, THREADS), min(tile.height, MOST_BLOCKS), 1
    return Launch("tile.cu", "gather", (f"-DIMAGE_BITS={image_bits}",), grid, THREADS, 0)


def stitch(rows: int, columns: int, classes: int) -> Launch:
    """Launch of stitch, of so many pixels."""
    grid = blocks(columns * classes, THREADS), min(rows, MOST_BLOCKS), 1
    return Launch("tile.cu", "stitch", ("-DIMAGE_BITS=32",), grid, THREADS, 0)
