"""Predictions out of core: any file, any tile, killed at any moment, shared out; the same result."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from test_predictor import SEAMLESS, network

from fastunet import Predictor, UNet, input_size
from fastunet.data.images import read_array, write_array
from fastunet.data.sinks import create, open_sink, write_strips
from fastunet.data.sources import Loaded, open_images
from fastunet.instances import find_instances
from fastunet.journal import Journal, folder_of
from fastunet.predict import main

TILE = input_size(24, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    network(depth=2, classes=3, seed=3).save(path)
    return path


def predict(*arguments):
    return main([str(argument) for argument in (*arguments, "--quiet")])


def command(*arguments):
    return [sys.executable, "-m", "fastunet.predict", *map(str, arguments)]


@pytest.mark.parametrize("rotations", [1, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (5, 90), (61, 83), (48, 24)])
def test_tiles_of_an_image_read_by_rectangles_are_the_image_predicted_whole(rng, rotations, size):
    predictor = Predictor(network(depth=2, channels=2, classes=3), rotations=rotations, tile=TILE)
    pixels = rng.integers(0, 60000, (*size, 2)).astype(np.uint16)
    source = Loaded(pixels, pixels.nbytes)
    plan = predictor.plan_source(source)
    found = np.full((*size, 3), np.nan, np.float32)
    for tile, probabilities in predictor.tiles(source, predictor.scales(source), plan, plan):
        found[tile.top : tile.bottom, tile.left : tile.right] = probabilities
    expected = predictor(pixels)
    if rotations == 1:
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=SEAMLESS)


SHAPES = [(5, 7), (70, 300), (3, 70, 61), (2, 3, 40, 530)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("suffix", [".npy", ".tif", ".zarr"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_rectangles_land_where_they_belong(rng, tmp_path, suffix, shape, dtype):
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    path, stride = tmp_path / f"a{suffix}", (32, 48)
    values = rng.integers(0, 250, shape).astype(dtype)
    planes = values.reshape(-1, *shape[-2:])
    create(path, shape, dtype, stride)
    places = [(y, x) for y in range(0, shape[-2], stride[0]) for x in range(0, shape[-1], stride[1])]
    for top, left in rng.permutation(places):
        part = planes[:, top : top + stride[0], left : left + stride[1]]
        for first in range(0, len(planes), 3):
            open_sink(path).write(first, top, left, part[first : first + 3])
    open_sink(path).flush()
    np.testing.assert_array_equal(read_array(path), values)


@pytest.mark.parametrize("shape", [(5, 7), (600, 300), (3, 300, 61), (2, 40, 530)], ids=str)
@pytest.mark.parametrize("suffix", [".npy", ".tif", ".zarr"])
def test_strips_land_where_they_belong(rng, tmp_path, suffix, shape):
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    path = tmp_path / f"a{suffix}"
    values = rng.integers(0, 2**32, shape).astype(np.uint32)

    def strips():
        for plane in values.reshape(-1, *shape[-2:]):
            top = 0
            while top < len(plane):
                rows = int(rng.integers(1, 290))
                yield plane[top : top + rows]
                top += rows

    write_strips(path, shape, np.uint32, strips())
    np.testing.assert_array_equal(read_array(path), values)


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".zarr"])
@pytest.mark.parametrize("kind", ["probabilities", "classes", "instances"])
def test_every_kind_in_every_format(rng, model, tmp_path, suffix, kind):
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    stack = rng.integers(0, 4000, (2, 61, 83)).astype(np.uint16)
    write_array(tmp_path / f"in{suffix}", stack, "IYX")
    out = tmp_path / f"out{suffix}"
    options = ["-m", model, "-i", tmp_path / f"in{suffix}", "-o", out, "--save", kind, "--tile", TILE]
    assert predict(*options, *(["--axes", "ZYX"] if suffix == ".npy" else [])) == 0
    probabilities = Predictor(model, tile=TILE)(stack)
    expected = np.moveaxis(probabilities, 3, 1)
    if kind != "probabilities":
        expected = probabilities.argmax(axis=3)
    if kind == "instances":
        expected = np.stack([find_instances(one) for one in expected])
    np.testing.assert_array_equal(read_array(out), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"in{suffix}", f"out{suffix}"]
    assert predict(*options, "--axes", "ZYX") == 0  # in the place of what is there


def test_big_results_are_tiled_and_have_ome_metadata(rng, model, tmp_path):
    np.save(tmp_path / "in.npy", rng.random((300, 520), np.float32))
    for name, kind in (("p.tif", "probabilities"), ("i.tif", "instances")):
        assert predict("-m", model, "-i", tmp_path / "in.npy", "-o", tmp_path / name, "--save", kind) == 0
        with tifffile.TiffFile(tmp_path / name) as file:
            assert file.pages.first.is_tiled and file.series[0].axes == {"p": "CYX", "i": "YX"}[name[0]]
    zarr = pytest.importorskip("zarr")
    assert predict("-m", model, "-i", tmp_path / "in.npy", "-o", tmp_path / "p.zarr") == 0
    image = zarr.open_group(tmp_path / "p.zarr", mode="r").attrs["ome"]["multiscales"][0]
    assert [axis["name"] for axis in image["axes"]] == ["c", "y", "x"]


@pytest.fixture
def image(rng, tmp_path):
    path = tmp_path / "in.tif"
    tifffile.imwrite(
        path, rng.integers(0, 4000, (200, 330)).astype(np.uint16), tile=(32, 32), compression="zlib"
    )
    return path


def killed_after(tiles, arguments, out):
    """Run the command, and kill it once so many tiles are noted."""
    folder = folder_of(out)
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        noted = sum(file.read_text().count("\n") for file in folder.glob("finished-*"))
        if noted >= tiles:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.001)
    return process.returncode


@pytest.mark.parametrize(
    "kind, suffix",
    [
        ("instances", ".npy"),
        pytest.param("probabilities", ".tif", marks=pytest.mark.slow),
        pytest.param("classes", ".zarr", marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_moment_loses_only_tiles_under_way(rng, model, image, tmp_path, kind, suffix):
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    arguments = ["-m", model, "-i", image, "--save", kind, "--tile", TILE, "--quiet", "-o"]
    assert main([str(argument) for argument in (*arguments, whole)]) == 0
    tiles = int(rng.integers(1, 100))
    if killed_after(tiles, [*arguments, out], out) == -signal.SIGKILL and folder_of(out).exists():
        assert not out.exists()
        done = Journal(folder_of(out)).finished()
        assert len(done) >= tiles
        # What is noted is there and is not made again.
        assert main([str(argument) for argument in (*arguments, out)]) == 2
        killed_after(int(rng.integers(len(done) + 1, 130)), [*arguments, out, "--resume"], out)
        if folder_of(out).exists():
            assert done <= Journal(folder_of(out)).finished()
            assert main([str(argument) for argument in (*arguments, out, "--resume")]) == 0
    np.testing.assert_array_equal(read_array(out), read_array(whole))
    assert not folder_of(out).exists()
    if whole.is_file():
        assert whole.read_bytes() == out.read_bytes()


def stopped(model, image, out, *options):
    """Leave an unfinished prediction behind."""
    while not folder_of(out).exists():
        killed_after(3, ["-m", model, "-i", image, "-o", out, "--tile", TILE, *options], out)


def test_what_does_not_match_is_refused_in_one_sentence(rng, model, image, tmp_path, capsys):
    out = tmp_path / "out.npy"
    stopped(model, image, out)
    network(depth=2, classes=3, seed=4).save(tmp_path / "other.safetensors")

    def sentence(*arguments, model=model):
        assert main([str(part) for part in ("-m", model, "-i", image, "-o", out, *arguments)]) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return next(line for line in told.splitlines() if "error" in line)

    assert "--resume goes on with it, --overwrite begins anew" in sentence()
    assert "begun with another model file" in sentence("--resume", model=tmp_path / "other.safetensors")
    assert "begun with another wanted" in sentence("--resume", "--save", "classes")
    assert "begun with another rotations" in sentence("--resume", "--rotations", 4)
    assert "leave --tile out" in sentence("--resume", "--tile", input_size(4, 2))
    assert "allow more" in sentence("--resume", "--memory", "1M")
    state = image.stat()
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert "begun with another image" in sentence("--resume")
    (folder_of(out) / "work.json").write_text("{")
    assert "no readable work.json" in sentence("--resume")
    assert predict("-m", model, "-i", image, "-o", out, "--overwrite") == 0
    np.testing.assert_allclose(
        read_array(out), np.moveaxis(Predictor(model)(read_array(image)), 2, 0), atol=SEAMLESS
    )


def test_a_mistake_leaves_nothing(model, tmp_path, capsys):
    np.save(tmp_path / "in.npy", np.full((40, 50), np.nan))
    assert predict("-m", model, "-i", tmp_path / "in.npy", "-o", tmp_path / "out.npy") == 2
    assert "in.npy: channel 0 of the image holds 2000 NaN" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]


def test_of_several_files_those_that_are_whole_are_not_made_again(rng, model, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.npy", "b.npy", "c.npy"):
        np.save(folder / name, rng.random((40, 50)))
    (folder / "b.npy").write_bytes(b"nothing")
    assert predict("-m", model, "-i", folder, "-o", out) == 2
    first = (out / "a.npy").stat().st_ino
    np.save(folder / "b.npy", rng.random((40, 50)))
    assert predict("-m", model, "-i", folder, "-o", out, "--resume") == 0
    assert {path.name for path in out.iterdir()} == {"a.npy", "b.npy", "c.npy"}
    assert (out / "a.npy").stat().st_ino == first
    assert predict("-m", model, "-i", folder, "-o", out) == 0
    assert (out / "a.npy").stat().st_ino != first


def test_of_several_files_what_is_gone_is_made_again_and_of_another_model_refused(
    rng, model, tmp_path, capsys
):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.npy", "b.npy"):
        np.save(folder / name, rng.random((40, 50)))
    (folder / "c.npy").write_bytes(b"nothing")
    assert predict("-m", model, "-i", folder, "-o", out) == 2
    (out / "a.npy").unlink()
    np.save(folder / "c.npy", rng.random((40, 50)))
    network(depth=2, classes=3, seed=5).save(tmp_path / "other.safetensors")
    assert predict("-m", tmp_path / "other.safetensors", "-i", folder, "-o", out, "--resume") == 2
    assert "begun with another model or other options" in capsys.readouterr().err
    assert predict("-m", model, "-i", folder, "-o", out, "--resume") == 0
    assert {path.name for path in out.iterdir()} == {"a.npy", "b.npy", "c.npy"}


def test_a_kill_between_the_name_and_the_end_of_the_folder(model, image, tmp_path, monkeypatch):
    out = tmp_path / "out.npy"

    remove = shutil.rmtree

    def killed(path, **options):
        if out.exists():
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr("fastunet.job.shutil.rmtree", killed)
        predict("-m", model, "-i", image, "-o", out, "--tile", TILE)
    whole = read_array(out)
    assert folder_of(out).exists()
    assert predict("-m", model, "-i", image, "-o", out, "--tile", TILE, "--resume") == 0
    assert not folder_of(out).exists()
    np.testing.assert_array_equal(read_array(out), whole)


def test_a_folder_in_the_place_of_a_file_stays(model, image, tmp_path, capsys):
    kept = tmp_path / "out" / "in.tif" / "kept"
    kept.mkdir(parents=True)
    assert predict("-m", model, "-i", image, "-o", tmp_path / "out") == 2
    assert "Traceback" not in capsys.readouterr().err and kept.is_dir()


def test_zarr_of_a_side_that_has_no_divisor(rng, tmp_path):
    zarr = pytest.importorskip("zarr")
    values = rng.integers(0, 250, (1042, 1031)).astype(np.uint8)
    create(tmp_path / "a.zarr", values.shape, np.uint8, (1200, 1031))
    assert min(zarr.open_group(tmp_path / "a.zarr", mode="r")["0"].chunks) > 256
    sink = open_sink(tmp_path / "a.zarr")
    sink.write(0, 0, 0, values[None])
    sink.flush()
    np.testing.assert_array_equal(read_array(tmp_path / "a.zarr"), values)


def test_a_tiff_file_is_a_bigtiff_if_its_whole_tiles_are_big(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("tifffile.imwrite", lambda path, **options: told.append(options["bigtiff"]))
    create(tmp_path / "a.tif", (2500, 2, 300, 300), np.float32, (300, 300))  # 1.8 GB, 5.2 in tiles of 256
    create(tmp_path / "a.tif", (2500, 2, 250, 250), np.float32, (250, 250))
    assert told == [True, False]


def test_a_result_that_the_disk_does_not_hold_is_refused_at_once(model, image, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=200 * 330 * 12 - 1))
    assert predict("-m", model, "-i", image, "-o", tmp_path / "out.npy") == 2
    assert "the probabilities come to 773 KiB and 773 KiB are free on the disk" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]
    assert predict("-m", model, "-i", image, "-o", tmp_path / "out.npy", "--save", "classes") == 0


def test_two_commands_do_not_work_on_one_result(model, image, tmp_path, capsys):
    out = tmp_path / "out.npy"
    stopped(model, image, out)
    journal = Journal(folder_of(out))
    journal.lock()
    assert predict("-m", model, "-i", image, "-o", out, "--resume") == 2
    assert "another process is at work on it" in capsys.readouterr().err
    journal.close()
    assert predict("-m", model, "-i", image, "-o", out, "--resume") == 0
    # Neither where nothing is done yet.
    work = journal.work
    journal = Journal.begin(folder_of(out), work)
    journal.lock()
    assert predict("-m", model, "-i", image, "-o", out) == 2
    assert "another process is at work on it" in capsys.readouterr().err
    assert Journal(folder_of(out)).work == work
    journal.close()


def test_options_of_this_module_explain_themselves(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(option in told for option in ("--resume", "--overwrite", "--devices", "--dask", "--memory"))


def test_a_file_opens_without_being_read(model, tmp_path):
    with (tmp_path / "in.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (100_000, 100_000)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 100_000**2)
    (_, source), *_ = open_images(tmp_path / "in.npy")
    assert source.shape == (100_000, 100_000, 1)
    assert not source.read(99_990, 99_000, 100_000, 100_000).any()
    plan = Predictor(network(depth=4, base_channels=16), memory=1 << 30).plan_source(source)
    assert plan.memory <= 1 << 30 and min(plan.tile) > 1000


MEASURED = """
import sys
from pathlib import Path
from fastunet import Predictor
from fastunet.data.sources import open_images
from fastunet.job import Wanted, begin, file_hash
from fastunet.memory import resident_bytes

folder, kind, suffix, limit = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
model, image = folder / "model.safetensors", folder / sys.argv[5]
predictor = Predictor(model, device="cpu", memory=limit, threads=1)
(_, source), = images = open_images(image)
plan = predictor.plan_source(source)
start = resident_bytes()
Path("/proc/self/clear_refs").write_text("5")  # the peak is from here
job = begin(folder / "out.partial", predictor, model, file_hash(model), image, None, suffix, Wanted(kind), images, plan)
list(job.run(job.remaining()))
job.finish(folder / f"out{suffix}")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(plan.memory, 1024 * int(peak.split()[1]) - start, len(plan))
"""

PEAKS = [
    (16, (1500, 2000), "probabilities", ".npy", "in.npy", 220),
    pytest.param(16, (2600, 1800), "classes", ".tif", "in.tif", 400, marks=pytest.mark.slow),
    pytest.param(64, (900, 900), "probabilities", ".tif", "in.npy", 300, marks=pytest.mark.slow),
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("base, size, kind, suffix, name, mebibytes", PEAKS)
def test_the_peak_is_as_planned_and_within_the_limit(
    rng, tmp_path, base, size, kind, suffix, name, mebibytes
):
    UNet(1, 2, base, 4, device="cpu").save(tmp_path / "model.safetensors")
    pixels = rng.integers(0, 250, size).astype(np.uint8)
    if name == "in.npy":
        np.save(tmp_path / name, pixels)
    else:
        tifffile.imwrite(tmp_path / name, pixels, tile=(256, 256), compression="zlib")
    limit = mebibytes << 20
    options = map(str, (tmp_path, kind, suffix, limit, name))
    told = subprocess.run(
        [sys.executable, "-c", MEASURED, *options], capture_output=True, text=True, check=True
    )
    planned, peak, tiles = map(int, told.stdout.split())
    assert tiles > 1
    assert peak == pytest.approx(planned, rel=0.1)
    assert peak <= limit
