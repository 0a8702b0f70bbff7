"""Whole images through the CUDA kernels: the CPU's prediction, whatever the tile, the view and the memory."""

import numpy as np
import pytest
import torch
from test_predictor import network

from fastunet import Predictor, UNet, input_size, no_grad
from fastunet.data.sources import Loaded
from fastunet.tiling import prediction_bytes

# Of probabilities, of networks whose logits are of the order of 1: float32 in another order of summation, 5e-6 at most
# in 3600 networks; bfloat16's 2**-9 of each activation through five layers or nine, 0.015 at most in 4700.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05}


@pytest.fixture(params=TOLERANCE)
def precision(request):
    return request.param


def twins(rng, precision, depth=1, channels=1, classes=2):
    """The same network on the CPU and on the device; its logits of noise are within -1 and 1."""
    model = network(depth, channels, classes, base_channels=2, seed=int(rng.integers(2**31)))
    side = input_size(20, depth)
    with no_grad():
        logits = model.eval()(rng.standard_normal((1, side, side, channels))).numpy()
    model.train()
    state = model.state_dict()
    for name in ("head.weight", "head.bias"):
        state[name] = state[name] / np.abs(logits).max()
    model.load_state_dict(state)
    twin = UNet(channels, classes, 2, depth, device="emulator", precision=precision)
    twin.load_state_dict(model.state_dict())
    return model, twin


def image_of(rng, dtype, *shape):
    high = 250 if np.dtype(dtype).itemsize == 1 else 60000
    return (rng.random(shape) * high).astype(dtype)


IMAGES = [
    # depth, dtype, shape, classes
    (1, np.uint8, (1, 1), 2),
    (2, np.uint16, (1, 9), 3),
    (1, np.float32, (14, 9), 2),
    (1, np.uint8, (9, 13, 3), 2),
    (1, np.uint16, (6, 11, 5), 18),
    (1, np.float64, (10, 7, 2), 2),
    (1, np.int16, (5, 12), 2),
    (1, bool, (7, 7), 2),
]


@pytest.mark.parametrize("depth, dtype, shape, classes", IMAGES, ids=str)
def test_the_prediction_is_the_cpus_whatever_the_tile(rng, precision, depth, dtype, shape, classes):
    image = image_of(rng, dtype, *shape)
    model, twin = twins(rng, precision, depth, shape[2] if len(shape) == 3 else 1, classes)
    expected = Predictor(model)(image)
    for tile in ("auto", input_size(2**depth, depth), input_size(2**depth + 1, depth)):
        found = Predictor(twin, tile=tile)(image)
        assert found.dtype == np.float32 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=TOLERANCE[precision])


@pytest.mark.parametrize("rotations, size", [(4, (1, 9)), (7, (3, 5)), (8, (4, 8))], ids=str)
def test_views_are_averaged_as_on_the_cpu(rng, precision, rotations, size):
    image = image_of(rng, np.uint16, *size)
    model, twin = twins(rng, precision)
    expected = Predictor(model, rotations=rotations)(image)
    predict = Predictor(twin, rotations=rotations, tile=input_size(4, 1))
    for _ in range(2):  # what was recorded for the first image serves the second
        np.testing.assert_allclose(predict(image), expected, atol=TOLERANCE[precision])


def test_recorded_tiles_follow_the_network(rng, precision):
    """A network in training is predicted with, is taught, and predicts again."""
    model, twin = twins(rng, precision)
    other, _ = twins(rng, precision)
    predict = Predictor(twin, tile=input_size(4, 1))
    image = image_of(rng, np.uint8, 9, 6)
    first = predict(image)
    twin.load_state_dict(other.state_dict())
    np.testing.assert_allclose(predict(image), Predictor(other)(image), atol=TOLERANCE[precision])
    twin.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(predict(image), first)
    assert twin.training and twin.draws == 0


def test_arrays_that_lie_otherwise_in_memory(rng):
    model, twin = twins(rng, "fp32", channels=2)
    image = np.moveaxis(image_of(rng, ">u2", 2, 9, 6), 0, 2)[::-1]
    np.testing.assert_allclose(Predictor(twin)(image), Predictor(model)(image), atol=TOLERANCE["fp32"])


# ---- Images on the device: PyTorch's on the CPU, where that is the emulated device's memory, or on a GPU -------------


def on_device(image: np.ndarray, device) -> torch.Tensor:
    return torch.from_numpy(image).to("cpu" if device.name == "emulator" else device.name)


LAYOUTS = {
    "as it comes": lambda image: image,
    "channels first": lambda image: image.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "columns first": lambda image: image.transpose(0, 1).contiguous().transpose(0, 1),
    "a part": lambda image: torch.nn.functional.pad(image, (0, 3, 2, 1))[:, 2:-1, : image.shape[2]],
    "every other channel": lambda image: image.repeat_interleave(2, 2)[..., ::2],
    "every other": lambda image: image.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
}
DEVICE_IMAGES = [
    # dtype, channels, normalization
    (np.uint8, 1, "zscore"),
    (np.uint16, 2, "minmax"),
    (np.float32, 1, "zscore"),
    (np.float64, 2, "zscore"),
    (np.int64, 2, "none"),
    (bool, 1, "zscore"),
    (np.int8, 3, [[3.5, 0.1]] * 3),
]


@pytest.fixture
def no_pixels_through_the_host(device, monkeypatch):
    """Only numbers pass: statistics, scales."""

    def refused(way):
        def copy(pointer, values, *rest):
            assert np.prod(values if isinstance(values, tuple) else values.shape) <= 8, "pixels"
            return way(pointer, values, *rest)

        return copy

    def install():
        for way in ("upload", "download"):
            monkeypatch.setattr(device, way, refused(getattr(device, way)))

    yield install


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, channels, rule", DEVICE_IMAGES, ids=str)
def test_an_image_on_the_device_is_predicted_there(
    rng, device, no_pixels_through_the_host, dtype, channels, rule, layout
):
    """As from the host; float sums are in another order: 1e-13 of a scale, a rounding of float32 in a few pixels."""
    _, twin = twins(rng, "fp32", channels=channels)
    twin.normalization = rule
    image = image_of(rng, dtype, 5, 8, channels)
    if np.dtype(dtype).kind == "i":
        image -= image.dtype.type(100)
    given = LAYOUTS[layout](on_device(image, device))
    np.testing.assert_array_equal(given.cpu().numpy(), image)
    predict = Predictor(twin, tile=input_size(6, 1), rotations=4)
    expected = predict(image)
    no_pixels_through_the_host()
    found = predict(given)
    assert found.shape == expected.shape and not isinstance(found, np.ndarray)
    np.testing.assert_allclose(torch.from_dlpack(found).cpu().numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(given.cpu().numpy(), image)


@pytest.mark.parametrize("shape", [(3, 7), (2, 9, 8), (2, 6, 7, 1)], ids=str)
@pytest.mark.parametrize("rotations", [1, 8])
def test_stacks_and_images_without_channels_on_the_device(
    rng, device, no_pixels_through_the_host, precision, shape, rotations
):
    _, twin = twins(rng, precision)
    image = image_of(rng, np.uint16, *shape)
    predict, parts = Predictor(twin, rotations=rotations), []
    expected = predict(image)
    no_pixels_through_the_host()
    found = torch.from_dlpack(predict(on_device(image, device), progress=parts.append)).cpu().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert parts[-1] == 1.0 and parts == sorted(parts)
    assert found.shape == (*image.shape[: 3 if image.ndim > 2 else 2], 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_resampled_views_of_an_image_on_the_device(rng, device, dtype):
    _, twin = twins(rng, "fp32")
    image = image_of(rng, dtype, 4, 7)
    predict = Predictor(twin, rotations=7)
    found = torch.from_dlpack(predict(on_device(image, device))).cpu().numpy()
    np.testing.assert_allclose(found, predict(image), rtol=0, atol=1e-6)


def test_a_prediction_on_the_device_lives_on_its_own(rng, device):
    _, twin = twins(rng, "fp32")
    image = image_of(rng, np.uint8, 9, 8)
    predict = Predictor(twin)
    expected, given = predict(image), on_device(image, device)
    found = predict(given)
    given.zero_()
    again = predict(given)
    np.testing.assert_allclose(torch.from_dlpack(found).cpu().numpy(), expected, rtol=0, atol=1e-6)
    assert found.__dlpack_device__() == twin.backend.place and hasattr(found, "__dlpack__")
    assert not torch.equal(torch.from_dlpack(again), torch.from_dlpack(found))


def test_images_on_the_device_that_cannot_be_predicted(rng, device, small_device):
    _, twin = twins(rng, "fp32", channels=2)
    predict = Predictor(twin)
    image = on_device(image_of(rng, np.float32, 6, 5, 2), device)
    for value in (np.nan, np.inf):
        image[3, 2, 1] = value
        with pytest.raises(
            ValueError, match="channel 1 of the image holds 1 NaN or infinite values; make them"
        ):
            predict(image)
    for given, sentence in (
        (image[..., :1], r"the image has 1 channels \(shape \(6, 5, 1\)\) and the model takes 2"),
        (image[:0], r"the image has shape \(0, 5, 2\); expected \(H, W\)"),
        (image[0, 0], "none of them 0"),
        (image.to(torch.complex64), "an array of .*64 was given; float32, .* are what can be read"),
    ):
        with pytest.raises(ValueError, match=sentence):
            predict(given)
    image[3, 2, 1] = 0
    small_device(2000)
    with pytest.raises(MemoryError, match="6x5 pixels takes at least"):
        predict(image)


def test_progress_is_of_tiles_that_are_done(rng):
    _, twin = twins(rng, "fp32")
    parts = []
    Predictor(twin, tile=input_size(4, 1), rotations=4)(np.zeros((9, 5)), progress=parts.append)
    assert parts == pytest.approx([(1 + i) / 24 for i in range(24)])


@pytest.fixture
def small_device(device, monkeypatch):
    """Lets the device have so many bytes more than are used; the kernels' own need none here."""
    if not hasattr(device, "memory"):
        pytest.skip("a real GPU's memory cannot be set")
    monkeypatch.setattr("fastunet.tiling.SCRATCH", 0)

    def leave(count_bytes: int) -> None:
        monkeypatch.setattr(device, "memory", device.memory - device.free_memory() + count_bytes)

    return leave


def test_a_plan_holds_and_what_is_kept_is_free_for_the_next(rng, precision, small_device, monkeypatch):
    monkeypatch.setattr(
        "fastunet.backends.cuda.prediction.BETWEEN", 1.4
    )  # so that two sizes of tiles do not fit one beside the other
    model, twin = twins(rng, precision)
    Predictor(twin)(np.zeros((1, 1)))  # the bfloat16 copy of the weights
    predict = Predictor(twin, tile=input_size(6, 1), rotations=4, notify=pytest.fail)
    allowed = predict.plan(9, 14).memory
    small_device(int(allowed / 0.8) + 100)
    for height, width in ((9, 4), (9, 14), (13, 9)):
        image = image_of(rng, np.uint8, height, width)
        expected = Predictor(model, rotations=4)(image)
        np.testing.assert_allclose(predict(image), expected, atol=TOLERANCE[precision])


def test_little_memory_means_smaller_tiles_and_the_same_result(rng, precision, small_device, monkeypatch):
    # In a network of so few channels, what the plan does not count is most.
    monkeypatch.setattr("fastunet.backends.cuda.prediction.BETWEEN", 3.0)
    model, twin = twins(rng, precision)
    image = image_of(rng, np.float32, 13, 12)
    said = []
    predict = Predictor(twin, notify=said.append)
    small_device(int(prediction_bytes(13, 12, 22, 22, model, 3.0 * twin.backend.bits / 8) / 0.8) + 1)
    assert len(predict.plan(13, 12)) > 1
    np.testing.assert_allclose(predict(image), Predictor(model)(image), atol=TOLERANCE[precision])
    assert len(said) == 1 and "instead of" in said[0]
    small_device(500)
    with pytest.raises(MemoryError, match="13x12 pixels takes at least"):
        predict(image)


def test_memory_that_somebody_takes_meanwhile(rng, small_device, device, monkeypatch):
    """The plan is of memory that is not there: tiles shrink, twice here, until they fit, and it is said once."""
    model, twin = twins(rng, "fp32")
    image = image_of(rng, np.uint8, 34, 36)
    said = []
    predict = Predictor(twin, notify=said.append)
    whole = predict.plan(34, 36).memory
    small_device(whole // 6)
    monkeypatch.setattr(type(predict._predictions), "free_memory", lambda self: 2 * whole)
    np.testing.assert_allclose(predict(image), Predictor(model)(image), atol=TOLERANCE["fp32"])
    assert len(said) == 1 and "instead of" in said[0]


@pytest.mark.parametrize("rotations", [1, 8])
def test_tiles_of_an_image_read_by_rectangles_are_the_image_predicted_whole(rng, precision, rotations):
    _, twin = twins(rng, precision, channels=2)
    pixels = image_of(rng, np.uint16, 7, 5, 2)
    predictor = Predictor(twin, rotations=rotations, tile=input_size(4, 1))
    source = Loaded(pixels, pixels.nbytes)
    plan = predictor.plan_source(source)
    found = np.full((7, 5, 2), np.nan, np.float32)
    for tile, probabilities in predictor.tiles(source, predictor.scales(source), plan, plan):
        found[tile.top : tile.bottom, tile.left : tile.right] = probabilities
    np.testing.assert_allclose(found, predictor(pixels), atol=TOLERANCE[precision])
