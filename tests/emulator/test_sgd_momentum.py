"""kernels/sgd_momentum.cu against torch.optim.SGD in float64.

Gradients and values are of order one, at most about five: a few roundings of float32 of those are 2e-6.
"""

import math

import numpy as np
import pytest
import torch

from emulator.tensors import put_flat, run, to_bfloat16
from fastunet.backends.cuda import parameters


@pytest.mark.parametrize("where", ["argument", "device"])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("count", [1, 7, 16, 4096, 5003])
def test_two_steps(device, rng, count, bits, where):
    start = rng.standard_normal(count).astype(np.float32)
    parameter = torch.tensor(start.astype(np.float64), requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=0.99)
    value, momentum = put_flat(device, start), put_flat(device, np.zeros(count, np.float32))
    shadow = device.allocate(2 * count) if bits == 16 else None
    rates = put_flat(device, np.array([0.01, 0.99], np.float32)) if where == "device" else None
    numbers = (0.01, 0.99) if rates is None else (math.nan, math.nan)
    for _ in range(2):
        values = rng.standard_normal(count).astype(np.float32)
        gradient = put_flat(device, values)
        parameter.grad = torch.tensor(values.astype(np.float64))
        optimizer.step()
        arguments = parameters.SgdMomentumArguments(
            value.pointer,
            gradient.pointer,
            momentum.pointer,
            shadow and shadow.pointer,
            rates and rates.pointer,
            count,
            *numbers,
        )
        run(device, parameters.sgd_momentum(count), bits, arguments)
    found = device.download(value.pointer, (count,), np.float32)
    np.testing.assert_allclose(found, parameter.detach().numpy(), rtol=0, atol=2e-6)
    expected = optimizer.state[parameter]["momentum_buffer"].numpy()
    np.testing.assert_allclose(
        device.download(momentum.pointer, (count,), np.float32), expected, rtol=0, atol=2e-6
    )
    if shadow is not None:
        kept = device.download(shadow.pointer, (count,), np.uint16)
        np.testing.assert_array_equal(kept, to_bfloat16(found))
