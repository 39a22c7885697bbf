"""`weights/words.py`: the order that Hopper decodes, there and back, and decoded as its kernel does."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from qwen35.errors import InputError
from weights import mxfp4
from weights.words import PLACES, SPAN, TILE_N, TURNS, decode, encode, rows, tiles

KERNEL = Path(__file__).parents[2] / "fast/kernels/mxfp4.py"


def codes_of(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).byte()


# ---- the kernel's arithmetic, in numpy


def instructions() -> list[list[str]]:
    """The lines of the kernel's inline assembly, as words without commas."""
    block = re.search(r'_DECODE = """\n(.*?)"""', KERNEL.read_text(), re.DOTALL)
    assert block, "the kernel has no inline assembly"
    lines = [line.strip().rstrip(";") for line in block[1].strip().splitlines()]
    return [line.replace(",", "").split() for line in lines]


def product(pair: NDArray[np.uint32], multiplier: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """mul.rn.bf16x2: two bf16 times two bf16. The products must be exact, so no rounding is modelled."""
    halves = []
    for shift in (0, 16):
        a, b = ((x >> shift & 0xFFFF) << 16 for x in (pair, multiplier))
        with np.errstate(invalid="ignore"):
            exact = a.view(np.float32).astype(np.float64) * b.view(np.float32).astype(np.float64)
        bits = torch.from_numpy(exact).bfloat16()
        np.testing.assert_array_equal(bits.double().numpy(), exact, "a product is not a bf16")
        halves.append(bits.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << shift)
    return halves[0] | halves[1]


def executed(words: NDArray[np.uint32], multiplier: NDArray[np.uint32]) -> list[NDArray[np.uint32]]:
    """The four results of the inline assembly, {1} to {4}, for words {0} and multipliers {5}."""
    registers = {"{0}": words, "{5}": multiplier}
    for name, target, *sources in instructions():
        a, *more = (registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources)
        match name, more:
            case "and.b32", [b]:
                result = a & b
            case "shl.b32", [by]:
                result = a << by
            case "shf.l.wrap.b32", [high, by]:
                result = high << by | a >> np.uint32(32 - by)
            case "lop3.b32", [b, c, table]:
                assert table == 0xEA, "expected (a & b) | c"
                result = a & b | c
            case "mul.rn.bf16x2", [b]:
                result = product(a, b)
            case _:
                raise AssertionError(f"{name} is not modelled")
        registers[target] = result
    return [registers[f"{{{i}}}"] for i in range(1, 5)]


def as_kernel(encoded: Tensor, scale: Tensor) -> Tensor:
    """One span: encoded [N, 64], scale [N, 4] uint8 -> [N, 128] bf16, as `dot` takes elements to be.

    A word's bytes number the four elements of its first result, at k, and of its second, at k + 8.
    """
    N = len(encoded)
    words = encoded.numpy().view(np.uint32)  # [N, 16]
    word = np.arange(16)
    group = word // 2 % 2 * 2 + word // 4 // 2  # of words 4c + 2t + u: scale 2t + c / 2
    multiplier = (scale.numpy().astype(np.uint32) + 126) * 0x00800080
    results = executed(words, multiplier[:, group])
    byte = np.arange(64)
    k = byte // 64 * SPAN + byte // 8 % 2 * 64 + byte // 16 % 4 * 16 + byte % 8
    values = np.zeros((N, SPAN), np.uint16)
    for first, second, add in ((0, 1, 0), (2, 3, 8)):
        # Of a word elements 0 to 3 are the first two results, and 4 to 7 the others; low halves first.
        pairs = np.stack([results[first], results[second]], -1)  # [N, 16, 2]
        values[:, k + add] = np.ascontiguousarray(pairs).view(np.uint16).reshape(N, 64)
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)


def as_left_matrix(encoded: Tensor, scale: Tensor, groups: list[int]) -> Tensor:
    """As `as_kernel`, but in the order of the places of `product_of_tiles`: word 4 q + 2 b + j gives its
    pairs to the tensors 4 j to 4 j + 3, at their columns 8 b + 2 q and one further. groups: the scale of
    each word."""
    N = len(encoded)
    words = encoded.numpy().view(np.uint32)  # [N, 16]
    q, b, j = (np.arange(16) // d % n for d, n in ((4, 4), (2, 2), (1, 2)))
    multiplier = (scale.numpy().astype(np.uint32) + 126) * 0x00800080
    values = np.zeros((N, 8, 16), np.uint16)
    for r, pairs in enumerate(executed(words, multiplier[:, groups])):
        for half in range(2):
            values[:, 4 * j + r, 8 * b + 2 * q + half] = pairs >> 16 * half & 0xFFFF
    return torch.from_numpy(values.reshape(N, SPAN).view(np.int16)).view(torch.bfloat16)


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


# ---- decoded as the kernel does it


def test_the_kernels_arithmetic_decodes_every_code_at_every_place_and_scale_exactly():
    """Equal to `mxfp4.dequantize`, signs of zeros and subnormal results included."""
    codes = (torch.arange(256)[:, None] + 5 * torch.arange(64)).byte()  # each byte in each column
    for step in range(0, 129, 3):  # 0 to 128, another in each group of a row
        scale = ((torch.arange(256)[:, None] * 7 + 31 * torch.arange(4) + step) % 129).byte()
        got = as_kernel(encode(codes), scale)
        expected = mxfp4.dequantize(codes, scale)
        assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def test_every_scale_from_0_to_128_is_exact_with_every_code():
    codes = torch.arange(256).byte().view(4, 64).repeat(129, 1)
    scale = torch.arange(129).byte().repeat_interleave(4)[:, None].expand(-1, 4).contiguous()
    got = as_kernel(encode(codes), scale)
    expected = mxfp4.dequantize(codes, scale)
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def test_a_scale_of_129_is_beyond_what_the_kernel_decodes():
    """Its bf16 2^128 is an infinity, which is why packing for sm_90 refuses it."""
    codes, scale = codes_of(2, 1, 64), torch.full((1, 4), 129, dtype=torch.uint8)
    assert not as_kernel(encode(codes), scale).isfinite().all()


def test_a_byte_beside_its_activations_gives_the_product_that_the_codes_stand_for():
    """The order of k in `dot`: sums of decoded words times x at k and k + 8 are the row's product."""
    codes, scale = codes_of(3, 16, 64), (codes_of(4, 16, 4) % 20 + 110).byte()
    x = torch.randn(SPAN, generator=torch.Generator().manual_seed(5)).double()
    weight = mxfp4.dequantize(codes, scale, torch.float64)
    got = as_kernel(encode(codes), scale).double()
    assert torch.equal((got * x).sum(-1), (weight * x).sum(-1))


def test_the_kernel_computes_k_as_this_file_does():
    source = KERNEL.read_text()
    assert (
        "return byte // 64 * SPAN + byte // 8 % 2 * 64 + byte // 16 % 4 * 16 + byte % 8" in source
    )
    assert "twice = (scale.to(tl.int32) + 126) * 0x00800080" in source


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


def test_the_left_matrix_of_a_prompts_product_has_each_element_where_its_activation_is_put():
    pytest.importorskip("triton")
    from triton.language import constexpr

    from fast.kernels.mxfp4 import arranged, scale_shift

    codes, scale = codes_of(6, 16, 64), (codes_of(7, 16, 4) % 19 + 110).byte()
    places = [arranged.fn(constexpr(k)).value for k in range(2 * SPAN)]  # pyright: ignore
    assert sorted(places) == list(range(2 * SPAN)) and max(places[:SPAN]) == SPAN - 1
    groups = [scale_shift.fn(constexpr(word)).value // 8 for word in range(16)]  # pyright: ignore
    got = as_left_matrix(encode(codes), scale, groups)[:, places[:SPAN]]
    assert torch.equal(got, mxfp4.dequantize(codes, scale))
