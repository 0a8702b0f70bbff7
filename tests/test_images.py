"""Reading and writing image files, held against Pillow and OpenCV as independent readers and writers."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image as pillow

from fastunet.data.images import (
    find_images,
    natural_key,
    read_array,
    read_images,
    read_labels,
    whole_file,
    write_array,
)
from fastunet.errors import DataError

DTYPES = ("bool", "uint8", "int16", "uint16", "uint32", "int64", "float16", "float32", "float64")


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if dtype.startswith("float"):
        return rng.normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def no_notice(message: str) -> None:
    raise AssertionError(f"unexpected notice: {message}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".npy"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 7, 5), (2, 3, 7, 5)])
def test_what_is_written_is_read_back(
    tmp_path: Path, rng: np.random.Generator, dtype: str, suffix: str, shape: tuple[int, ...]
) -> None:
    array = random_array(rng, shape, dtype)
    path = tmp_path / f"array{suffix}"
    write_array(path, array)
    back = read_array(path)
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)
    assert back.dtype == (np.uint8 if dtype == "bool" else array.dtype)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_tiff_stacks_open_elsewhere(tmp_path: Path, rng: np.random.Generator) -> None:
    for array in (random_array(rng, (3, 20, 31), "uint16"), random_array(rng, (2, 20, 31), "float32")):
        write_array(tmp_path / "stack.tif", array)
        with pillow.open(tmp_path / "stack.tif") as elsewhere:
            assert elsewhere.n_frames == len(array)
            for page, expected in enumerate(array):
                elsewhere.seek(page)
                np.testing.assert_array_equal(np.asarray(elsewhere), expected)


def test_probabilities_and_stacks_keep_their_axes(tmp_path: Path) -> None:
    cases = {
        "CYX": ((2, 4, 5), "f4"),
        "IYX": ((2, 4, 5), "u1"),
        "ICYX": ((3, 2, 4, 5), "f4"),
        "YX": ((4, 5), "u4"),
    }
    for axes, (shape, dtype) in cases.items():
        write_array(tmp_path / "a.tif", np.zeros(shape, dtype))
        with tifffile.TiffFile(tmp_path / "a.tif") as file:
            assert file.series[0].axes == axes
            assert file.series[0].shape == shape


@pytest.mark.parametrize(
    "maximum, dtype", [(255, "uint8"), (65535, "uint16"), (40000, "uint32"), (9, "int64")]
)
def test_png_labels_open_elsewhere(
    tmp_path: Path, rng: np.random.Generator, maximum: int, dtype: str
) -> None:
    labels = rng.integers(0, maximum, (13, 9), dtype, endpoint=True)
    write_array(tmp_path / "labels.png", labels)
    elsewhere = cv2.imread(str(tmp_path / "labels.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(elsewhere, labels)
    assert elsewhere.dtype == (np.uint8 if dtype == "uint8" else np.uint16)


def test_png_of_elsewhere(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "image.png"
    for shape, dtype in (((6, 8), "uint8"), ((6, 8), "uint16"), ((6, 8, 3), "uint8")):
        array = random_array(rng, shape, dtype)
        cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)
        np.testing.assert_array_equal(read_array(path), array)
        (image,) = read_images(path, notify=no_notice)
        np.testing.assert_array_equal(image.pixels, array.reshape(6, 8, -1))
        assert image.pixels.dtype == dtype


def test_png_bits_and_palettes(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    indices = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
    palette = pillow.fromarray(indices, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(path)
    np.testing.assert_array_equal(read_array(path), indices)
    np.testing.assert_array_equal(read_labels(path)[0].pixels, indices)
    np.testing.assert_array_equal(read_images(path)[0].pixels[0, 1], [255, 0, 0])

    palette.putpalette([0, 0, 0, 80, 80, 80, 160, 160, 160, 240, 240, 240])
    palette.save(path)
    np.testing.assert_array_equal(read_images(path)[0].pixels[..., 0], indices * 80)

    pillow.fromarray(indices > 1).save(path)
    assert read_array(path).dtype == bool
    np.testing.assert_array_equal(read_labels(path)[0].pixels, indices > 1)


def test_two_bit_grey_is_not_stretched(tmp_path: Path) -> None:
    # No writer at hand makes one: a header, one deflated row 0 1 2 3 behind its filter byte, and the end.
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)
    row = zlib.compress(bytes([0, 0b00_01_10_11]))
    path = tmp_path / "labels.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(read_array(path), [[0, 1, 2, 3]])


def test_alpha_is_left_out_with_a_notice(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "image.png"
    for mode, channels in (("RGBA", 3), ("LA", 1)):
        array = random_array(rng, (5, 4, channels + 1), "uint8")
        pillow.fromarray(array, mode).save(path)
        notices: list[str] = []
        (image,) = read_images(path, notify=notices.append)
        np.testing.assert_array_equal(image.pixels, array[..., :channels])
        assert len(notices) == 1 and "alpha" in notices[0] and str(path) in notices[0]


def test_sixteen_bit_colour_png_is_refused_rather_than_cut_to_eight(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "image.png"), np.full((4, 4, 3), 300, np.uint16))
    with pytest.raises(DataError, match="16-bit colour.*save it as TIFF"):
        read_images(tmp_path / "image.png")


@pytest.mark.parametrize(
    "shape, metadata, axes, expected",
    [
        ((6, 7), {}, None, (1, 6, 7, 1)),
        ((5, 6, 7), {"axes": "ZYX"}, None, (5, 6, 7, 1)),
        ((3, 6, 7), {"axes": "CYX"}, None, (1, 6, 7, 3)),
        ((2, 3, 6, 7), {"axes": "TCYX"}, None, (2, 6, 7, 3)),
        ((2, 4, 3, 6, 7), {"axes": "TZCYX"}, None, (8, 6, 7, 3)),
        ((3, 6, 7), {"axes": "CYX"}, "ZYX", (3, 6, 7, 1)),
        ((3, 6, 7), {"axes": "ZYX"}, "cyx", (1, 6, 7, 3)),
        ((3, 6, 7), None, None, (3, 6, 7, 1)),
        ((6, 7, 5), {}, None, (6, 7, 5, 1)),
        ((6, 7, 4), {}, None, (1, 6, 7, 4)),
        ((6, 7, 4), {}, "YXZ", (4, 6, 7, 1)),
    ],
)
def test_tiff_axes(
    tmp_path: Path,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    metadata: dict[str, str] | None,
    axes: str | None,
    expected: tuple[int, ...],
) -> None:
    array = random_array(rng, shape, "uint16")
    path = tmp_path / "volume.ome.tif"
    tifffile.imwrite(path, array, photometric="minisblack", metadata=metadata, ome=False)
    images = read_images(path, axes)
    assert (len(images), *images[0].pixels.shape) == expected
    names = ["volume"] if len(images) == 1 else [f"volume[{page}]" for page in range(len(images))]
    assert [image.name for image in images] == names
    assert sum(int(image.pixels.astype(np.int64).sum()) for image in images) == int(
        array.astype(np.int64).sum()
    )


def test_channels_stay_with_their_pixels(tmp_path: Path, rng: np.random.Generator) -> None:
    array = random_array(rng, (2, 3, 6, 7), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", array, imagej=True, metadata={"axes": "ZCYX"})
    for page, image in enumerate(read_images(tmp_path / "a.tif")):
        np.testing.assert_array_equal(image.pixels, np.moveaxis(array[page], 0, -1))


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((6, 7), (1, 6, 7, 1)),
        ((6, 7, 4), (1, 6, 7, 4)),
        ((6, 7, 5), (6, 7, 5, 1)),
        ((2, 6, 7, 9), (2, 6, 7, 9)),
    ],
)
def test_arrays_without_metadata(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    images = read_images(tmp_path / "a.npy")
    assert (len(images), *images[0].pixels.shape) == expected


@pytest.mark.parametrize("axes", ["YX", "ZYXC", "ZZX", "ZCT", "YYX"])
def test_axes_that_do_not_fit(tmp_path: Path, axes: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((5, 6, 7), np.uint8))
    with pytest.raises(DataError, match=f"a.npy: axes '{axes}'.*5x6x7.*--axes"):
        read_images(tmp_path / "a.npy", axes)


def test_one_or_five_axes_are_refused(tmp_path: Path) -> None:
    for shape in ((6,), (1, 2, 3, 4, 5)):
        np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
        with pytest.raises(DataError, match=f"{len(shape)} axes"):
            read_images(tmp_path / "a.npy")


def test_pages_of_several_sizes(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for width in (5, 5, 9):
            file.write(np.full((4, width), width, np.uint8), metadata=None)
    assert [image.pixels.shape for image in read_images(tmp_path / "a.tif")] == [
        (4, 5, 1),
        (4, 5, 1),
        (4, 9, 1),
    ]
    with pytest.raises(DataError, match="different sizes"):
        read_array(tmp_path / "a.tif")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    array = np.zeros((2, 5, 6), np.float32)
    array[1, 2, 3] = bad
    write_array(tmp_path / "a.tif", array, "IYX")
    with pytest.raises(DataError, match=r"1 values are NaN or infinite in a\[1\]"):
        read_images(tmp_path / "a.tif")


def test_big_endian_becomes_native(tmp_path: Path) -> None:
    array = np.arange(12, dtype=">u2").reshape(3, 4)
    np.save(tmp_path / "a.npy", array)
    tifffile.imwrite(tmp_path / "a.tif", array, byteorder=">")
    for suffix in (".npy", ".tif"):
        back = read_array(tmp_path / f"a{suffix}")
        assert back.dtype.isnative
        np.testing.assert_array_equal(back, array)


def test_labels_of_other_types(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2], [3, 2, 1]])
    np.save(tmp_path / "float.npy", labels.astype(np.float32))
    assert read_labels(tmp_path / "float.npy")[0].pixels.dtype == np.int64
    np.testing.assert_array_equal(read_labels(tmp_path / "float.npy")[0].pixels, labels)

    for channels in (2, 3, 4):  # grey saved as colour, with whatever alpha
        grey = np.repeat(labels[..., None], channels, 2).astype(np.uint8)
        if channels in (2, 4):
            grey[..., -1] = 255
        np.save(tmp_path / "grey.npy", grey)
        np.testing.assert_array_equal(read_labels(tmp_path / "grey.npy")[0].pixels, labels)

    for bad in (0.5, np.nan, np.inf, 1e20):
        np.save(tmp_path / "half.npy", np.where(labels == 3, bad, 1.0))
        with pytest.raises(DataError, match="not whole numbers"):
            read_labels(tmp_path / "half.npy")
    np.save(tmp_path / "colour.npy", np.stack([labels, labels, labels + 1], 2).astype(np.uint8))
    with pytest.raises(DataError, match="3 channels that differ"):
        read_labels(tmp_path / "colour.npy")


def test_axes_of_images_fit_their_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.ones((2, 6, 7), np.uint8))
    assert [label.pixels.shape for label in read_labels(tmp_path / "labels.npy", "TCYX")] == [(6, 7)] * 2


def test_natural_order_and_finding(tmp_path: Path) -> None:
    names = ["t10.tif", "t2.PNG", "a.npy", "t1.tiff", "t01.tif"]
    for name in [*names, ".hidden.tif", "notes.txt"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.tif").mkdir()
    expected = ["a.npy", "t01.tif", "t1.tiff", "t2.PNG", "t10.tif"]
    assert [path.name for path in find_images(tmp_path)] == expected
    assert [path.name for path in find_images(f"{tmp_path}/t*")] == expected[1:]
    assert find_images(tmp_path / "a.npy") == [tmp_path / "a.npy"]
    assert sorted(["x10y2", "x2y10", "x2y9"], key=natural_key) == ["x2y9", "x2y10", "x10y2"]
    for nothing in (tmp_path / "none.tif", f"{tmp_path}/z*.tif"):
        with pytest.raises(DataError, match="check the path"):
            find_images(nothing)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "plain").touch()
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "empty.tif").touch()
    for name in ("a.jpg", "plain", "folder.tif", "empty.tif", "missing.png"):
        with pytest.raises(DataError, match=name):
            read_array(tmp_path / name)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_array(path, np.arange(3))
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    np.testing.assert_array_equal(read_array(path), np.arange(3))
    assert list(tmp_path.iterdir()) == [path]


def test_png_takes_only_what_it_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for array, message in (
        (np.full((2, 2), 70000), "0 to 65535, not 70000"),
        (np.full((2, 2), -1), "not -1"),
        (np.zeros((2, 2), np.float32), "PNG holds one image of integers"),
        (np.zeros((3, 2, 2), np.uint8), "PNG holds one image of integers"),
    ):
        with pytest.raises(ValueError, match=message):
            write_array(path, array)
    with pytest.raises(ValueError, match="suffix '.jpg'"):
        write_array(tmp_path / "a.jpg", np.zeros((2, 2)))
    with pytest.raises(DataError, match="no folder"):
        write_array(tmp_path / "none" / "a.npy", np.zeros((2, 2)))
    assert not list(tmp_path.iterdir())


def test_a_codec_that_is_missing_is_named(tmp_path: Path) -> None:
    pillow.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.tif", compression="tiff_lzw")
    program = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "from fastunet.data.images import read_array\nfrom fastunet import DataError\n"
        "try: read_array(sys.argv[1])\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.tif")], capture_output=True, text=True, check=True
    )
    assert "LZW" in done.stdout and "pip install imagecodecs" in done.stdout


def test_a_damaged_file_does_not_disturb_other_threads(tmp_path: Path, rng: np.random.Generator) -> None:
    whole = random_array(rng, (6, 40, 40), "uint8")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, whole, photometric="minisblack", metadata=None)
    (tmp_path / "whole.tif").write_bytes(buffer.getvalue())
    (tmp_path / "broken.tif").write_bytes(buffer.getvalue()[:-3000])

    def read(name: str) -> np.ndarray | None:
        try:
            return read_array(tmp_path / name)
        except DataError:
            return None

    names = ["whole.tif", "broken.tif"] * 40
    with ThreadPoolExecutor(4) as pool:
        for name, array in zip(names, pool.map(read, names)):
            assert (array is None) == (name == "broken.tif")
            if array is not None:
                np.testing.assert_array_equal(array, whole)
