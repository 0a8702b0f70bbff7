"""Every kernel of the network at its shapes: its arithmetic, the least it must move, and the time that both allow.

Bytes count each input once and each output once, activations and the weights that kernels read in bfloat16. Shapes are
those of a training step, and of the last layer of a prediction.
"""

from collections.abc import Iterator
from dataclasses import dataclass

ELEMENT = 2
CLASSES = 2
TAPS = {"conv3x3 forward": 9, "upconv2x2 forward": 4, "conv1x1 forward": 1}


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most, as measured: FLOP/s of a large bfloat16 product, bytes/s of a large copy."""

    flops: float
    bytes: float

    def floor(self, case: "Case") -> float:
        """Seconds that nothing can beat."""
        return max(case.flops / self.flops, case.moved / self.bytes)


H200 = Ceilings(790e12, 4.3e12)


@dataclass(frozen=True)
class Case:
    """One kernel, or the few that do one operation together, at one layer.

    Attributes
    ----------
    operation, layer : str
    side : int
        Height and width of the operation's input.
    inputs : tuple of int
        Channels; of two inputs the first is the skip connection.
    outputs : int
    flops, moved : float
        Operations and bytes, the least.
    skip_side, centre : int
        Height and width of the skip connection; of the gradient that a pooling's input already has.
    pools : bool
        Whether the output is also wanted pooled.
    rectified : tuple of bool
        Which inputs are outputs of a ReLU, whose gradients are to be masked.
    """

    operation: str
    layer: str
    side: int
    inputs: tuple[int, ...]
    outputs: int
    flops: float
    moved: float
    skip_side: int = 0
    centre: int = 0
    pools: bool = False
    rectified: tuple[bool, ...] = (False,)

    @property
    def name(self) -> str:
        channels = "+".join(map(str, self.inputs))
        pooled = ", pooled" if self.pools else ""
        return f"{self.layer} {self.operation} {self.side}^2 {channels} -> {self.outputs}{pooled}"


def cases(base: int = 64, tile: int = 572, depth: int = 4) -> list[Case]:
    """Of a network with one input channel and two classes, in the order in which a step comes to its layers."""
    width = [base * 2**level for level in range(depth + 1)]
    found = [Case("image in", "input", tile, (1,), 1, 0, tile**2 * (4 + ELEMENT)), *image(tile, base)]
    side, below, skips = tile, 1, []
    for level in range(depth):
        last = level == depth - 1
        found += conv3x3(f"encoder.{level}.conv1", side, (below,), width[level], (False,))
        found += conv3x3(
            f"encoder.{level}.conv2", side - 2, (width[level],), width[level], (True,), pools=not last
        )
        side -= 4
        skips.append(side)
        if last:
            found += [dropout("encoder end", side, width[level]), maxpool2x2(side, width[level])]
        side, below = side // 2, width[level]
    found += conv3x3("bottleneck.conv1", side, (below,), width[-1], (False,))
    found += conv3x3("bottleneck.conv2", side - 2, (width[-1],), width[-1], (True,))
    side -= 4
    found.append(dropout("bottleneck end", side, width[-1]))
    for step, level in enumerate(reversed(range(depth))):
        found += upconv2x2(f"decoder.{step}.upconv", side, width[level + 1], width[level])
        side *= 2
        found.append(maxpool2x2_backward(f"encoder.{level}", skips[level], width[level], side))
        both = width[level], width[level]
        layer = f"decoder.{step}.conv"
        found += conv3x3(f"{layer}1", side, both, width[level], (True, False), skip_side=skips[level])
        found += conv3x3(f"{layer}2", side - 2, (width[level],), width[level], (True,))
        side -= 4
    head = side, (base,), CLASSES
    pixels, products = side**2, 2.0 * base * CLASSES
    found.append(
        Case("head and loss", "head", *head, 3 * products * pixels, pixels * (2 * ELEMENT * base + 8))
    )
    found += conv1x1_gradients(*head)
    logits = 4 * CLASSES * pixels
    found.append(Case("conv1x1 forward", "head", *head, products * pixels, pixels * ELEMENT * base + logits))
    found.append(Case("softmax", "head", side, (CLASSES,), CLASSES, 0, 2 * logits))
    found.append(Case("softmax and loss", "head", side, (CLASSES,), CLASSES, 0, 2 * logits + 8 * pixels))
    found.append(Case("stitch", "output", side, (CLASSES,), CLASSES, 0, 3 * logits))
    found += [
        Case(operation, "gradients", side, (base,), base, 0, tensors * ELEMENT * base * pixels)
        for operation, tensors in (("sum", 3), ("mask", 3), ("scale", 2))
    ]
    learned = [case for case in found if case.operation in TAPS]
    count = sum((TAPS[case.operation] * sum(case.inputs) + 1) * case.outputs for case in learned)
    found.append(Case("SGD", "all parameters", 1, (count,), 1, 0, 22.0 * count))
    return found


def smallest_cases() -> list[Case]:
    """One of every kind, none a multiple of a tile, quick on an emulator and under a sanitizer."""
    return cases(base=10, tile=44, depth=2)


def image(side: int, channels: int) -> Iterator[Case]:
    """A prediction's way from an image on the device to a tile, and an activation of another library's."""
    yield Case("gather", "input, uint8", side, (1,), 1, 0, side**2 * (1 + ELEMENT))
    yield Case("grey values", "input, uint8", side, (1,), 1, 0, 2 * side**2)
    yield Case("scaled image", "input, float64", side, (1,), 1, 0, side**2 * (8 + 4))
    yield Case(
        "strided copy", "input, (C, H, W)", side, (channels,), channels, 0, side**2 * channels * (4 + ELEMENT)
    )


def conv1x1_gradients(side: int, inputs: tuple[int, ...], outputs: int) -> Iterator[Case]:
    """Of a head that is not in one pass with its loss; the gradient comes in float32."""
    pixels, weights = side**2, sum(inputs) * outputs
    shape = "head", side, inputs, outputs, 2.0 * weights * pixels
    x, y = ELEMENT * pixels * sum(inputs), 4 * pixels * outputs
    yield Case("conv1x1 weight gradient", *shape, x + y + 8 * weights)
    yield Case("conv1x1 data gradient", *shape, 2 * x + y + 4 * weights, rectified=(True,))


def conv3x3(
    layer: str,
    side: int,
    inputs: tuple[int, ...],
    outputs: int,
    rectified: tuple[bool, ...],
    pools: bool = False,
    skip_side: int = 0,
) -> Iterator[Case]:
    """Three directions; the images themselves want no gradient."""
    x, y = side**2 * sum(inputs), (side - 2) ** 2 * outputs
    weights = 9 * sum(inputs) * outputs
    flops = 2.0 * weights * (side - 2) ** 2
    shape = layer, side, inputs, outputs, flops
    pooled = ((side - 2) // 2) ** 2 * outputs if pools else 0
    yield Case("conv3x3 forward", *shape, ELEMENT * (x + weights + y + pooled), skip_side, pools=pools)
    yield Case("conv3x3 weight gradient", *shape, ELEMENT * (x + y) + 8 * weights, skip_side)
    if inputs != (1,):
        masks = side**2 * sum(channels for channels, marked in zip(inputs, rectified) if marked)
        moved = ELEMENT * (y + weights + x + masks)
        yield Case("conv3x3 data gradient", *shape, moved, skip_side, rectified=rectified)


def upconv2x2(layer: str, side: int, inputs: int, outputs: int) -> Iterator[Case]:
    x, y, weights = side**2 * inputs, 4 * side**2 * outputs, 4 * inputs * outputs
    shape = layer, side, (inputs,), outputs, 2.0 * side**2 * weights
    yield Case("upconv2x2 forward", *shape, ELEMENT * (x + weights + y))
    yield Case("upconv2x2 weight gradient", *shape, ELEMENT * (x + y) + 8 * weights)
    yield Case("upconv2x2 data gradient", *shape, ELEMENT * (y + weights + 2 * x), rectified=(True,))


def dropout(layer: str, side: int, channels: int) -> Case:
    moved = 2 * ELEMENT * side**2 * channels
    return Case("dropout", layer, side, (channels,), channels, 0, moved)


def maxpool2x2(side: int, channels: int) -> Case:
    moved = ELEMENT * channels * (side**2 + (side // 2) ** 2)
    return Case("maxpool2x2 forward", "encoder end", side, (channels,), channels, 0, moved)


def maxpool2x2_backward(layer: str, side: int, channels: int, centre: int) -> Case:
    """Adds to the gradient of the centre, which the skip connection has brought, and masks by the ReLU."""
    moved = ELEMENT * channels * (2 * side**2 + (side // 2) ** 2 + centre**2)
    return Case("maxpool2x2 backward", layer, side, (channels,), channels, 0, moved, centre=centre)
