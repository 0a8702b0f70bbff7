"""The U-Net of Ronneberger, Fischer and Brox (2015), and its file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastunet import backends, ops
from fastunet.autograd import Tensor
from fastunet.errors import DataError
from fastunet.geometry import output_size, skip_size
from fastunet.normalization import Normalization, check_normalization
from fastunet.parameters import Parameter, ParameterSet

FORMAT, VERSION = "fastunet", "1"
_CONFIG = ("in_channels", "num_classes", "base_channels", "depth", "dropout", "normalization", "class_names")


class UNet:
    """Contracting path, bottleneck and expanding path of valid convolutions (paper, figure 1 and section 2).

    Level i has base_channels * 2**i channels: two 3x3 convolutions with ReLU, 2x2 max-pooling; coming up, a 2x2
    up-convolution halves the channels and its result is concatenated to the centre of the level's skip connection.
    Dropout ends the contracting path (last encoder level and bottleneck). He initialisation (section 3).

    Parameters
    ----------
    in_channels, num_classes, base_channels : int
        At least 1, 2 and 1.
    depth : int
        Poolings, 1 to 6.
    dropout : float
        Rate, 0 to below 1.
    seed : int
        Of the initial weights and of dropout.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    precision : str
        "auto", "fp32" or "bf16".

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        base_channels: int = 64,
        depth: int = 4,
        dropout: float = 0.5,
        seed: int = 0,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        for name, value, least, most in (
            ("in_channels", in_channels, 1, 4096),
            ("num_classes", num_classes, 2, 4096),
            ("base_channels", base_channels, 1, 4096),
            ("depth", depth, 1, 6),
        ):
            if not isinstance(value, int | np.integer) or not least <= value <= most:
                raise ValueError(f"{name} is {value!r}; a whole number from {least} to {most} is expected")
        if not isinstance(dropout, int | float | np.floating) or not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; 0 <= dropout < 1 is expected")
        self.in_channels = int(in_channels)
        self.num_classes = int(num_classes)
        self.base_channels = int(base_channels)
        self.depth = int(depth)
        self.dropout = float(dropout)
        self.seed = int(seed)
        self.device = backends.resolve_device(device)
        self.precision = backends.resolve_precision(precision, self.device)
        self.backend = backends.load(self.device, self.precision)
        self.normalization: Normalization = "zscore"
        self.class_names: list[str] | None = None
        self.training = True
        self.draws = 0
        """Training passes so far: the number that makes each pass's dropout another."""
        self._parameters = ParameterSet(self.backend, self._shapes())
        self._initialise()

    def _shapes(self) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Kind, shape and input channels of every parameter, in the order of the network."""
        shapes: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}

        def layer(name: str, kind: str, outputs: int, inputs: tuple[int, ...], side: int) -> None:
            channels = (sum(inputs), outputs) if kind == "upconv" else (outputs, sum(inputs))
            shapes[f"{name}.weight"] = (kind, (*channels, side, side), inputs)
            shapes[f"{name}.bias"] = ("bias", (outputs,), ())

        width = [self.base_channels * 2**level for level in range(self.depth + 1)]
        below = self.in_channels
        for level in range(self.depth):
            layer(f"encoder.{level}.conv1", "conv", width[level], (below,), 3)
            layer(f"encoder.{level}.conv2", "conv", width[level], (width[level],), 3)
            below = width[level]
        layer("bottleneck.conv1", "conv", width[-1], (below,), 3)
        layer("bottleneck.conv2", "conv", width[-1], (width[-1],), 3)
        for step, level in enumerate(reversed(range(self.depth))):
            layer(f"decoder.{step}.upconv", "upconv", width[level], (width[level + 1],), 2)
            layer(f"decoder.{step}.conv1", "conv", width[level], (width[level], width[level]), 3)
            layer(f"decoder.{step}.conv2", "conv", width[level], (width[level],), 3)
        layer("head", "conv", self.num_classes, (width[0],), 1)
        return shapes

    def _initialise(self) -> None:
        generator = np.random.Generator(np.random.PCG64(self.seed))
        for parameter in self._parameters.values():
            if parameter.kind != "bias":
                inputs = sum(parameter.inputs)
                fan_in = (
                    inputs if parameter.kind == "upconv" else inputs * parameter.shape[2] * parameter.shape[3]
                )
                values = generator.standard_normal(parameter.shape, np.float32) * np.float32(
                    np.sqrt(2 / fan_in)
                )
                parameter.assign(values)

    def __call__(self, x: Any) -> Tensor:
        """Logits (N, H', W', num_classes) of an input (N, H, W, in_channels), each side `2 * border(depth)` smaller.

        The input is a Tensor, an ndarray, or an array on the network's device (anything with DLPack or the CUDA array
        interface), which is copied there.

        Raises
        ------
        ValueError
            If the input is not of that form or its size not valid (`fastunet.geometry`).
        """
        return ops.conv1x1(self._features(x), *self._layer("head"))

    def loss(self, x: Any, labels: Any, weights: Any) -> Tensor:
        """`ops.softmax_cross_entropy(model(x), labels, weights)`, with the head inside the loss: a training step's way.

        All three may be on the network's device.

        Raises
        ------
        ValueError
            As those two.
        """
        return ops.head_cross_entropy(self._features(x), *self._layer("head"), labels, weights)

    def _layer(self, name: str) -> tuple[Parameter, Parameter]:
        return self._parameters[f"{name}.weight"], self._parameters[f"{name}.bias"]

    def _features(self, x: Any) -> Tensor:
        """What the head sees: the last convolution's output, (N, H', W', base_channels)."""
        if not isinstance(x, Tensor):
            x = self.backend.given(x)
            if x.ndim != 4:
                raise ValueError(
                    f"the network was given an array of shape {x.shape}, (N, H, W, C) is expected"
                )
            x = Tensor.from_numpy(x, self.backend)
        if x.shape[3] != self.in_channels:
            raise ValueError(
                f"the network was given {x.shape[3]} channels, it has {self.in_channels} input channels"
            )
        height, width = (output_size(side, self.depth) for side in x.shape[1:3])
        if self.training:
            self.draws += 1

        def drop(x: Tensor, which: int) -> Tensor:
            return ops.dropout(x, self.dropout, self.seed, 2 * self.draws + which) if drops else x

        drops = self.training and self.dropout > 0
        skips = []
        for level in range(self.depth):
            x = ops.conv3x3(x, *self._layer(f"encoder.{level}.conv1"), relu=True)
            second = self._layer(f"encoder.{level}.conv2")
            if drops and level == self.depth - 1:
                skip = drop(ops.conv3x3(x, *second, relu=True), 0)
                x = ops.maxpool2x2(skip)
            else:
                skip, x = ops.conv3x3_maxpool2x2(
                    x, *second, (skip_size(height, level), skip_size(width, level))
                )
            skips.append(skip)
            del skip  # it is freed where the level it is for has read it
        x = ops.conv3x3(x, *self._layer("bottleneck.conv1"), relu=True)
        x = drop(ops.conv3x3(x, *self._layer("bottleneck.conv2"), relu=True), 1)
        for step in range(self.depth):
            up, first = self._layer(f"decoder.{step}.upconv"), self._layer(f"decoder.{step}.conv1")
            x = ops.upconv2x2_conv3x3(x, skips.pop(), *up, *first)
            x = ops.conv3x3(x, *self._layer(f"decoder.{step}.conv2"), relu=True)
        return x

    def composed_size(self, level: int) -> int:
        """As `fastunet.tiling.Network`: numbers of the layers composed on the way up to a level."""
        channels = self.base_channels * 2**level
        sizes = (2 * channels,), (channels, channels), channels
        composition = self.backend.composition
        return composition.size(*sizes) if composition is not None and composition.pays(*sizes) else 0

    def train(self) -> "UNet":
        """Switch dropout on."""
        self.training = True
        return self

    def eval(self) -> "UNet":
        """Switch dropout off."""
        self.training = False
        return self

    def parameters(self) -> ParameterSet:
        return self._parameters

    def state_dict(self) -> dict[str, np.ndarray]:
        """Parameters by the file's names, in PyTorch's layouts, float32."""
        return self._parameters.to_dict(self._parameters.values_buffer)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set every parameter, from ndarrays or arrays on the device.

        Raises
        ------
        ValueError
            If a name is missing or unknown or a shape differs.
        """
        self._parameters.from_dict(state, self._parameters.values_buffer)

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients by the file's names, in PyTorch's layouts."""
        return self._parameters.to_dict(self._parameters.gradients_buffer)

    def config(self) -> dict[str, Any]:
        """What the file records beside the weights."""
        return {name: getattr(self, name) for name in _CONFIG}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a model file: safetensors, float32, PyTorch's layouts; it appears only when whole."""
        from safetensors.numpy import save

        metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(self.config())}
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(save(self.state_dict(), metadata))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto", precision: str = "auto") -> "UNet":
        """Read a model file; the network comes in evaluation mode.

        Raises
        ------
        DataError
            If the file is missing, damaged, or not a fastunet model.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        expected = "a fastunet model (.safetensors) is expected; train one with fastunet train"
        if not path.is_file():
            raise DataError(f"{path}: no such file; {expected}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}
        # safetensors raises the last two for types that NumPy lacks, bfloat16 and float8.
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a readable safetensors file ({error}); {expected}") from None
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            found = f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
            raise DataError(
                f"{path}: its metadata say {found}, not {FORMAT!r} version {VERSION!r}; {expected}"
            )
        try:
            config = json.loads(metadata["config"])
            sizes = {
                name: config[name]
                for name in ("in_channels", "num_classes", "base_channels", "depth", "dropout")
            }
            normalization, class_names = config["normalization"], config["class_names"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: its config cannot be read ({error!r}); {expected}") from None
        # Before anything of the declared size is allocated: the largest tensor must really be there.
        channels = sizes["base_channels"] * 2 ** sizes["depth"] if _are_small_integers(sizes) else -1
        bottleneck = state.get("bottleneck.conv2.weight")
        if bottleneck is None or bottleneck.shape != (channels, channels, 3, 3):
            raise DataError(
                f"{path}: its tensors do not fit its config {sizes}; the file is damaged or was edited"
            )
        try:
            model = cls(**sizes, device=device, precision=precision)
            model.load_state_dict(state)
            check_normalization(normalization, model.in_channels)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
        if any(not np.isfinite(values).all() for values in state.values()):
            raise DataError(
                f"{path}: it holds weights that are not finite; the file is damaged or its training failed"
            )
        named = isinstance(class_names, list) and len(class_names) == model.num_classes
        if class_names is not None and not (named and all(isinstance(name, str) for name in class_names)):
            raise DataError(f"{path}: class_names is {class_names!r}; {model.num_classes} names are expected")
        model.normalization = normalization
        model.class_names = class_names
        return model.eval()


def _are_small_integers(sizes: Mapping[str, Any]) -> bool:
    names = ("in_channels", "num_classes", "base_channels", "depth")
    return (
        all(isinstance(sizes[name], int) and 0 < sizes[name] <= 4096 for name in names)
        and sizes["depth"] <= 6
    )
