"""PyTorch's way to each case of cuda_shapes.py: bfloat16, channels-last; what ours fuses, it does in a function.

`PEERS[operation](case, make)` gives that function and another that makes one set of its arguments.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cuda_shapes import Case

Function = Callable[..., Any]
Make = Callable[..., torch.Tensor]
"""(channels, side) or (outputs, inputs, height, width) -> random tensor on the device, bfloat16 unless told."""
Peer = tuple[Function, Callable[[], tuple[Any, ...]]]


def maker(device: str) -> Make:
    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        shape = (1, shape[0], shape[1], shape[1]) if len(shape) == 2 else shape
        values = torch.randn(shape, device=device, dtype=dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    return make


def crop(skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    first = (skip.shape[2] - x.shape[2]) // 2
    return skip[:, :, first : first + x.shape[2], first : first + x.shape[3]]


def conv3x3_forward(case: Case, make: Make) -> Peer:
    def function(weight: Any, bias: Any, x: Any, skip: Any = None) -> Any:
        joined = x if skip is None else torch.cat([crop(skip, x), x], 1)
        y = F.relu(F.conv2d(joined, weight, bias))
        return (y, F.max_pool2d(y, 2)) if case.pools else y

    def arguments() -> tuple[Any, ...]:
        inputs = [make(case.inputs[-1], case.side)]
        if len(case.inputs) == 2:
            inputs.append(make(case.inputs[0], case.skip_side))
        return make(case.outputs, sum(case.inputs), 3, 3), make(case.outputs), *inputs

    return function, arguments


def convolution_backward(case: Case, make: Make) -> Peer:
    """Of one of the two directions; a ReLU before it is a pass of its own. The concatenation is given."""
    transposed = case.operation.startswith("upconv")
    data = case.operation.endswith("data gradient")
    rule = ([2, 2], [0, 0], [1, 1], True) if transposed else ([1, 1], [0, 0], [1, 1], False)
    asked = (True, False, False) if data else (False, True, True)

    def function(y: Any, x: Any, weight: Any) -> Any:
        found = torch.ops.aten.convolution_backward(y, x, weight, [case.outputs], *rule, [0, 0], 1, asked)
        if data and any(case.rectified):
            return torch.ops.aten.threshold_backward(found[0], x, 0)
        return found[0] if data else found[1:]

    def arguments() -> tuple[Any, ...]:
        inputs = sum(case.inputs)
        y = make(case.outputs, 2 * case.side if transposed else case.side - 2)
        weight = make(inputs, case.outputs, 2, 2) if transposed else make(case.outputs, inputs, 3, 3)
        return y, make(inputs, case.side), weight

    return function, arguments


def upconv2x2_forward(case: Case, make: Make) -> Peer:
    def function(x: Any, weight: Any, bias: Any) -> Any:
        return F.conv_transpose2d(x, weight, bias, stride=2)

    return function, lambda: (
        make(*case.inputs, case.side),
        make(*case.inputs, case.outputs, 2, 2),
        make(case.outputs),
    )


def maxpool2x2_forward(case: Case, make: Make) -> Peer:
    return lambda x: F.max_pool2d(x, 2, return_indices=True), lambda: (make(case.outputs, case.side),)


def maxpool2x2_backward(case: Case, make: Make) -> Peer:
    def function(y: Any, x: Any, choice: Any, present: Any) -> Any:
        rule = [2, 2], [2, 2], [0, 0], [1, 1], False, choice
        total = torch.ops.aten.max_pool2d_with_indices_backward(y, x, *rule)
        crop(total, present).add_(present)
        return torch.ops.aten.threshold_backward(total, x, 0)

    def arguments() -> tuple[Any, ...]:
        x = make(case.outputs, case.side)
        choice = F.max_pool2d(x, 2, return_indices=True)[1]
        return make(case.outputs, case.side // 2), x, choice, make(case.outputs, case.centre)

    return function, arguments


def dropout(case: Case, make: Make) -> Peer:
    return lambda x: F.dropout(x, 0.5), lambda: (make(case.outputs, case.side),)


def head(case: Case, make: Make) -> Peer:
    def function(x: Any, weight: Any, bias: Any, labels: Any, weights: Any) -> Any:
        logits = F.conv2d(x, weight, bias).float()
        losses = F.cross_entropy(logits, labels, reduction="none") * weights
        gradients = torch.autograd.grad(losses.sum() / weights.sum(), (x, weight, bias))
        return torch.ops.aten.threshold_backward(gradients[0], x, 0), *gradients[1:]

    def arguments() -> tuple[Any, ...]:
        x, weight = make(*case.inputs, case.side), make(case.outputs, *case.inputs, 1, 1)
        shape = 1, case.side, case.side
        labels = (make(*shape, dtype=torch.float32) > 0).long()
        leaves = [leaf.requires_grad_() for leaf in (x, weight, make(case.outputs))]
        return *leaves, labels, make(*shape, dtype=torch.float32).abs()

    return function, arguments


def conv1x1_backward(case: Case, make: Make) -> Peer:
    """Of the gradient in bfloat16, which PyTorch's convolution wants."""
    function, _ = convolution_backward(case, make)
    return function, lambda: (
        make(case.outputs, case.side),
        make(*case.inputs, case.side),
        make(case.outputs, *case.inputs, 1, 1),
    )


def conv1x1_forward(case: Case, make: Make) -> Peer:
    return F.conv2d, lambda: (
        make(*case.inputs, case.side),
        make(case.outputs, *case.inputs, 1, 1),
        make(case.outputs),
    )


def softmax(case: Case, make: Make) -> Peer:
    return lambda x: torch.softmax(x, 1), lambda: (make(case.outputs, case.side, dtype=torch.float32),)


def softmax_cross_entropy(case: Case, make: Make) -> Peer:
    def function(logits: Any, labels: Any, weights: Any) -> Any:
        losses = F.cross_entropy(logits, labels, reduction="none") * weights
        return torch.autograd.grad(losses.sum() / weights.sum(), logits)

    def arguments() -> tuple[Any, ...]:
        shape = 1, case.side, case.side
        labels = (make(*shape, dtype=torch.float32) > 0).long()
        logits = make(case.outputs, case.side, dtype=torch.float32).requires_grad_()
        return logits, labels, make(*shape, dtype=torch.float32).abs()

    return function, arguments


def combined(case: Case, make: Make) -> Peer:
    functions: dict[str, Function] = {
        "sum": lambda one, other: one + other,
        "mask": lambda one, other: torch.ops.aten.threshold_backward(one, other, 0),
        "scale": lambda one, other: one.mul_(0.5),
    }
    return functions[case.operation], lambda: tuple(make(case.outputs, case.side) for _ in range(2))


def uint8_image(case: Case, make: Make) -> torch.Tensor:
    return (make(*case.inputs, case.side, dtype=torch.float32) * 30 + 100).to(torch.uint8)


def gather(case: Case, make: Make) -> Peer:
    """Of pixels that are all within the image: nothing is mirrored."""
    return lambda x: ((x.float() - 100) * 0.03).bfloat16(), lambda: (uint8_image(case, make),)


def stitch(case: Case, make: Make) -> Peer:
    function = lambda total, part: total.add_(part)  # noqa: E731
    return function, lambda: tuple(make(case.outputs, case.side, dtype=torch.float32) for _ in range(2))


def grey_values(case: Case, make: Make) -> Peer:
    return lambda x: (torch.aminmax(x), torch.std_mean(x.double())), lambda: (uint8_image(case, make),)


def scaled_image(case: Case, make: Make) -> Peer:
    function = lambda x: ((x - 100) * 0.03).float()  # noqa: E731
    return function, lambda: (make(*case.inputs, case.side, dtype=torch.float64),)


def strided_copy(case: Case, make: Make) -> Peer:
    def function(x: Any) -> Any:
        return x.to(torch.bfloat16, memory_format=torch.channels_last)

    return function, lambda: (make(*case.inputs, case.side, dtype=torch.float32).contiguous(),)


def sgd_momentum(case: Case, make: Make) -> Peer:
    """Without the copy in bfloat16 that ours writes beside."""

    def function(value: Any, gradient: Any, momentum: Any) -> None:
        torch._fused_sgd_(
            [value], [gradient], [momentum],
            weight_decay=0.0, momentum=0.99, lr=1e-3, dampening=0.0, nesterov=False, maximize=False,
            is_first_step=False,
        )  # fmt: skip

    return function, lambda: tuple(make(*case.inputs, dtype=torch.float32) for _ in range(3))


def image_in(case: Case, make: Make) -> Peer:
    return lambda x: x.bfloat16(), lambda: (make(*case.inputs, case.side, dtype=torch.float32),)


PEERS: dict[str, Callable[[Case, Make], Peer]] = {
    "image in": image_in,
    "gather": gather,
    "grey values": grey_values,
    "scaled image": scaled_image,
    "strided copy": strided_copy,
    "conv3x3 forward": conv3x3_forward,
    "conv3x3 weight gradient": convolution_backward,
    "conv3x3 data gradient": convolution_backward,
    "upconv2x2 forward": upconv2x2_forward,
    "upconv2x2 weight gradient": convolution_backward,
    "upconv2x2 data gradient": convolution_backward,
    "maxpool2x2 forward": maxpool2x2_forward,
    "maxpool2x2 backward": maxpool2x2_backward,
    "dropout": dropout,
    "head and loss": head,
    "conv1x1 forward": conv1x1_forward,
    "conv1x1 weight gradient": conv1x1_backward,
    "conv1x1 data gradient": conv1x1_backward,
    "softmax": softmax,
    "softmax and loss": softmax_cross_entropy,
    "stitch": stitch,
    "sum": combined,
    "mask": combined,
    "scale": combined,
    "SGD": sgd_momentum,
}
