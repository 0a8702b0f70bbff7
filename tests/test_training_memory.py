"""The memory plan: grows as the network does, refuses with advice that holds."""

import re

import pytest

from fastunet.geometry import input_size
from fastunet.training_memory import check_training_memory, training_bytes


def test_parameters_of_the_paper_network_are_counted():
    # Values and momentum of 31,030,658 parameters, and six copies more while a checkpoint is written.
    assert training_bytes(188, 1, 2, 64, 4) > 8 * 4 * 31_030_658


def test_activations_of_a_wide_tile_are_counted():
    small, large = (training_bytes(tile, 1, 2, 16, 4) for tile in (316, 572))
    # The finest level alone: what is kept and what is pooled going down, and three maps coming up.
    down = sum(side**2 for side in (392, 284)) - sum(side**2 for side in (136, 156))
    up = sum(side**2 for side in (392, 390, 388)) - sum(side**2 for side in (136, 134, 132))
    assert large - small > 4 * 16 * (down + up)
    assert large < 1 << 30


@pytest.mark.parametrize("tile", [188, 316, 572])
@pytest.mark.parametrize("available", [200 << 20, 700 << 20])
def test_what_the_message_advises_fits(tile, available):
    needed = training_bytes(tile, 1, 2, 64, 4)
    if needed <= available:
        check_training_memory(tile, 1, 2, 64, 4, available)
        return
    with pytest.raises(MemoryError, match=f"tiles of {tile} pixels and 64 base channels") as caught:
        check_training_memory(tile, 1, 2, 64, 4, available)
    advice = re.findall(r"--(tile|base-channels) (\d+)", str(caught.value))
    assert advice
    for option, value in advice:
        smaller, narrower = (int(value), 64) if option == "tile" else (tile, int(value))
        check_training_memory(smaller, 1, 2, narrower, 4, available)
        if option == "tile":
            with pytest.raises(MemoryError):
                check_training_memory(smaller + 16, 1, 2, 64, 4, available)


def test_says_so_where_nothing_fits():
    with pytest.raises(MemoryError, match="even the smallest network"):
        check_training_memory(input_size(1, 4), 1, 2, 64, 4, available=1 << 20)
