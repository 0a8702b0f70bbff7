"""Metrics against brute force from their definitions, worked examples, py-ctcmetrics and scikit-image."""

import math

import numpy as np
import pytest
import tifffile
from ctc_metrics.metrics import seg as ctc_seg
from ctc_metrics.scripts.evaluate import match_computed_to_reference_masks
from scipy import ndimage
from scipy.stats import entropy
from skimage.metrics import adapted_rand_error
from skimage.segmentation import watershed

from fastunet import metrics
from fastunet.metrics.components import label_components
from fastunet.metrics.thinning import thin_borders
from fastunet.metrics.warping import SIMPLE, yokoi_number

FOUR, EIGHT = ndimage.generate_binary_structure(2, 1), ndimage.generate_binary_structure(2, 2)
SHAPES = [(1, 1), (1, 7), (6, 1), (5, 8), (9, 9)]

# Sums of up to some thousand terms in float64.
EXACT = {"rel": 1e-12, "abs": 1e-12}


def random_truth(rng, shape):
    return rng.random(shape) < rng.uniform(0.3, 0.9)


def random_prob(rng, shape):
    """Values with many ties, some of them at the thresholds."""
    return rng.choice([0, 0.05, 0.1, 0.2, 0.25, 0.5, 0.7, 0.9, 1], shape).astype(rng.choice(["f4", "f8"]))


def cells(rng, size=96, pitch=12):
    """A truth of cells with borders one pixel wide, and a blurred, noisy proposal of it."""
    seeds = np.zeros((size, size), int)
    places = rng.integers(0, size, (size * size // pitch**2, 2))
    seeds[places[:, 0], places[:, 1]] = np.arange(1, len(places) + 1)
    truth = watershed(rng.random((size, size)), seeds, connectivity=1, watershed_line=True)
    noise = ndimage.gaussian_filter(rng.normal(size=truth.shape), 1.5)
    prob = ndimage.gaussian_filter((truth > 0).astype(float), 1) + noise
    return truth, np.clip(prob, 0, 1).astype(np.float32)


# Components and thinning


@pytest.mark.parametrize("shape", [*SHAPES, (37, 41)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_components_are_scipys(rng, shape, diagonal):
    for density in (0.2, 0.5, 0.7):
        mask = rng.random(shape) < density
        labels, count = label_components(mask, diagonal)
        expected, expected_count = ndimage.label(mask, EIGHT if diagonal else FOUR)
        assert count == expected_count
        # Both number components in raster order of their first pixels.
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    ("labels", "thinned"),
    [
        ([[1, 0, 2]], [[1, 0, 2]]),
        ([[1, 0, 0, 0, 2]], [[1, 1, 0, 2, 2]]),
        ([[1, 0, 0, 2]], [[1, 1, 0, 2]]),  # of two equal pixels the first in raster order floods
        ([[0, 0, 1, 0, 0]], [[1, 1, 1, 1, 1]]),
        ([[0, 0], [0, 0]], [[0, 0], [0, 0]]),
        ([[1, 0], [0, 2]], [[1, 0], [0, 2]]),
        ([[1, 0, 2], [0, 0, 0], [3, 0, 4]], [[1, 0, 2], [0, 0, 0], [3, 0, 4]]),
    ],
)
def test_thinning_by_hand(labels, thinned):
    np.testing.assert_array_equal(thin_borders(np.array(labels, np.int32)), thinned)


def test_thinning_keeps_segments_apart(rng):
    for density in (0.1, 0.4, 0.6):
        mask = ndimage.binary_opening(rng.random((40, 53)) < density + 0.2, FOUR)
        labels, count = label_components(mask, False)
        thinned = thin_borders(labels)
        np.testing.assert_array_equal(thinned[mask], labels[mask])
        again, again_count = ndimage.label(thinned > 0, FOUR)
        assert again_count == count
        assert len(np.unique(np.stack([again, thinned]).reshape(2, -1), axis=1).T) == len(np.unique(thinned))


def test_thinned_scores_agree_with_scikit_image(rng):
    """scikit-image counts the background as one segment, which hardly matters after thinning.

    Its watershed draws other lines where distances are equal, so scores agree to a few pixels' weight.
    """
    for _ in range(3):
        truth, prob = cells(rng, 256, 24)
        for threshold in (0.4, 0.6):
            markers = ndimage.label(prob > threshold, FOUR)[0]
            lines = watershed(prob <= threshold, markers, connectivity=1, watershed_line=True)
            components = ndimage.label(truth > 0, FOUR)[0]
            expected = 1 - adapted_rand_error(components, lines, ignore_labels=(0,))[0]
            curve = metrics.overlaps(truth, prob, thinned=True, thresholds=[threshold]).v_rand()
            assert curve.figure == pytest.approx(expected, abs=5e-3)


# Pixel error, IoU, Dice


def test_pixel_error_by_brute_force(rng):
    for shape in SHAPES:
        truth, prob = random_truth(rng, (3, *shape)), random_prob(rng, (3, *shape))
        scores = []
        for threshold in metrics.THRESHOLDS:
            on = prob > threshold
            both, total = np.count_nonzero(on & truth), np.count_nonzero(on) + np.count_nonzero(truth)
            scores.append(2 * both / total if total else 1)
        assert metrics.pixel_error(truth, prob) == pytest.approx(1 - max(scores), **EXACT)
        curve = metrics.pixel_curve(truth, prob)
        np.testing.assert_allclose(curve.figures, 1 - np.array(scores), atol=1e-12)
        assert curve.best == int(np.argmax(scores))


def test_pixel_error_by_hand():
    truth = np.array([[1, 1, 1, 0, 0, 0]])
    prob = np.array([[0.9, 0.8, 0.05, 0.3, 0.02, 0.04]])
    curve = metrics.pixel_curve(truth, prob)
    assert metrics.pixel_error(truth, prob) == pytest.approx(0.2)
    np.testing.assert_allclose(curve.figures[:4], [3 / 9, 2 / 6, 2 / 6, 1 / 5])
    assert curve.threshold == pytest.approx(0.3)  # 0.3 is not greater than 0.3: two are on, both true
    assert (curve.precision[3], curve.recall[3]) == (1, pytest.approx(2 / 3))


def test_a_value_at_the_threshold_is_off():
    assert metrics.pixel_curve([[1]], np.array([[0.0]])).figures.tolist() == [1] * 11
    assert metrics.pixel_curve([[1]], np.array([[0.5]])).figures.tolist() == [0] * 5 + [1] * 6
    assert metrics.pixel_curve([[1]], np.array([[1.0]])).figures.tolist() == [0] * 10 + [1]
    # Rounding of the softmax: what exceeds 1 by it is 1, and off at the last threshold.
    assert metrics.pixel_curve([[1]], np.array([[1.000001]])).figures.tolist() == [0] * 10 + [1]


def test_iou_and_dice(rng):
    truth, pred = np.array([[1, 1, 0, 0]]), np.array([[0, 5, 5, 5]])
    assert metrics.iou(truth, pred) == 1 / 4
    assert metrics.dice(truth, pred) == 2 / 5
    assert metrics.iou(truth, np.array([[0.4, 0.6, 0.5, 0.51]])) == 1 / 3
    nothing = np.zeros((3, 3), int)
    assert metrics.iou(nothing, nothing) == metrics.dice(nothing, nothing) == 1
    assert metrics.iou(nothing, nothing + 1) == metrics.dice(nothing, nothing + 1) == 0
    for shape in SHAPES:
        one, other = random_truth(rng, (2, *shape)), random_truth(rng, (2, *shape))
        both, either = np.count_nonzero(one & other), np.count_nonzero(one | other)
        assert metrics.iou(one, other) == (both / either if either else 1)
        assert metrics.dice(one, other) == (2 * both / (both + either) if either else 1)


def test_iou_per_class(rng):
    truth, pred = rng.integers(0, 4, (2, 3, 9, 7)).astype(np.uint8)
    for name in range(4):
        one, other = truth == name, pred == name
        both, either = np.count_nonzero(one & other), np.count_nonzero(one | other)
        assert metrics.iou_per_class(truth, pred, 5)[name] == both / either
        assert metrics.dice_per_class(truth, pred, 5)[name] == 2 * both / (both + either)
    assert math.isnan(metrics.iou_per_class(truth, pred, 5)[4])
    with pytest.raises(ValueError, match="class 3, classes from 0 to 2"):
        metrics.iou_per_class(np.minimum(truth, 2), np.maximum(pred, 3), 3)


# Rand and information


def segments_of_pixels(truth, proposal):
    """Segments of the truth's foreground pixels on both sides, each background pixel of the proposal its own."""
    inside = truth > 0
    true = ndimage.label(inside, FOUR)[0][inside]
    found = ndimage.label(proposal, FOUR)[0]
    alone = -1 - np.arange(found.size).reshape(found.shape)
    return true, np.where(found > 0, found, alone)[inside]


def shared_pairs(labels):
    return labels[:, None] == labels[None, :]


def entropy_of(labels):
    return entropy(np.unique(labels, return_counts=True, axis=0)[1])


def test_rand_family_by_counting_pairs(rng):
    for shape in SHAPES:
        truth, prob = random_truth(rng, (3, *shape)), random_prob(rng, (3, *shape))
        truth[0].flat[0] = True
        pooled, rand, info = [], [], []
        for threshold in metrics.THRESHOLDS:
            pairs, rand_scores, info_scores = np.zeros(3), [], []
            for labels, slice_prob in zip(truth, prob):
                true, found = segments_of_pixels(labels, slice_prob > threshold)
                if not len(true):
                    continue
                in_truth, in_proposal = shared_pairs(true), shared_pairs(found)
                both = in_truth & in_proposal
                rand_scores.append(2 * both.sum() / (in_truth.sum() + in_proposal.sum()))
                # Pairs of different pixels, each counted once.
                pairs += [(both.sum() - len(true)) / 2] + [
                    (matrix.sum() - len(true)) / 2 for matrix in (in_truth, in_proposal)
                ]
                parts = entropy_of(true), entropy_of(found), entropy_of(np.stack([true, found], axis=1))
                total = parts[0] + parts[1]
                info_scores.append(2 * (total - parts[2]) / total if total > 1e-12 else 1)
            pooled.append(2 * pairs[0] / (pairs[1] + pairs[2]) if pairs[1] + pairs[2] else 1)
            rand.append(np.mean(rand_scores))
            info.append(np.mean(info_scores))
        assert metrics.rand_error(truth, prob) == pytest.approx(1 - max(pooled), **EXACT)
        assert metrics.v_rand(truth, prob, thinned=False) == pytest.approx(max(rand), **EXACT)
        assert metrics.v_info(truth, prob, thinned=False) == pytest.approx(max(info), **EXACT)
        shared = metrics.overlaps(truth, prob)
        np.testing.assert_allclose(shared.rand_error().figures, 1 - np.array(pooled), atol=1e-12)
        np.testing.assert_allclose(shared.v_rand().figures, rand, atol=1e-12)
        np.testing.assert_allclose(shared.v_info().figures, info, atol=1e-12)


def test_v_rand_by_hand():
    """Two cells of 2 and 3 pixels, merged: p = (2/5, 3/5), the joint sum 13/25, the proposal's 1."""
    truth = np.array([[1, 1, 0, 1, 1, 1]])
    merged = np.ones((1, 6))
    assert metrics.v_rand(truth, merged, thinned=False) == pytest.approx(2 * 13 / (13 + 25))
    curve = metrics.overlaps(truth, merged).v_rand()
    assert (curve.precision[0], curve.recall[0]) == (pytest.approx(13 / 25), 1)
    # Pairs of pixels: 1 + 3 in the truth, 10 in the proposal.
    assert metrics.rand_error(truth, merged) == pytest.approx(1 - 2 * 4 / (4 + 10))
    # Merged into one segment, the proposal knows nothing.
    assert metrics.overlaps(truth, merged).v_info().figures[:10].tolist() == [0] * 10
    # Split off as a singleton: the truth's pairs are 1 + 3, those kept 1 + 1.
    split = np.array([[1, 1, 0, 1, 1, 0]], float)
    assert metrics.rand_error(truth, split) == pytest.approx(1 - 2 * 2 / (2 + 4))
    assert metrics.overlaps(truth, split).v_rand().recall[0] == pytest.approx((4 + 4 + 1) / 13)


def test_thinning_gives_wide_borders_back():
    truth = np.array([[1, 1, 1, 0, 1, 1, 1]] * 3)
    prob = np.array([[1, 0, 0, 0, 0, 0, 1]] * 3, float)
    assert metrics.v_rand(truth, prob) == metrics.v_info(truth, prob) == 1
    assert metrics.v_rand(truth, prob, thinned=False) < 0.5


def test_perfect_predictions(rng):
    truth, _ = cells(rng)
    prob = (truth > 0).astype(np.float32)
    assert metrics.pixel_error(truth, prob) == 0
    assert metrics.rand_error(truth, prob) == 0
    assert metrics.warping_error(truth, prob) == metrics.warping_error(truth, prob, plain=True) == 0
    assert metrics.v_rand(truth, prob) == metrics.v_rand(truth, prob, thinned=False) == 1
    assert metrics.v_info(truth, prob) == pytest.approx(1, abs=1e-12)
    assert metrics.seg(truth, truth) == metrics.iou(truth, prob) == metrics.dice(truth, prob) == 1


def test_truth_without_foreground():
    nothing, prob = np.zeros((4, 4), bool), np.full((4, 4), 0.3)
    assert metrics.pixel_error(nothing, prob) == 0  # at thresholds that find nothing either
    assert metrics.warping_error(nothing, prob) == 0
    for undefined in (metrics.rand_error, metrics.v_rand, metrics.v_info):
        assert math.isnan(undefined(nothing, prob))
    assert math.isnan(metrics.seg(nothing, np.ones((4, 4), int)))
    # A slice that cannot be judged is left out of the mean.
    something = np.eye(4, dtype=bool)
    assert metrics.v_rand([nothing, something], [prob, something]) == 1


def test_empty_prediction(rng):
    truth, prob = np.ones((4, 5), bool), np.zeros((4, 5))
    assert metrics.pixel_error(truth, prob) == metrics.rand_error(truth, prob) == 1
    assert metrics.iou(truth, prob) == metrics.dice(truth, prob) == metrics.seg(truth, truth & False) == 0
    # Every pixel is its own segment: sum p^2 is 1 in the truth, 1 / n in the proposal.
    assert metrics.v_rand(truth, prob) == pytest.approx(2 / 20 / (1 + 1 / 20))
    assert metrics.v_info(truth, prob) == 0
    # Warped, a single pixel is left of the cell.
    assert metrics.warping_error(truth, prob) == 0
    assert metrics.warping_error(truth, prob, plain=True) == 1 / 20


def test_label_overlaps_take_segments_as_given(rng):
    truth, prob = cells(rng)
    expected = metrics.overlaps(truth, prob, thresholds=[0.5])
    for offset in (0, 10**7):  # labels far larger than the image
        true, found = (ndimage.label(image)[0] for image in (truth > 0, prob > 0.5))
        given = metrics.label_overlaps(true, np.where(found > 0, found + offset, 0))
        np.testing.assert_allclose(given.sums, expected.sums, rtol=1e-12)
    touching = np.array([[1, 1, 2, 2]])
    assert metrics.label_overlaps(touching, touching).v_rand().figure == 1
    assert metrics.label_overlaps(touching, touching > 0).v_rand().figure == pytest.approx(2 / 3)


# Warping error


def count_topology(image):
    return ndimage.label(image, FOUR)[1], ndimage.label(~image, EIGHT)[1]


def test_simple_pixels_are_those_that_keep_the_topology():
    """Flip the centre of every neighbourhood, with background around: components and holes stay the same."""
    circle = [(2, 3), (1, 3), (1, 2), (1, 1), (2, 1), (3, 1), (3, 2), (3, 3)]
    for code in range(256):
        image = np.zeros((5, 5), bool)
        for place, (y, x) in enumerate(circle):
            image[y, x] = code >> place & 1
        before = count_topology(image)
        image[2, 2] = True
        assert SIMPLE[code] == (count_topology(image) == before), f"{code:08b}"
    assert [yokoi_number(code) for code in (0, 1, 0b10001, 0b1010101, 255)] == [0, 1, 2, 4, 0]


def naive_warping(truth, prob, threshold):
    """The definition as it stands, with a relabelling for every pixel that may split: counts by kind."""
    warped = np.pad(truth > 0, 1)
    values = np.pad(prob.astype(np.float64), 1)
    proposal = np.pad(prob > threshold, 1)
    height, width = warped.shape
    before = math.inf
    while True:
        wrong = [(y, x) for x in range(width) for y in range(height) if warped[y, x] != proposal[y, x]]
        if len(wrong) == before:
            break
        before = len(wrong)
        for y, x in sorted(wrong, key=lambda place: -abs(values[place] - threshold)):
            changed = warped.copy()
            changed[y, x] = not changed[y, x]
            around = np.s_[y - 1 : y + 2, x - 1 : x + 2]
            # A pixel is simple when its own neighbourhood, on background, keeps its components and holes.
            if count_topology(np.pad(warped[around], 1)) == count_topology(np.pad(changed[around], 1)):
                warped = changed
    counts = dict.fromkeys(metrics.Warping.KINDS, 0)
    ring = np.array([0, 1, 2, 3, 5, 6, 7, 8])
    for y, x in wrong:
        around = np.s_[y - 1 : y + 2, x - 1 : x + 2]
        near = set(ndimage.label(warped, FOUR)[0][around].ravel()[ring])
        white = warped[y, x]
        if near == {0}:
            kind = "object deletions" if white else "object additions"
        elif len(near) == 1:
            kind = "hole additions" if white else "hole deletions"
        elif len(near) > 2:
            kind = "splits" if white else "mergers"
        elif not white:
            kind = "hole additions"
        else:
            without = warped.copy()
            without[y, x] = False
            pieces = set(ndimage.label(without, FOUR)[0][around].ravel()[ring])
            kind = "splits" if len(pieces) > 2 else "hole deletions"
        counts[kind] += 1
    return list(counts.values())


def test_warping_error_by_relabelling(rng):
    seen = np.zeros(6, int)
    for shape in [(1, 1), (1, 6), (5, 1), (7, 9), (11, 10), (11, 10)]:
        truth, prob = random_truth(rng, (2, *shape)), random_prob(rng, (2, *shape))
        truth[1] = ndimage.binary_closing(truth[1], FOUR)
        # Ties among the distances to the threshold, and none.
        prob[1] = rng.random(shape)
        expected = np.array(
            [
                [naive_warping(labels, values, threshold) for threshold in metrics.WARPING_THRESHOLDS]
                for labels, values in zip(truth, prob)
            ]
        )
        warping = metrics.warping_curve(truth, prob)
        np.testing.assert_array_equal(warping.counts, expected)
        seen += expected.sum(axis=(0, 1))
        splits_and_mergers = expected[..., :2].sum(axis=(0, 2)) / truth.size
        assert metrics.warping_error(truth, prob) == pytest.approx(splits_and_mergers.min(), **EXACT)
        plain = expected.sum(axis=(0, 2)) / truth.size
        assert metrics.warping_error(truth, prob, plain=True) == pytest.approx(plain.min(), **EXACT)
    assert (seen > 0).all(), dict(zip(metrics.Warping.KINDS, seen))


def remaining(truth, proposal):
    """Kinds that remain of a mask, by name."""
    warping = metrics.warping_curve(np.array(truth), np.array(proposal, float), thresholds=[0.5])
    return {kind: count for kind, count in zip(warping.KINDS, warping.counts[0, 0]) if count}


def test_warping_error_by_hand():
    two_cells = [[1, 1, 0, 1, 1]] * 3
    one_cell = [[1, 1, 1, 1, 1]] * 3
    # Growing both cells leaves a line of three pixels, one of which joins them.
    assert remaining(two_cells, one_cell) == {"mergers": 3}
    assert remaining(one_cell, two_cells) == {"splits": 1}
    shifted = [[1, 0, 1, 1, 1]] * 3
    assert remaining(two_cells, shifted) == {}
    ring = [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    disc = [[1, 1, 1]] * 3
    assert remaining(disc, ring) == {"hole additions": 1}
    assert remaining(ring, disc) == {"hole deletions": 1}
    nothing = [[0] * 3] * 3
    dot = [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert remaining(nothing, dot) == {"object additions": 1}
    assert remaining(dot, nothing) == {"object deletions": 1}


# SEG


def test_seg_is_that_of_the_challenge(rng, tmp_path):
    """py-ctcmetrics reads files; equal up to the order in which Jaccard indices are added."""
    truths, preds, paths = [], [], []
    for frame in range(4):
        truth, _ = cells(rng, 64, 10)
        pred = np.roll(truth, rng.integers(-2, 3, 2), (0, 1)) * (rng.random(truth.shape) < 0.9)
        if frame == 1:  # merged two by two
            pred = (pred + 1) // 2
        if frame == 2:  # gaps in the numbering, and an object that is predicted nowhere
            truth, pred = truth * 7, np.where(truth == truth.max(), 0, pred * 3)
        truths.append(truth.astype(np.uint16))
        preds.append(pred.astype(np.uint16))
        paths.append((str(tmp_path / f"man_seg{frame}.tif"), str(tmp_path / f"mask{frame}.tif")))
        for path, labels in zip(paths[-1], (truths[-1], preds[-1])):
            tifffile.imwrite(path, labels)
    matched = match_computed_to_reference_masks(*zip(*paths), threads=1)
    expected = ctc_seg(matched["labels_ref"], matched["ious"])
    assert 0.1 < expected < 1
    assert metrics.seg(np.stack(truths), np.stack(preds)) == pytest.approx(expected, **EXACT)
    objects = metrics.seg_objects(truths, preds)
    assert objects.found == sum(len(ious) for ious in matched["ious"])
    assert [objects.labels[objects.slices == 2].tolist()] == [sorted(matched["labels_ref"][2])]


def test_seg_by_hand():
    truth = np.array([[1, 1, 1, 1, 2, 2, 0, 3]])
    # 1 is covered to one half: no match. 2 matches an object of 3 pixels. 3 is missed.
    pred = np.array([[1, 1, 0, 0, 5, 5, 5, 0]])
    assert metrics.seg_objects(truth, pred).scores.tolist() == [0, 2 / 3, 0]
    assert metrics.seg(truth, pred) == pytest.approx(2 / 9)
    assert metrics.seg(np.stack([truth[0:1], truth[0:1]]), np.stack([pred, truth])) == pytest.approx(11 / 18)
    # One prediction may match two reference objects, and what is predicted elsewhere does not count.
    assert metrics.seg(np.array([[1, 2, 0, 0]]), np.array([[9, 9, 0, 4]])) == 1 / 2
    # Labels that are no array indices.
    large = np.array([[2**31, 2**31, 0, 7]], np.uint32)
    assert metrics.seg(large, large) == 1
    assert metrics.seg_objects(large, large).labels.tolist() == [7, 2**31]


# Arguments


def test_stacks_slices_and_threads_agree(rng):
    truths, probs = zip(*(cells(rng, 48, 8) for _ in range(3)))
    for metric in (metrics.pixel_error, metrics.rand_error, metrics.v_rand, metrics.warping_error):
        whole = metric(np.stack(truths), np.stack(probs))
        assert metric(list(truths), list(probs)) == whole
        assert (
            metric(truths[0], probs[0])
            == metric(truths[:1], probs[:1])
            == metric(truths[0][None], probs[0][None])
        )
    curve = metrics.overlaps(truths, probs, thinned=True, threads=3).v_rand()
    alone = [metrics.overlaps(*pair, thinned=True).v_rand().figures for pair in zip(truths, probs)]
    np.testing.assert_array_equal(curve.slices, alone)
    np.testing.assert_allclose(curve.figures, np.mean(alone, axis=0), rtol=1e-12)
    # Slices of differing sizes, views that are not contiguous, and other types.
    mixed = metrics.pixel_error([truths[0], truths[1][:20]], [probs[0], probs[1][:20]])
    assert 0 < mixed < 1
    turned = metrics.pixel_error(truths[0].astype(np.uint16).T, probs[0].astype(np.float64).T)
    assert turned == metrics.pixel_error(truths[0], probs[0])


@pytest.mark.parametrize(
    ("truth", "prob", "message"),
    [
        (np.zeros((4, 4), int), np.zeros((4, 5)), r"\(4, 4\) and prob \(4, 5\)"),
        (np.zeros((2, 4, 4), int), np.zeros((4, 4)), "2 slices and prob 1"),
        (np.zeros((4, 4)), np.zeros((4, 4), int), "truth holds float64, labels"),
        (np.zeros((4, 4), int), np.full((4, 4), 255), "from 255 to 255, probabilities between 0 and 1"),
        (np.zeros((4, 4), int), np.full((4, 4), np.nan), "prob holds NaN"),
        (np.full((4, 4), -1), np.zeros((4, 4)), "label -1"),
        (np.zeros(4, int), np.zeros(4), r"\(H, W\) or \(N, H, W\)"),
        (np.zeros((0, 4), int), np.zeros((0, 4)), "no pixel"),
        (np.zeros((0, 4, 4), int), np.zeros((0, 4, 4)), "no slice"),
    ],
)
def test_wrong_arguments(truth, prob, message):
    for metric in (metrics.pixel_error, metrics.rand_error, metrics.v_rand, metrics.warping_error):
        with pytest.raises(ValueError, match=message):
            metric(truth, prob)


def test_wrong_labels():
    with pytest.raises(ValueError, match="pred_labels holds float64"):
        metrics.seg(np.ones((3, 3), int), np.ones((3, 3)))
    with pytest.raises(ValueError, match="truth is .3, 3. and pred"):
        metrics.iou(np.ones((3, 3), int), np.ones((3, 4), int))


def test_real_membranes(data_folder):
    """A blur of the truth keeps the segments; the errors grow with it."""
    truth = tifffile.imread(data_folder / "isbi2012" / "train-labels.tif")[:2]
    figures = []
    for sigma in (1, 6):
        prob = np.stack([ndimage.gaussian_filter((image > 0).astype(np.float32), sigma) for image in truth])
        figures.append(
            [
                metrics.pixel_error(truth, prob),
                metrics.rand_error(truth, prob),
                metrics.warping_error(truth, prob),
                1 - metrics.v_rand(truth, prob),
                1 - metrics.v_info(truth, prob),
                1 - metrics.iou(truth, prob),
            ]
        )
    slight, strong = np.array(figures)
    assert (slight < [0.03, 0.05, 5e-4, 0.02, 0.02, 0.1]).all(), slight
    assert (slight < strong).all(), (slight, strong)
