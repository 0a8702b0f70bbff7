"""The reference: the same U-Net in PyTorch, built from the parameter names and shapes of a model file alone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def forward(
    parameters: dict[str, torch.Tensor], x: torch.Tensor, depth: int, masks: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Logits (N, K, H', W') of x (N, C, H, W).

    `masks`, where given, multiply the end of the last encoder level and of the bottleneck: dropout with masks of the
    caller's.
    """

    def convolution(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.conv2d(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"]))

    skips = []
    for level in range(depth):
        x = convolution(f"encoder.{level}.conv2", convolution(f"encoder.{level}.conv1", x))
        if masks and level == depth - 1:
            x = x * masks[0]
        skips.append(x)
        x = F.max_pool2d(x, 2)
    x = convolution("bottleneck.conv2", convolution("bottleneck.conv1", x))
    if masks:
        x = x * masks[1]
    for step in range(depth):
        name = f"decoder.{step}"
        x = F.conv_transpose2d(
            x, parameters[f"{name}.upconv.weight"], parameters[f"{name}.upconv.bias"], stride=2
        )
        skip = skips.pop()
        top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
        x = torch.cat([skip[:, :, top : top + x.shape[2], left : left + x.shape[3]], x], 1)
        x = convolution(f"{name}.conv2", convolution(f"{name}.conv1", x))
    return F.conv2d(x, parameters["head.weight"], parameters["head.bias"])


def weighted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The loss of `fastunet.ops.softmax_cross_entropy` for (N, K, H, W) logits."""
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
