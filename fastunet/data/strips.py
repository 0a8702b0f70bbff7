"""Share the rows or columns of an image out among threads.

For kernels that release the GIL: plain threads, because Numba's default threading layer does not bear two
callers at a time and the data side is called from several.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise


def in_strips(length: int, threads: int, work: Callable[[int, int], None]) -> None:
    """Call work(low, high) on `threads` strips of range(length), one of them in the calling thread."""
    if threads == 1:
        work(0, length)
        return
    strips = pairwise(length * i // threads for i in range(threads + 1))
    own = next(strips)
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, *strip) for strip in strips]
        work(*own)
        for other in others:
            other.result()
