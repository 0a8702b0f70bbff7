"""The views of an image: exact for right angles, against SciPy-free references for the rest."""

import numpy as np
import pytest

from fastunet.rotations import Rotation, Turn, mirrored, views

SIZES = [(1, 1), (1, 9), (8, 1), (7, 13), (31, 30)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
def test_mirrored_is_numpys_reflect_folded_again_and_again(size):
    for before, after in ((0, 0), (3, 1), (37, 40), (92, 200)):
        expected = np.pad(np.arange(size), (before, after), mode="reflect")
        np.testing.assert_array_equal(mirrored(-before, size + after, size), expected)


@pytest.mark.parametrize("count", [1, 4, 7, 8])
@pytest.mark.parametrize("size", SIZES)
def test_every_view_undoes_itself(count, size):
    y, x = np.mgrid[: size[0], : size[1]] / max(size)
    image = np.stack([y, 0.5 - x], axis=2).astype(np.float32)
    assert len(views(count)) == count
    for view in views(count):
        seen = view.reader(image)(0, 0, *view.size(*size))
        back = view.undo(seen, *size)
        if isinstance(view, Turn):
            np.testing.assert_array_equal(back, image)
        else:
            # Ramps bend where they are mirrored, at the image's edge, and only there.
            inside = slice(2, -2), slice(2, -2)
            np.testing.assert_allclose(back[inside], image[inside], atol=0.01)
            assert back.shape == image.shape and np.abs(back - image).max() < 0.1


def test_eight_views_are_all_symmetries_of_the_square():
    image = np.arange(9, dtype=np.float32).reshape(3, 3, 1)
    seen = {view.reader(image)(0, 0, 3, 3).tobytes() for view in views(8)}
    turned = [np.rot90(image, k) for k in range(4)]
    assert seen == {np.ascontiguousarray(t).tobytes() for t in [*turned, *(t[:, ::-1] for t in turned)]}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", views(8))
def test_a_turn_reads_beyond_its_edges_by_mirroring(rng, size, view):
    image = rng.random((*size, 2), np.float32)
    whole = np.rot90(image, view.quarters)
    whole = whole[:, ::-1] if view.mirror else whole
    expected = np.pad(whole, ((5, 7), (6, 4), (0, 0)), mode="reflect")
    height, width = view.size(*size)
    np.testing.assert_array_equal(view.reader(image)(-5, -6, height + 12, width + 10), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_right_angle_by_resampling_is_the_turn(rng, size, quarters):
    image = rng.random((*size, 1), np.float32)
    turn, rotation = Turn(quarters), Rotation(90.0 * quarters)
    assert rotation.size(*size) == turn.size(*size)
    for part in ((0, 0, *turn.size(*size)), (-9, -4, 40, 33)):
        # Splines in float32 pass through the pixels to a few roundings.
        np.testing.assert_allclose(rotation.reader(image)(*part), turn.reader(image)(*part), atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("degrees", [360 / 7, 100.0, 2.5])
def test_a_rotated_view_holds_every_pixel(size, degrees):
    rotation = Rotation(degrees)
    height, width = rotation.size(*size)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    back = rotation.undo(np.stack([y, x], axis=2), *size)
    # Positions in the view come back as a rigid motion of the pixels, unclamped by the view's edge.
    steps = (
        np.hypot(*np.moveaxis(np.diff(back, axis=0), 2, 0)),
        np.hypot(*np.moveaxis(np.diff(back, axis=1), 2, 0)),
    )
    for step in steps:
        np.testing.assert_allclose(step, 1, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_a_part_of_a_rotated_view_is_that_part_of_the_whole(rng, size):
    read = Rotation(360 / 7).reader(rng.random((*size, 1), np.float32))
    np.testing.assert_allclose(read(-3, 2, 9, 11), read(-10, -10, 60, 60)[7:16, 12:23], atol=1e-5)


def test_probabilities_stay_probabilities(rng):
    rotation = Rotation(360 / 7)
    seen = rng.dirichlet([0.3, 0.3, 0.3], rotation.size(40, 30)).astype(np.float32)
    back = rotation.undo(seen, 40, 30)
    assert back.min() >= 0
    np.testing.assert_allclose(back.sum(axis=2), 1, atol=1e-5)


@pytest.mark.parametrize("count", [0, 2, 5, "4"])
def test_other_numbers_are_refused(count):
    with pytest.raises(ValueError, match="expected 1, 4, 7 or 8"):
        views(count)
