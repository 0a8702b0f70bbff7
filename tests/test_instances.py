"""Instances against SciPy's labelling, a brute-force growth and the separation they undo."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import ndimage

from fastunet.data.separation import separate
from fastunet.instances import connected_components, find_instances, instances_by_strips

images = npst.arrays(
    np.uint8, npst.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 3)
)


def in_raster_order(labels):
    """Renumber labels from 1 by their first pixel."""
    values, first = np.unique(labels, return_index=True)
    order = [value for _, value in sorted(zip(first, values)) if value != 0]
    number = {value: index + 1 for index, value in enumerate(order)} | {0: 0}
    return np.vectorize(number.get, otypes=[np.uint32])(labels)


def components_of_each_class(classes):
    """Label 4-connected components class by class with SciPy, numbered in raster order."""
    labels = np.zeros(classes.shape, np.int64)
    for value in np.unique(classes[classes != 0]):
        part, _ = ndimage.label(classes == value)
        labels[part > 0] = part[part > 0] + labels.max()
    return in_raster_order(labels)


@settings(deadline=None, max_examples=200)
@given(images)
def test_components_are_scipys(classes):
    np.testing.assert_array_equal(connected_components(classes), components_of_each_class(classes))
    instances = find_instances(classes, width=0)
    assert instances.dtype == np.uint32
    np.testing.assert_array_equal(instances, components_of_each_class(classes))


@pytest.mark.parametrize("density", [0.1, 0.4, 0.59, 0.8, 1.0])
def test_components_of_larger_images(density):
    foreground = np.random.default_rng(7).random((203, 317)) < density
    np.testing.assert_array_equal(find_instances(foreground, width=0), ndimage.label(foreground)[0])


def test_a_spiral_and_a_comb_are_one_component_each():
    comb = np.zeros((9, 41), bool)
    comb[:8, ::2] = True
    comb[8] = True
    assert find_instances(comb).max() == 1
    assert find_instances(comb[::-1]).max() == 1


def grown_by_brute_force(labels, width):
    """Look for the nearest and for another instance around every background pixel."""
    grown = labels.copy()
    positions = np.argwhere(labels != 0)
    for y, x in np.argwhere(labels == 0):
        steps = np.abs(positions - [y, x]).max(axis=1) if len(positions) else np.empty(0)
        near = positions[steps <= width]
        if not len(near):
            continue
        distance = ((near - [y, x]) ** 2).sum(axis=1)
        _, nearest, gap = min(
            (d, labels[tuple(p)], int(np.abs(p - [y, x]).max())) for d, p in zip(distance, near)
        )
        toward = (near[labels[tuple(near.T)] == nearest] - [y, x]).sum(axis=0)
        opposite = (labels[tuple(positions.T)] != nearest) & ((positions - [y, x]) @ toward <= 0)
        if opposite.any() and gap + steps[opposite].min() - 1 <= 2 * width:
            grown[y, x] = nearest
    return in_raster_order(grown)


@settings(deadline=None, max_examples=150)
@given(images, st.integers(1, 4))
def test_gaps_are_given_back_as_brute_force_does(classes, width):
    labels = components_of_each_class(classes)
    np.testing.assert_array_equal(find_instances(classes, width), grown_by_brute_force(labels, width))


def test_only_gaps_no_wider_than_what_was_cut_are_given_back():
    row = np.array([[1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(find_instances(row), [[1, 1, 1, 2, 2, 2, 0, 0, 0, 3, 3, 4, 0]])
    np.testing.assert_array_equal(find_instances(row, width=2), [[1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4, 0]])


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_instances_undo_the_separation(width, seed):
    random = np.random.default_rng(seed)
    seeds = random.uniform(0, 96, (25, 2))
    pixels = np.stack(np.mgrid[:96, :96], axis=2)
    distance = np.hypot(*np.moveaxis(pixels[:, :, None] - seeds, 3, 0))
    truth = np.where(distance.min(axis=2) < 14, distance.argmin(axis=2) + 1, 0)
    mask = separate(truth, width)
    found = find_instances(mask, width)
    cut = (truth > 0) & (mask == 0)
    assert cut.sum() > 200
    # Most of the cut comes back (not the corners of staircases and of three instances), and where it does, to
    # the instance it was taken from (but for middle lines, where two are equally near); nothing else changes.
    back = cut & (found > 0)
    owner = [0, *(truth[(found == n) & (mask > 0)].max() for n in range(1, found.max() + 1))]
    owner = np.array(owner)
    assert back.sum() > 0.75 * cut.sum()
    assert (owner[found] == truth)[back].mean() > 0.9
    assert (owner[found] == truth)[mask > 0].all()


def test_small_instances_are_left_out_before_they_can_grow():
    classes = np.zeros((5, 12), np.uint8)
    classes[1:4, 1:5] = 1
    classes[2, 6:8] = 1
    classes[1:4, 9:12] = 1
    assert find_instances(classes).max() == 3
    without = classes.copy()
    without[2, 6:8] = 0
    without[:, 9:] *= 2
    np.testing.assert_array_equal(find_instances(classes, min_size=3), without)
    assert find_instances(classes, min_size=10).max() == 1
    assert find_instances(classes, min_size=13).max() == 0


@settings(deadline=None, max_examples=150)
@given(npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, max_side=14)))
def test_holes_of_single_instances_are_filled(foreground):
    labels = ndimage.label(foreground)[0]
    expected = labels.copy()
    background, count = ndimage.label(labels == 0, structure=np.ones((3, 3)))
    for n in range(1, count + 1):
        hole = background == n
        rows, columns = np.nonzero(hole)
        at_edge = {0, foreground.shape[0] - 1} & set(rows) or {0, foreground.shape[1] - 1} & set(columns)
        around = set(labels[ndimage.binary_dilation(hole) & ~hole])
        if not at_edge and len(around) == 1:
            expected[hole] = around.pop()
    np.testing.assert_array_equal(find_instances(foreground, 0, fill_holes=True), in_raster_order(expected))


def test_a_hole_that_holds_another_instance_stays():
    classes = np.ones((9, 9), np.uint8)
    classes[2:7, 2:7] = 0
    classes[4, 4] = 1
    found = find_instances(classes, width=0, fill_holes=True)
    np.testing.assert_array_equal(found > 0, classes > 0)


def test_classes_are_kept_apart_and_floats_are_foreground_probabilities():
    classes = np.array([[1, 1, 2, 2], [0, 1, 2, 0]])
    np.testing.assert_array_equal(find_instances(classes, 0), [[1, 1, 2, 2], [0, 1, 2, 0]])
    np.testing.assert_array_equal(find_instances(classes * 0.4, 0), [[0, 0, 1, 1], [0, 0, 1, 0]])


def test_numbers_go_on_beyond_65535():
    dots = np.zeros((600, 600), bool)
    dots[::2, ::2] = True
    assert find_instances(dots, width=0).max() == 90000


@pytest.mark.parametrize(
    "classes", [np.zeros((2, 2, 2), int), np.zeros(4, int), np.zeros((0, 3), int), np.zeros((2, 2), complex)]
)
def test_arrays_that_are_refused(classes):
    with pytest.raises(ValueError, match="classes have shape"):
        find_instances(classes)


@pytest.mark.parametrize("options", [{"width": -1}, {"min_size": -5}])
def test_numbers_that_are_refused(options):
    with pytest.raises(ValueError, match="at least 0"):
        find_instances(np.zeros((2, 2), int), **options)


def rows_of(image):
    return lambda top, bottom: image[top:bottom]


@pytest.mark.parametrize(
    "width, min_size, fill_holes", [(0, 0, False), (1, 0, True), (2, 5, True), (3, 9, False)]
)
def test_strips_of_any_height_give_the_instances_of_the_whole(rng, width, min_size, fill_holes):
    for density in (0.3, 0.6, 0.8):
        classes = (rng.random((67, 53)) < density) * rng.integers(1, 3, (67, 53))
        coarse = np.kron(classes[:17, :14], np.ones((4, 4), int))
        for image in (classes, coarse):
            expected = find_instances(image, width, min_size, fill_holes)
            for strip in (1, 2, 7, int(rng.integers(1, 70))):
                options = width, min_size, fill_holes
                found = instances_by_strips(rows_of(image), *image.shape, strip, *options)
                np.testing.assert_array_equal(np.concatenate(list(found)), expected)
