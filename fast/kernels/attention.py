"""Gated attention of a few rows over a long cache: what each piece of the context gives, then their sum.

The context is cut into pieces at absolute positions, short ones first and long ones behind, so that the
order of summation depends on a row's position alone: not on the capacity, nor on the rows beside it.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from fast.kernels.common import from_e8m0, stored

SHORT = tl.constexpr(128)  # pieces of NEAR positions each, before those of FAR
ALL = tl.constexpr(512)  # pieces whose peaks `combine` compares at a time
NEW = tl.constexpr(4)  # rows that a program writes to the cache at a time
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _begin(piece, NEAR: tl.constexpr, FAR: tl.constexpr):
    """The first position of a piece."""
    return tl.minimum(piece, SHORT) * NEAR + tl.maximum(piece - SHORT, 0) * FAR


@triton.jit
def _pieces(length, NEAR: tl.constexpr, FAR: tl.constexpr):
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
def keep(x, numbers, scales, place, there, k, K: tl.constexpr, FP8: tl.constexpr):
    """Write positions x [n, K] bf16 to the cache, those that are `there`, as `qwen35.cache.to_e4m3`
    rounds them."""
    if FP8:
        wide = x.to(tl.float32)
        bits = tl.max(tl.abs(wide), 1)[:, None].to(tl.int32, bitcast=True)
        # It belongs to the smallest power of two by which no quotient exceeds e4m3's 448 = 1.75 * 2^8.
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        small = wide * from_e8m0(254 - exponent)
        # The conversion would turn infinity into a number.
        small = tl.where(tl.abs(small) == float("inf"), float("nan"), small)
        tl.store(numbers + place * K + k, small.to(tl.float8e4nv), mask=there)
        tl.store(scales + place, exponent.to(tl.uint8), mask=there)
    else:
        tl.store(numbers + place * K + k, x, mask=there)


@triton.jit
def _pairs(words):
    """Words of two e4m3 numbers, int16 -> the numbers in the low bytes and those in the high bytes, fp16.

    fp16 holds every e4m3 number. Hopper converts the two numbers of a word with one instruction.
    """
    if is_hip():
        low = words.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        high = (words >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        low, high = tl.inline_asm_elementwise(  # pyright: ignore
            """
            {
            .reg .b16 first, second;
            .reg .b32 one, other;
            mov.b32 {first, second}, $2;
            cvt.rn.f16x2.e4m3x2 one, first;
            cvt.rn.f16x2.e4m3x2 other, second;
            prmt.b32 $0, one, other, 0x5410;
            prmt.b32 $1, one, other, 0x7632;
            }
            """,
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return low, high


@triton.jit(do_not_specialize=["rows"])
def attend(
    projected, q_gain, k_gain, cosine, sine, keys, values, key_scales, value_scales, partial, peaks,
    totals, start, rows, eps,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, ROTARY: tl.constexpr, CAPACITY: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr, GROUP: tl.constexpr, FP8: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend from GROUP rows of one key head's queries to one piece of the context: a softmax without its
    denominator.

    projected [rows, 2 H K + 2 G K] bf16: each head's query and its gate, then the keys, then the values.
    q_gain, k_gain [K] bf16. keys, values: the cache, [G, CAPACITY, K] bf16, or with FP8 e4m3 and
    exponents key_scales, value_scales [G, CAPACITY] uint8. The programs in whose piece a row of this pass
    lies write its key and value there.
    Written: partial [pieces, rows, H, K], peaks and totals [pieces, rows, H] fp32: sum of
    2^(score - peak) * value, the largest score, sum of 2^(score - peak). Scores are in units of log 2.
    Grid (pieces of CAPACITY, G, rows / GROUP rounded up). BLOCK: at least GROUP * H / G. NEAR and FAR are
    multiples of TILE.
    """
    tl.static_assert(NEAR % TILE == 0 and FAR % TILE == 0)
    # The last pieces are the longest, so their programs start first.
    piece, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    SHARED: tl.constexpr = H // G
    M: tl.constexpr = 2 * H * K + 2 * G * K
    first = tl.load(start)
    begin = _begin(piece, NEAR, FAR)
    end = tl.minimum(_begin(piece + 1, NEAR, FAR), first + rows)
    if begin < end:
        k = tl.arange(0, K)[None, :]
        held = head * CAPACITY
        for at in tl.range(tl.maximum(first, begin), end, NEW):
            # Every block of rows writes the same numbers to the same places.
            new = at + tl.arange(0, NEW)[:, None]
            there = new < end
            source = projected + (new - first) * M + 2 * H * K + head * K
            key = turned(source, k_gain, cosine, sine, new, there, k, eps, K, ROTARY)
            value = tl.load(source + G * K + k, mask=there, other=0.0)
            keep(key.to(tl.bfloat16), keys, key_scales, held + new, there, k, K, FP8)
            keep(value, values, value_scales, held + new, there, k, K, FP8)
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
        total = tl.zeros((BLOCK, TILE), tl.float32)  # for each lane; the lanes are added at the end
        lane = tl.arange(0, TILE)
        if FP8:
            # Channels 2 j and 2 j + 1 are a word. A product sums over the even channels, then the odd.
            WORDS: tl.constexpr = K // 2
            word = tl.arange(0, WORDS)[None, :]
            key_words = keys.to(tl.pointer_type(tl.int16))
            value_words = values.to(tl.pointer_type(tl.int16))
            even_query, odd_query = query.to(tl.float16).reshape(BLOCK, WORDS, 2).split()
            even = tl.zeros((BLOCK, WORDS), tl.float32)
            odd = tl.zeros((BLOCK, WORDS), tl.float32)
            # The values' scales relative to the piece's largest: fp16 can hold a share times those.
            p = begin + tl.arange(0, FAR)
            largest = tl.max(
                tl.load(value_scales + held + p, mask=p < end, other=0).to(tl.int32), 0
            )
            # Loads of single bytes are not pipelined by the compiler, so they are made a tile ahead.
            p = begin + lane
            next_key_scale = tl.load(key_scales + held + p, mask=p < end, other=0)
            next_value_scale = tl.load(value_scales + held + p, mask=p < end, other=0)
        else:
            acc = tl.zeros((BLOCK, K), tl.float32)
        for at in tl.range(begin, end, TILE):
            p = at + lane
            there = p[:, None] < end
            if FP8:
                place = (held + p[:, None]) * WORDS + word
                key = tl.load(key_words + place, mask=there, other=0)  # [TILE, K/2]
                value = tl.load(value_words + place, mask=there, other=0)
                key_scale = from_e8m0(next_key_scale)
                below = next_value_scale.to(tl.int32) - largest
                after = p + TILE
                next_key_scale = tl.load(key_scales + held + after, mask=after < end, other=0)
                next_value_scale = tl.load(value_scales + held + after, mask=after < end, other=0)
                even_key, odd_key = _pairs(key)
                score = tl.dot(even_query, tl.trans(even_key))  # [BLOCK, TILE]
                score = tl.dot(odd_query, tl.trans(odd_key), score)
                score *= (K**-0.5 * LOG2_E) * key_scale[None, :]
            else:
                place = (held + p[:, None]) * K + k
                key = tl.load(keys + place, mask=there, other=0.0)  # [TILE, K]
                value = tl.load(values + place, mask=there, other=0.0)
                score = tl.dot(query, tl.trans(key)) * (K**-0.5 * LOG2_E)  # [BLOCK, TILE]
            score = tl.where(p[None, :] <= position, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1)[:, None])
            # A row that has seen nothing yet has no peak: -inf - -inf would be NaN.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            share = tl.exp2(score - level)
            fade = tl.exp2(peak - level)
            total = total * fade + share
            peak = higher
            if FP8:
                share = (share * from_e8m0(tl.maximum(below + 127, 0))[None, :]).to(tl.float16)
                even_value, odd_value = _pairs(value)
                even = tl.dot(share, even_value, even * fade)
                odd = tl.dot(share, odd_value, odd * fade)
            else:
                acc = tl.dot(share.to(tl.bfloat16), value, acc * fade)
        if FP8:
            acc = tl.join(even, odd).reshape(BLOCK, K) * from_e8m0(largest)
        place = (piece * rows + row) * H + query_head
        tl.store(partial + place * K + k, acc, mask=valid)
        tl.store(peaks + place, peak, mask=valid)
        tl.store(totals + place, tl.sum(total, 1)[:, None], mask=valid)


@triton.jit(do_not_specialize=["rows"])
def combine(
    projected, partial, peaks, totals, out, start, rows,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr,
    MANY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[row, head] = sigmoid(gate) * attention, from what `attend` has written for each piece.

    Written: out [rows, H * K] bf16. Grid (rows, H, K / WIDTH). Pieces are added in order, MANY at a time.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    k = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)[None, :]
    gate = tl.load(projected + row * (2 * H * K + 2 * G * K) + head * 2 * K + K + k).to(tl.float32)
    count = _pieces(tl.load(start) + row + 1, NEAR, FAR)
    # Every row sees position 0, so the first piece has a finite peak.
    level = tl.load(peaks + row * H + head)
    total = 0.0
    piece = tl.arange(0, ALL)
    for at in tl.range(0, count, ALL):
        place = ((at + piece) * rows + row) * H + head
        there = at + piece < count
        peak = tl.load(peaks + place, mask=there, other=float("-inf"))
        held = tl.load(totals + place, mask=there, other=0.0)
        higher = tl.maximum(level, tl.max(peak, 0))
        total = total * tl.exp2(level - higher) + tl.sum(tl.exp2(peak - higher) * held, 0)
        level = higher
    some = tl.arange(0, MANY)[:, None]
    acc = tl.zeros((1, WIDTH), tl.float32)
    for at in tl.range(0, count, MANY):
        place = ((at + some) * rows + row) * H + head
        there = at + some < count
        part = tl.load(partial + place * K + k, mask=there, other=0.0)  # [MANY, WIDTH]
        peak = tl.load(peaks + place, mask=there, other=float("-inf"))
        acc += tl.sum(tl.exp2(peak - level) * part, 0)[None, :]
    read = acc / total / (1 + tl.exp(-gate))
    tl.store(out + (row * H + head) * K + k, read.to(tl.bfloat16))
