"""Normalisation against NumPy in float64, and what it refuses."""

import numpy as np
import pytest

from fastunet.normalization import check_normalization, normalize


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 2, 1), (7, 5, 3), (33, 64, 2)])
def test_zscore_is_mean_0_std_1_of_each_channel(rng, dtype, shape):
    image = rng.integers(0, 100, shape).astype(dtype)
    image[0, 0] = 101
    result = normalize(image, "zscore")
    values = image.astype(np.float64)
    expected = (values - values.mean((0, 1))) / values.std((0, 1))
    assert result.dtype == np.float32 and result.flags.c_contiguous
    # One rounding to float32 of values of at most about 50.
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_zscore_does_not_depend_on_offset_and_scale_of_the_grey_values(rng):
    dark = rng.integers(0, 256, (40, 50, 1)).astype(np.uint16)
    bright = (33001 + 15 * dark).astype(np.uint16)
    np.testing.assert_allclose(normalize(dark), normalize(bright), atol=1e-5)


@pytest.mark.parametrize("how", ["zscore", "minmax"])
@pytest.mark.parametrize("value", [0, 255, 0.1, -1e6, 33001])
def test_a_constant_channel_becomes_0(rng, how, value):
    image = np.full((101, 97, 2), value, np.float64)
    image[:, :, 1] = rng.random((101, 97))
    result = normalize(image, how)
    assert (result[:, :, 0] == 0).all()
    assert result[:, :, 1].std() > 0.1


def test_minmax_none_and_numbers():
    image = np.array([[[10, 1], [20, 3]], [[15, 2], [30, 5]]], np.uint8)
    np.testing.assert_allclose(
        normalize(image, "minmax"), [[[0, 0], [0.5, 0.5]], [[0.25, 0.25], [1, 1]]], atol=1e-7
    )
    np.testing.assert_array_equal(normalize(image, "none"), image)
    np.testing.assert_allclose(normalize(image, [[10, 0.1], [1, 2]]), (image - [10, 1]) * [0.1, 2], atol=1e-6)


def test_booleans_are_numbers():
    np.testing.assert_array_equal(normalize(np.array([[[True], [False]]]), "minmax"), [[[1], [0]]])


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((4, 4)), "shape"),
        (np.zeros((0, 4, 1)), "shape"),
        (np.zeros((4, 4, 1), complex), "complex128"),
        (np.full((4, 4, 1), "a"), "convert"),
        (np.array([[[1.0], [np.nan]]]), "1 NaN"),
        (np.array([[[np.inf], [-np.inf]]]), "2 NaN or infinite"),
    ],
)
def test_images_that_are_refused(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        normalize(image)


@pytest.mark.parametrize(
    "how",
    [
        "z-score",
        [[0, 1]],
        [[0, 1], [0, 1], [0, 1]],
        [1, 2],
        [[0, 1], [0, np.inf]],
        [["a", 1], [0, 1]],
        [[0], [1, 2]],
    ],
)
def test_rules_that_are_refused(how):
    with pytest.raises(ValueError, match="normalization is"):
        check_normalization(how, 2)
