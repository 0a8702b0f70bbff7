"""Every CPU kernel for ARM: cross-compiled, run under qemu, its numbers against PyTorch's in float64.

neon/run_kernels.cpp runs one kernel after the other in two programs, of one and of three threads, whose results must be
the same to the bit. Errors are bounded as in test_ops.py.
"""

import contextlib
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import _fastunet as engine
import numpy as np
import pytest
import test_ops
import torch
import torch.nn.functional as F
from test_ops import assert_close, to_numpy, to_torch, typical_sum

from fastunet import backends

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
BLOCK = engine.BLOCK
NO_CHOICE = 4
ALGORITHMS = {"direct": 1, "winograd2": 2, "winograd4": 3, "winograd6": 4}  # csrc/cpu/kernels.h


class Pixels:
    """(N, H, W, C) values, sent with their shape."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class Program:
    """neon/run_kernels.cpp with so many threads."""

    def __init__(self, path: Path, threads: int) -> None:
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [EMULATOR, path, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

    def run(self, request: bytes) -> list[np.ndarray]:
        with contextlib.suppress(BrokenPipeError):  # what it had to say is read below
            self.process.stdin.write(request)
            self.process.stdin.flush()
        results = []
        while (count := struct.unpack("<q", self._read(8))[0]) >= 0:
            results.append(np.frombuffer(self._read(4 * count), np.float32))
        return results

    def _read(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        if len(data) < count:
            self.process.wait()
            self.errors.seek(0)
            pytest.fail(f"the kernels' program ended: {self.errors.read().decode()}")
        return data

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


class Kernels:
    """`kernels(name, *arguments)` are the results of one request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.programs = {threads: Program(path, threads) for threads in (1, 3)}

    def __call__(self, name: str, *arguments: object) -> list[np.ndarray]:
        request = name.encode().ljust(32, b"\0") + b"".join(map(encoded, arguments))
        for threads, program in self.programs.items():
            if program.process.poll() is not None:  # an earlier test was its end
                program.close()
                self.programs[threads] = Program(self.path, threads)
        one, three = (program.run(request) for program in self.programs.values())
        for a, b in zip(one, three, strict=True):
            np.testing.assert_array_equal(a, b, "one thread and three")
        return one

    def close(self) -> None:
        for program in self.programs.values():
            program.close()


def encoded(argument: object) -> bytes:
    if isinstance(argument, Pixels):
        return struct.pack("<4q", *argument.values.shape) + encoded(argument.values)
    if isinstance(argument, np.ndarray):
        return struct.pack("<q", argument.size) + argument.astype(np.float32).tobytes()
    return struct.pack("<q", argument)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if COMPILER is None or EMULATOR is None:
        pytest.skip("no compiler for ARM or no emulator: apt-get install g++-aarch64-linux-gnu qemu-user")
    folder = tmp_path_factory.mktemp("neon")
    build = (ROOT / "CMakeLists.txt").read_text()
    kernel_sources = re.search(r"set\(KERNEL_SOURCES\s+(.*?)\)", build, re.S)[1].split()
    kernel_flags = re.search(r"kernels_\$\{set\} PRIVATE (.*) \$\{FLAGS", build)[1].split()
    kernel_flags += re.search(r"set\(FLAGS_baseline (.*)\)", build)[1].split()
    others = [
        "csrc/memory.cpp",
        "csrc/thread_pool.cpp",
        "csrc/cpu/dispatch.cpp",
        "tests/neon/run_kernels.cpp",
    ]
    objects = []
    for source in (*kernel_sources, *others):
        flags = [*kernel_flags, "-DFASTUNET_ISA=baseline"] if source in kernel_sources else ["-O2"]
        objects.append(folder / f"{Path(source).stem}.o")
        subprocess.run([COMPILER, "-std=c++17", *flags, "-c", ROOT / source, "-o", objects[-1]], check=True)
    program = folder / "run_kernels"
    subprocess.run([COMPILER, "-static", "-pthread", *objects, "-o", program], check=True)
    kernels = Kernels(program)
    yield kernels
    kernels.close()


@pytest.fixture
def backend():
    return backends.load("cpu")


@pytest.fixture(params=["direct", "winograd2", "winograd4", "winograd6"])
def algorithm(request, monkeypatch):
    if request.param == "winograd6":
        monkeypatch.setitem(test_ops.TOLERANCE, 32, 1e-4)
    return ALGORITHMS[request.param]


def normal(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def doubles(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values.astype(np.float64), requires_grad=True)


def choice_of(values: np.ndarray) -> np.ndarray:
    """kernels.h: which of each 2x2 is the largest, of values that ReLU has seen, [image][block][row][column][16]."""
    images, height, width, channels = values.shape
    height, width = height // 2, width // 2
    squares = values[:, : 2 * height, : 2 * width].reshape(images, height, 2, width, 2, channels)
    squares = squares.transpose(0, 1, 3, 5, 2, 4).reshape(images, height, width, channels, 4)
    choice = np.where(squares.max(-1) > 0, squares.argmax(-1), NO_CHOICE)
    padding = -channels % BLOCK
    choice = np.pad(choice, ((0, 0), (0, 0), (0, 0), (0, padding)), constant_values=NO_CHOICE)
    return choice.reshape(images, height, width, -1, BLOCK).transpose(0, 3, 1, 2, 4)


CONVOLUTIONS = [
    # images, height, width, channels of x, of the skip (0: none), outputs, ReLU
    (8, 3, 3, 1, 0, 1, False),
    (3, 27, 9, 3, 0, 24, True),
    (1, 11, 8, 16, 0, 64, True),
    (2, 7, 12, 40, 72, 152, True),
    (4, 19, 12, 16, 16, 16, True),
    (1, 6, 5, 384, 0, 416, False),  # weights beyond what any cache is taken to hold
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv3x3(kernels, backend, rng, algorithm, case):
    images, height, width, channels, skip_channels, outputs, relu = case
    inputs = (skip_channels, channels) if skip_channels else (channels,)
    weight, bias = normal(rng, outputs, sum(inputs), 3, 3), normal(rng, outputs)
    x = normal(rng, images, height, width, channels)
    torch_x = joined = to_torch(x)
    sent, parts = (1, Pixels(x)), [torch_x]
    if skip_channels:
        skip = normal(rng, images, height + 5, width + 2, skip_channels)
        torch_skip = to_torch(skip[:, 2 : 2 + height, 1 : 1 + width])
        joined = torch.cat([torch_skip, torch_x], 1)
        sent, parts = (2, Pixels(skip), Pixels(x)), [torch_skip, torch_x]
    torch_weight, torch_bias = doubles(weight), doubles(bias)
    expected = F.conv2d(joined, torch_weight, torch_bias)
    w, b = backend.pack(weight, "conv", inputs), backend.pack(bias, "bias", ())

    wanted = to_numpy(F.relu(expected) if relu else expected)
    (found,) = kernels("conv3x3_forward", algorithm, outputs, relu, *wanted.shape[1:3], 0, *sent, w, b)
    assert_close(found.reshape(wanted.shape), wanted, "forward")

    gradient = normal(rng, *wanted.shape)
    expected.backward(to_torch(gradient).detach())
    for masked in (False, True):
        founds = kernels("conv3x3_backward_data", algorithm, masked, *sent, Pixels(gradient), w)
        for found, part in zip(founds, parts, strict=True):
            wanted = to_numpy(part.grad * (part > 0) if masked else part.grad)
            assert_close(found.reshape(wanted.shape), wanted, f"data gradient, masked: {masked}")
    before, bias_before = normal(rng, *weight.shape), normal(rng, outputs)
    dw, db = kernels(
        "conv3x3_backward_weight",
        algorithm,
        *sent,
        Pixels(gradient),
        backend.pack(before, "conv", inputs),
        backend.pack(bias_before, "bias", ()),
    )
    found = backend.unpack(dw, "conv", inputs, weight.shape)
    assert_close(found, torch_weight.grad.numpy() + before, "weight gradient, added")
    assert_close(
        db[:outputs],
        torch_bias.grad.numpy() + bias_before,
        "bias gradient, added",
        typical=typical_sum(gradient),
    )


@pytest.mark.parametrize("algorithm, tile", [("winograd2", 2), ("winograd4", 4)], indirect=["algorithm"])
def test_weight_gradient_of_many_tiles(kernels, backend, rng, algorithm, tile):
    """So many that they are cut into runs with sums of their own."""
    height, width, channels, outputs = 40 * tile - 1, 42 * tile + 1, 5, 16
    x, gradient = normal(rng, 1, height + 2, width + 2, channels), normal(rng, 1, height, width, outputs)
    weight = doubles(np.zeros((outputs, channels, 3, 3)))
    F.conv2d(to_torch(x), weight).backward(to_torch(gradient).detach())
    before = normal(rng, *weight.shape)
    sums = backend.pack(before, "conv", (channels,)), np.zeros(outputs)
    dw, db = kernels("conv3x3_backward_weight", algorithm, 1, Pixels(x), Pixels(gradient), *sums)
    found = backend.unpack(dw, "conv", (channels,), before.shape)
    assert_close(found, weight.grad.numpy() + before, "weight gradient, added")
    assert_close(
        db, gradient.astype(np.float64).sum((0, 1, 2)), "bias gradient", typical=typical_sum(gradient)
    )


@pytest.mark.parametrize("algorithm", ["winograd2", "winograd4", "winograd6"], indirect=True)
@pytest.mark.parametrize("case", [(2, 9, 17, 1, 16, 32), (1, 14, 11, 3, 20, 7)], ids=str)
def test_convolution_of_a_first_layer(kernels, backend, rng, algorithm, case):
    """It is computed where it is read, as an input and as the mask of its gradient; by Winograd only."""
    images, height, width, channels, between, outputs = case
    image = normal(rng, images, height, width, channels)
    first_weight, first_bias = normal(rng, between, channels, 3, 3), normal(rng, between)
    first = (
        *(0, *image.shape, between, True, image),
        *(backend.pack(first_weight, "conv", (channels,)), backend.pack(first_bias, "bias", ())),
    )
    wanted = to_numpy(F.relu(F.conv2d(to_torch(image), doubles(first_weight), doubles(first_bias))))
    (found,) = kernels("first_layer_forward", *first)
    x = found.reshape(wanted.shape)
    assert_close(x, wanted, "first layer")

    weight, bias = normal(rng, outputs, between, 3, 3), normal(rng, outputs)
    torch_x, torch_weight, torch_bias = to_torch(x), doubles(weight), doubles(bias)
    expected = F.conv2d(torch_x, torch_weight, torch_bias)
    w, b = backend.pack(weight, "conv", (between,)), backend.pack(bias, "bias", ())
    wanted = to_numpy(expected)
    (found,) = kernels("conv3x3_forward", algorithm, outputs, False, *wanted.shape[1:3], 0, *first, w, b)
    assert_close(found.reshape(wanted.shape), wanted, "forward")
    gradient = normal(rng, *wanted.shape)
    expected.backward(to_torch(gradient).detach())
    (found,) = kernels("conv3x3_backward_data", algorithm, True, *first, Pixels(gradient), w)
    assert_close(found.reshape(x.shape), to_numpy(torch_x.grad) * (x > 0), "data gradient")
    zeros = np.zeros_like(w), np.zeros_like(b)
    dw, db = kernels("conv3x3_backward_weight", algorithm, *first, Pixels(gradient), *zeros)
    found = backend.unpack(dw, "conv", (between,), weight.shape)
    assert_close(found, torch_weight.grad.numpy(), "weight gradient")
    assert_close(db[:outputs], torch_bias.grad.numpy(), "bias gradient", typical=typical_sum(gradient))


@pytest.mark.parametrize("case", [(1, 4, 4, 1, 1, 0), (2, 10, 13, 16, 20, 0), (1, 19, 16, 5, 33, 3)], ids=str)
def test_conv3x3_with_pooling_and_crop(kernels, backend, rng, algorithm, case):
    images, height, width, channels, outputs, cut = case
    x = normal(rng, images, height, width, channels)
    weight, bias = normal(rng, outputs, channels, 3, 3), normal(rng, outputs)
    expected = F.relu(F.conv2d(to_torch(x), doubles(weight), doubles(bias)))
    wanted = to_numpy(expected)
    kept = height - 2 - 2 * cut, width - 2 - cut
    top, left = cut, cut // 2
    w, b = backend.pack(weight, "conv", (channels,)), backend.pack(bias, "bias", ())
    found, pooled, choice = kernels("conv3x3_forward", algorithm, outputs, True, *kept, 1, 1, Pixels(x), w, b)
    wanted_centre = wanted[:, top : top + kept[0], left : left + kept[1]]
    found = found.reshape(wanted_centre.shape)
    # Of the smallest, ReLU may leave nothing to be relative to.
    bound = test_ops.TOLERANCE[32] * max(np.abs(wanted).max(), 1.0)
    assert np.abs(found - wanted_centre).max() <= bound
    wanted_pooled = to_numpy(F.max_pool2d(expected, 2))
    assert np.abs(pooled.reshape(wanted_pooled.shape) - wanted_pooled).max() <= bound
    if cut == 0:  # the choice is made of our own rounding
        np.testing.assert_array_equal(choice.reshape(choice_of(found).shape), choice_of(found))


LAYERS = {"upconv2x2": ("upconv", 2), "conv1x1": ("conv", 1)}


@pytest.mark.parametrize(
    "case", [(1, 1, 1, 1, 1), (2, 5, 3, 16, 8), (1, 4, 13, 33, 17), (1, 6, 6, 64, 32)], ids=str
)
@pytest.mark.parametrize("layer", LAYERS)
def test_upconv2x2_and_conv1x1(kernels, backend, rng, layer, case):
    kind, side = LAYERS[layer]
    images, height, width, channels, outputs = case
    x, bias = normal(rng, images, height, width, channels), normal(rng, outputs)
    weight = normal(rng, *((channels, outputs) if kind == "upconv" else (outputs, channels)), side, side)
    torch_x, torch_weight = to_torch(x), doubles(weight)
    if kind == "upconv":
        expected = F.conv_transpose2d(torch_x, torch_weight, doubles(bias), stride=2)
    else:
        expected = F.conv2d(torch_x, torch_weight, doubles(bias))
    w, b = backend.pack(weight, kind, (channels,)), backend.pack(bias, "bias", ())
    wanted = to_numpy(expected)
    (found,) = kernels(f"{layer}_forward", outputs, Pixels(x), w, b)
    assert_close(found.reshape(wanted.shape), wanted, "forward")
    gradient = normal(rng, *wanted.shape)
    expected.backward(to_torch(gradient).detach())
    for masked in (False, True):
        (found,) = kernels(f"{layer}_backward_data", masked, Pixels(x), Pixels(gradient), w)
        wanted = to_numpy(torch_x.grad * (torch_x > 0) if masked else torch_x.grad)
        assert_close(found.reshape(wanted.shape), wanted, f"data gradient, masked: {masked}")
    before = normal(rng, *weight.shape)
    (dw,) = kernels(
        f"{layer}_backward_weight", Pixels(x), Pixels(gradient), backend.pack(before, kind, (channels,))
    )
    found = backend.unpack(dw, kind, (channels,), weight.shape)
    assert_close(found, torch_weight.grad.numpy() + before, "weight gradient, added")


@pytest.mark.parametrize(
    "case", [(1, 2, 2, 16, 16, 16, 16, 0), (2, 7, 9, 5, 3, 2, 7, 3), (1, 12, 7, 32, 16, 17, 33, 4)], ids=str
)
def test_composed(kernels, backend, rng, case):
    images, height, width, inputs, middle, skips, outputs, beyond = case
    x = normal(rng, images, height, width, inputs)
    skip = normal(rng, images, 2 * height + beyond, 2 * width + beyond, skips)
    up_weight, up_bias = normal(rng, inputs, middle, 2, 2), normal(rng, middle)
    weight, bias = normal(rng, outputs, skips + middle, 3, 3), normal(rng, outputs)
    first = beyond // 2
    centre = skip[:, first : first + 2 * height, first : first + 2 * width]
    up = F.conv_transpose2d(to_torch(x), doubles(up_weight), doubles(up_bias), stride=2)
    wanted = to_numpy(F.relu(F.conv2d(torch.cat([to_torch(centre), up], 1), doubles(weight), doubles(bias))))
    packed = (
        backend.pack(up_weight, "upconv", (inputs,)),
        backend.pack(up_bias, "bias", ()),
        backend.pack(weight, "conv", (skips, middle)),
        backend.pack(bias, "bias", ()),
    )
    (found,) = kernels("composed", middle, outputs, Pixels(x), Pixels(skip), *packed)
    assert_close(found.reshape(wanted.shape), wanted, "forward")


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (2, 3, 5, 3), (1, 9, 7, 16), (1, 10, 12, 40)], ids=str)
@pytest.mark.parametrize("rectified", [False, True])
def test_maxpool2x2(kernels, rng, shape, rectified):
    x = rng.integers(0 if rectified else -2, 3, shape).astype(np.float32)  # ties everywhere
    torch_x = to_torch(x)
    expected = F.max_pool2d(torch_x, 2)
    gradient = normal(rng, *to_numpy(expected).shape)
    y, dx = kernels("maxpool2x2", rectified, Pixels(x), Pixels(gradient))
    np.testing.assert_array_equal(y.reshape(gradient.shape), to_numpy(expected))
    expected.backward(to_torch(gradient * (to_numpy(expected) > 0) if rectified else gradient).detach())
    np.testing.assert_array_equal(dx.reshape(shape), to_numpy(torch_x.grad).astype(np.float32))


def test_a_value_that_is_no_number_is_not_hidden(kernels, backend, rng, algorithm):
    x = normal(rng, 1, 8, 8, 16)
    x[0, 4, 4, 3] = np.nan
    w = backend.pack(normal(rng, 16, 16, 3, 3), "conv", (16,))
    (y,) = kernels("conv3x3_forward", algorithm, 16, True, 6, 6, 0, 1, Pixels(x), w, normal(rng, 16))
    assert np.isnan(y.reshape(6, 6, 16)[2:5, 2:5]).all()
    pooled, _ = kernels("maxpool2x2", True, Pixels(x), Pixels(normal(rng, 1, 4, 4, 16)))
    np.testing.assert_array_equal(np.argwhere(np.isnan(pooled.reshape(4, 4, 16))), [[2, 2, 3]])


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 7, 2), (1, 4, 6, 37)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_softmax_cross_entropy(kernels, rng, shape, scale):
    logits = (normal(rng, *shape) * np.float32(scale)).clip(-1e4, 1e4)
    labels = rng.integers(0, shape[3], shape[:3])
    weights = rng.random(shape[:3]).astype(np.float32) * 10 + np.float32(0.1)
    weights[rng.random(shape[:3]) < 0.3] = 0
    weights[0, 0, 0] = 1
    labels[0, 0, 0] = logits[0, 0, 0].argmin()  # a gradient that float32 can tell from 0
    torch_logits = to_torch(logits)
    losses = F.cross_entropy(torch_logits, torch.tensor(labels), reduction="none")
    expected = (losses * torch.tensor(weights.astype(np.float64))).sum() / weights.astype(np.float64).sum()
    expected.backward()
    labels[weights == 0] = 255  # no class: must not matter
    *losses, gradient = kernels("softmax_cross_entropy", Pixels(logits), labels, weights)
    for loss, invalid in losses:
        assert loss == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
        assert invalid == 0
    assert_close(gradient.reshape(shape), to_numpy(torch_logits.grad), "logit gradient")
    (found,) = kernels("softmax", Pixels(logits))
    assert_close(found.reshape(shape), to_numpy(torch.softmax(torch_logits, 1)), "softmax")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 3, 18), (1, 5, 5, 32)], ids=str)
def test_dropout_is_the_same_on_every_machine(kernels, rng, shape):
    x, rate = normal(rng, *shape), 0.375
    seed, draw = (int(rng.integers(2**63)) for _ in range(2))
    (found,) = kernels("dropout", seed, draw, np.float32([rate]), Pixels(x))
    expected = engine.dropout(engine.Array.from_pixels(x), rate, seed, draw).pixels()
    np.testing.assert_array_equal(found.reshape(shape), expected)


@pytest.mark.parametrize("count", [1, 7, 70_000])
def test_sgd_momentum(kernels, rng, count):
    value, momentum, gradient = (normal(rng, count) for _ in range(3))
    found, found_momentum = kernels("sgd_momentum", np.float32([0.25, 0.75]), value, momentum, gradient)
    wanted_momentum = 0.75 * momentum.astype(np.float64) + gradient
    assert_close(found_momentum, wanted_momentum, "momentum")
    assert_close(found, value - 0.25 * wanted_momentum, "value")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 7, 20), (1, 11, 3, 32)], ids=str)
def test_what_touches_every_element_once(kernels, rng, shape):
    x, y = normal(rng, *shape), normal(rng, *shape)
    sums = np.pad(normal(rng, shape[3]), (0, -shape[3] % BLOCK))
    factor = np.float32([1.75])
    masked, copy, found_sums, added, multiplied = kernels("elementwise", factor, Pixels(x), Pixels(y), sums)
    np.testing.assert_array_equal(masked.reshape(shape), np.where(y > 0, x, 0))
    np.testing.assert_array_equal(copy.reshape(shape), x)
    wanted = sums[: shape[3]] + x.astype(np.float64).sum((0, 1, 2))
    assert_close(found_sums[: shape[3]], wanted, "sums of pixels")
    np.testing.assert_array_equal(added.reshape(shape), x + y)
    np.testing.assert_array_equal(multiplied.reshape(shape), y * factor)
