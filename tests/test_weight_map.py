import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fastunet import separate, weight_map
from fastunet.data.weight_map import balanced_class_weights, count_classes, instance_labels, two_nearest

DATA = Path(os.environ.get("FASTUNET_DATA", Path(__file__).parents[2] / "shared" / "data"))
FRAME = DATA / "ctc" / "PhC-C2DL-PSC" / "01_ST" / "SEG" / "man_seg299.tif"

# float32 of a float64 result is off by 2^-24 of it at most, and terms below 2^-24 are left out.
ROUNDING = {"rtol": 2**-23, "atol": 2**-23}


@st.composite
def label_images(draw):
    """Specks, blocks and stripes of up to eight labels, which need be neither connected nor consecutive."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    names = np.concatenate([[0], rng.choice(np.arange(1, 60000), 8, replace=False)])
    labels = rng.integers(1, draw(st.integers(2, 9)), (height, width))
    labels[rng.random((height, width)) > draw(st.sampled_from([0.01, 0.1, 0.5, 0.9, 1.0]))] = 0
    block = draw(st.sampled_from([(1, 1), (3, 2), (1, 5), (4, 4)]))
    return names[np.kron(labels, np.ones(block, int))].astype(np.uint16)


def nearest_by_instance(labels):
    """Distances to the nearest and second nearest instance: one SciPy transform for each, the usual way."""
    instances = np.setdiff1d(labels, [0])
    distances = np.full((max(2, instances.size), *labels.shape), np.inf)
    for place, instance in enumerate(instances):
        distances[place] = ndimage.distance_transform_edt(labels != instance)
    distances.sort(axis=0)
    return distances[0], distances[1]


@settings(deadline=None, max_examples=150)
@given(label_images(), st.integers(1, 4))
def test_distances_are_those_of_scipy_for_each_instance(labels, threads):
    expected = nearest_by_instance(labels)
    found = two_nearest(labels, threads=threads)
    for distance, reference in zip(found, expected):
        np.testing.assert_array_equal(distance, reference.astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(label_images(), st.floats(0, 40))
def test_distances_beyond_the_radius_are_infinite_and_the_others_exact(labels, radius):
    for distance, reference in zip(two_nearest(labels, radius), nearest_by_instance(labels)):
        np.testing.assert_array_equal(
            distance, np.where(reference <= radius, reference, np.inf).astype(np.float32)
        )


@settings(deadline=None, max_examples=80)
@given(label_images(), st.floats(0.5, 12), st.floats(0, 50), st.booleans())
def test_paper2015_is_its_formula(labels, sigma, w0, cut):
    mask = separate(labels) if cut else (labels > 0).astype(np.uint8)
    d1, d2 = nearest_by_instance(labels)
    counts = np.bincount(mask.ravel(), minlength=2)
    base = np.divide(mask.size, 2 * counts, out=np.zeros(2), where=counts > 0)
    expected = base[mask] + np.where(mask == 0, w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)), 0)
    found = weight_map(labels, mask, w0=w0, sigma=sigma)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, **ROUNDING)


@settings(deadline=None, max_examples=40)
@given(label_images())
def test_falk2019_is_its_formula(labels):
    d1, d2 = nearest_by_instance(labels)
    background = 0.1 + 50 * np.exp(-((d1 + d2) ** 2) / (2 * 6**2)) + 0.9 * np.exp(-(d1**2) / (2 * 10**2))
    found = weight_map(labels, preset="falk2019")
    np.testing.assert_allclose(found, np.where(labels > 0, 1, background), **ROUNDING)


def test_a_gap_between_two_instances_by_hand():
    labels = np.array([[1, 1, 0, 2, 2]])
    # Distances 1 and 1 in the gap; 1 background and 4 object pixels: 5 / (2 * 1) and 5 / (2 * 4).
    expected = [[0.625, 0.625, 2.5 + 10 * math.exp(-4 / 50), 0.625, 0.625]]
    np.testing.assert_allclose(weight_map(labels), expected, rtol=1e-6)


def test_a_cut_gap_measures_from_the_instances_as_given():
    labels = np.array([[1, 1, 1, 2, 2, 2]])
    # Cut pixels are part of their instance, so d1 = 0, and one step from the other, so d2 = 1.
    border = 10 * math.exp(-1 / 50)
    found = weight_map(labels, separate(labels), class_weights=None)
    np.testing.assert_allclose(found, [[1, 1, 1 + border, 1 + border, 1, 1]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 5)])
@pytest.mark.parametrize("value", [0, 3])
def test_constant_images_have_constant_weights(shape, value):
    labels = np.full(shape, value)
    # One class of two present: N / (2 N). One instance or none: no border term.
    np.testing.assert_array_equal(weight_map(labels), np.full(shape, 0.5, np.float32))
    np.testing.assert_array_equal(
        weight_map(labels, preset="falk2019"), np.full(shape, 1 if value else 0.1, np.float32)
    )


def test_one_instance_has_no_border_term():
    labels = np.zeros((20, 30), int)
    labels[5:9, 5:25] = 7
    np.testing.assert_array_equal(
        weight_map(labels, class_weights=[2, 3]), np.where(labels == 7, 3, 2).astype(np.float32)
    )


def test_more_than_two_classes():
    labels = np.array([[1, 1, 1, 2, 2, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 3, 3, 0, 0, 0]])
    border = [10 * math.exp(-((d1 + d2) ** 2) / 50) for d1, d2 in ((1, 3), (2, 4), (3, 5))]
    # N / (K N_c) with N = 8, K = 4; class 2 is absent.
    expected = [8 / 12] * 3 + [8 / 8] * 2 + [8 / 12 + term for term in border]
    np.testing.assert_allclose(weight_map(labels, mask), [expected], rtol=1e-6)
    np.testing.assert_allclose(balanced_class_weights([3, 3, 0, 2]), [8 / 12, 8 / 12, 0, 1])


def test_an_ignored_value_is_no_instance_no_class_and_weighs_nothing():
    labels = np.zeros((12, 12), np.uint8)
    labels[2:5, 2:5], labels[2:5, 7:10], labels[6, :] = 1, 2, 255
    ignored = labels == 255
    found = weight_map(labels, ignore=255)
    assert (found[ignored] == 0).all()
    np.testing.assert_array_equal(found, weight_map(np.where(ignored, 0, labels), ignore=ignored))
    # 144 - 12 ignored pixels: 18 of objects and 114 of background.
    assert found[2, 2] == np.float32(132 / 36)
    d1, d2 = math.hypot(7, 2), math.hypot(7, 7)
    assert found[11, 11] == pytest.approx(132 / 228 + 10 * math.exp(-((d1 + d2) ** 2) / 50), rel=1e-6)
    np.testing.assert_array_equal(count_classes(labels > 0, ignored=ignored), [114, 18])


def test_class_counts_add_up_over_a_set():
    rng = np.random.default_rng(5)
    masks = [rng.integers(0, 3, (9, 11)) for _ in range(4)]
    total = sum(count_classes(mask, 4) for mask in masks)
    np.testing.assert_array_equal(total, np.bincount(np.ravel(masks), minlength=4))
    weights = balanced_class_weights(total)
    assert weights[3] == 0
    assert (weights * total)[:3] == pytest.approx(total.sum() / 4)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_any_integer_type_gives_the_same_and_is_left_alone(dtype):
    labels = np.zeros((16, 20), dtype)
    labels[3:6, 2:9] = 1
    before = labels.copy()
    np.testing.assert_array_equal(weight_map(labels), weight_map(labels.astype(np.int32)))
    np.testing.assert_array_equal(weight_map(labels.T).T, weight_map(labels))
    np.testing.assert_array_equal(labels, before)


def test_labels_too_large_for_int32_stay_distinct():
    labels = np.array([[2**40, 0, 2**40 + 2**32], [0, 5, 0]])
    found = instance_labels(labels)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found > 0, labels > 0)
    assert np.unique(found).size == 4
    assert (instance_labels(labels[:1, ::2]) > 0).all()


def test_callers_in_many_threads_do_not_disturb_each_other():
    rng = np.random.default_rng(11)
    images = [
        ndimage.zoom(np.where(rng.random((20, 20)) < 0.4, rng.integers(1, 400, (20, 20)), 0), 9, order=0)
        for _ in range(12)
    ]
    expected = [weight_map(image, threads=1) for image in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: weight_map(image, threads=3), images * 4))
    for result, reference in zip(found, expected * 4):
        np.testing.assert_array_equal(result, reference)


@pytest.mark.skipif(not FRAME.exists(), reason=f"no real images at {DATA} (set FASTUNET_DATA)")
def test_a_real_frame_of_650_cells():
    labels = tifffile.imread(FRAME)[30:160, 400:530]
    d1, d2 = nearest_by_instance(labels)
    mask = separate(labels)
    expected = 1 + np.where(mask == 0, 10 * np.exp(-((d1 + d2) ** 2) / 50), 0)
    assert (expected > 5).any()
    np.testing.assert_allclose(weight_map(labels, mask, class_weights=None), expected, **ROUNDING)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": np.zeros((3, 3))}, "float64"),
        ({"labels": np.zeros((2, 3, 3), int)}, r"\(2, 3, 3\)"),
        ({"labels": np.full((3, 3), -1)}, "ignore"),
        ({"labels": np.eye(3, dtype=int), "mask": np.zeros((3, 4), int)}, "mask"),
        ({"labels": np.eye(3, dtype=int), "mask": np.full((3, 3), -1)}, "mask"),
        ({"labels": np.eye(3, dtype=int), "ignore": np.zeros((3, 4), bool)}, "ignore"),
        ({"labels": np.eye(3, dtype=int), "ignore": np.zeros((3, 3), int)}, "ignore"),
        ({"labels": np.eye(3, dtype=int), "sigma": 0}, "sigma"),
        ({"labels": np.eye(3, dtype=int), "w0": math.nan}, "w0"),
        ({"labels": np.eye(3, dtype=int), "preset": "paper2016"}, "paper2015"),
        ({"labels": np.eye(3, dtype=int), "class_weights": "balance"}, "balance"),
        ({"labels": np.eye(3, dtype=int), "class_weights": [1]}, "class 1"),
        ({"labels": np.eye(3, dtype=int), "class_weights": [1, -1]}, "at least 0"),
        ({"labels": np.eye(3, dtype=int), "class_weights": [1, 1], "preset": "falk2019"}, "falk2019"),
        ({"labels": np.eye(3, dtype=int), "threads": 0}, "threads"),
    ],
)
def test_mistakes_are_told(arguments, words):
    with pytest.raises(ValueError, match=words):
        weight_map(**arguments)
