"""Whole images predicted on the device: put there once; tiles gathered, seen by the network, stitched; read back once.

Views that only move pixels are read from the image, and added to the sum of all views, where these lie. A resampled
view is made on the host, whole, and its prediction is brought back there.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastunet.backends.cuda.arrays import Array
from fastunet.backends.cuda.device import Device, Memory
from fastunet.geometry import border
from fastunet.normalization import scaled
from fastunet.rotations import Rotation, Turn
from fastunet.tiling import Tile, TilePlan

if TYPE_CHECKING:
    from fastunet.backends.cuda.table import CudaBackend, Repetition

Forward = Callable[[Any], Any]
Result = TypeVar("Result")

STORED = np.uint8, np.uint16, np.float32
"""What images are made of on the device, the narrowest first."""
MOST_SIZES = 8
"""Sizes of tiles for which passes are kept: twice those of one image's views."""


@dataclass(frozen=True)
class Plane:
    """Pixels (height, width, channels) in device memory, in the order in which a view shows them.

    Attributes
    ----------
    pointer : int
        Of the view's first pixel.
    row_step, column_step : int
        Pixels from there to the next row's first and to the next column's.
    """

    memory: Memory
    dtype: np.dtype
    channels: int
    pointer: int
    height: int
    width: int
    row_step: int
    column_step: int

    @classmethod
    def allocate(cls, device: Device, shape: tuple[int, ...], dtype: np.dtype | type) -> "Plane":
        height, width, channels = shape
        kind = np.dtype(dtype)
        memory = device.allocate(height * width * channels * kind.itemsize)
        return cls(memory, kind, channels, memory.pointer, height, width, width, 1)

    @classmethod
    def upload(cls, device: Device, values: np.ndarray) -> "Plane":
        plane = cls.allocate(device, values.shape, values.dtype)
        device.upload(plane.pointer, values)
        return plane

    def turned(self, view: Turn) -> "Plane":
        # NumPy knows where pixels go; those it is asked about are never touched.
        bytes_as_pixels = np.empty((self.height, self.width), np.uint8)
        seen = view.turned(bytes_as_pixels)
        first = seen.ctypes.data - bytes_as_pixels.ctypes.data
        pointer = self.pointer + first * self.channels * self.dtype.itemsize
        return Plane(self.memory, self.dtype, self.channels, pointer, *seen.shape, *seen.strides)


class Predictions:
    """`fastunet.backends.Predictions` on a device.

    Parameters
    ----------
    table : CudaBackend
    forward : callable
        From a tile to the probabilities of its classes, arrays both.
    channels, classes : int
    """

    def __init__(self, table: "CudaBackend", forward: Forward, channels: int, classes: int) -> None:
        self.table = table
        self.channels = channels
        self.classes = classes
        self.element_bytes = table.bits // 8
        self._forward = forward
        self._passes: dict[tuple[int, int], _Pass] = {}

    def begin(self, image: NDArray, scales: NDArray[np.float64]) -> "Prediction":
        return self.with_room(lambda: Prediction(self, image, scales))

    def free_memory(self) -> int:
        held = {memory.pointer: memory.bytes for one in self._passes.values() for memory in one.memories}
        return self.table.free_memory() + sum(held.values())

    def with_room(self, work: Callable[[], Result]) -> Result:
        """Do what needs memory; where there is none, once more without what is kept for later tiles."""
        try:
            return work()
        except MemoryError:
            if not self._passes:
                raise
        self._passes.clear()
        return work()

    def of_size(self, height: int, width: int) -> "_Pass":
        """The network's way over tiles of a size."""
        size = height, width
        if size not in self._passes:
            if len(self._passes) == MOST_SIZES:
                self._passes.clear()
            self._passes[size] = _Pass(self.table, self._forward, (1, *size, self.channels))
        return self._passes[size]

    def roomiest(self) -> "Repetition | None":
        """Of what is recorded, that with the most memory: others can use it."""
        recorded = [one.repetition for one in self._passes.values() if one.repetition is not None]
        return max(recorded, key=lambda one: one.memory.bytes, default=None)


class _Pass:
    """The network on tiles of one size, which are put into `tile`; recorded when it is wanted for the second time."""

    def __init__(self, table: "CudaBackend", forward: Forward, shape: tuple[int, int, int, int]) -> None:
        self._table = table
        self._forward = forward
        self._calls = 0
        self.tile = table.image_array(shape)
        self.repetition: Repetition | None = None

    @property
    def memories(self) -> list[Memory]:
        """All that it holds; passes may share some."""
        return [self.tile.memory] + ([] if self.repetition is None else [self.repetition.memory])

    def probabilities(self, beside: "Repetition | None") -> Array:
        self._calls += 1
        if self._calls == 1:
            return self._forward(self.tile)
        if self.repetition is None:
            self.repetition = self._table.repeat(lambda: self._forward(self.tile), beside)
        self.repetition.start()
        return self.repetition.result


class Prediction:
    """`fastunet.backends.Prediction` on a device."""

    def __init__(self, predictions: Predictions, image: NDArray, scales: NDArray[np.float64]) -> None:
        device = predictions.table.device
        self._predictions = predictions
        self._device = device
        self._image = image
        self._scales = scales
        kind = next((kind for kind in STORED if np.can_cast(image.dtype, kind)), None)
        values = scaled(image, scales) if kind is None else np.ascontiguousarray(image, kind)
        self._pixels = Plane.upload(device, values)
        self._pixel_scales = self._put_scales(scales if kind is not None else _unscaled(image.shape[2]))
        self._sum = self._zeros(*image.shape[:2])
        self._resampled: NDArray[np.float32] | None = None

    def add(self, view: Turn | Rotation, plan: TilePlan) -> Iterator[None]:
        if isinstance(view, Turn):
            pixels, total = self._pixels.turned(view), self._sum.turned(view)
            yield from self._tiles(pixels, self._pixel_scales, 0, total, plan)
            return
        lost = border(plan.depth)
        extent = [
            (count - 1) * stride + tile for count, stride, tile in zip(plan.grid, plan.stride, plan.tile)
        ]
        resampled = view.reader(self._scaled)(-lost, -lost, *extent)
        pixels, seen = self._predictions.with_room(
            lambda: (Plane.upload(self._device, resampled), self._zeros(*plan.image))
        )
        unscaled = self._put_scales(_unscaled(pixels.channels))
        yield from self._tiles(pixels, unscaled, lost, seen, plan)
        back = view.undo(self._read(seen), *self._image.shape[:2])
        self._resampled = back if self._resampled is None else self._resampled + back

    @functools.cached_property
    def _scaled(self) -> NDArray[np.float32]:
        return scaled(self._image, self._scales)

    def sum(self) -> NDArray[np.float32]:
        total = self._read(self._sum)
        if self._resampled is not None:
            total += self._resampled
        return total

    def _tiles(
        self, pixels: Plane, scales: Memory, begin: int, total: Plane, plan: TilePlan
    ) -> Iterator[None]:
        """Predict tiles of pixels that begin so far above and left of the image; one is under way beside each."""

        def start(tile: Tile) -> Callable[[], None]:
            table, network = self._predictions.table, self._predictions.of_size(*plan.tile)
            lost = border(plan.depth)
            table.gather(pixels, scales, begin - lost + tile.top, begin - lost + tile.left, network.tile)
            probabilities = network.probabilities(self._predictions.roomiest())
            table.stitch(probabilities, total, tile.top, tile.left, tile.bottom, tile.right)
            return self._device.mark()

        wait = None
        for tile in plan:
            following = self._predictions.with_room(functools.partial(start, tile))
            if wait is not None:
                wait()
                yield
            wait = following
        assert wait is not None
        wait()
        yield

    def _put_scales(self, scales: NDArray[np.float64]) -> Memory:
        memory = self._device.allocate(scales.nbytes)
        self._device.upload(memory.pointer, scales)
        return memory

    def _zeros(self, height: int, width: int) -> Plane:
        plane = Plane.allocate(self._device, (height, width, self._predictions.classes), np.float32)
        self._device.zero(plane.pointer, plane.memory.bytes)
        return plane

    def _read(self, plane: Plane) -> NDArray[np.float32]:
        return self._device.download(plane.pointer, (plane.height, plane.width, plane.channels), np.float32)


def _unscaled(channels: int) -> NDArray[np.float64]:
    return np.tile([0.0, 1.0], (channels, 1))
