"""A figure at every threshold, and the best of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# 0, 0.1, ... accumulated in doubles, as the challenges' evaluation does; the last one is exactly 1, above
# every probability, so that the proposal there is empty.
THRESHOLDS: NDArray[np.float64] = np.append(np.cumsum([0.0] + [0.1] * 9), 1.0)
THRESHOLDS.flags.writeable = False


@dataclass(frozen=True)
class Curve:
    """A figure of merit (or an error) at every threshold.

    Attributes
    ----------
    thresholds : (T,) float64
        A pixel is foreground where its probability is greater.
    figures : (T,) float64
        The figure over all slices, pooled or averaged as the metric's definition says; NaN where it is
        undefined.
    slices : (N, T) float64
        The same figure of each slice alone; NaN where it is undefined.
    precision, recall : (T,) float64 or None
        Its two parts, where the figure is an F-score. Of the Rand and information figures, precision is the
        merge score (it falls when cells are merged) and recall the split score (Arganda-Carreras 2015, eqs.
        3-8).
    best : int
        Index of the best threshold, the lowest of equals.
    """

    thresholds: NDArray[np.float64]
    figures: NDArray[np.float64]
    slices: NDArray[np.float64]
    precision: NDArray[np.float64] | None
    recall: NDArray[np.float64] | None
    best: int

    @property
    def figure(self) -> float:
        """The figure at the best threshold."""
        return float(self.figures[self.best])

    @property
    def threshold(self) -> float:
        """The best threshold."""
        return float(self.thresholds[self.best])

    @property
    def per_slice(self) -> NDArray[np.float64]:
        """Each slice's figure at the stack's best threshold, (N,)."""
        return self.slices[:, self.best]


def index_of_best(figures: NDArray[np.float64], largest: bool) -> int:
    """Index of the first best figure; NaN never wins unless there is nothing else."""
    ranked = np.where(np.isnan(figures), -np.inf, figures if largest else -figures)
    return int(ranked.argmax())


def ratio(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64], empty: float
) -> NDArray[np.float64]:
    """Element-wise quotient, `empty` where the denominator is 0."""
    return np.where(denominator == 0, empty, numerator / np.where(denominator == 0, 1, denominator))
