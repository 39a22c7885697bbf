"""Causal attention for the rows of a prompt: RoPE (`turn`), then one pass over the keys (`attend`). A
cache in e4m3 is decoded before (`decode`).

`attend` reads the keys from position 0 on, in tiles of a fixed size. A tile that is fully masked for a
row changes no bit of its result. If there are many keys, they are read in pieces of a fixed size, many of
them at the same time, and `join` joins the results in order. Therefore the bits of a row depend neither
on the other rows nor on how the prompt is cut into passes.
"""

import triton
import triton.language as tl

from fast.kernels.attention import keep, turned
from fast.kernels.common import from_e8m0


@triton.jit
def turn(
    projected, q_gain, k_gain, cosine, sine, q, keys, values, key_scales, value_scales, start, filled,
    eps, capacity, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROTARY: tl.constexpr,
    FP8: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Apply norm and RoPE to queries and keys. Writes q [rows, H, K] bf16, and the rows' keys and values
    to the cache.

    projected [rows, 2 H K + 2 G K] bf16: for each query head its query and its gate, then all keys,
    then all values. q_gain, k_gain [K] bf16. cosine, sine [capacity, ROTARY / 2] fp32, by position. keys,
    values: the cache, [G, capacity, K] bf16, or with FP8 e4m3 and exponents key_scales, value_scales [G,
    capacity] uint8. start [1] int32: the first row's position. filled [1] int32: the number of rows; the
    arrays may have room for more. Grid (rows / TOKENS rounded up, H + 2 G).
    """
    rows, first = tl.load(filled), tl.load(start)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head = tl.program_id(1)
    valid = token < rows
    M: tl.constexpr = 2 * H * K + 2 * G * K
    channel = tl.arange(0, K)[None, :]
    line = token.to(tl.int64)
    if head < H:
        source = projected + line * M + head * 2 * K
        new = turned(source, q_gain, cosine, sine, first + token, valid, channel, eps, K, ROTARY)
        tl.store(q + (line * H + head) * K + channel, new.to(tl.bfloat16), mask=valid)
    else:
        source = projected + line * M + H * K + head * K
        if head < H + G:
            place = (head - H).to(tl.int64) * capacity + first + token
            new = turned(
                source, k_gain, cosine, sine, first + token, valid, channel, eps, K, ROTARY
            )
            keep(new.to(tl.bfloat16), keys, key_scales, place, valid, channel, K, FP8)
        else:
            place = (head - H - G).to(tl.int64) * capacity + first + token
            value = tl.load(source + channel, mask=valid, other=0.0)
            keep(value, values, value_scales, place, valid, channel, K, FP8)


@triton.jit
def decode(
    k, v, k_scale, v_scale, keys, values, start, filled, capacity, room, K: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Decode k, v [G, capacity, K] e4m3, with exponents k_scale, v_scale [G, capacity] uint8, as
    `from_e4m3` of qwen35/cache.py does. Writes keys, values [G, room, K] bf16, the positions up to the
    last row's. start, filled: as in `turn`. Grid (room / TOKENS rounded up, G).
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    tokens = tl.minimum(tl.load(start) + tl.load(filled), room)
    head, channel, there = tl.program_id(1).to(tl.int64), tl.arange(0, K)[None, :], token < tokens
    line, place = head * capacity + token, (head * room + token) * K + channel
    key = tl.load(k + line * K + channel, mask=there).to(tl.float32)
    value = tl.load(v + line * K + channel, mask=there).to(tl.float32)
    key *= from_e8m0(tl.load(k_scale + line, mask=there))
    value *= from_e8m0(tl.load(v_scale + line, mask=there))
    tl.store(keys + place, key.to(tl.bfloat16), mask=there)
    tl.store(values + place, value.to(tl.bfloat16), mask=there)


LOWEST = tl.constexpr(-1e38)  # in the place of -inf, whose difference with itself is NaN


@triton.jit
def _joined(acc, peak, total, more, more_peak, more_total):
    """The results of two sets of keys as one result.

    acc [rows, K] fp32 is the sum of the values, each times 2^(its score - peak); peak [rows] is the
    highest score, and total [rows] the sum of the powers. A set without a visible
    key has 0, LOWEST and 0; joining it changes no bit of the other set's result.
    """
    higher = tl.maximum(peak, more_peak)
    fade, share = tl.exp2(peak - higher), tl.exp2(more_peak - higher)
    return acc * fade[:, None] + more * share[:, None], higher, total * fade + more_total * share


@triton.jit
def _opened(read, gate):
    """read times sigmoid(gate), both bf16, in fp32."""
    return read.to(tl.float32) / (1 + tl.exp(-gate.to(tl.float32)))


@triton.jit(do_not_specialize=["first"])
def attend(
    projected, q, keys, values, out, by_piece, peaks, totals, start, filled, first, capacity,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out[row, head] = sigmoid(gate) * attention of the query at position start + row, bf16.

    projected, start and filled are those of `turn`; only the gates are read. q [rows, H, K]; keys, values
    [G, capacity, K] bf16, which hold the positions below start + rows. Writes out [rows, H * K]. Grid (H,
    rows / BLOCK_M rounded up, 1).

    SPLIT: each program reads one piece of PIECE positions, from piece `first` on, and `join` computes
    out. The results go to by_piece [1 + pieces, rows, H, K], peaks and totals [1 + pieces, rows, H], all
    fp32, from index 1 on. Then the grid is (H, rows / BLOCK_M rounded up, pieces).
    """
    head = tl.program_id(0)
    # The last rows see the most keys, so their programs start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    rows, before = tl.load(filled), tl.load(start)
    if block * BLOCK_M >= rows:
        return
    end = before + tl.minimum((block + 1) * BLOCK_M, rows)
    begin, stop = 0, end
    if SPLIT:
        begin = (first + tl.program_id(2)) * PIECE
        stop = tl.minimum(begin + PIECE, end)
        if begin >= end:
            return
    m = tl.arange(0, BLOCK_M)[:, None]
    row = block * BLOCK_M + m
    channel = tl.arange(0, K)[None, :]
    # Scalar offsets are int64 and blocks of offsets int32, because int64 blocks need too many
    # registers.
    top = (block * BLOCK_M).to(tl.int64)
    own = (top * H + head) * K
    query = tl.load(q + own + (m * (H * K) + channel), mask=row < rows, other=0.0)
    position = before + row  # [BLOCK_M, 1]
    held = (head // (H // G)).to(tl.int64) * capacity * K
    tile = tl.arange(0, TILE)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, K), tl.float32)
    for at in tl.range(begin, stop, TILE):
        p = at + tile
        lines = tl.minimum(p, end - 1) * K  # positions from `end` on are masked below
        key = tl.load(keys + held + (lines[:, None] + channel))  # [TILE, K]
        value = tl.load(values + held + (lines[:, None] + channel))
        # exp2 is used instead of exp: exp(x) = 2^(x log2 e).
        score = tl.dot(query, tl.trans(key)) * (K**-0.5 * 1.4426950408889634)  # [BLOCK_M, TILE]
        score = tl.where(p[None, :] <= position, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(share, 1)
        acc = tl.dot(share.to(tl.bfloat16), value, acc * fade[:, None])
        peak = higher
    if SPLIT:
        place = (1 + tl.program_id(2)).to(tl.int64) * rows * H
        line = place + top * H + head + tl.arange(0, BLOCK_M) * H
        inside = block * BLOCK_M + tl.arange(0, BLOCK_M) < rows
        tl.store(by_piece + place * K + own + (m * (H * K) + channel), acc, mask=row < rows)
        tl.store(peaks + line, peak, mask=inside)
        tl.store(totals + line, total, mask=inside)
    else:
        M: tl.constexpr = 2 * H * K + 2 * G * K
        gates = projected + top * M + head * 2 * K + K + m * M
        read = (acc / total[:, None]).to(tl.bfloat16).reshape(BLOCK_M, 2, K // 2).permute(0, 2, 1)
        low, high = read.split()  # halves, so that gates and rows fit into registers
        column = tl.arange(0, K // 2)[None, :]
        lines = out + own + m * (H * K)
        gate = tl.load(gates + column, mask=row < rows, other=0.0)
        tl.store(lines + column, _opened(low, gate).to(tl.bfloat16), mask=row < rows)
        gate = tl.load(gates + K // 2 + column, mask=row < rows, other=0.0)
        tl.store(lines + K // 2 + column, _opened(high, gate).to(tl.bfloat16), mask=row < rows)


@triton.jit(do_not_specialize=["first", "pieces"])
def join(
    projected, out, by_piece, peaks, totals, start, filled, first, pieces,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the results of `pieces` pieces, from piece `first` on, with those of the pieces before.

    The arguments are those of a split `attend`. Index 0 of by_piece, peaks and totals is the result so
    far. LAST: there are no more pieces, so out [rows, H * K] is written. Grid (rows / BLOCK rounded up,
    H).
    """
    block, head = tl.program_id(0), tl.program_id(1)
    rows, before = tl.load(filled), tl.load(start)
    if block * BLOCK >= rows:
        return
    row, channel = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K)[None, :]
    inside = row < rows
    line = row.to(tl.int64) * H + head
    end = before + tl.minimum((block + 1) * BLOCK, rows)
    # The first piece is taken as it is.
    fresh = tl.where(first == 0, 1, 0)
    held = fresh.to(tl.int64) * rows * H + line
    acc = tl.load(by_piece + held[:, None] * K + channel, mask=inside[:, None], other=0.0)
    peak = tl.load(peaks + held, mask=inside, other=0.0)
    total = tl.load(totals + held, mask=inside, other=1.0)
    for piece in tl.range(fresh, tl.minimum(tl.cdiv(end, PIECE) - first, pieces)):  # pyright: ignore
        held = (1 + piece).to(tl.int64) * rows * H + line
        more = tl.load(by_piece + held[:, None] * K + channel, mask=inside[:, None], other=0.0)
        more_peak = tl.load(peaks + held, mask=inside, other=0.0)
        more_total = tl.load(totals + held, mask=inside, other=1.0)
        acc, peak, total = _joined(acc, peak, total, more, more_peak, more_total)
    if LAST:
        M: tl.constexpr = 2 * H * K + 2 * G * K
        gates = projected + row.to(tl.int64)[:, None] * M + head * 2 * K + K + channel
        gate = tl.load(gates, mask=inside[:, None], other=0.0)
        read = _opened((acc / total[:, None]).to(tl.bfloat16), gate)
        tl.store(out + line[:, None] * K + channel, read.to(tl.bfloat16), mask=inside[:, None])
    else:
        tl.store(by_piece + line[:, None] * K + channel, acc, mask=inside[:, None])
        tl.store(peaks + line, peak, mask=inside)
        tl.store(totals + line, total, mask=inside)
