"""kernels/tile.cu against NumPy's "reflect" and fastunet.normalization: the same numbers."""

import numpy as np
import pytest

from emulator.tensors import empty, put, put_flat, rounded, run
from fastunet.backends.cuda import tile as host
from fastunet.normalization import normalize


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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("bits", [16, 32])
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
def test_gather(device, rng, shape, top, left, height, width, bits, dtype):
    high = 250 if dtype == np.uint8 else 60000
    image = (rng.random(shape) * 5 + rng.random() * high).astype(dtype)  # a narrow range far from 0
    channels = shape[2]
    rule = [(rng.random() * high, rng.random()) for _ in range(channels)]
    expected = mirrored(normalize(image, rule), top, left, height, width)
    tile = empty(device, (1, height, width, channels), bits, channels if channels <= 4 else None)
    pixels, normalization = put_flat(device, image), put_flat(device, np.array(rule))
    arguments = host.GatherArguments(
        pixels.pointer,
        normalization.pointer,
        tile.argument(),
        *shape[:2],
        top,
        left,
    )
    run(device, host.gather(arguments.tile, 8 * image.itemsize), bits, arguments)
    np.testing.assert_array_equal(tile.numpy()[0], rounded(expected, bits))


@pytest.mark.parametrize("classes", [2, 5])
def test_stitch(device, rng, classes):
    tile = rng.random((1, 20, 180, classes)).astype(np.float32)
    whole = rng.random((33, 200, classes)).astype(np.float32)
    prediction = put_flat(device, whole)
    probabilities = put(device, tile, 32, classes)
    for rows, columns, top, left in ((16, 173, 17, 27), (1, 1, 0, 0)):
        arguments = host.StitchArguments(
            probabilities.argument(), prediction.pointer, whole.shape[1], rows, columns, top, left
        )
        run(device, host.stitch(rows, columns, classes), 16, arguments)
        whole[top : top + rows, left : left + columns] = tile[0, :rows, :columns]
    np.testing.assert_array_equal(device.download(prediction.pointer, whole.shape, np.float32), whole)
