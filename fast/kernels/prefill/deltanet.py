"""The gated delta rule for a prompt, in chunks (the WY form of `reference.deltanet.chunk`).

First the terms inside a chunk are computed for all chunks in parallel (`mix`, `solve`). Then the state
is passed from chunk to chunk (`scan`). Then the outputs of all chunks are computed in parallel (`read`).
"Memory" is the recurrent state [K, V] of a value head.

Matrix products have fp16 inputs and fp32 accumulators. The inverse of a chunk's triangular system is
computed with 22 bits, and used in fp16. The state that is carried from chunk to chunk is fp32.
fp16 is sufficient because queries and keys have length one, and values come from a normalised row.
Its rounding error is an eighth of that of bf16. With bf16 the roundings between the
projections would add up to twice the reference's error. A number beyond 65,504 becomes infinite,
which generation reports.
"""

import triton
import triton.language as tl

from fast.kernels.deltanet import softplus

CHUNK = tl.constexpr(64)  # tokens; the same as reference.linear.GRID
DOUBLINGS = tl.constexpr(6)  # how often 1 is doubled to give CHUNK


@triton.jit
def _convolved(
    projected, ring, taps, token, column, first, rows, M, WIDE: tl.constexpr, C: tl.constexpr,
    TAPS: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Causal convolution, then SiLU. Returns [tokens, columns] fp32, with zeros from row `rows` on.

    projected [rows, M] bf16; ring [RING, WIDE] bf16, of which the first C columns are the rows before the
    pass, by position modulo RING; taps [C, TAPS] bf16, the weights of the convolution. token [tokens, 1]
    and column [1, columns] are indices. first: the first row's position.
    """
    total = tl.zeros((token.shape[0], column.shape[1]), tl.float32)
    for tap in tl.static_range(TAPS):
        at = token - (TAPS - 1) + tap
        inside = (at >= 0) & (at < rows)
        raw = tl.load(projected + at.to(tl.int64) * M + column, mask=inside, other=0.0)
        if tl.program_id(0) == 0:
            # Rows before position 0 are zeros.
            place = ring + (first + at + RING) % RING * WIDE + column
            raw += tl.load(place, mask=(at < 0) & (first + at >= 0), other=0.0)
        weight = tl.load(taps + column * TAPS + tap).to(tl.float32)
        total += raw.to(tl.float32) * weight
    return tl.where(token < rows, total / (1 + tl.exp(-total)), 0.0)


@triton.jit
def mix(
    projected, ring, taps, qk, v, start, filled, M, WIDE: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr, RING: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Compute queries and keys after convolution and L2 norm (queries are also scaled), and values.

    projected, ring and taps are those of `_convolved`. Their columns are q (H * K), k (H * K) and v (HV *
    V). start [1] int32: the first row's position. filled [1] int32: the number of rows; here and below
    the arrays may have room for more. Writes qk [chunks * CHUNK, 2, H, K] and v [chunks * CHUNK, HV, V]
    in fp16, with zeros from row `rows` on. Grid (chunks * CHUNK / TOKENS, 2 H + HV).
    """
    tl.static_assert(TOKENS >= TAPS - 1)  # so only the first program reads rows before the pass
    rows, first = tl.load(filled), tl.load(start)
    if tl.program_id(0) * TOKENS >= tl.cdiv(rows, CHUNK) * CHUNK:
        return
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head = tl.program_id(1)
    C: tl.constexpr = 2 * H * K + HV * V
    line = token.to(tl.int64)
    if head < 2 * H:
        k = tl.arange(0, K)[None, :]
        mixed = _convolved(
            projected, ring, taps, token, head * K + k, first, rows, M, WIDE, C, TAPS, RING
        )
        mixed *= tl.rsqrt(tl.sum(mixed * mixed, 1) + 1e-6)[:, None]
        mixed *= tl.where(head < H, K**-0.5, 1.0)
        tl.store(qk + (line * (2 * H) + head) * K + k, mixed.to(tl.float16))
    else:
        column = tl.arange(0, V)[None, :]
        own = head - 2 * H
        place = 2 * H * K + own * V + column
        value = _convolved(projected, ring, taps, token, place, first, rows, M, WIDE, C, TAPS, RING)
        tl.store(v + (line * HV + own) * V + column, value.to(tl.float16))


@triton.jit
def carry(
    projected, ring, start, filled, M, WIDE: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
    RING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the pass's last TAPS - 1 rows to the ring, for the next pass. The arguments are those of
    `mix`. Grid (TAPS - 1, C / BLOCK rounded up)."""
    rows, first = tl.load(filled), tl.load(start)
    row = rows - 1 - tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (column < C) & (row >= 0)  # rows before the pass are in the ring already
    value = tl.load(projected + row.to(tl.int64) * M + column, mask=there)
    tl.store(ring + (first + row) % RING * WIDE + column, value, mask=there)


@triton.jit
def _parts(x):
    """The first 11 bits of x fp32 and the next 11, times 2^11 so that they are not subnormal, in fp16."""
    first = x.to(tl.float16)
    return first, ((x - first.to(tl.float32)) * 2048).to(tl.float16)


@triton.jit
def _product(a, b):
    """a @ b of fp32 matrices, with 22 bits of each number."""
    a_first, a_next = _parts(a)  # pyright: ignore
    b_first, b_next = _parts(b)  # pyright: ignore
    crossed = tl.dot(a_first, b_next, tl.dot(a_next, b_first))
    return tl.dot(a_first, b_first) + crossed * (1 / 2048)


@triton.jit
def _inverse(lower, i, j):
    """The inverse (1 + lower)^-1 for a strictly lower triangular matrix [CHUNK, CHUNK] in fp32.

    i [CHUNK, 1] and j [1, CHUNK] are its indices. The inverses of the diagonal blocks are known for
    blocks of two rows. Each step doubles the blocks: the inverse of ((A, 0), (C, B)) is ((A', 0),
    (-B' C A', B')) with the inverses A' and B'. The products of the steps have fp16 inputs. Therefore
    one step of Newton's method follows: X + X (1 - (1 + lower) X). The bracket is small: it is computed
    with 22 bits, the product with it is not.
    """
    one = tl.where(i == j, 1.0, 0.0)
    inverse = one - tl.where(i ^ j == 1, lower, 0.0)  # of blocks of two rows
    for doubling in tl.range(1, DOUBLINGS):  # pyright: ignore
        # The part C of the doubled blocks. There the highest bit in which i and j differ is
        # `doubling`.
        between = tl.where((i ^ j) >> doubling == 1, lower, 0.0).to(tl.float16)
        known = inverse.to(tl.float16)
        inverse -= tl.dot(known, tl.dot(between, known).to(tl.float16))
    left = one - inverse - _product(lower, inverse)
    return inverse + tl.dot(inverse.to(tl.float16), left.to(tl.float16))


@triton.jit
def solve(
    projected, qk, v, decay_log, decay_bias, decays, wanted, erased, filled, M,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Solve each chunk's triangular system for both terms of its corrections, which are wanted - erased
    @ memory.

    projected [rows, M] bf16; its columns end with z (HV * V), b (HV) and a (HV). qk and v are the
    outputs of `mix`. decay_log (A_log) and decay_bias (dt_bias) are [HV] fp32. Writes decays [HV,
    chunks * CHUNK] in fp32, the sum of the log decay since the chunk's start, wanted [HV, chunks *
    CHUNK, V] and erased [HV, chunks * CHUNK, K] in fp16. From row `rows` on, the last two are 0. Grid
    (chunks, HV).
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    rows = tl.load(filled)
    if chunk * CHUNK >= rows:
        return
    key_head = head // (HV // H)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    C: tl.constexpr = 2 * H * K + HV * V
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    gates = projected + token.to(tl.int64) * M + C + HV * V + head
    is_row = token < rows
    opened = tl.load(gates, mask=is_row, other=float("-inf")).to(tl.float32)
    strength = 1 / (1 + tl.exp(-opened))  # [CHUNK], beta
    step = tl.load(gates + HV, mask=is_row, other=0.0).to(tl.float32) + tl.load(decay_bias + head)
    log_decay = tl.where(is_row, -tl.exp(tl.load(decay_log + head)) * softplus(step), 0.0)
    decay = tl.cumsum(log_decay, 0)  # [CHUNK]
    own = head.to(tl.int64) * tl.num_programs(0) * CHUNK
    line = (chunk * CHUNK + i).to(tl.int64)
    key = tl.load(qk + (line * (2 * H) + H + key_head) * K + tl.arange(0, K)[None, :])  # [CHUNK, K]
    # exp could overflow above the diagonal, where the exponents are not negative.
    since = tl.minimum(decay[:, None] - decay[None, :], 0.0)
    overlap = strength[:, None] * tl.dot(key, tl.trans(key)) * tl.exp(since)
    inverse = _inverse(tl.where(i > j, overlap, 0.0), i, j) * strength[None, :]
    tl.store(decays + own + token, decay)
    # Columns that V or K lacks are zeros, as in `read`.
    of_values = inverse.to(tl.float16)
    for left in tl.static_range(0, V, CHUNK):
        column = left + tl.arange(0, CHUNK)[None, :]
        value = tl.load(v + (line * HV + head) * V + column, mask=column < V, other=0.0)
        term = tl.dot(of_values, value)
        tl.store(wanted + (own + line) * V + column, term.to(tl.float16), mask=column < V)
    of_keys = (inverse * tl.exp(decay)[None, :]).to(tl.float16)
    for left in tl.static_range(0, K, CHUNK):
        column = left + tl.arange(0, CHUNK)[None, :]
        place = qk + (line * (2 * H) + H + key_head) * K + column
        term = tl.dot(of_keys, tl.load(place, mask=column < K, other=0.0))
        tl.store(erased + (own + line) * K + column, term.to(tl.float16), mask=column < K)


@triton.jit(do_not_specialize=["chunks", "slots"])
def scan(
    qk, decays, wanted, erased, states, memories, start, filled, chunks, slots,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Carry the memory from chunk to chunk, for BLOCK_V columns of a value head.

    The arguments are the outputs of the launches before. states [slots, HV, K, V] fp32: the memory after
    position p lies at p modulo slots. The memory before the pass is read from there, and the one after it
    written. Writes memories [HV, chunks, K, V] in fp16, the memory before each chunk, of which there may
    be fewer than `chunks`. Overwrites wanted by the corrections. Grid (HV, V / BLOCK_V).
    """
    first = tl.load(start)
    last = first + tl.load(filled)  # the position behind the last row
    head = tl.program_id(0)
    key_head = head // (HV // H)
    k = tl.arange(0, K)[:, None]
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    token = tl.arange(0, CHUNK)
    place = ((first + slots - 1) % slots * HV + head).to(tl.int64) * K * V + k * V + v
    memory = tl.load(states + place, mask=(first > 0) & (k >= 0), other=0.0)  # [K, BLOCK_V]
    for chunk in tl.range(0, tl.cdiv(last - first, CHUNK)):  # pyright: ignore
        small = memory.to(tl.float16)
        held = head.to(tl.int64) * chunks + chunk
        tl.store(memories + (held * K + k) * V + v, small)
        lines = held * CHUNK + token
        erase = tl.load(erased + lines[:, None] * K + tl.arange(0, K)[None, :])  # [CHUNK, K]
        written = wanted + lines[:, None] * V + v
        correction = tl.load(written).to(tl.float32) - tl.dot(erase, small)  # [CHUNK, BLOCK_V]
        tl.store(written, correction.to(tl.float16))
        since = tl.load(decays + lines)  # [CHUNK]
        whole = tl.load(decays + held * CHUNK + CHUNK - 1)
        to_end = (correction * tl.exp(whole - since)[:, None]).to(tl.float16)
        rows = (chunk * CHUNK + token).to(tl.int64)
        keys = qk + (rows[None, :] * (2 * H) + H + key_head) * K + k  # [K, CHUNK]
        memory = tl.dot(tl.load(keys), to_end, memory * tl.exp(whole))
    place = ((last - 1) % slots * HV + head).to(tl.int64) * K * V + k * V + v
    tl.store(states + place, memory)


@triton.jit
def read(
    projected, qk, decays, corrections, memories, norm, out, filled, M, eps, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Read the memory with each row's query, apply the gated norm, and write out [rows, HV * V]
    bf16.

    The arguments are the outputs of the launches before; corrections is wanted after `scan`. norm
    [V] is fp32. SIGMOID: the gate is sigmoid(z), not silu(z). Grid (chunks, HV).
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    rows = tl.load(filled)
    if chunk * CHUNK >= rows:
        return
    key_head = head // (HV // H)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    k = tl.arange(0, K)[None, :]
    C: tl.constexpr = 2 * H * K + HV * V
    line = (chunk * CHUNK + i).to(tl.int64)
    held = head.to(tl.int64) * tl.num_programs(0) + chunk
    query = tl.load(qk + (line * (2 * H) + key_head) * K + k)  # [CHUNK, K]
    key = tl.load(qk + (line * (2 * H) + H + key_head) * K + k)
    since = tl.load(decays + held * CHUNK + i)  # [CHUNK, 1]
    between = tl.where(i >= j, since - tl.load(decays + held * CHUNK + j), 0.0)
    inner = tl.where(i >= j, tl.dot(query, tl.trans(key)) * tl.exp(between), 0.0).to(tl.float16)
    decayed = (query.to(tl.float32) * tl.exp(since)).to(tl.float16)
    # CHUNK columns at a time need fewer registers, so that more programs run beside each other. Columns
    # that V lacks are zeros: with fewer than 64, Triton 3.6 has read outside of the shared memory here.
    parts = ()
    squares = tl.zeros((CHUNK, 1), tl.float32)
    for left in tl.static_range(0, V, CHUNK):
        v = left + tl.arange(0, CHUNK)[None, :]
        place = memories + (held * K + tl.arange(0, K)[:, None]) * V + v
        memory = tl.load(place, mask=v < V, other=0.0)  # [K, CHUNK]
        correction = tl.load(corrections + (held * CHUNK + i) * V + v, mask=v < V, other=0.0)
        got = tl.dot(inner, correction, tl.dot(decayed, memory))  # [CHUNK, CHUNK]
        squares += tl.sum(got * got, 1)[:, None]
        parts += (got,)
    scale = tl.rsqrt(squares / V + eps)
    for left in tl.static_range(0, V, CHUNK):
        v = left + tl.arange(0, CHUNK)[None, :]
        inside = (line < rows) & (v < V)
        gate = tl.load(projected + line * M + C + head * V + v, mask=inside, other=0.0)
        opened = 1 / (1 + tl.exp(-gate.to(tl.float32)))
        if not SIGMOID:
            opened *= gate.to(tl.float32)
        gain = tl.load(norm + v, mask=v < V, other=0.0)
        gated = gain * (parts[left // CHUNK] * scale) * opened
        tl.store(out + (line * HV + head) * V + v, gated.to(tl.bfloat16), mask=inside)
