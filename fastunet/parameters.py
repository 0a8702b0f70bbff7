"""Learned tensors: one flat buffer of values and one of gradients, in the packing the backend's kernels read.

A file, `state_dict` and `gradients` show them under PyTorch's names and in PyTorch's layouts.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastunet.backends import Backend


@dataclass(frozen=True)
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
    value, gradient : backend buffer
        Packed.
    """

    kind: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    value: Any
    gradient: Any
    backend: Backend

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
        self._parameters = {}
        self._slices = {}
        first = 0
        for name, (kind, shape, inputs) in shapes.items():
            place = slice(first, first + sizes[name])
            self._slices[name] = place
            self._parameters[name] = Parameter(
                kind, shape, inputs, self.values_buffer[place], self.gradients_buffer[place], backend
            )
            first += sizes[name]

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def count(self) -> int:
        """How many numbers are learned, padding not counted."""
        return sum(math.prod(parameter.shape) for parameter in self.values())

    def to_dict(self, buffer: Any) -> dict[str, np.ndarray]:
        """A flat buffer (values, gradients or momenta) as ndarrays by name, in PyTorch's layouts."""
        return {name: self[name].numpy(buffer[place]) for name, place in self._slices.items()}

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
            parameter.assign(array, buffer[self._slices[name]])
