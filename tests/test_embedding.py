"""libfastunet, the C and C++ library: the same predictions as Python's, from images of any type in any order."""

import ctypes as c
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import _fastunet as engine
import numpy as np
import pytest
from cmake_build import build, run
from safetensors.numpy import load_file, save_file
from test_predictor import network

from fastunet import Predictor
from fastunet.cmakedir import cmake_folder, main
from fastunet.errors import DataError
from fastunet.geometry import input_size
from fastunet.memory import available_bytes
from fastunet.predictor import SHARE_OF_FREE_MEMORY
from fastunet.tiling import plan_tiles, prediction_bytes

ROOT = Path(__file__).parents[1]
FOLDER = Path(engine.__file__).parent / "fastunet" / "lib"
if not (FOLDER / "libfastunet.so").is_file():
    pytest.skip(f"libfastunet is not installed in {FOLDER}: pip install .", allow_module_level=True)

OK, INVALID_ARGUMENT, BAD_FILE, OUT_OF_MEMORY, CANCELLED = range(5)
TYPES = {"uint8": 0, "uint16": 1, "float32": 2}
SIZE = c.c_ssize_t
PROGRESS = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_double)


def structure(**fields):
    return type("Structure", (c.Structure,), {"_fields_": list(fields.items())})


Options = structure(size=c.c_size_t, tile=c.c_int, rotations=c.c_int, memory=c.c_uint64)
Model = structure(in_channels=c.c_int, num_classes=c.c_int, base_channels=c.c_int, depth=c.c_int)
Plan = structure(
    height=SIZE, width=SIZE, preferred_height=SIZE, preferred_width=SIZE, tiles=SIZE, memory=c.c_uint64
)
STRIDES = {"row_stride": SIZE, "pixel_stride": SIZE, "channel_stride": SIZE}
Image = structure(data=c.c_void_p, type=c.c_int, height=SIZE, width=SIZE, channels=SIZE, **STRIDES)
Result = structure(data=c.c_void_p, **STRIDES)

library = c.CDLL(str(FOLDER / "libfastunet.so"))
library.fastunet_default_options.restype = Options
for name in ("fastunet_error", "fastunet_class_name"):
    getattr(library, name).restype = c.c_char_p


class Failed(Exception):
    def __init__(self, status):
        self.status = status
        super().__init__(library.fastunet_error().decode())


def check(status):
    if status != OK:
        raise Failed(status)


class Embedded:
    """The C API in the clothes of Predictor."""

    def __init__(self, path, **options):
        asked = library.fastunet_default_options()
        for name, value in options.items():
            setattr(asked, name, value)
        self.handle = c.c_void_p()
        check(library.fastunet_load(str(path).encode(), c.byref(asked), c.byref(self.handle)))
        self.model = Model()
        check(library.fastunet_describe(self.handle, c.byref(self.model)))

    def __del__(self):
        library.fastunet_free(self.handle)

    def __call__(self, image, classes=False, result=None, progress=None):
        image = image if image.ndim == 3 else image[:, :, None]
        if result is None:
            channels = 1 if classes else self.model.num_classes
            result = np.full((*image.shape[:2], channels), 77, np.uint8 if classes else np.float32)
        given = Image(image.ctypes.data, TYPES[image.dtype.name], *image.shape, *image.strides)
        predict = library.fastunet_predict_classes if classes else library.fastunet_predict_probabilities
        wanted = Result(result.ctypes.data, *result.strides)
        tell = PROGRESS(lambda user, part: progress(part)) if progress else None
        check(predict(self.handle, c.byref(given), c.byref(wanted), tell, None))
        return result

    def plan(self, height, width):
        plan = Plan()
        check(library.fastunet_plan_image(self.handle, SIZE(height), SIZE(width), c.byref(plan)))
        return plan


@pytest.fixture
def saved(tmp_path):
    """`saved(...)` is a network as of test_predictor with the file it was saved to."""

    def save(*arguments, normalization="zscore", **options):
        model = network(*arguments, **options)
        model.normalization = normalization
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        model.save(path)
        return model, path

    return save


CASES = [(1, 1, 2, 3, 1), (2, 3, 4, 2, 4), (3, 6, 3, 8, 8), (2, 1, 17, 16, 7), (4, 2, 2, 2, 1)]
SIZES = [(1, 1), (1, 23), (31, 2), (37, 53)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("depth", "channels", "classes", "base_channels", "rotations"), CASES)
def test_predictions_are_those_of_python(
    rng, saved, depth, channels, classes, base_channels, rotations, size
):
    model, path = saved(depth, channels, classes, base_channels)
    image = rng.integers(0, 60000, (*size, channels)).astype(np.uint16)
    tile = int(rng.choice([0, input_size(2**depth, depth), input_size(40, depth)]))
    expected = Predictor(model, tile=tile or "auto", rotations=rotations)(image)
    embedded = Embedded(path, tile=tile, rotations=rotations)
    np.testing.assert_allclose(embedded(image), expected, atol=1e-6)
    sure = np.sort(expected, axis=2)[:, :, -2:] @ [-1, 1] > 1e-5
    assert (embedded(image, classes=True)[:, :, 0] == expected.argmax(axis=2))[sure].all()


def test_without_scaling_probabilities_are_the_same_to_the_bit(rng, saved):
    model, path = saved(depth=3, base_channels=16, normalization="none")
    image = rng.random((150, 131), np.float32)
    for tile in (0, input_size(60, 3)):
        expected = Predictor(model, tile=tile or "auto")(image)
        np.testing.assert_array_equal(Embedded(path, tile=tile)(image), expected)


@pytest.mark.parametrize("rotations", [1, 7, 8])
@pytest.mark.parametrize("dtype", TYPES)
def test_images_and_results_lie_as_they_lie(rng, saved, dtype, rotations):
    model, path = saved(depth=1, channels=3, classes=3, normalization=[[3.0, 0.1], [0.0, 0.2], [-5.0, 0.3]])
    values = rng.integers(0, 200, (3, 19, 44)).astype(
        dtype
    )  # channels first, and every second column is somebody's
    image = np.moveaxis(values, 0, 2)[::-1, ::-2]
    expected = Predictor(model, rotations=rotations)(image)
    embedded = Embedded(path, rotations=rotations, tile=input_size(9, 1))
    memory = np.full((3, 22, 24), np.nan, np.float32)
    result = np.moveaxis(memory, 0, 2)[20:1:-1, 1:23]
    np.testing.assert_allclose(embedded(image, result=result), expected, atol=1e-6)
    result[...] = np.nan
    assert np.isnan(memory).all()  # nothing beside the result was written
    classes = np.full((19, 40), 99, np.uint8)
    embedded(image, classes=True, result=classes[:, 5:27, None])
    assert (classes[:, 5:27] < 3).all() and (np.delete(classes, range(5, 27), axis=1) == 99).all()


def test_unaligned_images_are_read(rng, saved):
    model, path = saved(depth=1)
    memory = np.zeros(1 + 4 * 20 * 30, np.uint8)
    image = memory[1:].view("V4").view(np.float32).reshape(20, 30)
    image[...] = rng.random((20, 30), np.float32)
    np.testing.assert_allclose(Embedded(path)(image), Predictor(model)(image.copy()), atol=1e-6)


@pytest.mark.parametrize("how", ["zscore", "minmax", "none", [[100.0, 0.01]]])
def test_the_recorded_normalisation_is_of_the_whole_image(rng, saved, how):
    model, path = saved(normalization=how)
    embedded = Embedded(path, tile=input_size(8, 2))
    for low, high in ((33001, 33101), (7, 7)):
        image = np.linspace(low, high, 41 * 30, dtype=np.float32).reshape(41, 30)
        # Both sum 1230 numbers in float64, each in its own order.
        np.testing.assert_allclose(embedded(image), Predictor(model)(image), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (17, 300), (2048, 777)])
@pytest.mark.parametrize("depth", [1, 4])
def test_plans_are_those_of_python(rng, saved, depth, size):
    model, path = saved(
        depth=depth, channels=int(rng.integers(1, 7)), base_channels=int(rng.choice([3, 16, 24]))
    )
    whole = (
        4 * size[0] * size[1] * (2 * model.in_channels + 3 * model.num_classes)
    )  # that the library does not take
    smallest = input_size(2**depth, depth)
    least = int(prediction_bytes(*size, smallest, smallest, model, 1.15 * 4))
    for tile in (0, input_size(int(rng.integers(2**depth, 400)), depth)):
        for memory in (1 << 50, least, int(least * rng.uniform(1, 8))):
            found = Embedded(path, tile=tile, memory=memory - whole).plan(*size)
            expected = plan_tiles(*size, model, tile or "auto", memory, 1.15 * 4)
            assert (found.height, found.width) == expected.tile
            assert (found.preferred_height, found.preferred_width) == expected.preferred
            assert found.tiles == len(expected)
            assert found.memory == pytest.approx(expected.memory - whole, abs=1)


def test_memory_limits_the_tile_and_not_the_result(rng, saved):
    model, path = saved(base_channels=16)
    image = rng.random((300, 260), np.float32)
    limit = int(prediction_bytes(0, 0, 150, 150, model, 1.15 * 4))
    small = Embedded(path, memory=limit)
    assert small.plan(300, 260).tiles > 1 and small.plan(300, 260).memory <= limit
    np.testing.assert_allclose(small(image), Predictor(model)(image), atol=1e-5)
    with pytest.raises(Failed, match=r"300x260 pixels takes at least \d+ MiB .* and 1 MiB are") as failed:
        Embedded(path, memory=1 << 20)(image)
    assert failed.value.status == OUT_OF_MEMORY


def test_without_a_limit_what_the_machine_has_left_is_taken(saved):
    model, path = saved()
    side = 1 << 16
    memory = SHARE_OF_FREE_MEMORY * available_bytes()
    whole = 4 * side * side * (2 + 3 * 2)
    found = Embedded(path).plan(side, side)
    # Others take and give memory at the same time.
    nearby = [
        plan_tiles(side, side, model, "auto", int(whole + share * memory), 4.6).memory for share in (1 / 8, 8)
    ]
    assert nearby[0] - whole <= found.memory <= nearby[1] - whole


def test_predictors_on_several_threads_do_not_meet(rng, saved):
    _, one = saved(depth=2, base_channels=16)
    _, two = saved(depth=1, classes=3, base_channels=5)
    images = [rng.integers(0, 250, (60 + 7 * i, 50)).astype(np.uint8) for i in range(4)]
    predictors = [Embedded(one, tile=input_size(20, 2)), Embedded(two, rotations=4)]
    expected = [[predict(image) for image in images] for predict in predictors]
    wrong = []

    def work(which, number):
        for _ in range(3):
            found = predictors[which](images[number])
            if not np.array_equal(found, expected[which][number]):
                wrong.append((which, number))

    threads = [threading.Thread(target=work, args=(k % 2, k // 2)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_progress_runs_to_1_and_may_cancel(rng, saved):
    _, path = saved()
    embedded = Embedded(path, tile=input_size(8, 2), rotations=4)
    image = rng.random((20, 17), np.float32)
    parts = []
    whole = embedded(image, progress=lambda part: parts.append(part) or 1)
    assert len(parts) == 4 * 3 * 3 and parts == sorted(parts) and parts[-1] == 1
    parts.clear()
    with pytest.raises(Failed, match="cancelled after 5 of 36 tiles") as failed:
        embedded(image, progress=lambda part: parts.append(part) or len(parts) < 5)
    assert failed.value.status == CANCELLED and len(parts) == 5
    np.testing.assert_array_equal(embedded(image), whole)


def test_what_the_file_says_of_the_network(saved, tmp_path):
    model, _ = saved(depth=3, channels=2, classes=3, base_channels=5)
    model.class_names = ["Zelle", 'Rand "außen"', "細胞😀"]
    model.save(tmp_path / "named.safetensors")
    embedded = Embedded(tmp_path / "named.safetensors")
    found = embedded.model
    assert (found.in_channels, found.num_classes, found.base_channels, found.depth) == (2, 3, 5, 3)
    names = [library.fastunet_class_name(embedded.handle, k) for k in range(-1, 4)]
    assert names == [None, *(name.encode() for name in model.class_names), None]


def test_threads_are_set_and_told():
    before = library.fastunet_threads()
    check(library.fastunet_set_threads(2))
    assert library.fastunet_threads() == 2
    check(library.fastunet_set_threads(before))
    with pytest.raises(Failed, match="0 threads were asked for; 1 to 1024 are expected"):
        check(library.fastunet_set_threads(0))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tile": 45}, "nearest valid tiles are 44 and 48"),
        ({"tile": -3}, "less than 4 pixels; the nearest valid tiles are 44 and 48"),
        ({"rotations": 3}, "expected 1, 4, 7 or 8"),
        ({"size": 3}, "options say that they are 3 bytes"),
        ({"size": 4096}, "options say that they are 4096 bytes"),
    ],
)
def test_options_that_are_refused(saved, options, sentence):
    _, path = saved()
    with pytest.raises(Failed, match=sentence) as failed:
        Embedded(path, **options)
    assert failed.value.status == INVALID_ARGUMENT


def test_images_that_are_refused(saved):
    _, path = saved()
    embedded = Embedded(path)
    for image, sentence in (
        (np.zeros((0, 5), np.uint8), r"the image has shape \(0, 5, 1\)"),
        (np.zeros((5, 5, 3), np.uint8), "3 channels and the model takes 1"),
        (np.full((5, 5), np.nan, np.float32), "channel 0 of the image holds 25 NaN or infinite"),
        (np.where(np.eye(5), np.inf, 0).astype(np.float32), "channel 0 of the image holds 5 NaN or infinite"),
        (np.broadcast_to(np.uint8(3), ((1 << 24) + 1, 2)), "sides of at most 16777216 pixels"),
    ):
        with pytest.raises(Failed, match=sentence) as failed:
            embedded(image, result=np.zeros((5, 5, 2), np.float32))
        assert failed.value.status == INVALID_ARGUMENT

    pixels = np.zeros((5, 5, 2), np.float32)
    good = [pixels.ctypes.data, 0, 5, 5, 1, 5, 1, 1]
    for place, value, sentence in (
        (0, None, "the image has no data"),
        (1, 9, "the image is of type 9"),
        (2, -1, r"the image has shape \(-1, 5, 1\)"),
        (5, -(2**63), "strides that reach beyond all memory"),
        (7, 2**62, "strides that reach beyond all memory"),
    ):
        image = Image(*[*good[:place], value, *good[place + 1 :]])
        result = Result(pixels.ctypes.data, 40, 8, 4)
        with pytest.raises(Failed, match=sentence):
            check(
                library.fastunet_predict_probabilities(
                    embedded.handle, c.byref(image), c.byref(result), None, None
                )
            )
    with pytest.raises(Failed, match="no predictor was given"):
        check(
            library.fastunet_predict_probabilities(None, c.byref(Image(*good)), c.byref(result), None, None)
        )
    with pytest.raises(Failed, match="no result was given"):
        check(library.fastunet_predict_classes(embedded.handle, c.byref(Image(*good)), None, None, None))
    with pytest.raises(Failed, match="the result has no data"):
        check(
            library.fastunet_predict_classes(
                embedded.handle, c.byref(Image(*good)), c.byref(Result(None, 5, 1, 1)), None, None
            )
        )


def test_more_classes_than_a_byte_tells_are_refused(saved):
    _, path = saved(depth=1, classes=300, base_channels=1)
    image = np.zeros((3, 4), np.uint8)
    with pytest.raises(Failed, match="300 classes, and bytes can tell 256"):
        Embedded(path)(image, classes=True)
    assert Embedded(path)(image).shape == (3, 4, 300)


def parts_of(path):
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_damaged_files_are_refused_in_a_sentence(saved, tmp_path):
    model, path = saved(depth=1)
    header, data = parts_of(path)
    text = json.dumps(header).encode()
    name = "head.bias"
    begin, end = header[name]["data_offsets"]
    nan = bytearray(data)
    nan[begin : begin + 4] = np.float32(np.nan).tobytes()

    def tensor(**entries):
        return {**header, name: {**header[name], **entries}}

    def config(**entries):
        metadata = header["__metadata__"]
        changed = {**json.loads(metadata["config"]), **entries}
        return {**header, "__metadata__": {**metadata, "config": json.dumps(changed)}}

    cases = [
        (b"", None, "0 bytes, too few"),
        (b"1234567", None, "7 bytes, too few"),
        (b"\xff" * 8 + text, None, "header is said to be 18446744073709551615 bytes long"),
        (text[:-1], data, "header is no JSON .* is missing at byte"),
        (b"[" * 100, data, "nest too deeply"),
        (b"[1]", data, "no JSON object"),
        (b'{"a": 1, "a": 2}', data, "a name twice"),
        (b'{"\xff": 1}', data, "no UTF-8"),
        (b'{"\\ud800": 1}', data, "surrogate"),
        (b'{"a": 1e999}', data, "a number is too large"),
        (b'{"a": 99999999999999999999}', data, "a number is too large"),
        (b'{"a": 01}', data, "no value begins"),
        (text + b"x", data, "goes on after its value"),
        ({name: header[name]}, data, "overlap or leave gaps at byte 0"),
        (header, data[:-1], r"outside the file|larger than the file"),
        (header, data + b"1234", f"take {len(data)} bytes, and {len(data) + 4} are there"),
        (tensor(data_offsets=[begin + 4, end + 4]), data + b"1234", "overlap or leave gaps"),
        (tensor(data_offsets=[end, begin]), data, "outside the file"),
        (tensor(data_offsets=[0, 2**53 + 2]), data, "a number is too large"),
        (tensor(data_offsets=[begin, end, end]), data, "lacks dtype, shape or data_offsets"),
        (tensor(shape=[2**31, 2**31, 2**31]), data, "larger than the file"),
        (tensor(shape=[-2]), data, "a shape that is none"),
        (tensor(shape=[1]), data, "takes 8 bytes, where its shape comes to 4"),
        (tensor(shape=[2, 1]), data, r"'head.bias' has shape \(2, 1\), and its config asks for \(2\)"),
        (tensor(dtype="F16"), data, "is of type 'F16', not F32"),
        (tensor(dtype="F77\n"), data, r"is of the unknown type 'F77\?'"),
        (header, bytes(nan), "'head.bias' holds weights that are not finite"),
        ({**header, "__metadata__": {}}, data, "format '', version '', not 'fastunet'"),
        (config(depth=7), data, "depth in its config is not a whole number from 1 to 6"),
        (config(depth=1.0), data, "depth in its config"),
        (config(num_classes="2"), data, "num_classes in its config"),
        (
            config(base_channels=4096),
            data,
            r"has shape \(8, 8, 3, 3\), and its config asks for \(8192, 8192, 3, 3\)",
        ),
        (config(normalization="log"), data, "normalization is 'log', which is unknown"),
        (config(normalization=[[1, 2], [3, 4]]), data, r"nor one \[offset, scale\] for each of 1"),
        (config(normalization=[[1, "2"]]), data, r"nor one \[offset, scale\]"),
        (config(class_names=["a"]), data, "class_names are not 2 names"),
        (config(depth=2), data, "has shape|lacks the tensor"),
    ]
    for number, (head, rest, sentence) in enumerate(cases):
        damaged = tmp_path / f"damaged-{number}"
        if rest is None:
            damaged.write_bytes(head)
        else:
            write(damaged, head, rest)
        with pytest.raises(Failed, match=sentence) as failed:
            Embedded(damaged)
        assert failed.value.status == BAD_FILE and str(failed.value).startswith(f"{damaged}: "), sentence
        assert "a fastunet model (.safetensors) is expected" in str(failed.value)

    state = load_file(path)
    save_file({**state, "more": np.zeros(3, np.float32)}, tmp_path / "more", {**header["__metadata__"]})
    for file, sentence in (
        (tmp_path / "more", "17 tensors, and the network in its config has 16"),
        (tmp_path / "absent", "cannot be opened .No such file"),
        (tmp_path, "cannot be read as a file"),
    ):
        with pytest.raises(Failed, match=sentence) as failed:
            Embedded(file)
        assert failed.value.status == BAD_FILE
    write(tmp_path / "spaced", json.dumps(header, indent=3).encode(), data)
    image = np.arange(20, dtype=np.uint8).reshape(4, 5)
    np.testing.assert_allclose(Embedded(tmp_path / "spaced")(image), Predictor(model)(image), atol=1e-6)


def test_where_there_is_no_predictor_its_place_is_null(tmp_path):
    for name in (b"no such file", None):
        handle = c.c_void_p(0x1234)
        assert library.fastunet_load(name, None, c.byref(handle)) != OK
        assert handle.value is None
        library.fastunet_free(handle)


def test_a_pipe_is_no_file(tmp_path):
    """Nobody waits for what somebody may write to it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Failed, match="it cannot be read as a file"):
        Embedded(tmp_path / "pipe")


def test_the_folder_of_the_cmake_package_is_printed(capsys, monkeypatch, tmp_path):
    assert main([]) == 0
    assert Path(capsys.readouterr().out.strip()) == cmake_folder() == FOLDER / "cmake" / "fastunet"
    monkeypatch.setattr(engine, "__file__", str(tmp_path / "_fastunet.so"))
    with pytest.raises(
        DataError, match="the C\\+\\+ library is not installed there; install fastunet with pip"
    ):
        cmake_folder()


def test_the_example_outside_the_tree_does_what_python_does(rng, saved, tmp_path):
    for name in ("embed.cpp", "CMakeLists.txt"):
        (tmp_path / name).write_bytes((ROOT / "csrc" / "examples" / "embed" / name).read_bytes())
    folder = run(sys.executable, "-m", "fastunet.cmakedir", cwd=ROOT).stdout.strip()
    program = build(tmp_path, tmp_path / "build", f"-Dfastunet_DIR={folder}") / "embed"
    model, path = saved(depth=2, classes=3)
    for dtype, most in ((np.dtype("u1"), 255), (np.dtype(">u2"), 65535)):
        image = rng.integers(0, most, (61, 38), endpoint=True).astype(dtype)
        header = f"P5\n38 61\n{most}\n".encode()
        (tmp_path / "image.pgm").write_bytes(header + image.tobytes())
        run(program, path, tmp_path / "image.pgm", tmp_path / "out.raw")
        found = np.fromfile(tmp_path / "out.raw", np.float32).reshape(61, 38, 3)
        np.testing.assert_allclose(found, Predictor(model)(image), atol=1e-6)
    (tmp_path / "image.pgm").write_bytes(header + image.tobytes()[:-1])
    for arguments, sentence in (
        ((), "usage: embed MODEL"),
        ((path, tmp_path / "image.pgm", tmp_path / "out.raw"), "it ends before its last pixel"),
        ((tmp_path / "image.pgm", path, tmp_path / "out.raw"), "a fastunet model"),
    ):
        failed = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert failed.returncode == 2 and sentence in failed.stderr and failed.stderr.count("\n") == 1
