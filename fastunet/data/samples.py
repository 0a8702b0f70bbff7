"""Training samples: every image prepared once, then warped tiles without end, computed ahead.

Sample i is a pure function of the training images, the seed and i, so a run that stops after k samples goes
on with sample k, whatever was computed ahead meanwhile, and by whom: threads, or a GPU (fastunet.data.samples_cuda).
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastunet.data.datasets import Dataset, Sample
from fastunet.data.separation import separate
from fastunet.data.warp import OFFSET, Warp, apply_warp, draw_warp
from fastunet.data.weight_map import PAPER2015, balanced_class_weights, count_classes, weight_map
from fastunet.errors import DataError
from fastunet.normalization import Normalization, normalize

DRAWS = 1000
IGNORED = 255


@dataclass(frozen=True)
class PreparedImage:
    """An annotated image as the loss sees it.

    Attributes
    ----------
    name : str
    image : (H, W, C) float32
        Normalised over the whole image, as at prediction.
    classes : (H, W) uint8
        Classes after gaps are cut between touching instances.
    weights : (H, W) float32
        The loss's weight map; exactly 0 where the truth is to be ignored.
    ignored : (H, W) bool or None
    """

    name: str
    image: np.ndarray
    classes: np.ndarray
    weights: np.ndarray
    ignored: np.ndarray | None = None


@dataclass(frozen=True)
class WeightSettings:
    """How the loss weighs pixels, as `weight_map` takes it: None is the preset's own."""

    w0: float | None = None
    sigma: float | None = None
    preset: str = PAPER2015


def separated_classes(sample: Sample, kind: str, width: int = 1) -> np.ndarray:
    """Classes (H, W) uint8 with a gap of background, `width` px each side, between touching instances.

    Where the truth is classes rather than objects (`kind` "classes"), regions of two classes that abut are
    meant to abut, and the classes are taken as they are.
    """
    if kind == "classes":
        return np.asarray(sample.classes, np.uint8)
    return np.where(separate(sample.instances, width) > 0, sample.classes, 0).astype(np.uint8)


def class_weights_of(dataset: Dataset, classes: Sequence[np.ndarray]) -> np.ndarray:
    """Balanced class weights over a whole data set, N / (K N_class) over the pixels that are not ignored.

    Parameters
    ----------
    dataset : Dataset
    classes : sequence of (H, W) uint8
        The separated classes of its samples.

    Returns
    -------
    (K,) float64
        0 for a class that is absent.
    """
    counts = np.zeros(dataset.num_classes, np.int64)
    for sample, labels in zip(dataset.samples, classes):
        counts += count_classes(labels, dataset.num_classes, sample.ignored)
    return balanced_class_weights(counts)


def prepare(
    dataset: Dataset,
    normalization: Normalization,
    weighting: WeightSettings | None = None,
    class_weights: Sequence[float] | np.ndarray | None = None,
    separation_width: int = 1,
    threads: int = 2,
    quiet: bool = False,
    stream: tuple[int, int] | None = None,
) -> tuple[list[PreparedImage], np.ndarray]:
    """Normalise, separate and weigh every image of a data set, in `threads` threads.

    Parameters
    ----------
    dataset : Dataset
    normalization : str or list of [offset, scale]
        As the model file records it.
    weighting : WeightSettings, optional
        Default: the paper's.
    class_weights : (K,), optional
        Default: balanced over this data set. Validation images take those of the training set.
    separation_width : int
        Pixels cut from each of two touching instances.
    threads : int
    quiet : bool
        Show no progress bar.
    stream : (int, int), optional
        As for `open_samples`; its GPU then computes the weights, to float32 rounding the same.

    Returns
    -------
    images : list of PreparedImage
        In the data set's order.
    class_weights : (K,) float64

    Raises
    ------
    DataError
        If an image cannot be normalised; the message names it.
    """
    weighting = weighting or WeightSettings()
    weigh_pixels = _weight_map_on(stream)
    with ThreadPoolExecutor(threads) as pool:
        classes = list(
            pool.map(
                lambda sample: separated_classes(sample, dataset.kind, separation_width), dataset.samples
            )
        )
        weights_of_classes = (
            class_weights_of(dataset, classes) if class_weights is None else np.asarray(class_weights, float)
        )

        def weigh(sample: Sample, labels: np.ndarray) -> PreparedImage:
            weights = weigh_pixels(
                sample.instances,
                mask=labels,
                w0=weighting.w0,
                sigma=weighting.sigma,
                class_weights=weights_of_classes if weighting.preset == PAPER2015 else None,
                ignore=sample.ignored,
                preset=weighting.preset,
            )
            try:
                image = normalize(sample.image, normalization)
            except ValueError as error:
                raise DataError(f"{sample.name}: {error}") from error
            return PreparedImage(sample.name, image, labels, weights, sample.ignored)

        prepared = tqdm(
            pool.map(weigh, dataset.samples, classes),
            desc="weight maps",
            total=len(dataset.samples),
            unit="image",
            leave=False,
            disable=quiet or None,
        )
        return list(prepared), weights_of_classes


def _weight_map_on(stream: tuple[int, int] | None) -> Callable[..., NDArray[np.float32]]:
    """`weight_map` on a GPU, or on a thread of the CPU where there is none or it cannot."""
    on_cpu = partial(weight_map, threads=1)
    if stream is None:
        return on_cpu
    try:
        from fastunet.data.launch_cuda import FAILURES
        from fastunet.data.weight_map_cuda import weight_map_of_host
    except ImportError:
        return on_cpu

    def either(labels: NDArray[np.integer], **options: Any) -> NDArray[np.float32]:
        try:
            return weight_map_of_host(stream[0], labels, **options)
        except FAILURES:
            return on_cpu(labels, **options)

    return either


@dataclass(frozen=True)
class TrainingSample:
    """One step's image (1, tile, tile, C) float32, labels (1, output, output) uint8, weights float32.

    Arrays of the host, or of a GPU (anything with the CUDA array interface): these hold the sample until the next one
    is asked for.
    """

    image: Any
    labels: Any
    weights: Any


class Samples(ABC):
    """Iterator over warped tiles, for ever, from sample `start` on; a context manager that ends what makes them.

    Every epoch shows each image once, in an order of its own. A tile without any weight is drawn again.

    Parameters
    ----------
    images : sequence of PreparedImage
    tile, output : int
        Sides of the network's input and output in pixels.
    seed : int
    start : int
        Index of the first sample.

    Raises
    ------
    DataError
        If no image has a pixel of positive weight; by `next`, if no tile with one is found.
    """

    def __init__(
        self, images: Sequence[PreparedImage], tile: int, output: int, seed: int = 0, start: int = 0
    ) -> None:
        # Weights are interpolated; a label of its own carries the ignored pixels through the warp unblurred.
        self._images = [
            image
            if image.ignored is None
            else replace(image, classes=np.where(image.ignored, np.uint8(IGNORED), image.classes))
            for image in images
            if image.weights.any()
        ]
        if not self._images:
            raise DataError(
                f"none of the {len(images)} training images has a pixel to learn from: all are ignored or of "
                f"weight 0; look at their labels and at --ignore"
            )
        # Grey offsets are drawn in standard deviations of the image, whatever its normalisation made of it.
        self._spread = [float(image.image.std()) for image in self._images]
        self._tile, self._output, self._seed = tile, output, seed
        self._next = start
        self._ahead: deque[Callable[[], TrainingSample]] = deque()

    def _draws(self, index: int) -> Iterator[tuple[int, Warp]]:
        """What makes sample `index`, on any device: an image and a warp, and the next until a tile has weight."""
        epoch, place = divmod(index, len(self._images))
        chosen = int(np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._images))[place])
        low, high = (bound * self._spread[chosen] for bound in OFFSET)
        shape = self._images[chosen].weights.shape
        for attempt in range(DRAWS):
            rng = np.random.default_rng([self._seed, 1, index, attempt])
            yield chosen, draw_warp(rng, shape, self._tile, self._output, offset=(low, high))
        raise DataError(
            f"{self._images[chosen].name}: {DRAWS} random tiles of {self._output} pixels held no pixel to learn from; "
            f"leave the image out or take a larger --tile"
        )

    @abstractmethod
    def sample(self, index: int) -> TrainingSample:
        """Compute sample `index`, whatever was computed before."""

    @abstractmethod
    def _begin(self, index: int) -> Callable[[], TrainingSample]:
        """Begin to compute sample `index`; what is returned waits for it."""

    def _begin_next(self) -> None:
        self._ahead.append(self._begin(self._next))
        self._next += 1

    def __iter__(self) -> "Samples":
        return self

    def __next__(self) -> TrainingSample:
        sample = self._ahead.popleft()()
        self._begin_next()
        return sample

    @abstractmethod
    def close(self) -> None:
        """End what computes; samples computed ahead are dropped."""

    def __enter__(self) -> "Samples":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class HostSamples(Samples):
    """`Samples` made by background threads; up to four for each wait ready."""

    def __init__(
        self,
        images: Sequence[PreparedImage],
        tile: int,
        output: int,
        seed: int = 0,
        start: int = 0,
        threads: int = 1,
    ) -> None:
        super().__init__(images, tile, output, seed, start)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="augmentation")
        for _ in range(4 * threads):
            self._begin_next()

    def _begin(self, index: int) -> Callable[[], TrainingSample]:
        return self._pool.submit(self.sample, index).result

    def sample(self, index: int) -> TrainingSample:
        for chosen, warp in self._draws(index):
            prepared = self._images[chosen]
            image, labels, weights = apply_warp(prepared.image, prepared.classes, prepared.weights, warp)
            if prepared.ignored is not None:
                weights[labels == IGNORED] = 0
                labels[labels == IGNORED] = 0
            if weights.any():
                break
        return TrainingSample(image[None], labels[None], weights[None])

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def open_samples(
    images: Sequence[PreparedImage],
    tile: int,
    output: int,
    seed: int = 0,
    start: int = 0,
    threads: int = 1,
    stream: tuple[int, int] | None = None,
    room: int = 0,
    notify: Callable[[str], None] = print,
) -> Samples:
    """`Samples` made where they are read: by threads of the CPU, or on a GPU (fastunet.data.samples_cuda).

    Parameters
    ----------
    images, tile, output, seed, start
        As for `Samples`.
    threads : int
        Of the CPU.
    stream : (int, int), optional
        Number of the GPU that reads them, and address of its stream on which it does.
    room : int
        Bytes of its memory that images and samples may take.
    notify : callable
        Is told why the CPU makes the samples for a GPU, where that is so.
    """
    if stream is not None:
        try:
            from fastunet.data.samples_cuda import DeviceSamples

            return DeviceSamples(images, tile, output, seed, start, *stream, room)
        except (ImportError, MemoryError) as error:
            notify(f"the CPU warps the training samples: {error}")
    return HostSamples(images, tile, output, seed, start, threads)
