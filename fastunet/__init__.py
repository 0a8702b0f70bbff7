"""fastunet: the 2015 U-Net as a complete, fast engine.

Everything public is reachable from here and imported on first use, so that `import fastunet` costs next to nothing.
"""

import importlib
from typing import Any

from fastunet.errors import DataError
from fastunet.geometry import input_size, output_size

__version__ = "0.1.0"

_LAZY = {
    "Predictor": "fastunet.predictor",
    "SGD": "fastunet.optim",
    "Tensor": "fastunet.autograd",
    "UNet": "fastunet.unet",
    "no_grad": "fastunet.autograd",
    "separate": "fastunet.data.separation",
    "weight_map": "fastunet.data.weight_map",
}
_MODULES = ("metrics", "ops")

__all__ = ["DataError", "input_size", "output_size", *_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastunet.{name}")
    raise AttributeError(f"module 'fastunet' has no attribute {name!r}")
