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


def conv1x1_forward(case: Case, make: Make) -> Peer:
    return F.conv2d, lambda: (
        make(*case.inputs, case.side),
        make(case.outputs, *case.inputs, 1, 1),
        make(case.outputs),
    )


def softmax(case: Case, make: Make) -> Peer:
    return lambda x: torch.softmax(x, 1), lambda: (make(case.outputs, case.side, dtype=torch.float32),)


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
    "softmax": softmax,
    "SGD": sgd_momentum,
}
