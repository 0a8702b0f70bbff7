"""Whole images through the predictor: no seams, any size, symmetric, normalised, within memory."""

import _fastunet as engine
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastunet import DataError, Predictor, UNet, no_grad, ops
from fastunet.geometry import border, input_size
from fastunet.normalization import normalize
from fastunet.predictor import model_file
from fastunet.tiling import activation_bytes, prediction_bytes

# Float32 through at most 14 convolutions; another size of tile sums in another order.
SEAMLESS = 1e-5


def network(depth=2, channels=1, classes=2, base_channels=4, seed=0):
    """A network whose every parameter is random, biases too."""
    model = UNet(channels, classes, base_channels, depth, seed=seed)
    random = np.random.default_rng(seed)
    state = model.state_dict()
    for name, values in state.items():
        if name.endswith("bias"):
            state[name] = random.normal(0, 0.1, values.shape).astype(np.float32)
    model.load_state_dict(state)
    return model


def by_hand(model, image):
    """Predict without tiles: normalise, mirror with numpy.pad, one pass, softmax in float64."""
    lost, depth = border(model.depth), model.depth
    beyond = [input_size(side, depth) - lost - side for side in image.shape[:2]]
    pixels = normalize(image, model.normalization)
    pixels = np.pad(pixels, ((lost, beyond[0]), (lost, beyond[1]), (0, 0)), mode="reflect")
    was_training = model.training
    with no_grad():
        logits = model.eval()(pixels[None]).numpy()[0].astype(np.float64)
    model.training = was_training
    powers = np.exp(logits - logits.max(axis=2, keepdims=True))
    return (powers / powers.sum(axis=2, keepdims=True))[: image.shape[0], : image.shape[1]]


CASES = [(1, 1, 2, 3), (2, 3, 4, 2), (3, 1, 2, 4), (4, 2, 3, 2)]
SIZES = [(1, 1), (1, 23), (2, 2), (31, 1), (37, 53), (64, 48)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("depth", "channels", "classes", "base_channels"), CASES)
def test_tiles_leave_no_seam(rng, depth, channels, classes, base_channels, size):
    model = network(depth, channels, classes, base_channels, seed=sum(size))
    image = rng.integers(0, 60000, (*size, channels)).astype(np.uint16)
    expected = by_hand(model, image)
    step = 2**depth
    for tile in ("auto", input_size(step, depth), input_size(2 * step + 1, depth), input_size(40, depth)):
        result = Predictor(model, tile=tile)(image)
        assert result.dtype == np.float32 and result.shape == (*size, classes)
        np.testing.assert_allclose(result, expected, atol=SEAMLESS)


def test_no_seam_in_a_network_wide_enough_for_every_kernel(rng):
    model = network(depth=3, base_channels=32)
    image = rng.random((150, 131), np.float32)
    # Winograd convolutions round to about 1e-5 of the logits' range, which is large before any training.
    state = model.state_dict()
    with no_grad():
        spread = model.eval()(normalize(image[:124, :124, None])[None]).numpy().std()
    state["head.weight"] /= spread
    model.load_state_dict(state)
    expected = by_hand(model, image[:, :, None])
    for tile in ("auto", input_size(100, 3), input_size(41, 3)):
        np.testing.assert_allclose(Predictor(model, tile=tile)(image), expected, atol=SEAMLESS)


def test_memory_changes_the_tile_and_not_the_result(rng):
    model = network(depth=2, base_channels=16)
    image = rng.random((300, 260), np.float32)
    said = []
    whole = Predictor(model)(image)
    memory = int(prediction_bytes(300, 260, 200, 200, model))
    small = Predictor(model, memory=memory, notify=said.append)
    np.testing.assert_allclose(small(image), whole, atol=SEAMLESS)
    plan = small.plan(300, 260)
    assert plan.memory <= memory and len(plan) > 1
    assert len(said) == 1 and f"tiles of {plan.tile[0]}x{plan.tile[1]} instead of" in said[0]
    with pytest.raises(MemoryError, match="300x260 pixels takes at least .* 1 KiB"):
        Predictor(model, memory=1024)(image)


def test_when_memory_fails_after_all_smaller_tiles_are_tried(rng, monkeypatch):
    model = network()
    image = rng.random((90, 80), np.float32)
    expected = Predictor(model)(image)
    forward, seen, said = UNet.__call__, [], []

    def forward_of_small_tiles(self, x):
        seen.append(x.shape[1] * x.shape[2])
        if seen[-1] > 90 * 90:
            raise MemoryError
        return forward(self, x)

    monkeypatch.setattr(UNet, "__call__", forward_of_small_tiles)
    monkeypatch.setattr("fastunet.tiling.SCRATCH", 0)
    np.testing.assert_allclose(Predictor(model, notify=said.append)(image), expected, atol=SEAMLESS)
    assert seen[0] > 90 * 90 >= seen[-1] and said
    monkeypatch.setattr(UNet, "__call__", _no_memory)
    with pytest.raises(MemoryError, match="at least"):
        Predictor(model, notify=said.append)(image)


def _no_memory(self, x):
    raise MemoryError


@pytest.mark.parametrize("shape", [(1, 204, 252, 1, 4, 16), (1, 140, 140, 3, 2, 5), (1, 62, 86, 2, 1, 32)])
def test_activations_are_what_the_engine_holds_at_its_worst_moment(shape):
    _, height, width, channels, depth, base_channels = shape
    model = network(depth, channels, 2, base_channels).eval()
    pixels = np.zeros(shape[:4], np.float32)
    engine.reset_peak()
    before = engine.allocated_bytes()
    with no_grad():
        for _ in range(2):  # the first composes layers
            ops.softmax(model(pixels))
    peak = engine.peak_allocated_bytes() - before
    # Blocks are rounded up to 64 or 4096 bytes.
    assert peak == pytest.approx(activation_bytes(height, width, model), rel=0.02)


@pytest.mark.parametrize("rotations", [4, 7, 8])
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (29, 40)])
def test_rotations_are_averages_of_probabilities_and_leave_no_seam(rng, rotations, size):
    model = network(depth=2, classes=3)
    image = rng.random(size, np.float32)
    result = Predictor(model, rotations=rotations)(image)
    assert result.shape == (*size, 3) and result.min() >= 0
    np.testing.assert_allclose(result.sum(axis=2), 1, atol=1e-5)
    tiled = Predictor(model, rotations=rotations, tile=input_size(4, 2))(image)
    np.testing.assert_allclose(tiled, result, atol=SEAMLESS)


def test_right_angles_are_averaged_one_by_one(rng):
    model = network()
    image = rng.random((29, 40), np.float32)
    turned = [np.rot90(Predictor(model)(np.rot90(image, k)), -k) for k in range(4)]
    np.testing.assert_allclose(Predictor(model, rotations=4)(image), np.mean(turned, axis=0), atol=1e-6)


@pytest.mark.parametrize("size", [(21, 34), (16, 16)])
def test_with_eight_views_the_prediction_turns_with_the_image(rng, size):
    model = network(depth=3)
    image = rng.random(size, np.float32)
    predict = Predictor(model, rotations=8)
    straight = predict(image)
    for quarters in range(4):
        np.testing.assert_allclose(
            predict(np.rot90(image, quarters)), np.rot90(straight, quarters), atol=1e-5
        )
        mirrored = np.rot90(image, quarters)[:, ::-1]
        np.testing.assert_allclose(predict(mirrored), np.rot90(straight, quarters)[:, ::-1], atol=1e-5)


def test_seven_rotations_of_a_constant_or_of_a_pointwise_network():
    # A network that hands the centre of its input on, whichever way it is turned: the average must be sharp.
    model = UNet(1, 2, 2, 1, dropout=0)
    state = {name: np.zeros_like(values) for name, values in model.state_dict().items()}
    state["encoder.0.conv1.weight"][0, 0, 1, 1] = 1
    state["encoder.0.conv2.weight"][0, 0, 1, 1] = 1
    state["decoder.0.conv1.weight"][0, 0, 1, 1] = 1
    state["decoder.0.conv2.weight"][0, 0, 1, 1] = 1
    state["head.weight"][1, 0, 0, 0] = 8
    state["head.bias"][1] = -4
    model.load_state_dict(state)
    model.normalization = "none"
    y, x = np.mgrid[:61, :73]
    smooth = (0.5 + 0.3 * np.sin(y / 5) * np.cos(x / 6)).astype(np.float32)
    one, seven = (Predictor(model, rotations=n)(smooth)[:, :, 1] for n in (1, 7))
    np.testing.assert_allclose(one, 1 / (1 + np.exp(4 - 8 * smooth)), atol=1e-5)
    # Linear interpolation of a curve of second derivative below 0.2 misses it by less than 0.2 / 4.
    np.testing.assert_allclose(seven, one, atol=0.05)
    assert np.abs(seven - one)[3:-3, 3:-3].max() < 0.02
    flat = Predictor(model, rotations=7)(np.full((13, 9), 0.5, np.float32))
    np.testing.assert_allclose(flat, 0.5, atol=1e-5)


@pytest.mark.parametrize("how", ["zscore", "minmax", "none", [[100.0, 0.01]]])
def test_the_recorded_normalisation_is_of_the_whole_image(how):
    model = network()
    model.normalization = how
    image = np.linspace(33001, 33101, 70 * 60).reshape(70, 60, 1)
    result = Predictor(model, tile=input_size(4, 2))(image)
    np.testing.assert_allclose(result, by_hand(model, image), atol=SEAMLESS)


def test_grey_values_may_be_scaled_and_shifted(rng):
    model = network()
    dark = rng.integers(0, 250, (50, 40)).astype(np.uint8)
    bright = (33001 + 15 * dark.astype(np.uint16)).astype(np.uint16)
    np.testing.assert_allclose(Predictor(model)(dark), Predictor(model)(bright), atol=1e-4)
    assert np.isfinite(Predictor(model)(np.full((20, 20), 7, np.uint8))).all()


def test_shapes(rng):
    model, colour = network(), network(channels=3)
    predict = Predictor(model)
    stack = rng.random((3, 20, 30))
    result = predict(stack)
    assert result.shape == (3, 20, 30, 2)
    np.testing.assert_array_equal(result[1], predict(stack[1]))
    np.testing.assert_array_equal(result, predict(stack[:, :, :, None]))
    assert Predictor(colour)(np.zeros((20, 30, 3))).shape == (20, 30, 2)
    assert Predictor(network(channels=6))(np.zeros((20, 30, 6))).shape == (20, 30, 2)


def test_progress_runs_from_0_to_1():
    parts = []
    Predictor(network(), tile=input_size(8, 2), rotations=4)(np.zeros((3, 20, 17)), progress=parts.append)
    assert parts == sorted(parts) and parts[-1] == 1.0
    assert len(parts) == 3 * 4 * (3 * 3) and parts[0] == pytest.approx(1 / len(parts))


@pytest.mark.parametrize("training", [True, False])
def test_a_live_network_keeps_its_mode_and_its_dropout(rng, training):
    model = network()
    model.training = training
    image = rng.random((20, 20))
    first = Predictor(model)(image)
    assert model.training is training and model.draws == 0
    np.testing.assert_array_equal(Predictor(model)(image), first)
    with pytest.raises(ValueError, match="NaN"):
        Predictor(model)(np.full((5, 5), np.nan))
    assert model.training is training


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros(5), r"shape \(5,\)"),
        (np.zeros((0, 5)), r"shape \(0, 5\)"),
        (np.zeros((2, 2, 2, 2, 1)), "shape"),
        (np.zeros((5, 5, 3)), "3 channels .* takes 1"),
        (np.zeros((2, 5, 5, 2)), "2 channels .* takes 1"),
        (np.zeros((5, 5), complex), "complex128"),
        (np.full((5, 5), "a"), "convert"),
        (np.full((5, 5), np.inf), "infinite"),
    ],
)
def test_images_that_are_refused(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        Predictor(network())(image)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tile": 45}, "nearest valid tiles are 44 and 48"),
        ({"rotations": 3}, "expected 1, 4, 7 or 8"),
        ({"threads": 0}, "at least 1"),
    ],
)
def test_options_that_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Predictor(network(), **options)


def test_a_model_from_a_file_a_run_folder_or_by_name(rng, tmp_path):
    model = network(channels=2)
    model.save(tmp_path / "model.safetensors")
    image = rng.random((33, 20, 2))
    for name in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        np.testing.assert_array_equal(Predictor(name)(image), Predictor(model)(image))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no model\.safetensors"):
        model_file(tmp_path / "empty")
    with pytest.raises(DataError, match="there is no such model; expected a model file or a run folder"):
        Predictor("no-such-model")
    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="a fastunet model"):
        Predictor(tmp_path / "other.safetensors")


def test_a_shipped_model_is_found_by_its_name(tmp_path, monkeypatch):
    network().save(tmp_path / "cells.safetensors")
    monkeypatch.setattr(
        "fastunet.predictor.shipped_models", lambda: {"cells": tmp_path / "cells.safetensors"}
    )
    assert Predictor("cells")(np.zeros((9, 9))).shape == (9, 9, 2)
    with pytest.raises(DataError, match="or cells"):
        model_file("nuclei-of-nobody")
