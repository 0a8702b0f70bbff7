"""kernels/tile.cu against NumPy's "reflect" and fastunet.normalization: the same numbers."""

import numpy as np
import pytest

from emulator.tensors import empty, put, put_flat, rounded, run
from fastunet.backends.cuda import tile as host
from fastunet.backends.cuda.prediction import Plane
from fastunet.normalization import normalize
from fastunet.rotations import Turn, views


def mirrored(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """The pixels from (top, left) on of an image mirrored for ever, by one-pixel steps of numpy.pad's rule."""

    def places(first: int, count: int, size: int) -> list[int]:
        period = [*range(size), *range(size - 2, 0, -1)]
        return [period[(first + i) % len(period)] for i in range(count)]

    rows, columns = places(top, height, image.shape[0]), places(left, width, image.shape[1])
    return image[np.ix_(rows, columns)]


def test_the_reference_is_numpys(rng):
    image = rng.random((4, 3, 2))
    padded = np.pad(image, ((9, 8), (7, 11), (0, 0)), "reflect")
    np.testing.assert_array_equal(mirrored(image, -9, -7, *padded.shape[:2]), padded)


@pytest.fixture
def few_rows(monkeypatch):
    """A grid has fewer rows than a tile."""
    monkeypatch.setattr(host, "MOST_BLOCKS", 7)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "shape, top, left, height, width",
    [
        ((1, 1, 1), -3, -2, 5, 7),
        ((1, 6, 3), -4, 2, 3, 4),
        ((5, 4, 1), -13, -9, 30, 270),
        ((9, 20, 2), 3, 4, 2, 9),
        ((7, 3, 18), -2, -7, 8, 11),
    ],
    ids=str,
)
def test_gather(device, rng, shape, top, left, height, width, bits, dtype, turned, few_rows):
    high = 250 if dtype == np.uint8 else 60000
    image = (rng.random(shape) * 5 + rng.random() * high).astype(dtype)  # a narrow range far from 0
    channels = shape[2]
    rule = [(rng.random() * high, rng.random()) for _ in range(channels)]
    view = Turn(1, mirror=True) if turned else Turn()
    expected = mirrored(view.turned(normalize(image, rule)), top, left, height, width)
    tile = empty(device, (1, height, width, channels), bits, channels if channels <= 4 else None)
    pixels, normalization = Plane.upload(device, image).turned(view), put_flat(device, np.array(rule))
    steps = pixels.row_step, pixels.column_step
    arguments = host.GatherArguments(
        pixels.pointer,
        normalization.pointer,
        tile.argument(),
        pixels.height,
        pixels.width,
        *steps,
        top,
        left,
    )
    run(device, host.gather(arguments.tile, 8 * image.itemsize), bits, arguments)
    np.testing.assert_array_equal(tile.numpy()[0], rounded(expected, bits))


@pytest.mark.parametrize("view", views(8), ids=str)
@pytest.mark.parametrize("classes", [2, 5])
def test_stitch_adds_to_what_the_view_shows(device, rng, classes, view, few_rows):
    tile = rng.random((1, 20, 180, classes)).astype(np.float32)
    whole = rng.random((*view.size(33, 200), classes)).astype(np.float32)
    prediction = Plane.upload(device, whole).turned(view)
    seen = view.turned(whole)
    probabilities = put(device, tile, 32, classes)
    for rows, columns, top, left in ((16, 173, 17, 27), (1, 1, 0, 0)):
        arguments = host.StitchArguments(
            probabilities.argument(),
            prediction.pointer,
            prediction.row_step,
            prediction.column_step,
            rows,
            columns,
            top,
            left,
        )
        run(device, host.stitch(rows, columns, classes), 16, arguments)
        seen[top : top + rows, left : left + columns] += tile[0, :rows, :columns]
    found = device.download(prediction.memory.pointer, whole.shape, np.float32)
    np.testing.assert_array_equal(found, whole)
