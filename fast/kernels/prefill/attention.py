"""Causal attention for the rows of a prompt: RoPE (`turn`), then one pass over the keys (`attend`). A
cache in e4m3 is decoded before (`decode`).

Each program of `attend` reads the keys from position 0 on, in tiles of a fixed size. A tile that is
fully masked for a row changes no bit of its result. Therefore the bits of a row depend neither on
the other rows nor on how the prompt is cut into passes.
"""

import triton
import triton.language as tl

from fast.kernels.attention import turned
from fast.kernels.common import from_e8m0


@triton.jit(do_not_specialize=["rows"])
def turn(
    projected, q_gain, k_gain, cosine, sine, q, k, rows, eps, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, ROTARY: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Apply norm and RoPE to queries and keys. Writes q [rows, H, K] and k [rows, G, K] in bf16.

    projected [rows, 2 H K + 2 G K] bf16: for each query head its query and its gate, then all keys,
    then all values. q_gain, k_gain [K] bf16. cosine, sine [rows, ROTARY / 2] fp32, for the rows'
    positions. Grid (rows / TOKENS rounded up, H + G).
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head = tl.program_id(1)
    valid = token < rows
    M: tl.constexpr = 2 * H * K + 2 * G * K
    channel = tl.arange(0, K)[None, :]
    line = token.to(tl.int64)
    if head < H:
        source = projected + line * M + head * 2 * K
        new = turned(source, q_gain, cosine, sine, token, valid, channel, eps, K, ROTARY)
        tl.store(q + (line * H + head) * K + channel, new.to(tl.bfloat16), mask=valid)
    else:
        source = projected + line * M + H * K + head * K
        new = turned(source, k_gain, cosine, sine, token, valid, channel, eps, K, ROTARY)
        tl.store(k + (line * G + head - H) * K + channel, new.to(tl.bfloat16), mask=valid)


@triton.jit(do_not_specialize=["tokens"])
def decode(
    k, v, k_scale, v_scale, keys, values, tokens, capacity, K: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Decode k, v [G, capacity, K] e4m3, with exponents k_scale, v_scale [G, capacity] uint8, as
    `from_e4m3` of qwen35/cache.py does. Writes keys, values [G, tokens, K] bf16. Grid (tokens / TOKENS
    rounded up, G).
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head, channel, there = tl.program_id(1).to(tl.int64), tl.arange(0, K)[None, :], token < tokens
    line, place = head * capacity + token, (head * tokens + token) * K + channel
    key = tl.load(k + line * K + channel, mask=there).to(tl.float32)
    value = tl.load(v + line * K + channel, mask=there).to(tl.float32)
    key *= from_e8m0(tl.load(k_scale + line, mask=there))
    value *= from_e8m0(tl.load(v_scale + line, mask=there))
    tl.store(keys + place, key.to(tl.bfloat16), mask=there)
    tl.store(values + place, value.to(tl.bfloat16), mask=there)


@triton.jit(do_not_specialize=["start", "rows"])
def attend(
    projected, q, keys, values, out, start, rows, capacity, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out[row, head] = sigmoid(gate) * attention of the query at position start + row, bf16.

    projected is that of `turn`; only its gates are read. q [rows, H, K]; keys, values [G, capacity,
    K] bf16, which hold the positions below start + rows. Writes out [rows, H * K]. Grid (H, rows /
    BLOCK_M rounded up).
    """
    head = tl.program_id(0)
    # The last rows see the most keys, so their programs start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    m = tl.arange(0, BLOCK_M)[:, None]
    row = block * BLOCK_M + m
    channel = tl.arange(0, K)[None, :]
    # Scalar offsets are int64 and blocks of offsets int32, because int64 blocks need too many
    # registers.
    first = (block * BLOCK_M).to(tl.int64)
    own = (first * H + head) * K
    query = tl.load(q + own + (m * (H * K) + channel), mask=row < rows, other=0.0)
    position = start + row  # [BLOCK_M, 1]
    held = (head // (H // G)).to(tl.int64) * capacity * K
    tile = tl.arange(0, TILE)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, K), tl.float32)
    end = tl.minimum(start + (block + 1) * BLOCK_M, start + rows)
    for at in tl.range(0, end, TILE):
        p = at + tile
        lines = tl.minimum(p, end - 1) * K  # positions from `end` on are masked below
        key = tl.load(keys + held + (lines[:, None] + channel))  # [TILE, K]
        value = tl.load(values + held + (lines[:, None] + channel))
        # exp2 is used instead of exp: exp(x) = 2^(x log2 e).
        score = tl.dot(query, tl.trans(key)) * (K**-0.5 * 1.4426950408889634)  # [BLOCK_M, TILE]
        score = tl.where(p[None, :] <= position, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])  # finite, as all rows see position 0
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(share, 1)
        acc = tl.dot(share.to(tl.bfloat16), value, acc * fade[:, None])
        peak = higher
    M: tl.constexpr = 2 * H * K + 2 * G * K
    gates = projected + first * M + head * 2 * K + K + m * M
    read = (acc / total[:, None]).to(tl.bfloat16).reshape(BLOCK_M, 2, K // 2).permute(0, 2, 1)
    low, high = read.split()  # halves, so that gates and rows fit into registers
    column = tl.arange(0, K // 2)[None, :]
    lines = out + own + m * (H * K)
    gate = tl.load(gates + column, mask=row < rows, other=0.0).to(tl.float32)
    low = low.to(tl.float32) / (1 + tl.exp(-gate))
    tl.store(lines + column, low.to(tl.bfloat16), mask=row < rows)
    gate = tl.load(gates + K // 2 + column, mask=row < rows, other=0.0).to(tl.float32)
    high = high.to(tl.float32) / (1 + tl.exp(-gate))
    tl.store(lines + K // 2 + column, high.to(tl.bfloat16), mask=row < rows)
