"""Stochastic gradient descent with momentum."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from fastunet.unet import UNet


class SGD:
    """SGD with momentum over all parameters of a network, in one pass, as `torch.optim.SGD`.

    buffer = momentum * buffer + gradient; value -= lr * buffer. The paper (section 3) uses momentum 0.99 with a batch
    of one large tile.

    Parameters
    ----------
    model : UNet
    lr : float
        Learning rate, changeable between steps.
    momentum : float
        0 <= momentum < 1.

    Raises
    ------
    ValueError
        If lr is not positive or momentum not in [0, 1).
    """

    def __init__(self, model: UNet, lr: float = 1e-3, momentum: float = 0.99) -> None:
        if not lr > 0:
            raise ValueError(f"a learning rate of {lr} was given; it must be more than 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"a momentum of {momentum} was given; 0 <= momentum < 1 is expected")
        self.lr = lr
        self.momentum = momentum
        self._parameters = model.parameters()
        self._momenta = self._parameters.backend.buffer(len(self._parameters.values_buffer))

    def step(self) -> None:
        """Update every parameter from its gradient."""
        parameters = self._parameters
        parameters.changed()
        parameters.backend.sgd_momentum(
            parameters.values_buffer, parameters.gradients_buffer, self._momenta, self.lr, self.momentum
        )

    def steps_as_gradients_are_made(self) -> AbstractContextManager[None]:
        """Within it a backward pass makes the step, each layer's as soon as its gradients are complete, and keeps none.

        The same step, without the memory of all gradients; every parameter must take part in the pass once.
        """
        return self._parameters.passing_on(self._update)

    def _update(self, place: slice, gradient: Any) -> None:
        parameters = self._parameters
        parameters.changed()
        parameters.backend.sgd_momentum(
            parameters.values_buffer[place], gradient, self._momenta[place], self.lr, self.momentum
        )

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        self._parameters.gradients_buffer[...] = 0

    def state_dict(self) -> dict[str, np.ndarray]:
        """Momentum buffers by parameter name, in PyTorch's layouts."""
        return self._parameters.to_dict(self._momenta)

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what `state_dict` gave.

        Raises
        ------
        ValueError
            If it belongs to another network.
        """
        self._parameters.from_dict(state, self._momenta)
