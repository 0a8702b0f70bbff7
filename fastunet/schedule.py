"""The learning rate over a run: a short warm-up, a plateau, and a cosine down to nothing.

At a constant rate and momentum 0.99 the weights keep wandering, and the score with them; letting the rate
fall to zero settles them, which is worth more than any average of late weights.
"""

import math

WARMUP_STEPS = 200
WARMUP_FRACTION = 0.1
PLATEAU_END = 0.4


def learning_rate(peak: float, step: int, fraction: float) -> float:
    """Learning rate of one step.

    Parameters
    ----------
    peak : float
        Rate on the plateau.
    step : int
        Steps made before this one, from 0.
    fraction : float
        Share of the run that is over, 0 to 1, in steps or in time, whichever the run is bounded by.

    Returns
    -------
    float
        `peak` times a linear warm-up over the first 200 steps (or tenth of a run shorter than 2000) and, once
        0.4 of the run is over, half a cosine from 1 to 0.
    """
    warmup = min(1.0, max((step + 1) / WARMUP_STEPS, fraction / WARMUP_FRACTION))
    descent = min(1.0, max(0.0, (fraction - PLATEAU_END) / (1 - PLATEAU_END)))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * descent))
