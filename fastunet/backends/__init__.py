"""One table of primitive kernels for every device: what `fastunet.ops` calls, and how a device is chosen.

`Backend` states the contract; an instance is a backend's whole table. Arrays are the backend's own objects with a
`shape` of (N, H, W, C); parameters and their gradients are flat buffers packed as its kernels read them.
"""

import functools
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from fastunet.normalization import Grey
    from fastunet.rotations import Rotation, Turn
    from fastunet.tiling import TilePlan


class Prediction(Protocol):
    """The class probabilities of one image, summed over its views."""

    def add(self, view: "Turn | Rotation", plan: "TilePlan") -> Iterator[None]:
        """Predict the tiles of a view, one at each step of the iterator, and add it."""

    def sum(self) -> Any:
        """(H, W, K) float32, once every view was added to its end; for `averaged` where the image was no ndarray."""


class Predictions(Protocol):
    """A network's way over whole images; what it keeps of one serves the next.

    Attributes
    ----------
    element_bytes : float
        What a number of an activation comes to, with what is lost between activations.
    """

    element_bytes: float

    def begin(self, image: Any, scales: np.ndarray) -> Prediction:
        """Predict an image (H, W, C) from `Backend.given`, of numbers x that the network wants as (x - offset) * scale.

        `scales` holds [offset, scale] of each channel.

        Raises
        ------
        MemoryError
            If there is no room for image and result; `Prediction.add` if there is none for a tile.
        """

    def tiles(self, inputs: Iterable[np.ndarray], scales: np.ndarray) -> Iterator[np.ndarray]:
        """Predict tiles of an image that is not here as a whole: for inputs (h, w, C) their probabilities, (h', w', K).

        Inputs are as in `begin`; the next may be asked for before the probabilities of the last are there.
        """

    def release(self) -> None:
        """Give back the memory that is kept for further tiles."""

    def free_memory(self) -> int:
        """Bytes that a prediction can take at present."""

    def statistics(self, image: Any, moments: bool) -> Iterable["Grey"]:
        """`fastunet.normalization.statistics` of an image that `Backend.given` left on the device."""

    def averaged(self, sums: Sequence[Any], views: int, stacked: bool) -> Any:
        """Sums over so many views of such images, divided: (H, W, K) of one, or a stack; with `__dlpack__`."""


class Composition(Protocol):
    """An up-convolution and the 3x3 convolution with ReLU of [a skip's centre, its result] as one linear map."""

    def pays(self, up_inputs: Sequence[int], inputs: Sequence[int], outputs: int) -> bool:
        """Whether it is less work; the channels that the two weights read, and those of the result."""

    def size(self, up_inputs: Sequence[int], inputs: Sequence[int], outputs: int) -> int:
        """Numbers of the map."""

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
        """The map."""

    def forward(self, x: Any, skip: Any, composed: Any, outputs: int) -> Any: ...


class Backend(Protocol):
    """The primitive kernels of a device, by the same names and argument order on each."""

    name: str

    @property
    def place(self) -> tuple[int, int]:
        """Type and number of the device's memory, as `__dlpack_device__` gives them."""

    @property
    def stream(self) -> tuple[int, int] | None:
        """Number of the GPU and address of its stream in whose order arrays from outside are read; None on the host."""

    def given(self, values: Any) -> Any:
        """Values from outside: a view of an array that lies in the device's memory, an ndarray of any other.

        Views have `shape`, `ndim` and `size`, and the methods below that take an ndarray from outside take them too.

        Raises
        ------
        ValueError
            If they lie in another device's memory.
        """

    def array(self, values: Any) -> Any:
        """(N, H, W, C) values -> array of its own."""

    def shared(self, values: Any) -> Any:
        """(N, H, W, C) values -> array in the same memory, where it can be: neither changes it."""

    def numpy(self, array: Any) -> np.ndarray:
        """Array -> (N, H, W, C) float32."""

    def exported(self, array: Any) -> Any:
        """The same where it is: an object with `__dlpack__`, sharing the array's memory where that can be."""

    def copy(self, array: Any) -> Any: ...

    def scaled(self, array: Any, factor: float) -> Any:
        """The array times a number, in place where the caller holds it alone."""

    def accumulate(self, one: Any, other: Any, shape: tuple[int, ...]) -> Any:
        """Sum of two gradients of a tensor of `shape`, each of that shape or its centre; may reuse either."""

    def full_size(self, gradient: Any, shape: tuple[int, ...]) -> Any:
        """The gradient itself, or zeros of `shape` around it where it is the centre only."""

    def buffer(self, count: int) -> Any:
        """A flat float32 buffer of zeros, sliceable, for parameters, their gradients or momenta."""

    def pack(self, values: np.ndarray, kind: str, inputs: Sequence[int]) -> np.ndarray:
        """PyTorch layout -> the kernels' flat form. kind: conv, upconv or bias; inputs: channels of each input."""

    def unpack(
        self, flat: np.ndarray, kind: str, inputs: Sequence[int], shape: tuple[int, ...]
    ) -> np.ndarray: ...

    def packed_size(self, kind: str, inputs: Sequence[int], shape: tuple[int, ...]) -> int: ...

    def fill(self, buffer: Any, values: Any, kind: str, inputs: Sequence[int]) -> None:
        """Write values from outside, in PyTorch layout, packed."""

    def exported_parameter(
        self, buffer: Any, kind: str, inputs: Sequence[int], shape: tuple[int, ...]
    ) -> Any:
        """A copy in PyTorch layout where the buffer is: an object with `__dlpack__`."""

    def write(self, buffer: Any, values: np.ndarray) -> None: ...

    def read(self, buffer: Any) -> np.ndarray: ...

    def conv3x3_forward(self, x: Any, skip: Any, weight: Any, bias: Any, outputs: int, relu: bool) -> Any:
        """Valid 3x3 convolution of [centre of skip, x], or of x alone, with bias and optional ReLU."""

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
        """Adds to the parameters' gradients; returns those of x and of the skip's centre."""

    def upconv2x2_forward(self, x: Any, weight: Any, bias: Any, outputs: int) -> Any: ...

    def upconv2x2_backward(
        self, gradient: Any, x: Any, weight: Any, weight_gradient: Any, bias_gradient: Any, wants_input: bool
    ) -> Any: ...

    @property
    def composition(self) -> Composition | None:
        """None where the device gains nothing by it."""

    def conv1x1_forward(self, x: Any, weight: Any, bias: Any, outputs: int) -> Any: ...

    def conv1x1_backward(
        self, gradient: Any, x: Any, weight: Any, weight_gradient: Any, bias_gradient: Any, wants_input: bool
    ) -> Any: ...

    def maxpool2x2_forward(self, x: Any) -> tuple[Any, Any]:
        """The pooled array and which pixel won, for the way back."""

    def conv3x3_maxpool2x2_forward(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        outputs: int,
        kept: tuple[int, int] | None,
        wants_choice: bool,
    ) -> tuple[Any, Any, Any]:
        """Valid 3x3 convolution with bias and ReLU, its 2x2 max-pooling, and the choice of `maxpool2x2_forward`.

        Only the centre of `kept` (height, width) of the convolution will be read, or all of it where that is None.
        """

    def maxpool2x2_backward(self, gradient: Any, choice: Any, height: int, width: int, present: Any) -> Any:
        """The gradient of the pooling's input, added to what is `present` of it (all, its centre, or None)."""

    def softmax_cross_entropy(
        self, logits: Any, labels: Any, weights: Any, wants_gradient: bool
    ) -> tuple[float, Any]: ...

    def softmax(self, logits: Any) -> Any: ...

    def head_cross_entropy_forward(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        outputs: int,
        labels: Any,
        weights: Any,
        wants_gradient: bool,
    ) -> tuple[float, Any]:
        """`softmax_cross_entropy` of `conv1x1_forward`: the loss, and what the way back needs where it is wanted."""

    def head_cross_entropy_backward(
        self, saved: Any, factor: float, weight_gradient: Any, bias_gradient: Any, wants_input: bool
    ) -> Any:
        """Adds `factor` times the gradients to the parameters'; returns that of x."""

    def dropout(self, x: Any, rate: float, seed: int, draw: int) -> Any: ...

    def sgd_momentum(
        self, value: Any, gradient: Any, momentum: Any, learning_rate: float, rate: float
    ) -> None: ...

    def predictions(self, forward: Callable[[Any], Any], channels: int, classes: int) -> Predictions:
        """Whole images through `forward`, which takes a tile's array to that of its class probabilities."""

    def free_memory(self) -> int:
        """Bytes that can be allocated at present."""

    def memory_of(self, work: Callable[[], Any]) -> int | None:
        """Bytes that `work` would take, with all that it returns, without doing it; None where that cannot be told.

        Nothing that it works on may have existed before.
        """

    repeats: bool
    """Whether the device gains by doing work that it has recorded; it then has these two."""

    def inlet(self, shape: tuple[int, ...], dtype: np.dtype | type) -> Any:
        """A place from which recorded work takes values, anew each time: what it is given must be its `view`.

        `fill(values)` brings values from outside there, in the order of all that the device does, and does not wait.
        """

    def repeat(self, work: Callable[[], Any], beside: Any = None) -> Any:
        """Record work that was done once before; nothing happens, though dropout's draws are counted twice.

        `start(steps, learning_rate, rate)` of what is returned does it: with draws of dropout `steps` later and those
        rates of SGD; `result` is what the work returned, whose numbers are read after the wait that `start` returns.
        `beside` is another recording whose memory it shares, for one follows the other.
        """


def on_host(values: Any) -> np.ndarray | None:
    """What the CPU can read as an ndarray, sharing its memory where it can; None for an array on another device."""
    if hasattr(values, "__dlpack_device__"):
        if values.__dlpack_device__()[0] not in (1, 3):  # kDLCPU, kDLCUDAHost
            return None
        if not hasattr(values, "__array__"):
            return np.from_dlpack(values)
    elif hasattr(values, "__cuda_array_interface__"):
        return None
    return np.asarray(values)


_registered: dict[str, Callable[[str], Backend]] = {}


def register(name: str, table: Callable[[str], Backend]) -> None:
    """Make `name` a device, whose table for a precision is `table(precision)`."""
    _registered[name] = table


def resolve_device(device: str = "auto") -> str:
    """Name the device that `device` means on this machine: "cpu" or "cuda:N".

    auto is what the environment variable FASTUNET_DEVICE says, or else the first GPU that can be used, or the CPU.

    Raises
    ------
    ValueError
        If the device is unknown, or what it needs is missing: one sentence says what was found and what to install.
    """
    if device == "auto":
        device = os.environ.get("FASTUNET_DEVICE", "auto")
    if device == "auto":
        return _automatic_device()
    if device == "cpu" or device in _registered:
        return device
    if device != "cuda" and not (device.startswith("cuda:") and device[5:].isdecimal()):
        raise ValueError(f"device {device!r} is unknown; expected auto, cpu, cuda or cuda:N")
    found = f"cuda:{int(device[5:] or 0)}"
    try:
        importlib.import_module("fastunet.backends.cuda").check(found)
    except ValueError as error:
        raise ValueError(f"device {device!r} was asked for, but {error}") from None
    return found


@functools.cache
def _automatic_device() -> str:
    """The first GPU; or the CPU, which is said where a GPU is left idle by it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not (Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")):
        return "cpu"
    try:
        importlib.import_module("fastunet.backends.cuda").check("cuda:0")
    except ValueError as error:
        print(f"fastunet: this machine's GPU is not used, but the CPU: {error}", file=sys.stderr)
        return "cpu"
    return "cuda:0"


def resolve_precision(precision: str, device: str) -> str:
    """Name the precision that "auto", "fp32" or "bf16" means on a resolved device; auto is bf16 but on the CPU.

    Raises
    ------
    ValueError
        If the device does not compute in it.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision {precision!r} is unknown; expected auto, fp32 or bf16")
    if precision == "bf16" and device == "cpu":
        raise ValueError(
            "precision 'bf16' was asked for, but the CPU computes in fp32; use --precision fp32 or auto"
        )
    if precision == "auto":
        return "fp32" if device == "cpu" else "bf16"
    return precision


def load(device: str, precision: str = "auto") -> Backend:
    """Return the table of kernels of a resolved device."""
    precision = resolve_precision(precision, device)
    if device in _registered:
        return _registered[device](precision)
    if device == "cpu":
        return importlib.import_module("fastunet.backends.cpu").backend
    return importlib.import_module("fastunet.backends.cuda").backend(device, precision)


def set_threads(count: int) -> None:
    """Compute with this many CPU threads from now on.

    Raises
    ------
    ValueError
        If `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"{count} threads were asked for; at least 1 is expected")
    _cpu().set_thread_count(count)


def get_threads() -> int:
    """Return how many CPU threads compute; by default the cores this process may use."""
    return int(_cpu().thread_count())


def instruction_set() -> str:
    """Name what the CPU's kernels are compiled for: avx512, avx2, ..."""
    return str(_cpu().instruction_set())


def describe(device: str = "cpu") -> str:
    """One line for a person: a resolved device's name and size, or the CPU's threads and instruction set."""
    if device != "cpu":
        table: Any = load(device)
        return f"{device}: {table.describe()}"
    return f"cpu: {get_threads()} threads, {instruction_set()} kernels"


def _cpu() -> Any:
    return importlib.import_module("fastunet.backends.cpu").engine
