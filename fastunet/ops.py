"""The operations of a U-Net on tensors: forward here and in the backend, backward beside each.

Activations are (N, H, W, C). The only caller of a backend: nothing above this file knows one.
"""

from collections.abc import Callable
from typing import Any

from fastunet.autograd import Tensor, record, recording
from fastunet.backends import Backend
from fastunet.parameters import Parameter


def conv3x3(
    x: Tensor, weight: Parameter, bias: Parameter, relu: bool = False, skip: Tensor | None = None
) -> Tensor:
    """Valid 3x3 convolution, optionally of the concatenation [centre of skip, x] and followed by ReLU.

    The concatenation is read in place; neither it nor its gradient is ever stored.

    Parameters
    ----------
    x : Tensor
        (N, H, W, C).
    weight : Parameter
        (K, C, 3, 3), or (K, S + C, 3, 3) with a skip.
    bias : Parameter
        (K,).
    relu : bool
    skip : Tensor, optional
        (N, at least H, at least W, S); its centre of H x W pixels is used.

    Returns
    -------
    Tensor
        (N, H - 2, W - 2, K).

    Raises
    ------
    ValueError
        If the shapes do not fit each other.
    """
    _check_inputs("conv3x3", weight, *([x] if skip is None else [skip, x]))
    skip_array = None if skip is None else skip.array
    y = x.backend.conv3x3_forward(x.array, skip_array, weight.value, bias.value, weight.outputs, relu)
    return _record_conv3x3(y, x, weight, bias, relu, skip)


def conv3x3_maxpool2x2(
    x: Tensor, weight: Parameter, bias: Parameter, kept: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """`conv3x3` with ReLU and the `maxpool2x2` of its result, made in one pass where the device can.

    Parameters
    ----------
    x, weight, bias
        As for `conv3x3`.
    kept : (height, width), optional
        The centre of y that will be read, as the skip of a `conv3x3`; a device need not keep more. Default: all.

    Returns
    -------
    y, pooled : Tensor
        (N, H - 2, W - 2, K) and (N, (H - 2) // 2, (W - 2) // 2, K).

    Raises
    ------
    ValueError
        If the shapes do not fit each other, or there is no 2 x 2 pixels to pool.
    """
    _check_inputs("conv3x3_maxpool2x2", weight, x)
    y, pooled, choice = x.backend.conv3x3_maxpool2x2_forward(
        x.array, weight.value, bias.value, weight.outputs, kept, recording()
    )
    convolved = _record_conv3x3(y, x, weight, bias, relu=True, skip=None)
    return convolved, _record_maxpool2x2(pooled, convolved, choice)


def _record_conv3x3(
    y: Any, x: Tensor, weight: Parameter, bias: Parameter, relu: bool, skip: Tensor | None
) -> Tensor:
    backend = x.backend
    skip_array = None if skip is None else skip.array

    def backward(gradient: Any) -> tuple[Any, ...]:
        wanted = x.requires_gradient or (skip is not None and skip.requires_gradient)
        with weight.owner.gradients_of(weight, bias) as gradients:
            x_gradient, skip_gradient = backend.conv3x3_backward(
                gradient, x.array, skip_array, y if relu else None, weight.value, *gradients, wanted
            )
        return (x_gradient,) if skip is None else (x_gradient, skip_gradient)

    return record(y, backend, (x,) if skip is None else (x, skip), backward, learns=True)


def upconv2x2(x: Tensor, weight: Parameter, bias: Parameter) -> Tensor:
    """2x2 up-convolution of stride 2 (a transposed convolution): (N, H, W, C) -> (N, 2H, 2W, K).

    `weight` is (C, K, 2, 2), `bias` (K,).

    Raises
    ------
    ValueError
        If the shapes do not fit each other.
    """
    return _of_one_input(
        "upconv2x2", x.backend.upconv2x2_forward, x.backend.upconv2x2_backward, x, weight, bias
    )


def upconv2x2_conv3x3(
    x: Tensor, skip: Tensor, up_weight: Parameter, up_bias: Parameter, weight: Parameter, bias: Parameter
) -> Tensor:
    """`conv3x3` with ReLU of [centre of skip, `upconv2x2` of x].

    Where nothing is recorded and the device gains by it, as one linear map: nothing stands between the two, so that
    each of the four phases of the result is a 2x2 convolution of x beside the 3x3 convolution of the skip. Equal to the
    two up to rounding. The parameters are of one `ParameterSet`, which keeps the map until a value changes.

    Raises
    ------
    ValueError
        If the shapes do not fit each other.
    """
    _check_inputs("upconv2x2", up_weight, x)
    _check_channels("conv3x3", weight, (skip.shape[3], up_weight.outputs))
    composition = x.backend.composition
    channels = up_weight.inputs, weight.inputs, weight.outputs
    if recording() or composition is None or not composition.pays(*channels):
        return conv3x3(upconv2x2(x, up_weight, up_bias), weight, bias, relu=True, skip=skip)
    composed = weight.owner.derived(
        (up_weight, up_bias, weight, bias),
        lambda: composition.compose(up_weight.value, up_bias.value, weight.value, bias.value, *channels),
    )
    return Tensor(composition.forward(x.array, skip.array, composed, weight.outputs), x.backend)


def conv1x1(x: Tensor, weight: Parameter, bias: Parameter) -> Tensor:
    """1x1 convolution, the network's head: (N, H, W, C) -> (N, H, W, K); `weight` is (K, C, 1, 1), `bias` (K,).

    Raises
    ------
    ValueError
        If the shapes do not fit each other.
    """
    return _of_one_input("conv1x1", x.backend.conv1x1_forward, x.backend.conv1x1_backward, x, weight, bias)


def maxpool2x2(x: Tensor) -> Tensor:
    """2x2 max-pooling of stride 2: (N, H, W, C) -> (N, H // 2, W // 2, C); the first of equal pixels gets the gradient.

    Raises
    ------
    ValueError
        If the input is smaller than 2 x 2 pixels.
    """
    pooled, choice = x.backend.maxpool2x2_forward(x.array)
    return _record_maxpool2x2(pooled, x, choice)


def _record_maxpool2x2(pooled: Any, x: Tensor, choice: Any) -> Tensor:
    height, width = x.shape[1:3]

    def backward(gradient: Any, present: Any) -> tuple[Any]:
        return (x.backend.maxpool2x2_backward(gradient, choice, height, width, present),)

    return record(pooled, x.backend, (x,), backward, gives_totals=True)


def dropout(x: Tensor, rate: float, seed: int, draw: int) -> Tensor:
    """Zero each element with probability `rate` and divide the others by 1 - rate.

    An element's fate depends on its place, `seed` and `draw` alone (Philox4x32-10), so that it is the same on every
    device and is drawn again, not stored, for the backward pass.

    Raises
    ------
    ValueError
        If not 0 <= rate < 1.
    """
    backend = x.backend
    y = backend.dropout(x.array, rate, seed, draw)
    return record(y, backend, (x,), lambda gradient: (backend.dropout(gradient, rate, seed, draw),))


def add(x: Tensor, y: Tensor) -> Tensor:
    """Sum of two tensors of one shape, or of two numbers such as losses.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"tensors of shapes {x.shape} and {y.shape} cannot be added; they must be equal")
    backend = x.backend
    if x.shape == ():
        return record(float(x) + float(y), backend, (x, y), lambda gradient: (gradient, gradient))
    total = backend.accumulate(backend.copy(x.array), y.array, x.shape)
    return record(total, backend, (x, y), lambda gradient: (gradient, backend.copy(gradient)))


def softmax_cross_entropy(logits: Tensor, labels: Any, weights: Any) -> Tensor:
    """Weighted cross-entropy of the softmax: sum of w(x) * -log p_label(x) over the sum of w(x).

    Ronneberger et al. (2015), section 3, eq. 1, normalised by the weights. Value and gradient are made in one pass. A
    pixel of weight 0 counts for nothing, though its logits be no numbers.

    Parameters
    ----------
    logits : Tensor
        (N, H, W, K).
    labels : ndarray of int, or an array on the device
        (N, H, W), 0..K-1; anything where the weight is 0.
    weights : ndarray of float, or an array on the device
        (N, H, W); pixels of weight 0 are ignored.

    Returns
    -------
    Tensor
        A number.

    Raises
    ------
    ValueError
        If shapes do not fit, a label names no class, or the weights sum to zero; on a GPU the last two when the number
        is asked for, and the gradients are those of the pixels that count.
    """
    backend = logits.backend
    labels, weights = _check_truth(backend, labels, weights, logits.shape[:3])
    wanted = recording() and logits.requires_gradient
    loss, logit_gradient = backend.softmax_cross_entropy(logits.array, labels, weights, wanted)
    return record(loss, backend, (logits,), lambda gradient: (backend.scaled(logit_gradient, gradient),))


def head_cross_entropy(x: Tensor, weight: Parameter, bias: Parameter, labels: Any, weights: Any) -> Tensor:
    """`softmax_cross_entropy` of `conv1x1`, in one pass where the device can: the end of a training step.

    Where an input that is not finite lies in a pixel of weight 0, the gradients of its channel's weights are no numbers
    (0 times it, as in any convolution); loss and other gradients are without it.

    Raises
    ------
    ValueError
        As those two.
    """
    _check_inputs("head_cross_entropy", weight, x)
    backend = x.backend
    labels, weights = _check_truth(backend, labels, weights, x.shape[:3])
    loss, saved = backend.head_cross_entropy_forward(
        x.array, weight.value, bias.value, weight.outputs, labels, weights, recording()
    )

    def backward(gradient: float) -> tuple[Any]:
        wanted = x.requires_gradient
        with weight.owner.gradients_of(weight, bias) as gradients:
            return (backend.head_cross_entropy_backward(saved, gradient, *gradients, wanted),)

    return record(loss, backend, (x,), backward, learns=True)


def _check_truth(backend: Backend, labels: Any, weights: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    labels, weights = backend.given(labels), backend.given(weights)
    for name, given in (("labels", labels), ("weights", weights)):
        if given.shape != shape:
            raise ValueError(f"the {name} have shape {given.shape}; {shape} is expected, one for each pixel")
    return labels, weights


def softmax(logits: Tensor) -> Tensor:
    """Class probabilities (N, H, W, K), for prediction; nothing is recorded."""
    return Tensor(logits.backend.softmax(logits.array), logits.backend)


def _of_one_input(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    x: Tensor,
    weight: Parameter,
    bias: Parameter,
) -> Tensor:
    _check_inputs(name, weight, x)
    y = forward(x.array, weight.value, bias.value, weight.outputs)

    def way_back(gradient: Any) -> tuple[Any]:
        wanted = x.requires_gradient
        with weight.owner.gradients_of(weight, bias) as gradients:
            return (backward(gradient, x.array, weight.value, *gradients, wanted),)

    return record(y, x.backend, (x,), way_back, learns=True)


def _check_inputs(name: str, weight: Parameter, *inputs: Tensor) -> None:
    _check_channels(name, weight, tuple(tensor.shape[3] for tensor in inputs))


def _check_channels(name: str, weight: Parameter, channels: tuple[int, ...]) -> None:
    if channels != weight.inputs:
        raise ValueError(
            f"{name} was given inputs of {channels} channels; its weight expects {weight.inputs}"
        )
