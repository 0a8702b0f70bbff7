"""One step of training: forward, loss, backward, SGD; recorded and replayed where the device gains by it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fastunet.optim import SGD
from fastunet.unet import UNet


class TrainingStep:
    """Teach a network one tile after another.

    On a device that repeats recorded work (CUDA graphs), the first tile of a size runs as it comes and the second is
    recorded: all memory of a step is then planned, and a step starts by one call and waits for nothing. Results are
    bitwise those of the operations one by one.

    Parameters
    ----------
    model : UNet
        In training mode.
    optimizer : SGD
        Its lr and momentum at the time of a call are that step's.
    """

    def __init__(self, model: UNet, optimizer: SGD) -> None:
        self._model = model
        self._optimizer = optimizer
        self._backend: Any = model.parameters().backend
        self._seen: set[tuple[int, ...]] = set()
        self._recorded: tuple[tuple[int, ...], tuple[_Recorded, _Recorded]] | None = None
        self._calls = 0

    def __call__(self, image: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Callable[[], float]:
        """Start a step.

        Parameters
        ----------
        image : ndarray
            (N, H, W, C) float32.
        labels, weights : ndarray
            (N, H', W') as `UNet.loss` takes them.

        Returns
        -------
        callable
            Waits for the step and returns its loss; to be called before the step after the next is started. Raises
            ValueError as `fastunet.ops.softmax_cross_entropy`.
        """
        shape = image.shape
        if not self._backend.repeats or shape not in self._seen:
            self._seen.add(shape)
            loss = float(self._step(image, labels, weights).array)
            return lambda: loss
        if self._recorded is None or self._recorded[0] != shape:
            self._recorded = None  # its memory first
            first = _Recorded(self._model, self._step, image, labels, weights)
            second = _Recorded(self._model, self._step, image, labels, weights, beside=first.work)
            self._recorded = shape, (first, second)
        self._calls += 1
        return self._recorded[1][self._calls % 2].start(self._optimizer, image, labels, weights)

    def _step(self, image: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> Any:
        self._optimizer.zero_grad()
        loss = self._model.loss(image, labels, weights)
        loss.backward()
        self._optimizer.step()
        return loss


class _Recorded:
    """A step on arrays of its own; of two, one can be filled while the other is at work."""

    def __init__(
        self,
        model: UNet,
        step: Callable[[np.ndarray, np.ndarray, np.ndarray], Any],
        image: np.ndarray,
        labels: np.ndarray,
        weights: np.ndarray,
        beside: Any = None,
    ) -> None:
        backend: Any = model.parameters().backend
        self._model = model
        self._image = backend.host_array(image.shape, np.float32)
        self._labels = backend.host_array(labels.shape, np.int32)
        self._weights = backend.host_array(weights.shape, np.float32)
        draws = model.draws
        self.work = backend.repeat(lambda: step(self._image, self._labels, self._weights).array, beside)
        self._draws, model.draws = model.draws, draws
        self._wait: Callable[[], None] = lambda: None

    def start(
        self, optimizer: SGD, image: np.ndarray, labels: np.ndarray, weights: np.ndarray
    ) -> Callable[[], float]:
        self._wait()
        self._image[...], self._labels[...], self._weights[...] = image, labels, weights
        self._model.draws += 1
        # A pass has two dropouts, each a draw of its own (UNet).
        steps = 2 * (self._model.draws - self._draws)
        self._wait = self.work.start(steps, optimizer.lr, optimizer.momentum)
        return self._loss

    def _loss(self) -> float:
        self._wait()
        return float(self.work.result)
