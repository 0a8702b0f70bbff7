"""One step of training: forward, loss, backward, SGD; recorded and replayed where the device gains by it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastunet.optim import SGD
from fastunet.unet import UNet


class TrainingStep:
    """Teach a network one tile after another.

    On a device that repeats recorded work (CUDA graphs), the first tile of a size runs as it comes and the second is
    recorded: all memory of a step is then planned, and a step starts by one call and waits for nothing. Elsewhere the
    gradients of a layer are gone when the next one's are made: `UNet.gradients` shows nothing of them. Results are
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

    def __call__(self, image: Any, labels: Any, weights: Any) -> Callable[[], float]:
        """Start a step.

        Each of the three is an ndarray, which may change as soon as this returns, or an array on the network's device
        (anything with DLPack or the CUDA array interface), which may change after what the device has by then to do.

        Parameters
        ----------
        image : array
            (N, H, W, C) float32.
        labels, weights : array
            (N, H', W') as `UNet.loss` takes them.

        Returns
        -------
        callable
            Waits for the step and returns its loss; to be called before the step after the next is started. Raises
            ValueError as `fastunet.ops.softmax_cross_entropy`.
        """
        shape = tuple(image.shape)
        if not self._backend.repeats or shape not in self._seen:
            self._seen.add(shape)
            loss = float(self._step(image, labels, weights).array)
            return lambda: loss
        shapes = shape, tuple(labels.shape), tuple(weights.shape)
        if self._recorded is None or self._recorded[0] != shape:
            self._recorded = None  # its memory first
            first = _Recorded(self._model, self._step, shapes)
            second = _Recorded(self._model, self._step, shapes, beside=first.work)
            self._recorded = shape, (first, second)
        self._calls += 1
        return self._recorded[1][self._calls % 2].start(self._optimizer, image, labels, weights)

    def _step(self, image: Any, labels: Any, weights: Any) -> Any:
        if not self._backend.repeats:
            with self._optimizer.steps_as_gradients_are_made():
                loss = self._model.loss(image, labels, weights)
                loss.backward()
            return loss
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
        step: Callable[[Any, Any, Any], Any],
        shapes: Sequence[tuple[int, ...]],
        beside: Any = None,
    ) -> None:
        backend: Any = model.parameters().backend
        self._model = model
        self._inlets = [
            backend.inlet(shape, dtype) for shape, dtype in zip(shapes, (np.float32, np.int32, np.float32))
        ]
        views = [inlet.view for inlet in self._inlets]
        draws = model.draws
        self.work = backend.repeat(lambda: step(*views).array, beside)
        self._draws, model.draws = model.draws, draws
        self._wait: Callable[[], None] = lambda: None

    def start(self, optimizer: SGD, *tile: Any) -> Callable[[], float]:
        self._wait()
        for inlet, values in zip(self._inlets, tile):
            inlet.fill(values)
        self._model.draws += 1
        # A pass has two dropouts, each a draw of its own (UNet).
        steps = 2 * (self._model.draws - self._draws)
        self._wait = self.work.start(steps, optimizer.lr, optimizer.momentum)
        return self._loss

    def _loss(self) -> float:
        self._wait()
        return float(self.work.result)
