"""Every operation, forward and backward, against PyTorch in float64 (over CUDA kernels: emulator/test_table.py).

Errors are relative to the largest reference value. float32 sums of n products err by about sqrt(n) * 6e-8 of it;
Winograd F(4x4) by some ten times a direct sum. The bound of 1e-5 leaves both a factor of two at 512 channels.
Where activations are bfloat16, inputs and weights are rounded to it before both compute: then only the result's own
rounding is left, half a unit in the last of 8 bits.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastunet import backends, ops
from fastunet.autograd import Tensor, no_grad
from fastunet.parameters import Parameter, ParameterSet

TOLERANCE = {32: 1e-5, 16: 2**-8 + 1e-5}


@pytest.fixture
def backend():
    return backends.load("cpu")


@pytest.fixture(params=["direct", "winograd2", "winograd4", "winograd6"])
def algorithm(request, monkeypatch, backend):
    """The CPU's ways to a 3x3 convolution; tiles of 6 x 6 lose a digit, which is why nobody gets them unasked."""
    monkeypatch.setattr(backend, "algorithm", request.param)
    if request.param == "winograd6":
        monkeypatch.setitem(TOLERANCE, 32, 1e-4)


def activation_bits(backend) -> int:
    return getattr(backend, "bits", 32)


def rounded(backend, values: np.ndarray) -> np.ndarray:
    """(N, H, W, C) values as the backend's activations can hold them."""
    return backend.numpy(backend.array(values))


def normal(backend, rng, shape) -> np.ndarray:
    return rounded(backend, rng.standard_normal(shape))


def parameters(backend, rng, kind, outputs, inputs, side) -> tuple[Parameter, Parameter]:
    channels = (sum(inputs), outputs) if kind == "upconv" else (outputs, sum(inputs))
    both = ParameterSet(
        backend, {"w": (kind, (*channels, side, side), inputs), "b": ("bias", (outputs,), ())}
    )
    both["w"].assign(normal(backend, rng, both["w"].shape))
    both["b"].assign(rng.standard_normal(outputs))
    return both["w"], both["b"]


def to_torch(values: np.ndarray) -> torch.Tensor:
    """NHWC float32 -> NCHW float64 that wants a gradient."""
    return torch.tensor(values.astype(np.float64)).permute(0, 3, 1, 2).contiguous().requires_grad_()


def to_numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().permute(0, 2, 3, 1).numpy()


def weight_to_torch(parameter: Parameter) -> torch.Tensor:
    return torch.tensor(parameter.numpy().astype(np.float64), requires_grad=True)


def assert_close(
    found: np.ndarray,
    expected: np.ndarray,
    what: str,
    bits: int = 32,
    roundings: int = 1,
    typical: float = 0.0,
) -> None:
    """`typical`: what a sum of such terms comes to, for sums so few that all of them may happen to be almost 0."""
    assert found.shape == expected.shape, what
    scale = max(np.abs(expected).max(), typical) or 1.0
    error = np.abs(found - expected).max() / scale
    assert error <= roundings * TOLERANCE[bits], f"{what}: relative error {error:.2e}"


def typical_sum(terms: np.ndarray) -> float:
    """Of (N, H, W, C) terms over all pixels: the root of the sum of their squares, of the largest channel."""
    return float(np.sqrt((terms.astype(np.float64) ** 2).sum((0, 1, 2)).max()))


def poison(backend, shape) -> None:
    """Leave not-a-numbers in the memory that the next arrays of this shape will get."""
    held = [backend.array(np.full(shape, np.nan, np.float32)) for _ in range(3)]
    del held


CONVOLUTIONS = [
    # images, height, width, channels of x, of the skip (0: none), outputs, ReLU
    (
        8,
        3,
        3,
        1,
        0,
        1,
        False,
    ),  # one output pixel, often enough that the largest is not itself a rounding error
    (1, 3, 40, 2, 0, 16, True),
    (1, 7, 9, 1, 0, 16, True),
    (2, 20, 33, 3, 0, 24, True),
    (1, 9, 17, 2, 0, 48, True),
    (1, 31, 12, 4, 4, 7, True),
    (1, 40, 37, 16, 0, 64, True),
    (3, 11, 13, 16, 16, 16, False),
    (1, 25, 31, 40, 24, 48, True),
    (1, 66, 66, 64, 64, 32, True),
    (1, 14, 15, 512, 0, 512, False),
    (1, 8, 8, 16, 1008, 33, True),
    (1, 242, 250, 16, 0, 16, True),  # tiles enough for sums in slots
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.usefixtures("algorithm")
def test_conv3x3(backend, rng, case):
    check_conv3x3(backend, rng, case)


def check_conv3x3(backend, rng, case) -> None:
    bits = activation_bits(backend)
    images, height, width, channels, skip_channels, outputs, relu = case
    inputs = (skip_channels, channels) if skip_channels else (channels,)
    weight, bias = parameters(backend, rng, "conv", outputs, inputs, 3)
    x_values = normal(backend, rng, (images, height, width, channels))
    x = Tensor.from_numpy(x_values, backend, requires_gradient=True)
    torch_x = joined = to_torch(x_values)
    skip = None
    if skip_channels:
        skip_values = normal(backend, rng, (images, height + 5, width + 2, skip_channels))
        skip = Tensor.from_numpy(skip_values, backend, requires_gradient=True)
        torch_skip = to_torch(skip_values)
        joined = torch.cat([torch_skip[:, :, 2 : 2 + height, 1 : 1 + width], torch_x], 1)
    torch_weight, torch_bias = weight_to_torch(weight), weight_to_torch(bias)
    expected = F.conv2d(joined, torch_weight, torch_bias)
    poison(backend, expected.shape[:1] + expected.shape[2:] + expected.shape[1:2])

    y = ops.conv3x3(x, weight, bias, relu=relu, skip=skip)
    found = y.numpy()
    assert_close(found, to_numpy(F.relu(expected) if relu else expected), "forward", bits)

    gradient = normal(backend, rng, found.shape)
    before = rng.standard_normal(weight.shape)
    weight.assign(before, weight.gradient)
    bias.assign(np.zeros(bias.shape), bias.gradient)
    poison(backend, (images, height, width, channels))
    poison(backend, (images, height + 2, width + 2, outputs))  # the gradient within its border of zeros
    y.backward(gradient)
    # The ReLU's mask is taken from our own rounding: where float64 has the other sign of almost zero, a gradient
    # present in one and absent in the other says nothing about the kernel.
    expected.backward(to_torch(gradient * (found > 0) if relu else gradient).detach())
    assert_close(x.gradient, to_numpy(torch_x.grad), "data gradient", bits)
    if skip is not None:
        assert_close(skip.gradient, to_numpy(torch_skip.grad), "skip gradient", bits)
    assert_close(weight.numpy(weight.gradient), torch_weight.grad.numpy() + before, "weight gradient, added")
    typical = typical_sum(gradient)
    assert_close(bias.numpy(bias.gradient), torch_bias.grad.numpy(), "bias gradient", typical=typical)


def check_one_input(backend, rng, operation, reference, kind, side, case) -> None:
    images, height, width, channels, outputs = case
    weight, bias = parameters(backend, rng, kind, outputs, (channels,), side)
    bits = activation_bits(backend)
    values = normal(backend, rng, (images, height, width, channels))
    x, torch_x = Tensor.from_numpy(values, backend, requires_gradient=True), to_torch(values)
    torch_weight, torch_bias = weight_to_torch(weight), weight_to_torch(bias)
    expected = reference(torch_x, torch_weight, torch_bias)
    poison(backend, (images, *expected.shape[2:], outputs))
    y = operation(x, weight, bias)
    assert_close(y.numpy(), to_numpy(expected), "forward", bits)
    gradient = normal(backend, rng, y.shape)
    poison(backend, values.shape)
    y.backward(gradient)
    expected.backward(to_torch(gradient).detach())
    assert_close(x.gradient, to_numpy(torch_x.grad), "data gradient", bits)
    assert_close(weight.numpy(weight.gradient), torch_weight.grad.numpy(), "weight gradient")
    typical = typical_sum(gradient)
    assert_close(bias.numpy(bias.gradient), torch_bias.grad.numpy(), "bias gradient", typical=typical)


@pytest.mark.parametrize(
    "case", [(1, 1, 1, 1, 1), (2, 5, 3, 16, 8), (1, 9, 30, 33, 17), (1, 12, 12, 256, 128)]
)
def test_upconv2x2(backend, rng, case):
    check_upconv2x2(backend, rng, case)


def check_upconv2x2(backend, rng, case) -> None:
    reference = functools.partial(F.conv_transpose2d, stride=2)
    check_one_input(backend, rng, ops.upconv2x2, reference, "upconv", 2, case)


COMPOSED = [
    # images, height, width, channels of x, between, of the skip, outputs, pixels that the skip is larger
    (1, 2, 2, 16, 16, 16, 16, 0),
    (2, 8, 9, 32, 16, 16, 16, 4),
    (1, 13, 7, 40, 20, 17, 33, 5),
    (1, 12, 31, 5, 3, 2, 7, 2),
    (1, 6, 11, 256, 128, 128, 128, 8),
    (1, 26, 17, 512, 256, 256, 256, 0),  # too many transformed weights for a cache
]


@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_upconv2x2_conv3x3(backend, rng, case, monkeypatch):
    """As one linear map, where nothing is recorded; and again after a value has changed."""
    images, height, width, inputs, middle, skips, outputs, beyond = case
    monkeypatch.setattr(type(backend.composition), "pays", lambda *arguments: True)
    shapes = {
        "up.weight": ("upconv", (inputs, middle, 2, 2), (inputs,)),
        "up.bias": ("bias", (middle,), ()),
        "weight": ("conv", (outputs, skips + middle, 3, 3), (skips, middle)),
        "bias": ("bias", (outputs,), ()),
    }
    layers = ParameterSet(backend, shapes)
    values = rng.standard_normal((images, height, width, inputs)).astype(np.float32)
    skip_values = rng.standard_normal((images, 2 * height + beyond, 2 * width + beyond, skips)).astype(
        np.float32
    )
    x, skip = (Tensor.from_numpy(v, backend) for v in (values, skip_values))
    first = beyond // 2
    cropped = skip_values[:, first : first + 2 * height, first : first + 2 * width]
    for _ in range(2):
        for parameter in layers.values():
            parameter.assign(rng.standard_normal(parameter.shape))
        poison(backend, (images, 2 * height - 2, 2 * width - 2, outputs))
        with no_grad(), monkeypatch.context() as patched:
            patched.setattr(type(backend), "upconv2x2_forward", None)  # nobody calls it
            found = ops.upconv2x2_conv3x3(x, skip, *layers.values())
        up_weight, up_bias, weight, bias = map(weight_to_torch, layers.values())
        up = F.conv_transpose2d(to_torch(values), up_weight, up_bias, stride=2)
        expected = F.relu(F.conv2d(torch.cat([to_torch(cropped), up], 1), weight, bias))
        assert_close(found.numpy(), to_numpy(expected), "output")


def test_upconv2x2_conv3x3_records_the_two(backend, rng):
    """Whoever may want gradients gets them."""
    shapes = {
        "up.weight": ("upconv", (32, 16, 2, 2), (32,)),
        "up.bias": ("bias", (16,), ()),
        "weight": ("conv", (16, 32, 3, 3), (16, 16)),
        "bias": ("bias", (16,), ()),
    }
    layers = ParameterSet(backend, shapes)
    for parameter in layers.values():
        parameter.assign(rng.standard_normal(parameter.shape))
    up_layer, layer = list(layers.values())[:2], list(layers.values())[2:]
    values = [rng.standard_normal(shape).astype(np.float32) for shape in ((1, 20, 21, 32), (1, 40, 42, 16))]
    gradient = rng.standard_normal((1, 38, 40, 16)).astype(np.float32)
    results = []
    for together in (True, False):
        x, skip = (Tensor.from_numpy(v, backend, requires_gradient=True) for v in values)
        if together:
            y = ops.upconv2x2_conv3x3(x, skip, *layers.values())
        else:
            y = ops.conv3x3(ops.upconv2x2(x, *up_layer), *layer, relu=True, skip=skip)
        y.backward(gradient)
        results.append((y.numpy(), x.gradient, skip.gradient))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    with no_grad():
        composed = ops.upconv2x2_conv3x3(x, skip, *layers.values()).numpy()
        assert (composed != results[0][0]).any()  # by another way
        for wrong in (Tensor.from_numpy(np.zeros((1, 40, 42, 15)), backend), x):
            with pytest.raises(ValueError, match="channels|twice as large"):
                ops.upconv2x2_conv3x3(x, wrong, *layers.values())
        small = Tensor.from_numpy(np.zeros((1, 39, 42, 16)), backend)
        with pytest.raises(ValueError, match="a skip at least twice as large"):
            ops.upconv2x2_conv3x3(x, small, *layers.values())


def test_layers_are_composed_where_that_is_less_work(backend, monkeypatch):
    def pays(channels: int) -> bool:
        return backend.composition.pays((2 * channels,), (channels, channels), channels)

    assert [pays(channels) for channels in (8, 15, 16, 64, 256, 512)] == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]
    monkeypatch.setattr(backend, "algorithm", "direct")
    assert not pays(64)


@pytest.mark.parametrize("case", [(1, 1, 1, 1, 2), (2, 7, 5, 20, 3), (1, 44, 31, 64, 2), (1, 6, 6, 16, 40)])
def test_conv1x1(backend, rng, case):
    check_one_input(backend, rng, ops.conv1x1, F.conv2d, "conv", 1, case)


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (2, 3, 5, 3), (1, 17, 9, 16), (1, 10, 12, 40)], ids=str)
def test_maxpool2x2(backend, rng, shape):
    values = rng.integers(-2, 3, shape).astype(np.float32)  # ties everywhere
    x, torch_x = Tensor.from_numpy(values, backend, requires_gradient=True), to_torch(values)
    poison(backend, shape)
    y, expected = ops.maxpool2x2(x), F.max_pool2d(torch_x, 2)
    np.testing.assert_array_equal(y.numpy(), to_numpy(expected))
    gradient = normal(backend, rng, y.shape)
    poison(backend, shape)
    y.backward(gradient)
    expected.backward(to_torch(gradient).detach())
    np.testing.assert_array_equal(x.gradient, to_numpy(torch_x.grad).astype(np.float32))


def test_maxpool2x2_adds_to_a_gradient_that_is_there(backend, rng):
    x = Tensor.from_numpy(rng.standard_normal((2, 7, 8, 20)), backend, requires_gradient=True)
    gradients = [normal(backend, rng, (2, 3, 4, 20)) for _ in range(2)]
    ops.maxpool2x2(x).backward(gradients[0])
    first = x.gradient
    ops.maxpool2x2(x).backward(gradients[1])
    alone = Tensor.from_numpy(x.numpy(), backend, requires_gradient=True)
    ops.maxpool2x2(alone).backward(gradients[1])
    np.testing.assert_array_equal(x.gradient, rounded(backend, first + alone.gradient))


@pytest.mark.parametrize("size", [(1, 8, 8, 1, 1), (2, 12, 10, 5, 20), (1, 21, 16, 16, 16)], ids=str)
@pytest.mark.usefixtures("algorithm")
def test_conv3x3_maxpool2x2_is_the_two_one_after_the_other(backend, rng, size):
    """Down, up again and beside the skip: the convolution's result is used twice, once by its centre.

    Of a large image of few channels, computed in two ways, rounding may have another pixel win a pooling.
    """
    images, height, width, channels, outputs = size
    values = rng.standard_normal((images, height, width, channels)).astype(np.float32)
    first = parameters(backend, rng, "conv", outputs, (channels,), 3)
    first[1].assign(np.abs(first[1].numpy()))  # one draw in a hundred of a single output is 0 at every pixel
    up = parameters(backend, rng, "upconv", 4, (outputs,), 2)
    last = parameters(backend, rng, "conv", 5, (outputs, 4), 3)

    def run(fused: bool) -> list[np.ndarray]:
        x = Tensor.from_numpy(values, backend, requires_gradient=True)
        if fused:
            y, pooled = ops.conv3x3_maxpool2x2(x, *first)
        else:
            y = ops.conv3x3(x, *first, relu=True)
            pooled = ops.maxpool2x2(y)
        out = ops.conv3x3(ops.upconv2x2(pooled, *up), *last, skip=y)
        for parameter in (*first, *up, *last):
            parameter.assign(np.zeros(parameter.shape), parameter.gradient)
        gradient = np.random.default_rng(images).standard_normal(out.shape).astype(np.float32)
        out.backward(gradient)
        gradients = [parameter.numpy(parameter.gradient) for parameter in (*first, *up, *last)]
        return [y.numpy(), pooled.numpy(), out.numpy(), x.gradient, *gradients]

    for number, (found, expected) in enumerate(zip(run(True), run(False), strict=True)):
        assert np.abs(expected).max() > 0
        assert_close(found, expected, f"value {number}", activation_bits(backend))


@pytest.mark.parametrize("size", [(1, 10, 13, 5, 5), (2, 15, 18, 20, 17), (1, 29, 22, 16, 48)], ids=str)
@pytest.mark.parametrize("read", ["pooled", "centre", "both", "centre twice and pooled"])
@pytest.mark.usefixtures("algorithm")
def test_conv3x3_maxpool2x2_of_which_only_the_centre_is_kept(backend, rng, size, read):
    """Whichever of its results are read; ReLU and pooling choose as they did here, for rounding may turn a choice."""
    images, height, width, channels, outputs = size
    values = rng.standard_normal((images, height, width, channels)).astype(np.float32)
    centre = tuple(2 * ((side - 2) // 2 - 2) for side in (height, width))  # what comes up again
    first = parameters(backend, rng, "conv", outputs, (channels,), 3)
    below = parameters(backend, rng, "conv", outputs, (outputs,), 3)
    up = parameters(backend, rng, "upconv", 4, (outputs,), 2)
    last = parameters(backend, rng, "conv", 5, (outputs, 4), 3)
    learned = (*first, *below, *up, *last)
    beside_values = rng.standard_normal((images, *centre, 4)).astype(np.float32)
    skip_values = rng.standard_normal((images, *centre, outputs)).astype(np.float32)

    x = Tensor.from_numpy(values, backend, requires_gradient=True)
    with no_grad():
        whole = ops.conv3x3(x, *first, relu=True).numpy()
    poison(backend, whole.shape)
    y, pooled = ops.conv3x3_maxpool2x2(x, *first, (centre[0] + 1, centre[1] + 2))
    assert y.shape == whole.shape
    beside = beside_alone = Tensor.from_numpy(beside_values, backend)
    if "pooled" in read or read == "both":
        beside = ops.upconv2x2(ops.conv3x3(pooled, *below), *up)
    out = ops.conv3x3(beside, *last, skip=Tensor.from_numpy(skip_values, backend) if read == "pooled" else y)
    if "twice" in read:
        out = ops.add(out, ops.conv3x3(beside_alone, *last, skip=y))
    gradient = rng.standard_normal(out.shape).astype(np.float32)
    for parameter in learned:
        parameter.assign(np.zeros(parameter.shape), parameter.gradient)
    poison(backend, (images, height + 2, width + 2, outputs))  # the gradient within its border of zeros
    out.backward(gradient)

    torch_x, torch_learned = to_torch(values), [weight_to_torch(parameter) for parameter in learned]
    torch_whole = to_torch(whole).detach()
    torch_y = F.conv2d(torch_x, *torch_learned[:2]) * (torch_whole > 0)
    winners = F.max_pool2d(torch_whole, 2, return_indices=True)[1]
    torch_pooled = torch_y.flatten(2).gather(2, winners.flatten(2)).view(winners.shape)
    torch_beside = torch_beside_alone = to_torch(beside_values)
    if "pooled" in read or read == "both":
        convolved = F.conv2d(torch_pooled, *torch_learned[2:4])
        torch_beside = F.conv_transpose2d(convolved, *torch_learned[4:6], stride=2)
    top, left = ((side - read) // 2 for side, read in zip(whole.shape[1:3], centre, strict=True))
    skip = torch_y[:, :, top : top + centre[0], left : left + centre[1]]
    skip = to_torch(skip_values) if read == "pooled" else skip
    expected = F.conv2d(torch.cat([skip, torch_beside], 1), *torch_learned[6:])
    if "twice" in read:
        expected = expected + F.conv2d(torch.cat([skip, torch_beside_alone], 1), *torch_learned[6:])
    expected.backward(to_torch(gradient).detach())

    def check(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
        assert_close(found, wanted, what, roundings=4)  # as many operations one after the other

    check(out.numpy(), to_numpy(expected), "forward")
    check(x.gradient, to_numpy(torch_x.grad), "data gradient")
    for number, (parameter, reference) in enumerate(zip(learned, torch_learned, strict=True)):
        wanted = np.zeros(reference.shape) if reference.grad is None else reference.grad.numpy()
        check(parameter.numpy(parameter.gradient), wanted, f"gradient of parameter {number}")


READERS = ("loss", "dropout", "conv", "beside a skip", "skip", "upconv", "conv1x1", "pooling")


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize(
    ("readers", "relu"),
    [
        *(((reader,), relu) for reader in READERS for relu in (True, False)),
        *((pair, True) for pair in itertools.combinations(READERS, 2)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("algorithm")
def test_gradient_of_what_others_read(backend, rng, readers, channels, relu):
    """Some give the gradient of a ReLU's output masked by it, others do not; few channels are computed when read."""
    height, width = (
        (62, 45) if channels == 3 and len(readers) == 1 else (15, 14)
    )  # more than a patch of tiles
    outputs = 40
    values = rng.standard_normal((2, height, width, channels)).astype(np.float32)
    first = parameters(backend, rng, "conv", outputs, (channels,), 3)
    alone = parameters(backend, rng, "conv", 4, (outputs,), 3)
    beside = parameters(backend, rng, "conv", 4, (5, outputs), 3)
    as_skip = parameters(backend, rng, "conv", 4, (outputs, 5), 3)
    up = parameters(backend, rng, "upconv", 3, (outputs,), 2)
    head = parameters(backend, rng, "conv", 3, (outputs,), 1)
    for weight, _ in (first, alone, beside, as_skip, up, head):
        # Logits near 1: by a softmax that is all but certain rounding would grow as they do.
        weight.assign(weight.numpy() / np.sqrt(weight.numpy()[0].size))
    skip_values = rng.standard_normal((2, height, width, 5)).astype(np.float32)
    x_values = rng.standard_normal((2, height - 6, width - 7, 5)).astype(np.float32)

    with no_grad():  # ReLU, pooling and dropout choose as they do here
        whole = ops.conv3x3(Tensor.from_numpy(values, backend), *first, relu=relu).numpy()
        kept = ops.dropout(Tensor.from_numpy(np.ones_like(whole), backend), 0.5, 1, 2).numpy()
    x = Tensor.from_numpy(values, backend, requires_gradient=True)
    y = ops.conv3x3(x, *first, relu=relu)
    read = {
        "conv": lambda: ops.conv3x3(y, *alone),
        "beside a skip": lambda: ops.conv3x3(y, *beside, skip=Tensor.from_numpy(skip_values, backend)),
        "skip": lambda: ops.conv3x3(Tensor.from_numpy(x_values, backend), *as_skip, skip=y),
        "upconv": lambda: ops.upconv2x2(y, *up),
        "conv1x1": lambda: ops.conv1x1(y, *head),
        "pooling": lambda: ops.maxpool2x2(y),
        "dropout": lambda: ops.dropout(y, 0.5, 1, 2),
        "loss": lambda: y,
    }
    torch_x, torch_first = to_torch(values), [weight_to_torch(parameter) for parameter in first]
    torch_y = F.conv2d(torch_x, *torch_first)
    if relu:
        torch_y = torch_y * (to_torch(whole).detach() > 0)
    winners = F.max_pool2d(to_torch(whole).detach(), 2, return_indices=True)[1]
    skip, centre = to_torch(skip_values)[:, :, 1:-1, 1:-1], torch_y[:, :, 2:-2, 2:-3]
    torch_alone, torch_beside, torch_as_skip, torch_up, torch_head = (
        [weight_to_torch(parameter) for parameter in layer] for layer in (alone, beside, as_skip, up, head)
    )
    torch_read = {
        "conv": lambda: F.conv2d(torch_y, *torch_alone),
        "beside a skip": lambda: F.conv2d(torch.cat([skip, torch_y], 1), *torch_beside),
        "skip": lambda: F.conv2d(torch.cat([centre, to_torch(x_values)], 1), *torch_as_skip),
        "upconv": lambda: F.conv_transpose2d(torch_y, *torch_up, stride=2),
        "conv1x1": lambda: F.conv2d(torch_y, *torch_head),
        "pooling": lambda: torch_y.flatten(2).gather(2, winners.flatten(2)).view(winners.shape),
        "dropout": lambda: torch_y * to_torch(kept).detach(),
        "loss": lambda: torch_y,
    }
    losses, torch_losses = [], []
    for reader in readers:
        found = read[reader]()
        labels = rng.integers(0, found.shape[3], found.shape[:3])
        losses.append(ops.softmax_cross_entropy(found, labels, np.ones(labels.shape)))
        torch_losses.append(F.cross_entropy(torch_read[reader](), torch.tensor(labels)))
    for parameter in first:
        parameter.assign(np.zeros(parameter.shape), parameter.gradient)
    functools.reduce(ops.add, losses).backward()
    sum(torch_losses).backward()
    assert_close(x.gradient, to_numpy(torch_x.grad), "data gradient", roundings=2)
    for parameter, reference in zip(first, torch_first, strict=True):
        found = parameter.numpy(parameter.gradient)
        assert_close(found, reference.grad.numpy(), "gradient of a parameter", roundings=4)


@pytest.mark.usefixtures("algorithm")
def test_what_is_not_kept_cannot_be_read(backend, rng):
    weight, bias = parameters(backend, rng, "conv", 20, (6,), 3)
    x = Tensor.from_numpy(rng.standard_normal((1, 12, 13, 6)), backend, requires_gradient=True)
    y, pooled = ops.conv3x3_maxpool2x2(x, weight, bias, (4, 5))
    whole = ops.conv3x3(x, weight, bias, relu=True)
    said = r"\(1, 10, 11, 20\) only the centre of 4 x 5 pixels was kept, and {} x {} were asked for"
    with pytest.raises(ValueError, match=said.format(10, 11)):
        y.numpy()
    for operation in (ops.maxpool2x2, ops.softmax, lambda y: ops.dropout(y, 0.5, 1, 2)):
        with pytest.raises(ValueError, match=said.format(10, 11)):
            operation(y)
    last = parameters(backend, rng, "conv", 5, (20, 1), 3)
    for beside in ((4, 6), (5, 5)):
        with pytest.raises(ValueError, match=said.format(*beside)):
            ops.conv3x3(Tensor.from_numpy(np.zeros((1, *beside, 1)), backend), *last, skip=y)
    np.testing.assert_array_equal(pooled.numpy(), ops.maxpool2x2(whole).numpy())
    with pytest.raises(ValueError, match=said.format(10, 11)):
        y.backward(np.ones(y.shape))  # whose mask is not there
    for kept in ((0, 5), (4, 0), (11, 5), (4, 12)):
        with pytest.raises(
            ValueError, match=f"the centre to be kept, {kept[0]} x {kept[1]} pixels, is not within"
        ):
            ops.conv3x3_maxpool2x2(x, weight, bias, kept)


@pytest.mark.parametrize("case", [(1, 1, 1, 1, 2), (2, 9, 7, 16, 2), (1, 6, 13, 20, 5)], ids=str)
def test_head_cross_entropy_is_the_two_one_after_the_other(backend, rng, case):
    images, height, width, channels, classes = case
    values = rng.standard_normal((images, height, width, channels)).astype(np.float32)
    weight, bias = parameters(backend, rng, "conv", classes, (channels,), 1)
    labels = rng.integers(0, classes, (images, height, width))
    weights = rng.random(labels.shape).astype(np.float32) + 0.1
    factor = float(rng.uniform(0.5, 2))

    def run(loss_of) -> tuple[float, list[np.ndarray]]:
        x = Tensor.from_numpy(values, backend, requires_gradient=True)
        loss = loss_of(x)
        before = [np.full(parameter.shape, 0.5, np.float32) for parameter in (weight, bias)]
        for parameter, start in zip((weight, bias), before):
            parameter.assign(start, parameter.gradient)
        loss.backward(factor)
        return float(loss), [x.gradient, weight.numpy(weight.gradient), bias.numpy(bias.gradient)]

    found, gradients = run(lambda x: ops.head_cross_entropy(x, weight, bias, labels, weights))
    expected, wanted = run(lambda x: ops.softmax_cross_entropy(ops.conv1x1(x, weight, bias), labels, weights))
    assert found == pytest.approx(expected, rel=1e-6)
    # One pass rounds its gradient before and after it is multiplied, two passes once.
    assert_close(gradients[0], wanted[0], "data gradient", activation_bits(backend), roundings=3)
    for gradient, reference in zip(gradients[1:], wanted[1:], strict=True):
        assert_close(gradient, reference, "gradient of a parameter")
    with no_grad():
        x = Tensor.from_numpy(values, backend)
        assert float(ops.head_cross_entropy(x, weight, bias, labels, weights)) == pytest.approx(
            expected, rel=1e-6
        )
    with pytest.raises(ValueError, match="labels have shape"):
        ops.head_cross_entropy(Tensor.from_numpy(values, backend), weight, bias, labels[:, :0], weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("in_one_pass", [True, False])
def test_a_value_that_is_no_number_in_a_pixel_without_weight(backend, rng, in_one_pass, bad):
    """It is 0 times it that the gradient of its channel's weights knows; nothing else does, and PyTorch's all do."""
    values = rng.standard_normal((2, 5, 7, 20)).astype(np.float32)
    weight, bias = parameters(backend, rng, "conv", 3, (20,), 1)
    labels, weights = rng.integers(0, 3, (2, 5, 7)), rng.random((2, 5, 7)).astype(np.float32) + 0.1
    place, channel = tuple(int(rng.integers(n)) for n in labels.shape), int(rng.integers(20))
    weights[place] = 0

    def run(value: float) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        values[(*place, channel)] = value
        x = Tensor.from_numpy(values, backend, requires_gradient=True)
        if in_one_pass:
            loss = ops.head_cross_entropy(x, weight, bias, labels, weights)
        else:
            loss = ops.softmax_cross_entropy(ops.conv1x1(x, weight, bias), labels, weights)
        for parameter in (weight, bias):
            parameter.assign(np.zeros(parameter.shape), parameter.gradient)
        loss.backward()
        return float(loss), x.gradient, *(one.numpy(one.gradient) for one in (weight, bias))

    for what, found, expected in zip(("loss", "data", "weight", "bias"), run(bad), run(1.0), strict=True):
        if what == "weight":
            assert np.isnan(found[:, channel]).all()
            found, expected = (np.delete(one, channel, 1) for one in (found, expected))
        np.testing.assert_array_equal(found, expected, what)


@pytest.mark.parametrize("place", list(np.ndindex(2, 2)), ids=str)
def test_maxpool2x2_does_not_hide_a_value_that_is_no_number(backend, place):
    values = np.ones((1, 2, 2, 1), np.float32)
    values[0, *place, 0] = np.nan
    assert np.isnan(ops.maxpool2x2(Tensor.from_numpy(values, backend)).numpy()).all()


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 9, 7, 2), (1, 13, 21, 5), (1, 4, 6, 37)], ids=str)
def test_softmax_cross_entropy(backend, rng, shape, scale):
    values = rounded(backend, (rng.standard_normal(shape) * scale).clip(-1e4, 1e4))
    labels = rng.integers(0, shape[3], shape[:3])
    weights = rng.random(shape[:3]).astype(np.float32) * 10 + 0.1
    weights[rng.random(shape[:3]) < 0.3] = 0
    weights[0, 0, 0] = 1
    labels[0, 0, 0] = values[0, 0, 0].argmin()  # a gradient that float32 can tell from 0
    ignored = weights == 0
    logits, torch_logits = Tensor.from_numpy(values, backend, requires_gradient=True), to_torch(values)
    losses = F.cross_entropy(torch_logits, torch.tensor(labels), reduction="none") * torch.tensor(
        weights.astype(np.float64)
    )
    expected = losses.sum() / weights.astype(np.float64).sum()
    labels[ignored] = 255  # no class: must not matter
    loss = ops.softmax_cross_entropy(logits, labels, weights)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    with no_grad():
        assert float(ops.softmax_cross_entropy(logits, labels, weights)) == pytest.approx(
            float(loss), rel=1e-6, abs=1e-7
        )
    loss.backward(3.0)
    (3 * expected).backward()
    # exp and the division are float32: 1e-5 of the largest gradient.
    assert_close(logits.gradient, to_numpy(torch_logits.grad), "logit gradient")
    np.testing.assert_array_equal(logits.gradient[ignored], 0)
    assert_close(ops.softmax(logits).numpy(), to_numpy(torch.softmax(torch_logits, 1)), "softmax")


@pytest.mark.parametrize("pair", [(1e4, 1e4), (-1e4, -9999.0), (20.0, 14.0), (-1e4, 1e4)], ids=str)
def test_little_is_lost_of_a_loss_small_beside_its_logits(backend, pair):
    logits = Tensor.from_numpy(np.reshape(pair, (1, 1, 1, 2)), backend, requires_gradient=True)
    labels, weights = np.zeros((1, 1, 1), int), np.ones((1, 1, 1))
    wanted = np.logaddexp(0, np.diff(logits.numpy().astype(np.float64)).item())
    # The logarithm is of 1 + something, rounded to float32: half a unit of 1.
    assert float(ops.softmax_cross_entropy(logits, labels, weights)) == pytest.approx(
        wanted, rel=2e-7, abs=6e-8
    )
    with no_grad():
        assert float(ops.softmax_cross_entropy(logits, labels, weights)) == pytest.approx(
            wanted, rel=2e-7, abs=6e-8
        )


def test_softmax_cross_entropy_refuses_what_has_no_loss(backend, rng):
    logits = Tensor.from_numpy(rng.standard_normal((1, 4, 4, 3)), backend, requires_gradient=True)
    labels, weights = np.zeros((1, 4, 4), int), np.ones((1, 4, 4), np.float32)
    with pytest.raises(ValueError, match="sum to zero"):
        float(ops.softmax_cross_entropy(logits, labels, 0 * weights))
    with pytest.raises(ValueError, match="1 pixels whose label is not in 0..2"):
        wrong = np.where(np.arange(16).reshape(1, 4, 4) == 5, 3, labels)
        float(ops.softmax_cross_entropy(logits, wrong, weights))
    with pytest.raises(ValueError, match="labels have shape"):
        ops.softmax_cross_entropy(logits, labels[:, 1:], weights)


def philox4x32_10(counter: int, draw: int, seed: int) -> list[int]:
    """Salmon et al. (2011), table 2, in plain integers."""
    low = 0xFFFFFFFF
    c, k = [counter & low, counter >> 32, draw & low, draw >> 32], [seed & low, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & low, (p >> 32) ^ c[3] ^ k[1], p & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def test_philox_reference_has_the_published_values():
    """The known-answer vectors of the authors' Random123."""
    assert philox4x32_10(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**64 - 1
    assert philox4x32_10(ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 3, 18), (1, 5, 5, 32)], ids=str)
def test_dropout_mask_is_philox(backend, rng, shape):
    seed, draw, rate = int(rng.integers(2**63)), int(rng.integers(2**63)), 0.375
    words = [philox4x32_10(i // 4, draw, seed)[i % 4] for i in range(np.prod(shape))]
    kept = np.reshape(words, shape) >= rate * 2**32

    def dropped(values: np.ndarray) -> np.ndarray:
        return rounded(backend, np.where(kept, values * np.float32(1 / (1 - rate)), 0).astype(np.float32))

    values, gradient = normal(backend, rng, shape), normal(backend, rng, shape)
    x = Tensor.from_numpy(values, backend, requires_gradient=True)
    y = ops.dropout(x, rate, seed, draw)
    np.testing.assert_array_equal(y.numpy(), dropped(values))
    y.backward(gradient)
    np.testing.assert_array_equal(x.gradient, dropped(gradient))


def test_dropout_rate(backend):
    x = Tensor.from_numpy(np.ones((1, 256, 256, 16)), backend)
    values = ops.dropout(x, 0.3, seed=1, draw=2).numpy()
    # 2**20 draws: the standard deviation of the share kept is 4.5e-4; five of them.
    assert np.mean(values > 0) == pytest.approx(0.7, abs=2.3e-3)
    assert np.mean(values) == pytest.approx(1.0, abs=3.3e-3)
    assert np.any(values != ops.dropout(x, 0.3, seed=1, draw=3).numpy())


@pytest.mark.parametrize(
    "side, inputs, outputs", [(45, (24, 40), 48), (13, (256, 256), 160)], ids=["shallow", "deep"]
)
@pytest.mark.usefixtures("algorithm")
def test_results_do_not_depend_on_the_number_of_threads(backend, rng, side, inputs, outputs):
    weight, bias = parameters(backend, rng, "conv", outputs, inputs, 3)
    values = rng.standard_normal((1, side, side - 4, inputs[1])).astype(np.float32)
    skip_values = rng.standard_normal((1, side + 6, side - 4, inputs[0])).astype(np.float32)
    before = backends.get_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            backends.set_threads(threads)
            x = Tensor.from_numpy(values, backend, requires_gradient=True)
            skip = Tensor.from_numpy(skip_values, backend, requires_gradient=True)
            weight.gradient[...] = bias.gradient[...] = 0
            y = ops.conv3x3(x, weight, bias, relu=True, skip=skip)
            y.backward(np.ones(y.shape, np.float32))
            results.append(
                [y.numpy(), x.gradient, skip.gradient, weight.gradient.copy(), bias.gradient.copy()]
            )
    finally:
        backends.set_threads(before)
    for one, other in itertools.pairwise(results):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("algorithm")
def test_a_strip_of_any_length(backend, rng):
    """Its width times the number of register tiles in it is beyond 32 bits."""
    weight, bias = parameters(backend, rng, "conv", 1, (1,), 3)
    weight.assign(np.ones(weight.shape))
    bias.assign(np.zeros(bias.shape))
    with no_grad():
        y = ops.conv3x3(Tensor.from_numpy(np.ones((1, 3, 250_000, 1)), backend), weight, bias)
    np.testing.assert_allclose(y.numpy(), 9, rtol=TOLERANCE[32])


@pytest.mark.usefixtures("algorithm")
def test_a_value_that_is_no_number_is_not_hidden_by_relu(backend, rng):
    weight, bias = parameters(backend, rng, "conv", 16, (16,), 3)
    values = rng.standard_normal((1, 12, 12, 16)).astype(np.float32)
    values[0, 5, 5, 3] = np.nan
    assert np.isnan(ops.conv3x3(Tensor.from_numpy(values, backend), weight, bias, relu=True).numpy()).any()


def test_shapes_that_do_not_fit_are_refused(backend, rng):
    weight, bias = parameters(backend, rng, "conv", 8, (4,), 3)
    with pytest.raises(ValueError, match=r"channels"):
        ops.conv3x3(Tensor.from_numpy(np.zeros((1, 8, 8, 3)), backend), weight, bias)
    with pytest.raises(ValueError, match="at least 3 x 3"):
        ops.conv3x3(Tensor.from_numpy(np.zeros((1, 2, 8, 4)), backend), weight, bias)
    with pytest.raises(ValueError, match="at least 2 x 2"):
        ops.maxpool2x2(Tensor.from_numpy(np.zeros((1, 1, 8, 4)), backend))
    with pytest.raises(ValueError, match="too small to be cropped"):
        weight2, bias2 = parameters(backend, rng, "conv", 8, (4, 4), 3)
        x, skip = (Tensor.from_numpy(np.zeros((1, n, n, 4)), backend) for n in (8, 6))
        ops.conv3x3(x, weight2, bias2, skip=skip)
    with pytest.raises(ValueError, match="dropout rate"):
        ops.dropout(Tensor.from_numpy(np.zeros((1, 2, 2, 1)), backend), 1.0, 0, 0)
