"""Reverse-mode automatic differentiation: tensors, a tape, one walk backwards.

Nothing here knows an operation or a device. An operation (fastunet.ops) computes an array with its backend and calls
`record` with a function that turns the gradient of its result into the gradients of its inputs; the backend adds
gradients where a tensor was used more than once.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any

import numpy as np

from fastunet.backends import Backend

Backward = Callable[..., Sequence[Any]]

_order = itertools.count()
_thread = local()


def recording() -> bool:
    """Whether operations on this thread are recorded for a backward pass."""
    return getattr(_thread, "recording", True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Within it, operations of this thread record nothing and intermediate arrays are freed at once."""
    before = recording()
    _thread.recording = False
    try:
        yield
    finally:
        _thread.recording = before


class Tensor:
    """An array of a backend, (N, H, W, C), or a number, with the way it came about.

    Parameters
    ----------
    array : backend array or number
        The value; `Tensor.from_numpy` makes one from an ndarray. A number is a float, or what becomes one when asked.
    backend : Backend
        The table of kernels that made `array`.
    requires_gradient : bool
        Whether `backward` should leave a gradient in this tensor.
    """

    def __init__(self, array: Any, backend: Backend, requires_gradient: bool = False) -> None:
        self.array = array
        self.backend = backend
        self.requires_gradient = requires_gradient
        self.is_leaf = True
        self._order = next(_order)
        self._inputs: tuple[Tensor, ...] = ()
        self._backward: Backward | None = None
        self._gives_totals = False
        self._gradient: Any = None
        self._exported: Any = None

    @classmethod
    def from_numpy(cls, values: np.ndarray, backend: Backend, requires_gradient: bool = False) -> "Tensor":
        """Copy (N, H, W, C) `values` to the backend, as float32."""
        return cls(backend.array(values), backend, requires_gradient)

    @classmethod
    def from_dlpack(cls, values: Any, backend: Backend, requires_gradient: bool = False) -> "Tensor":
        """Take (N, H, W, C) `values` where they are: on the backend's device, by DLPack or the CUDA array interface.

        Memory is shared where values lie as the backend's own (contiguous, in its precision, at most 4 channels or a
        multiple of 16): then they must not change as long as this tensor, or what is recorded of it, is there. Else
        they are copied on the device; from the host if they are there.

        Raises
        ------
        ValueError
            If they are on another device.
        """
        return cls(backend.shared(values), backend, requires_gradient)

    def __dlpack__(self, **options: Any) -> Any:
        """The values as (N, H, W, C) float32 for another library: `torch.from_dlpack(tensor)`, `cupy.from_dlpack`.

        Shared where they are kept so (logits and probabilities), else a copy on the device.
        """
        return self.backend.exported(self.array).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.backend.place

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The same for libraries without DLPack; only on a GPU, and while this tensor is there."""
        self._exported = self.backend.exported(self.array)  # kept, for an address keeps nothing
        return self._exported.__cuda_array_interface__

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape) if hasattr(self.array, "shape") else ()

    @property
    def gradient(self) -> np.ndarray | float | None:
        """What `backward` left here: an ndarray of this tensor's shape, or None. Only leaves keep theirs."""
        if self._gradient is None or isinstance(self._gradient, float):
            return self._gradient
        return self.backend.numpy(self.backend.full_size(self._gradient, self.shape))

    @property
    def device_gradient(self) -> "Tensor | None":
        """`gradient` where it is, as a tensor that travels by DLPack; None where there is none."""
        if self._gradient is None:
            return None
        return Tensor(self.backend.full_size(self._gradient, self.shape), self.backend)

    def numpy(self) -> np.ndarray:
        """The values as (N, H, W, C) float32 (a 0-d array for a number)."""
        return np.asarray(float(self.array)) if self.shape == () else self.backend.numpy(self.array)

    def __float__(self) -> float:
        if self.shape != ():
            raise ValueError(f"a tensor of shape {self.shape} is not a single number")
        return float(self.array)

    def backward(self, gradient: Any = 1.0) -> None:
        """Add d self / d leaf, times `gradient`, to the gradient of every leaf and parameter that led here.

        `gradient` is a number, or (N, H, W, C) as an ndarray or an array on the device.

        Arrays kept for the backward pass are freed as the walk leaves them; a second walk over the same tensors is an
        error.

        Raises
        ------
        ValueError
            If nothing was recorded, or `gradient` is not of this tensor's shape.
        """
        if self.is_leaf or not self.requires_gradient:
            raise ValueError(
                "backward was called on a tensor that no recorded operation made; is it within no_grad()?"
            )
        gradient = self.backend.given(gradient)
        if gradient.shape != self.shape:
            raise ValueError(
                f"backward of a tensor of shape {self.shape} needs a gradient of that shape, not {gradient.shape}"
            )
        self._gradient = float(gradient) if self.shape == () else self.backend.array(gradient)
        # Operations come after their inputs, so the largest order number left never waits for another's gradient.
        waiting = [(-self._order, self)]
        while waiting:
            _, tensor = heapq.heappop(waiting)
            if tensor._backward is None:
                raise ValueError(
                    "backward was called twice over the same tensors; run the forward pass again"
                )
            backward, inputs = tensor._backward, tensor._inputs
            gradient = tensor._gradient
            if not isinstance(gradient, float):
                gradient = tensor.backend.full_size(gradient, tensor.shape)
            tensor._backward, tensor._inputs, tensor._gradient = None, (), None
            present = [source._gradient for source in inputs] if tensor._gives_totals else []
            contributions = backward(gradient, *present)
            del backward, gradient, present
            for source, contribution in zip(inputs, contributions, strict=True):
                if contribution is None or not source.requires_gradient:
                    continue
                if source._gradient is None and not source.is_leaf:
                    heapq.heappush(waiting, (-source._order, source))
                if source._gradient is None or tensor._gives_totals:
                    source._gradient = contribution
                elif isinstance(contribution, float):
                    source._gradient += contribution
                else:
                    source._gradient = source.backend.accumulate(source._gradient, contribution, source.shape)


def record(
    array: Any,
    backend: Backend,
    inputs: Sequence[Tensor],
    backward: Backward,
    learns: bool = False,
    gives_totals: bool = False,
) -> Tensor:
    """Wrap an operation's result and, unless recording is off or nothing needs it, its way back.

    Parameters
    ----------
    array : backend array or float
        The result.
    backend : Backend
        Whose array it is.
    inputs : sequence of Tensor
        What it was computed from.
    backward : callable
        Gradient of the result -> gradient of each input (None where it has none). Each returned array is the caller's
        alone; it may be smaller than its input, and then stands for the input's centre. Gradients of parameters are
        added by the function itself.
    learns : bool
        Whether parameters took part, so that the way back is needed even where no input needs it.
    gives_totals : bool
        Whether `backward` also takes the gradient that each input has from elsewhere so far (or None), and returns the
        sums: a pass over memory less than adding them afterwards.
    """
    needed = recording() and (learns or any(tensor.requires_gradient for tensor in inputs))
    result = Tensor(array, backend, requires_gradient=needed)
    if needed:
        result.is_leaf = False
        result._inputs, result._backward, result._gives_totals = tuple(inputs), backward, gives_totals
    return result
