"""Images read by rectangles: whatever the file, the pixels of the whole; normalised by the same figures."""

import numpy as np
import pytest
import tifffile

from fastunet import DataError
from fastunet.data.images import read_array, read_images, write_array
from fastunet.data.sources import Loaded, Mapped, Segmented, open_images
from fastunet.normalization import BLOCK, offsets_and_scales, statistics


def rectangles(rng, height, width, count=25):
    """Random ones, the whole and the last pixel."""
    yield 0, 0, height, width
    yield height - 1, width - 1, height, width
    for _ in range(count):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        yield top, left, int(rng.integers(top, height)) + 1, int(rng.integers(left, width)) + 1


def check(rng, path, kind, axes=None):
    expected = read_images(path, axes)
    found = open_images(path, axes)
    assert [name for name, _ in found] == [image.name for image in expected]
    for (_, source), image in zip(found, expected):
        assert isinstance(source, kind)
        assert source.shape == image.pixels.shape and source.dtype == image.pixels.dtype
        for top, left, bottom, right in rectangles(rng, *source.shape[:2]):
            part = source.read(top, left, bottom, right)
            np.testing.assert_array_equal(part, image.pixels[top:bottom, left:right])
            assert part.dtype.isnative
    return found


def pixels(rng, *shape, dtype=np.uint16):
    return (rng.random(shape) * 60000).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, ">u2", np.float32, "<f8", bool])
def test_npy_is_mapped(rng, tmp_path, dtype):
    np.save(tmp_path / "a.npy", pixels(rng, 70, 83, dtype=dtype))
    check(rng, tmp_path / "a.npy", Mapped)
    np.save(tmp_path / "f.npy", np.asfortranarray(pixels(rng, 7, 70, 83, dtype=dtype)))
    check(rng, tmp_path / "f.npy", Mapped)
    check(rng, tmp_path / "f.npy", Mapped, "CYX")
    check(rng, tmp_path / "f.npy", Mapped, "XZY")


TIFFS = {
    "one piece": ((3, 70, 81), {}, Mapped),
    "big-endian": ((70, 81), {"byteorder": ">"}, Mapped),
    "colour": ((70, 81, 3), {"photometric": "rgb"}, Mapped),
    "tiles": ((70, 81), {"tile": (16, 32)}, Segmented),
    "BigTIFF tiles of a stack": ((4, 70, 81), {"tile": (32, 16), "bigtiff": True}, Segmented),
    "deflated tiles": ((70, 81), {"tile": (16, 32), "compression": "zlib", "predictor": True}, Segmented),
    "big-endian deflated": ((70, 81), {"tile": (16, 32), "compression": "zlib", "byteorder": ">"}, Segmented),
    "deflated strips": ((2, 70, 81), {"rowsperstrip": 9, "compression": "zlib"}, Segmented),
    "LZW strips": ((70, 81), {"rowsperstrip": 9, "compression": "lzw"}, Segmented),
    "one deflated strip": ((70, 81), {"rowsperstrip": 70, "compression": "zlib"}, Segmented),
    "deflated colour": (
        (70, 81, 3),
        {"photometric": "rgb", "compression": "zlib", "tile": (16, 16)},
        Segmented,
    ),
    "channels on pages": ((3, 70, 81), {"compression": "zlib", "metadata": {"axes": "CYX"}}, Segmented),
    "stack of channels": ((2, 3, 70, 81), {"compression": "zlib", "metadata": {"axes": "ZCYX"}}, Segmented),
    "planar colour": (
        (3, 70, 81),
        {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"},
        Loaded,
    ),
}


@pytest.mark.parametrize("name", TIFFS)
def test_tiff(rng, tmp_path, name):
    shape, options, kind = TIFFS[name]
    tifffile.imwrite(tmp_path / "a.tif", pixels(rng, *shape), **{"photometric": "minisblack", **options})
    check(rng, tmp_path / "a.tif", kind)


def test_tiff_of_images_of_different_kinds(rng, tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels(rng, 30, 40), compression="zlib")
        file.write(pixels(rng, 20, 50, dtype=np.uint8))
    check(rng, tmp_path / "a.tif", (Segmented, Mapped))


def test_a_tile_that_was_never_written_is_0(rng, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", shape=(64, 64), dtype=np.uint8, tile=(32, 32))
    check(rng, tmp_path / "a.tif", Segmented)


@pytest.mark.parametrize("shape, axes", [((70, 81), "YX"), ((3, 70, 81), "CYX"), ((2, 3, 70, 81), "ICYX")])
def test_zarr_with_ome_metadata(rng, tmp_path, shape, axes):
    pytest.importorskip("zarr")
    write_array(tmp_path / "a.zarr", pixels(rng, *shape), axes)
    found = check(rng, tmp_path / "a.zarr", Segmented)
    assert len(found) == (shape[0] if axes[0] == "I" else 1)


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_arrays_of_others(rng, tmp_path, version):
    zarr = pytest.importorskip("zarr")
    values = pixels(rng, 3, 70, 81, 2)
    array = zarr.create_array(
        tmp_path / "a.zarr",
        shape=values.shape,
        dtype=values.dtype,
        chunks=(2, 16, 20, 1),
        zarr_format=version,
    )
    array[...] = values
    check(rng, tmp_path / "a.zarr", Segmented)
    check(rng, tmp_path / "a.zarr", Segmented, "CXYZ")
    group = zarr.create_group(tmp_path / "old.zarr", zarr_format=version)
    level = group.create_array("full", shape=values.shape[:3], dtype=values.dtype, chunks=(1, 30, 30))
    level[...] = values[..., 0]
    axes = [{"name": name} for name in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [{"path": "full"}]}]
    found = check(rng, tmp_path / "old.zarr", Segmented)
    assert len(found) == 3


def test_zarr_of_a_stack_of_depth(rng, tmp_path):
    pytest.importorskip("zarr")
    values = pixels(rng, 3, 5, 7)
    write_array(tmp_path / "a.zarr", values, "ZYX")
    np.testing.assert_array_equal(read_array(tmp_path / "a.zarr"), values)


def test_zarr_that_holds_no_image(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.create_group(tmp_path / "a.zarr").create_group("labels")
    with pytest.raises(DataError, match=r"a\.zarr: a group of labels without OME metadata"):
        open_images(tmp_path / "a.zarr")


def test_what_was_decoded_for_the_last_rectangle_is_not_decoded_again():
    decoded = []

    def decode(row, column):
        decoded.append((row, column))
        return np.full((10, 20, 1), 10 * row + column)

    source = Segmented((35, 50, 1), np.dtype(int), (10, 20), decode, 0)
    assert source.read(5, 0, 12, 30)[:, :, 0].tolist()[0][19:21] == [0, 1]
    assert decoded == [(0, 0), (0, 1), (1, 0), (1, 1)]
    source.read(5, 25, 12, 50)
    assert decoded[4:] == [(0, 2), (1, 2)]
    held = {place: part.nbytes for place, part in source._kept.items()}
    assert sum(held.values()) <= source.held_bytes(7, 30)


@pytest.mark.parametrize("name", ["a.npy", "a.tif", "tiles.tif", "a.zarr"])
def test_damaged_files_are_refused_in_one_sentence(rng, tmp_path, name):
    if name == "a.zarr":
        pytest.importorskip("zarr")
        write_array(tmp_path / name, pixels(rng, 64, 64))
        chunk = max((file for file in (tmp_path / name).rglob("c/**/*") if file.is_file()), default=None)
        chunk.write_bytes(b"nothing")
    else:
        options = {"tile": (16, 16), "compression": "zlib"} if name == "tiles.tif" else {}
        if name == "a.npy":
            np.save(tmp_path / name, pixels(rng, 64, 64))
        else:
            tifffile.imwrite(tmp_path / name, pixels(rng, 64, 64), **options)
        data = bytearray((tmp_path / name).read_bytes())
        if name == "tiles.tif":
            with tifffile.TiffFile(tmp_path / name) as file:
                offset = file.pages.first.dataoffsets[5]
            data[offset : offset + 8] = bytes(8)
        else:
            data = data[: len(data) // 2]
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name.replace(".", r"\.") + ": .*expected"):
        open_images(tmp_path / name)[0][1].read(0, 0, 64, 64)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("how", ["zscore", "minmax"])
def test_figures_are_the_same_to_the_last_bit(rng, tmp_path, monkeypatch, dtype, how):
    monkeypatch.setattr("fastunet.normalization.BLOCK", 32)
    values = pixels(rng, 70, 81, 2, dtype=dtype if dtype != np.uint8 else np.uint16)
    values = (values % 250).astype(dtype) if dtype == np.uint8 else values
    tifffile.imwrite(tmp_path / "a.tif", values, compression="zlib", tile=(16, 48), planarconfig="contig")
    source = open_images(tmp_path / "a.tif")[0][1]
    assert isinstance(source, Segmented)
    np.testing.assert_array_equal(offsets_and_scales(source, how), offsets_and_scales(values, how))


def test_moments_are_those_of_the_whole_image(rng):
    values = 1e6 + rng.random((BLOCK + 70, 301, 1))
    (grey,) = statistics(values, True)
    assert grey.mean == pytest.approx(values.mean(), rel=1e-14)
    assert grey.deviation == pytest.approx(values.std(), rel=1e-9)
    whole = rng.integers(0, 60000, (BLOCK + 70, 301, 1)).astype(np.uint16)
    (grey,) = statistics(whole, True)
    exact = whole.astype(object).ravel()
    assert grey.mean == int(sum(exact)) / whole.size
    assert grey.deviation == pytest.approx(whole.std(dtype=np.float64), rel=1e-12)
