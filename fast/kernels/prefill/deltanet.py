"""The gated delta rule for a prompt, in chunks (the WY form of `reference.deltanet.chunk`).

First the terms inside a chunk are computed for all chunks in parallel (`mix`, `solve`, `write`).
Then the state is passed from chunk to chunk (`scan`). Then the outputs of all chunks are computed
in parallel (`read`). "Memory" is the recurrent state [K, V] of a value head.

Matrix products have fp16 inputs and fp32 accumulators. The inverse of a chunk's triangular system has
the precision of fp32, and is stored in fp16. The state that is carried from chunk to chunk is fp32.
fp16 is sufficient because queries and keys have length one, and values come from a normalised row.
Its rounding error is an eighth of that of bf16. With bf16 the seven roundings between the
projections would add up to twice the reference's error. A number beyond 65,504 becomes infinite,
which generation reports.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

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
        # Rows before position 0 are zeros.
        place = ring + (first + at + RING) % RING * WIDE + column
        earlier = tl.load(place, mask=(at < 0) & (first + at >= 0), other=0.0)
        weight = tl.load(taps + column * TAPS + tap).to(tl.float32)
        total += tl.where(at < 0, earlier, raw).to(tl.float32) * weight
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
def _product(a, b):
    """a @ b of fp32 matrices, with fp32 precision."""
    if is_hip():
        product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision="tf32x3")
    return product


@triton.jit
def _inverse(lower, i, j):
    """The inverse (1 + lower)^-1 for a strictly lower triangular matrix [CHUNK, CHUNK] in fp32.

    i [CHUNK, 1] and j [1, CHUNK] are its indices. The inverses of the diagonal blocks are known for
    blocks of one row. Each step doubles the blocks: the inverse of ((A, 0), (C, B)) is ((A', 0),
    (-B' C A', B')) with the inverses A' and B'. The products of the steps have fp16 inputs. Therefore
    one step of Newton's method follows: X + X (1 - (1 + lower) X). The bracket is small: it is computed
    with fp32 precision, the product with it is not.
    """
    one = tl.where(i == j, 1.0, 0.0)
    inverse = one
    for doubling in tl.range(0, DOUBLINGS):  # pyright: ignore
        # The part C of the doubled blocks. There the highest bit in which i and j differ is
        # `doubling`.
        between = tl.where((i ^ j) >> doubling == 1, lower, 0.0).to(tl.float16)
        known = inverse.to(tl.float16)
        inverse -= tl.dot(known, tl.dot(between, known).to(tl.float16))
    left = one - inverse - _product(lower, inverse)
    return inverse + tl.dot(inverse.to(tl.float16), left.to(tl.float16))


@triton.jit
def solve(
    projected, qk, decay_log, decay_bias, decays, strengths, solved, filled, M,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Compute the inverse of each chunk's triangular system, and the gates.

    projected [rows, M] bf16; its columns end with z (HV * V), b (HV) and a (HV). qk is the output
    of `mix`. decay_log (A_log) and decay_bias (dt_bias) are [HV] fp32. Writes decays and strengths
    [HV, chunks * CHUNK] in fp32. decays is the sum of the log decay since the chunk's start.
    strengths is beta, with 0 from row `rows` on. Writes solved, the inverse, [HV, chunks * CHUNK,
    CHUNK] in fp16. Grid (chunks, HV).
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
    strength = 1 / (1 + tl.exp(-opened))  # [CHUNK]
    step = tl.load(gates + HV, mask=is_row, other=0.0).to(tl.float32) + tl.load(decay_bias + head)
    log_decay = tl.where(is_row, -tl.exp(tl.load(decay_log + head)) * softplus(step), 0.0)
    # The cumulative sums of log_decay, [CHUNK], once along the columns and once along the rows.
    earlier = tl.where(i <= j, tl.sum(tl.where(i == j, log_decay[None, :], 0.0), 1)[:, None], 0.0)
    along_j = tl.sum(earlier, 0)
    along_i = tl.sum(tl.where(i >= j, log_decay[None, :], 0.0), 1)
    total = head.to(tl.int64) * tl.num_programs(0) * CHUNK
    tl.store(decays + total + token, along_j)
    tl.store(strengths + total + token, strength)
    line = (chunk * CHUNK + i).to(tl.int64)
    key = tl.load(qk + (line * (2 * H) + H + key_head) * K + tl.arange(0, K)[None, :])  # [CHUNK, K]
    strong = tl.sum(tl.where(i == j, strength[None, :], 0.0), 1)[:, None]  # [CHUNK, 1]
    # exp could overflow above the diagonal, where the exponents are not negative.
    since = tl.minimum(along_i[:, None] - along_j[None, :], 0.0)
    overlap = tl.where(i > j, strong * tl.dot(key, tl.trans(key)) * tl.exp(since), 0.0)
    tl.store(solved + (total + line) * CHUNK + j, _inverse(overlap, i, j).to(tl.float16))


@triton.jit
def write(
    source, decays, strengths, solved, out, filled, HEADS: tl.constexpr, FIRST: tl.constexpr,
    SHARED: tl.constexpr, WIDTH: tl.constexpr, DECAYED: tl.constexpr,
):  # fmt: skip
    """Compute one of the two terms of a chunk's corrections, which are wanted - erased @ memory.

    One launch has the values as source, v [chunks * CHUNK, HV, V]; then out is wanted [HV, chunks *
    CHUNK, V] fp16. The other has the keys as source, qk [chunks * CHUNK, 2 H, K], and DECAYED,
    which applies the decay since the chunk's start; then out is erased [HV, chunks * CHUNK, K]
    fp16. source has HEADS heads of WIDTH columns. Value head h uses its head FIRST + h / SHARED.
    The other arguments are the outputs of `solve`. Grid (chunks, HV).

    The two terms are separate launches because of the compiler error that `read` describes.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    if chunk * CHUNK >= tl.load(filled):
        return
    i, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, WIDTH)[None, :]
    line = (chunk * CHUNK + i).to(tl.int64)
    own = head.to(tl.int64) * tl.num_programs(0) * CHUNK + line
    inverse = tl.load(solved + own * CHUNK + tl.arange(0, CHUNK)[None, :])  # [CHUNK, CHUNK]
    new = tl.load(source + (line * HEADS + FIRST + head // SHARED) * WIDTH + column).to(tl.float32)
    new *= tl.load(strengths + own)
    if DECAYED:
        new *= tl.exp(tl.load(decays + own))
    written = tl.dot(inverse, new.to(tl.float16))
    tl.store(out + own * WIDTH + column, written.to(tl.float16))


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
    # Triton 3.6 reads outside of the shared memory on Hopper if the matrices of a product have rows
    # of unequal length, with one below 128 bytes. Therefore a row has at least 64 columns.
    WIDE: tl.constexpr = V if V > 64 else 64  # pyright: ignore
    k, v = tl.arange(0, K)[None, :], tl.arange(0, WIDE)[None, :]
    C: tl.constexpr = 2 * H * K + HV * V
    line = (chunk * CHUNK + i).to(tl.int64)
    held = head.to(tl.int64) * tl.num_programs(0) + chunk
    query = tl.load(qk + (line * (2 * H) + key_head) * K + k)  # [CHUNK, K]
    key = tl.load(qk + (line * (2 * H) + H + key_head) * K + k)
    since = tl.load(decays + held * CHUNK + i)  # [CHUNK, 1]
    between = tl.where(i >= j, since - tl.load(decays + held * CHUNK + j), 0.0)
    inner = tl.where(i >= j, tl.dot(query, tl.trans(key)) * tl.exp(between), 0.0)
    memory = tl.load(
        memories + (held * K + tl.arange(0, K)[:, None]) * V + v, mask=v < V, other=0.0
    )  # [K, WIDE]
    correction = tl.load(corrections + (held * CHUNK + i) * V + v, mask=v < V, other=0.0)
    decayed = (query.to(tl.float32) * tl.exp(since)).to(tl.float16)
    got = tl.dot(inner.to(tl.float16), correction, tl.dot(decayed, memory))  # [CHUNK, WIDE]
    scale = tl.rsqrt(tl.sum(got * got, 1) / V + eps)[:, None]
    inside = (line < rows) & (v < V)
    gate = tl.load(projected + line * M + C + head * V + v, mask=inside, other=0.0)
    opened = 1 / (1 + tl.exp(-gate.to(tl.float32)))
    if not SIGMOID:
        opened *= gate.to(tl.float32)
    gated = tl.load(norm + v, mask=v < V, other=0.0) * (got * scale) * opened
    tl.store(out + (line * HV + head) * V + v, gated.to(tl.bfloat16), mask=inside)
