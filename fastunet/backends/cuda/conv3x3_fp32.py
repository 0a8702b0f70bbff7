"""Host side of kernels/conv3x3_fp32.cu: the arguments of its kernels and how they are launched."""

import ctypes

from fastunet.backends.cuda.arguments import TensorArgument, integers, pointers, tensors
from fastunet.backends.cuda.launch import Launch, blocks, splits

FILE = "conv3x3_fp32.cu"
TILE_ROWS, TILE_COLUMNS = 8, 16
CHUNK, PITCH, STAGES = (
    16,
    20,
    3,
)  # channels of a step, floats from row to row in shared memory, buffers of weights
HALO_FLOATS = 2 * (TILE_ROWS + 2) * (TILE_COLUMNS + 2) * PITCH


class ForwardArguments(ctypes.Structure):
    _fields_ = [
        *tensors("skip", "x", "y", "pooled"),
        *pointers("weight", "bias"),
        *integers("relu", "reserved"),
    ]


class DataGradientArguments(ctypes.Structure):
    _fields_ = [*tensors("gradient", "skip", "x", "skip_gradient", "x_gradient"), *pointers("weight")]


class WeightGradientArguments(ctypes.Structure):
    _fields_ = [*tensors("gradient", "skip", "x"), *pointers("workspace")]


def forward(y: TensorArgument) -> Launch:
    """Launch of conv3x3_forward to this output."""
    tile = _tile_outputs(y.pitch)
    shared_floats = HALO_FLOATS + STAGES * tile * PITCH
    return _over_tiles("conv3x3_forward", y, tile, blocks(y.pitch, tile), shared_floats)


def data_gradient(skip_gradient: TensorArgument, x_gradient: TensorArgument) -> Launch:
    """Launch of conv3x3_data_gradient to these; the skip's is all zero where there is none."""
    tile = _tile_outputs(max(skip_gradient.pitch, x_gradient.pitch))
    shared_floats = HALO_FLOATS + STAGES * CHUNK * tile
    tiles = blocks(skip_gradient.pitch, tile) + blocks(x_gradient.pitch, tile)
    return _over_tiles("conv3x3_data_gradient", x_gradient, tile, tiles, shared_floats)


def weight_gradient(
    gradient: TensorArgument, skip: TensorArgument, x: TensorArgument, multiprocessors: int
) -> Launch:
    """Launch of conv3x3_weight_gradient; its grid's last side is the number of splits."""
    square, channels = 8, 32
    tiles = blocks(skip.pitch, channels) + blocks(x.pitch, channels), blocks(gradient.pitch, channels)
    squares = gradient.images * blocks(gradient.height, square) * blocks(gradient.width, square)
    grid = (*tiles, splits(squares, tiles[0] * tiles[1], 3 * multiprocessors))
    shared_floats = 2 * (square**2 + (square + 2) ** 2) * channels
    return Launch(FILE, "conv3x3_weight_gradient", ("-DTILE_OUTPUTS=64",), grid, 128, 4 * shared_floats)


def _tile_outputs(pitch: int) -> int:
    return 32 if pitch <= 32 else 64


def _over_tiles(kernel: str, over: TensorArgument, tile: int, tiles: int, shared_floats: int) -> Launch:
    grid = tiles, blocks(over.width, TILE_COLUMNS), over.images * blocks(over.height, TILE_ROWS)
    return Launch(FILE, kernel, (f"-DTILE_OUTPUTS={tile}",), grid, 128, 4 * shared_floats)
