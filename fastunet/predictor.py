"""Predict images of any size with a trained network: normalise, mirror, tiles, network, softmax, stitch.

An image in memory is predicted as a whole (`Predictor.__call__`); one that is read by rectangles, tile by tile
(`Predictor.tiles`), in memory that the size of the image has no part in.
"""

import functools
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastunet import backends, ops
from fastunet.autograd import Tensor, no_grad
from fastunet.errors import DataError
from fastunet.geometry import border, input_size
from fastunet.memory import format_bytes
from fastunet.normalization import BLOCK, offsets_and_scales, statistics
from fastunet.rotations import Rotation, Turn, read_mirrored, views
from fastunet.tiling import Tile, TilePlan, activation_bytes, check_tile, plan_tiles
from fastunet.unet import UNet

if TYPE_CHECKING:
    from fastunet.data.sources import Source

Result = TypeVar("Result")

# Of the memory that is free before a prediction; the rest is left to everything else on the machine.
SHARE_OF_FREE_MEMORY = 0.8
# Beside activations and pixels of a tile: the kernels' own buffers, and what threads and libraries come to.
SCRATCH = 12 << 20


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
        self.rotations = rotations
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
        if len(self._views) > 1:
            for total in sums:
                total /= len(self._views)
        return np.stack(sums) if stack else sums[0]

    def plan(self, height: int, width: int) -> TilePlan:
        """Plan the tiles of an image of this size (not rotated) within the memory there is now."""
        return self._plan(height, width, Turn(), self._allowed())

    def plan_source(self, source: "Source") -> TilePlan:
        """Plan the tiles of an image that is read by rectangles.

        Raises
        ------
        ValueError
            If the network takes another number of channels.
        MemoryError
            If even the smallest tile does not fit.
        """
        self._check_channels(source.shape)
        height, width, channels = source.shape
        if not self.is_tiled:
            return self.plan(height, width)
        lost, step = border(self.model.depth), 2**self.model.depth
        further = (
            step if len(self._views) > 1 else 0
        )  # tiles of a turned view begin a multiple of this before

        def needed(tall: NDArray[np.int64], wide: NDArray[np.int64]) -> NDArray[np.int64]:
            tall, wide = tall + further, wide + further
            pixels, output = (
                tall * wide * channels,
                4 * self.model.num_classes * (tall - 2 * lost) * (wide - 2 * lost),
            )
            activations = activation_bytes(tall, wide, self.model) * (self._predictions.element_bytes / 4)
            # One tile is read, and one written, while another is predicted; it is turned into float32.
            pixels = pixels * (4 + 2 * source.dtype.itemsize)
            results = output * (2 if len(self._views) == 1 else 4)
            tile = activations + pixels + results + source.held_bytes(tall, wide)
            return (np.maximum(tile, first_pass) + SCRATCH).astype(np.int64)

        block = min(BLOCK, height), min(BLOCK, width)
        first_pass = block[0] * block[1] * (16 + channels * source.dtype.itemsize) + source.held_bytes(*block)

        return plan_tiles(
            height, width, self.model, self.tile, self._allowed(), self._predictions.element_bytes, needed
        )

    @property
    def is_tiled(self) -> bool:
        """Whether images can be read by rectangles: resampled views need the whole."""
        return all(isinstance(view, Turn) for view in self._views)

    @property
    def kernels(self) -> str:
        """What computes: the same gives the same bits."""
        device = self.model.device.split(":")[0]
        return (
            f"{device} {self.model.precision} {backends.instruction_set() if device == 'cpu' else ''}".strip()
        )

    def scales(self, source: "Source") -> NDArray[np.float64]:
        """[offset, scale] of each channel, by one pass over an image that is read by rectangles."""
        return offsets_and_scales(source, self.model.normalization)

    def tiles(
        self, source: "Source", scales: NDArray[np.float64], plan: TilePlan, chosen: Iterable[Tile]
    ) -> Generator[tuple[Tile, NDArray[np.float32]]]:
        """Predict some of a plan's tiles, in their order; the next is read, in a thread, while one is predicted.

        Where views are resampled, the only tile is the whole image.

        Parameters
        ----------
        source : image (H, W, C)
        scales, plan : of `scales` and `plan_source`

        Yields
        ------
        tile, and (height, width, K) float32 probabilities of its pixels
        """
        height, width, _ = source.shape
        if not self.is_tiled:
            for tile in chosen:
                yield tile, self._predict(source.read(0, 0, height, width), _ignore) / len(self._views)
            return
        depth, lost = plan.depth, border(plan.depth)
        passes: deque[tuple[Tile, Turn, tuple[int, int, int, int]]] = deque()

        def inputs() -> Iterator[Callable[[], NDArray]]:
            for tile in chosen:
                for view in self._views:
                    assert isinstance(view, Turn)
                    seen = view.onto_view(tile.top, tile.left, tile.bottom, tile.right, height, width)
                    begin = [start // 2**depth * 2**depth for start in seen[:2]]
                    sides = [
                        max(side, input_size(stop - start, depth))
                        for side, start, stop in zip(view.size(*plan.tile), begin, seen[2:])
                    ]
                    top, left = (start - lost for start in begin)
                    asked = view.onto_image(top, left, top + sides[0], left + sides[1], height, width)
                    inside = tuple(at - start for at, start in zip(seen, (*begin, *begin)))
                    passes.append((tile, view, inside))
                    yield functools.partial(_read_view, source, view, asked)

        total: NDArray[np.float32] | None = None
        was_training = self.model.training
        self.model.eval()
        try:
            for probabilities in self._predictions.tiles(_ahead(inputs()), scales):
                tile, view, (top, left, bottom, right) = passes.popleft()
                part = view.undo(probabilities[top:bottom, left:right], tile.bottom - tile.top, 0)
                total = part if total is None else total + part
                if view == self._views[-1]:
                    yield tile, total / np.float32(len(self._views)) if len(self._views) > 1 else total
                    total = None
                del probabilities, part
        finally:
            if was_training:
                self.model.train()

    def release(self) -> None:
        """Give back the memory that is kept for further tiles."""
        self._predictions.release()

    def _check_channels(self, shape: tuple[int, ...]) -> None:
        if shape[2] != self.model.in_channels:
            raise ValueError(
                f"the image has {shape[2]} channels (shape {shape}) and the model takes "
                f"{self.model.in_channels}; give images like those it was trained on"
            )

    def _is_one_image(self, image: Any) -> bool:
        return image.shape[2] <= 4 or image.shape[2] == self.model.in_channels

    def _predict(self, image: Any, progress: Callable[[float], None]) -> Any:
        """The sum over the views."""
        image = image if image.ndim == 3 else image[..., None]
        self._check_channels(image.shape)
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


def _read_view(source: "Source", view: Turn, asked: tuple[int, int, int, int]) -> NDArray:
    """What a view shows of a rectangle of an image, which is mirrored beyond its border."""
    height, width, _ = source.shape
    return view.turned(read_mirrored(source.read, height, width, *asked))


def _ahead(calls: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Make calls in their order, each in a thread while the result of that before is used."""
    with ThreadPoolExecutor(1) as thread:
        made: deque[Future[Result]] = deque()
        for call in calls:
            made.append(thread.submit(call))
            if len(made) == 2:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()


def _ignore(part: float) -> None:
    pass
