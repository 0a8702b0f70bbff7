"""The U-Net and its operations for PyTorch: tensors (N, C, H, W), gradients by torch.autograd.

    model = fastunet.torch.UNet(in_channels=1, num_classes=2, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.99)
    loss = fastunet.torch.weighted_cross_entropy(model(images), labels, weights)
    loss.backward()
    optimizer.step()

CUDA tensors are computed on by the CUDA kernels, on the same GPU and in order with PyTorch's current stream; tensors on
the CPU by the C++ engine. On a GPU nothing passes through the host and nobody waits: tensors in torch.channels_last
whose channels are a multiple of 16, or at most 4, are read where they are if the kernels compute in their type; others
are rearranged on the device. Results are in torch.channels_last. Weights are float32 in PyTorch's layouts, and packed
for the kernels in each pass. Gradients of gradients are not there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

import fastunet
from fastunet import autograd, backends, ops
from fastunet.backends import Backend
from fastunet.parameters import ParameterSet

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}

Run = Callable[[Sequence[autograd.Tensor]], autograd.Tensor]


class UNet(torch.nn.Module):
    """`fastunet.UNet` as a module: parameters by the names and in the layouts of a model file, float32.

    `model.load_state_dict(safetensors.torch.load_file("model.safetensors"))` reads a model of fastunet's. Dropout
    follows `seed`, not PyTorch's generators. The module computes where its parameters are: `.to("cuda")` moves it.

    Parameters
    ----------
    in_channels, num_classes, base_channels, depth, dropout, seed, device, precision
        As `fastunet.UNet`.

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
        super().__init__()
        self.precision = precision
        self.draws = 0
        """Training passes so far, as in `fastunet.UNet`."""
        self._sizes: dict[str, Any] = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "base_channels": base_channels,
            "depth": depth,
            "dropout": dropout,
            "seed": seed,
        }
        engine = self._network_on(device)
        self._engine: _Network | None = engine
        self._device = engine.network.device
        self._names = list(engine.network.parameters())
        for name, values in engine.network.state_dict().items():
            path, _, last = name.rpartition(".")
            module: torch.nn.Module = self
            for part in path.split("."):
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            parameter = torch.from_numpy(values).to(engine.place)
            module.register_parameter(last, torch.nn.Parameter(parameter))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes, H', W') of an input (N, in_channels, H, W), float32 or, but on the CPU, bfloat16.

        Raises
        ------
        ValueError
            If the input or a parameter is of another device or type, or the input's size is not valid.
        """
        return self._pass(x, lambda network, inputs: network(inputs[0]))

    def loss(self, x: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`weighted_cross_entropy(model(x), labels, weights)`, with the head inside the loss: faster."""
        truth = _truth(labels, weights, x.device)
        return self._pass(x, lambda network, inputs: network.loss(inputs[0], *truth))

    def _pass(
        self,
        x: torch.Tensor,
        run: Callable[[fastunet.UNet, Sequence[autograd.Tensor]], autograd.Tensor],
    ) -> torch.Tensor:
        # By attribute, for torch.func.functional_call puts other tensors in the parameters' places.
        places = (name.rpartition(".") for name in self._names)
        weights = [getattr(self.get_submodule(path), last) for path, _, last in places]
        engine = self._engine_at(weights[0].device)
        network = engine.network
        network.training, network.draws = self.training, self.draws
        types = (torch.float32,) if network.device == "cpu" else tuple(_PRECISIONS)
        _check("the input", x, engine.place, types, axes=4)
        try:
            return _apply(engine, lambda inputs: run(network, inputs), (x,), weights, torch.float32)
        finally:
            self.draws = network.draws

    def _engine_at(self, place: torch.device) -> "_Network":
        """The network on the parameters' device, which may have changed."""
        if self._engine is None:
            self._engine = self._network_on(self._device)
        if self._engine.place != place:
            self._device = str(place)
            self._engine = self._network_on(self._device)
        return self._engine

    def _network_on(self, device: str) -> "_Network":
        return _Network(fastunet.UNet(**self._sizes, device=device, precision=self.precision))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files get the parameters; the engine's memory is made anew from them."""
        return {**self.__dict__, "_engine": None}


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    relu: bool = False,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fastunet.ops.conv3x3`: valid convolution of [centre of skip, x], (N, C, H, W) -> (N, K, H - 2, W - 2).

    As in all operations here, the type of x, float32 or (on a GPU) bfloat16, is what is computed in and returned;
    weights and biases are float32.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, or tensors are of different devices or of other types.
    """
    inputs = (x,) if skip is None else (skip, x)

    def run(engine: _Engine, tensors: Sequence[autograd.Tensor]) -> autograd.Tensor:
        weight, bias = engine.weights
        return ops.conv3x3(tensors[-1], weight, bias, relu, None if skip is None else tensors[0])

    return _convolution("conv3x3", run, inputs, weight, bias, 3, x.dtype, saves_result=relu)


def upconv2x2(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`fastunet.ops.upconv2x2`: (N, C, H, W) -> (N, K, 2H, 2W), `weight` (C, K, 2, 2) as in ConvTranspose2d.

    Raises
    ------
    ValueError
        As `conv3x3`.
    """
    return _convolution(
        "upconv2x2",
        lambda engine, tensors: ops.upconv2x2(tensors[0], *engine.weights),
        (x,),
        weight,
        bias,
        2,
        x.dtype,
    )


def conv1x1(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`fastunet.ops.conv1x1`: (N, C, H, W) -> (N, K, H, W), logits: float32 whatever x is.

    Raises
    ------
    ValueError
        As `conv3x3`.
    """
    return _convolution(
        "conv1x1",
        lambda engine, tensors: ops.conv1x1(tensors[0], *engine.weights),
        (x,),
        weight,
        bias,
        1,
        torch.float32,
    )


def maxpool2x2(x: torch.Tensor) -> torch.Tensor:
    """`fastunet.ops.maxpool2x2`: (N, C, H, W) -> (N, C, H // 2, W // 2).

    Raises
    ------
    ValueError
        As `conv3x3`.
    """
    engine = _Engine(_backend_of(x))
    _check("maxpool2x2's input", x, engine.place, tuple(_PRECISIONS), axes=4)
    return _apply(engine, lambda inputs: ops.maxpool2x2(inputs[0]), (x,), (), x.dtype)


def dropout(x: torch.Tensor, rate: float, seed: int, draw: int) -> torch.Tensor:
    """`fastunet.ops.dropout`: the mask depends on `seed` and `draw` alone, in channels-last order.

    Raises
    ------
    ValueError
        As `conv3x3`, or if not 0 <= rate < 1.
    """
    engine = _Engine(_backend_of(x))
    _check("dropout's input", x, engine.place, tuple(_PRECISIONS), axes=4)
    return _apply(engine, lambda inputs: ops.dropout(inputs[0], rate, seed, draw), (x,), (), x.dtype)


def weighted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`fastunet.ops.softmax_cross_entropy`: sum of w(x) * -log p_label(x) over the sum of w(x), a float32 scalar.

    Parameters
    ----------
    logits : (N, K, H, W), float32 or (on a GPU) bfloat16
    labels : (N, H, W), integers, 0..K-1; anything where the weight is 0
    weights : (N, H, W), floats or integers; no gradient goes to them

    Raises
    ------
    ValueError
        If shapes or devices do not fit; on the CPU, if a label names no class or the weights sum to zero. On a GPU the
        loss is then no number, for nobody waits for it.
    """
    engine = _Engine(_backend_of(logits))
    _check("the logits", logits, engine.place, tuple(_PRECISIONS), axes=4)
    truth = _truth(labels, weights, logits.device)
    return _apply(
        engine, lambda inputs: ops.softmax_cross_entropy(inputs[0], *truth), (logits,), (), torch.float32
    )


class _Engine:
    """A device's kernels, and the parameters that are packed for them at present.

    Parameters
    ----------
    backend : Backend
    parameters : ParameterSet, optional
    """

    def __init__(self, backend: Backend, parameters: ParameterSet | None = None) -> None:
        self.backend = backend
        self.parameters = parameters
        kind, number = backend.place
        self.place = torch.device("cuda", number) if kind == 2 else torch.device("cpu")
        self._packed_for: object = None

    @property
    def weights(self) -> tuple[Any, ...]:
        return () if self.parameters is None else tuple(self.parameters.values())

    def pack(self, weights: Sequence[torch.Tensor], wanted_by: object) -> None:
        """Pack weights for a pass, unless they are those packed last."""
        if self._packed_for is not wanted_by:
            for parameter, weight in zip(self.weights, weights, strict=True):
                parameter.assign(weight.detach())
            self._packed_for = wanted_by


class _Network(_Engine):
    """The engine of a whole network."""

    def __init__(self, network: fastunet.UNet) -> None:
        super().__init__(network.backend, network.parameters())
        self.network = network


class _Pass:
    """A pass forward, and the tape for the one back."""

    def __init__(
        self, engine: _Engine, run: Run, inputs: int, dtype: torch.dtype, saves_result: bool
    ) -> None:
        self._engine = engine
        self._run = run
        self._mark = object()
        self._count = inputs
        self._dtype = dtype
        self.saves_result = saves_result

    def forward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result: a number, or (N, H, W, C)."""
        self._engine.pack(tensors[self._count :], wanted_by=self._mark)
        self._inputs = [
            autograd.Tensor.from_dlpack(
                x.detach().permute(0, 2, 3, 1), self._engine.backend, requires_gradient=x.requires_grad
            )
            for x in tensors[: self._count]
        ]
        self._result = self._run(self._inputs)
        if isinstance(self._result.array, float):
            return torch.tensor(self._result.array, dtype=self._dtype)
        return torch.from_dlpack(self._result).to(self._dtype)

    def backward(self, gradient: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        engine = self._engine
        engine.pack(tensors[self._count :], wanted_by=self._mark)
        if engine.parameters is not None:
            engine.parameters.gradients_buffer[...] = 0
        # A loss's own gradient stays on the device, for all others are in proportion to it. It is taken for the order
        # of the streams: PyTorch may still have to read what it has let go.
        given = engine.backend.given(gradient)
        self._result.backward(1.0 if gradient.ndim == 0 else given)
        found: list[torch.Tensor | None] = []
        for x in self._inputs:
            x_gradient = x.device_gradient
            if x_gradient is None:
                found.append(None)
            else:
                found.append(torch.from_dlpack(x_gradient).permute(0, 3, 1, 2))
        for parameter, weight in zip(engine.weights, tensors[self._count :], strict=True):
            wanted = weight.requires_grad
            found.append(torch.from_dlpack(parameter.exported(parameter.gradient)) if wanted else None)
        if gradient.ndim == 0:
            torch._foreach_mul_([one for one in found if one is not None], gradient)
        return [None if one is None else one.to(tensor.dtype) for one, tensor in zip(found, tensors)]


class _Function(torch.autograd.Function):
    """A `_Pass` on PyTorch's tape."""

    @staticmethod
    def forward(ctx: Any, one: _Pass, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.one = one
        result = one.forward(tensors)
        # PyTorch then notices a tensor that was changed although the way back needs it as it was.
        ctx.save_for_backward(*tensors, *([result] if one.saves_result else []))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors[: len(ctx.needs_input_grad) - 1]
        return (None, *ctx.one.backward(gradient, tensors))


def _apply(
    engine: _Engine,
    run: Run,
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    dtype: torch.dtype,
    saves_result: bool = False,
) -> torch.Tensor:
    """Run on the inputs, with these weights, to a result of a type; recorded where PyTorch records."""
    for (name, parameter), weight in zip((engine.parameters or {}).items(), weights, strict=True):
        _check(f"parameter {name!r}", weight, engine.place, (torch.float32,))
        if weight.shape != parameter.shape:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(weight.shape)}, {parameter.shape} is expected"
            )
    tensors = (*inputs, *weights)
    one = _Pass(engine, run, len(inputs), dtype, saves_result)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        result = _Function.apply(one, *tensors)
    else:
        with autograd.no_grad():
            result = one.forward(tensors)
    # Not within the function, which would forbid that its result be changed in place.
    return result if result.ndim == 0 else result.permute(0, 3, 1, 2)


def _convolution(
    name: str,
    run: Callable[[_Engine, Sequence[autograd.Tensor]], autograd.Tensor],
    inputs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    side: int,
    dtype: torch.dtype,
    saves_result: bool = False,
) -> torch.Tensor:
    backend = _backend_of(inputs[-1])
    for x in inputs:
        _check(f"{name}'s input", x, inputs[-1].device, (inputs[-1].dtype,), axes=4)
    channels = tuple(x.shape[1] for x in inputs)
    ins, outs = (0, 1) if name == "upconv2x2" else (1, 0)
    if weight.ndim != 4 or weight.shape[2:] != (side, side) or weight.shape[ins] != sum(channels):
        layout = "(C, K, " if ins == 0 else "(K, C, "
        raise ValueError(
            f"{name} was given a weight of shape {tuple(weight.shape)} for inputs of {channels} channels; "
            f"{layout}{side}, {side}) of as many input channels is expected"
        )
    kind = "upconv" if name == "upconv2x2" else "conv"
    shapes = {"weight": (kind, tuple(weight.shape), channels), "bias": ("bias", (weight.shape[outs],), ())}
    engine = _Engine(backend, ParameterSet(backend, shapes))
    return _apply(engine, lambda tensors: run(engine, tensors), inputs, (weight, bias), dtype, saves_result)


def _backend_of(x: torch.Tensor) -> Backend:
    """The kernels for a tensor: of its device, in its precision."""
    if x.dtype not in _PRECISIONS:
        raise ValueError(f"a tensor of {x.dtype} was given; {_names(tuple(_PRECISIONS))} is expected")
    return backends.load(backends.resolve_device(str(x.device)), _PRECISIONS[x.dtype])


def _truth(
    labels: torch.Tensor, weights: torch.Tensor, place: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, given in (("labels", labels), ("weights", weights)):
        if given.device != place:
            raise ValueError(f"the {name} are on {given.device}; {place} is expected, where the rest is")
    if labels.is_floating_point():
        raise ValueError(f"the labels are of {labels.dtype}; integers are expected")
    return labels.detach(), weights.detach()


def _check(
    name: str,
    tensor: torch.Tensor,
    place: torch.device,
    types: Sequence[torch.dtype],
    axes: int | None = None,
) -> None:
    if tensor.device != place:
        raise ValueError(f"{name} is on {tensor.device}; {place} is expected, where the rest is")
    if tensor.dtype not in types:
        raise ValueError(f"{name} is of {tensor.dtype}; {_names(types)} is expected")
    if axes is not None and tensor.ndim != axes:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; (N, C, H, W) is expected")


def _names(types: Sequence[torch.dtype]) -> str:
    return " or ".join(map(str, types))
