"""Plans of predictions: every pixel once, in phase, within memory, with the least work."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunet.geometry import border, input_size, is_valid_input
from fastunet.tiling import activation_bytes, check_tile, forward_flops, plan_tiles, prediction_bytes


def network(base_channels=64, depth=4, in_channels=1, num_classes=2, composed_size=lambda level: 0):
    return SimpleNamespace(
        in_channels=in_channels,
        num_classes=num_classes,
        base_channels=base_channels,
        depth=depth,
        composed_size=composed_size,
    )


sizes = st.integers(1, 700)


@settings(deadline=None, max_examples=200)
@given(sizes, sizes, st.integers(1, 6), st.one_of(st.just("auto"), st.integers(0, 40)), st.floats(0, 1))
def test_tiles_cover_every_pixel_once_in_phase_and_within_memory(height, width, depth, tile, share):
    net = network(base_channels=8, depth=depth)
    step = 2**depth
    if tile != "auto":
        tile = input_size(step, depth) + tile * step
    least = prediction_bytes(height, width, input_size(1, depth), input_size(1, depth), net)
    most = plan_tiles(height, width, net, tile).memory
    memory = int(least + share * (most - least))
    try:
        plan = plan_tiles(height, width, net, tile, memory)
    except MemoryError:
        smallest = (input_size(min(step, size), depth) for size in (height, width))
        assert prediction_bytes(height, width, *smallest, net) > memory
        return
    assert plan.memory <= memory
    assert all(is_valid_input(side, depth) for side in plan.tile)
    assert tile == "auto" or max(plan.tile) <= tile
    seen = np.zeros((height, width), int)
    for part in plan:
        assert part.top % step == 0 and part.left % step == 0
        assert 0 < part.bottom - part.top <= plan.output[0]
        assert 0 < part.right - part.left <= plan.output[1]
        seen[part.top : part.bottom, part.left : part.right] += 1
    assert (seen == 1).all()
    assert len(plan) == len(list(plan)) == plan.grid[0] * plan.grid[1]


@pytest.mark.parametrize("size", [(1, 1), (4, 500), (97, 101), (512, 512), (520, 696)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_auto_computes_the_fewest_pixels_of_all_tiles_that_fit(size, share):
    net = network(base_channels=16)
    memory = int(plan_tiles(*size, net).memory * share)
    fewest = None
    heights, widths = ({input_size(output, 4) for output in range(1, side + 16)} for side in size)
    for tile_height in heights:
        for tile_width in widths:
            tile = tile_height, tile_width
            counts = [_tiles_along(*pair) for pair in zip(size, tile)]
            if 0 in counts or prediction_bytes(*size, *tile, net) > memory:
                continue
            pixels = counts[0] * counts[1] * tile[0] * tile[1]
            fewest = pixels if fewest is None else min(fewest, pixels)
    if fewest is None:
        with pytest.raises(MemoryError, match="free memory"):
            plan_tiles(*size, net, memory=memory)
        return
    plan = plan_tiles(*size, net, memory=memory)
    assert len(plan) * plan.tile[0] * plan.tile[1] == fewest


def _tiles_along(size, tile):
    """Count tiles along an axis by walking it; 0 where the tile cannot walk."""
    output, position, count = tile - 2 * border(4), 0, 1
    while position + output < size:
        if output < 16:
            return 0
        position += output // 16 * 16
        count += 1
    return count


def test_the_papers_tile_and_the_image_in_one():
    plan = plan_tiles(512, 512, network(), 572)
    assert (plan.tile, plan.output, plan.stride, plan.grid) == ((572, 572), (388, 388), (384, 384), (2, 2))
    assert [(t.top, t.left, t.bottom, t.right) for t in plan] == [
        (0, 0, 384, 384),
        (0, 384, 384, 512),
        (384, 0, 512, 384),
        (384, 384, 512, 512),
    ]
    assert plan_tiles(388, 388, network(), 572).grid == (1, 1)
    assert plan_tiles(512, 512, network()).tile == (700, 700)
    assert plan_tiles(100, 2, network(), 572).tile == (284, 188)


def test_memory_makes_the_tile_smaller_and_the_plan_tells():
    enough = plan_tiles(512, 512, network(), 572)
    assert enough.tile == enough.preferred
    plan = plan_tiles(512, 512, network(), 572, memory=enough.memory - 1)
    assert plan.preferred == (572, 572) and plan.memory < enough.memory


@pytest.mark.parametrize(
    ("tile", "depth", "nearest"),
    [
        (573, 4, "572 and 588"),
        (188, 4, "204 and 220"),
        (200, 4, "204 and 220"),
        (0, 4, "204 and 220"),
        (17, 1, "18 and 20"),
        (21, 1, "20 and 22"),
    ],
)
def test_tiles_that_are_refused(tile, depth, nearest):
    with pytest.raises(ValueError, match=f"tile {tile} cannot predict at depth {depth}.* {nearest}"):
        plan_tiles(512, 512, network(depth=depth), tile)


@pytest.mark.parametrize("tile", ["large", 572.0, None])
def test_tiles_that_are_no_sizes(tile):
    with pytest.raises(ValueError, match="expected 'auto' or an input size such as 204"):
        check_tile(tile, 4)


def test_operations_of_the_papers_network():
    assert forward_flops(572, 572, network()) == pytest.approx(300.9e9, rel=1e-3)


def test_memory_of_a_network_written_out():
    # Depth 1: sides 20, 18, 16 down, of which 8 are kept, 8, 6, 4 at the bottom (twice the channels), 8, 6, 4 up.
    block = 4 * 16
    first_down = block * (20**2 + 18**2)
    finest_down = block * (8**2 + 18**2 + 8**2)
    bottom = block * (8**2 + max(8**2 + 2 * 6**2, 2 * 6**2 + 2 * 4**2))
    up = block * (8**2 + max(2 * 4**2 + 8**2, 8**2 + 6**2))
    expected = max(first_down, finest_down, bottom, up)
    assert activation_bytes(20, 20, network(in_channels=5, base_channels=16, depth=1)) == expected
    # The first layer of an image of few channels is never there.
    expected = max(block * (8**2 + 8**2), bottom, up)
    assert activation_bytes(20, 20, network(in_channels=4, base_channels=16, depth=1)) == expected
    # Composed, the way up holds the skip, the bottom and the convolution's result, and weights of its own.
    expected = max(block * (8**2 + 8**2), bottom, block * (8**2 + 2 * 4**2 + 6**2)) + 4 * 1000
    composed = network(in_channels=4, base_channels=16, depth=1, composed_size=lambda level: 1000)
    assert activation_bytes(20, 20, composed) == expected
