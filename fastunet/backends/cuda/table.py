"""The table of kernels on a CUDA `Device`: what each operation checks, allocates and launches.

Activations are bfloat16 or float32 by the table's precision, their channels padded to 16; images from outside, of one
to four channels, are not padded; logits and probabilities are float32 and not padded. Parameters are float32 masters,
each weight packed as [tap][outputs, padded][inputs, padded], one input of a concatenation after the other; kernels for
bfloat16 read a copy of the same order.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastunet.backends.cuda import (
    conv1x1,
    conv3x3_fp32,
    conv3x3_image,
    conv3x3_sm80,
    image,
    parameters,
    pointwise,
    prediction,
    softmax,
    strided,
    tile,
    upconv2x2,
)
from fastunet.backends.cuda.arguments import TensorArgument
from fastunet.backends.cuda.arrays import IMAGE_CHANNELS, Array, Buffer, Storage, padded
from fastunet.backends.cuda.device import Device, Memory
from fastunet.backends.cuda.exchange import Exported, View, contiguous, taken
from fastunet.backends.cuda.launch import Launch
from fastunet.backends.cuda.recording import Listener, Recording, plan
from fastunet.normalization import Grey

ABSENT = TensorArgument()
_TYPE = {16: "bfloat16", 32: "float32"}

SCHEDULE = np.dtype([("steps", np.uint64), ("rates", np.float32, 2)])
"""What a replayed kernel reads from the device: added to a dropout's draw; learning rate and momentum's rate."""
RATES_OFFSET = 8

HeadBackward = Callable[[float, Buffer, Buffer, bool], Array | None]


@dataclass(frozen=True)
class Truth:
    """Labels and weights of a loss on the device, the sums of the weights, and room for those of the loss."""

    labels: Memory
    weights: Memory
    weight_parts: Memory
    loss_parts: Memory


class Loss:
    """A loss that is on the device; a float once it is asked for, which waits.

    Parameters
    ----------
    totals : callable
        Gives the sums of losses and weights, and the count of labels that name no class.
    classes : int
    exported : Exported, optional
        The loss itself as other libraries take it, a float32 scalar: no number where a float would be refused.
    """

    def __init__(
        self, totals: Callable[[], np.ndarray], classes: int, exported: Exported | None = None
    ) -> None:
        self._totals = totals
        self._classes = classes
        self.exported = exported

    def __float__(self) -> float:
        loss, weight, invalid = self._totals()
        if invalid:
            raise ValueError(
                f"softmax_cross_entropy was given {int(invalid)} pixels whose label is not in "
                f"0..{self._classes - 1}; give them weight 0 or a label of a class"
            )
        if weight == 0:
            raise ValueError(
                "softmax_cross_entropy was given weights that sum to zero: no pixel counts; draw another tile"
            )
        return float(loss / weight)


class Repetition:
    """Work recorded once (recording.py), with the numbers of each time.

    Attributes
    ----------
    result
        What the work returned; host arrays in it hold the values of the replay waited for last.
    memory : Memory
        What a replay needs beside what existed before.
    """

    def __init__(self, recording: Recording, schedule: Memory, numbers: np.ndarray, result: Any) -> None:
        self._recording = recording
        self._schedule = schedule  # the kernels that read it hold it by address only
        self._numbers = numbers
        self.result = result
        self.memory = recording.memory

    def start(self, steps: int = 0, learning_rate: float = 0.0, rate: float = 0.0) -> Callable[[], None]:
        """Start a replay with draws of dropout `steps` later than recorded and these rates; returns what waits for it.

        The one before must have ended.
        """
        self._numbers["steps"] = steps % 2**64
        self._numbers["rates"] = learning_rate, rate
        return self._recording.start()


class Inlet:
    """A place on the device from which recorded work takes values of the outside, anew each time.

    Attributes
    ----------
    view : View
        What the work is given.
    """

    def __init__(self, table: "CudaBackend", shape: tuple[int, ...], kind: str) -> None:
        memory = table.device.allocate(math.prod(shape) * strided.BYTES[kind])
        self.view = View(memory, memory.pointer, shape, contiguous(shape), kind)
        self._table = table
        self._host: np.ndarray | None = None
        self._send: Callable[[], None] = lambda: None

    def fill(self, values: Any) -> None:
        """Bring values from host or device there, after all that was started before; does not wait.

        Values of the host must have arrived before others follow them.
        """
        values = self._table.given(values)
        if values.shape != self.view.shape:
            raise ValueError(
                f"an array of shape {values.shape} was given; {self.view.shape} is expected, as it was recorded"
            )
        if isinstance(values, View):
            self._table._copy(values, self.view)
            return
        if self._host is None:
            device = self._table.device
            host = device.host_array(self.view.shape, np.dtype(self.view.type))
            self._host, self._send = host, device.capture(lambda: device.upload(self.view.pointer, host))
        self._host[...] = values
        self._send()


class CudaBackend:
    """`fastunet.backends.Backend` on a device, in one precision.

    Parameters
    ----------
    device : Device
    precision : str
        "bf16" or "fp32".
    """

    repeats = True
    composition = None

    def __init__(self, device: Device, precision: str) -> None:
        self.name = device.name
        self.device = device
        self.bits = {"bf16": 16, "fp32": 32}[precision]
        self._conv3x3 = {16: conv3x3_sm80, 32: conv3x3_fp32}[self.bits]
        # The bfloat16 kernels' tiles are chosen by the machine too.
        self._chosen_by = {16: (device.multiprocessors, device.shared_memory), 32: ()}[self.bits]
        self._schedule: Memory | None = None

    @property
    def place(self) -> tuple[int, int]:
        return self.device.exchange.place

    @property
    def stream(self) -> tuple[int, int] | None:
        stream = self.device.exchange.stream
        return None if stream is None else (self.place[1], stream)

    def _launch(self, launch: Launch, arguments: ctypes.Structure, bits: int | None = None) -> None:
        """Start a kernel for this table's elements, or for those of `bits`."""
        defines = (f"-DELEMENT_BITS={bits or self.bits}", *launch.defines)
        kernel = self.device.kernel(launch.file, launch.kernel, defines)
        self.device.launch(kernel, launch.grid, launch.threads, launch.shared_bytes, arguments)

    def inlet(self, shape: tuple[int, ...], dtype: np.dtype | type) -> Inlet:
        return Inlet(self, shape, np.dtype(dtype).name)

    def repeat(self, work: Callable[[], Any], beside: Repetition | None = None) -> Repetition:
        device, schedule = self.device, self.device.allocate(SCHEDULE.itemsize)
        numbers = device.host_array((1,), SCHEDULE)
        numbers[...] = 0
        results = []

        def work_on(stand_in: Device) -> None:
            self.device, self._schedule = stand_in, schedule
            try:
                stand_in.upload(schedule.pointer, numbers)
                results.append(work())
            finally:
                self.device, self._schedule = device, None

        recording = Recording(device, work_on, None if beside is None else beside.memory)
        return Repetition(recording, schedule, numbers, results[-1])

    def memory_of(self, work: Callable[[], Any]) -> int:
        device = self.device
        listener = Listener(device, builds=False)
        self.device = listener
        try:
            kept = work()
            needed = plan(listener.lifetimes)[1]
            del kept
        finally:
            self.device = device
        return needed

    def free_memory(self) -> int:
        return self.device.free_memory()

    def describe(self) -> str:
        return self.device.describe()

    # ---- Whole images ---------------------------------------------------------------------------------------------

    def predictions(
        self, forward: Callable[[Any], Any], channels: int, classes: int
    ) -> prediction.Predictions:
        return prediction.Predictions(self, forward, channels, classes)

    def gather(self, pixels: prediction.Plane, scales: Memory, top: int, left: int, target: Array) -> None:
        """Fill a tile with the pixels from (top, left) on, scaled, and mirrored where there are none."""
        arguments = tile.GatherArguments(
            pixels.pointer,
            scales.pointer,
            target.argument(),
            pixels.height,
            pixels.width,
            pixels.row_step,
            pixels.column_step,
            top,
            left,
        )
        self._launch(tile.gather(arguments.tile, 8 * pixels.dtype.itemsize), arguments)

    def stitch(
        self, probabilities: Array, total: prediction.Plane, top: int, left: int, bottom: int, right: int
    ) -> None:
        """Add the first of a tile's probabilities to the pixels from (top, left) to (bottom, right)."""
        rows, columns = bottom - top, right - left
        arguments = tile.StitchArguments(
            probabilities.argument(),
            total.pointer,
            total.row_step,
            total.column_step,
            rows,
            columns,
            top,
            left,
        )
        self._launch(tile.stitch(rows, columns, total.channels), arguments)

    def grey_values(self, pixels: View, moments: bool) -> list[Grey]:
        """The statistics of an image (H, W, C), read back; as `fastunet.normalization.statistics`."""
        height, width, channels = pixels.shape
        launch = image.grey_parts(*pixels.shape)
        parts = self.device.allocate(launch.grid[0] * channels * image.GREY.itemsize)
        found = []
        totals: Memory | None = None
        for _ in range(1 + moments):
            arguments = image.GreyPartsArguments(
                pixels.pointer,
                None if totals is None else totals.pointer,
                parts.pointer,
                *pixels.strides,
                height,
                width,
                strided.TYPES.index(pixels.type),
            )
            self._launch(launch, arguments, bits=32)
            totals = self.device.allocate(channels * image.GREY.itemsize)
            sums = image.GreyTotalArguments(parts.pointer, totals.pointer, launch.grid[0])
            self._launch(image.grey_total(channels), sums, bits=32)
            found.append(totals)
        first, last = (
            self.device.download(one.pointer, (channels,), image.GREY) for one in (found[0], found[-1])
        )
        count = height * width
        return [
            Grey(
                float(one["low"]),
                float(one["high"]),
                float(one["sum"]) / count,
                math.sqrt(float(squares["sum"]) / count) if moments else 0.0,
                int(one["bad"]),
            )
            for one, squares in zip(first, last)
        ]

    def scaled_image(self, pixels: View, scales: Memory, target: prediction.Plane) -> None:
        """(x - offset) * scale of an image (H, W, C) of any type, with each channel's [offset, scale]."""
        arguments = image.ScaledArguments(
            pixels.pointer,
            scales.pointer,
            target.pointer,
            *pixels.strides,
            *pixels.shape,
            strided.TYPES.index(pixels.type),
        )
        self._launch(image.scaled(*pixels.shape), arguments, bits=32)

    # ---- Arrays ---------------------------------------------------------------------------------------------------

    def given(self, values: Any) -> View | np.ndarray:
        return taken(values, self.device.exchange, self.name)

    def array(self, values: Any) -> Array:
        values = self._pixels(values)
        channels, pitch = values.shape[3], _image_pitch(values.shape[3])
        if isinstance(values, View):
            target = Array.allocate(self.device, values.shape, self.bits, pitch)
            if pitch != channels:
                self.device.zero(target.pointer, target.memory.bytes)
            self._copy(values, self._view(target))
            return target
        plain = Array.allocate(self.device, values.shape, 32, channels)
        self.device.upload(plain.pointer, np.ascontiguousarray(values, dtype=np.float32))
        return self._converted(plain, self.bits, pitch)

    def image_array(self, shape: tuple[int, ...]) -> Array:
        """Room for what `array` would make."""
        return Array.allocate(self.device, shape, self.bits, _image_pitch(shape[3]))

    def shared(self, values: Any) -> Array:
        values = self._pixels(values)
        channels = values.shape[3]
        fits = channels <= IMAGE_CHANNELS or channels == padded(channels)
        if isinstance(values, View) and fits and values.type == _TYPE[self.bits] and values.is_contiguous():
            return Array(values.memory, (*values.shape[:3], channels), channels, self.bits)
        return self.array(values)

    def _pixels(self, values: Any) -> View | np.ndarray:
        values = self.given(values)
        if values.ndim != 4:
            raise ValueError(f"an array of shape {values.shape} was given, (N, H, W, C) is expected")
        return values

    def exported(self, array: Array | Loss) -> Exported:
        if isinstance(array, Loss):
            if array.exported is None:
                raise ValueError("a loss of recorded work is read as a float, once its replay has ended")
            return array.exported
        plain = self._plain(array)
        return Exported(self.device.exchange, plain.memory, plain.shape)

    def _view(self, array: Array) -> View:
        strides = contiguous((*array.shape[:3], array.pitch))
        return View(array.memory, array.pointer, array.shape, strides, _TYPE[array.bits])

    def _copy(self, source: View, target: View) -> None:
        absent = strided.AXES - source.ndim
        arguments = strided.CopyArguments(
            source.pointer,
            target.pointer,
            (*[0] * absent, *source.strides),
            (*[0] * absent, *target.strides),
            (*[1] * absent, *source.shape),
            strided.TYPES.index(source.type),
            strided.TYPES.index(target.type),
        )
        self._launch(strided.copy(source.shape), arguments, bits=32)

    def numpy(self, array: Array) -> np.ndarray:
        plain = self._plain(array)
        return self.device.download(plain.pointer, plain.shape, np.float32)

    def _plain(self, array: Array) -> Array:
        """The array as float32 without padding, as logits are."""
        return self._converted(array, 32, array.shape[3])

    def _activation(self, array: Array) -> Array:
        """The array padded and in this table's precision, as activations are."""
        return self._converted(array, self.bits, padded(array.shape[3]))

    def _converted(self, array: Array, bits: int, pitch: int) -> Array:
        if (array.bits, array.pitch) == (bits, pitch):
            return array
        target = Array.allocate(
            self.device, array.shape, bits, pitch, rectified=array.rectified, masked=array.masked
        )
        arguments = pointwise.ConvertArguments(array.argument(), target.argument())
        self._launch(pointwise.convert(array.bits, arguments.target), arguments, bits)
        return target

    def copy(self, array: Array) -> Array:
        return self._sum(array, None, array.shape, None)

    def scaled(self, array: Array, factor: float) -> Array:
        if factor != 1.0:
            arguments = pointwise.ScaleArguments(array.argument(), array.argument(), factor)
            self._launch(pointwise.combine("scale", arguments.scaled), arguments, array.bits)
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
            total = Array.allocate(self.device, shape, one.bits, pitch)
        arguments = pointwise.SumArguments(_placed(one, shape), _placed(other, shape), total.argument())
        self._launch(pointwise.combine("sum", arguments.total), arguments, total.bits)
        total.rectified, total.masked = one.rectified and other is None, masked
        return total

    def _masked(self, gradient: Array, relu_output: Array) -> Array:
        """A gradient, in place, where the output of its ReLU is not zero."""
        if not gradient.masked:
            arguments = pointwise.MaskArguments(
                gradient.argument(), relu_output.argument(), gradient.argument()
            )
            self._launch(pointwise.combine("mask", arguments.masked), arguments)
            gradient.masked = True
        return gradient

    # ---- Parameters -----------------------------------------------------------------------------------------------

    def buffer(self, count: int) -> Buffer:
        memory = self.device.allocate(4 * count)
        self.device.zero(memory.pointer, 4 * count)
        return Buffer(self.device, Storage(memory), 0, count)

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        self.device.upload(buffer.pointer, np.ascontiguousarray(values, dtype=np.float32))
        if buffer.storage.shadow is not None:
            self._refresh_shadow(buffer)

    def fill(self, buffer: Buffer, values: Any, kind: str, inputs: Sequence[int]) -> None:
        values = self.given(values)
        if not isinstance(values, View):
            self.write(buffer, self.pack(values, kind, inputs))
            return
        for axis, first, packed in self._packed(buffer, kind, inputs, values.shape):
            self._copy(values.part(axis, first, packed.shape[axis]), packed)
        if buffer.storage.shadow is not None:
            self._refresh_shadow(buffer)

    def exported_parameter(
        self, buffer: Buffer, kind: str, inputs: Sequence[int], shape: tuple[int, ...]
    ) -> Exported:
        memory = self.device.allocate(4 * math.prod(shape))
        whole = View(memory, memory.pointer, shape, contiguous(shape), "float32")
        for axis, first, packed in self._packed(buffer, kind, inputs, shape):
            self._copy(packed, whole.part(axis, first, packed.shape[axis]))
        return Exported(self.device.exchange, memory, shape)

    def _packed(
        self, buffer: Buffer, kind: str, inputs: Sequence[int], shape: tuple[int, ...]
    ) -> Iterator[tuple[int, int, View]]:
        """The parts of a packed parameter of a PyTorch shape, in its axes: along which axis and where each begins."""
        if kind == "bias":
            yield 0, 0, View(buffer.storage.memory, buffer.pointer, shape, (1,), "float32")
            return
        axis = 0 if kind == "upconv" else 1
        rows, (height, width) = padded(shape[1 - axis]), shape[2:]
        pointer, first = buffer.pointer, 0
        for channels in inputs:
            row = padded(channels)
            tap = rows * row
            extents, steps = (
                ((channels, shape[1]), (1, row)) if axis == 0 else ((shape[0], channels), (row, 1))
            )
            strides = (*steps, width * tap, tap)
            yield (
                axis,
                first,
                View(buffer.storage.memory, pointer, (*extents, height, width), strides, "float32"),
            )
            pointer += 4 * height * width * tap
            first += channels

    def read(self, buffer: Buffer) -> np.ndarray:
        return self.device.download(buffer.pointer, (len(buffer),), np.float32)

    def _operand(self, weight: Buffer) -> int | None:
        """Where a weight is in this table's precision; after the first call, all of its storage is."""
        if self.bits == 32:
            return weight.pointer
        if weight.storage.shadow is None:
            count = weight.storage.memory.bytes // 4
            weight.storage.shadow = self.device.allocate(2 * count)
            self._refresh_shadow(Buffer(self.device, weight.storage, 0, count))
        return weight.shadow_pointer

    def _refresh_shadow(self, buffer: Buffer) -> None:
        flat = (1, 1, 1, len(buffer), len(buffer))
        arguments = pointwise.ConvertArguments(
            TensorArgument(buffer.pointer, *flat), TensorArgument(buffer.shadow_pointer, *flat)
        )
        self._launch(pointwise.convert(32, arguments.target), arguments)

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
        arguments = parameters.SgdMomentumArguments(
            value.pointer,
            gradient.pointer,
            momentum.pointer,
            value.shadow_pointer,
            None if self._schedule is None else self._schedule.pointer + RATES_OFFSET,
            len(value),
            learning_rate,
            rate,
        )
        self._launch(parameters.sgd_momentum(len(value)), arguments)

    def _workspace(self, splits: int, weight: Buffer, bias: Buffer) -> Memory:
        """Room for the sums of a weight gradient over the splits of the pixels, [split][weights, biases]."""
        return self.device.allocate(4 * splits * (len(weight) + len(bias)))

    def _reduce(self, workspace: Memory, splits: int, weight_gradient: Buffer, bias_gradient: Buffer) -> None:
        weights, biases = len(weight_gradient), len(bias_gradient)
        arguments = parameters.ReduceArguments(
            weight_gradient.pointer, bias_gradient.pointer, workspace.pointer, weights, biases, splits
        )
        self._launch(parameters.reduce(weights, biases), arguments)

    # ---- Convolutions ---------------------------------------------------------------------------------------------

    def conv3x3_forward(
        self, x: Array, skip: Array | None, weight: Buffer, bias: Buffer, outputs: int, relu: bool
    ) -> Array:
        return self._conv3x3_forward(x, skip, weight, bias, outputs, relu, pooling=False)[0]

    def conv3x3_maxpool2x2_forward(
        self,
        x: Array,
        weight: Buffer,
        bias: Buffer,
        outputs: int,
        kept: tuple[int, int] | None = None,
        wants_choice: bool = True,
    ) -> tuple[Array, Array, Array]:
        y, pooled = self._conv3x3_forward(x, None, weight, bias, outputs, relu=True, pooling=True)
        if pooled is None:
            pooled, _ = self.maxpool2x2_forward(y)
        return y, pooled, y

    def _conv3x3_forward(
        self,
        x: Array,
        skip: Array | None,
        weight: Buffer,
        bias: Buffer,
        outputs: int,
        relu: bool,
        pooling: bool,
    ) -> tuple[Array, Array | None]:
        """The output and, unless the kernel is the images' own, what it is pooled to where that is wanted."""
        images, height, width, _ = x.shape
        if height < 3 or width < 3:
            raise ValueError(
                f"conv3x3 was given an input of shape {x.shape}; it must be at least 3 x 3 pixels"
            )
        y = Array.allocate(self.device, (images, height - 2, width - 2, outputs), self.bits, rectified=relu)
        weights = self._operand(weight), bias.pointer
        if skip is None and x.shape[3] <= IMAGE_CHANNELS:
            image = conv3x3_image.ForwardArguments(x.argument(), y.argument(), *weights, relu)
            self._launch(conv3x3_image.forward(image.x, image.y), image)
            return y, None
        pooled = self._pooled(y) if pooling else None
        x, skip, skip_argument = self._conv3x3_input(x, skip)
        arguments = self._conv3x3.ForwardArguments(
            skip_argument,
            x.argument(),
            y.argument(),
            ABSENT if pooled is None else pooled.argument(),
            *weights,
            relu,
        )
        self._launch(self._conv3x3.forward(arguments.y, *self._chosen_by), arguments)
        return y, pooled

    def conv3x3_backward(
        self,
        gradient: Array,
        x: Array,
        skip: Array | None,
        relu_output: Array | None,
        weight: Buffer,
        weight_gradient: Buffer,
        bias_gradient: Buffer,
        wants_input: bool,
    ) -> tuple[Array | None, Array | None]:
        gradient = self._activation(gradient)
        if relu_output is not None:
            gradient = self._masked(gradient, relu_output)
        self._conv3x3_weight_gradient(gradient, x, skip, weight_gradient, bias_gradient)
        if not wants_input:
            return None, None
        x, skip, skip_argument = self._conv3x3_input(x, skip)
        x_gradient, skip_gradient = self._gradient_of(x, x.shape), None
        if skip is not None:
            skip_gradient = self._gradient_of(skip, (*x.shape[:3], skip.shape[3]))
        data = self._conv3x3.DataGradientArguments(
            gradient.argument(),
            skip_argument if skip is not None and skip.rectified else ABSENT,
            x.argument() if x.rectified else ABSENT,
            ABSENT if skip_gradient is None else skip_gradient.argument(),
            x_gradient.argument(),
            self._operand(weight),
        )
        self._launch(self._conv3x3.data_gradient(data.skip_gradient, data.x_gradient, *self._chosen_by), data)
        return x_gradient, skip_gradient

    def _conv3x3_weight_gradient(
        self, gradient: Array, x: Array, skip: Array | None, weight_gradient: Buffer, bias_gradient: Buffer
    ) -> None:
        arguments: ctypes.Structure
        if skip is None and x.shape[3] <= IMAGE_CHANNELS:
            arguments = conv3x3_image.WeightGradientArguments(gradient.argument(), x.argument())
            launch = conv3x3_image.weight_gradient(
                arguments.gradient, arguments.x, self.device.multiprocessors
            )
        else:
            x, skip, skip_argument = self._conv3x3_input(x, skip)
            arguments = self._conv3x3.WeightGradientArguments(
                gradient.argument(), skip_argument, x.argument()
            )
            launch = self._conv3x3.weight_gradient(
                arguments.gradient, arguments.skip, arguments.x, self.device.multiprocessors
            )
        self._sum_weight_gradient(launch, arguments, weight_gradient, bias_gradient)

    def _conv3x3_input(self, x: Array, skip: Array | None) -> tuple[Array, Array | None, TensorArgument]:
        """Both parts of [centre of skip, x] as the kernels read them, and what these are told of the first."""
        x = self._activation(x)
        if skip is None:
            return x, None, ABSENT
        skip = self._activation(skip)
        return x, skip, _crop(skip, x)

    def _gradient_of(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Room for the gradient of x or its centre, which the kernel masks where x is the output of a ReLU."""
        return Array.allocate(self.device, shape, self.bits, masked=x.rectified)

    def _sum_weight_gradient(
        self, launch: Launch, arguments: ctypes.Structure, weight_gradient: Buffer, bias_gradient: Buffer
    ) -> None:
        """Launch a weight gradient whose grid's last side is the number of splits, and add what it leaves."""
        splits = launch.grid[2]
        workspace = self._workspace(splits, weight_gradient, bias_gradient)
        arguments.workspace = workspace.pointer
        self._launch(launch, arguments)
        self._reduce(workspace, splits, weight_gradient, bias_gradient)

    def upconv2x2_forward(self, x: Array, weight: Buffer, bias: Buffer, outputs: int) -> Array:
        x = self._activation(x)
        images, height, width, _ = x.shape
        y = Array.allocate(self.device, (images, 2 * height, 2 * width, outputs), self.bits)
        arguments = upconv2x2.ForwardArguments(
            x.argument(), y.argument(), self._operand(weight), bias.pointer
        )
        self._launch(upconv2x2.forward(arguments.x, arguments.y, self.bits), arguments)
        return y

    def upconv2x2_backward(
        self,
        gradient: Array,
        x: Array,
        weight: Buffer,
        weight_gradient: Buffer,
        bias_gradient: Buffer,
        wants_input: bool,
    ) -> Array | None:
        gradient, x = self._activation(gradient), self._activation(x)
        arguments = upconv2x2.WeightGradientArguments(gradient.argument(), x.argument())
        launch = upconv2x2.weight_gradient(
            arguments.gradient, arguments.x, self.bits, self.device.multiprocessors
        )
        self._sum_weight_gradient(launch, arguments, weight_gradient, bias_gradient)
        if not wants_input:
            return None
        x_gradient = self._gradient_of(x, x.shape)
        data = upconv2x2.DataGradientArguments(
            gradient.argument(),
            x.argument() if x.rectified else ABSENT,
            x_gradient.argument(),
            self._operand(weight),
        )
        self._launch(upconv2x2.data_gradient(data.x_gradient, self.bits), data)
        return x_gradient

    def conv1x1_forward(self, x: Array, weight: Buffer, bias: Buffer, outputs: int) -> Array:
        x = self._activation(x)
        y = Array.allocate(self.device, (*x.shape[:3], outputs), 32, outputs)
        arguments = conv1x1.ForwardArguments(
            x.pointer, weight.pointer, bias.pointer, y.pointer, x.pixels, outputs
        )
        self._launch(conv1x1.forward(x.argument(), self.device.multiprocessors), arguments)
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
        outputs, multiprocessors = gradient.shape[3], self.device.multiprocessors
        launch = conv1x1.weight_gradient(x.argument(), outputs, multiprocessors)
        workspace = self._workspace(launch.grid[0], weight_gradient, bias_gradient)
        sums = conv1x1.WeightGradientArguments(
            gradient.pointer, x.pointer, workspace.pointer, x.pixels, outputs
        )
        self._launch(launch, sums)
        self._reduce(workspace, launch.grid[0], weight_gradient, bias_gradient)
        if not wants_input:
            return None
        x_gradient = self._gradient_of(x, x.shape)
        data = conv1x1.DataGradientArguments(
            gradient.pointer, x.pointer, weight.pointer, x_gradient.pointer, x.pixels, outputs, x.rectified
        )
        self._launch(conv1x1.data_gradient(x.argument(), multiprocessors), data)
        return x_gradient

    # ---- Pooling, dropout -----------------------------------------------------------------------------------------

    def _pooled(self, x: Array) -> Array:
        """Room for what x is pooled to."""
        images, height, width, channels = x.shape
        if height < 2 or width < 2:
            raise ValueError(
                f"maxpool2x2 was given an input of shape {x.shape}; it must be at least 2 x 2 pixels"
            )
        return Array.allocate(self.device, (images, height // 2, width // 2, channels), self.bits)

    def maxpool2x2_forward(self, x: Array) -> tuple[Array, Array]:
        pooled = self._pooled(x)
        arguments = pointwise.MaxpoolForwardArguments(x.argument(), pooled.argument())
        self._launch(pointwise.maxpool2x2_forward(arguments.pooled), arguments)
        return pooled, x

    def maxpool2x2_backward(
        self, gradient: Array, choice: Array, height: int, width: int, present: Array | None
    ) -> Array:
        """`choice` is the pooling's input, in which the winners are found again."""
        if present is not None and present.shape == choice.shape:
            total = present
        else:
            total = Array.allocate(self.device, choice.shape, self.bits)
        arguments = pointwise.MaxpoolBackwardArguments(
            gradient.argument(),
            choice.argument(),
            _placed(present, choice.shape),
            total.argument(),
            choice.rectified,
        )
        self._launch(pointwise.maxpool2x2_backward(arguments.total), arguments)
        total.masked = choice.rectified
        return total

    def dropout(self, x: Array, rate: float, seed: int, draw: int) -> Array:
        if not 0 <= rate < 1:
            raise ValueError(f"a dropout rate of {rate:f} was given; 0 <= rate < 1 is expected")
        # Zeros stay zeros, those of a ReLU and those of a gradient masked by it.
        y = Array.allocate(self.device, x.shape, x.bits, x.pitch, rectified=x.rectified, masked=x.masked)
        arguments = pointwise.DropoutArguments(
            x.argument(),
            y.argument(),
            None if self._schedule is None else self._schedule.pointer,
            seed,
            draw,
            rate,
        )
        self._launch(pointwise.dropout(arguments.output), arguments)
        return y

    # ---- Loss -----------------------------------------------------------------------------------------------------

    def softmax(self, logits: Array) -> Array:
        logits = self._plain(logits)
        probabilities = Array.allocate(self.device, logits.shape, 32, logits.pitch)
        arguments = softmax.SoftmaxArguments(
            logits.pointer, probabilities.pointer, logits.pixels, logits.pitch
        )
        self._launch(softmax.softmax(logits.pixels), arguments)
        return probabilities

    def softmax_cross_entropy(
        self, logits: Array, labels: View | np.ndarray, weights: View | np.ndarray, wants_gradient: bool
    ) -> tuple[Loss, Array | None]:
        logits = self._plain(logits)
        launch = softmax.softmax_cross_entropy(logits.pixels, self.device.multiprocessors)
        truth = self._truth(labels, weights, launch.grid[0])
        gradient = Array.allocate(self.device, logits.shape, 32, logits.pitch) if wants_gradient else None
        arguments = softmax.CrossEntropyArguments(
            logits.pointer,
            None if gradient is None else gradient.pointer,
            truth.labels.pointer,
            truth.weights.pointer,
            truth.weight_parts.pointer,
            truth.loss_parts.pointer,
            logits.pixels,
            logits.pitch,
        )
        self._launch(launch, arguments)
        return self._total_loss(truth, logits.pitch), gradient

    def _truth(self, labels: View | np.ndarray, weights: View | np.ndarray, parts: int) -> Truth:
        """Labels and weights on the device, for a loss that is summed in so many parts."""
        sizes = 4 * labels.size, 4 * labels.size, 8 * softmax.WEIGHT_PARTS, softmax.LOSS_PART_BYTES * parts
        truth = Truth(*map(self.device.allocate, sizes))
        for memory, values, kind in ((truth.labels, labels, "int32"), (truth.weights, weights, "float32")):
            if isinstance(values, View):
                self._copy(values, View(memory, memory.pointer, values.shape, contiguous(values.shape), kind))
            else:
                self.device.upload(memory.pointer, np.ascontiguousarray(values, dtype=kind))
        arguments = softmax.WeightSumsArguments(
            truth.weights.pointer, truth.weight_parts.pointer, labels.size
        )
        self._launch(softmax.weight_sums(), arguments)
        return truth

    def _total_loss(self, truth: Truth, classes: int) -> Loss:
        device = self.device
        total, value = device.allocate(24), device.allocate(4)
        arguments = softmax.TotalLossArguments(
            truth.loss_parts.pointer,
            truth.weight_parts.pointer,
            total.pointer,
            value.pointer,
            truth.loss_parts.bytes // softmax.LOSS_PART_BYTES,
        )
        self._launch(softmax.total_loss(), arguments)
        if device.records:  # which may keep nothing of the device
            totals = device.host_array((3,), np.float64)
            device.read_back(total.pointer, totals)
            return Loss(lambda: totals, classes)
        exported = Exported(device.exchange, value, ())
        return Loss(lambda: device.download(total.pointer, (3,), np.float64), classes, exported)

    def head_cross_entropy_forward(
        self,
        x: Array,
        weight: Buffer,
        bias: Buffer,
        outputs: int,
        labels: View | np.ndarray,
        weights: View | np.ndarray,
        wants_gradient: bool,
    ) -> tuple[Loss, HeadBackward | None]:
        """What the way back needs comes as a function of `head_cross_entropy_backward`'s other arguments."""
        x = self._activation(x)
        if outputs > conv1x1.most_outputs(x.pitch):
            return self._composed_head(x, weight, bias, outputs, labels, weights, wants_gradient)
        launch = conv1x1.head_cross_entropy(x.argument(), outputs, self.device.multiprocessors)
        splits = launch.grid[0]
        truth = self._truth(labels, weights, splits)
        x_gradient = self._gradient_of(x, x.shape)
        workspace = self._workspace(splits, weight, bias)
        arguments = conv1x1.HeadArguments(
            x.pointer,
            weight.pointer,
            bias.pointer,
            truth.labels.pointer,
            truth.weights.pointer,
            truth.weight_parts.pointer,
            truth.loss_parts.pointer,
            x_gradient.pointer if wants_gradient else None,
            workspace.pointer if wants_gradient else None,
            x.pixels,
            x.rectified,
        )
        self._launch(launch, arguments)
        numbers = len(weight) + len(bias)
        sums = Array(workspace, (1, 1, splits, numbers), numbers, 32)

        def backward(
            factor: float, weight_gradient: Buffer, bias_gradient: Buffer, wants_input: bool
        ) -> Array | None:
            self._reduce(self.scaled(sums, factor).memory, splits, weight_gradient, bias_gradient)
            return self.scaled(x_gradient, factor) if wants_input else None

        return self._total_loss(truth, outputs), backward if wants_gradient else None

    def _composed_head(
        self,
        x: Array,
        weight: Buffer,
        bias: Buffer,
        outputs: int,
        labels: View | np.ndarray,
        weights: View | np.ndarray,
        wants_gradient: bool,
    ) -> tuple[Loss, HeadBackward | None]:
        """`head_cross_entropy_forward` of more classes than its kernel takes."""
        logits = self.conv1x1_forward(x, weight, bias, outputs)
        loss, gradient = self.softmax_cross_entropy(logits, labels, weights, wants_gradient)
        if gradient is None:
            return loss, None

        def backward(
            factor: float, weight_gradient: Buffer, bias_gradient: Buffer, wants_input: bool
        ) -> Array | None:
            return self.conv1x1_backward(
                self.scaled(gradient, factor), x, weight, weight_gradient, bias_gradient, wants_input
            )

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


def _image_pitch(channels: int) -> int:
    """Stored channels of a pixel from outside."""
    return channels if channels <= IMAGE_CHANNELS else padded(channels)


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


def _crop(skip: Array, x: Array) -> TensorArgument:
    """The skip connection, beginning where x lies in its middle."""
    top, left = ((skip.shape[axis] - x.shape[axis]) // 2 for axis in (1, 2))
    if skip.shape[0] != x.shape[0] or top < 0 or left < 0:
        raise ValueError(f"the skip connection has shape {skip.shape}, too small to be cropped to {x.shape}")
    return skip.argument(top, left)
