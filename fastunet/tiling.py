"""The plan of a prediction: which tiles of an image the network sees, and what they cost.

The network sees the image through valid convolutions, so a tile's output is smaller than its input by the
border on each side, and 2x2 pooling gives every pixel a phase modulo 2**depth. All tiles pool in the phase of
the whole image, whose input begins exactly the border above and left of the first pixel: tiles begin at
multiples of 2**depth, and each contributes the largest such part of its output (the last one what remains).
The prediction then does not depend on the tile's size. Abutting valid outputs (4 modulo 16 at depth 4), as
Ronneberger et al. (2015), figure 2, draw them, would shift the phase from tile to tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastunet.geometry import border, input_size, is_valid_input, nearest_inputs, output_size, skip_size
from fastunet.memory import UNLIMITED, format_bytes

# Channels lie in blocks; the first layer of an image of so few channels is computed as it is read by whole blocks.
BLOCK = 16
IMAGE_CHANNELS = 4
# The kernels' own buffers came to 2 to 31 MiB.
SCRATCH = 32 << 20


class Network(Protocol):
    """What a plan needs to know of a network, by the names `UNet` has for it."""

    in_channels: int
    num_classes: int
    base_channels: int
    depth: int

    def composed_size(self, level: int) -> int:
        """Numbers of the linear map that the way up to a level goes by where nothing is recorded; 0 for two layers."""


@dataclass(frozen=True)
class Tile:
    """The pixels of the image one tile contributes: rows top to bottom, columns left to right."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class TilePlan:
    """How one image is predicted; iterating gives its tiles row by row.

    The network's input of a tile begins the border above and left of the tile's first pixel and is `tile`
    large.

    Attributes
    ----------
    image : height and width of the image
    depth : depth of the network
    tile : height and width of the network's input
    preferred : the tile that would have been planned had memory been unlimited
    memory : bytes that image, result and one tile's activations are expected to take beyond the network's
    weights
    """

    image: tuple[int, int]
    depth: int
    tile: tuple[int, int]
    preferred: tuple[int, int]
    memory: int

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the network's output for one tile."""
        return output_size(self.tile[0], self.depth), output_size(self.tile[1], self.depth)

    @property
    def stride(self) -> tuple[int, int]:
        """Rows and columns from one tile to the next: the largest multiples of 2**depth within the output."""
        step = 2**self.depth
        return self.output[0] // step * step, self.output[1] // step * step

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        rows, columns = (
            1 if size <= out else 1 - (out - size) // stride
            for size, out, stride in zip(self.image, self.output, self.stride)
        )
        return rows, columns

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1]

    def __iter__(self) -> Iterator[Tile]:
        rows, columns = (self._spans(axis) for axis in (0, 1))
        for top, bottom in rows:
            for left, right in columns:
                yield Tile(top, left, bottom, right)

    def _spans(self, axis: int) -> list[tuple[int, int]]:
        starts = [index * self.stride[axis] for index in range(self.grid[axis])]
        return list(zip(starts, [*starts[1:], self.image[axis]]))


def plan_tiles(
    height: int,
    width: int,
    network: Network,
    tile: int | str = "auto",
    memory: int = UNLIMITED,
    element_bytes: float = 4,
    needed_bytes: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]] | None = None,
) -> TilePlan:
    """Plan the prediction of an image.

    Parameters
    ----------
    height, width : size of the image, pixels, from 1 up
    network : in_channels, num_classes, base_channels and depth are read
    tile : the network's input size, or "auto": the size, not necessarily square, with which the network
        computes the fewest pixels altogether. An axis shorter than the tile takes the smallest input that
        covers it.
    memory : bytes the prediction may take; where the tile wanted needs more, a smaller one is planned
    element_bytes : of a number of an activation, with what the backend loses between them
    needed_bytes : what tiles of such heights and widths take; default: `prediction_bytes`, of an image in memory

    Raises
    ------
    ValueError
        If `tile` is no valid input size or its output is smaller than 2**depth.
    MemoryError
        If even the smallest tiles need more than `memory`.
    """
    image, depth = (height, width), network.depth
    if tile != "auto":
        check_tile(tile, depth)
    largest = UNLIMITED if tile == "auto" else int(tile)
    heights, widths = (_candidates(size, depth, largest) for size in image)
    tall, wide = (axis.ravel() for axis in np.meshgrid(heights[:, 0], widths[:, 0], indexing="ij"))
    pixels = np.multiply.outer(heights.prod(axis=1), widths.prod(axis=1)).ravel()
    needed_bytes = needed_bytes or (
        lambda tall, wide: prediction_bytes(height, width, tall, wide, network, element_bytes)
    )
    needed = needed_bytes(tall, wide)
    order = np.lexsort((needed, pixels))
    if tile == "auto":
        preferred = int(tall[order[0]]), int(wide[order[0]])
    else:
        preferred = min(largest, input_size(height, depth)), min(largest, input_size(width, depth))
    exact = int(needed_bytes(*(np.array(side, np.int64) for side in preferred)))
    if exact <= memory:
        return TilePlan(image, depth, preferred, preferred, exact)
    fitting = order[needed[order] <= memory]
    if not fitting.size:
        raise MemoryError(
            f"predicting {height}x{width} pixels takes at least {format_bytes(needed.min())} of memory and "
            f"{format_bytes(memory)} are available; free memory, allow more, or predict parts of the image"
        )
    best = fitting[0]
    return TilePlan(image, depth, (int(tall[best]), int(wide[best])), preferred, int(needed[best]))


def check_tile(tile: int | str, depth: int) -> None:
    """Raise ValueError, naming the two nearest, unless tiles of this input size can predict at this depth."""
    smallest = input_size(2**depth, depth)
    if not isinstance(tile, int | np.integer):
        raise ValueError(f"tile is {tile!r}; expected 'auto' or an input size such as {smallest}")
    size = int(tile)
    if size < smallest:
        found, nearest = f"its output would be less than {2**depth} pixels", (smallest, smallest + 2**depth)
    elif not is_valid_input(size, depth):
        found, nearest = f"tile + 4 must be a multiple of {2**depth}", nearest_inputs(size, depth)
    else:
        return
    raise ValueError(
        f"tile {size} cannot predict at depth {depth}: {found}; the nearest valid tiles are {nearest[0]} and "
        f"{nearest[1]}"
    )


def _candidates(size: int, depth: int, largest: int) -> NDArray[np.int64]:
    """Rows (input size, number of tiles) for an axis: each size the smallest for its number."""
    step = 2**depth
    beyond = output_size(input_size(step, depth), depth) - step
    found = []
    count = 1
    while True:
        # `count` tiles give count * stride + beyond pixels.
        stride = max(0, -(-(size - beyond) // (count * step)) * step)
        tile = stride + beyond + 2 * border(depth)
        if tile <= largest:
            found.append((tile, count))
        if stride <= step:
            return np.array(found, dtype=np.int64)
        count = -(-(size - beyond) // (stride - step))


def prediction_bytes(
    height: int,
    width: int,
    tile_height: int | NDArray[np.int64],
    tile_width: int | NDArray[np.int64],
    network: Network,
    element_bytes: float = 4,
) -> NDArray[np.int64]:
    """Bytes a prediction takes beyond the network's weights, for one tile size or for arrays of sizes.

    All float32: image and spline coefficients of the image; prediction of a view, brought back, and their
    sum. And `activation_bytes` of one tile, whose numbers may be narrower.
    """
    whole = 4 * height * width * (2 * network.in_channels + 3 * network.num_classes)
    activations = activation_bytes(tile_height, tile_width, network) * (element_bytes / 4)
    return (whole + activations + SCRATCH).astype(np.int64)


def activation_bytes(
    height: int | NDArray[np.int64], width: int | NDArray[np.int64], network: Network
) -> NDArray[np.int64]:
    """Bytes of float32 activations alive at the worst moment of a forward pass over height x width pixels.

    The walk of the forward pass: a layer holds its input and its output; a level's second convolution goes into its
    pooled map and the centre that the way up reads, which is kept until then. The first layer of an image is computed
    as it is read, from the image as it came. Composed layers (`fastunet.ops.upconv2x2_conv3x3`) hold weights of their
    own and nothing between the two. Channels are counted in blocks of 16.
    The worst moment is one of the finest level's, on the way down or, with the skip, on the way up.
    """
    height, width = np.asarray(height, np.int64), np.asarray(width, np.int64)
    out_height, out_width = (side - 2 * border(network.depth) for side in (height, width))
    kept = np.zeros_like(height)
    worst = np.zeros_like(height)
    skips = []
    for level in range(network.depth + 1):
        channels = network.base_channels * 2**level
        source = _bytes(height, width, network.in_channels if level == 0 else channels // 2)
        first, second = (_bytes(height - lost, width - lost, channels) for lost in (2, 4))
        if level == 0 and network.in_channels <= IMAGE_CHANNELS:
            first = first if network.base_channels < BLOCK else 0 * first
            worst = np.maximum(worst, first)
        else:
            worst = np.maximum(worst, kept + source + first)
        height, width = height - 4, width - 4
        if level == network.depth:
            worst = np.maximum(worst, kept + first + second)
        else:
            height, width = height // 2, width // 2
            skips.append(_bytes(skip_size(out_height, level), skip_size(out_width, level), channels))
            kept = kept + skips[-1]
            worst = np.maximum(worst, kept + first + _bytes(height, width, channels))
    for level in reversed(range(network.depth)):
        channels = network.base_channels * 2**level
        below = _bytes(height, width, 2 * channels)
        height, width = 2 * height, 2 * width
        up, first, second = (_bytes(height - lost, width - lost, channels) for lost in (0, 2, 4))
        apart = not network.composed_size(level)
        worst = np.maximum(worst, kept + (np.maximum(below + up, up + first) if apart else below + first))
        kept = kept - skips[level]
        worst = np.maximum(worst, kept + first + second)
        height, width = height - 4, width - 4
    logits = _bytes(height, width, network.num_classes)
    composed = 4 * sum(map(network.composed_size, range(network.depth)))
    return np.maximum(worst, second + 2 * logits) + composed


def forward_flops(height: int, width: int, network: Network) -> int:
    """Floating-point operations of a forward pass over height x width pixels, two per multiply-add.

    Those of direct convolutions, however they are computed: 300.9e9 for the paper's network on its 572 tile.
    """
    total = 0
    channels = network.in_channels
    for level in range(network.depth + 1):
        wide = network.base_channels * 2**level
        total += 9 * wide * ((height - 2) * (width - 2) * channels + (height - 4) * (width - 4) * wide)
        height, width, channels = height - 4, width - 4, wide
        if level < network.depth:
            height, width = height // 2, width // 2
    for level in reversed(range(network.depth)):
        wide = network.base_channels * 2**level
        height, width = 2 * height, 2 * width
        total += height * width * 2 * wide * wide
        total += 9 * ((height - 2) * (width - 2) * 2 + (height - 4) * (width - 4)) * wide * wide
        height, width = height - 4, width - 4
    return 2 * (total + height * width * network.base_channels * network.num_classes)


def _bytes(height: NDArray[np.int64], width: NDArray[np.int64], channels: int) -> NDArray[np.int64]:
    return 4 * height * width * (-(-channels // BLOCK) * BLOCK)
