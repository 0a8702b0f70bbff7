"""Whole images predicted on the device: put there once; tiles gathered, seen by the network, stitched; read back once.

An image that is there already, of whatever library, stays and is read where it lies, and so does its prediction. Views
that only move pixels are read from the image, and added to the sum of all views, where these lie. A resampled view is
made on the host, whole, and its prediction is brought back there.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastunet.backends.cuda.arrays import Array
from fastunet.backends.cuda.device import Device, Memory
from fastunet.backends.cuda.exchange import Exported, View
from fastunet.geometry import border
from fastunet.normalization import Grey, scaled
from fastunet.rotations import Rotation, Turn
from fastunet.tiling import Tile, TilePlan

if TYPE_CHECKING:
    from fastunet.backends.cuda.table import CudaBackend, Repetition

Forward = Callable[[Any], Any]
Result = TypeVar("Result")

STORED = np.uint8, np.uint16, np.float32
"""What images are made of on the device, the narrowest first."""
BETWEEN = 2.2
"""Planned memory over the activations that a plan of tiles counts, at most: first layer and skips are whole here."""
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

    @classmethod
    def of(cls, image: View) -> "Plane | None":
        """The same memory, if tiles can be gathered from it: a type that is stored, a pixel's channels side by side."""
        height, width, channels = image.shape
        row, column, channel = (stride if n > 1 else 0 for stride, n in zip(image.strides, image.shape))
        steps = row // channels, column // channels
        whole = channel in (0, 1) and row % channels == column % channels == 0
        if (
            image.type not in (np.dtype(kind).name for kind in STORED)
            or not whole
            or max(map(abs, steps)) >= 2**31
        ):
            return None
        return cls(image.memory, np.dtype(image.type), channels, image.pointer, height, width, *steps)

    @property
    def view(self) -> View:
        """The pixels as other libraries' arrays are seen."""
        steps = self.row_step * self.channels, self.column_step * self.channels, 1
        shape = self.height, self.width, self.channels
        return View(self.memory, self.pointer, shape, steps, self.dtype.name)

    def turned(self, view: Turn) -> "Plane":
        # NumPy knows where pixels go; those it is asked about are never touched.
        bytes_as_pixels = np.lib.stride_tricks.as_strided(
            np.empty(1, np.uint8), (self.height, self.width), (self.row_step, self.column_step)
        )
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
        self.element_bytes = BETWEEN * table.bits / 8
        self._forward = forward
        self._passes: dict[tuple[int, int], _Pass] = {}

    def begin(self, image: NDArray | View, scales: NDArray[np.float64]) -> "Prediction":
        return self.with_room(lambda: Prediction(self, image, scales))

    def tiles(self, inputs: Iterable[NDArray], scales: NDArray[np.float64]) -> Iterator[NDArray[np.float32]]:
        for pixels in inputs:
            yield self.with_room(functools.partial(self._tile, pixels, scales))

    def release(self) -> None:
        self._passes.clear()

    def _tile(self, pixels: NDArray, scales: NDArray[np.float64]) -> NDArray[np.float32]:
        plane, plane_scales = _uploaded(self.table.device, pixels, scales)
        network = self.of_size(plane.height, plane.width)
        self.table.gather(plane, plane_scales, 0, 0, network.tile)
        return self.table.numpy(network.probabilities(self.roomiest()))[0]

    def statistics(self, image: View, moments: bool) -> list[Grey]:
        return self.with_room(lambda: self.table.grey_values(image, moments))

    def averaged(self, sums: Sequence[Plane], views: int, stacked: bool) -> Exported:
        return self.with_room(lambda: self._averaged(sums, views, stacked))

    def _averaged(self, sums: Sequence[Plane], views: int, stacked: bool) -> Exported:
        """Those of a stack side by side in memory; of one image where its sum is."""
        device, shape = self.table.device, (sums[0].height, sums[0].width, self.classes)
        scales = put(device, np.tile([0.0, 1 / views], (self.classes, 1)))
        whole = Plane.allocate(device, (len(sums) * shape[0], *shape[1:]), np.float32) if stacked else sums[0]
        for number, one in enumerate(sums):
            target = replace(whole, pointer=whole.pointer + number * one.memory.bytes)
            self.table.scaled_image(one.view, scales, target)
        return Exported(device.exchange, whole.memory, (len(sums), *shape) if stacked else shape)

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

    def __init__(self, predictions: Predictions, image: NDArray | View, scales: NDArray[np.float64]) -> None:
        device = predictions.table.device
        self._predictions = predictions
        self._device = device
        self._image = image
        self._scales = scales
        if isinstance(image, View):
            plane = Plane.of(image)
            self._pixels = self._scaled_plane(image) if plane is None else plane
            self._pixel_scales = put(device, _unscaled(image.shape[2]) if plane is None else scales)
        else:
            self._pixels, self._pixel_scales = _uploaded(device, image, scales)
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
        unscaled = put(self._device, _unscaled(pixels.channels))
        yield from self._tiles(pixels, unscaled, lost, seen, plan)
        back = view.undo(self._read(seen), *self._image.shape[:2])
        self._resampled = back if self._resampled is None else self._resampled + back

    @functools.cached_property
    def _scaled(self) -> NDArray[np.float32]:
        """On the host."""
        image = self._image
        return (
            self._read(self._scaled_plane(image)) if isinstance(image, View) else scaled(image, self._scales)
        )

    def _scaled_plane(self, image: View) -> Plane:
        plane = Plane.allocate(self._device, image.shape, np.float32)
        self._predictions.table.scaled_image(image, put(self._device, self._scales), plane)
        return plane

    def sum(self) -> "NDArray[np.float32] | Plane":
        if not isinstance(self._image, View):
            total = self._read(self._sum)
            return total if self._resampled is None else total + self._resampled
        if self._resampled is not None:
            shape = 1, *self._resampled.shape
            added = Array.allocate(self._device, shape, 32, self._predictions.classes)
            self._device.upload(added.pointer, self._resampled)
            self._predictions.table.stitch(added, self._sum, 0, 0, *shape[1:3])
        return self._sum

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

    def _zeros(self, height: int, width: int) -> Plane:
        plane = Plane.allocate(self._device, (height, width, self._predictions.classes), np.float32)
        self._device.zero(plane.pointer, plane.memory.bytes)
        return plane

    def _read(self, plane: Plane) -> NDArray[np.float32]:
        return self._device.download(plane.pointer, (plane.height, plane.width, plane.channels), np.float32)


def _uploaded(device: Device, image: NDArray, scales: NDArray[np.float64]) -> tuple[Plane, Memory]:
    """An image on the device, in the narrowest type that holds it, with the scales to gather it by."""
    kind = next((kind for kind in STORED if np.can_cast(image.dtype, kind)), None)
    if kind is None:
        return Plane.upload(device, scaled(image, scales)), put(device, _unscaled(image.shape[2]))
    return Plane.upload(device, np.ascontiguousarray(image, kind)), put(device, scales)


def put(device: Device, values: np.ndarray) -> Memory:
    """Device memory of these values."""
    memory = device.allocate(values.nbytes)
    device.upload(memory.pointer, values)
    return memory


def _unscaled(channels: int) -> NDArray[np.float64]:
    return np.tile([0.0, 1.0], (channels, 1))
