"""MXFP4 codes in an order that Hopper decodes with few instructions, and the way back, bit for bit.

Hopper's matrix unit wants bf16 pairs: element 2p in the low half of a register, 2p + 1 in the high half.
A code's bits, sign s and magnitude e1 e0 m, belong at bits 15 and 8, 7, 6 of its half: there they are the
number times 2^-126. A 32-bit word has eight codes. Its pair 0 lies there already; the others are rotated
there:

    pair 0    in place
    pair 1    by 6 to the left
    pair 2    by 10 to the left, around the end
    pair 3    by 12 to the left; e1 alone by 4

The four pairs cannot all be one rotation away: sixteen bits have no tiling by the shape {15, 8, 7, 6}.

In a span of 128 elements, word 4c + 2t + u (c = 0 to 3, t and u = 0 or 1) holds the four elements from
64t + 16c + 4u on and the four that are 8 further. So words 2t + u of all c, which `ldmatrix` deals to one
thread, meet two scales only, and the activations beside two neighbouring words are 16 bytes.

For gate-up, whose rows are long, `tiles` puts together what a program reads in one step: 8 KB from one
place instead of 128 bytes from each of 64.
"""

import torch
from einops import rearrange
from torch import Tensor

from qwen35.errors import InputError

SPAN = 128  # elements along K that are permuted among themselves
TILE_N, TILE_K = 64, 256  # rows and elements of `tiles`: what a program reads at once
TURNS = ((0, 0, 0, 0), (6, 6, 6, 6), (10, 10, 10, 10), (12, 12, 4, 12))  # of pair p: m, e0, e1, s
HOMES = (6, 7, 8, 15)  # where m, e0, e1, s belong in a half

# Where bit 4e + b of a word goes: element e, b = 0 to 3 for its m, e0, e1, s.
PLACES = tuple(
    (HOMES[b] + 16 * (e % 2) - TURNS[e // 2][b]) % 32 for e in range(8) for b in range(4)
)


def encode(codes: Tensor) -> Tensor:
    """codes [..., K/2] uint8, two a byte as in a checkpoint -> the same shape and dtype in this order.

    A copy, on the same device. InputError for another dtype, or when 128 does not divide K.
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
    """x [N, L] -> the same shape and dtype, with 64 rows by `width` columns side by side in memory.

    Tile after tile along L; inside a tile, row after row. InputError when 64 does not divide N, or the
    width L.
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
    """The codes as int16 [..., spans, 32], four in each number."""
    *rows, half = codes.shape
    if codes.dtype != torch.uint8 or half * 2 % SPAN:
        raise InputError(
            f"MXFP4 codes of shape {list(codes.shape)} and {codes.dtype}; "
            f"expected [..., K/2] torch.uint8 with K a multiple of {SPAN}"
        )
    return codes.contiguous().view(torch.int16).view(*rows, half * 2 // SPAN, SPAN // 4)


def _moved(data: Tensor, moves: list[tuple[int, int]]) -> Tensor:
    """Move each bit of every 32-bit word from its first place to its second; returns uint8. Bits that are
    rotated by the same number move together."""
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
