"""Host side of kernels/softmax.cu: the arguments of its kernels and how they are launched."""

import ctypes

from fastunet.backends.cuda.arguments import integers, longs, pointers
from fastunet.backends.cuda.launch import Launch, blocks

FILE = "softmax.cu"
THREADS = 128
WEIGHT_PARTS = 128
LOSS_PART_BYTES = 16


class WeightSumsArguments(ctypes.Structure):
    _fields_ = [*pointers("weights", "parts"), *longs("pixels")]


class SoftmaxArguments(ctypes.Structure):
    _fields_ = [*pointers("logits", "probabilities"), *longs("pixels"), *integers("classes")]


class CrossEntropyArguments(ctypes.Structure):
    _fields_ = [
        *pointers("logits", "logit_gradient", "labels", "weights", "weight_parts", "loss_parts"),
        *longs("pixels"),
        *integers("classes"),
    ]


class TotalLossArguments(ctypes.Structure):
    _fields_ = [*pointers("loss_parts", "weight_parts", "total", "value"), *integers("parts")]


def softmax(pixels: int) -> Launch:
    return Launch(FILE, "softmax", (), (blocks(pixels, THREADS), 1, 1), THREADS, 0)


def softmax_cross_entropy(pixels: int, multiprocessors: int) -> Launch:
    """Launch of softmax_cross_entropy; its grid's first side is the number of parts of the loss."""
    parts = min(blocks(pixels, THREADS), 8 * multiprocessors)
    return Launch(FILE, "softmax_cross_entropy", (), (parts, 1, 1), THREADS, 8 * THREADS)


def weight_sums() -> Launch:
    return Launch(FILE, "weight_sums", (), (WEIGHT_PARTS, 1, 1), THREADS, 8 * THREADS)


def total_loss() -> Launch:
    return Launch(FILE, "total_loss", (), (1, 1, 1), THREADS, 8 * THREADS)
