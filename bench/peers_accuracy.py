"""How far fastunet's float32 is from PyTorch's float64, beside how far PyTorch's float32 is: logits and gradients.

Of logits the rms error over the standard deviation of float64's. Of gradients the rms error over the rms of each weight
and bias, and of these the median: ReLU and pooling choose otherwise wherever rounding tips a balance, so that some
gradients are off by far more than rounding in any float32.
"""

from collections.abc import Callable

import numpy as np
import peers_turns
from peers_engines import Task

Found = tuple[np.ndarray, dict[str, np.ndarray]]
"""Logits (1, K, H', W'), and gradients by the parameters' names."""


def fastunet(task: Task) -> Found:
    from fastunet import UNet, backends, no_grad

    backends.set_threads(task.threads)
    model = UNet.load(task.model, device="cpu")
    image, labels, weights = task.data()
    with no_grad():
        logits = model(image).numpy().transpose(0, 3, 1, 2)
    model.train().loss(image, labels, weights).backward()
    return logits, model.gradients()


def torch_float32(task: Task) -> Found:
    return _torch(task, "float32")


def torch_float64(task: Task) -> Found:
    return _torch(task, "float64")


def _torch(task: Task, dtype: str) -> Found:
    import peers_network
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(task.threads)
    network = peers_network.load(task.model, dtype=getattr(torch, dtype))
    image, labels, weights = (torch.tensor(values) for values in task.data())
    logits = network(image.permute(0, 3, 1, 2).to(getattr(torch, dtype)))
    (F.cross_entropy(logits, labels.long(), reduction="none") * weights).sum().div(weights.sum()).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in network.named_parameters()}  # type: ignore[union-attr]
    return logits.detach().numpy(), gradients


def accuracy(task: Task) -> dict[str, dict[str, float]]:
    """Errors of "logits" and "gradients" by engine."""
    exact_logits, exact = peers_turns.call(torch_float64, task)
    engines: dict[str, Callable[[Task], Found]] = {"fastunet": fastunet, "PyTorch": torch_float32}
    errors: dict[str, dict[str, float]] = {"logits": {}, "gradients": {}}
    for name, engine in engines.items():
        logits, gradients = peers_turns.call(engine, task)
        errors["logits"][name] = peers_turns.difference(logits, exact_logits)
        each = [_rms(gradients[key] - exact[key]) / _rms(exact[key]) for key in exact]
        errors["gradients"][name] = float(np.median(each))
    return errors


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
