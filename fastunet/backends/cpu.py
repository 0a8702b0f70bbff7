"""The CPU's table: the C++ engine `_fastunet`, and the packing of weights for it.

Weights lie as [outputs / G][inputs / 16][taps][16][G] with G = 32 outputs side by side, or 16, both padded to a
multiple of 16 channels, each input of a concatenation for itself (csrc/cpu/kernels.h).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import _fastunet as engine
import numpy as np
from numpy.typing import NDArray

from fastunet.backends import on_host
from fastunet.geometry import border
from fastunet.memory import available_bytes
from fastunet.normalization import scaled
from fastunet.rotations import Turn

if TYPE_CHECKING:
    from fastunet.rotations import Rotation
    from fastunet.tiling import TilePlan

_BLOCK = engine.BLOCK
ALGORITHMS = "auto", "direct", "winograd2", "winograd4", "winograd6"
"""What FASTUNET_CONV may say: which way every 3x3 convolution takes."""


def _padded(channels: int) -> int:
    return -(-channels // _BLOCK) * _BLOCK


class CpuComposition:
    """`fastunet.backends.Composition` by what csrc/operations.h calls composed."""

    forward = staticmethod(engine.composed_forward)

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm

    def pays(self, up_inputs: Sequence[int], inputs: Sequence[int], outputs: int) -> bool:
        skip, middle = inputs
        return engine.composing_pays(self.algorithm, *up_inputs, middle, skip, outputs)

    def size(self, up_inputs: Sequence[int], inputs: Sequence[int], outputs: int) -> int:
        skip, middle = inputs
        return engine.composed_floats(*up_inputs, middle, skip, outputs)

    def compose(
        self,
        up_weight: Any,
        up_bias: Any,
        weight: Any,
        bias: Any,
        up_inputs: Sequence[int],
        inputs: Sequence[int],
        outputs: int,
    ) -> Any:
        skip, middle = inputs
        return engine.compose(up_weight, up_bias, weight, bias, *up_inputs, middle, skip, outputs)


class CpuBackend:
    """`Backend` on the CPU; see `fastunet.backends.Backend` for what each kernel does."""

    name = "cpu"
    place = (1, 0)  # kDLCPU
    stream = None
    repeats = False
    free_memory = staticmethod(available_bytes)

    def __init__(self) -> None:
        self.algorithm = os.environ.get("FASTUNET_CONV", "auto")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(
                f"FASTUNET_CONV is {self.algorithm!r}; expected {', '.join(ALGORITHMS)}, or unset for auto"
            )

    @property
    def composition(self) -> CpuComposition:
        return CpuComposition(self.algorithm)

    upconv2x2_forward = staticmethod(engine.upconv2x2_forward)
    upconv2x2_backward = staticmethod(engine.upconv2x2_backward)
    conv1x1_forward = staticmethod(engine.conv1x1_forward)
    conv1x1_backward = staticmethod(engine.conv1x1_backward)
    maxpool2x2_forward = staticmethod(engine.maxpool2x2_forward)
    maxpool2x2_backward = staticmethod(engine.maxpool2x2_backward)
    softmax_cross_entropy = staticmethod(engine.softmax_cross_entropy)
    softmax = staticmethod(engine.softmax)
    dropout = staticmethod(engine.dropout)
    sgd_momentum = staticmethod(engine.sgd_momentum)

    def conv3x3_algorithm(self, inputs: int, outputs: int, height: int, width: int) -> str:
        """What a 3x3 convolution of so many channels to compute height x width values goes by."""
        return engine.conv3x3_algorithm(self.algorithm, inputs, outputs, height, width)

    def conv3x3_forward(self, x: Any, skip: Any, weight: Any, bias: Any, outputs: int, relu: bool) -> Any:
        return engine.conv3x3_forward(x, skip, weight, bias, outputs, relu, self.algorithm)

    def conv3x3_backward(
        self,
        gradient: Any,
        x: Any,
        skip: Any,
        relu_output: Any,
        weight: Any,
        weight_gradient: Any,
        bias_gradient: Any,
        wants_input: bool,
    ) -> tuple[Any, Any]:
        return engine.conv3x3_backward(
            gradient,
            x,
            skip,
            relu_output,
            weight,
            weight_gradient,
            bias_gradient,
            wants_input,
            self.algorithm,
        )

    def conv3x3_maxpool2x2_forward(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        outputs: int,
        kept: tuple[int, int] | None,
        wants_choice: bool,
    ) -> tuple[Any, Any, Any]:
        kept = kept or (x.shape[1] - 2, x.shape[2] - 2)
        return engine.conv3x3_maxpool2x2_forward(
            x, weight, bias, outputs, *kept, wants_choice, self.algorithm
        )

    def head_cross_entropy_forward(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        outputs: int,
        labels: np.ndarray,
        weights: np.ndarray,
        wants_gradient: bool,
    ) -> tuple[float, Any]:
        logits = engine.conv1x1_forward(x, weight, bias, outputs)
        loss, gradient = engine.softmax_cross_entropy(logits, labels, weights, wants_gradient)
        return loss, (gradient, x, weight)

    def head_cross_entropy_backward(
        self, saved: Any, factor: float, weight_gradient: Any, bias_gradient: Any, wants_input: bool
    ) -> Any:
        gradient, x, weight = saved
        gradient = self.scaled(gradient, factor)
        return engine.conv1x1_backward(gradient, x, weight, weight_gradient, bias_gradient, wants_input)

    def predictions(self, forward: Callable[[Any], Any], channels: int, classes: int) -> "Predictions":
        return Predictions(self, forward, classes)

    def memory_of(self, work: Callable[[], Any]) -> None:
        """Only doing it would tell."""

    def given(self, values: Any) -> np.ndarray:
        found = on_host(values)
        if found is None:
            raise ValueError(
                "an array on a GPU was given to the CPU; copy it to the host first, or use device='cuda'"
            )
        return found

    def array(self, values: Any) -> Any:
        values = self.given(values)
        if values.ndim != 4:
            raise ValueError(f"an array of shape {values.shape} was given, (N, H, W, C) is expected")
        return engine.Array.from_pixels(np.ascontiguousarray(values, dtype=np.float32))

    shared = array

    def numpy(self, array: Any) -> np.ndarray:
        return array.pixels()

    exported = numpy

    def copy(self, array: Any) -> Any:
        result = engine.Array(*array.shape)
        engine.add_centre(result, array)
        return result

    def scaled(self, array: Any, factor: float) -> Any:
        if factor != 1.0:
            engine.multiply(array, factor)
        return array

    def accumulate(self, one: Any, other: Any, shape: tuple[int, ...]) -> Any:
        large, small = (
            (one, other)
            if one.shape[1] >= other.shape[1] and one.shape[2] >= other.shape[2]
            else (other, one)
        )
        large = self.full_size(large, shape)
        engine.add_centre(large, small)
        return large

    def full_size(self, gradient: Any, shape: tuple[int, ...]) -> Any:
        if gradient.shape == shape:
            return gradient
        result = engine.Array(*shape)
        engine.add_centre(result, gradient)
        return result

    def buffer(self, count: int) -> np.ndarray:
        return np.zeros(count, np.float32)

    def write(self, buffer: np.ndarray, values: np.ndarray) -> None:
        buffer[...] = values

    def read(self, buffer: np.ndarray) -> np.ndarray:
        return buffer

    def fill(self, buffer: np.ndarray, values: Any, kind: str, inputs: Sequence[int]) -> None:
        self.write(buffer, self.pack(self.given(values), kind, inputs))

    def packed_size(self, kind: str, inputs: Sequence[int], shape: tuple[int, ...]) -> int:
        if kind == "bias":
            return _padded(shape[0])
        outputs = shape[1] if kind == "upconv" else shape[0]
        return sum(map(_padded, inputs)) * _padded(outputs) * shape[2] * shape[3]

    def pack(self, values: np.ndarray, kind: str, inputs: Sequence[int]) -> np.ndarray:
        values = np.asarray(values, np.float32)
        if kind == "bias":
            return np.pad(values, (0, _padded(len(values)) - len(values)))
        if kind == "upconv":
            values = values.transpose(1, 0, 2, 3)
        outputs, taps = values.shape[0], values.shape[2] * values.shape[3]
        group = engine.group_width(outputs)
        parts, first = [], 0
        for channels in inputs:
            part = values[:, first : first + channels].reshape(outputs, channels, taps)
            parts.append(
                np.pad(part, ((0, _padded(outputs) - outputs), (0, _padded(channels) - channels), (0, 0)))
            )
            first += channels
        grouped = np.concatenate(parts, axis=1).reshape(_padded(outputs) // group, group, -1, _BLOCK, taps)
        return np.ascontiguousarray(grouped.transpose(0, 2, 4, 3, 1)).ravel()

    def unpack(
        self, flat: np.ndarray, kind: str, inputs: Sequence[int], shape: tuple[int, ...]
    ) -> np.ndarray:
        if kind == "bias":
            return flat[: shape[0]].copy()
        outputs = shape[1] if kind == "upconv" else shape[0]
        group = engine.group_width(outputs)
        taps = shape[2] * shape[3]
        grouped = flat.reshape(_padded(outputs) // group, -1, taps, _BLOCK, group)
        padded = grouped.transpose(0, 4, 1, 3, 2).reshape(_padded(outputs), -1, taps)[:outputs]
        parts, first = [], 0
        for channels in inputs:
            parts.append(padded[:, first : first + channels])
            first += _padded(channels)
        values = np.concatenate(parts, axis=1).reshape(outputs, -1, shape[2], shape[3])
        return np.ascontiguousarray(values.transpose(1, 0, 2, 3) if kind == "upconv" else values)

    exported_parameter = unpack


class Predictions:
    """`fastunet.backends.Predictions`: nothing is kept from one image to the next."""

    # Resident memory came to 1.0 to 1.08 times the activations alive at once (free places between them), on tiles of
    # 492 to 4092 pixels of networks of depth 4.
    element_bytes = 1.08 * 4
    free_memory = staticmethod(available_bytes)

    def __init__(self, table: CpuBackend, forward: Callable[[Any], Any], classes: int) -> None:
        self.table = table
        self.forward = forward
        self.classes = classes

    def begin(self, image: NDArray, scales: NDArray[np.float64]) -> "Prediction":
        return Prediction(self, scaled(image, scales))

    def tiles(self, inputs: Iterable[NDArray], scales: NDArray[np.float64]) -> Iterator[NDArray[np.float32]]:
        for pixels in inputs:
            part = scaled(pixels, scales)
            del pixels
            yield self.probabilities(part)

    def release(self) -> None:
        engine.trim()

    def probabilities(self, tile: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of the network's input (h, w, C)."""
        return self.table.numpy(self.forward(self.table.array(tile[None])))[0]


class Prediction:
    """`fastunet.backends.Prediction`: one view after the other is put together and brought back onto the image."""

    def __init__(self, predictions: Predictions, image: NDArray[np.float32]) -> None:
        self._predictions = predictions
        self._image = image
        self._sum = np.zeros((*image.shape[:2], predictions.classes), np.float32)

    def add(self, view: "Turn | Rotation", plan: "TilePlan") -> Iterator[None]:
        read = view.reader(self._image)
        lost = border(plan.depth)
        if isinstance(view, Turn):
            total = view.turned(self._sum)  # the same memory
        else:
            total = np.zeros((*plan.image, self._predictions.classes), np.float32)
        for tile in plan:
            part = read(tile.top - lost, tile.left - lost, *plan.tile)
            probabilities = self._predictions.probabilities(part)
            total[tile.top : tile.bottom, tile.left : tile.right] += probabilities[
                : tile.bottom - tile.top, : tile.right - tile.left
            ]
            yield
        if not isinstance(view, Turn):
            self._sum += view.undo(total, *self._image.shape[:2])

    def sum(self) -> NDArray[np.float32]:
        return self._sum


backend = CpuBackend()
