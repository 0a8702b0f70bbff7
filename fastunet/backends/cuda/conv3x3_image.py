"""Host side of kernels/conv3x3_image.cu: the arguments of its kernels and how they are launched."""

import ctypes

from fastunet.backends.cuda.arguments import TensorArgument, integers, pointers, tensors
from fastunet.backends.cuda.launch import Launch, blocks, splits

FILE = "conv3x3_image.cu"
TILE_ROWS, TILE_COLUMNS, TILE_OUTPUTS = 16, 32, 64
RUN, GRADIENT_THREADS = 4, 384  # pixels that a thread of the weight gradient takes together


class ForwardArguments(ctypes.Structure):
    _fields_ = [*tensors("x", "y"), *pointers("weight", "bias"), *integers("relu", "reserved")]


class WeightGradientArguments(ctypes.Structure):
    _fields_ = [*tensors("gradient", "x"), *pointers("workspace")]


def forward(x: TensorArgument, y: TensorArgument) -> Launch:
    """Launch of conv3x3_image_forward."""
    shared_floats = x.channels * (9 * TILE_OUTPUTS + (TILE_ROWS + 2) * (TILE_COLUMNS + 2))
    grid = (
        blocks(y.pitch, TILE_OUTPUTS),
        blocks(y.width, TILE_COLUMNS),
        y.images * blocks(y.height, TILE_ROWS),
    )
    return Launch(FILE, "conv3x3_image_forward", (), grid, 256, 4 * shared_floats)


def weight_gradient(gradient: TensorArgument, x: TensorArgument, multiprocessors: int) -> Launch:
    """Launch of conv3x3_image_weight_gradient; its grid's last side is the number of splits."""
    tiles = blocks(gradient.pitch, TILE_OUTPUTS), x.channels
    sharers = GRADIENT_THREADS // (min(gradient.pitch, TILE_OUTPUTS) // 8)
    turns = blocks(gradient.images * gradient.height * blocks(gradient.width, RUN), sharers)
    grid = (*tiles, splits(turns, tiles[0] * tiles[1], multiprocessors))
    return Launch(FILE, "conv3x3_image_weight_gradient", (), grid, GRADIENT_THREADS, 4 * GRADIENT_THREADS * 8)
