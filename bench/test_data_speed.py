"""The data side beside what people use: the weight map beside SciPy, the warp beside OpenCV, in one run."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from fastunet import separate, weight_map
from fastunet.data.synthetic import synthetic_cells
from fastunet.data.warp import Warp, apply_warp, draw_warp, spline_coefficients

DATA = Path(os.environ.get("FASTUNET_DATA", Path(__file__).parents[2] / "shared" / "data"))
FRAME = DATA / "ctc" / "PhC-C2DL-PSC" / "01_ST" / "SEG" / "man_seg299.tif"
W0, SIGMA, REACH = 10.0, 5.0, 31
TILE, SIDE = 572, 1024


@pytest.fixture(scope="module")
def labels() -> NDArray[np.integer]:
    """A frame of 650 real cells, or synthetic ones of the same size where it is absent."""
    return tifffile.imread(FRAME) if FRAME.exists() else synthetic_cells(0, (576, 720))[1]


def border_term(d1: NDArray[np.floating], d2: NDArray[np.floating]) -> NDArray[np.floating]:
    return W0 * np.exp(-((d1 + d2) ** 2) / (2 * SIGMA**2))


def weigh_by_instance(labels: NDArray[np.integer]) -> NDArray[np.floating]:
    """One distance transform of the whole image for each instance: the usual way."""
    d1 = np.full(labels.shape, np.inf)
    d2 = d1.copy()
    for instance in np.setdiff1d(labels, [0]):
        distance = ndimage.distance_transform_edt(labels != instance)
        d2 = np.minimum(d2, np.maximum(d1, distance))
        d1 = np.minimum(d1, distance)
    return 1 + np.where(labels == 0, border_term(d1, d2), 0)


def weigh_by_box(labels: NDArray[np.integer]) -> NDArray[np.floating]:
    """One distance transform of each instance's bounding box and the reach of the border term around it."""
    d1 = np.full(labels.shape, np.inf)
    d2 = d1.copy()
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        near = tuple(slice(max(side.start - REACH, 0), side.stop + REACH) for side in box)
        distance = ndimage.distance_transform_edt(labels[near] != number)
        d2[near] = np.minimum(d2[near], np.maximum(d1[near], distance))
        d1[near] = np.minimum(d1[near], distance)
    return 1 + np.where(labels == 0, border_term(d1, d2), 0)


@pytest.mark.benchmark(group="weight map")
@pytest.mark.parametrize("threads", [1, 2])
def test_weight_map(benchmark, labels, threads):
    found = benchmark(weight_map, labels, class_weights=None, threads=threads)
    np.testing.assert_allclose(found, weigh_by_box(labels), rtol=1e-5, atol=1e-5)


@pytest.mark.benchmark(group="weight map")
def test_one_scipy_distance_transform(benchmark, labels):
    benchmark(ndimage.distance_transform_edt, labels == 0)


@pytest.mark.benchmark(group="weight map")
def test_scipy_loop_over_instances(benchmark, labels):
    benchmark.pedantic(weigh_by_instance, (labels,), rounds=1)


@pytest.mark.benchmark(group="weight map")
def test_scipy_loop_over_bounding_boxes(benchmark, labels):
    benchmark.pedantic(weigh_by_box, (labels,), rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(group="separation")
@pytest.mark.parametrize("width", [1, 3])
def test_separate(benchmark, labels, width):
    benchmark(separate, labels, width)


@pytest.fixture(scope="module")
def scene() -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32], Warp]:
    """Image, labels, weights and a warp of one tile of 572 whose output is the whole tile."""
    rng = np.random.default_rng(0)
    image, instances = synthetic_cells(0, SIDE)
    warp = draw_warp((0, 0), image.shape, TILE, TILE)
    warp = Warp(TILE, TILE, (SIDE / 2, SIDE / 2), warp.angle, displacement=warp.displacement)
    weights = rng.random((SIDE, SIDE), dtype=np.float32)
    return image.astype(np.float32).reshape(SIDE, SIDE, 1), (instances > 0).astype(np.uint8), weights, warp


def opencv_warp(
    image: NDArray[np.float32], labels: NDArray[np.uint8], weights: NDArray[np.float32], warp: Warp
) -> Callable[[], None]:
    """Resize the coarse field, add it to the rotated grid (computed beforehand) and remap three times."""
    middle = (TILE - 1) / 2
    y, x = np.mgrid[:TILE, :TILE] - middle
    cosine, sine = np.cos(warp.angle), np.sin(warp.angle)
    across = (cosine * x + sine * y + warp.centre[1]).astype(np.float32)
    down = (cosine * y - sine * x + warp.centre[0]).astype(np.float32)
    coarse = warp.displacement.astype(np.float32)
    plane = image[..., 0].copy()
    buffers = [np.empty((TILE, TILE), kind) for kind in (np.float32, np.uint8, np.float32)]

    def run() -> None:
        moves_down, moves_across = cv2.split(cv2.resize(coarse, (TILE, TILE), interpolation=cv2.INTER_CUBIC))
        maps = cv2.add(across, moves_across), cv2.add(down, moves_down)
        for source, target, interpolation in zip(
            (plane, labels, weights), buffers, (cv2.INTER_LINEAR, cv2.INTER_NEAREST, cv2.INTER_LINEAR)
        ):
            cv2.remap(source, *maps, interpolation, dst=target, borderMode=cv2.BORDER_REFLECT_101)

    return run


@pytest.mark.benchmark(group="warp of a 572 tile")
@pytest.mark.parametrize("threads", [1, 2])
def test_warp(benchmark, scene, threads):
    *arrays, warp = scene
    benchmark(apply_warp, *arrays, warp, out=apply_warp(*arrays, warp), threads=threads)


@pytest.mark.benchmark(group="warp of a 572 tile")
@pytest.mark.parametrize("threads", [1, 2])
def test_opencv_resize_and_three_remaps(benchmark, scene, threads):
    before = cv2.getNumThreads()
    cv2.setNumThreads(threads)
    benchmark(opencv_warp(*scene))
    cv2.setNumThreads(before)


@pytest.mark.benchmark(group="warp of a 572 tile, cubic")
def test_warp_cubic(benchmark, scene):
    image, labels, weights, warp = scene
    coefficients = spline_coefficients(image)
    benchmark(apply_warp, coefficients, labels, weights, warp, "cubic", prefilter=False)
