"""Memory a training step takes, planned before the first one: a smaller tile would be another run.

Prediction takes a smaller tile by itself; training says what would fit and stops.
"""

import bisect

import numpy as np

from fastunet import backends
from fastunet.geometry import input_size, is_valid_input, output_size, skip_size
from fastunet.memory import format_bytes
from fastunet.optim import SGD
from fastunet.tiling import IMAGE_CHANNELS
from fastunet.unet import UNet

FLOAT = 4
SCRATCH = 96 << 20
KERNEL_FACTOR = 1.1
PARAMETER_COPIES = 2
SAVING_COPIES = 6
FIRST_STEP_FACTOR = 1.1


def training_bytes(
    tile: int,
    in_channels: int,
    num_classes: int,
    base_channels: int,
    depth: int,
    device: str = "cpu",
    precision: str = "auto",
) -> int:
    """Bytes of a device's memory that training takes beyond the program itself, batch 1.

    Where the device plans its memory that is what it plans, a tenth more for the first step, which comes before the
    plan is used, and 96 MiB of the kernels' own; else `estimated_bytes`.

    Parameters
    ----------
    tile : int
        Side of the network's input.
    in_channels, num_classes, base_channels, depth : int
        The network's.
    device, precision : str
        Where and how it is trained; the device as it was resolved.
    """

    def train() -> tuple[UNet, SGD]:
        model = _Outline(in_channels, num_classes, base_channels, depth, device=device, precision=precision)
        optimizer = SGD(model)
        side = output_size(tile, depth)
        image = np.zeros((1, tile, tile, in_channels), np.float32)
        labels, weights = np.zeros((1, side, side), np.int32), np.zeros((1, side, side), np.float32)
        model.loss(image, labels, weights).backward()
        optimizer.step()
        return model, optimizer

    planned = backends.load(device, precision).memory_of(train)
    if planned is None:
        return estimated_bytes(tile, in_channels, num_classes, base_channels, depth)
    return int(FIRST_STEP_FACTOR * planned) + SCRATCH


def largest_training_tile(
    available: int,
    in_channels: int,
    num_classes: int,
    base_channels: int,
    depth: int,
    device: str = "cpu",
    precision: str = "auto",
) -> int | None:
    """The largest tile with which training takes no more than the bytes available; None where none does.

    The other parameters are those of `training_bytes`.
    """

    def fits(steps: int) -> bool:
        tile = smallest + steps * 2**depth
        needed = training_bytes(tile, in_channels, num_classes, base_channels, depth, device, precision)
        return needed <= available

    smallest = input_size(1, depth)
    if not fits(0):
        return None
    beyond = 1
    while fits(beyond):
        beyond *= 2
    most = bisect.bisect_left(range(beyond), True, lo=beyond // 2, key=lambda steps: not fits(steps)) - 1
    return smallest + most * 2**depth


class _Outline(UNet):
    """A network of which only the sizes matter."""

    def _initialise(self) -> None:
        """Any numbers will do."""


def estimated_bytes(tile: int, in_channels: int, num_classes: int, base_channels: int, depth: int) -> int:
    """Bytes that one training step takes on the CPU beyond the program itself, float32, batch 1.

    Counted are every activation that the backward pass reads: both convolutions of a level, but of those that are
    pooled the centre that the way up reads, and not the first of an image; pooled maps with the choice of each pixel;
    up-convolved maps; and what dropout makes. On top come the gradients alive at once: three of the finest level on the
    way up, or two on the way down, when the rest is gone; two copies of the parameters (values, momentum) and the
    largest layer's gradient; the samples waiting; and 96 MiB of the kernels' own. Writing a checkpoint takes six copies
    of the parameters after the activations are gone; the larger of the two counts. Measured: 195 MiB for a step at tile
    572 and 16 base channels, 398 at 32, 927 at 64, where this gives 277, 474 and 1057.
    """
    maps = []
    parameters = largest = 0
    side, channels, output = tile, in_channels, output_size(tile, depth)
    for level in range(depth + 1):
        width = base_channels * 2**level
        if level > 0 or in_channels > IMAGE_CHANNELS:
            maps.append((side - 2) ** 2 * width)
        largest = 9 * width * max(channels, width)
        parameters += 9 * width * (channels + width) + 2 * width
        side, channels = side - 4, width
        if level >= depth - 1:
            maps += 2 * [side * side * width]
        else:
            maps.append(skip_size(output, level) ** 2 * width)
        if level < depth:
            side //= 2
            maps.append(side * side * width * 5 // 4)
    for level in reversed(range(depth)):
        width = base_channels * 2**level
        side *= 2
        maps += [side * side * width, (side - 2) ** 2 * width, (side - 4) ** 2 * width]
        parameters += 4 * 2 * width * width + 9 * width * 3 * width + 3 * width
        side -= 4
    maps.append(2 * side * side * num_classes)
    parameters += num_classes * (base_channels + 1)
    samples = 6 * (tile * tile * in_channels + 2 * side * side)
    way_up = sum(maps) + 3 * (side + 4) ** 2 * base_channels
    step = int(KERNEL_FACTOR * max(way_up, 2 * tile * tile * base_channels)) + largest
    transient = max(step, SAVING_COPIES * parameters)
    return FLOAT * (transient + PARAMETER_COPIES * parameters + samples) + SCRATCH


def check_training_memory(
    tile: int,
    in_channels: int,
    num_classes: int,
    base_channels: int,
    depth: int,
    available: int | None = None,
    device: str = "cpu",
    precision: str = "auto",
) -> None:
    """Raise MemoryError, saying what would fit, unless a training step fits into the memory available.

    Parameters
    ----------
    tile, in_channels, num_classes, base_channels, depth, device, precision
        As for `training_bytes`.
    available : int, optional
        Bytes; default: what the device has left.
    """

    def needs(tile: int, base_channels: int) -> int:
        return training_bytes(tile, in_channels, num_classes, base_channels, depth, device, precision)

    if available is None:
        available = backends.load(device, precision).free_memory()
    needed = needs(tile, base_channels)
    if needed <= available:
        return
    output_size(tile, depth)
    smaller = tile - 2**depth
    while is_valid_input(smaller, depth) and available < needs(smaller, base_channels):
        smaller -= 2**depth
    narrower = base_channels // 2
    while narrower and available < needs(tile, narrower):
        narrower //= 2
    fits = [f"--tile {smaller}"] if is_valid_input(smaller, depth) else []
    fits += [f"--base-channels {narrower}"] if narrower else []
    smallest = needs(input_size(1, depth), 1)
    advice = (
        f"{' or '.join(fits)} would fit"
        if fits
        else f"even the smallest network takes {format_bytes(smallest)}: free memory or train elsewhere"
    )
    raise MemoryError(
        f"training with tiles of {tile} pixels and {base_channels} base channels takes about "
        f"{format_bytes(needed)} of memory and {format_bytes(available)} are available on {device}; {advice}"
    )
