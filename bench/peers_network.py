"""The U-Net as PyTorch's users write it, under the names of a model file: for the PyTorch engines, and for conversion.

Rectified in place, which costs PyTorch the least; tests/torch_unet.py is the reference that is written for reading.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from torch import nn


class Level(nn.Module):
    """Two 3x3 convolutions with ReLU, and in the decoder the up-convolution before them."""

    def __init__(self, inputs: int, outputs: int, decodes: bool = False) -> None:
        super().__init__()
        if decodes:
            self.upconv = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        self.conv1 = nn.Conv2d(inputs, outputs, 3)
        self.conv2 = nn.Conv2d(outputs, outputs, 3)
        self.rectify = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rectify(self.conv2(self.rectify(self.conv1(x))))


class Network(nn.Module):
    """One input channel, two classes, as the paper draws it; (N, 1, H, W) -> (N, 2, H', W')."""

    def __init__(self, base: int, depth: int) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(map(Level, [1, *widths], widths[:-1]))
        self.bottleneck = Level(widths[-2], widths[-1])
        self.decoder = nn.ModuleList(Level(2 * width, width, True) for width in reversed(widths[:-1]))
        self.head = nn.Conv2d(base, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
            x = torch.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for level in self.decoder:
            x = level.upconv(x)  # type: ignore[operator]
            skip = skips.pop()
            first = (skip.shape[2] - x.shape[2]) // 2
            centre = skip[:, :, first : first + x.shape[2], first : first + x.shape[3]]
            x = level(torch.cat([centre, x], 1))
        return self.head(x)


def load(path: Path, **given: Any) -> Network:
    """The network of a model file; `given` are the dtype and memory_format of `torch.nn.Module.to`."""
    state = {name: torch.tensor(values) for name, values in load_file(path).items()}
    base = len(state["encoder.0.conv1.bias"])
    depth = sum(name.endswith("upconv.bias") for name in state)
    with torch.device("meta"):
        network = Network(base, depth)
    network.load_state_dict(state, assign=True)
    return network.to(**given)


def export_onnx(model: Path, side: int, path: Path) -> None:
    """For ONNX Runtime and OpenVINO."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            load(model).eval(), (torch.zeros(1, 1, side, side),), path, external_data=False, verbose=False
        )


def export_ncnn(model: Path, side: int, path: Path) -> None:
    """`path` with the endings .ncnn.param and .ncnn.bin, in float32."""
    import pnnx

    pnnx.export(load(model).eval(), str(path), (torch.zeros(1, 1, side, side),), fp16=False)
