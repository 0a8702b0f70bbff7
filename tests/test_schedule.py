"""The learning rate warms up, stays, falls to nothing, and jumps nowhere."""

import numpy as np
import pytest

from fastunet.schedule import PLATEAU_END, learning_rate


@pytest.mark.parametrize("steps", [1, 7, 300, 2000, 12345])
def test_shape_of_a_run(steps):
    rates = np.array([learning_rate(1e-3, step, step / steps) for step in range(steps)])
    assert (rates > 0).all() and rates.max() <= 1e-3
    # No step changes the rate by more than the warm-up's slope or the cosine's steepest.
    slope = max(1 / min(200, max(1, steps / 10)), np.pi / 2 / (1 - PLATEAU_END) / steps)
    assert np.abs(np.diff(rates)).max(initial=0) <= 1e-3 * slope * 1.001
    assert learning_rate(1e-3, steps, 1.0) == 0
    if steps >= 2000:
        assert rates[0] == pytest.approx(1e-3 / 200)
        assert (rates[200 : int(PLATEAU_END * steps)] == 1e-3).all()
        assert (np.diff(rates[int(PLATEAU_END * steps) + 1 :]) < 0).all()


def test_warm_up_ends_with_a_tenth_of_a_short_run():
    assert learning_rate(2.0, 10, 0.1) == 2.0
    assert learning_rate(2.0, 9, 0.05) == pytest.approx(1.0)
