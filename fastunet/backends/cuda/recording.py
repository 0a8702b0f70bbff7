"""Work recorded once and replayed: no memory is asked for and nobody is waited for while it runs.

The work is called twice. First on a `Listener`, a device that does nothing but note when memory comes and goes; from
its notes `plan` gives every piece a place in one block of memory, the same place to pieces that are never there
together. Then at those places while the device captures what is started: a CUDA graph.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastunet.backends.cuda.device import Device, Memory

ALIGNMENT = 256
NEVER = 2**62


@dataclass
class Lifetime:
    """A piece of memory: its size, and between which events of the work it is needed."""

    count_bytes: int
    begin: int
    end: int = NEVER


@dataclass(frozen=True)
class Place:
    """`Memory` within a larger piece, or nowhere."""

    pointer: int
    bytes: int
    whole: Memory | None = None


class Follower:
    """What both stand-ins for a device share: they are that device but for memory and time."""

    records = True

    def __init__(self, device: Device) -> None:
        self.device = device
        self.name = device.name
        self.architecture = device.architecture
        self.multiprocessors = device.multiprocessors
        self.shared_memory = device.shared_memory
        self.exchange = device.exchange
        self.kernel = device.kernel
        self.host_array = device.host_array
        self.free_memory = device.free_memory
        self.describe = device.describe

    def download(self, pointer: int, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        raise ValueError("work that is recorded cannot wait for values; read them back after a replay")

    def synchronize(self) -> None:
        raise ValueError("work that is recorded cannot wait")

    def mark(self) -> Callable[[], None]:
        raise ValueError("work that is recorded cannot wait")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        raise ValueError("work that is recorded cannot record another")


class Listener(Follower):
    """A `Device` on which nothing happens: it learns which memory the work needs, and `builds` its kernels or not."""

    def __init__(self, device: Device, builds: bool = True) -> None:
        super().__init__(device)
        if not builds:
            self.kernel = lambda file, name, defines: None
        self.lifetimes: list[Lifetime] = []
        self._events = 0

    def allocate(self, count_bytes: int) -> Place:
        place = Place(ALIGNMENT, count_bytes)
        lifetime = Lifetime(count_bytes, self._events)
        self.lifetimes.append(lifetime)
        weakref.finalize(place, self._end, lifetime).atexit = False
        return place

    def _end(self, lifetime: Lifetime) -> None:
        lifetime.end = self._events

    def upload(self, pointer: int, values: np.ndarray) -> None:
        self._events += 1

    def read_back(self, pointer: int, values: np.ndarray) -> None:
        self._events += 1

    def zero(self, pointer: int, count_bytes: int) -> None:
        self._events += 1

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
    ) -> None:
        self._events += 1


class Arena(Follower):
    """A `Device` whose memory is one piece, shared out as `plan` says, in the order in which the work asks."""

    def __init__(self, device: Device, lifetimes: Sequence[Lifetime], memory: Memory | None) -> None:
        super().__init__(device)
        self._offsets, needed = plan(lifetimes)
        self._sizes = [lifetime.count_bytes for lifetime in lifetimes]
        self.memory = (
            memory if memory is not None and memory.bytes >= needed else device.allocate(max(needed, 1))
        )
        self._given = 0
        self.upload = device.upload
        self.read_back = device.read_back
        self.zero = device.zero
        self.launch = device.launch

    def allocate(self, count_bytes: int) -> Place:
        number = self._given
        if number >= len(self._sizes) or self._sizes[number] != count_bytes:
            raise RuntimeError("the work asks for other memory than when it was planned; it must not change")
        self._given += 1
        return Place(self.memory.pointer + self._offsets[number], count_bytes, self.memory)


def plan(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Offset of each piece, and the size of the whole: the largest first, each as low as it can lie.

    Pieces that live at the same time do not overlap; one that ends with the event before another begins gives it its
    place, for a device does things in their order.
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    total = 0
    for number in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].count_bytes, i)):
        one = lifetimes[number]
        neighbours = sorted(
            (offsets[i], offsets[i] + lifetimes[i].count_bytes)
            for i in placed
            if lifetimes[i].begin < one.end and one.begin < lifetimes[i].end
        )
        offset = 0
        for begin, end in neighbours:
            if offset + one.count_bytes <= begin:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[number] = offset
        placed.append(number)
        total = max(total, offset + one.count_bytes)
    return offsets, total


class Recording:
    """Work on a device, to be replayed with the numbers that then lie in its host arrays.

    Parameters
    ----------
    device : Device
    work : callable
        Takes the device to work on. It must start the same kernels with the same arguments each time, and may keep
        nothing of what it allocates.
    memory : Memory, optional
        To be used if it suffices: that of another recording, for replays follow one another.

    Attributes
    ----------
    memory : Memory
        The arena, all that a replay needs beside what existed before.
    """

    def __init__(self, device: Device, work: Callable[[Device], None], memory: Memory | None = None) -> None:
        listener = Listener(device)
        work(listener)
        arena = Arena(device, listener.lifetimes, memory)
        self.memory = arena.memory
        self._device = device
        self._replay = device.capture(lambda: work(arena))

    def start(self) -> Callable[[], None]:
        """Start a replay; what is returned waits until it has ended."""
        self._replay()
        return self._device.mark()
