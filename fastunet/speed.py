"""How fast a network runs on this machine just now, to tell how long work will take."""

import time

import numpy as np
from numpy.typing import NDArray

from fastunet.autograd import no_grad
from fastunet.geometry import input_size
from fastunet.tiling import TilePlan, forward_flops
from fastunet.unet import UNet

CALIBRATION_SECONDS = 0.3


def seconds_per_flop(model: UNet, plan: TilePlan) -> tuple[float, tuple[int, int]]:
    """Time tiles, growing up to the plan's, until one takes long enough; give the tile's size, too."""
    was_training = model.training
    model.eval()
    random = np.random.default_rng(0)
    output = 2**model.depth
    while True:
        side = input_size(output, model.depth)
        tile = min(side, plan.tile[0]), min(side, plan.tile[1])
        pixels = random.standard_normal((1, *tile, model.in_channels), np.float32)
        seconds = min(_forward_seconds(model, pixels) for _ in range(2))
        if seconds >= CALIBRATION_SECONDS or tile == plan.tile:
            break
        output *= 2
    if was_training:
        model.train()
    return seconds / forward_flops(*tile, model), tile


def _forward_seconds(model: UNet, pixels: NDArray[np.float32]) -> float:
    began = time.perf_counter()
    with no_grad():
        model(pixels).numpy()
    return time.perf_counter() - began
