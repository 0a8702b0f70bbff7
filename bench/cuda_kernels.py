"""Our kernels at the shapes of cuda_shapes.py: each operation on fresh random data, and what it launched.

An operation is done as the network does it, through the table; what the table then launches is noted and can be
started again, kernel by kernel. A backward pass of a convolution launches two operations: each case keeps its own.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any, NamedTuple

import numpy as np
from cuda_shapes import Case

from fastunet.backends.cuda.arrays import Array, Buffer
from fastunet.backends.cuda.device import Device, Memory
from fastunet.backends.cuda.exchange import View
from fastunet.backends.cuda.prediction import Plane, put
from fastunet.backends.cuda.table import CudaBackend

Draw = Callable[[tuple[int, ...]], np.ndarray]
Operation = Callable[[], Sequence[Any]]
"""Does it; returns the arrays and buffers that hold what came out, or what was read back of it."""


class Numbers:
    """Standard normal numbers of any shape, cut out of one supply, which is quicker than to draw them."""

    def __init__(self, seed: int, count: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._supply = self._generator.standard_normal(count, np.float32)

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        if count > len(self._supply):
            self._supply = np.resize(self._supply, 2 * count)
        first = self._generator.integers(len(self._supply) - count + 1)
        return self._supply[first : first + count].reshape(shape)


class Started(NamedTuple):
    """A launch that was noted, and the name of its kernel."""

    name: str
    arguments: tuple[Any, ...]


class Notes:
    """A `Device` that notes every launch, and keeps all memory so that launches can be repeated."""

    records = False

    def __init__(self, device: Device) -> None:
        self._device = device
        self._names: dict[int, str] = {}
        self.launches: list[Started] = []
        self.memories: list[Memory] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def allocate(self, count_bytes: int) -> Memory:
        self.memories.append(self._device.allocate(count_bytes))
        return self.memories[-1]

    def kernel(self, file: str, name: str, defines: tuple[str, ...]) -> Any:
        kernel = self._device.kernel(file, name, defines)
        self._names[id(kernel)] = name
        return kernel

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
    ) -> None:
        kept = type(arguments).from_buffer_copy(arguments)
        self.launches.append(Started(self._names[id(kernel)], (kernel, grid, block, shared_bytes, kept)))
        self._device.launch(kernel, grid, block, shared_bytes, arguments)


class Work:
    """The launches of a case, once for each of several sets of data; `start` starts them all.

    Attributes
    ----------
    times : int
        How often `start` does the operation.
    """

    def __init__(self, table: CudaBackend, case: Case, sets: int, loops: int, draw: Draw) -> None:
        device = table.device
        self._kept: list[Any] = []
        launches: list[Started] = []
        for _ in range(sets):
            run = operation(table, case, draw)
            run()  # the weights' copy in bfloat16 is made once
            notes = Notes(device)
            table.device = notes
            try:
                self._kept += [run, run(), notes.memories]
            finally:
                table.device = device
            launches += [one for one in notes.launches if belongs(one.name, case)]
        if not launches:
            raise RuntimeError(f"{case.name} launches nothing that is its own")
        self.kernels = sorted({one.name for one in launches})
        self.times = sets * loops

        def work() -> None:
            for one in launches * loops:
                device.launch(*one.arguments)

        self._replay = device.capture(work)

    def start(self) -> None:
        self._replay()


def belongs(kernel: str, case: Case) -> bool:
    """Whether a kernel is the case's own; the backward passes of convolutions launch those of two cases."""
    if case.operation.endswith("gradient"):
        return ("data_gradient" in kernel) == case.operation.endswith("data gradient")
    return True


def operation(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    """The case's operation on a set of data of its own."""
    kind = case.operation.removesuffix(" weight gradient").removesuffix(" data gradient")
    return OPERATIONS[kind](table, case, draw)


def activation(table: CudaBackend, draw: Draw, side: int, channels: int, rectified: bool = False) -> Array:
    values = draw((1, side, side, channels))
    array = table.array(np.maximum(values, 0) if rectified else values)
    array.rectified = rectified
    return array


def gradient(table: CudaBackend, draw: Draw, side: int, channels: int) -> Array:
    """As it comes from the layer above: its ReLU's mask already applied."""
    array = activation(table, draw, side, channels)
    array.masked = True
    return array


def weight_and_bias(
    table: CudaBackend, draw: Draw, case: Case, kind: str, taps: tuple[int, int]
) -> list[Buffer]:
    """Packed as the kernels read them, numbers in the padding too; the bias zero."""
    channels = (sum(case.inputs), case.outputs) if kind == "upconv" else (case.outputs, sum(case.inputs))
    weight = table.buffer(table.packed_size(kind, case.inputs, (*channels, *taps)))
    table.write(weight, draw((len(weight),)) * np.float32(0.05))
    return [weight, table.buffer(table.packed_size("bias", (), (case.outputs,)))]


def zeros_like(table: CudaBackend, buffers: Sequence[Buffer]) -> list[Buffer]:
    return [table.buffer(len(buffer)) for buffer in buffers]


def conv3x3_inputs(table: CudaBackend, case: Case, draw: Draw) -> tuple[Array, Array | None]:
    x = activation(table, draw, case.side, case.inputs[-1], case.rectified[-1])
    if len(case.inputs) == 1:
        return x, None
    return x, activation(table, draw, case.skip_side, case.inputs[0], case.rectified[0])


def conv3x3_forward(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    (x, skip), parameters = (
        conv3x3_inputs(table, case, draw),
        weight_and_bias(table, draw, case, "conv", (3, 3)),
    )
    if case.pools:
        return lambda: table.conv3x3_maxpool2x2_forward(x, *parameters, case.outputs)[:2]
    return lambda: [table.conv3x3_forward(x, skip, *parameters, case.outputs, True)]


def conv3x3_backward(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    (x, skip), parameters = (
        conv3x3_inputs(table, case, draw),
        weight_and_bias(table, draw, case, "conv", (3, 3)),
    )
    sums, y = zeros_like(table, parameters), gradient(table, draw, case.side - 2, case.outputs)
    wants_input = case.operation.endswith("data gradient")

    def run() -> Sequence[Any]:
        found = table.conv3x3_backward(y, x, skip, None, parameters[0], *sums, wants_input)
        return [*sums, *(array for array in found if array is not None)]

    return run


def upconv2x2_forward(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    x = activation(table, draw, case.side, *case.inputs)
    parameters = weight_and_bias(table, draw, case, "upconv", (2, 2))
    return lambda: [table.upconv2x2_forward(x, *parameters, case.outputs)]


def upconv2x2_backward(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    x, parameters = (
        activation(table, draw, case.side, *case.inputs, *case.rectified),
        weight_and_bias(table, draw, case, "upconv", (2, 2)),
    )
    sums, y = zeros_like(table, parameters), gradient(table, draw, 2 * case.side, case.outputs)
    wants_input = case.operation.endswith("data gradient")

    def run() -> Sequence[Any]:
        found = table.upconv2x2_backward(y, x, parameters[0], *sums, wants_input)
        return [*sums, *([] if found is None else [found])]

    return run


def maxpool2x2_forward(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    x = activation(table, draw, case.side, *case.inputs)
    return lambda: [table.maxpool2x2_forward(x)[0]]


def maxpool2x2_backward(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    x = activation(table, draw, case.side, case.outputs, rectified=True)
    y = gradient(table, draw, case.side // 2, case.outputs)
    present = gradient(table, draw, case.centre, case.outputs)
    return lambda: [table.maxpool2x2_backward(y, x, case.side, case.side, present)]


def dropout(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    x = activation(table, draw, case.side, case.outputs)
    return lambda: [table.dropout(x, 0.5, 1, 2)]


def head(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    x = activation(table, draw, case.side, *case.inputs, rectified=True)
    parameters = weight_and_bias(table, draw, case, "conv", (1, 1))
    sums, pixels = zeros_like(table, parameters), (1, case.side, case.side)
    labels, weights = (draw(pixels) > 0).astype(np.int32), np.abs(draw(pixels))

    def run() -> Sequence[Any]:
        _, saved = table.head_cross_entropy_forward(x, *parameters, case.outputs, labels, weights, True)
        return [table.head_cross_entropy_backward(saved, 1.0, *sums, True), *sums]

    return run


def conv1x1_backward(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    x, parameters = (
        activation(table, draw, case.side, *case.inputs, *case.rectified),
        weight_and_bias(table, draw, case, "conv", (1, 1)),
    )
    sums, y = zeros_like(table, parameters), plain(table, draw, case)
    wants_input = case.operation.endswith("data gradient")

    def run() -> Sequence[Any]:
        found = table.conv1x1_backward(y, x, parameters[0], *sums, wants_input)
        return [*sums, *([] if found is None else [found])]

    return run


def conv1x1_forward(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    x, parameters = (
        activation(table, draw, case.side, *case.inputs),
        weight_and_bias(table, draw, case, "conv", (1, 1)),
    )
    return lambda: [table.conv1x1_forward(x, *parameters, case.outputs)]


def plain(table: CudaBackend, draw: Draw, case: Case) -> Array:
    """Float32, (1, side, side, outputs) without padding, as logits and probabilities are."""
    array = Array.allocate(table.device, (1, case.side, case.side, case.outputs), 32, case.outputs)
    table.device.upload(array.pointer, draw(array.shape))
    return array


def softmax(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    logits = plain(table, draw, case)
    return lambda: [table.softmax(logits)]


def softmax_cross_entropy(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    logits, pixels = plain(table, draw, case), (1, case.side, case.side)
    labels, weights = (draw(pixels) > 0).astype(np.int32), np.abs(draw(pixels))
    return lambda: [table.softmax_cross_entropy(logits, labels, weights, True)[1]]


def combined(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    """What whole tensors are put through between the others: sums, masks, factors."""
    one, other = (gradient(table, draw, case.side, case.outputs) for _ in range(2))
    if case.operation == "sum":
        return lambda: [table.accumulate(table.full_size(one, one.shape), other, one.shape)]
    if case.operation == "scale":
        return lambda: [table.scaled(one, 0.5)]

    def mask() -> Sequence[Any]:
        one.masked = False
        return [table._masked(one, other)]

    return mask


# ---- Images ---------------------------------------------------------------------------------------------------------


def image_of(table: CudaBackend, draw: Draw, case: Case, kind: str) -> View:
    """On the device, in the order (C, H, W), seen as (H, W, C)."""
    shape = *case.inputs, case.side, case.side
    values = draw(shape) * 30 + 100 if kind == "uint8" else draw(shape)
    memory = put(table.device, values.astype(kind))
    return View(memory, memory.pointer, (*shape[1:], shape[0]), (shape[2], 1, shape[1] * shape[2]), kind)


def scales_of(table: CudaBackend, case: Case) -> Memory:
    return put(table.device, np.tile([100.0, 0.03], (*case.inputs, 1)))


def gather(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    pixels, scales = Plane.of(image_of(table, draw, case, "uint8")), scales_of(table, case)

    def run() -> Sequence[Any]:
        assert pixels is not None
        tile = table.image_array((1, case.side, case.side, *case.inputs))
        table.gather(pixels, scales, -case.side // 8, -case.side // 8, tile)
        return [tile]

    return run


def stitch(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    probabilities, total = plain(table, draw, case), plain(table, draw, case)
    pixels = Plane.of(table._view(total)[0])

    def run() -> Sequence[Any]:
        assert pixels is not None
        table.stitch(probabilities, pixels, 0, 0, case.side, case.side)
        return [total]

    return run


def grey_values(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    pixels = image_of(table, draw, case, "uint8")
    return lambda: [np.array([astuple(grey) for grey in table.grey_values(pixels, True)])]


def scaled_image(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    pixels, scales = image_of(table, draw, case, "float64"), scales_of(table, case)
    target = plain(table, draw, case)
    plane = Plane.of(table._view(target)[0])

    def run() -> Sequence[Any]:
        assert plane is not None
        table.scaled_image(pixels, scales, plane)
        return [target]

    return run


def strided_copy(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    pixels = image_of(table, draw, case, "float32")
    whole = replace(pixels, shape=(1, *pixels.shape), strides=(0, *pixels.strides))
    return lambda: [table.array(whole)]


# ---------------------------------------------------------------------------------------------------------------------


def sgd_momentum(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    buffers = [table.buffer(*case.inputs) for _ in range(3)]
    for buffer in buffers:
        table.write(buffer, draw((len(buffer),)))
    if table.bits == 16:  # as every weight has once a convolution has read it
        buffers[0].storage.shadow = table.device.allocate(2 * len(buffers[0]))

    def run() -> Sequence[Any]:
        table.sgd_momentum(*buffers, 1e-3, 0.99)
        return [buffers[0], buffers[2]]

    return run


def image_in(table: CudaBackend, case: Case, draw: Draw) -> Operation:
    values = draw((1, case.side, case.side, *case.inputs))
    return lambda: [table.array(values)]


OPERATIONS: dict[str, Callable[[CudaBackend, Case, Draw], Operation]] = {
    "image in": image_in,
    "gather": gather,
    "grey values": grey_values,
    "scaled image": scaled_image,
    "strided copy": strided_copy,
    "conv3x3 forward": conv3x3_forward,
    "conv3x3": conv3x3_backward,
    "upconv2x2 forward": upconv2x2_forward,
    "upconv2x2": upconv2x2_backward,
    "maxpool2x2 forward": maxpool2x2_forward,
    "maxpool2x2 backward": maxpool2x2_backward,
    "dropout": dropout,
    "head and loss": head,
    "conv1x1 forward": conv1x1_forward,
    "conv1x1": conv1x1_backward,
    "softmax": softmax,
    "softmax and loss": softmax_cross_entropy,
    "stitch": stitch,
    "sum": combined,
    "mask": combined,
    "scale": combined,
    "SGD": sgd_momentum,
}
