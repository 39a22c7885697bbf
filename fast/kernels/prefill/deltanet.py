"""The delta rule for the tokens of a prompt, CHUNK at a time (the WY form of `reference.deltanet.chunk`).

What a chunk needs of itself is computed for all chunks at once; then its state is passed from chunk to
chunk; then all chunks are read at once. Products take fp16 and add in fp32; the solution of the
triangular system inside a chunk, and the state from chunk to chunk, are fp32. Queries and keys have
length one and values come from a normalised row, so fp16 holds them, and an error of its rounding is an
eighth of bf16's: with bf16 the seven roundings between the projections would add up to twice the
reference's error. A number beyond 65,504 becomes infinite, which generation reports.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from fast.kernels.deltanet import softplus

CHUNK = tl.constexpr(64)  # tokens; as reference.linear.GRID
DOUBLINGS = tl.constexpr(6)  # from 1 to CHUNK


@triton.jit
def _convolved(
    projected, before, taps, token, column, rows, M, C: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """Causal convolution, then SiLU: [tokens, columns] fp32, zeros from row `rows` on.

    projected [rows, M] bf16; before [TAPS - 1, C] bf16: the rows before the pass; taps [C, TAPS] bf16.
    token [tokens, 1], column [1, columns].
    """
    total = tl.zeros((token.shape[0], column.shape[1]), tl.float32)
    for tap in tl.static_range(TAPS):
        at = token - (TAPS - 1) + tap
        inside = (at >= 0) & (at < rows)
        raw = tl.load(projected + at.to(tl.int64) * M + column, mask=inside, other=0.0)
        earlier = tl.load(before + (at + TAPS - 1) * C + column, mask=at < 0, other=0.0)
        weight = tl.load(taps + column * TAPS + tap).to(tl.float32)
        total += tl.where(at < 0, earlier, raw).to(tl.float32) * weight
    return tl.where(token < rows, total / (1 + tl.exp(-total)), 0.0)


@triton.jit(do_not_specialize=["rows"])
def mix(
    projected, before, taps, qk, v, rows, M, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Queries and keys after convolution and l2 norm (queries also scaled), and values.

    Arguments as of `_convolved`, with columns q (H * K), k (H * K), v (HV * V) of projected and before.
    -> qk [chunks * CHUNK, 2, H, K] and v [chunks * CHUNK, HV, V] fp16, zeros from row `rows` on.
    Grid (chunks * CHUNK / TOKENS, 2 H + HV).
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    head = tl.program_id(1)
    C: tl.constexpr = 2 * H * K + HV * V
    line = token.to(tl.int64)
    if head < 2 * H:
        k = tl.arange(0, K)[None, :]
        mixed = _convolved(projected, before, taps, token, head * K + k, rows, M, C, TAPS)
        mixed *= tl.rsqrt(tl.sum(mixed * mixed, 1) + 1e-6)[:, None]
        mixed *= tl.where(head < H, K**-0.5, 1.0)
        tl.store(qk + (line * (2 * H) + head) * K + k, mixed.to(tl.float16))
    else:
        column = tl.arange(0, V)[None, :]
        own = head - 2 * H
        place = 2 * H * K + own * V + column
        value = _convolved(projected, before, taps, token, place, rows, M, C, TAPS)
        tl.store(v + (line * HV + own) * V + column, value.to(tl.float16))


@triton.jit
def _product(a, b):
    """a @ b of fp32 matrices, to fp32's precision."""
    if is_hip():
        product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision="tf32x3")
    return product


@triton.jit
def _inverse(lower, i, j):
    """(1 + lower)^-1 of a strictly lower triangular matrix [CHUNK, CHUNK] fp32; its indices i, j.

    The inverse of the blocks on the diagonal is known for a single row, and of twice as many rows it
    follows: of ((A, 0), (C, B)) it is ((A', 0), (-B' C A', B')) with the inverses A', B'.
    """
    inverse = tl.where(i == j, 1.0, 0.0)
    for doubling in tl.range(0, DOUBLINGS):  # pyright: ignore
        # Outside of the blocks that are known but inside of those of twice as many: the highest bit in
        # which i and j differ is this one.
        between = tl.where((i > j) & ((i ^ j) >> doubling == 1), lower, 0.0)
        inverse -= _product(inverse, _product(between, inverse))
    return inverse


@triton.jit(do_not_specialize=["rows"])
def solve(
    projected, qk, decay_log, decay_bias, decays, strengths, solved, rows, M,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The inverse of a chunk's triangular system, and its gates.

    projected [rows, M] bf16, whose columns end with z (HV * V), b (HV) and a (HV); qk as `mix` leaves it;
    decay_log (A_log) and decay_bias (dt_bias) [HV] fp32. -> decays and strengths [HV, chunks * CHUNK]
    fp32: the sum of the log decay since the chunk's start, and beta (0 from row `rows` on); solved
    [HV, chunks * CHUNK, CHUNK] fp16. Grid (chunks, HV).
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
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
    # The sum of those up to i, once along the rows and once along the columns.
    earlier = tl.where(i <= j, tl.sum(tl.where(i == j, log_decay[None, :], 0.0), 1)[:, None], 0.0)
    along_j = tl.sum(earlier, 0)
    along_i = tl.sum(tl.where(i >= j, log_decay[None, :], 0.0), 1)
    total = head.to(tl.int64) * tl.num_programs(0) * CHUNK
    tl.store(decays + total + token, along_j)
    tl.store(strengths + total + token, strength)
    line = (chunk * CHUNK + i).to(tl.int64)
    key = tl.load(qk + (line * (2 * H) + H + key_head) * K + tl.arange(0, K)[None, :])  # [CHUNK, K]
    strong = tl.sum(tl.where(i == j, strength[None, :], 0.0), 1)[:, None]  # [CHUNK, 1]
    # Above the diagonal exp would overflow.
    since = tl.where(i > j, along_i[:, None] - along_j[None, :], 0.0)
    overlap = tl.where(i > j, strong * tl.dot(key, tl.trans(key)) * tl.exp(since), 0.0)
    tl.store(solved + (total + line) * CHUNK + j, _inverse(overlap, i, j).to(tl.float16))


@triton.jit
def write(
    source, decays, strengths, solved, out, HEADS: tl.constexpr, FIRST: tl.constexpr,
    SHARED: tl.constexpr, WIDTH: tl.constexpr, DECAYED: tl.constexpr,
):  # fmt: skip
    """What a chunk writes into the memory, up to what the memory holds before it: one of two terms.

    The corrections are wanted - erased @ memory. Of values, source v [chunks * CHUNK, HV, V], out is
    wanted [HV, chunks * CHUNK, V] fp16; of keys that have decayed since the chunk's start, source qk
    [chunks * CHUNK, 2 H, K], it is erased [HV, chunks * CHUNK, K] fp16. Of HEADS heads of WIDTH columns
    in source, head FIRST + h / SHARED is that of value head h. The others as `solve` leaves them. Grid
    (chunks, HV).

    Two launches, for the reason that `read` gives for its WIDE.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
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


@triton.jit(do_not_specialize=["chunks"])
def scan(
    qk, decays, wanted, erased, before, memories, after, chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The memory from chunk to chunk, BLOCK_V columns of a value head.

    Arguments as the launches before leave them; before, after [HV, K, V] fp32: the memory before and
    behind the pass. -> memories [HV, chunks, K, V] fp16: the one before each chunk. wanted becomes the
    corrections.
    Grid (HV, V / BLOCK_V).
    """
    head = tl.program_id(0)
    key_head = head // (HV // H)
    k = tl.arange(0, K)[:, None]
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    token = tl.arange(0, CHUNK)
    memory = tl.load(before + (head * K + k) * V + v)  # [K, BLOCK_V]
    for chunk in tl.range(0, chunks):  # pyright: ignore
        small = memory.to(tl.float16)
        held = head.to(tl.int64) * chunks + chunk
        tl.store(memories + (held * K + k) * V + v, small)
        lines = held * CHUNK + token
        erase = tl.load(erased + lines[:, None] * K + tl.arange(0, K)[None, :])  # [CHUNK, K]
        place = wanted + lines[:, None] * V + v
        correction = tl.load(place).to(tl.float32) - tl.dot(erase, small)  # [CHUNK, BLOCK_V]
        tl.store(place, correction.to(tl.float16))
        since = tl.load(decays + lines)  # [CHUNK]
        whole = tl.load(decays + held * CHUNK + CHUNK - 1)
        to_end = (correction * tl.exp(whole - since)[:, None]).to(tl.float16)
        rows = (chunk * CHUNK + token).to(tl.int64)
        keys = qk + (rows[None, :] * (2 * H) + H + key_head) * K + k  # [K, CHUNK]
        memory = tl.dot(tl.load(keys), to_end, memory * tl.exp(whole))
    tl.store(after + (head * K + k) * V + v, memory)


@triton.jit(do_not_specialize=["rows"])
def read(
    projected, qk, decays, corrections, memories, norm, out, rows, M, eps, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """out[row, head] = the gated norm of what the memory gives for a row's query. [rows, HV * V] bf16.

    Arguments as the launches before leave them; norm [V] fp32. SIGMOID: the gate is sigmoid(z), not
    silu(z). Grid (chunks, HV).
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    key_head = head // (HV // H)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    # Triton 3.6 reads outside of the shared memory on Hopper where the matrices of a product have rows of
    # unequal length below 128 bytes.
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
