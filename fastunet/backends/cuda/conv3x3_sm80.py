"""Host side of kernels/conv3x3_sm80.cu and conv3x3_weight_sm80.cu: arguments, and how they are launched."""

import ctypes
import math

from fastunet.backends.cuda.arguments import TensorArgument, integers, pointers, tensors
from fastunet.backends.cuda.launch import Launch, blocks, splits

FILE = "conv3x3_sm80.cu"
TILE_COLUMNS = 16
CHUNK = 32
"""Channels of the source that a block has in shared memory at a time."""
BLOCKS_OF_A_MULTIPROCESSOR = 2
TIME_OF_HALF_A_TILE = 1.1
"""What a pixel of a tile of 8 rows takes beside one of 16, where the same weights serve twice as many."""


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


def forward(y: TensorArgument, multiprocessors: int, shared_memory: int) -> Launch:
    """Launch of conv3x3_forward to this output; `shared_memory`: the most bytes that a block may have."""
    return _over_tiles("conv3x3_forward", y, (y.pitch,), multiprocessors, shared_memory)


def data_gradient(
    skip_gradient: TensorArgument, x_gradient: TensorArgument, multiprocessors: int, shared_memory: int
) -> Launch:
    """Launch of conv3x3_data_gradient to these; the skip's is all zero where there is none."""
    pitches = skip_gradient.pitch, x_gradient.pitch
    return _over_tiles("conv3x3_data_gradient", x_gradient, pitches, multiprocessors, shared_memory)


def weight_gradient(
    gradient: TensorArgument, skip: TensorArgument, x: TensorArgument, multiprocessors: int
) -> Launch:
    """Launch of conv3x3_weight_gradient; its grid's last side is the number of splits."""
    side, stages = 8, 4
    outputs = 32 if gradient.pitch <= 32 else 64
    inputs = 32 if max(skip.pitch, x.pitch) <= 32 else 64
    warps = 3 * (outputs // 32) * (inputs // 32)
    tiles = blocks(skip.pitch, inputs) + blocks(x.pitch, inputs), blocks(gradient.pitch, outputs)
    squares = gradient.images * blocks(gradient.height, side) * blocks(gradient.width, side)
    places = multiprocessors * (12 // warps)  # registers are for twelve warps
    return Launch(
        "conv3x3_weight_sm80.cu",
        "conv3x3_weight_gradient",
        (f"-DTILE_OUTPUTS={outputs}", f"-DTILE_INPUTS={inputs}"),
        (*tiles, splits(squares, tiles[0] * tiles[1], places)),
        32 * warps,
        stages * 2 * (side**2 * outputs + (side + 2) ** 2 * inputs),
    )


def _over_tiles(
    kernel: str, over: TensorArgument, pitches: tuple[int, ...], multiprocessors: int, shared_memory: int
) -> Launch:
    """Of the tiles of which a multiprocessor holds two, the one that keeps the busiest multiprocessor least long."""
    room = (shared_memory + 1024) // BLOCKS_OF_A_MULTIPROCESSOR - 1024  # the system takes 1 KiB of each
    channels = max(pitches)
    tiles = ((16, 16),) if channels <= 16 else ((16, 32), (16, 16)) if channels <= 32 else ((16, 64), (8, 64))
    times = {}
    for rows, outputs in tiles:
        stages = next((count for count in (4, 3, 2) if _shared_bytes(rows, outputs, count) <= room), None)
        if stages is not None:
            across, down = blocks(over.width, TILE_COLUMNS), over.images * blocks(over.height, rows)
            grid = sum(blocks(pitch, outputs) for pitch in pitches), across, down
            defines = f"-DTILE_ROWS={rows}", f"-DTILE_OUTPUTS={outputs}", f"-DSTAGES={stages}"
            launch = Launch(FILE, kernel, defines, grid, 256, _shared_bytes(rows, outputs, stages))
            time = blocks(math.prod(grid), multiprocessors) * rows * outputs
            times[launch] = time * (1 if rows == 16 else TIME_OF_HALF_A_TILE)
    return min(times, key=times.__getitem__)


def _shared_bytes(rows: int, outputs: int, stages: int) -> int:
    """Of a block: two halos and the ring of weights, or after them the sums of half the warps and the result."""
    halo = (rows + 2) * (TILE_COLUMNS + 2) * CHUNK * 2
    stage = 3 * CHUNK * outputs * 2
    result = rows * TILE_COLUMNS * outputs * 2
    sums_of_half = 0 if rows * outputs == 16 * 64 else 2 * result
    return max(2 * halo + stages * stage, sums_of_half + result)
