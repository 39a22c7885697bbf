"""Gated attention of a few rows over a long cache: what each piece of the context gives, then their sum.

The context is cut into pieces at absolute positions, short ones first and long ones behind, so that the
order of summation depends on a row's position alone: not on the capacity, nor on the rows beside it.
"""

import triton
import triton.language as tl

from fast.kernels.common import stored

SHORT = tl.constexpr(128)  # pieces of NEAR positions each, before those of FAR
FAR = tl.constexpr(1024)


@triton.jit
def _begin(piece, NEAR: tl.constexpr):
    """The first position of a piece."""
    return tl.minimum(piece, SHORT) * NEAR + tl.maximum(piece - SHORT, 0) * FAR


@triton.jit
def _pieces(length, NEAR: tl.constexpr):
    """The number of pieces that cover `length` positions."""
    near = (tl.minimum(length, SHORT * NEAR) + NEAR - 1) // NEAR
    return near + (tl.maximum(length - SHORT * NEAR, 0) + FAR - 1) // FAR


@triton.jit
def turned(
    source, gain, cosine, sine, position, valid, k, eps, K: tl.constexpr, ROTARY: tl.constexpr
):
    """Normalised and rotated heads [n, K] fp32, of raw ones that `source` [n, 1] points to.

    RoPE turns the first ROTARY channels; channel j pairs with j + ROTARY / 2. cosine, sine [P, ROTARY/2].
    """
    HALF: tl.constexpr = ROTARY // 2
    partner = tl.where(k < HALF, k + HALF, tl.where(k < ROTARY, k - HALF, k))  # [1, K]
    raw = tl.load(source + k, mask=valid, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=valid, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(raw * raw, 1) / K + eps)[:, None]
    normed = raw * scale * (1 + tl.load(gain + k).to(tl.float32))
    crossed = other * scale * (1 + tl.load(gain + partner).to(tl.float32))
    turns = valid & (k < ROTARY)
    angle = position * HALF + k % HALF
    cos = tl.load(cosine + angle, mask=turns, other=1.0)
    sin = tl.load(sine + angle, mask=turns, other=0.0)
    return normed * cos + tl.where(k < HALF, -crossed, crossed) * sin


@triton.jit
def _power_of_two(exponent):
    """2^(exponent - 127) in fp32."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _keep(x, numbers, scales, place, k, K: tl.constexpr, FP8: tl.constexpr):
    """Write one position's x [1, K] bf16 to the cache, as `qwen35.cache.to_e4m3` rounds it."""
    if FP8:
        wide = x.to(tl.float32)
        bits = tl.max(tl.abs(wide), 1)[:, None].to(tl.int32, bitcast=True)
        # It belongs to the smallest power of two by which no quotient exceeds e4m3's 448 = 1.75 * 2^8.
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        small = wide * _power_of_two(254 - exponent)
        # The conversion would turn infinity into a number.
        small = tl.where(tl.abs(small) == float("inf"), float("nan"), small)
        tl.store(numbers + place * K + k, small.to(tl.float8e4nv))
        tl.store(scales + place + tl.zeros_like(exponent), exponent.to(tl.uint8))
    else:
        tl.store(numbers + place * K + k, x)


@triton.jit(do_not_specialize=["rows"])
def attend(
    projected, q_gain, k_gain, cosine, sine, keys, values, key_scales, value_scales, partial, peaks,
    totals, start, rows, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROTARY: tl.constexpr, CAPACITY: tl.constexpr,
    NEAR: tl.constexpr, GROUP: tl.constexpr, FP8: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend from GROUP rows of one key head's queries to one piece of the context: a softmax without its
    denominator.

    projected [rows, 2 H K + 2 G K] bf16: each head's query and its gate, then the keys, then the values.
    q_gain, k_gain [K] bf16. keys, values: the cache, [G, CAPACITY, K] bf16, or with FP8 e4m3 and
    exponents key_scales, value_scales [G, CAPACITY] uint8. The programs in whose piece a row of this pass
    lies write its key and value there.
    Written: partial [pieces, rows, H, K], peaks and totals [pieces, rows, H] fp32: sum of
    exp(score - peak) * value, the largest score, sum of exp(score - peak).
    Grid (pieces of CAPACITY, G, rows / GROUP rounded up). BLOCK: at least GROUP * H / G.
    """
    piece, head = tl.program_id(0), tl.program_id(1)
    SHARED: tl.constexpr = H // G
    M: tl.constexpr = 2 * H * K + 2 * G * K
    first = tl.load(start)
    begin = _begin(piece, NEAR)
    end = tl.minimum(_begin(piece + 1, NEAR), first + rows)
    if begin < end:
        k = tl.arange(0, K)[None, :]
        one = tl.arange(0, 1)[:, None]
        for new in tl.range(tl.maximum(first, begin), end):
            # Every block of rows writes the same numbers to the same place.
            source = projected + (new - first) * M + 2 * H * K + head * K + one
            key = turned(source, k_gain, cosine, sine, new, one == 0, k, eps, K, ROTARY)
            place = head * CAPACITY + new
            _keep(key.to(tl.bfloat16), keys, key_scales, place, k, K, FP8)
            _keep(tl.load(source + G * K + k), values, value_scales, place, k, K, FP8)
        stored()
        m = tl.arange(0, BLOCK)[:, None]
        row = tl.program_id(2) * GROUP + m // SHARED  # [BLOCK, 1]
        query_head = head * SHARED + m % SHARED
        valid = (m < GROUP * SHARED) & (row < rows)
        source = projected + row * M + query_head * 2 * K
        position = first + row
        query = turned(source, q_gain, cosine, sine, position, valid, k, eps, K, ROTARY)
        query = query.to(tl.bfloat16)
        peak = tl.full((BLOCK, 1), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK, 1), tl.float32)
        acc = tl.zeros((BLOCK, K), tl.float32)
        for at in tl.range(begin, end, TILE):
            p = at + tl.arange(0, TILE)
            held = head * CAPACITY + p
            key = tl.load(
                keys + held[:, None] * K + k, mask=p[:, None] < end, other=0.0
            )  # [TILE, K]
            value = tl.load(values + held[:, None] * K + k, mask=p[:, None] < end, other=0.0)
            score = tl.dot(query, tl.trans(key.to(tl.bfloat16))) * (K**-0.5)  # [BLOCK, TILE]
            if FP8:  # a power of two may be multiplied before or after a sum: the same bits
                scale = tl.load(key_scales + held, mask=p < end, other=127).to(tl.int32)
                score *= _power_of_two(scale)[None, :]
            score = tl.where((p[None, :] <= position) & (p[None, :] < end), score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1)[:, None])
            # A row that has seen nothing yet has no peak: exp(-inf - -inf) would be NaN.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            share = tl.exp(score - level)
            fade = tl.exp(peak - level)
            total = total * fade + tl.sum(share, 1)[:, None]
            if FP8:
                scale = tl.load(value_scales + held, mask=p < end, other=127).to(tl.int32)
                share *= _power_of_two(scale)[None, :]
            acc = tl.dot(share.to(tl.bfloat16), value.to(tl.bfloat16), acc * fade)
            peak = higher
        place = (piece * rows + row) * H + query_head
        tl.store(partial + place * K + k, acc, mask=valid)
        tl.store(peaks + place, peak, mask=valid)
        tl.store(totals + place, total, mask=valid)


@triton.jit(do_not_specialize=["rows"])
def combine(
    projected, partial, peaks, totals, out, start, rows,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, NEAR: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """out[row, head] = sigmoid(gate) * attention, from what `attend` has written for each piece.

    Written: out [rows, H * K] bf16. Grid (rows, H). Pieces are added in order, MANY at a time.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, K)[None, :]
    some = tl.arange(0, MANY)[:, None]
    count = _pieces(tl.load(start) + row + 1, NEAR)
    highest = tl.full((MANY, 1), float("-inf"), tl.float32)
    for piece in tl.range(0, count, MANY):
        place = ((piece + some) * rows + row) * H + head
        held = tl.load(peaks + place, mask=piece + some < count, other=float("-inf"))
        highest = tl.maximum(highest, held)
    level = tl.max(highest, 0)[None, :]  # [1, 1]; position 0 is seen, so it is a number
    total = tl.zeros((1, 1), tl.float32)
    acc = tl.zeros((1, K), tl.float32)
    for piece in tl.range(0, count, MANY):
        place = ((piece + some) * rows + row) * H + head
        there = piece + some < count
        share = tl.exp(tl.load(peaks + place, mask=there, other=float("-inf")) - level)  # [MANY, 1]
        total += tl.sum(share * tl.load(totals + place, mask=there, other=0.0), 0)[None, :]
        acc += tl.sum(share * tl.load(partial + place * K + k, mask=there, other=0.0), 0)[None, :]
    gate = tl.load(projected + row * (2 * H * K + 2 * G * K) + head * 2 * K + K + k).to(tl.float32)
    read = acc / total / (1 + tl.exp(-gate))
    tl.store(out + (row * H + head) * K + k, read.to(tl.bfloat16))
