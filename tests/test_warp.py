import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import ndimage

from fastunet.data.warp import Warp, apply_warp, draw_warp, spline_coefficients

# Coordinates relative to the tile's middle are float32 sums of a few hundred pixels: off by some 2^-15 pixels, times
# the slope of the image, which is at most 1 a pixel in images of [0, 1] and order "linear".
POSITION = 2e-4
VALUE = 2e-4


def field(warp, rows, columns):
    """SciPy's interpolating cubic spline of the displacement vectors, at pixels of the tile: (2, ...)."""
    nodes = np.stack([rows, columns]) * (2 / max(warp.tile - 1, 1))
    return np.stack(
        [
            ndimage.map_coordinates(warp.displacement[..., axis], nodes, order=3, mode="mirror")
            for axis in range(2)
        ]
    )


def coordinates(warp):
    """Where each pixel of the tile lies in the image, by the definition in float64: (2, tile, tile)."""
    pixels = np.mgrid[: warp.tile, : warp.tile].astype(float)
    places = pixels + field(warp, *pixels) - (warp.tile - 1) / 2
    if warp.flip:
        places[1] *= -1
    turn = np.array(
        [[math.cos(warp.angle), -math.sin(warp.angle)], [math.sin(warp.angle), math.cos(warp.angle)]]
    )
    return np.tensordot(turn, places, 1) + np.array(warp.centre)[:, None, None]


def random_image(rng, shape, channels=1, dtype=np.uint8):
    return (
        rng.random((*shape, channels), dtype=np.float32),
        rng.integers(0, 200, shape).astype(dtype),
        rng.random(shape, dtype=np.float32),
    )


def ramp(shape, axis):
    """An image of its own coordinates, which interpolation returns as they are."""
    return np.broadcast_to(np.indices(shape)[axis], shape).astype(np.float32)[..., None].copy()


@pytest.mark.parametrize("tile", [188, 204, 316, 572])
def test_the_field_is_that_of_scipy(tile):
    shape = (3 * tile, 3 * tile)
    labels, weights = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    for seed in range(3):
        drawn = draw_warp((seed, tile), shape, tile, 4, displacement=10, gain=(1, 1), offset=(0, 0))
        warp = Warp(
            tile, 4, (1.5 * tile + 0.25, 1.5 * tile - 0.6), drawn.angle, drawn.flip, drawn.displacement
        )
        expected = coordinates(warp)
        for axis in range(2):
            found, _, _ = apply_warp(ramp(shape, axis), labels, weights, warp)
            np.testing.assert_allclose(found[..., 0], expected[axis], atol=POSITION + 2**-23 * 3 * tile)


@pytest.mark.parametrize("order", ["linear", "cubic"])
@pytest.mark.parametrize("shape", [(300, 260), (64, 301), (97, 5), (2, 3), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_labels_and_weights_are_those_of_scipy(order, shape, channels):
    seed = int(np.prod(shape)) + channels
    image, labels, weights = random_image(np.random.default_rng(seed), shape, channels)
    warp = draw_warp((seed, 1), shape, 188, 100)
    places = coordinates(warp)
    inner = places[:, 44:-44, 44:-44]
    x, y, w = apply_warp(image, labels, weights, warp, order)
    assert x.shape == (188, 188, channels)
    assert y.shape == w.shape == (100, 100)
    assert (x.dtype, y.dtype, w.dtype) == (np.float32, np.uint8, np.float32)

    for channel in range(channels):
        plane = image[..., channel].astype(float)
        expected = ndimage.map_coordinates(plane, places, order=1 if order == "linear" else 3, mode="mirror")
        # The cubic spline of noise in [0, 1] is steeper, by at most about 3.
        np.testing.assert_allclose(x[..., channel], warp.gain * expected + warp.offset, atol=3 * VALUE)
    np.testing.assert_allclose(
        w, ndimage.map_coordinates(weights.astype(float), inner, order=1, mode="mirror"), atol=VALUE
    )
    # Halfway between two pixels rounding decides; elsewhere the nearest is the nearest.
    clear = (abs(inner % 1 - 0.5) > POSITION).all(0)
    assert clear.mean() > 0.99
    nearest = ndimage.map_coordinates(labels, inner, order=0, mode="mirror")
    np.testing.assert_array_equal(y[clear], nearest[clear])


@pytest.mark.parametrize(
    ("shape", "tile", "output"), [((50, 60), 30, 10), ((9, 300), 65, 65), ((4, 3), 48, 2)]
)
def test_the_identity_is_the_mirrored_crop_exactly(shape, tile, output):
    rng = np.random.default_rng(tile)
    image, labels, weights = random_image(rng, shape, 2, np.int64)
    margin = 2 * tile
    border = (tile - output) // 2
    for _ in range(5):
        top, left = rng.integers(-tile, shape[0]), rng.integers(-tile, shape[1])
        warp = Warp(tile, output, (top + (tile - 1) / 2, left + (tile - 1) / 2))
        x, y, w = apply_warp(image, labels, weights, warp)

        def crop(array, inset, side, top=top, left=left):
            mirrored = np.pad(array, [(margin, margin)] * 2 + [(0, 0)] * (array.ndim - 2), mode="reflect")
            first, second = top + margin + inset, left + margin + inset
            return mirrored[first : first + side, second : second + side]

        np.testing.assert_array_equal(x, crop(image, 0, tile))
        np.testing.assert_array_equal(y, crop(labels, border, output))
        np.testing.assert_array_equal(w, crop(weights, border, output))


def test_right_angles_flip_and_grey_values():
    rng = np.random.default_rng(3)
    image, labels, weights = random_image(rng, (21, 21), 1, np.uint16)
    x, y, _ = apply_warp(image, labels, weights, Warp(21, 21, (10, 10), flip=True, gain=2, offset=-1))
    np.testing.assert_allclose(x, 2 * image[:, ::-1] - 1, atol=1e-6)
    np.testing.assert_array_equal(y, labels[:, ::-1])
    x, y, w = apply_warp(image, labels, weights, Warp(21, 21, (10, 10), angle=math.pi / 2))
    # Row p of the tile runs along column 20 - p of the image: np.rot90 the other way round.
    np.testing.assert_array_equal(y, np.rot90(labels, -1))
    np.testing.assert_allclose(x[..., 0], np.rot90(image[..., 0], -1), atol=VALUE)
    np.testing.assert_allclose(w, np.rot90(weights, -1), atol=VALUE)


def test_a_far_corner_of_a_wide_image_is_as_exact():
    shape = (3, 200_001)
    image = (np.indices(shape)[1] % 2).astype(np.float32)[..., None]
    labels, weights = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    warp = Warp(5, 5, (1, 200_000 - 2.25))
    x, _, _ = apply_warp(image, labels, weights, warp)
    np.testing.assert_allclose(x[2, :, 0], [0.25, 0.75, 0.25, 0.75, 0.25], atol=1e-6)


def test_prepared_coefficients_give_the_same_as_the_image():
    image, labels, weights = random_image(np.random.default_rng(8), (70, 90), 2)
    warp = draw_warp((8, 0), image.shape, 60, 20)
    expected = apply_warp(image, labels, weights, warp, "cubic")
    found = apply_warp(spline_coefficients(image), labels, weights, warp, "cubic", prefilter=False)
    for result, reference in zip(found, expected):
        np.testing.assert_array_equal(result, reference)


def test_threads_buffers_and_memory_order_change_nothing():
    image, labels, weights = random_image(np.random.default_rng(4), (120, 90), 2)
    warp = draw_warp((4, 0), image.shape, 101, 51)
    expected = apply_warp(image, labels, weights, warp)
    out = tuple(np.empty_like(array) for array in expected)
    found = apply_warp(image, labels, weights, warp, out=out, threads=7)
    assert all(result is buffer for result, buffer in zip(found, out))
    turned = apply_warp(*(np.asfortranarray(array) for array in (image, labels, weights)), warp)
    with ThreadPoolExecutor(6) as pool:
        at_once = list(pool.map(lambda _: apply_warp(image, labels, weights, warp, threads=2), range(24)))
    for results in (found, turned, *at_once):
        for result, reference in zip(results, expected):
            np.testing.assert_array_equal(result, reference)


def test_a_seed_and_an_index_are_a_sample():
    shape = (400, 300, 1)
    first, again, other = (draw_warp(key, shape, 316, 132) for key in ((7, 3), (7, 3), (7, 4)))
    assert (first.centre, first.angle, first.flip, first.gain, first.offset) == (
        again.centre,
        again.angle,
        again.flip,
        again.gain,
        again.offset,
    )
    np.testing.assert_array_equal(first.displacement, again.displacement)
    assert first.angle != other.angle
    generator = np.random.default_rng((7, 3))
    assert draw_warp(generator, shape, 316, 132).angle == first.angle
    assert draw_warp(generator, shape, 316, 132).angle != first.angle


@pytest.mark.parametrize(
    ("tile", "deviation"), [(572, 10), (512, 10), (316, 10 * 316 / 512), (188, 10 * 188 / 512)]
)
def test_vectors_have_the_deviation_of_the_tile(tile, deviation):
    vectors = np.concatenate([draw_warp((1, i), (9, 9), tile, 4).displacement.ravel() for i in range(300)])
    # 5400 normal numbers: their deviation is off by 1% (one sigma), their mean by 1.4% of it.
    assert vectors.std() == pytest.approx(deviation, rel=0.05)
    assert abs(vectors.mean()) < 0.07 * deviation


def test_draws_fill_their_ranges():
    warps = [draw_warp((2, i), (50, 70), 188, 4) for i in range(400)]
    for values, low, high in (
        ([warp.gain for warp in warps], 0.8, 1.2),
        ([warp.offset for warp in warps], -0.5, 0.5),
        ([warp.angle for warp in warps], 0, 2 * math.pi),
        ([warp.centre[0] for warp in warps], 0, 49),
        ([warp.centre[1] for warp in warps], 0, 69),
    ):
        assert low <= min(values) < low + 0.03 * (high - low)
        assert high - 0.03 * (high - low) < max(values) <= high
    assert 140 < sum(warp.flip for warp in warps) < 260


def test_the_output_covers_the_image_evenly():
    side, output, draws = 60, 25, 6000
    seen = np.zeros(side)
    period = 2 * (side - 1)
    for index in range(draws):
        centre = draw_warp((3, index), (side, 1), 65, output).centre[0]
        places = abs((np.rint(centre) + np.arange(output) - output // 2 + side - 1) % period - (side - 1))
        np.add.at(seen, places.astype(int), 1)
    # The pixel the mirror lies on has no mirror image, so that it is seen half as often; counts are off by 2%.
    np.testing.assert_allclose(seen[1:-1], draws * output / (side - 1), rtol=0.1)
    np.testing.assert_allclose(seen[[0, -1]], draws * output / (side - 1) / 2, rtol=0.15)


@pytest.mark.parametrize("tile", [188, 316, 512, 572, 2044])
def test_nothing_folds(tile):
    fine = np.linspace(0, tile - 1, 41)
    rows, columns = np.meshgrid(fine, fine, indexing="ij")
    smallest = math.inf
    for index in range(200):
        warp = draw_warp((tile, index), (9, 9), tile, 4)
        down, right = np.stack([rows, columns]) + field(warp, rows, columns)
        (a, b), (c, d) = np.gradient(down, fine, fine), np.gradient(right, fine, fine)
        smallest = min(smallest, (a * d - b * c).min())
    assert smallest > 0.4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": np.zeros((5, 6), np.float32)}, r"image .*\(H, W, C\)"),
        ({"image": np.zeros((5, 6, 1))}, "image .*float32"),
        ({"labels": np.zeros((5, 7), int)}, r"labels .*\(5, 6\)"),
        ({"labels": np.zeros((5, 6))}, "labels .*integers"),
        ({"weights": np.zeros((5, 6))}, "weights .*float32"),
        ({"order": "nearest"}, "order"),
        ({"threads": 0}, "threads"),
        ({"out": tuple(np.zeros(s, np.float32) for s in ((8, 8, 1), (4, 4), (4, 4)))}, "out y"),
    ],
)
def test_mistakes_are_told(changes, words):
    arguments = {
        "image": np.zeros((5, 6, 1), np.float32),
        "labels": np.zeros((5, 6), int),
        "weights": np.zeros((5, 6), np.float32),
        "warp": Warp(8, 4, (2, 2)),
    }
    with pytest.raises(ValueError, match=words):
        apply_warp(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tile": 8, "output": 5}, "output 5"),
        ({"tile": 8, "output": 10}, "output 10"),
        ({"tile": 8, "output": 4, "displacement": np.zeros((3, 3))}, "displacement"),
        ({"tile": 8, "output": 4, "angle": math.nan}, "finite"),
    ],
)
def test_a_warp_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Warp(centre=(0, 0), **arguments)
