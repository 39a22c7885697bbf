"""Hopper's decoding of MXFP4 words and its two products, from the kernels' own source: exact for every
code, place and scale, and with faults planted in each part."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.support.fast_faults import Fault, Faults
from tests.support.hopper_words import block, evaluated, pointer
from weights import mxfp4
from weights.words import SPAN, TILE_K, TILE_N, encode, tiles

FAULTS = Faults()
kernels = evaluated()  # a test may replace it


def codes_of(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).byte()


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """Spans of codes [N, K/2] in the checkpoint's order, with scales [N, K/32], as `dot` takes their
    elements to be: [N, K] bf16."""
    N, K = len(codes), 2 * codes.shape[1]
    pairs = kernels._decoded(block(encode(codes)), block(scale), N, K)
    k = np.asarray(kernels._element(block(torch.arange(K // 2))))
    values = np.full((N, K), np.nan, np.float32)
    for further, elements in zip((0, 8), pairs, strict=True):
        values[:, k + further] = elements
    return torch.from_numpy(values).bfloat16()


def test_every_code_at_every_place_and_scale_is_decoded_exactly():
    """Equal to `mxfp4.dequantize`, signs of zeros and subnormal results included."""
    codes = (torch.arange(256)[:, None] + 5 * torch.arange(64)).byte()  # each byte in each column
    for step in range(0, 129, 3):  # 0 to 128, another in each group of a row
        scale = ((torch.arange(256)[:, None] * 7 + 31 * torch.arange(4) + step) % 129).byte()
        expected = mxfp4.dequantize(codes, scale)
        assert torch.equal(decoded(codes, scale).view(torch.int16), expected.view(torch.int16))


def test_every_scale_from_0_to_128_is_exact_with_every_code():
    codes = torch.arange(256).byte().view(4, 64).repeat(129, 1)
    scale = torch.arange(129).byte().repeat_interleave(4)[:, None].expand(-1, 4).contiguous()
    expected = mxfp4.dequantize(codes, scale)
    assert torch.equal(decoded(codes, scale).view(torch.int16), expected.view(torch.int16))


def test_a_scale_of_129_is_beyond_what_the_kernel_decodes():
    """Its bf16 2^128 is an infinity, which is why packing for sm_90 refuses it."""
    codes, scale = codes_of(2, 1, 64), torch.full((1, 4), 129, dtype=torch.uint8)
    assert not decoded(codes, scale).isfinite().all()


# ---- products


def numbers(seed: int, *shape: int) -> Tensor:
    """Small integers in bf16, so that sums of products are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).bfloat16()


def judged(out: Any, codes: Tensor, scale: Tensor, x: Tensor) -> list[str]:
    """A finding if out [rows, N] is not x [rows, K] times the codes' numbers [N, K]."""
    exact = x.double() @ mxfp4.dequantize(codes, scale, torch.float64).T
    wrong = np.argwhere(~(np.asarray(out) == exact.numpy()))
    return [f"numbers: {len(wrong)}, the first at {wrong[0].tolist()}"] if len(wrong) else []


def few_rows() -> list[str]:
    """Findings on `dot`, of 5 rows in a product with room for 8, over two spans."""
    N, K, rows = 16, 2 * SPAN, 5
    codes, scale, x = (
        codes_of(1, N, K // 2),
        codes_of(2, N, K // 32) % 19 + 110,
        numbers(3, 8, K),
    )
    acc = kernels.dot(
        block(encode(codes)), block(scale), pointer(x), K, rows, block(torch.zeros(N, 8)), N, K, 8
    )
    found = judged(acc[:, :rows].T, codes, scale, x[:rows])
    return found + ["numbers: a row that is not there"] * bool(acc[:, rows:].any())


def many_rows(tiled: bool, N: int, K: int) -> list[str]:
    """Findings on `product_of_tiles`, of the second of two experts. Codes and scales are those that
    gate-up has, in tiles, or down, row by row."""
    codes, scale = codes_of(4, 2 * N, K // 2), codes_of(5, 2 * N, K // 32) % 19 + 110
    x = numbers(6, 16, K)
    words, scales = encode(codes), scale
    tile_n, tile_k = (TILE_N, min(TILE_K, K)) if tiled else (1, min(TILE_K, K))
    if tiled:
        words, scales = tiles(words, tile_k // 2), tiles(scales, tile_k // 32)
    places = np.asarray(kernels.arranged(block(torch.arange(K))))
    arranged = torch.empty_like(x)
    arranged[:, torch.from_numpy(places).long()] = x
    rows = pointer(arranged) + np.arange(16)[:, None] * K
    n = block(N + torch.arange(N)[:, None])
    out = kernels.product_of_tiles(
        rows, pointer(words), pointer(scales), n, K, tile_n, tile_k, 16, N, SPAN
    )
    return judged(out, codes[N:], scale[N:], x)


def in_tiles() -> list[str]:
    return many_rows(True, 64, 512)


def in_rows() -> list[str]:
    return many_rows(False, 32, 256)


@pytest.mark.parametrize("N", [16, 64, 128])
@pytest.mark.parametrize("K", [128, 256, 512])
@pytest.mark.parametrize("tiled", [True, False])
def test_many_rows(tiled: bool, K: int, N: int):
    if not tiled or N % TILE_N == 0:
        assert not many_rows(tiled, N, K)


def test_the_places_of_activations_are_those_of_a_span():
    places = np.asarray(kernels.arranged(block(torch.arange(2 * SPAN))))
    assert sorted(places) == list(range(2 * SPAN)) and max(places[:SPAN]) == SPAN - 1


# ---- faults


for name, check, edit in (
    (
        "signs of the first pair lost", few_rows,
        ("and.b32 pair, {0}, 0x81C081C0;", "and.b32 pair, {0}, 0x01C001C0;"),
    ),
    (
        "a rotation by one bit more", few_rows,
        ("shf.l.wrap.b32 turned, {0}, {0}, 10;", "shf.l.wrap.b32 turned, {0}, {0}, 11;"),
    ),
    (
        "the last pair without its lowest bit", few_rows,
        ("lop3.b32 pair, turned, 0x01000100, pair, 0xEA;", "lop3.b32 pair, turned, 0, pair, 0xEA;"),
    ),
    (
        "second elements four further than the first ones", few_rows,
        ("tl.load(pointers + 8,", "tl.load(pointers + 4,"),
    ),
    (
        "elements of a span in the order of a file", few_rows,
        (
            "byte // 64 * SPAN + byte // 8 % 2 * 64 + byte // 16 % 4 * 16 + byte % 8",
            "byte // 8 * 16 + byte % 8",
        ),
    ),
    (
        "first and second elements exchanged", few_rows,
        (
            "tl.dot(high, second, tl.dot(low, first, acc))",
            "tl.dot(low, second, tl.dot(high, first, acc))",
        ),
    ),
    (
        "scales of a span in the order of a file", few_rows,
        (
            "twice.reshape(BLOCK_N, SPANS, 2, 2).permute(0, 1, 3, 2)\n    by_word",
            "twice.reshape(BLOCK_N, SPANS, 2, 2)\n    by_word",
        ),
    ),
    (
        "rows of x that are not there in a product of words", few_rows,
        (
            "first = tl.load(pointers, mask=m < rows, other=0.0)",
            "first = tl.load(pointers, mask=m < ROWS, other=0.0)",
        ),
    ),
    (
        "words of the left matrix in another order", in_tiles,
        ("permute(1, 0, 2, 6, 7, 4, 3, 5)", "permute(1, 0, 2, 6, 7, 3, 4, 5)"),
    ),
    (
        "pairs of the left matrix in another order", in_tiles,
        ("permute(1, 0, 2, 6, 7, 4, 3, 5)", "permute(1, 0, 2, 7, 6, 4, 3, 5)"),
    ),
    (
        "rows of the left matrix in the order of the weights", in_tiles,
        ("permute(1, 0, 2, 6, 7, 4, 3, 5)", "permute(0, 1, 2, 6, 7, 4, 3, 5)"),
    ),
    (
        "the left matrix joined in the order of the tensors", in_rows,
        ("tl.join(tl.join(t0, t2), tl.join(t1, t3))", "tl.join(tl.join(t0, t1), tl.join(t2, t3))"),
    ),
    (
        "halves of the left matrix exchanged", in_rows,
        (
            "return _left_half(low, BLOCK_N), _left_half(high, BLOCK_N)",
            "return _left_half(high, BLOCK_N), _left_half(low, BLOCK_N)",
        ),
    ),
    (
        "the result's rows in the order of the product", in_tiles,
        ("reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(1, 0, 2, 3)", "reshape(BLOCK_N, BLOCK_M)"),
    ),
    (
        "activations of a prompt arranged in another order", in_rows,
        ("e // 4 % 2 * 4 + e // 8 % 2 * 2", "e // 4 % 2 * 2 + e // 8 % 2 * 4"),
    ),
    (
        "scales of a prompt's words in another order", in_rows,
        ("word // 2 % 2 * 16 + word // 8 * 8", "word // 2 % 2 * 8 + word // 8 * 16"),
    ),
    (
        "the scales of a prompt's first span alone", in_tiles,
        ("tl.load(scales + beyond // SPAN)", "tl.load(scales)"),
    ),
    (
        "spans of a tile in the order of a row", in_tiles,
        (
            "beyond = k // TILE_K * (TILE_N * TILE_K) + k % TILE_K\n            w =",
            "beyond = k\n            w =",
        ),
    ),
    (
        "the second half with the first half's activations", in_rows,
        ("tl.load(rows + k + SPAN // 2 + along)", "tl.load(rows + k + along)"),
    ),
):  # fmt: skip
    FAULTS.add(name, "mxfp4", check, "numbers", edit)


def plant(what: Fault, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "kernels", evaluated(*what.edits))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant(FAULTS[name], tmp_path, monkeypatch)
    assert FAULTS[name].check()


@pytest.mark.parametrize("check", FAULTS.checks)
def test_without_a_fault_nothing_is_found(check: Any):
    assert not check()
