"""Host side of kernels/upconv2x2_sm80.cu and upconv2x2_fp32.cu, which have the same kernels, arguments and grids.

Bits are those of an element, 16 or 32, and choose the file.
"""

import ctypes

from fastunet.backends.cuda.arguments import TensorArgument, pointers, tensors
from fastunet.backends.cuda.launch import Launch, blocks, splits

FILES = {16: "upconv2x2_sm80.cu", 32: "upconv2x2_fp32.cu"}
PIXELS, COLUMNS, INPUTS = 128, 64, 64  # a block's; columns are 16 outputs at four positions
THREADS = 128


class ForwardArguments(ctypes.Structure):
    _fields_ = [*tensors("x", "y"), *pointers("weight", "bias")]


class DataGradientArguments(ctypes.Structure):
    _fields_ = [*tensors("gradient", "x", "x_gradient"), *pointers("weight")]


class WeightGradientArguments(ctypes.Structure):
    _fields_ = [*tensors("gradient", "x"), *pointers("workspace")]


def forward(x: TensorArgument, y: TensorArgument, bits: int) -> Launch:
    """Launch of upconv2x2_forward."""
    grid = blocks(_pixels(x), PIXELS) * y.pitch // 16, 1, 1
    row_bytes = {16: 64, 32: 80}[bits]  # of a step's channels: 32 of them, or 16 and padding
    stages = {16: 4, 32: 3}[bits]
    return Launch(
        FILES[bits], "upconv2x2_forward", (), grid, THREADS, stages * (PIXELS + COLUMNS) * row_bytes
    )


def data_gradient(x_gradient: TensorArgument, bits: int) -> Launch:
    """Launch of upconv2x2_data_gradient."""
    grid = blocks(_pixels(x_gradient), PIXELS) * blocks(x_gradient.pitch, INPUTS), 1, 1
    stage_bytes = {16: PIXELS * 64 + 32 * INPUTS * 2, 32: PIXELS * 80 + 16 * INPUTS * 4}[bits]
    stages = {16: 4, 32: 3}[bits]
    return Launch(FILES[bits], "upconv2x2_data_gradient", (), grid, THREADS, stages * stage_bytes)


def weight_gradient(gradient: TensorArgument, x: TensorArgument, bits: int, multiprocessors: int) -> Launch:
    """Launch of upconv2x2_weight_gradient; its grid's last side is the number of splits."""
    inputs, stage_bytes = 128, 12288  # 64 columns and 128 inputs of 32 pixels in bfloat16, of 16 in float32
    tiles = blocks(x.pitch, inputs), gradient.pitch // 16
    steps = blocks(_pixels(x), {16: 32, 32: 16}[bits])
    grid = (*tiles, splits(steps, tiles[0] * tiles[1], 3 * multiprocessors))
    stages = {16: 4, 32: 3}[bits]
    return Launch(FILES[bits], "upconv2x2_weight_gradient", (), grid, THREADS, stages * stage_bytes)


def _pixels(tensor: TensorArgument) -> int:
    return tensor.images * tensor.height * tensor.width
