"""A checkpoint: everything a run needs to go on as if it had never stopped, in one safetensors file.

Sample i and the dropout of forward pass i are pure functions of the seed and i, so the random state is two
numbers. The file holds the tensors `model.NAME` and `momentum.NAME` and, as JSON in its metadata, the
`RunState`.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastunet.data.images import whole_file
from fastunet.errors import DataError

FORMAT = "fastunet-checkpoint"


@dataclass
class RunState:
    """Where a run stands after `step` steps.

    Attributes
    ----------
    step : int
        Optimiser steps made; also the index of the next training sample.
    seconds : float
        Wall time of training so far, validation included.
    draws : int
        Training-mode forward passes made: the counter of dropout.
    running_loss : float
        Mean loss, exponential with a horizon of 100 steps.
    best_score, best_step : float, int
        Best validation score so far (larger is better; a loss is negated) and its step, 0 before the first.
    scores : dict of str to float
        Figures of the latest validation.
    finished : bool
        Whether the run has made its last step.
    """

    step: int = 0
    seconds: float = 0.0
    draws: int = 0
    running_loss: float = 0.0
    best_score: float = -float("inf")
    best_step: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    finished: bool = False


@dataclass
class Checkpoint:
    """Weights and momentum by parameter name (float32, the model file's layouts), and the run's state."""

    weights: dict[str, np.ndarray]
    momentum: dict[str, np.ndarray]
    state: RunState

    def save(self, path: Path | str) -> None:
        """Write the file whole or not at all: a kill at any moment leaves the previous one."""
        tensors = {f"model.{name}": np.ascontiguousarray(array) for name, array in self.weights.items()}
        tensors |= {f"momentum.{name}": np.ascontiguousarray(array) for name, array in self.momentum.items()}
        metadata = {"format": FORMAT, "version": "1", "state": json.dumps(dataclasses.asdict(self.state))}
        with whole_file(path) as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: Path | str) -> "Checkpoint":
        """Read a checkpoint.

        Raises
        ------
        DataError
            If the file is missing, damaged or not a checkpoint of fastunet.
        """
        advice = "expected a checkpoint that fastunet.train wrote; name another run or start a new one"
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DataError(f"{path}: holds {metadata.get('format', 'no format name')!r}, {advice}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            state = RunState(**json.loads(metadata["state"]))
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}), {advice}") from error
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "momentum": {}}
        for name, array in tensors.items():
            part, _, parameter = name.partition(".")
            if part not in parts:
                raise DataError(f"{path}: holds a tensor {name!r}, {advice}")
            parts[part][parameter] = array
        return cls(parts["model"], parts["momentum"], state)
