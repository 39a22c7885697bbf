"""MXFP4 codes in an order that Hopper decodes with few instructions, with lossless conversion back.

Hopper's tensor cores take bf16 pairs: element 2p in the low half of a register, 2p + 1 in the high
half. The bits of a code, sign s and magnitude e1 e0 m, belong at bits 15 and 8, 7, 6 of its half.
As a bf16 number they are then the value times 2^-126. A 32-bit word has eight codes, which are four
pairs. The bits of pair 0 are where they belong; those of the other pairs have to be rotated:

    pair 0    not rotated
    pair 1    by 6 to the left
    pair 2    by 10 to the left, where some bits wrap around
    pair 3    by 12 to the left, except e1, which is rotated by 4

A single rotation per pair is impossible, because four shapes {15, 8, 7, 6} cannot tile sixteen
bits.

In a span of 128 elements, word 4c + 2t + u (c = 0 to 3, t and u = 0 or 1) holds the four elements
from 64t + 16c + 4u on, and the four that are 8 further. Then the words 2t + u of all c, which
`ldmatrix` gives to one thread, need only two scales, and the activations for two neighbouring words
are 16 contiguous bytes.

For gate-up, whose rows are long, `tiles` makes the bytes that a program reads in one step
contiguous: 8 KB from one place instead of 128 bytes from each of 64.
"""

import torch
from einops import rearrange
from torch import Tensor

from qwen35.errors import InputError

SPAN = 128  # elements along K within which codes are permuted
TILE_N, TILE_K = 64, 256  # rows and elements that a program reads at once
# For each pair, by how many bits m, e0, e1 and s are rotated.
TURNS = ((0, 0, 0, 0), (6, 6, 6, 6), (10, 10, 10, 10), (12, 12, 4, 12))
PLACES_IN_HALF = (6, 7, 8, 15)  # where m, e0, e1, s belong in a half

# The place of bit 4e + b of a word: element e, and b = 0 to 3 for its m, e0, e1, s.
PLACES = tuple(
    (PLACES_IN_HALF[b] + 16 * (e % 2) - TURNS[e // 2][b]) % 32 for e in range(8) for b in range(4)
)


def encode(codes: Tensor) -> Tensor:
    """Reorder codes [..., K/2] uint8, two per byte as in a checkpoint. Returns a copy of the same
    shape.

    InputError for another dtype, or if 128 does not divide K.
    """
    order = "... (t c half u) -> ... (c t u half)"
    words = rearrange(_fours(codes), order, t=2, c=4, half=2, u=2).contiguous()
    return _moved(words, list(enumerate(PLACES))).view(codes.shape)


def decode(encoded: Tensor) -> Tensor:
    """Undo `encode`."""
    _fours(encoded)
    words = _moved(encoded.contiguous(), [(place, bit) for bit, place in enumerate(PLACES)])
    order = "... (c t u half) -> ... (t c half u)"
    ordered = rearrange(_fours(words), order, t=2, c=4, half=2, u=2).contiguous()
    return ordered.view(torch.uint8).view(encoded.shape)


def tiles(x: Tensor, width: int) -> Tensor:
    """Reorder x [N, L] into tiles of 64 rows by `width` columns. Returns the same shape and dtype.

    Tiles follow one another along L. A tile is row-major. InputError if 64 does not divide N, or if
    `width` does not divide L.
    """
    N, L = _tiled(x, width)
    tiled = rearrange(x, "(n row) (l column) -> n l row column", row=TILE_N, column=width)
    return tiled.reshape(N, L)


def rows(tiled: Tensor, width: int) -> Tensor:
    """Undo `tiles`."""
    N, L = _tiled(tiled, width)
    whole = tiled.reshape(N // TILE_N, L // width, TILE_N, width)
    return rearrange(whole, "n l row column -> (n row) (l column)")


def _tiled(x: Tensor, width: int) -> tuple[int, int]:
    N, L = x.shape
    if N % TILE_N or L % width:
        raise InputError(
            f"a matrix {[N, L]} in tiles of {TILE_N} x {width}, which do not divide it"
        )
    return N, L


def _fours(codes: Tensor) -> Tensor:
    """The codes as int16 [..., spans, 32], with four codes per number."""
    *rows, half = codes.shape
    if codes.dtype != torch.uint8 or half * 2 % SPAN:
        raise InputError(
            f"MXFP4 codes of shape {list(codes.shape)} and {codes.dtype}; "
            f"expected [..., K/2] torch.uint8 with K a multiple of {SPAN}"
        )
    return codes.contiguous().view(torch.int16).view(*rows, half * 2 // SPAN, SPAN // 4)


def _moved(data: Tensor, moves: list[tuple[int, int]]) -> Tensor:
    """Move each bit of every 32-bit word from the first place of a pair to the second. Returns uint8.
    Bits that are rotated by the same number move together."""
    words = data.view(torch.uint8).flatten().view(torch.int32).long() & 0xFFFFFFFF
    masks: dict[int, int] = {}
    for source, target in moves:
        turn = (target - source) % 32
        masks[turn] = masks.get(turn, 0) | 1 << source
    moved = torch.zeros_like(words)
    for turn, mask in masks.items():
        part = words & mask
        moved |= (part << turn | part >> 32 - turn) & 0xFFFFFFFF
    signed = torch.where(moved < 1 << 31, moved, moved - (1 << 32)).to(torch.int32)
    return signed.view(torch.uint8).view(data.shape if data.dtype == torch.uint8 else (-1,))
