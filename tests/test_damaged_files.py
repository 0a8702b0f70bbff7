"""Damaged files end in DataError and nothing else: no other exception, no missing page, no terabyte asked for."""

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as pillow

from fastunet.data.images import read_array, read_images, read_labels
from fastunet.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 255, (3, 20, 30)).astype(np.uint8)


def tiff(**options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, PIXELS, photometric="minisblack", **options)
    return buffer.getvalue()


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    pillow.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


WHOLE = {
    "plain.tif": tiff(),
    "deflated.tif": tiff(compression="zlib"),
    "pages.tif": tiff(metadata=None),
    "lzw.tif": tiff(metadata=None, compression="lzw"),
    "tiles.tif": tiff(tile=(16, 16)),
    "ome.tif": tiff(ome=True),
    "imagej.tif": tiff(imagej=True),
    "grey.png": png(PIXELS[0]),
    "deep.png": png(PIXELS[0].astype(np.uint16) * 200),
    "colour.png": png(np.ascontiguousarray(np.moveaxis(PIXELS, 0, 2))),
    "bits.png": png(PIXELS[0] > 100),
    "grey.npy": npy(PIXELS),
    "float.npy": npy(PIXELS.astype(np.float32)),
}
READERS: tuple[Callable[[Path], object], ...] = (
    read_array,
    lambda path: read_images(path, notify=lambda message: None),
    read_labels,
)


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_give_an_array_or_a_data_error(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE[name])
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        # The headers at the start are where damage leads readers astray.
        where = st.integers(
            0, data.draw(st.sampled_from([min(300, len(content)), len(content)]), "reach") - 1
        )
        for place, byte in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), min_size=1, max_size=6)):
            content[place] = byte
    path = tmp_path / name
    path.write_bytes(content)
    for reader in READERS:
        try:
            assert reader(path) is not None
        except DataError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_was_cut_never_gives_less(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(WHOLE[name])
    whole = read_array(path)
    # Pixels or the list of pages break off in the last third.
    most = len(WHOLE[name]) * 2 // 3
    for length in (*range(0, most, 17), *range(most, len(WHOLE[name]))):
        path.write_bytes(WHOLE[name][:length])
        try:
            np.testing.assert_array_equal(read_array(path), whole)
            assert length >= most
        except DataError:
            pass


def test_a_pickled_array_is_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    np.save(tmp_path / "a.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy.*objects"):
        read_array(tmp_path / "a.npy")
    assert not (tmp_path / "sprung").exists()


def test_complex_and_structured_arrays_are_refused(tmp_path: Path) -> None:
    for array in (np.zeros((3, 3), complex), np.zeros((3, 3), [("a", "u1")]), np.zeros((3, 3), "U4")):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(DataError, match="type"):
            read_array(tmp_path / "a.npy")


def huge_npy() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    return buffer.getvalue() + bytes(100)


def huge_png() -> bytes:
    content = bytearray(WHOLE["grey.png"])
    content[16:24] = struct.pack(">II", 10**6, 10**6)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def huge_tiff() -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, PIXELS[0], photometric="minisblack", metadata=None, compression="zlib")
    content = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        for tag in ("ImageWidth", "ImageLength"):
            entry = file.pages[0].tags[tag]
            struct.pack_into("<HI", content, entry.offset + 2, 4, 1)  # type: one 32-bit number
            struct.pack_into("<I", content, entry.offset + 8, 10**6)
    return bytes(content)


@pytest.mark.parametrize(
    "name, content", [("a.npy", huge_npy()), ("a.png", huge_png()), ("a.tif", huge_tiff())]
)
def test_a_header_that_declares_terabytes_allocates_nothing(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    try:
        start = time.perf_counter()
        with pytest.raises(DataError, match=name):
            read_array(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        assert time.perf_counter() - start < 5
    finally:
        tracemalloc.stop()
