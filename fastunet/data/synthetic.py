"""Synthetic microscopy with known truth: neurites in an electron micrograph, and touching fluorescent nuclei.

Both start from one construction: ellipses of many sizes are packed like darts, and every pixel goes to the
one it is least outside of (an additively weighted Voronoi diagram of warped coordinates). All is a pure
function of the seed and the size; lengths are in pixels and do not depend on the size.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from fastunet.data.datasets import Dataset, Meaning, dataset_of_arrays

# Lengths and grey values below were set beside ISBI 2012 (membranes) and BBBC039 (cells).
MEMBRANE_HALF_WIDTH = 2.8
SMALLEST_INSTANCE = 30  # pixels


@dataclass(frozen=True)
class _Ellipses:
    """Centres (N, 2) as y, x; mean radii, aspect ratios and angles (N,)."""

    centres: np.ndarray
    radii: np.ndarray
    aspects: np.ndarray
    angles: np.ndarray


def synthetic_membranes(seed: int = 0, size: int | tuple[int, int] = 512) -> tuple[np.ndarray, np.ndarray]:
    """Make an electron micrograph of neurites with dark membranes, organelles and noise, as in ISBI 2012.

    Parameters
    ----------
    seed : int
    size : int or (int, int)
        Height and width in pixels.

    Returns
    -------
    image : (H, W) uint8
    instances : (H, W) int32
        0 = membrane; every neurite cross-section is one 4-connected number from 1 without gaps.
    """
    shape = _shape(size)
    rng = np.random.default_rng([seed, 1])
    ellipses = _pack(
        rng, shape, median_radius=10.5, spread=0.85, radii=(7, 72), spacing=1.02, filled=0.62, aspect=2.4
    )
    warp = [9 * _smooth(rng, shape, 28) + 1.0 * _smooth(rng, shape, 9) for _ in range(2)]
    cells, _ = _assign(shape, ellipses, warp)
    # Some neighbours are one neurite, so that not every cross-section is convex.
    owner = np.arange(len(ellipses.radii))
    joined = rng.random(owner.size) < 0.2
    between = np.linalg.norm(ellipses.centres[:, None] - ellipses.centres[None], axis=2)
    np.fill_diagonal(between, np.inf)
    owner[joined] = between.argmin(1)[joined] if owner.size > 1 else 0
    cells = owner[cells]

    edge = np.zeros(shape, bool)
    edge[:, :-1] |= cells[:, :-1] != cells[:, 1:]
    edge[:-1] |= cells[:-1] != cells[1:]
    depth = (ndimage.distance_transform_edt(~edge) if edge.any() else np.full(shape, 99.0)).astype(np.float32)
    swelling = np.clip(1 + 0.22 * _smooth(rng, shape, 14), 0.6, 1.8)
    instances = _number(depth > MEMBRANE_HALF_WIDTH * swelling)

    # Cytoplasm: a grey of its own for each neurite, some dark; slow staining differences; vesicles.
    grey = rng.normal(143, 9, owner.size) - 38 * (rng.random(owner.size) < 0.07)
    image = grey.astype(np.float32)[cells] + 6 * _smooth(rng, shape, 60) + 9 * _smooth(rng, shape, 4)
    busy = np.where(rng.random(owner.size) < 0.4, rng.uniform(0.006, 0.016, owner.size), 0.0012)[cells]
    vesicles = ((rng.random(shape) < busy) & (depth > 5)).astype(np.float32)
    ring = (
        ndimage.gaussian_filter(vesicles, 2.3) * 2.3**2
        - ndimage.gaussian_filter(vesicles, 1.3) * 1.3**2 * 1.15
    )
    image -= 500 * ring
    image = _add_mitochondria(rng, image, depth)
    # Membranes: dark, of varying width; where one was cut obliquely it is wider and fainter.
    oblique = np.clip(_smooth(rng, shape, 22) - 1.1, 0, 1.2)
    width = 2.9 * swelling + 2.2 * oblique
    image -= (88 - 30 * oblique) * np.exp(-((depth / width) ** 2))
    # Synapses: dark smudges on membranes.
    spots = ((rng.random(shape) < 1e-3) & (depth < 2)).astype(np.float32)
    image -= 34 * np.clip(ndimage.gaussian_filter(spots, 6) * 2 * np.pi * 6**2, 0, 1.6)
    # The microscope: correlated grain, white noise (more of it in some sections than in others), contrast.
    image += ndimage.gaussian_filter(rng.normal(0, 55, shape).astype(np.float32), rng.uniform(0.8, 1.0))
    image += rng.normal(0, rng.uniform(2, 12), shape)
    image = rng.normal(128, 5) + (image - image.mean()) * rng.uniform(0.9, 1.1)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), instances


def synthetic_cells(seed: int = 0, size: int | tuple[int, int] = 512) -> tuple[np.ndarray, np.ndarray]:
    """Make a fluorescence image of nuclei, many of them touching, under uneven illumination, as in BBBC039.

    Parameters
    ----------
    seed : int
    size : int or (int, int)
        Height and width in pixels.

    Returns
    -------
    image : (H, W) uint8
    instances : (H, W) int32
        0 = background; nuclei, numbered from 1 without gaps, touch without a gap between them.
    """
    shape = _shape(size)
    rng = np.random.default_rng([seed, 2])
    ellipses = _pack(
        rng, shape, median_radius=14, spread=0.22, radii=(8, 24), spacing=0.8, filled=0.34, aspect=1.8
    )
    warp = [1.6 * _smooth(rng, shape, 14) + 0.5 * _smooth(rng, shape, 5) for _ in range(2)]
    nearest, outside = _assign(shape, ellipses, warp)
    instances = _number(outside < 0, nearest)

    brightness = rng.lognormal(np.log(85), 0.3, len(ellipses.radii)).astype(np.float32)[nearest]
    body = 1 / (1 + np.exp(np.clip(outside, -30, 30) / 0.9))  # the point spread at a nucleus's rim
    # Where two touch, a faint valley runs between them: each is a little dimmer at its own rim.
    rim = np.where(instances > 0, ndimage.distance_transform_edt(_interior(instances)), 0).astype(np.float32)
    texture = 1 + 0.10 * _smooth(rng, shape, 2.2) + 0.10 * _smooth(rng, shape, 6)
    nuclei = brightness * body * texture * (1 - 0.38 * np.exp(-rim / 1.6))
    nucleoli = ((rng.random(shape) < 0.004) & (rim > 4)).astype(np.float32)
    nuclei *= 1 - 0.45 * np.clip(ndimage.gaussian_filter(nucleoli, 1.8) * 2 * np.pi * 1.8**2, 0, 1)
    haze = ndimage.gaussian_filter(nuclei, 12)
    image = ndimage.gaussian_filter(nuclei, 0.9) + 0.12 * haze + 9 + 2 * _smooth(rng, shape, 90)
    y, x = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in shape), indexing="ij")
    centre = rng.uniform(-0.4, 0.4, 2)
    image *= 1 - 0.28 * np.clip((y - centre[0]) ** 2 + (x - centre[1]) ** 2, 0, 2.4)
    image = rng.poisson(np.clip(image, 0.5, None) * 2.2) / 2.2 + rng.normal(0, 1.5, shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), instances


def synthetic_dataset(count: int = 12, size: int | tuple[int, int] = 512, seed: int = 0) -> Dataset:
    """Make the stack that training without data uses: `count` images of `synthetic_membranes`.

    Returns
    -------
    Dataset
        Of instances; the background class is the membrane.

    Raises
    ------
    ValueError
        If `count` or a side of `size` is below 1.
    """
    if count < 1:
        raise ValueError(f"{count} synthetic images were asked for; at least 1 is needed")
    images, labels = zip(*(synthetic_membranes(seed * 1_000_003 + number, size) for number in range(count)))
    names = [f"synthetic {number}" for number in range(count)]
    return dataset_of_arrays(images, labels, Meaning("instances", ("membrane", "cell")), names)


def _shape(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"a size of {height}x{width} was asked for; both sides must be at least 1")
    return height, width


def _smooth(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Smooth noise (H, W) float32 of about unit variance and this correlation length in pixels."""
    if sigma < 5:
        noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma)
        return noise * np.float32(2 * np.sqrt(np.pi) * sigma)
    step = 1.6 * sigma
    nodes = rng.standard_normal([int(side / step) + 4 for side in shape], np.float32)
    # A separable cubic B-spline, a small matrix for each axis; 2.3 makes up for the variance it takes.
    rows, columns = (_spline(side, count, step) for side, count in zip(shape, nodes.shape))
    return np.float32(2.3) * (rows @ nodes @ columns.T)


def _spline(side: int, nodes: int, step: float) -> np.ndarray:
    """Cubic B-spline weights (side, nodes) of nodes `step` pixels apart, the first one before the image."""
    distance = np.abs(np.arange(side)[:, None] / step + 1 - np.arange(nodes)[None])
    inner = 2 / 3 - distance**2 * (1 - distance / 2)
    outer = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, inner, outer).astype(np.float32)


def _pack(
    rng: np.random.Generator,
    shape: tuple[int, int],
    median_radius: float,
    spread: float,
    radii: tuple[float, float],
    spacing: float,
    filled: float,
    aspect: float,
) -> _Ellipses:
    """Throw ellipses, the largest first, until they fill this share of the image and a margin around it.

    Two centres stay `spacing` times the sum of their radii apart; log-normal radii are clipped to `radii`.
    """
    margin = 40
    area = (shape[0] + 2 * margin) * (shape[1] + 2 * margin)
    sizes = np.clip(rng.lognormal(np.log(median_radius), spread, area // 100 + 1), *radii)
    sizes = np.sort(sizes[: 1 + np.searchsorted(np.cumsum(np.pi * sizes**2), filled * area)])[::-1]
    centres, placed = np.empty((sizes.size, 2)), np.empty(sizes.size)
    count = 0
    for radius in sizes:
        tries = rng.uniform(-margin, np.array(shape) + margin, (40, 2))
        distance = np.linalg.norm(tries[:, None] - centres[None, :count], axis=2)
        free = (distance > spacing * (radius + placed[:count])).all(1)
        if free.any():
            centres[count], placed[count] = tries[free.argmax()], radius
            count += 1
    stretch = np.exp(rng.uniform(0, np.log(aspect), count))
    return _Ellipses(centres[:count], placed[:count], stretch, rng.uniform(0, np.pi, count))


def _assign(
    shape: tuple[int, int], ellipses: _Ellipses, warp: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Give every pixel the ellipse it is least outside of, and by how much: (H, W) indices and pixels."""
    nearest = np.zeros(shape, np.int32)
    outside = np.full(shape, np.inf, np.float32)
    y, x = (grid.astype(np.float32) + shift for grid, shift in zip(np.indices(shape), warp))
    # An ellipse is asked only near itself; packing leaves no gap wider than that.
    for index, (centre, radius) in enumerate(zip(ellipses.centres, ellipses.radii)):
        aspect, angle = np.sqrt(ellipses.aspects[index]), ellipses.angles[index]
        reach = radius * aspect + 90
        low = np.clip(centre - reach, 0, shape).astype(int)
        high = np.clip(centre + reach, 0, shape).astype(int)
        window = (slice(low[0], high[0]), slice(low[1], high[1]))
        dy, dx = y[window] - np.float32(centre[0]), x[window] - np.float32(centre[1])
        along = (np.cos(angle) * dx + np.sin(angle) * dy) / aspect
        across = (np.cos(angle) * dy - np.sin(angle) * dx) * aspect
        distance = np.sqrt(along**2 + across**2) - np.float32(radius)
        closer = distance < outside[window]
        nearest[window][closer] = index
        outside[window][closer] = distance[closer]
    return nearest, outside


def _interior(instances: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose right and lower neighbours belong to the same instance."""
    same = np.ones(instances.shape, bool)
    same[:, :-1] &= instances[:, :-1] == instances[:, 1:]
    same[:-1] &= instances[:-1] == instances[1:]
    return same


def _number(mask: np.ndarray, parts: np.ndarray | None = None) -> np.ndarray:
    """Return the 4-connected pieces of a mask (of each part of it), numbered from 1, without specks."""
    if parts is None:
        pieces = ndimage.label(mask)[0]
    else:
        pieces, count = np.zeros(mask.shape, np.int64), 0
        for number, window in enumerate(ndimage.find_objects(np.where(mask, parts + 1, 0))):
            if window is not None:
                found, new = ndimage.label(mask[window] & (parts[window] == number))
                pieces[window][found > 0] = found[found > 0] + count
                count += new
    large = np.bincount(pieces.ravel()) >= SMALLEST_INSTANCE
    large[0] = False
    numbers = np.where(large, np.cumsum(large), 0)
    return numbers[pieces].astype(np.int32)


def _add_mitochondria(rng: np.random.Generator, image: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Draw dark, striped ellipses with a darker rim where it is far enough (`depth`) to a membrane."""
    y, x = np.nonzero(depth > 17)
    if not y.size:
        return image
    for pick in rng.integers(y.size, size=max(1, image.size // 32_000)):
        centre = y[pick], x[pick]
        long = min(depth[centre] - 4, rng.uniform(16, 34))
        short = long * rng.uniform(0.6, 0.95)
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 8)
        window = tuple(slice(max(0, at - 34), min(side, at + 35)) for at, side in zip(centre, image.shape))
        dy, dx = (grid.astype(np.float32) - at for grid, at in zip(np.mgrid[window], centre))
        along, across = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        radius = np.sqrt((along / long) ** 2 + (across / short) ** 2)
        inside = 1 / (1 + np.exp(np.clip((radius - 1) * short / 0.8, -30, 30)))
        stripes = 17 * np.sin(2 * np.pi * across / period + 0.12 * along * np.sin(along / 5))
        rim = 16 * np.exp(-(((radius - 0.95) * short / 1.5) ** 2))
        image[window] += inside * (78 + stripes - image[window]) - rim
    return image
