"""The table of kernels on a CUDA `Device`: what each operation allocates, and how its kernel is launched.

Activations are bfloat16 or float32 by the table's precision, their channels padded to 16; images from outside, of one
to four channels, are not padded; logits and probabilities are float32 and not padded. Parameters are float32 masters,
each weight packed as [tap][outputs, padded][inputs, padded], one input of a concatenation after the other; kernels for
bfloat16 read a copy of the same order.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastunet.backends.cuda.arguments import (
    TensorArgument,
    floats,
    integers,
    longs,
    pointers,
    tensors,
    unsigned_longs,
)
from fastunet.backends.cuda.arrays import IMAGE_CHANNELS, Array, Buffer, Storage, padded
from fastunet.backends.cuda.device import Device, Memory

ABSENT = TensorArgument()
MOST_BLOCKS = 65535
"""Along a grid's second and third axes."""
WEIGHT_PARTS = 128
"""Stretches in which the weights of a loss are summed (kernels/cross_entropy.cuh)."""


class ConvertArguments(ctypes.Structure):
    _fields_ = tensors("source", "target")


class SumArguments(ctypes.Structure):
    _fields_ = tensors("one", "other", "total")


class MaskArguments(ctypes.Structure):
    _fields_ = tensors("gradient", "output", "masked")


class ScaleArguments(ctypes.Structure):
    _fields_ = [*tensors("source", "scaled"), *floats("factor")]


class MaxpoolForwardArguments(ctypes.Structure):
    _fields_ = tensors("x", "pooled")


class MaxpoolBackwardArguments(ctypes.Structure):
    _fields_ = [*tensors("gradient", "x", "present", "total"), *integers("rectified")]


class DropoutArguments(ctypes.Structure):
    _fields_ = [
        *tensors("input", "output"),
        *pointers("steps"),
        *unsigned_longs("seed", "draw"),
        *floats("rate"),
    ]


class SgdMomentumArguments(ctypes.Structure):
    _fields_ = [
        *pointers("value", "gradient", "momentum", "shadow", "rates"),
        *longs("count"),
        *floats("learning_rate", "rate"),
    ]


class Conv1x1ForwardArguments(ctypes.Structure):
    _fields_ = [*pointers("x", "weight", "bias", "y"), *longs("pixels"), *integers("outputs")]


class Conv1x1DataGradientArguments(ctypes.Structure):
    _fields_ = [
        *pointers("gradient", "x", "weight", "x_gradient"),
        *longs("pixels"),
        *integers("outputs", "rectified"),
    ]


class Conv1x1WeightGradientArguments(ctypes.Structure):
    _fields_ = [*pointers("gradient", "x", "workspace"), *longs("pixels"), *integers("outputs")]


class ReduceArguments(ctypes.Structure):
    _fields_ = [
        *pointers("weight_gradient", "bias_gradient", "workspace"),
        *longs("weights"),
        *integers("biases", "splits"),
    ]


class WeightSumsArguments(ctypes.Structure):
    _fields_ = [*pointers("weights", "parts"), *longs("pixels")]


class SoftmaxArguments(ctypes.Structure):
    _fields_ = [*pointers("logits", "probabilities"), *longs("pixels"), *integers("classes")]


class CrossEntropyArguments(ctypes.Structure):
    _fields_ = [
        *pointers("logits", "logit_gradient", "labels", "weights", "weight_parts", "loss_parts"),
        *longs("pixels"),
        *integers("classes"),
    ]


class TotalLossArguments(ctypes.Structure):
    _fields_ = [*pointers("loss_parts", "weight_parts", "total"), *integers("parts")]


class HeadArguments(ctypes.Structure):
    _fields_ = [
        *pointers("x", "weight", "bias", "labels", "weights", "weight_parts", "loss_parts"),
        *pointers("x_gradient", "workspace"),
        *longs("pixels"),
        *integers("rectified"),
    ]


@dataclass(frozen=True)
class ChannelLanes:
    """How kernels/channel_lanes.cuh shares out pixels of `pitch` stored channels."""

    pitch: int

    @property
    def lanes(self) -> int:
        return min(1 << (self.pitch // 8 - 1).bit_length(), 32)

    @property
    def most_outputs(self) -> int:
        """Outputs whose weight gradient a block takes at once."""
        return max(16 // _blocks(self.pitch // 8, self.lanes), 1)

    def blocks(self, pixels: int) -> int:
        """The most blocks that have a pixel each."""
        return _blocks(pixels, 128 // self.lanes * 2)


@dataclass(frozen=True)
class Truth:
    """Labels and weights of a loss on the device, and what its kernels sum up."""

    labels: Memory
    weights: Memory
    weight_parts: Memory
    loss_parts: Memory


HeadBackward = Callable[[float, Buffer, Buffer, bool], Array | None]


class CudaBackend:
    """`fastunet.backends.Backend` on a device, in one precision.

    Parameters
    ----------
    device : Device
    precision : str
        "bf16" or "fp32".
    """

    def __init__(self, device: Device, precision: str) -> None:
        self.name = device.name
        self.device = device
        self.bits = {"bf16": 16, "fp32": 32}[precision]

    # ---- Launching ------------------------------------------------------------------------------------------------

    def _launch(
        self,
        file: str,
        name: str,
        arguments: ctypes.Structure,
        grid: tuple[int, int, int],
        threads: int = 256,
        shared_bytes: int = 0,
        bits: int | None = None,
        defines: Sequence[str] = (),
    ) -> None:
        element = f"-DELEMENT_BITS={bits or self.bits}"
        kernel = self.device.kernel(file, name, (element, *defines))
        self.device.launch(kernel, grid, threads, shared_bytes, arguments)

    def _launch_pointwise(
        self,
        file: str,
        name: str,
        arguments: ctypes.Structure,
        over: Array,
        bits: int | None = None,
        defines: Sequence[str] = (),
    ) -> None:
        """Eight channels of a pixel of `over` for each thread (kernels/pointwise.cuh)."""
        images, height, width, _ = over.shape
        grid = (
            _blocks(width * _blocks(over.pitch, 8), 256),
            min(height, MOST_BLOCKS),
            min(images, MOST_BLOCKS),
        )
        self._launch(file, name, arguments, grid, bits=bits, defines=defines)

    # ---- Arrays ---------------------------------------------------------------------------------------------------

    def array(self, values: np.ndarray) -> Array:
        values = np.asarray(values)
        if values.ndim != 4:
            raise ValueError(f"an array of shape {values.shape} was given, (N, H, W, C) is expected")
        channels = values.shape[3]
        plain = Array.allocate(self.device, values.shape, 32, channels)
        self.device.upload(plain.pointer, np.ascontiguousarray(values, dtype=np.float32))
        return self._converted(plain, self.bits, channels if channels <= IMAGE_CHANNELS else padded(channels))

    def numpy(self, array: Array) -> np.ndarray:
        plain = self._plain(array)
        return self.device.download(plain.pointer, plain.shape, np.float32)

    def _plain(self, array: Array) -> Array:
        """The array as float32 without padding, as logits are."""
        return self._converted(array, 32, array.shape[3])

    def _activation(self, array: Array) -> Array:
        """The array as the convolutions want it."""
        return self._converted(array, self.bits, padded(array.shape[3]))

    def _converted(self, array: Array, bits: int, pitch: int) -> Array:
        if (array.bits, array.pitch) == (bits, pitch):
            return array
        target = Array.allocate(
            self.device, array.shape, bits, pitch, rectified=array.rectified, masked=array.masked
        )
        self._convert(array, target)
        return target

    def _convert(self, source: Array, target: Array) -> None:
        self._launch_pointwise(
            "convert.cu",
            "convert",
            ConvertArguments(source.argument(), target.argument()),
            target,
            bits=target.bits,
            defines=[f"-DSOURCE_BITS={source.bits}"],
        )

    def copy(self, array: Array) -> Array:
        return self._sum(array, None, array.shape, None)

    def scaled(self, array: Array, factor: float) -> Array:
        if factor != 1.0:
            arguments = ScaleArguments(array.argument(), array.argument(), factor)
            self._launch_pointwise(
                "convert.cu", "scale", arguments, array, bits=array.bits, defines=["-DSOURCE_BITS=32"]
            )
        return array

    def accumulate(self, one: Array, other: Array, shape: tuple[int, ...]) -> Array:
        whole = next((array for array in (one, other) if array.shape == shape), None)
        return self._sum(one, other, shape, whole)

    def full_size(self, gradient: Array, shape: tuple[int, ...]) -> Array:
        return gradient if gradient.shape == shape else self._sum(gradient, None, shape, None)

    def _sum(self, one: Array, other: Array | None, shape: tuple[int, ...], total: Array | None) -> Array:
        """Of tensors of `shape` or its centre, into `total` where it is given."""
        masked = one.masked and (other is None or other.masked)
        if total is None:
            pitch = one.pitch if one.shape == shape else None
            rectified = one.rectified and other is None
            total = Array.allocate(self.device, shape, one.bits, pitch, rectified=rectified)
        arguments = SumArguments(_placed(one, shape), _placed(other, shape), total.argument())
        self._launch_pointwise(
            "convert.cu", "sum", arguments, total, bits=total.bits, defines=["-DSOURCE_BITS=32"]
        )
        total.masked = masked
        return total

    # ---- Parameters -----------------------------------------------------------------------------------------------

    def buffer(self, count: int) -> Buffer:
        memory = self.device.allocate(4 * count)
        self.device.zero(memory.pointer, 4 * count)
        return Buffer(self.device, Storage(memory), 0, count)

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        self.device.upload(buffer.pointer, np.ascontiguousarray(values, dtype=np.float32))
        if buffer.storage.shadow is not None:
            self._refresh_shadow(buffer)

    def read(self, buffer: Buffer) -> np.ndarray:
        return self.device.download(buffer.pointer, (len(buffer),), np.float32)

    def _operand(self, weight: Buffer) -> int:
        """Where a weight is in the table's precision; from the first call on, all of its storage is."""
        if self.bits == 32:
            return weight.pointer
        if weight.storage.shadow is None:
            count = weight.storage.memory.bytes // 4
            weight.storage.shadow = self.device.allocate(2 * count)
            self._refresh_shadow(Buffer(self.device, weight.storage, 0, count))
        assert weight.shadow_pointer is not None
        return weight.shadow_pointer

    def _refresh_shadow(self, buffer: Buffer) -> None:
        shape, count = (1, 1, 1, len(buffer)), len(buffer)
        arguments = ConvertArguments(
            TensorArgument(buffer.pointer, *shape, count),
            TensorArgument(buffer.shadow_pointer, *shape, count),
        )
        self._launch(
            "convert.cu",
            "convert",
            arguments,
            (_blocks(count, 8 * 256), 1, 1),
            defines=["-DSOURCE_BITS=32"],
        )

    def packed_size(self, kind: str, inputs: Sequence[int], shape: tuple[int, ...]) -> int:
        if kind == "bias":
            return padded(shape[0])
        outputs = shape[1] if kind == "upconv" else shape[0]
        return sum(map(padded, inputs)) * padded(outputs) * math.prod(shape[2:])

    def pack(self, values: np.ndarray, kind: str, inputs: Sequence[int]) -> np.ndarray:
        values = np.asarray(values, np.float32)
        if kind == "bias":
            return _pad(values, 0)
        if kind == "upconv":
            values = values.transpose(1, 0, 2, 3)
        taps = values.reshape(*values.shape[:2], -1).transpose(2, 0, 1)
        parts = np.split(taps, np.cumsum(inputs)[:-1], axis=2)
        return np.concatenate([_pad(part, 1, 2).ravel() for part in parts])

    def unpack(
        self, flat: np.ndarray, kind: str, inputs: Sequence[int], shape: tuple[int, ...]
    ) -> np.ndarray:
        if kind == "bias":
            return flat[: shape[0]].copy()
        outputs = shape[1] if kind == "upconv" else shape[0]
        rows = math.prod(shape[2:]) * padded(outputs)
        parts = np.split(flat, np.cumsum([rows * padded(channels) for channels in inputs])[:-1])
        taps = np.concatenate(
            [
                part.reshape(-1, padded(outputs), padded(channels))[:, :outputs, :channels]
                for part, channels in zip(parts, inputs, strict=True)
            ],
            axis=2,
        )
        values = taps.transpose(1, 2, 0).reshape(outputs, sum(inputs), *shape[2:])
        return np.ascontiguousarray(values.transpose(1, 0, 2, 3) if kind == "upconv" else values)

    def sgd_momentum(
        self, value: Buffer, gradient: Buffer, momentum: Buffer, learning_rate: float, rate: float
    ) -> None:
        arguments = SgdMomentumArguments(
            value.pointer,
            gradient.pointer,
            momentum.pointer,
            value.shadow_pointer,
            None,
            len(value),
            learning_rate,
            rate,
        )
        self._launch("sgd_momentum.cu", "sgd_momentum", arguments, (_blocks(len(value), 2048), 1, 1))

    # ---- Pooling, dropout -----------------------------------------------------------------------------------------

    def maxpool2x2_forward(self, x: Array) -> tuple[Array, Array]:
        images, height, width, channels = x.shape
        if height < 2 or width < 2:
            raise ValueError(
                f"maxpool2x2 was given an input of shape {x.shape}; it must be at least 2 x 2 pixels"
            )
        pooled = Array.allocate(self.device, (images, height // 2, width // 2, channels), x.bits)
        arguments = MaxpoolForwardArguments(x.argument(), pooled.argument())
        self._launch_pointwise("maxpool2x2.cu", "maxpool2x2_forward", arguments, pooled)
        return pooled, x

    def maxpool2x2_backward(
        self, gradient: Array, choice: Array, height: int, width: int, present: Array | None
    ) -> Array:
        """`choice` is the pooling's input: the winners are found again."""
        if present is not None and present.shape == choice.shape:
            total = present
        else:
            total = Array.allocate(self.device, choice.shape, self.bits)
        arguments = MaxpoolBackwardArguments(
            gradient.argument(),
            choice.argument(),
            _placed(present, choice.shape),
            total.argument(),
            choice.rectified,
        )
        quarters = (choice.shape[0], (height + 1) // 2, (width + 1) // 2, choice.shape[3])
        over = Array(total.memory, quarters, total.pitch, total.bits)
        self._launch_pointwise("maxpool2x2.cu", "maxpool2x2_backward", arguments, over)
        total.masked = choice.rectified
        return total

    def dropout(self, x: Array, rate: float, seed: int, draw: int) -> Array:
        if not 0 <= rate < 1:
            raise ValueError(f"a dropout rate of {rate:f} was given; 0 <= rate < 1 is expected")
        # What a ReLU made zero stays zero, and so does a gradient that its mask has.
        y = Array.allocate(self.device, x.shape, x.bits, x.pitch, rectified=x.rectified, masked=x.masked)
        arguments = DropoutArguments(x.argument(), y.argument(), None, seed, draw, rate)
        self._launch_pointwise("dropout.cu", "dropout", arguments, x)
        return y

    # ---- 1x1 convolution ------------------------------------------------------------------------------------------

    def conv1x1_forward(self, x: Array, weight: Buffer, bias: Buffer, outputs: int) -> Array:
        x = self._activation(x)
        y = Array.allocate(self.device, (*x.shape[:3], outputs), 32, outputs)
        arguments = Conv1x1ForwardArguments(
            x.pointer, weight.pointer, bias.pointer, y.pointer, x.pixels, outputs
        )
        self._launch_on_lanes("conv1x1.cu", "conv1x1_forward", arguments, x, 4)
        return y

    def conv1x1_backward(
        self,
        gradient: Array,
        x: Array,
        weight: Buffer,
        weight_gradient: Buffer,
        bias_gradient: Buffer,
        wants_input: bool,
    ) -> Array | None:
        gradient, x = self._plain(gradient), self._activation(x)
        outputs, pixels = gradient.shape[3], x.pixels
        most = ChannelLanes(x.pitch).most_outputs
        splits = self._splits(x, 2)
        workspace = self._workspace(splits, weight_gradient, bias_gradient)
        self._launch_on_lanes(
            "conv1x1.cu",
            "conv1x1_weight_gradient",
            Conv1x1WeightGradientArguments(gradient.pointer, x.pointer, workspace.pointer, pixels, outputs),
            x,
            2,
            shared_bytes=4 * most * (x.pitch + 1),
            second_axis=_blocks(padded(outputs), most),
        )
        self._reduce(workspace, splits, weight_gradient, bias_gradient)
        if not wants_input:
            return None
        x_gradient = Array.allocate(self.device, x.shape, self.bits, masked=x.rectified)
        arguments = Conv1x1DataGradientArguments(
            gradient.pointer, x.pointer, weight.pointer, x_gradient.pointer, pixels, outputs, x.rectified
        )
        self._launch_on_lanes("conv1x1.cu", "conv1x1_data_gradient", arguments, x, 4)
        return x_gradient

    def _splits(self, x: Array, blocks_per_multiprocessor: int) -> int:
        most = ChannelLanes(x.pitch).blocks(x.pixels)
        return min(most, blocks_per_multiprocessor * self.device.multiprocessors)

    def _launch_on_lanes(
        self,
        file: str,
        name: str,
        arguments: ctypes.Structure,
        x: Array,
        blocks_per_multiprocessor: int,
        shared_bytes: int = 0,
        second_axis: int = 1,
        defines: Sequence[str] = (),
    ) -> None:
        """As many blocks as the device holds go over the pixels of `x` (kernels/channel_lanes.cuh)."""
        grid = (self._splits(x, blocks_per_multiprocessor), second_axis, 1)
        self._launch(file, name, arguments, grid, 128, shared_bytes, defines=[f"-DPITCH={x.pitch}", *defines])

    # ---- Sums of weight gradients over the splits of the pixels ---------------------------------------------------

    def _workspace(self, splits: int, weight_gradient: Buffer, bias_gradient: Buffer) -> Memory:
        return self.device.allocate(4 * splits * (len(weight_gradient) + len(bias_gradient)))

    def _reduce(self, workspace: Memory, splits: int, weight_gradient: Buffer, bias_gradient: Buffer) -> None:
        """Add the workspace's sums, [split][weights, biases], to the gradients."""
        weights, biases = len(weight_gradient), len(bias_gradient)
        arguments = ReduceArguments(
            weight_gradient.pointer, bias_gradient.pointer, workspace.pointer, weights, biases, splits
        )
        self._launch("reduce.cu", "reduce", arguments, (_blocks(weights + biases, 256), 1, 1), 256, 4096)

    # ---- Loss -----------------------------------------------------------------------------------------------------

    def softmax(self, logits: Array) -> Array:
        logits = self._plain(logits)
        probabilities = Array.allocate(self.device, logits.shape, 32, logits.pitch)
        arguments = SoftmaxArguments(logits.pointer, probabilities.pointer, logits.pixels, logits.shape[3])
        self._launch("softmax.cu", "softmax", arguments, (_blocks(logits.pixels, 128), 1, 1), 128)
        return probabilities

    def softmax_cross_entropy(
        self, logits: Array, labels: np.ndarray, weights: np.ndarray, wants_gradient: bool
    ) -> tuple[float, Array | None]:
        logits = self._plain(logits)
        classes, pixels = logits.shape[3], logits.pixels
        blocks = min(_blocks(pixels, 128), 8 * self.device.multiprocessors)
        truth = self._truth(labels, weights, blocks)
        gradient = Array.allocate(self.device, logits.shape, 32, logits.pitch) if wants_gradient else None
        arguments = CrossEntropyArguments(
            logits.pointer,
            None if gradient is None else gradient.pointer,
            truth.labels.pointer,
            truth.weights.pointer,
            truth.weight_parts.pointer,
            truth.loss_parts.pointer,
            pixels,
            classes,
        )
        self._launch("softmax.cu", "softmax_cross_entropy", arguments, (blocks, 1, 1), 128, 1024)
        return self._total_loss(truth, blocks, classes), gradient

    def _truth(self, labels: np.ndarray, weights: np.ndarray, blocks: int) -> Truth:
        """The truth on the device, its weights summed, with room for the loss of so many blocks."""
        pixels = labels.size
        truth = Truth(*map(self.device.allocate, (4 * pixels, 4 * pixels, 8 * WEIGHT_PARTS, 16 * blocks)))
        self.device.upload(truth.labels.pointer, np.ascontiguousarray(labels, dtype=np.int32))
        self.device.upload(truth.weights.pointer, np.ascontiguousarray(weights, dtype=np.float32))
        arguments = WeightSumsArguments(truth.weights.pointer, truth.weight_parts.pointer, pixels)
        self._launch("softmax.cu", "weight_sums", arguments, (WEIGHT_PARTS, 1, 1), 128, 1024)
        return truth

    def _total_loss(self, truth: Truth, blocks: int, classes: int) -> float:
        total = self.device.allocate(24)
        arguments = TotalLossArguments(
            truth.loss_parts.pointer, truth.weight_parts.pointer, total.pointer, blocks
        )
        self._launch("softmax.cu", "total_loss", arguments, (1, 1, 1), 128, 1024)
        loss, weight, invalid = self.device.download(total.pointer, (3,), np.float64)
        if invalid:
            raise ValueError(
                f"softmax_cross_entropy was given {int(invalid)} pixels whose label is not in "
                f"0..{classes - 1}; give them weight 0 or a label of a class"
            )
        if weight == 0:
            raise ValueError(
                "softmax_cross_entropy was given weights that sum to zero: no pixel counts; draw another tile"
            )
        return float(loss / weight)

    def head_cross_entropy_forward(
        self,
        x: Array,
        weight: Buffer,
        bias: Buffer,
        outputs: int,
        labels: np.ndarray,
        weights: np.ndarray,
        wants_gradient: bool,
    ) -> tuple[float, HeadBackward | None]:
        """What the way back needs is given as a function of `head_cross_entropy_backward`'s other arguments."""
        x = self._activation(x)
        if outputs > ChannelLanes(x.pitch).most_outputs:
            logits = self.conv1x1_forward(x, weight, bias, outputs)
            loss, gradient = self.softmax_cross_entropy(logits, labels, weights, wants_gradient)
            if gradient is None:
                return loss, None
            return loss, lambda factor, weight_gradient, bias_gradient, wants_input: self.conv1x1_backward(
                self.scaled(gradient, factor), x, weight, weight_gradient, bias_gradient, wants_input
            )
        splits = self._splits(x, 2)
        truth = self._truth(labels, weights, splits)
        x_gradient = workspace = None
        if wants_gradient:
            x_gradient = Array.allocate(self.device, x.shape, self.bits, masked=x.rectified)
            workspace = self._workspace(splits, weight, bias)
        arguments = HeadArguments(
            x.pointer,
            weight.pointer,
            bias.pointer,
            truth.labels.pointer,
            truth.weights.pointer,
            truth.weight_parts.pointer,
            truth.loss_parts.pointer,
            None if x_gradient is None else x_gradient.pointer,
            None if workspace is None else workspace.pointer,
            x.pixels,
            x.rectified,
        )
        shared_bytes = 1024 + 4 * outputs * (x.pitch + 1)
        self._launch_on_lanes(
            "head.cu", "head_cross_entropy", arguments, x, 2, shared_bytes, defines=[f"-DCLASSES={outputs}"]
        )
        loss = self._total_loss(truth, splits, outputs)
        if x_gradient is None or workspace is None:
            return loss, None
        sums = Array(workspace, (1, 1, splits, len(weight) + len(bias)), len(weight) + len(bias), 32)

        def backward(
            factor: float, weight_gradient: Buffer, bias_gradient: Buffer, wants_input: bool
        ) -> Array | None:
            self._reduce(self.scaled(sums, factor).memory, splits, weight_gradient, bias_gradient)
            return self.scaled(x_gradient, factor) if wants_input else None

        return loss, backward

    def head_cross_entropy_backward(
        self,
        saved: HeadBackward,
        factor: float,
        weight_gradient: Buffer,
        bias_gradient: Buffer,
        wants_input: bool,
    ) -> Array | None:
        return saved(factor, weight_gradient, bias_gradient, wants_input)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _pad(values: np.ndarray, *axes: int) -> np.ndarray:
    """Zeros up to whole blocks of channels along some axes."""
    return np.pad(
        values,
        [(0, padded(length) - length if axis in axes else 0) for axis, length in enumerate(values.shape)],
    )


def _placed(array: Array | None, shape: tuple[int, ...]) -> TensorArgument:
    """A tensor that lies in the middle of one of `shape` (kernels/pointwise.cuh, add_placed), or none."""
    if array is None:
        return ABSENT
    return array.argument(-((shape[1] - array.shape[1]) // 2), -((shape[2] - array.shape[2]) // 2))
