"""Host side of kernels/image.cu: an image of another library, its grey values and the same on a network's scale."""

import ctypes

import numpy as np

from fastunet.backends.cuda.arguments import integers, longs, pointers
from fastunet.backends.cuda.launch import Launch, blocks
from fastunet.backends.cuda.pointwise import MOST_BLOCKS

FILE = "image.cu"
THREADS = 256
PIXELS_OF_A_PART, MOST_PARTS = 2048, 1024

GREY = np.dtype([("sum", np.float64), ("low", np.float64), ("high", np.float64), ("bad", np.int64)])
"""Grey of the kernels' file."""


class GreyPartsArguments(ctypes.Structure):
    _fields_ = [
        *pointers("image", "totals", "parts"),
        *longs("row_stride", "column_stride", "channel_stride"),
        *integers("height", "width", "type"),
    ]


class GreyTotalArguments(ctypes.Structure):
    _fields_ = [*pointers("parts", "totals"), *integers("count")]


class ScaledArguments(ctypes.Structure):
    _fields_ = [
        *pointers("image", "normalization", "target"),
        *longs("row_stride", "column_stride", "channel_stride"),
        *integers("height", "width", "channels", "type"),
    ]


def grey_parts(height: int, width: int, channels: int) -> Launch:
    """Launch of grey_parts; its grid's first side is the number of parts."""
    parts = min(blocks(height * width, PIXELS_OF_A_PART), MOST_PARTS)
    return Launch(FILE, "grey_parts", (), (parts, channels, 1), THREADS, GREY.itemsize * THREADS)


def grey_total(channels: int) -> Launch:
    return Launch(FILE, "grey_total", (), (channels, 1, 1), THREADS, GREY.itemsize * THREADS)


def scaled(height: int, width: int, channels: int) -> Launch:
    grid = blocks(width * channels, THREADS), min(height, MOST_BLOCKS), 1
    return Launch(FILE, "scaled", (), grid, THREADS, 0)
