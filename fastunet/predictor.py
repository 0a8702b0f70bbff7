"""Predict images of any size with a trained network: normalise, mirror, tiles, network, softmax, stitch."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastunet import backends, ops
from fastunet.autograd import Tensor, no_grad
from fastunet.errors import DataError
from fastunet.memory import format_bytes
from fastunet.normalization import offsets_and_scales, statistics
from fastunet.rotations import Rotation, Turn, views
from fastunet.tiling import TilePlan, check_tile, plan_tiles
from fastunet.unet import UNet

# Of the memory that is free before a prediction; the rest is left to everything else on the machine.
SHARE_OF_FREE_MEMORY = 0.8


class Predictor:
    """Class probabilities of images of any size, from 1x1 pixel up.

    The result does not depend on the size of the tiles (fastunet.tiling): they are a matter of memory only.

    Parameters
    ----------
    model : a UNet (also one in training; it is left in the mode it was in), or what `model_file` takes
    device, precision : where and how to compute, for a model from a file
    tile : the network's input size in pixels, or "auto": the one with the least work that fits into memory
    rotations : 1; 4: right angles; 8: and their mirror images; 7: the paper's k * 360/7 degrees. The
        probabilities are averaged.
    memory : bytes a prediction may take; default: 0.8 of what machine and container have left when it starts
    threads : CPU threads for everything fastunet computes from now on; default: as it is
    notify : is told, in a sentence, when memory makes the tiles smaller than wanted
    """

    def __init__(
        self,
        model: UNet | str | Path,
        device: str = "auto",
        precision: str = "auto",
        tile: int | str = "auto",
        rotations: int = 1,
        memory: int | None = None,
        threads: int | None = None,
        notify: Callable[[str], None] = warnings.warn,
    ) -> None:
        self._views = views(rotations)
        if threads is not None:
            backends.set_threads(threads)
        self.model = model if isinstance(model, UNet) else UNet.load(model_file(model), device, precision)
        if tile != "auto":
            check_tile(tile, self.model.depth)
        self.tile = tile
        self.memory = memory
        self._predictions = self.model.backend.predictions(
            functools.partial(_probabilities, self.model), self.model.in_channels, self.model.num_classes
        )
        self._notify = notify

    def __call__(self, image: Any, progress: Callable[[float], None] | None = None) -> Any:
        """Predict one image, or a stack image by image.

        Parameters
        ----------
        image : (H, W), (H, W, C), (N, H, W) or (N, H, W, C), booleans, integers or finite floats. Three axes
            are (H, W, C) when the last is at most 4 or the model's number of channels. An array of another library
            (`__dlpack__` or `__cuda_array_interface__`) in the memory of the model's device is read where it is, in
            any order of its axes; only the seven rotations take their views through the host.
        progress : is told after every tile which part of this call is done, up to 1.0

        Returns
        -------
        (H, W, K) or (N, H, W, K) float32 probabilities of the K classes, summing to 1: an ndarray, or for an array on
        the device one that is there, too, with `__dlpack__` and on a GPU `__cuda_array_interface__`
        (`cupy.from_dlpack(probabilities)`, `torch.from_dlpack(probabilities)`)

        Raises
        ------
        ValueError
            If shape, number of channels or values are not what the model takes.
        MemoryError
            If even the smallest tile does not fit.
        """
        image = self.model.backend.given(image)
        stack = image.ndim == 4 or (image.ndim == 3 and not self._is_one_image(image))
        if image.ndim not in (2, 3, 4) or image.size == 0:
            raise ValueError(
                f"the image has shape {image.shape}; expected (H, W), (H, W, C), (N, H, W) or (N, H, W, C), "
                "none of them 0"
            )
        images = [image[number] for number in range(len(image))] if stack else [image]
        sums: list[Any] = []
        for one in images:
            sums.append(
                self._predict(one, lambda part: (progress or _ignore)((len(sums) + part) / len(images)))
            )
        if not isinstance(image, np.ndarray):
            return self._predictions.averaged(sums, len(self._views), stack)
        for total in sums:
            total /= len(self._views)
        return np.stack(sums) if stack else sums[0]

    def plan(self, height: int, width: int) -> TilePlan:
        """Plan the tiles of an image of this size (not rotated) within the memory there is now."""
        return self._plan(height, width, Turn(), self._allowed())

    def _is_one_image(self, image: Any) -> bool:
        return image.shape[2] <= 4 or image.shape[2] == self.model.in_channels

    def _predict(self, image: Any, progress: Callable[[float], None]) -> Any:
        """The sum over the views."""
        image = image if image.ndim == 3 else image[..., None]
        if image.shape[2] != self.model.in_channels:
            raise ValueError(
                f"the image has {image.shape[2]} channels (shape {image.shape}) and the model takes "
                f"{self.model.in_channels}; give images like those it was trained on"
            )
        height, width = image.shape[:2]
        allowed = self._allowed()
        while True:
            plans = [self._plan(height, width, view, allowed) for view in self._views]
            try:
                return self._sum(image, plans, allowed, progress)
            except MemoryError:
                allowed = max(plan.memory for plan in plans) // 2

    def _allowed(self) -> int:
        if self.memory is not None:
            return self.memory
        return int(self._predictions.free_memory() * SHARE_OF_FREE_MEMORY)

    def _plan(self, height: int, width: int, view: Turn | Rotation, allowed: int) -> TilePlan:
        size = view.size(height, width)
        return plan_tiles(*size, self.model, self.tile, allowed, self._predictions.element_bytes)

    def _say_if_smaller(self, plan: TilePlan, allowed: int) -> None:
        if plan.tile != plan.preferred:
            tile, preferred = (f"{size[0]}x{size[1]}" for size in (plan.tile, plan.preferred))
            self._notify(
                f"tiles of {tile} instead of {preferred} pixels, because {format_bytes(allowed)} of memory "
                "is available; the result is the same"
            )

    def _sum(self, image: Any, plans: list[TilePlan], allowed: int, progress: Callable[[float], None]) -> Any:
        known = statistics if isinstance(image, np.ndarray) else self._predictions.statistics
        scales = offsets_and_scales(image, self.model.normalization, known)
        prediction = self._predictions.begin(image, scales)
        tiles, done = sum(len(plan) for plan in plans), 0
        was_training = self.model.training
        self.model.eval()
        try:
            for view, plan in zip(self._views, plans):
                for _ in prediction.add(view, plan):
                    if done == 0:  # said once there was memory for it, not of each size tried
                        self._say_if_smaller(plans[0], allowed)
                    done += 1
                    progress(done / tiles)
        finally:
            if was_training:
                self.model.train()
        return prediction.sum()


def _probabilities(model: UNet, tile: Any) -> Any:
    """What the network makes of a tile, arrays of its backend both."""
    with no_grad():
        return ops.softmax(model(Tensor(tile, model.backend))).array


def model_file(model: str | Path) -> Path:
    """Find the model file meant: a file, a run folder (its model.safetensors) or a shipped model (`nuclei`).

    Raises
    ------
    DataError
        If a folder holds no model, or there is neither such a file nor such a shipped model.
    """
    path = Path(model)
    if path.is_dir():
        if (path / "model.safetensors").is_file():
            return path / "model.safetensors"
        raise DataError(f"{path}: the folder holds no model.safetensors; give a run folder or a model file")
    if path.exists():
        return path
    shipped = shipped_models()
    if str(model) in shipped:
        return shipped[str(model)]
    names = " or ".join(["a model file", "a run folder", *shipped])
    raise DataError(f"{path}: there is no such model; expected {names}")


def shipped_models() -> dict[str, Path]:
    """Name the models that come with fastunet, with their files."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "models").glob("*.safetensors"))}


def _ignore(part: float) -> None:
    pass
