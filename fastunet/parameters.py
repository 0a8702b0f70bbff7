"""Learned tensors: one flat buffer of values and one of gradients, in the packing the backend's kernels read.

A file, `state_dict` and `gradients` show them under PyTorch's names and in PyTorch's layouts.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastunet.backends import Backend

Made = Callable[[slice, Any], None]


@dataclass(frozen=True, eq=False)
class Parameter:
    """A weight or bias as a pair of slices of the flat buffers.

    Attributes
    ----------
    kind : str
        "conv" (out, in, kh, kw), "upconv" (in, out, 2, 2) or "bias" (out,).
    shape : tuple of int
        In PyTorch's layout.
    inputs : tuple of int
        Channels of each input that the weight reads: two for a convolution of a concatenation.
    value : backend buffer
        Packed.
    place : slice
        Of the flat buffers.
    owner : ParameterSet
    """

    kind: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    value: Any
    place: slice
    owner: "ParameterSet"

    @property
    def backend(self) -> Backend:
        return self.owner.backend

    @property
    def gradient(self) -> Any:
        """Packed; what a backward pass adds to, unless gradients are passed on."""
        return self.owner.gradients_buffer[self.place]

    @property
    def outputs(self) -> int:
        return self.shape[1] if self.kind == "upconv" else self.shape[0]

    def numpy(self, packed: Any = None) -> np.ndarray:
        """The value, or another buffer packed like it, in PyTorch's layout."""
        packed = self.value if packed is None else packed
        return self.backend.unpack(self.backend.read(packed), self.kind, self.inputs, self.shape)

    def exported(self, packed: Any = None) -> Any:
        """As `numpy`, where the buffer is: a copy with `__dlpack__`."""
        packed = self.value if packed is None else packed
        return self.backend.exported_parameter(packed, self.kind, self.inputs, self.shape)

    def assign(self, values: Any, packed: Any = None) -> None:
        """Set the value, or another buffer packed like it, from PyTorch's layout: an ndarray, or on the device.

        Raises
        ------
        ValueError
            If the values have another shape or are on another device.
        """
        packed = self.value if packed is None else packed
        self.owner.changed()
        values = self.backend.given(values)
        if values.shape != self.shape:
            raise ValueError(f"values of shape {values.shape} were given, {self.shape} is expected")
        self.backend.fill(packed, values, self.kind, self.inputs)


class ParameterSet(Mapping[str, Parameter]):
    """Parameters by name, over flat buffers that an optimiser updates in one pass.

    Parameters
    ----------
    backend : Backend
    shapes : mapping of str to (kind, shape, inputs)
        In the order of the network.
    """

    def __init__(
        self, backend: Backend, shapes: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]]
    ) -> None:
        self.backend = backend
        sizes = {
            name: backend.packed_size(kind, inputs, shape) for name, (kind, shape, inputs) in shapes.items()
        }
        self.values_buffer = backend.buffer(sum(sizes.values()))
        self.gradients_buffer = backend.buffer(sum(sizes.values()))
        self._made: Made | None = None
        self._derived: dict[tuple[Parameter, ...], Any] = {}
        self._parameters = {}
        first = 0
        for name, (kind, shape, inputs) in shapes.items():
            place = slice(first, first + sizes[name])
            self._parameters[name] = Parameter(kind, shape, inputs, self.values_buffer[place], place, self)
            first += sizes[name]

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    @contextmanager
    def passing_on(self, made: Made) -> Iterator[None]:
        """Within it, gradients are not kept: `made(place, gradient)` takes each once it is complete.

        Every parameter must take part in a backward pass once. The memory is that of a layer's gradients, not of all.
        """
        self._made = made
        try:
            yield
        finally:
            self._made = None

    @contextmanager
    def gradients_of(self, weight: Parameter, bias: Parameter) -> Iterator[tuple[Any, Any]]:
        """Where a layer's backward pass is to add the gradients of its parameters."""
        if self._made is None:
            yield weight.gradient, bias.gradient
            return
        of_weight, of_bias = (parameter.place.stop - parameter.place.start for parameter in (weight, bias))
        both = self.backend.buffer(of_weight + of_bias)
        yield both[:of_weight], both[of_weight:]
        self._made(weight.place, both[:of_weight])
        self._made(bias.place, both[of_weight:])

    def derived(self, parameters: tuple[Parameter, ...], make: Callable[[], Any]) -> Any:
        """What is made of the values of these parameters, kept until a value changes."""
        if parameters not in self._derived:
            self._derived[parameters] = make()
        return self._derived[parameters]

    def changed(self) -> None:
        """To be called by whoever writes to values."""
        self._derived.clear()

    def count(self) -> int:
        """How many numbers are learned, padding not counted."""
        return sum(math.prod(parameter.shape) for parameter in self.values())

    def to_dict(self, buffer: Any) -> dict[str, np.ndarray]:
        """A flat buffer (values, gradients or momenta) as ndarrays by name, in PyTorch's layouts."""
        return {name: parameter.numpy(buffer[parameter.place]) for name, parameter in self.items()}

    def from_dict(self, values: Mapping[str, Any], buffer: Any) -> None:
        """Fill a flat buffer from ndarrays, or arrays on the device, by name.

        Raises
        ------
        ValueError
            If a name is missing, unknown, or of another shape.
        """
        missing, unknown = sorted(set(self) - set(values)), sorted(set(values) - set(self))
        if missing or unknown:
            found = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the network does not"
            raise ValueError(f"the dictionary of parameters {found}; it belongs to another network")
        for name, parameter in self.items():
            array = self.backend.given(values[name])
            if array.shape != parameter.shape:
                raise ValueError(f"parameter {name!r} has shape {array.shape}, {parameter.shape} is expected")
            parameter.assign(array, buffer[parameter.place])
