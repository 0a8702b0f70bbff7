"""The warp under Numba's simulator or on a GPU; started by tests/test_numba_cuda.py."""

import numpy as np
import pytest
import torch
from numba import cuda
from scipy import ndimage
from test_warp import VALUE, coordinates, random_image

from fastunet.data.samples import IGNORED
from fastunet.data.warp import Warp, apply_warp, draw_warp, spline_coefficients
from fastunet.data.warp_cuda import apply_warp as apply_warp_cuda


def position_error(tile):
    """What float32 may do to a coordinate of about this size in the order in which either device computes it.

    Four products and sums of numbers up to 2 * tile, each off by 2^-24 of it, on either device.
    """
    return tile * 2.0**-20


def warp_on_device(image, labels, weights, warp, order="linear", pixels=np.float32, **options):
    """x, y, w in host memory, from poisoned outputs."""
    tile, output = warp.tile, warp.output
    out = (
        np.full((tile, tile, image.shape[2]), 77, pixels),
        np.full((output, output), 77, labels.dtype),
        np.full((output, output), 77, np.float32),
    )
    out = tuple(map(cuda.to_device, out))
    apply_warp_cuda(*map(cuda.to_device, (image, labels, weights)), warp, out, order, **options)
    return tuple(array.copy_to_host() for array in out)


@pytest.mark.parametrize("order", ["linear", "cubic"])
@pytest.mark.parametrize(
    ("shape", "channels", "tile", "output", "kind"),
    [
        ((31, 26), 1, 33, 21, np.uint8),
        ((9, 40), 3, 24, 24, np.int32),
        ((2, 3), 2, 16, 4, np.int64),
        ((1, 13), 1, 8, 2, np.uint16),
        ((1, 1), 1, 5, 1, bool),
    ],
)
def test_a_seed_is_the_sample_of_the_cpu_and_of_scipy(rng, order, shape, channels, tile, output, kind):
    image, labels, weights = random_image(rng, shape, channels, kind)
    warp = draw_warp(rng, shape, tile, output, displacement=rng.uniform(0, 2))
    places = coordinates(warp)
    border = (tile - output) // 2
    inner = places[:, border : border + output, border : border + output]

    prepared = spline_coefficients(image) if order == "cubic" else image
    found = warp_on_device(prepared, labels, weights, warp, order)
    expected = apply_warp(image, labels, weights, warp, order)
    # In images of [0, 1] the slope is at most 1 a pixel and axis, of the cubic spline about 3, times a gain of 1.2.
    np.testing.assert_allclose(found[0], expected[0], atol=8 * position_error(tile), rtol=0)
    np.testing.assert_allclose(found[2], expected[2], atol=3 * position_error(tile), rtol=0)
    clear = (abs(inner % 1 - 0.5) > position_error(tile)).all(0)
    np.testing.assert_array_equal(found[1][clear], expected[1][clear])

    for channel in range(channels):
        plane = ndimage.map_coordinates(
            image[..., channel].astype(float), places, order=1 if order == "linear" else 3, mode="mirror"
        )
        np.testing.assert_allclose(found[0][..., channel], warp.gain * plane + warp.offset, atol=3 * VALUE)
    np.testing.assert_allclose(
        found[2], ndimage.map_coordinates(weights.astype(float), inner, order=1, mode="mirror"), atol=VALUE
    )
    nearest = ndimage.map_coordinates(labels, inner, order=0, mode="mirror")
    np.testing.assert_array_equal(found[1][clear], nearest[clear])


@pytest.mark.parametrize(("shape", "tile", "output"), [((20, 23), 16, 6), ((3, 9), 17, 17)])
def test_the_identity_is_the_mirrored_crop_exactly(rng, shape, tile, output):
    image, labels, weights = random_image(rng, shape, 2)
    top, left = rng.integers(-tile, shape[0]), rng.integers(-tile, shape[1])
    warp = Warp(tile, output, (top + (tile - 1) / 2, left + (tile - 1) / 2))
    border = (tile - output) // 2

    def crop(array, inset, side):
        margin = 2 * tile
        mirrored = np.pad(array, [(margin, margin)] * 2 + [(0, 0)] * (array.ndim - 2), mode="reflect")
        first, second = top + margin + inset, left + margin + inset
        return mirrored[first : first + side, second : second + side]

    x, y, w = warp_on_device(image, labels, weights, warp)
    np.testing.assert_array_equal(x, crop(image, 0, tile))
    np.testing.assert_array_equal(y, crop(labels, border, output))
    np.testing.assert_array_equal(w, crop(weights, border, output))


def test_a_far_corner_of_a_wide_image_is_as_exact():
    image = (np.indices((3, 200_001))[1] % 2).astype(np.float32)[..., None]
    labels, weights = np.zeros(image.shape[:2], np.uint8), np.zeros(image.shape[:2], np.float32)
    x, _, _ = warp_on_device(image, labels, weights, Warp(5, 5, (1, 200_000 - 2.25)))
    np.testing.assert_allclose(x[2, :, 0], [0.25, 0.75, 0.25, 0.75, 0.25], atol=1e-6)


def test_bfloat16_is_rounded_as_pytorch_does(rng):
    # Magnitudes 2^-63 to 2^64; the lower half is a tie between two bfloat16, beside one, or anything.
    upper = (rng.integers(64, 192, (16, 16)) << 7) | rng.integers(0, 128, (16, 16))
    lower = np.where(
        rng.random((16, 16)) < 0.7,
        rng.choice([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF], (16, 16)),
        rng.integers(0, 2**16, (16, 16)),
    )
    sign = rng.integers(0, 2, (16, 16)) << 31
    image = (sign | upper << 16 | lower).astype(np.uint32).view(np.float32)[..., None]
    labels, weights = np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.float32)
    identity = Warp(8, 2, (7.5, 7.5))
    found, _, _ = warp_on_device(image, labels, weights, identity, pixels=np.uint16)
    expected = torch.from_numpy(image[4:12, 4:12].copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(found, expected)


def test_ignored_pixels_are_those_of_samples_and_an_empty_tile_is_known(rng):
    shape, tile, output = (25, 19), 16, 12
    image, labels, weights = random_image(rng, shape)
    labels[rng.random(shape) < 0.4] = IGNORED
    warp = draw_warp(rng, shape, tile, output, displacement=1)

    weighted = cuda.to_device(np.zeros(1, np.int32))
    plain = warp_on_device(image, labels, weights, warp)
    x, y, w = warp_on_device(image, labels, weights, warp, ignored=IGNORED, weighted=weighted)
    marked = plain[1] == IGNORED
    assert marked.any() and not marked.all()
    np.testing.assert_array_equal(x, plain[0])
    np.testing.assert_array_equal(y, np.where(marked, 0, plain[1]))
    np.testing.assert_array_equal(w, np.where(marked, 0, plain[2]))
    assert weighted.copy_to_host()[0] == 1

    weighted = cuda.to_device(np.zeros(1, np.int32))
    warp_on_device(image, np.full_like(labels, IGNORED), weights, warp, ignored=IGNORED, weighted=weighted)
    warp_on_device(image, labels, np.zeros_like(weights), warp, weighted=weighted)
    assert weighted.copy_to_host()[0] == 0


@pytest.mark.skipif(not hasattr(cuda, "as_cuda_array"), reason="the simulator takes no foreign arrays")
def test_arrays_and_streams_of_cupy(rng):
    import cupy  # only where there is a GPU

    image, labels, weights = random_image(rng, (300, 260))
    warp = draw_warp(rng, (300, 260), 188, 100)
    expected = warp_on_device(image, labels, weights, warp)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out = tuple(cupy.full(array.shape, 77, array.dtype) for array in expected)
        apply_warp_cuda(*map(cupy.asarray, (image, labels, weights)), warp, out, stream=stream.ptr)
        found = [array.get() for array in out]
    for result, reference in zip(found, expected):
        np.testing.assert_array_equal(result, reference)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": np.zeros((5, 6, 1))}, "image .*float32"),
        ({"labels": np.zeros((5, 7), int)}, r"labels .*\(5, 6\)"),
        ({"order": "nearest"}, "order"),
        ({"x": np.zeros((8, 8, 1), np.int16)}, "out x .*float32 or uint16"),
        ({"y": np.zeros((4, 4), np.uint8)}, "out y .*int64"),
        ({"w": np.zeros((5, 4), np.float32)}, r"out w .*\(4, 4\)"),
    ],
)
def test_mistakes_are_told(changes, words):
    arrays = {
        "image": np.zeros((5, 6, 1), np.float32),
        "labels": np.zeros((5, 6), np.int64),
        "weights": np.zeros((5, 6), np.float32),
        "x": np.zeros((8, 8, 1), np.float32),
        "y": np.zeros((4, 4), np.int64),
        "w": np.zeros((4, 4), np.float32),
    }
    order = changes.get("order", "linear")
    arrays.update({name: array for name, array in changes.items() if name != "order"})
    image, labels, weights, *out = map(cuda.to_device, arrays.values())
    with pytest.raises(ValueError, match=words):
        apply_warp_cuda(image, labels, weights, Warp(8, 4, (2, 2)), tuple(out), order)
