"""Sizes of the valid-convolution U-Net: the only place this arithmetic lives.

Going down, two 3x3 convolutions take 4 pixels from a side and a pooling halves it; coming up, an up-convolution
doubles it and two convolutions take 4 again. A side n halves evenly at every pooling exactly when n + 4 is a
multiple of 2**depth.
"""

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Side = TypeVar("Side", int, "NDArray[np.int64]")


def border(depth: int = 4) -> int:
    """Pixels lost on each side between input and output: 2, 8, 20, 44, 92, 188, 380 for depths 0 to 6."""
    lost = 2
    for _ in range(depth):
        lost = 2 * lost + 4
    return lost


def is_valid_input(n: int, depth: int = 4) -> bool:
    """Whether a network of this depth takes an input of side `n` and leaves an output of at least one pixel."""
    return (n + 4) % 2**depth == 0 and n > 2 * border(depth)


def output_size(n: int, depth: int = 4) -> int:
    """Side of the output for an input of side `n` (572 -> 388 at depth 4).

    Raises
    ------
    ValueError
        If `n` is not a valid input; the message names the two nearest sizes that are.
    """
    if not is_valid_input(n, depth):
        nearest = " and ".join(str(size) for size in nearest_inputs(n, depth))
        raise ValueError(
            f"input size {n} is not valid at depth {depth}: n + 4 must be a multiple of {2**depth} and n more than "
            f"{2 * border(depth)}; the nearest valid sizes are {nearest}"
        )
    return n - 2 * border(depth)


def input_size(m: int, depth: int = 4) -> int:
    """Side of the smallest valid input whose output covers `m` pixels (388 -> 572, 1 -> 188 at depth 4)."""
    if m < 1:
        raise ValueError(f"an output of {m} pixels was asked for; it must be at least 1")
    step = 2**depth
    return -(-(m + 2 * border(depth) + 4) // step) * step - 4


def skip_size(m: Side, level: int) -> Side:
    """Side of the centre of a level's skip that the way up to an output of `m` pixels reads (388 -> 392 at level 0)."""
    side = m + 4
    for _ in range(level):
        side = side // 2 + 4
    return side


def nearest_inputs(n: int, depth: int = 4) -> tuple[int, int]:
    """Two valid inputs nearest to `n`: the largest below and the smallest above, or the two smallest."""
    above = input_size(max(1, n + 1 - 2 * border(depth)), depth)
    below = above - 2**depth
    if below == n:
        below -= 2**depth
    return (below, above) if is_valid_input(below, depth) else (above, above + 2**depth)
