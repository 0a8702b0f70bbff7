"""The network and its operations as PyTorch sees them, against its own (over CUDA kernels: emulator/test_torch.py)."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torch_unet

import fastunet
import fastunet.torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8 + 1e-5}  # as in test_ops.py


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture
def dtype() -> torch.dtype:
    """What is computed in."""
    return torch.float32


def normal(rng, shape, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(rng.standard_normal(shape)).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Errors relative to the largest reference value."""
    assert found.shape == expected.shape, what
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


# ---- Operations -----------------------------------------------------------------------------------------------------


def centre(skip: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    top, left = ((a - b) // 2 for a, b in zip(skip.shape[2:], like.shape[2:]))
    return skip[:, :, top : top + like.shape[2], left : left + like.shape[3]]


# Ours, PyTorch's, shapes of the inputs, of the weight (whose outputs are its first side, but for the up-convolution).
OPERATIONS = {
    "conv3x3": (
        fastunet.torch.conv3x3,
        F.conv2d,
        [(2, 5, 7, 9)],
        (3, 5, 3, 3),
    ),
    "conv3x3 of images": (fastunet.torch.conv3x3, F.conv2d, [(1, 1, 6, 5)], (17, 1, 3, 3)),
    "conv3x3, skip": (
        lambda skip, x, w, b: fastunet.torch.conv3x3(x, w, b, skip=skip),
        lambda skip, x, w, b: F.conv2d(torch.cat([centre(skip, x), x], 1), w, b),
        [(1, 4, 9, 8), (1, 16, 5, 6)],
        (8, 20, 3, 3),
    ),
    "upconv2x2": (
        fastunet.torch.upconv2x2,
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2),
        [(2, 16, 3, 4)],
        (16, 5, 2, 2),
    ),
    "conv1x1": (fastunet.torch.conv1x1, F.conv2d, [(1, 18, 4, 3)], (3, 18, 1, 1)),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_convolutions_and_their_gradients(device, dtype, rng, name, memory_format):
    ours, reference, shapes, weight_shape = OPERATIONS[name]
    inputs = [normal(rng, shape, dtype).contiguous(memory_format=memory_format) for shape in shapes]
    weight = normal(rng, weight_shape, dtype).float()
    bias = normal(rng, (weight_shape[1 if name == "upconv2x2" else 0],))
    leaves = [values.requires_grad_() for values in (*inputs, weight, bias)]
    twins = [values.detach().double().requires_grad_() for values in leaves]
    found, expected = ours(*leaves), reference(*twins)
    assert found.dtype == (torch.float32 if name == "conv1x1" else dtype)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, expected, TOLERANCE[dtype], "forward")
    gradient = normal(rng, expected.shape, dtype)
    found.backward(gradient.to(found.dtype))
    expected.backward(gradient.double())
    for number, (leaf, twin) in enumerate(zip(leaves, twins, strict=True)):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, twin.grad, TOLERANCE[dtype], f"gradient {number}")


def test_a_relu_is_convolved_with(device, dtype, rng):
    x, weight, bias = normal(rng, (1, 16, 6, 7), dtype), normal(rng, (16, 16, 3, 3), dtype), normal(rng, 16)
    leaves = [values.requires_grad_() for values in (x, weight.float(), bias)]
    found = fastunet.torch.conv3x3(*leaves, relu=True)
    twins = [values.detach().double().requires_grad_() for values in leaves]
    expected = F.conv2d(*twins)
    assert_close(found, F.relu(expected), TOLERANCE[dtype], "forward")
    gradient = normal(rng, expected.shape, dtype)
    found.backward(gradient)
    # Where rounding decides what is positive, the reference follows.
    expected.backward(gradient.double() * (found > 0))
    for leaf, twin in zip(leaves, twins, strict=True):
        assert_close(leaf.grad, twin.grad, TOLERANCE[dtype])


def test_maxpool2x2_and_dropout(device, dtype, rng):
    shape = (2, 5, 7, 9)
    values = np.stack([rng.permutation(63).reshape(7, 9) for _ in range(10)]).reshape(shape)  # no ties
    x = torch.tensor(values).to(dtype).requires_grad_()
    twin = x.detach().double().requires_grad_()
    found, expected = fastunet.torch.maxpool2x2(x), F.max_pool2d(twin, 2)
    assert torch.equal(found.double(), expected)
    gradient = normal(rng, expected.shape, dtype)
    found.backward(gradient)
    expected.backward(gradient.double())
    assert torch.equal(x.grad.double(), twin.grad)
    x.grad = None
    dropped = fastunet.torch.dropout(x, 0.5, seed=3, draw=int(rng.integers(2**31)))
    kept = dropped != 0
    assert torch.equal(dropped, 2 * x * kept)
    assert 0.3 < kept.double().mean() < 0.7  # 630 draws: ten standard deviations
    dropped.backward(torch.ones_like(dropped))
    where = x != 0  # a 0 does not show its fate
    assert torch.equal(x.grad[where], 2.0 * kept[where].to(dtype))


def test_weighted_cross_entropy(device, dtype, rng):
    logits = normal(rng, (2, 3, 4, 5), dtype).requires_grad_()
    labels = torch.tensor(rng.integers(0, 3, (2, 4, 5)))
    weights = torch.tensor(rng.random((2, 4, 5)))
    labels[0, 0, 0], weights[0, 0, 0] = -100, 0
    twin = logits.detach().double().requires_grad_()
    found = fastunet.torch.weighted_cross_entropy(logits, labels, weights)
    expected = torch_unet.weighted_cross_entropy(twin, labels.clamp(min=0), weights)
    assert found.dtype == torch.float32 and found.shape == ()
    assert_close(found, expected, 1e-6, "loss")
    (3 * found).backward()
    (3 * expected).backward()
    assert_close(logits.grad, twin.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_the_functions_own(device, rng, name):
    """Each is linear in each of its arguments, so that a difference of any width is the derivative."""
    ours, _, shapes, weight_shape = OPERATIONS[name]
    shapes = [*shapes, weight_shape, (weight_shape[1 if name == "upconv2x2" else 0],)]
    arguments = [normal(rng, shape).requires_grad_() for shape in shapes]
    y = ours(*arguments)
    gradient = normal(rng, y.shape)
    y.backward(gradient)
    for place, argument in enumerate(arguments):
        step = normal(rng, argument.shape)
        moved = [values.detach() for values in arguments]
        moved[place] = moved[place] + step
        difference = (ours(*moved) - y.detach()).double()
        terms = difference.abs().mul(gradient.double().abs()).sum()
        assert ((difference * gradient).sum() - (argument.grad.double() * step).sum()).abs() <= 1e-5 * terms


def test_what_does_not_fit_is_refused(device, dtype, rng):
    x, weight, bias = normal(rng, (1, 4, 5, 5), dtype), normal(rng, (2, 4, 3, 3)), normal(rng, 2)
    conv3x3 = fastunet.torch.conv3x3
    for arguments, sentence in (
        ((x.double(), weight, bias), "a tensor of torch.float64 was given; torch.float32 or torch.bfloat16"),
        ((x, weight.double(), bias), "parameter 'weight' is of torch.float64; torch.float32 is expected"),
        ((x, weight.to("meta"), bias), "parameter 'weight' is on meta; cpu is expected"),
        ((x, weight, bias[:1]), r"parameter 'bias' has shape \(1,\), \(2,\) is expected"),
        ((x, weight[:, :3], bias), r"weight of shape \(2, 3, 3, 3\) for inputs of \(4,\) channels"),
        ((x[0], weight, bias), r"conv3x3's input has shape \(4, 5, 5\); \(N, C, H, W\) is expected"),
        ((x, weight, bias, False, x.double()), f"conv3x3's input is of torch.float64; {dtype} is expected"),
    ):
        with pytest.raises(ValueError, match=sentence):
            conv3x3(*arguments)
    logits, labels, weights = x, torch.zeros((1, 5, 5), dtype=torch.int64), torch.ones(1, 5, 5)
    loss = fastunet.torch.weighted_cross_entropy
    for arguments, sentence in (
        ((logits, labels.to("meta"), weights), "labels are on meta; cpu is expected"),
        ((logits, labels, weights.to("meta")), "weights are on meta; cpu is expected"),
        ((logits, labels.double(), weights), "labels are of torch.float64; integers are expected"),
    ):
        with pytest.raises(ValueError, match=sentence):
            loss(*arguments)


def test_a_loss_that_does_not_exist(device, dtype, rng):
    """Refused on the CPU; on a GPU, where nobody waits to see it, no number, and without gradients."""
    labels, weights = torch.zeros((1, 5, 5), dtype=torch.int64), torch.ones(1, 5, 5)
    for truth, sentence in (
        ((labels + 4, weights), "25 pixels whose label is not in 0..3"),
        ((labels, 0 * weights), "weights that sum to zero"),
    ):
        logits = normal(rng, (1, 4, 5, 5), dtype).requires_grad_()
        if device == "cpu":
            with pytest.raises(ValueError, match=sentence):
                fastunet.torch.weighted_cross_entropy(logits, *truth)
        else:
            loss = fastunet.torch.weighted_cross_entropy(logits, *truth)
            loss.backward()
            assert loss.isnan() and not logits.grad.any()


def test_bfloat16_is_refused_on_the_cpu(rng):
    x = normal(rng, (1, 4, 5, 5), torch.bfloat16)
    with pytest.raises(ValueError, match="the CPU computes in fp32"):
        fastunet.torch.maxpool2x2(x)
    with pytest.raises(ValueError, match="the input is of torch.bfloat16; torch.float32 is expected"):
        fastunet.torch.UNet(1, 2, 4, 1, device="cpu")(x)


# ---- The network ----------------------------------------------------------------------------------------------------


def network(rng, device, dtype, **sizes) -> fastunet.torch.UNet:
    sizes = {"in_channels": 2, "num_classes": 3, "base_channels": 16, "depth": 1, "dropout": 0.0, **sizes}
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return fastunet.torch.UNet(**sizes, seed=int(rng.integers(2**31)), device=device, precision=precision)


def sample(rng, height=20, width=22, classes=3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = (1, height - 16, width - 16)
    weights = torch.tensor(rng.random(size), dtype=torch.float32)
    return normal(rng, (1, 2, height, width)), torch.tensor(rng.integers(0, classes, size)), weights


def twin_of(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters in float64, as the kernels read them: masters, of which weights are rounded to `dtype`."""
    return {
        name: values.detach().to(dtype if values.ndim == 4 else torch.float32).double().requires_grad_()
        for name, values in model.named_parameters()
    }


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other).norm() / other.norm()).item()


def test_training_sees_what_pytorch_sees(device, dtype, rng):
    """Three steps, each beside PyTorch in float64 from where ours stands."""
    model = network(rng, device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    # Logits and losses are continuous, so their bounds hold in every step: a few times the largest of 120 steps, in
    # bfloat16 0.009 and 0.0017 (PyTorch's own autocast: 0.009 and 0.0007). A gradient jumps where rounding turns a ReLU
    # round. In float32 that befalls two steps of a hundred, and the others stay below 4e-6; in bfloat16 every step,
    # up to 0.17 (PyTorch 0.17). An error of ours befalls all three.
    logit_bound, loss_bound, gradient_bound = {
        torch.float32: (1e-5, 2e-6, 2e-5),
        torch.bfloat16: (0.03, 0.006, 0.3),
    }[dtype]
    x, labels, weights = sample(rng, height=36, width=44)
    distances = []
    for step in range(3):
        twin = twin_of(model, dtype)
        x_leaf, x_twin = x.clone().requires_grad_(), x.to(dtype).double().requires_grad_()
        logits, reference = model(x_leaf), torch_unet.forward(twin, x_twin, 1)
        assert distance(logits, reference) <= logit_bound
        if step < 2:
            loss = fastunet.torch.weighted_cross_entropy(logits, labels, weights)
        else:
            loss = model.loss(x_leaf, labels, weights)
        truth = torch_unet.weighted_cross_entropy(reference, labels, weights.double())
        assert loss.item() == pytest.approx(truth.item(), rel=loss_bound)
        optimizer.zero_grad()
        loss.backward()
        truth.backward()
        pairs = [(values.grad, twin[name].grad) for name, values in model.named_parameters()]
        distances.append(max(distance(a, b) for a, b in [(x_leaf.grad, x_twin.grad), *pairs]))
        optimizer.step()
    assert min(distances) <= gradient_bound, distances


def test_it_is_the_engines_network(device, dtype, rng):
    """Bitwise, with the names, layouts and values of a model file."""
    model = network(rng, device, dtype)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    engine = fastunet.UNet(2, 3, 16, 1, dropout=0.0, seed=5, device=device, precision=precision)
    state = {name: torch.from_numpy(values) for name, values in engine.state_dict().items()}
    assert list(state) == [name for name, _ in model.named_parameters()] == list(model.state_dict())
    model.load_state_dict(state)
    x, labels, weights = sample(rng)
    pixels = x.permute(0, 2, 3, 1).numpy()
    with torch.no_grad(), fastunet.no_grad():
        found, expected = model(x), engine(pixels)
    assert not found.requires_grad
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy(), expected.numpy())
    np.testing.assert_array_equal(model(x).detach().permute(0, 2, 3, 1).numpy(), engine(pixels).numpy())
    loss = engine.loss(pixels, labels.numpy(), weights.numpy())
    loss.backward()
    model.loss(x, labels, weights).backward()
    for name, values in model.named_parameters():
        np.testing.assert_array_equal(values.grad.numpy(), engine.gradients()[name], name)


def test_a_model_file_is_read_by_pytorchs_own_means(rng, tmp_path):
    engine = fastunet.UNet(2, 3, 16, 1, seed=7, device="cpu")
    engine.save(tmp_path / "model.safetensors")
    model = network(rng, "cpu", torch.float32).eval()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    x, *_ = sample(rng)
    expected = engine.eval()(x.permute(0, 2, 3, 1).numpy()).numpy()
    np.testing.assert_array_equal(model(x).detach().permute(0, 2, 3, 1).numpy(), expected)


def test_only_what_wants_a_gradient_gets_one(rng):
    model = network(rng, "cpu", torch.float32)
    for values in model.encoder.parameters():
        values.requires_grad_(False)
    x, labels, weights = sample(rng)
    model.loss(x, labels, weights).backward()
    assert {name for name, values in model.named_parameters() if values.grad is None} == {
        f"encoder.0.conv{i}.{part}" for i in (1, 2) for part in ("weight", "bias")
    }
    assert x.grad is None
    model.requires_grad_(False)
    model.loss(x.requires_grad_(), labels, weights).backward()
    assert x.grad.abs().max() > 0


def test_the_way_back_uses_the_weights_of_its_own_way_forward(rng):
    """Two passes with different weights, and the first goes back last."""
    model = network(rng, "cpu", torch.float32)
    x, labels, weights = sample(rng)
    other = {name: (1.5 * values).detach() for name, values in model.named_parameters()}

    def gradient(passes) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        for parameters in passes:
            torch.func.functional_call(model, parameters, (x,))
        fastunet.torch.weighted_cross_entropy(logits, labels, weights).backward()
        return leaf.grad

    expected = gradient([])
    assert expected.abs().max() > 0
    assert torch.equal(gradient([other]), expected)


def test_dropout_follows_the_modules_mode_and_draws_anew(device, dtype, rng):
    model = network(rng, device, dtype, dropout=0.5)
    x, *_ = sample(rng)
    with torch.no_grad():
        first, second = model(x), model(x)
        again = copy.deepcopy(model)
        assert not torch.equal(first, second)
        assert torch.equal(model(x), again(x))  # a copy goes on where the original was
        model.eval()
        assert torch.equal(model(x), model(x))


def test_what_pytorch_would_refuse_is_refused(rng):
    model = network(rng, "cpu", torch.float32)
    x, labels, weights = sample(rng)
    loss = model.loss(x, labels, weights)
    with torch.no_grad():
        model.head.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = model.loss(x, labels, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="backward was called twice"):
        loss.backward()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.loss(leaf, labels, weights) ** 2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    logits = model(leaf)
    logits *= 2  # which nothing on the way back needs
    logits.sum().backward()
    bias = torch.zeros(16, requires_grad=True)
    rectified = fastunet.torch.conv3x3(normal(rng, (1, 3, 5, 5)), normal(rng, (16, 3, 3, 3)), bias, relu=True)
    rectified.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rectified.sum().backward()


def test_inputs_that_do_not_fit_the_network_are_refused(rng):
    model = network(rng, "cpu", torch.float32)
    x, labels, weights = sample(rng)
    for given, sentence in (
        (x.to("meta"), "the input is on meta; cpu is expected"),
        (x.double(), "the input is of torch.float64; torch.float32 is expected"),
        (x[0], r"the input has shape \(2, 20, 22\); \(N, C, H, W\) is expected"),
        (x[:, :1], "the network was given 1 channels, it has 2"),
        (x[:, :, :19], "19 is not valid at depth 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(given)
    with pytest.raises(ValueError, match="labels are on meta"):
        model.loss(x, labels.to("meta"), weights)
    with pytest.raises(ValueError, match=r"parameter 'encoder.0.conv1.weight' is of torch.float64"):
        model.double()(x)
    with pytest.raises(ValueError, match="device 'meta' is unknown"):
        model.to("meta")(x)


def test_a_moved_module_computes_where_its_parameters_are(rng):
    """Away and back: a device that this machine may lack is stood in for by its name."""
    model = network(rng, "cpu", torch.float32)
    x, *_ = sample(rng)
    expected = model(x)
    model._engine.place = torch.device("meta")  # as if it had been made there
    assert torch.equal(model(x), expected)
    assert model._engine.place == torch.device("cpu")
