"""How attention is cut: every token is in one tile, and padding costs what the table says."""

from __future__ import annotations

import pytest

from dimefm_kernels.tiles import (
    MAX_TOKENS,
    MAX_WHOLE_KEYS,
    backward_tiles,
    forward_tiles,
    is_supported,
    waste,
    whole_key_tiles,
)

# Padded over true multiplications, less 1: what is left of 16 x 16 steps is the tensor cores'.
WASTE_PCT = {
    (17, 2): 254.3, (49, 2): 70.6, (50, 2): 63.8, (197, 2): 11.5, (257, 2): 12.0, (577, 2): 5.3,
    (17, 1): 254.3, (50, 1): 63.8, (197, 1): 20.1, (257, 1): 18.6, (577, 1): 8.2,
}  # fmt: skip


@pytest.mark.parametrize(("num_tokens", "itemsize"), WASTE_PCT)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_waste(num_tokens, itemsize, head_dim):
    found = 100 * waste(num_tokens, head_dim, itemsize=itemsize)
    assert found == pytest.approx(WASTE_PCT[num_tokens, itemsize], abs=0.1) or head_dim > 96


@pytest.mark.parametrize("head_dim", [32, 64, 96])
def test_a_tile_of_a_power_of_two_would_waste_more(head_dim):
    for num_tokens, most in ((197, 0.12), (257, 0.13), (577, 0.06)):
        one_tile = (1 << (num_tokens - 1).bit_length()) ** 2 / num_tokens**2 - 1
        assert waste(num_tokens, head_dim, itemsize=2) < most < one_tile / 5


def hopper_tiles(num_tokens, head_dim, *, itemsize):
    return forward_tiles(num_tokens, head_dim, itemsize=itemsize, capability=90)


def busy_hopper_tiles(num_tokens, head_dim, *, itemsize):
    return forward_tiles(num_tokens, head_dim, itemsize=itemsize, capability=90, num_items=9999)


@pytest.mark.parametrize("cut", [forward_tiles, backward_tiles, hopper_tiles, busy_hopper_tiles])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 72, 96, 128])
def test_every_token_is_in_a_tile(cut, itemsize, head_dim):
    step = 32 if itemsize == 1 else 16
    for num_tokens in range(1, MAX_TOKENS + 1):
        tiles = cut(num_tokens, head_dim, itemsize=itemsize)
        assert num_tokens <= tiles.padded_keys < num_tokens + step
        assert num_tokens <= tiles.padded_rows
        assert tiles.blocks == -(-num_tokens // tiles.rows)
        first, second = tiles.tails
        # Only the last tile may hold padding, and no tile is all padding.
        assert num_tokens > tiles.padded_keys - (second or first or tiles.tile)
        assert not second or first > second
        assert head_dim <= sum(tiles.dims)
        for size in (tiles.rows, tiles.tail_rows, tiles.tile, first, second, *tiles.dims):
            assert size & (size - 1) == 0


def test_head_dim_96_does_not_pay_for_128():
    assert forward_tiles(197, 96, itemsize=2).dims == (64, 32)
    assert forward_tiles(197, 64, itemsize=2).dims == (64, 0)
    assert forward_tiles(197, 72, itemsize=2).dims == (64, 16)


def test_hopper_takes_larger_blocks_once_it_is_busy():
    few, many = (forward_tiles(197, 64, itemsize=2, capability=90, num_items=n) for n in (96, 768))
    assert (few.rows, few.tile, few.num_stages) == (64, 64, 2)
    assert (many.rows, many.tile, many.num_stages) == (128, 64, 3)
    for others in ({"capability": 87}, {"capability": 110}):
        assert forward_tiles(197, 64, itemsize=2, num_items=768, **others).tile == 32
    for size, dim in ((1, 64), (4, 64), (2, 96)):
        plain = forward_tiles(197, dim, itemsize=size)
        assert forward_tiles(197, dim, itemsize=size, capability=90, num_items=768) == plain


@pytest.mark.parametrize("head_dim", [8, 32, 48, 64])
def test_int8_of_hopper_has_every_key_in_one_of_three_tiles(head_dim):
    for num_tokens in range(1, MAX_WHOLE_KEYS + 1):
        tiles = whole_key_tiles(num_tokens, head_dim, capability=90)
        assert num_tokens <= tiles.padded_keys < num_tokens + 32
        assert tiles.full_tiles + sum(size > 0 for size in tiles.tails) <= 3
        assert num_tokens <= tiles.rows * tiles.blocks
        assert head_dim <= tiles.dims[0]
        assert not tiles.dims[1]
    stages = [whole_key_tiles(n, head_dim, capability=90).num_stages for n in (50, 197, 257)]
    assert stages == [3, 3, 2]
    assert whole_key_tiles(MAX_WHOLE_KEYS + 1, head_dim, capability=90) is None
    assert whole_key_tiles(50, 96, capability=90) is None
    for others in (87, 100, 110):
        assert whole_key_tiles(50, head_dim, capability=others) is None


def test_what_the_kernels_take():
    assert is_supported(577, 128, itemsize=2)
    assert not is_supported(578, 64, itemsize=2)
    assert not is_supported(50, 129, itemsize=1)
    assert not is_supported(50, 128, itemsize=4)
    assert not is_supported(0, 64, itemsize=2)
