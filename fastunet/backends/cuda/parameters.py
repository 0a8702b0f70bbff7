"""Host side of the kernels over flat buffers of parameters: kernels/reduce.cu and kernels/sgd_momentum.cu."""

import ctypes

from fastunet.backends.cuda.arguments import floats, integers, longs, pointers
from fastunet.backends.cuda.launch import Launch, blocks


class ReduceArguments(ctypes.Structure):
    _fields_ = [
        *pointers("weight_gradient", "bias_gradient", "workspace"),
        *longs("weights"),
        *integers("biases", "splits"),
    ]


class SgdMomentumArguments(ctypes.Structure):
    _fields_ = [
        *pointers("value", "gradient", "momentum", "shadow", "rates"),
        *longs("count"),
        *floats("learning_rate", "rate"),
    ]


def reduce(weights: int, biases: int) -> Launch:
    return Launch("reduce.cu", "reduce", (), (blocks(weights + biases, 256), 1, 1), 256, 4096)


def sgd_momentum(count: int) -> Launch:
    return Launch("sgd_momentum.cu", "sgd_momentum", (), (blocks(count, 2048), 1, 1), 256, 0)
