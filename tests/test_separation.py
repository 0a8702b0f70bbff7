import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fastunet import separate

DATA = Path(os.environ.get("FASTUNET_DATA", Path(__file__).parents[2] / "shared" / "data"))
CELLS = DATA / "ctc" / "DIC-C2DH-HeLa" / "01_ST" / "SEG"
EIGHT = np.ones((3, 3), bool)


@st.composite
def label_images(draw):
    """Smooth and ragged regions that fill the plane or leave background between them."""
    shape = draw(st.integers(1, 36)), draw(st.integers(1, 36))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    smooth = draw(st.sampled_from([0, 0.4, 0.8, 1.5, 3]))
    fields = ndimage.gaussian_filter(rng.random((draw(st.integers(2, 8)), *shape)), (0, smooth, smooth))
    labels = fields.argmax(0)
    return labels + 1 if draw(st.booleans()) else labels


def touching_pixels(labels):
    """Pixels with an 8-neighbour of another instance."""
    touching = np.zeros(labels.shape, bool)
    for instance in np.setdiff1d(labels, [0]):
        own = labels == instance
        others = (labels > 0) & ~own
        touching |= own & ndimage.binary_dilation(others, EIGHT)
    return touching


def voronoi(rng, side, spacing):
    """Convex cells around the jittered points of a grid: every instance is wide and touches its neighbours."""
    points = np.stack(np.mgrid[spacing // 2 : side : spacing, spacing // 2 : side : spacing], -1).reshape(
        -1, 2
    )
    points = points + rng.uniform(-spacing / 6, spacing / 6, points.shape)
    pixels = np.stack(np.mgrid[:side, :side], -1)
    return 1 + ((pixels[:, :, None] - points) ** 2).sum(-1).argmin(-1)


@settings(deadline=None, max_examples=150)
@given(label_images(), st.integers(1, 4), st.sampled_from([None, EIGHT]))
def test_no_component_vanishes_or_is_split(labels, width, connectivity):
    mask = separate(labels, width)
    assert not mask[labels == 0].any()
    for instance in np.setdiff1d(labels, [0]):
        before, count = ndimage.label(labels == instance, connectivity)
        after, remaining = ndimage.label((labels == instance) & (mask > 0), connectivity)
        assert remaining == count
        assert np.unique(before[after > 0]).size == count


@settings(deadline=None, max_examples=60)
@given(label_images(), st.integers(1, 3))
def test_mirrored_turned_or_renumbered_images_are_cut_alike(labels, width):
    mask = separate(labels, width)
    for turn in (np.flipud, np.fliplr, np.transpose, np.rot90):
        np.testing.assert_array_equal(separate(turn(labels), width), turn(mask))
    numbers = np.random.default_rng(labels.size).permutation(labels.max()) + 1
    np.testing.assert_array_equal(separate(np.concatenate([[0], numbers])[labels], width), mask)


@settings(deadline=None, max_examples=80)
@given(label_images(), st.integers(1, 4))
def test_the_cut_is_no_wider_than_asked(labels, width):
    near = touching_pixels(labels)
    for _ in range(width - 1):
        grown = near.copy()
        for instance in np.unique(labels[near]):
            grown |= (labels == instance) & ndimage.binary_dilation(near & (labels == instance), EIGHT)
        near = grown
    cut = (labels > 0) & (separate(labels, width) == 0)
    assert not (cut & ~near).any()


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_wide_instances_are_cut_completely_and_exactly(width, seed):
    labels = voronoi(np.random.default_rng(seed), 96, 24)
    near = touching_pixels(labels)
    for _ in range(width - 1):  # one step further into each cell: its distance from the contact, in 8-steps
        near |= np.any(
            [ndimage.binary_dilation(near & (labels == n), EIGHT) & (labels == n) for n in np.unique(labels)],
            0,
        )
    mask = separate(labels, width)
    assert touching_pixels(labels).any()
    assert not touching_pixels(labels * mask).any()
    np.testing.assert_array_equal(mask == 0, near)


def test_instances_that_do_not_touch_are_left_alone():
    labels = np.zeros((40, 40), np.uint16)
    for number, (y, x) in enumerate(((1, 1), (1, 9), (9, 1), (9, 9)), 1):  # one pixel between them
        labels[y : y + 7, x : x + 7] = number
    for width in (1, 2, 5):
        np.testing.assert_array_equal(separate(labels, width), labels > 0)
    np.testing.assert_array_equal(separate(np.kron(labels, EIGHT.astype(int)), 0), np.kron(labels, EIGHT) > 0)


def test_an_instance_that_would_vanish_stays_and_its_neighbour_yields():
    labels = np.ones((6, 6), int)
    labels[2:4, 2:4] = 2
    expected = np.ones((6, 6), int)
    expected[1:5, 1:5] = 0
    expected[2:4, 2:4] = 1
    np.testing.assert_array_equal(separate(labels), expected)


def test_a_neck_that_holds_an_instance_together_stays():
    labels = np.array(
        [
            [1, 1, 1, 2, 2, 2, 1, 1, 1],
            [1, 1, 1, 2, 2, 2, 1, 1, 1],
            [1, 1, 1, 2, 2, 2, 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1, 1, 1],
        ]
    )
    expected = np.array(
        [
            [1, 1, 0, 0, 1, 0, 0, 1, 1],
            [1, 1, 0, 0, 1, 0, 0, 1, 1],
            [1, 1, 0, 0, 0, 0, 0, 1, 1],
            [1, 1, 1, 1, 1, 1, 1, 1, 1],
        ]
    )
    np.testing.assert_array_equal(separate(labels), expected)


def test_where_neither_can_yield_both_stay():
    np.testing.assert_array_equal(separate(np.array([[1, 2]])), [[1, 1]])
    np.testing.assert_array_equal(separate(np.array([[1, 1, 2, 2]])), [[1, 0, 0, 1]])


@pytest.mark.parametrize("labels", [np.zeros((1, 1), int), np.full((1, 1), 4), np.zeros((5, 0), int)])
def test_smallest_images(labels):
    found = separate(labels)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, labels > 0)


@pytest.mark.skipif(not CELLS.exists(), reason=f"no real images at {DATA} (set FASTUNET_DATA)")
def test_real_cells_that_touch_come_apart():
    frames = sorted(CELLS.glob("*.tif"))[-4:]
    for frame in frames:
        labels = tifffile.imread(frame)
        mask = separate(labels)
        assert touching_pixels(labels).sum() > 100
        assert not touching_pixels(labels * mask).any()


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="width is -1"):
        separate(np.eye(3, dtype=int), -1)
    with pytest.raises(ValueError, match="float32"):
        separate(np.eye(3, dtype=np.float32))
