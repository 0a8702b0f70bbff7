"""The evaluate command on files written here: pairing, kinds of labels, the JSON file, and mistakes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from fastunet import metrics
from fastunet.data.images import write_array
from fastunet.data.separation import separate
from fastunet.evaluate import main
from fastunet.instances import connected_components, find_instances

ALL = ["pixel_error", "rand_error", "warping_error", "v_rand", "v_info", "seg", "iou", "dice"]


def discs(rng, count, shape=(60, 70)):
    """Instances: discs that may touch, and the probability of foreground of a blurred, noisy proposal."""
    labels = np.zeros(shape, np.uint16)
    grid = np.indices(shape)
    for label in range(1, count + 1):
        centre = rng.uniform(8, np.array(shape) - 8)
        labels[np.hypot(*(grid - centre[:, None, None])) < rng.uniform(5, 9)] = label
    noise = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    prob = ndimage.gaussian_filter((labels > 0).astype(float), 1.5) + noise
    return labels, np.clip(prob, 0, 1).astype(np.float32)


def two_classes(prob):
    return np.stack([1 - prob, prob])


def evaluate(tmp_path, *arguments):
    """Run the command here and return the JSON file's content."""
    out = tmp_path / "scores.json"
    assert main([*map(str, arguments), "--json", str(out), "--quiet"]) == 0
    return json.loads(out.read_text())


def complaint(capsys, *arguments):
    """Run the command here, expect a user's mistake and return its one line."""
    assert main([*map(str, arguments), "--quiet"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_command_line(rng, tmp_path):
    """The whole command as a user starts it: a table, a file, and a mistake that ends with status 2."""
    labels, prob = discs(rng, 6)
    write_array(tmp_path / "truth.tif", labels)
    write_array(tmp_path / "probs.tif", two_classes(prob))
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "fastunet.evaluate", "--truth", tmp_path / "truth.tif", "--pred"]
    done = subprocess.run(
        [*command, tmp_path / "probs.tif", "--json", out], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(out.read_text())["metrics"]
    assert f"{figures['v_rand']['figure']:.4f}" in done.stdout
    assert f"{figures['warping_error']['figure']:.6f}" in done.stdout
    for title in ("pixel error", "Rand error", "V^Info, not thinned", "SEG", "IoU", "Dice"):
        assert title in done.stdout
    done = subprocess.run([*command, tmp_path / "none.tif"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "none.tif" in done.stderr


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_stack_of_membranes_and_probabilities(rng, tmp_path, suffix):
    labels, probs = map(np.stack, zip(*(discs(rng, 5) for _ in range(3))))
    truth = (labels > 0).astype(np.uint8) * 255
    write_array(tmp_path / f"truth{suffix}", truth)
    write_array(tmp_path / f"pred{suffix}", np.stack([1 - probs, probs], axis=1))
    report = evaluate(tmp_path, "--truth", tmp_path / f"truth{suffix}", "--pred", tmp_path / f"pred{suffix}")
    assert (report["truth_kind"], report["prediction_kind"]) == ("mask", "probabilities")
    assert report["images"] == ["truth[0]", "truth[1]", "truth[2]"]
    figures = {name: entry["figure"] for name, entry in report["metrics"].items()}
    assert figures == {
        "pixel_error": metrics.pixel_error(truth, probs),
        "rand_error": metrics.rand_error(truth, probs),
        "warping_error": metrics.warping_error(truth, probs),
        "warping_error_plain": metrics.warping_error(truth, probs, plain=True),
        "v_rand": metrics.v_rand(truth, probs),
        "v_rand_unthinned": metrics.v_rand(truth, probs, thinned=False),
        "v_info": metrics.v_info(truth, probs),
        "v_info_unthinned": metrics.v_info(truth, probs, thinned=False),
        "seg": metrics.seg(
            [connected_components(image) for image in truth], [find_instances(prob) for prob in probs]
        ),
        "iou": metrics.iou(truth, probs),
        "dice": metrics.dice(truth, probs),
    }
    for name, entry in report["metrics"].items():
        assert len(entry["per_image"]) == 3, name
    curve = report["metrics"]["pixel_error"]
    assert curve["figures"][curve["thresholds"].index(curve["threshold"])] == curve["figure"]
    # The figure of each image, at the threshold of all.
    alone = metrics.pixel_curve(truth[1], probs[1], thresholds=[curve["threshold"]])
    assert curve["per_image"][1] == alone.figure


def test_layouts_of_probabilities(rng, tmp_path):
    """Foreground alone, classes first and classes last say the same; so does a stack of foreground."""
    labels, prob = discs(rng, 5)
    write_array(tmp_path / "truth.npy", labels)
    write_array(tmp_path / "pair.npy", np.stack([labels, labels]))
    layouts = {"h_w": prob, "k_h_w": two_classes(prob), "h_w_k": np.moveaxis(two_classes(prob), 0, 2)}
    found = set()
    for name, array in layouts.items():
        np.save(tmp_path / f"{name}.npy", array)
        arguments = ("--metrics", "pixel_error", "iou", "seg")
        report = evaluate(
            tmp_path, "--truth", tmp_path / "truth.npy", "--pred", tmp_path / f"{name}.npy", *arguments
        )
        found.add(tuple(entry["figure"] for entry in report["metrics"].values()))
    assert len(found) == 1
    np.save(tmp_path / "stack.npy", np.stack([prob, 1 - prob]))
    report = evaluate(tmp_path, "--truth", tmp_path / "pair.npy", "--pred", tmp_path / "stack.npy")
    expected = metrics.iou([labels, labels], [prob, 1 - prob])
    assert report["metrics"]["iou"]["figure"] == expected


def test_instances_on_both_sides(rng, tmp_path):
    """Touching instances stay apart: given ones by their labels, and for the warping error by gaps."""
    labels, _ = discs(rng, 9)
    found = np.roll(labels, 1, axis=1)
    found[found == 3] = 4
    write_array(tmp_path / "truth.png", labels)
    write_array(tmp_path / "pred.png", found)
    report = evaluate(tmp_path, "--truth", tmp_path / "truth.png", "--pred", tmp_path / "pred.png")
    assert (report["truth_kind"], report["prediction_kind"]) == ("instances", "instances")
    figures = report["metrics"]
    overlaps = metrics.label_overlaps(labels, found)
    assert figures["rand_error"]["figure"] == overlaps.rand_error().figure
    assert figures["v_rand_unthinned"]["figure"] == overlaps.v_rand().figure
    assert figures["v_rand"]["figure"] == metrics.label_overlaps(labels, found, thinned=True).v_rand().figure
    assert figures["v_rand"]["threshold"] is None
    assert figures["seg"]["figure"] == metrics.seg(labels, found)
    assert figures["seg"]["objects"] == len(np.unique(labels)) - 1
    parted = metrics.warping_curve(separate(labels), separate(found), thresholds=[0.5])
    assert figures["warping_error_plain"]["figure"] == parted.plain().figure
    assert figures["iou"]["figure"] == metrics.iou(labels, found)


def test_mask_against_instances(rng, tmp_path):
    """Predicted classes 0 and 1 become instances that grow back, above a size asked for."""
    labels, _ = discs(rng, 7)
    mask = separate(labels)
    mask[0, 0] = 1  # too small
    write_array(tmp_path / "truth.tif", labels)
    write_array(tmp_path / "pred.tif", mask)
    paths = ("--truth", tmp_path / "truth.tif", "--pred", tmp_path / "pred.tif")
    report = evaluate(tmp_path, *paths, "--min-size", 2, "--separation-width", 1)
    assert report["prediction_kind"] == "mask"
    assert report["metrics"]["seg"]["figure"] == metrics.seg(labels, find_instances(mask, 1, min_size=2))
    assert report["metrics"]["seg"]["figure"] > 0.8
    assert report["metrics"]["pixel_error"]["thresholds"] == [0.5]
    ungrown = evaluate(tmp_path, *paths, "--separation-width", 0)
    assert ungrown["metrics"]["seg"]["figure"] == metrics.seg(labels, connected_components(mask))
    # Asked for, a mask is one instance.
    report = evaluate(tmp_path, *paths, "--labels", "instances", "--metrics", "seg")
    assert report["metrics"]["seg"]["figure"] == metrics.seg(labels, mask)


def tracking_folders(rng, tmp_path, truth="01_GT"):
    """Truth of frames 2, 7 and 61, predictions of 0, 2, 7 and 61."""
    (tmp_path / truth / "SEG").mkdir(parents=True)
    (tmp_path / "RES").mkdir()
    pairs = {}
    for frame in (0, 2, 7, 61):
        labels, _ = discs(rng, 4)
        found = np.roll(labels, 1, axis=0)
        pairs[frame] = labels, found
        if frame:
            write_array(tmp_path / truth / "SEG" / f"man_seg{frame:03d}.tif", labels)
        write_array(tmp_path / "RES" / (f"mask{frame:03d}.tif" if frame != 7 else "t007.tif"), found)
    return pairs


def test_gold_truth_pairs_by_frame(rng, tmp_path, capsys):
    pairs = tracking_folders(rng, tmp_path)
    paths = ("--truth", tmp_path / "01_GT", "--pred", tmp_path / "RES")
    report = evaluate(tmp_path, *paths)
    assert report["images"] == ["man_seg002", "man_seg007", "man_seg061"]
    assert list(report["metrics"]) == ["seg"]
    assert "not annotated" in report["notes"][0]
    expected = metrics.seg(*zip(*(pairs[frame] for frame in (2, 7, 61))))
    assert report["metrics"]["seg"]["figure"] == expected
    late = evaluate(tmp_path, *paths, "--select", "60-")
    assert late["metrics"]["seg"]["figure"] == metrics.seg(*pairs[61])
    asked = evaluate(tmp_path, *paths, "--metrics", "iou", "seg", "--select", "0-2,61")
    assert list(asked["metrics"]) == ["seg", "iou"]
    assert asked["images"] == ["man_seg002", "man_seg061"]
    # Truth without a prediction.
    (tmp_path / "RES" / "t007.tif").unlink()
    message = complaint(capsys, *paths)
    assert "man_seg007.tif" in message
    assert "007" in message
    assert evaluate(tmp_path, *paths, "--select", "60-")["images"] == ["man_seg061"]
    # Two predictions of one frame.
    write_array(tmp_path / "RES" / "t002.tif", pairs[2][1])
    assert "mask002.tif" in complaint(capsys, *paths)


def test_silver_truth_has_every_metric(rng, tmp_path):
    tracking_folders(rng, tmp_path, "01_ST")
    report = evaluate(tmp_path, "--truth", tmp_path / "01_ST", "--pred", tmp_path / "RES")
    assert set(ALL) < set(report["metrics"])
    assert report["truth_kind"] == "instances"


def test_folders_pair_by_name(rng, tmp_path, capsys):
    """Images of differing sizes and suffixes; a file without truth does not matter."""
    (tmp_path / "data" / "labels").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    truths, preds = [], []
    for name, shape in (("b", (60, 70)), ("a", (50, 40)), ("c", (61, 33))):
        labels, prob = discs(rng, 5, shape)
        write_array(tmp_path / "data" / "labels" / f"{name}.png", labels)
        write_array(tmp_path / "out" / f"{name}.tif", two_classes(prob))
        truths.append(labels)
        preds.append(prob)
    write_array(tmp_path / "out" / "more.tif", two_classes(prob))
    paths = ("--truth", tmp_path / "data", "--pred", tmp_path / "out")
    report = evaluate(tmp_path, *paths)
    assert report["images"] == ["a", "b", "c"]
    assert report["metrics"]["dice"]["figure"] == metrics.dice(truths, preds)
    parted = [separate(labels) for labels in truths]
    assert report["metrics"]["v_rand"]["figure"] == pytest.approx(metrics.v_rand(parted, preds), rel=1e-12)
    (tmp_path / "out" / "b.tif").unlink()
    message = complaint(capsys, *paths)
    assert "b.png" in message
    assert evaluate(tmp_path, *paths, "--select", "0,2")["images"] == ["a", "c"]
    write_array(tmp_path / "out" / "b.tif", truths[0])
    assert "some files hold probabilities" in complaint(capsys, *paths)


def test_selection_of_a_stack(rng, tmp_path, capsys):
    """The prediction holds the whole stack or the selected slices."""
    labels, probs = map(np.stack, zip(*(discs(rng, 4) for _ in range(5))))
    chosen = [1, 3, 4]
    classes = np.stack([1 - probs, probs], axis=1)
    write_array(tmp_path / "truth.tif", labels)
    write_array(tmp_path / "all.tif", classes)
    write_array(tmp_path / "some.tif", classes[chosen])
    truth = ("--truth", tmp_path / "truth.tif", "--pred")
    found = [
        evaluate(tmp_path, *truth, tmp_path / name, "--select", "1,3-") for name in ("all.tif", "some.tif")
    ]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["images"] == [f"truth[{index}]" for index in chosen]
    assert found[0]["metrics"]["pixel_error"]["figure"] == metrics.pixel_error(labels[chosen], probs[chosen])
    message = complaint(capsys, *truth, tmp_path / "some.tif")
    for part in ("some.tif", "truth.tif", "holds 3 images", "truth", "5"):
        assert part in message
    assert "names no image" in complaint(capsys, *truth, tmp_path / "all.tif", "--select", "9")
    assert "no range" in complaint(capsys, *truth, tmp_path / "all.tif", "--select", "one")


def test_classes(rng, tmp_path, capsys):
    truth, found = rng.integers(0, 3, (2, 2, 30, 20)).astype(np.uint8)
    write_array(tmp_path / "truth.tif", truth)
    write_array(tmp_path / "pred.tif", found)
    paths = ("--truth", tmp_path / "truth.tif", "--pred", tmp_path / "pred.tif", "--labels", "classes")
    report = evaluate(tmp_path, *paths)
    assert set(report["metrics"]) == {"iou", "dice"}
    expected = metrics.iou_per_class(truth, found, 3)
    assert report["metrics"]["iou"]["per_class"] == expected.tolist()
    assert report["metrics"]["iou"]["figure"] == pytest.approx(expected.mean())
    # Probabilities of four classes, of which the last never wins and never occurs: null, and not in the mean.
    write_array(tmp_path / "pred.tif", np.moveaxis(np.eye(4, dtype=np.float32)[found], -1, 1))
    report = evaluate(tmp_path, *paths)
    assert report["metrics"]["iou"]["per_class"] == [*expected.tolist(), None]
    assert report["metrics"]["iou"]["figure"] == pytest.approx(expected.mean())
    assert "seg" in complaint(capsys, *paths, "--metrics", "seg")
    write_array(tmp_path / "truth.tif", truth.astype(np.uint16) * 200)
    assert "truth.tif: holds labels from 0 to 400" in complaint(capsys, *paths)


def test_ignored_pixels(rng, tmp_path, capsys):
    """What is predicted where the truth is unknown changes nothing but where borders lie."""
    labels, prob = discs(rng, 6)
    truth = labels.astype(np.int16)
    truth[:, :30] = 99
    noise = prob.copy()
    noise[:, :29] = rng.random((60, 29))
    write_array(tmp_path / "truth.tif", truth)
    write_array(tmp_path / "pred.tif", two_classes(noise))
    paths = ("--truth", tmp_path / "truth.tif", "--pred", tmp_path / "pred.tif", "--ignore", 99)
    report = evaluate(tmp_path, *paths)
    right = labels[:, 30:], prob[:, 30:]
    assert report["metrics"]["pixel_error"]["figure"] == metrics.pixel_error(*right)
    assert report["metrics"]["iou"]["figure"] == metrics.iou(*right)
    assert report["metrics"]["dice"]["figure"] == metrics.dice(*right)
    assert report["metrics"]["seg"]["objects"] == len(np.unique(right[0])) - 1
    assert "warping_error" not in report["metrics"]
    assert "warping" in complaint(capsys, *paths, "--metrics", "warping_error")
    classes = evaluate(tmp_path, *paths, "--labels", "classes")
    assert len(classes["metrics"]["iou"]["per_class"]) == labels[:, 30:].max() + 1
    # All ignored: nothing to say, and no failure.
    write_array(tmp_path / "truth.tif", np.full_like(truth, 99))
    nothing = evaluate(tmp_path, *paths, "--labels", "classes")
    assert nothing["metrics"]["iou"]["figure"] is None


def test_nothing_annotated(tmp_path):
    """Undefined figures are null, since JSON has no NaN."""
    write_array(tmp_path / "truth.tif", np.zeros((8, 8), np.uint8))
    write_array(tmp_path / "pred.tif", np.full((2, 8, 8), 0.5, np.float32))
    report = evaluate(tmp_path, "--truth", tmp_path / "truth.tif", "--pred", tmp_path / "pred.tif")
    assert report["metrics"]["seg"]["figure"] is None
    assert report["metrics"]["v_rand"]["figure"] is None
    assert report["metrics"]["pixel_error"]["figure"] == 0


def test_mistakes(rng, tmp_path, capsys):
    labels, prob = discs(rng, 4)
    truth = tmp_path / "truth.tif"
    write_array(truth, labels)

    def complain(name, array, *arguments):
        write_array(tmp_path / name, array)
        message = complaint(capsys, "--truth", truth, "--pred", tmp_path / name, *arguments)
        assert name in message
        return message

    message = complain("small.tif", two_classes(prob)[:, :40, :30])
    for part in ("truth.tif", "40 x 30", "60 x 70"):
        assert part in message
    assert "from 0 to 255" in complain("bytes.tif", np.full((60, 70), 255, np.float32) * (prob > 0.5))
    assert "NaN" in complain("nan.npy", np.where(labels > 0, np.nan, prob))
    assert "-3" in complain("negative.tif", labels.astype(np.int16) - 3)
    assert "one for each class" in complain("one.tif", prob, "--labels", "classes")
    (tmp_path / "broken.tif").write_bytes(b"II*\0nothing")
    assert "broken.tif" in complaint(capsys, "--truth", truth, "--pred", tmp_path / "broken.tif")
    (tmp_path / "empty").mkdir()
    assert "empty" in complaint(capsys, "--truth", tmp_path / "empty", "--pred", truth)
    out = tmp_path / "nowhere" / "scores.json"
    assert "nowhere" in complaint(capsys, "--truth", truth, "--pred", truth, "--json", out)
    # Before anything is read and measured.
    assert "create it first" in complaint(capsys, "--truth", "no-truth", "--pred", truth, "--json", out)
    with pytest.raises(SystemExit):
        main(["--truth", str(truth), "--pred", str(truth), "--metrics", "beauty"])
    told = capsys.readouterr().err
    assert "beauty" in told and told.count("\n") == 1


def test_table_of_many_images(rng, tmp_path, capsys):
    labels = np.stack([discs(rng, 2, (20, 20))[0] for _ in range(45)])
    tifffile.imwrite(tmp_path / "stack.tif", labels, photometric="minisblack")
    assert main(["--truth", str(tmp_path / "stack.tif"), "--pred", str(tmp_path / "stack.tif")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("stack[39]") for line in lines)
    assert lines[-2].startswith("... 5 more images")
    assert lines[-1].split()[0] == "all"
    assert lines[-1].split()[1:] == ["0.0000", "0.0000", "0.000000", *["1.0000"] * 5]


def test_real_membranes(data_folder, tmp_path):
    truth = data_folder / "isbi2012" / "train-labels.tif"
    labels = tifffile.imread(truth)[[0, 12]]
    prob = np.stack([ndimage.gaussian_filter((image > 0).astype(np.float32), 2) for image in labels])
    write_array(tmp_path / "pred.tif", np.stack([1 - prob, prob], axis=1))
    report = evaluate(tmp_path, "--truth", truth, "--pred", tmp_path / "pred.tif", "--select", "0,12")
    figures = {name: entry["figure"] for name, entry in report["metrics"].items()}
    assert report["images"] == ["train-labels[0]", "train-labels[12]"]
    assert 0 < figures["pixel_error"] < 0.05
    assert 0.95 < figures["v_rand"] < 1
    assert 0 < figures["warping_error"] <= figures["warping_error_plain"] < 0.002
    assert 0.5 < figures["seg"] < 1


def test_real_gold_and_silver_truth(data_folder, tmp_path):
    cells = data_folder / "ctc" / "PhC-C2DH-U373"
    report = evaluate(tmp_path, "--truth", cells / "02_GT", "--pred", cells / "02_ST", "--select", "50-")
    assert [int(name.removeprefix("man_seg")) >= 50 for name in report["images"]] == [True] * len(
        report["images"]
    )
    assert 0.5 < report["metrics"]["seg"]["figure"] < 1
    assert report["metrics"]["seg"]["found"] == report["metrics"]["seg"]["objects"]


def test_figures_do_not_replace_what_they_compare(rng, tmp_path, capsys):
    labels, _ = discs(rng, 3)
    for name in ("truth.tif", "pred.tif"):
        write_array(tmp_path / name, labels)
    before = (tmp_path / "truth.tif").read_bytes()
    options = ["--truth", tmp_path / "truth.tif", "--pred", tmp_path / "pred.tif"]
    assert "would replace" in complaint(capsys, *options, "--json", tmp_path / "truth.tif")
    assert (tmp_path / "truth.tif").read_bytes() == before


def test_a_forgotten_ignore_value_is_pointed_out(rng, tmp_path, capsys):
    classes = rng.integers(0, 3, (40, 50)).astype(np.uint8)
    write_array(tmp_path / "pred.tif", classes)
    classes[:5] = 255
    write_array(tmp_path / "truth.tif", classes)
    options = ["--truth", tmp_path / "truth.tif", "--pred", tmp_path / "pred.tif", "--labels", "classes"]
    assert main([*map(str, options)]) == 0
    assert "--ignore 255" in capsys.readouterr().out
    assert main([*map(str, options), "--ignore", "255"]) == 0
    assert "--ignore 255" not in capsys.readouterr().out


def test_the_folder_of_a_stack_is_its_labels(rng, tmp_path):
    labels, _ = discs(rng, 4)
    stack = np.stack([labels, labels[::-1]])
    write_array(tmp_path / "train-labels.tif", stack)
    write_array(tmp_path / "train-volume.tif", stack.astype(np.uint8))
    write_array(tmp_path / "pred.npy", stack)
    report = evaluate(tmp_path, "--truth", tmp_path, "--pred", tmp_path / "pred.npy")
    assert len(report["images"]) == 2
