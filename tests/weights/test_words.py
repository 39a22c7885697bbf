"""`weights/words.py`: the order that Hopper decodes, there and back. Its decoding is tested in
`tests/fast/test_mxfp4.py`."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen35.errors import InputError
from weights.words import PLACES, TILE_N, TURNS, decode, encode, rows, tiles


def codes_of(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).byte()


# ---- there and back


def test_every_byte_value_returns_from_every_place():
    codes = (
        torch.arange(256)[:, None] + torch.arange(64)
    ).byte()  # [256, 64]: all bytes in each column
    assert torch.equal(decode(encode(codes)), codes)
    assert torch.equal(encode(decode(codes)), codes)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 4), max_size=3), st.integers(1, 3))
def test_random_codes_return_in_their_shape(seed: int, leading: list[int], spans: int):
    codes = codes_of(seed, *leading, 64 * spans)
    encoded = encode(codes)
    assert encoded.shape == codes.shape and encoded.dtype == torch.uint8
    assert torch.equal(decode(encoded), codes)


def test_what_is_given_stays_and_may_have_any_strides():
    codes = codes_of(0, 128, 6)
    before, turned = codes.clone(), codes.T
    encoded = encode(turned)
    assert torch.equal(codes, before)
    assert torch.equal(encoded, encode(turned.contiguous()))
    assert torch.equal(decode(encoded.T.contiguous().T), turned)


def test_places_are_a_permutation_of_a_words_bits():
    assert sorted(PLACES) == list(range(32))


def test_a_pair_is_one_turn_away_from_where_the_matrix_unit_wants_it():
    """Turned to the left by TURNS, its bits are s at 15, e1 e0 m at 8 to 6, in both halves."""
    for e in range(8):
        for b, home in enumerate((6, 7, 8, 15)):
            turned = (PLACES[4 * e + b] + TURNS[e // 2][b]) % 32
            assert turned == home + 16 * (e % 2)


def test_spans_and_rows_are_encoded_by_themselves():
    codes = codes_of(1, 5, 192)
    alone = torch.stack([torch.cat([encode(s) for s in row.split(64)]) for row in codes])
    assert torch.equal(encode(codes), alone)


# ---- tiles


@pytest.mark.parametrize(("N", "L", "width"), [(64, 128, 128), (256, 512, 128), (192, 24, 4)])
def test_tiles_lie_where_the_kernel_looks_for_them_and_return(N: int, L: int, width: int):
    pytest.importorskip("triton")
    from fast.kernels.mxfp4 import place as kernels_place

    place = kernels_place.fn
    matrix = codes_of(6, N, L)
    tiled = tiles(matrix, width)
    assert tiled.shape == matrix.shape and tiled.is_contiguous()
    n, j = torch.arange(N)[:, None], torch.arange(L)[None, :]
    assert torch.equal(tiled.flatten()[place(n, j, L, width, TILE_N)], matrix)
    assert torch.equal(matrix.flatten()[place(n, j, L, width, 1)], matrix)
    assert torch.equal(rows(tiled, width), matrix)


# ---- bad input


@pytest.mark.parametrize("function", [tiles, rows])
@pytest.mark.parametrize(("N", "L"), [(96, 128), (64, 64)])
def test_a_matrix_that_tiles_do_not_divide_is_refused(function, N: int, L: int):
    with pytest.raises(InputError, match=re.escape(f"a matrix [{N}, {L}] in tiles of 64 x 128")):
        function(torch.zeros(N, L), 128)


@pytest.mark.parametrize("function", [encode, decode])
@pytest.mark.parametrize(
    ("codes", "what"),
    [
        (torch.zeros(3, 65, dtype=torch.uint8), "[3, 65] and torch.uint8"),
        (torch.zeros(3, 32, dtype=torch.uint8), "[3, 32] and torch.uint8"),
        (torch.zeros(3, 64, dtype=torch.int8), "[3, 64] and torch.int8"),
        (torch.zeros(3, 64), "[3, 64] and torch.float32"),
    ],
)
def test_codes_that_are_no_spans_of_bytes_are_refused(function, codes: Tensor, what: str):
    with pytest.raises(InputError) as caught:
        function(codes)
    assert str(caught.value) == (
        f"MXFP4 codes of shape {what}; expected [..., K/2] torch.uint8 with K a multiple of 128"
    )
