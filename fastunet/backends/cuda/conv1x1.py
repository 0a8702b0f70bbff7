"""Host side of kernels/conv1x1.cu and kernels/head.cu, which share out pixels as kernels/channel_lanes.cuh says."""

import ctypes

from fastunet.backends.cuda.arguments import TensorArgument, integers, longs, pointers
from fastunet.backends.cuda.arrays import padded
from fastunet.backends.cuda.launch import Launch, blocks

THREADS = 128


class ForwardArguments(ctypes.Structure):
    _fields_ = [*pointers("x", "weight", "bias", "y"), *longs("pixels"), *integers("outputs")]


class DataGradientArguments(ctypes.Structure):
    _fields_ = [
        *pointers("gradient", "x", "weight", "x_gradient"),
        *longs("pixels"),
        *integers("outputs", "rectified"),
    ]


class WeightGradientArguments(ctypes.Structure):
    _fields_ = [*pointers("gradient", "x", "workspace"), *longs("pixels"), *integers("outputs")]


class HeadArguments(ctypes.Structure):
    _fields_ = [
        *pointers("x", "weight", "bias", "labels", "weights", "weight_parts", "loss_parts"),
        *pointers("x_gradient", "workspace"),
        *longs("pixels"),
        *integers("rectified"),
    ]


def forward(x: TensorArgument, multiprocessors: int) -> Launch:
    return _over_pixels("conv1x1.cu", "conv1x1_forward", x, 4 * multiprocessors)


def data_gradient(x: TensorArgument, multiprocessors: int) -> Launch:
    return _over_pixels("conv1x1.cu", "conv1x1_data_gradient", x, 4 * multiprocessors)


def weight_gradient(x: TensorArgument, outputs: int, multiprocessors: int) -> Launch:
    """Launch of conv1x1_weight_gradient; its grid's first side is the number of splits."""
    most = most_outputs(x.pitch)
    launch = _over_pixels("conv1x1.cu", "conv1x1_weight_gradient", x, 4 * multiprocessors)
    grid = launch.grid[0], blocks(padded(outputs), most), 1
    return launch._replace(grid=grid, shared_bytes=4 * most * (x.pitch + 1))


def head_cross_entropy(x: TensorArgument, classes: int, multiprocessors: int) -> Launch:
    """Launch of head_cross_entropy, for `most_outputs` classes at most; its grid's first side is how many splits."""
    resident = 4 if classes < 4 and x.pitch <= 256 else 2  # by the registers of each class
    launch = _over_pixels("head.cu", "head_cross_entropy", x, resident * multiprocessors)
    defines = (*launch.defines, f"-DCLASSES={classes}")
    return launch._replace(defines=defines, shared_bytes=8 * THREADS + 4 * classes * (x.pitch + 1))


def most_outputs(pitch: int) -> int:
    """Outputs whose weight gradient a block has room for."""
    return 8 // blocks(pitch // 8, _lanes(pitch))


def _lanes(pitch: int) -> int:
    """Of a pixel."""
    return min(1 << (pitch // 8 - 1).bit_length(), 32)


def _over_pixels(file: str, kernel: str, x: TensorArgument, places: int) -> Launch:
    pixels = x.images * x.height * x.width
    grid = min(blocks(pixels, THREADS // _lanes(x.pitch) * 2), places), 1, 1
    return Launch(file, kernel, (f"-DPITCH={x.pitch}",), grid, THREADS, 0)
