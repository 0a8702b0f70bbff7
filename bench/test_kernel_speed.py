"""Every kernel beside PyTorch's, at the shapes of the 572 tile: `pytest bench --benchmark-only`.

Each row of the table is one kernel of one engine. Arrays are as training has them: what goes in came out of a ReLU, and
a gradient comes masked by it, within the border that its way needs. extra_info holds GFLOP/s (direct-equivalent for
3x3 convolutions) and the share of the machine's peak that the products an engine really does come to; or GB/s. Engines
take turns within a run; compare within it only.
"""

import fma_peak
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastunet import backends
from fastunet.parameters import ParameterSet

BACKEND = backends.load("cpu")

# height = width, inputs (of a concatenation: two), outputs: a selection of the layers at base 64 and base 16
LAYERS = [
    (570, (64,), 64),
    (282, (128,), 128),
    (138, (256,), 256),
    (66, (512,), 512),
    (30, (1024,), 1024),
    (56, (512, 512), 512),
    (392, (64, 64), 64),
    (570, (16,), 16),
    (138, (64,), 64),
    (392, (16, 16), 16),
]
DIRECTIONS = ("forward", "backward")
ENGINES = ("fastunet", "torch")


def to_torch(values):
    return torch.tensor(values).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def arrays(shape):
    """One activation for both engines: ours and a channels-last tensor."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return BACKEND.array(values), to_torch(values)


def weights(kind, outputs, inputs, side):
    channels = (sum(inputs), outputs) if kind == "upconv" else (outputs, sum(inputs))
    both = ParameterSet(
        BACKEND, {"w": (kind, (*channels, side, side), inputs), "b": ("bias", (outputs,), ())}
    )
    for parameter in both.values():
        parameter.assign(np.random.default_rng(1).standard_normal(parameter.shape))
    tensors = [torch.tensor(both[name].numpy()) for name in ("w", "b")]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return both["w"], both["b"], *tensors


def rectified(shape):
    """Such an activation as a layer makes, which knows that a ReLU made it."""
    images, height, width, channels = shape
    weight, bias, *_ = weights("conv", channels, (16,), 3)
    x, _ = arrays((images, height + 2, width + 2, 16))
    y = BACKEND.conv3x3_forward(x, None, weight.value, bias.value, channels, True)
    return y, to_torch(y.pixels())


def gradient_of(y):
    """For y as the layer after it makes it, and for PyTorch, where its ReLU masks it later."""
    weight, bias, *_ = weights("conv", 16, (y.shape[3],), 3)
    images, height, width, _ = y.shape
    after, _ = arrays((images, height - 2, width - 2, 16))
    gradient, _ = BACKEND.conv3x3_backward(
        after, y, None, None, weight.value, weight.gradient, bias.gradient, True
    )
    return gradient, to_torch(gradient.pixels())


def measure(benchmark, function, flops=0.0, moved=0.0, done=None):
    """`done`: the floating-point operations of the products, where they are other than `flops`."""
    torch.set_num_threads(backends.get_threads())
    with torch.no_grad():
        benchmark.pedantic(function, rounds=5, warmup_rounds=1)
    median = benchmark.stats.stats.median
    if flops:
        benchmark.extra_info["GFLOP/s"] = round(flops / median / 1e9, 1)
        if peak := fma_peak.flops_per_second(backends.get_threads()):
            benchmark.extra_info["% of peak"] = round(100 * (done or flops) / median / peak, 1)
    if moved:
        benchmark.extra_info["GB/s"] = round(moved / median / 1e9, 1)


def products(engine, inputs, outputs, height, width):
    """Floating-point operations of a 3x3 convolution's products as the engine goes about it."""
    algorithm = BACKEND.conv3x3_algorithm(inputs, outputs, height, width)
    tile = int(algorithm[-1]) if engine == "fastunet" and algorithm != "direct" else 0
    of_a_channel = -(-height // tile) * -(-width // tile) * (tile + 2) ** 2 if tile else 9 * height * width
    return 2.0 * inputs * outputs * of_a_channel


def torch_conv3x3_backward(gradient, y, x, weight, wants_input=True):
    masked = torch.ops.aten.threshold_backward(gradient, y, 0)
    wanted = (wants_input, True, True)
    return torch.ops.aten.convolution_backward(
        masked, x, weight, [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "layer", LAYERS, ids=lambda layer: f"{layer[0]}x{'+'.join(map(str, layer[1]))}-{layer[2]}"
)
def test_conv3x3(benchmark, layer, direction, engine):
    side, inputs, outputs = layer
    benchmark.group = f"conv3x3 {direction} {side}^2 {'+'.join(map(str, inputs))} -> {outputs}"
    weight, bias, torch_weight, torch_bias = weights("conv", outputs, inputs, 3)
    x, torch_x = rectified((1, side, side, inputs[-1]))
    skip, torch_skip = rectified((1, side + 8, side + 8, inputs[0])) if len(inputs) == 2 else (None, None)
    flops = 18.0 * sum(inputs) * outputs * (side - 2) ** 2
    done = products(engine, sum(inputs), outputs, side - 2, side - 2)

    def joined():
        return torch_x if torch_skip is None else torch.cat([torch_skip[:, :, 4:-4, 4:-4], torch_x], 1)

    def torch_forward():
        return F.relu_(F.conv2d(joined(), torch_weight, torch_bias))

    def forward():
        return BACKEND.conv3x3_forward(x, skip, weight.value, bias.value, outputs, True)

    if direction == "forward":
        measure(benchmark, forward if engine == "fastunet" else torch_forward, flops, done=done)
        return
    y, torch_y = forward(), torch_forward()
    gradient, torch_gradient = gradient_of(y)

    def backward():
        BACKEND.conv3x3_backward(gradient, x, skip, y, weight.value, weight.gradient, bias.gradient, True)

    def torch_backward():
        torch_conv3x3_backward(torch_gradient, torch_y, joined(), torch_weight)

    done += products(engine, outputs, sum(inputs), side, side)
    measure(benchmark, backward if engine == "fastunet" else torch_backward, 2 * flops, done=done)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("outputs", [64, 16])
def test_first_two_layers(benchmark, outputs, direction, engine):
    """Together, for the first is computed where the second reads it."""
    side = 572
    benchmark.group = f"conv3x3, the first two, {direction} {side}^2 1 -> {outputs} -> {outputs}"
    first, first_bias, torch_first, torch_first_bias = weights("conv", outputs, (1,), 3)
    second, second_bias, torch_second, torch_second_bias = weights("conv", outputs, (outputs,), 3)
    x, torch_x = arrays((1, side, side, 1))
    of_first = 18.0 * outputs * (side - 2) ** 2
    of_second = 18.0 * outputs**2 * (side - 4) ** 2
    done = of_first + products(engine, outputs, outputs, side - 4, side - 4)

    def forward():
        between = BACKEND.conv3x3_forward(x, None, first.value, first_bias.value, outputs, True)
        return between, BACKEND.conv3x3_forward(between, None, second.value, second_bias.value, outputs, True)

    def torch_forward():
        between = F.relu_(F.conv2d(torch_x, torch_first, torch_first_bias))
        return between, F.relu_(F.conv2d(between, torch_second, torch_second_bias))

    if direction == "forward":
        measure(
            benchmark, forward if engine == "fastunet" else torch_forward, of_first + of_second, done=done
        )
        return
    between, y = forward()
    torch_between, torch_y = torch_forward()
    gradient, torch_gradient = gradient_of(y)

    def backward():
        inner, _ = BACKEND.conv3x3_backward(
            gradient, between, None, y, second.value, second.gradient, second_bias.gradient, True
        )
        BACKEND.conv3x3_backward(
            inner, x, None, between, first.value, first.gradient, first_bias.gradient, False
        )

    def torch_backward():
        inner, *_ = torch_conv3x3_backward(torch_gradient, torch_y, torch_between, torch_second)
        torch_conv3x3_backward(inner, torch_between, torch_x, torch_first, wants_input=False)

    flops = of_first + 2 * of_second
    done += products(engine, outputs, outputs, side - 2, side - 2)
    measure(benchmark, backward if engine == "fastunet" else torch_backward, flops, done=done)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", [(570, 64, 392), (282, 128, 200), (570, 16, 392)], ids=str)
def test_conv3x3_maxpool2x2(benchmark, layer, engine):
    side, channels, kept = layer
    benchmark.group = f"conv3x3 and maxpool2x2 forward {side}^2 {channels} -> {channels}"
    weight, bias, torch_weight, torch_bias = weights("conv", channels, (channels,), 3)
    x, torch_x = rectified((1, side, side, channels))

    def ours():
        return BACKEND.conv3x3_maxpool2x2_forward(x, weight.value, bias.value, channels, (kept, kept), True)

    def theirs():
        return F.max_pool2d(F.relu_(F.conv2d(torch_x, torch_weight, torch_bias)), 2, return_indices=True)

    flops = 18.0 * channels**2 * (side - 2) ** 2
    done = products(engine, channels, channels, side - 2, side - 2)
    measure(benchmark, ours if engine == "fastunet" else theirs, flops, done=done)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", [(28, 1024, 512), (52, 512, 256), (100, 256, 128), (196, 128, 64)], ids=str)
def test_upconv2x2(benchmark, layer, direction, engine):
    side, inputs, outputs = layer
    benchmark.group = f"upconv2x2 {direction} {side}^2 {inputs} -> {outputs}"
    weight, bias, torch_weight, torch_bias = weights("upconv", outputs, (inputs,), 2)
    x, torch_x = rectified((1, side, side, inputs))
    gradient, torch_gradient = arrays((1, 2 * side, 2 * side, outputs))
    flops = 8.0 * inputs * outputs * side**2
    if direction == "forward" and engine == "fastunet":
        measure(benchmark, lambda: BACKEND.upconv2x2_forward(x, weight.value, bias.value, outputs), flops)
    elif direction == "forward":
        measure(benchmark, lambda: F.conv_transpose2d(torch_x, torch_weight, torch_bias, stride=2), flops)
    elif engine == "fastunet":

        def backward():
            BACKEND.upconv2x2_backward(gradient, x, weight.value, weight.gradient, bias.gradient, True)

        measure(benchmark, backward, 2 * flops)
    else:
        arguments = ([outputs], [2, 2], [0, 0], [1, 1], True, [0, 0], 1, (True, True, True))

        def torch_backward():
            torch.ops.aten.convolution_backward(torch_gradient, torch_x, torch_weight, *arguments)

        measure(benchmark, torch_backward, 2 * flops)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", [(52, 256), (100, 128), (196, 64), (196, 16)], ids=str)
def test_upconv2x2_conv3x3(benchmark, layer, engine):
    """The two as one linear map, which is composed once."""
    side, channels = layer
    benchmark.group = f"upconv2x2 and conv3x3 forward {side}^2 {2 * channels} -> {channels}"
    up, up_bias, torch_up, torch_up_bias = weights("upconv", channels, (2 * channels,), 2)
    weight, bias, torch_weight, torch_bias = weights("conv", channels, (channels, channels), 3)
    x, torch_x = rectified((1, side, side, 2 * channels))
    skip, torch_skip = rectified((1, 2 * side, 2 * side, channels))
    sizes = (2 * channels,), (channels, channels), channels
    composed = BACKEND.composition.compose(up.value, up_bias.value, weight.value, bias.value, *sizes)

    def ours():
        return BACKEND.composition.forward(x, skip, composed, channels)

    def theirs():
        between = F.conv_transpose2d(torch_x, torch_up, torch_up_bias, stride=2)
        return F.relu_(F.conv2d(torch.cat([torch_skip, between], 1), torch_weight, torch_bias))

    flops = 16.0 * channels**2 * side**2 + 36.0 * channels**2 * (2 * side - 2) ** 2
    phases = 2.0 * 2 * channels * 4 * channels * (-(-(side - 1) // 5)) ** 2 * 36
    done = phases + products(engine, channels, channels, 2 * side - 2, 2 * side - 2)
    measure(
        benchmark,
        ours if engine == "fastunet" else theirs,
        flops,
        done=done if engine == "fastunet" else flops,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_maxpool2x2(benchmark, direction, engine):
    side, channels = 568, 64
    benchmark.group = f"maxpool2x2 {direction} {side}^2 {channels}"
    x, torch_x = rectified((1, side, side, channels))
    gradient, torch_gradient = arrays((1, side // 2, side // 2, channels))
    moved = side * side * channels * 4 * (1 + 5 / 16)  # the pooled values and a byte each for the choice
    _, choice = BACKEND.maxpool2x2_forward(x)
    _, index = F.max_pool2d(torch_x, 2, return_indices=True)
    if direction == "forward":
        ours, theirs = (
            lambda: BACKEND.maxpool2x2_forward(x),
            lambda: F.max_pool2d(torch_x, 2, return_indices=True),
        )
    else:

        def ours():
            return BACKEND.maxpool2x2_backward(gradient, choice, side, side)

        def theirs():
            arguments = ([2, 2], [2, 2], [0, 0], [1, 1], False, index)
            return torch.ops.aten.max_pool2d_with_indices_backward(torch_gradient, torch_x, *arguments)

    measure(benchmark, ours if engine == "fastunet" else theirs, moved=moved)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_head(benchmark, direction, engine):
    benchmark.group = f"conv1x1 {direction} 388^2 64 -> 2"
    weight, bias, torch_weight, torch_bias = weights("conv", 2, (64,), 1)
    x, torch_x = rectified((1, 388, 388, 64))
    gradient, torch_gradient = arrays((1, 388, 388, 2))
    flops = 2.0 * 64 * 2 * 388**2
    if direction == "forward":
        ours, theirs = (
            lambda: BACKEND.conv1x1_forward(x, weight.value, bias.value, 2),
            lambda: F.conv2d(torch_x, torch_weight, torch_bias),
        )
    else:
        flops *= 2

        def ours():
            BACKEND.conv1x1_backward(gradient, x, weight.value, weight.gradient, bias.gradient, True)

        def theirs():
            arguments = ([2], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, (True, True, True))
            torch.ops.aten.convolution_backward(torch_gradient, torch_x, torch_weight, *arguments)

    measure(benchmark, ours if engine == "fastunet" else theirs, flops)


@pytest.mark.parametrize("engine", ENGINES)
def test_softmax_cross_entropy(benchmark, engine):
    benchmark.group = "softmax + weighted cross-entropy with gradient 388^2 2 classes"
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, (1, 388, 388)).astype(np.int32)
    pixel_weights = generator.random((1, 388, 388)).astype(np.float32)
    logits, torch_logits = arrays((1, 388, 388, 2))
    torch_labels, torch_weights = torch.tensor(labels).long(), torch.tensor(pixel_weights)

    def theirs():
        with torch.enable_grad():
            leaf = torch_logits.detach().requires_grad_()
            losses = F.cross_entropy(leaf, torch_labels, reduction="none") * torch_weights
            (losses.sum() / torch_weights.sum()).backward()

    def ours():
        BACKEND.softmax_cross_entropy(logits, labels, pixel_weights, True)

    measure(benchmark, ours if engine == "fastunet" else theirs)


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout(benchmark, engine):
    benchmark.group = "dropout 64^2 512"
    x, torch_x = arrays((1, 64, 64, 512))
    moved = 64 * 64 * 512 * 8.0
    if engine == "fastunet":
        measure(benchmark, lambda: BACKEND.dropout(x, 0.5, 1, 2), moved=moved)
    else:
        measure(benchmark, lambda: F.dropout(torch_x, 0.5), moved=moved)


@pytest.mark.parametrize("engine", ENGINES)
def test_sgd_momentum(benchmark, engine):
    count = 31_030_658
    benchmark.group = "SGD with momentum, 31 million parameters"
    value, gradient, momentum = (np.ones(count, np.float32) for _ in range(3))
    if engine == "fastunet":
        measure(
            benchmark, lambda: BACKEND.sgd_momentum(value, gradient, momentum, 1e-6, 0.99), moved=20.0 * count
        )
        return
    parameter = torch.tensor(value, requires_grad=True)
    parameter.grad = torch.tensor(gradient)
    optimiser = torch.optim.SGD([parameter], 1e-6, 0.99)
    measure(benchmark, optimiser.step, moved=20.0 * count)
