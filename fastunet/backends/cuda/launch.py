"""How a kernel is launched: what the host side of each kernel decides, and nothing of any device."""

from typing import NamedTuple

Grid = tuple[int, int, int]


class Launch(NamedTuple):
    """A kernel of a file of kernels/, and its geometry.

    Attributes
    ----------
    file, kernel : str
    defines : tuple of str
        Beside the element's.
    grid : tuple of int
    threads, shared_bytes : int
        Of a block.
    """

    file: str
    kernel: str
    defines: tuple[str, ...]
    grid: Grid
    threads: int
    shared_bytes: int


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return -(-count // size)


def splits(steps: int, blocks_of_a_split: int, places: int) -> int:
    """Splits of a sum over `steps`: about `places` blocks work, each on one step or more."""
    return max(1, min(steps, places // blocks_of_a_split))
