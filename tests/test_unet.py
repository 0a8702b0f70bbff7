"""The network: arithmetic, parameters, loss and all gradients against PyTorch, and its file."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch_unet

import fastunet
from fastunet import SGD, DataError, UNet, no_grad, ops
from fastunet.geometry import border, input_size, is_valid_input, nearest_inputs, output_size


def test_sizes_of_the_paper():
    assert output_size(572) == 388
    assert input_size(388) == 572
    assert input_size(1) == 188
    assert border(4) == 92
    with pytest.raises(ValueError, match="570 is not valid at depth 4.* 556 and 572"):
        output_size(570)


@pytest.mark.parametrize("depth", range(7))
def test_sizes_by_walking_the_network(depth):
    """Against the definition: subtract 4, halve, ..., double, subtract 4."""

    def walk(n):
        sides = []
        for _ in range(depth):
            n -= 4
            if n <= 0 or n % 2:
                return None
            sides.append(n)
            n //= 2
        n -= 4
        for _ in range(depth):
            n = 2 * n - 4
        return n if n > 0 else None

    valid = {n: walk(n) for n in range(1, 1400) if walk(n)}
    assert [n for n in range(1, 1400) if is_valid_input(n, depth)] == list(valid)
    assert all(output_size(n, depth) == m for n, m in valid.items())
    for m in (1, 2, 5, 20, 300):
        assert input_size(m, depth) == min(n for n, out in valid.items() if out >= m)
    for n in (1, 100, 501):
        if n not in valid:
            assert set(nearest_inputs(n, depth)) <= set(valid)


def test_parameters_of_the_paper():
    model = UNet()
    assert model.parameters().count() == 31_030_658
    convolutions = [name for name in model.state_dict() if name.endswith("weight")]
    assert len(convolutions) == 23
    weights = model.state_dict()["bottleneck.conv2.weight"]
    assert weights.std() == pytest.approx(np.sqrt(2 / (9 * 1024)), rel=1e-2)
    assert not model.state_dict()["bottleneck.conv2.bias"].any()
    assert model.state_dict()["decoder.0.upconv.weight"].shape == (1024, 512, 2, 2)


NETWORKS = [
    dict(base_channels=1, depth=1),
    dict(in_channels=3, num_classes=4, base_channels=6, depth=2),
    dict(base_channels=16, depth=3),
    dict(in_channels=2, num_classes=3, base_channels=5, depth=4),
    dict(base_channels=2, depth=6),
]


def gradient_error(rng, sizes):
    """Compare a network drawn at random with PyTorch in float64; return the largest error of any tensor's gradient,
    relative to that tensor's largest."""
    model = UNet(dropout=0.0, seed=int(rng.integers(2**31)), **sizes)
    depth = model.depth
    height, width = input_size(1, depth), input_size(2 ** (depth + 1), depth)
    x = rng.standard_normal((2 if depth < 4 else 1, height, width, model.in_channels)).astype(np.float32)
    logits = model(x)
    labels = rng.integers(0, model.num_classes, logits.shape[:3])
    weights = rng.random(logits.shape[:3]).astype(np.float32) + 0.1
    loss = ops.softmax_cross_entropy(logits, labels, weights)
    loss.backward()

    t = {
        name: torch.tensor(v.astype(np.float64), requires_grad=True) for name, v in model.state_dict().items()
    }
    expected = torch_unet.forward(t, torch.tensor(x.astype(np.float64)).permute(0, 3, 1, 2), depth)
    # Rounding grows over the layers: 2e-5 of the largest logit.
    scale = expected.abs().max().item()
    assert np.abs(logits.numpy() - expected.detach().permute(0, 2, 3, 1).numpy()).max() <= 2e-5 * scale
    reference = torch_unet.weighted_cross_entropy(
        expected, torch.tensor(labels), torch.tensor(weights.astype(np.float64))
    )
    assert float(loss) == pytest.approx(reference.item(), rel=1e-5)
    reference.backward()
    errors = []
    for name, gradient in model.gradients().items():
        wanted = t[name].grad.numpy()
        assert gradient.shape == wanted.shape
        errors.append(np.abs(gradient - wanted).max() / (np.abs(wanted).max() + 1e-12))
    return max(errors)


@pytest.mark.parametrize("sizes", NETWORKS, ids=str)
def test_loss_and_every_gradient(rng, sizes):
    # Rounding is near 1e-6. In a draw out of ten it turns a coarse level's ReLU or pooling round, which moves every
    # gradient behind it by percents. An error of ours befalls every draw.
    errors = [gradient_error(rng, sizes) for _ in range(5)]
    assert min(errors) <= 1e-4, errors


def test_what_only_predicts_sees_every_change_of_the_weights(rng):
    """Its layers are composed once for the weights as they are."""
    model = UNet(base_channels=16, depth=2, dropout=0.0, seed=int(rng.integers(2**31)))
    other = UNet(base_channels=16, depth=2, seed=int(rng.integers(2**31))).state_dict()
    optimiser = SGD(model, lr=0.1)
    x = rng.standard_normal((1, 92, 76, 1)).astype(np.float32)
    labels, weights = rng.integers(0, 2, (1, 52, 36)), np.ones((1, 52, 36), np.float32)

    def step_at_once():
        model.loss(x, labels, weights).backward()
        optimiser.step()

    def step_layer_by_layer():
        with optimiser.steps_as_gradients_are_made():
            model.loss(x, labels, weights).backward()

    before = None
    for change in (lambda: None, step_at_once, step_layer_by_layer, lambda: model.load_state_dict(other)):
        change()
        with no_grad():
            found = model(x).numpy()
        assert before is None or np.abs(found - before).max() > 1e-3 * np.abs(found).max()
        before = found
        t = {name: torch.tensor(v.astype(np.float64)) for name, v in model.state_dict().items()}
        expected = torch_unet.forward(t, torch.tensor(x.astype(np.float64)).permute(0, 3, 1, 2), 2)
        expected = expected.permute(0, 2, 3, 1).numpy()
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
        assert (found != model(x).numpy()).any()  # which records, layer by layer


def test_dropout_only_in_training_and_another_each_time(rng):
    model = UNet(base_channels=4, depth=1, seed=3)
    x = rng.standard_normal((1, 32, 32, 1)).astype(np.float32)
    assert model.training
    with no_grad():
        first, second = model(x).numpy(), model(x).numpy()
        assert model.draws == 2
        assert np.any(first != second)
        model.draws = 0
        np.testing.assert_array_equal(model(x).numpy(), first)
        model.eval()
        np.testing.assert_array_equal(model(x).numpy(), model(x).numpy())
        assert model.draws == 1


def test_the_same_seed_is_the_same_network():
    a, b, c = (UNet(base_channels=3, depth=2, seed=s).state_dict() for s in (5, 5, 6))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(not np.array_equal(a[name], c[name]) for name in a)


def test_file_round_trip(tmp_path, rng):
    model = UNet(in_channels=2, num_classes=3, base_channels=5, depth=2, dropout=0.25)
    model.normalization = [[10.0, 0.5], [20.0, 0.25]]
    model.class_names = ["background", "cell", "border"]
    path = tmp_path / "m.safetensors"
    model.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    again = UNet.load(path)
    assert again.config() == model.config()
    assert not again.training
    x = rng.standard_normal((1, 44, 44, 2)).astype(np.float32)
    model.eval()
    np.testing.assert_array_equal(again(x).numpy(), model(x).numpy())
    # Anyone can read it without us.
    tensors = safetensors.numpy.load_file(path)
    assert tensors["encoder.0.conv1.weight"].shape == (5, 2, 3, 3)
    assert tensors["decoder.0.upconv.weight"].shape == (20, 10, 2, 2)
    assert tensors["head.weight"].dtype == np.float32
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("fastunet", "1")
    assert set(json.loads(metadata["config"])) == {
        "in_channels", "num_classes", "base_channels", "depth", "dropout", "normalization", "class_names"
    }  # fmt: skip


def test_damaged_files_are_refused(tmp_path, rng):
    model = UNet(base_channels=2, depth=1)
    path = tmp_path / "m.safetensors"
    model.save(path)
    good = path.read_bytes()
    with pytest.raises(DataError, match="no such file"):
        UNet.load(tmp_path / "absent.safetensors")
    for cut in (0, 7, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(DataError, match="m.safetensors"):
            UNet.load(path)
    for _ in range(200):  # a flipped byte in the header: refused, or harmless
        damaged = bytearray(good)
        damaged[int(rng.integers(len(good) // 4))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            UNet.load(path)
        except DataError:
            pass
    state, metadata = model.state_dict(), {"format": "fastunet", "version": "1"}
    for config in (
        '{"depth": 6}',
        "[]",
        "{",
        json.dumps({**model.config(), "base_channels": 4096, "depth": 6}),
        json.dumps({**model.config(), "dropout": "half"}),
    ):
        path.write_bytes(safetensors.numpy.save(state, {**metadata, "config": config}))
        with pytest.raises(DataError):
            UNet.load(path)
    path.write_bytes(safetensors.numpy.save(state, {"format": "pt"}))
    with pytest.raises(DataError, match="metadata"):
        UNet.load(path)
    state["head.bias"][0] = np.nan
    path.write_bytes(safetensors.numpy.save(state, {**metadata, "config": json.dumps(model.config())}))
    with pytest.raises(DataError, match="not finite"):
        UNet.load(path)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(depth=7), "depth is 7"),
        (dict(num_classes=1), "num_classes is 1"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(device="tpu"), "'tpu' is unknown"),
        (dict(precision="bf16"), "bf16"),
    ],
)
def test_arguments_out_of_range(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        UNet(**arguments)


def test_inputs_that_do_not_fit():
    model = UNet(base_channels=2, depth=2)
    with pytest.raises(ValueError, match="not valid at depth 2"):
        model(np.zeros((1, 45, 44, 1), np.float32))
    with pytest.raises(ValueError, match="1 input channels"):
        model(np.zeros((1, 44, 44, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(N, H, W, C\) is expected"):
        model(np.zeros((44, 44), np.float32))


def test_public_names():
    for name in fastunet.__all__:
        assert getattr(fastunet, name) is not None
