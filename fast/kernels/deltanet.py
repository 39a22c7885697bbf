"""Everything between the two projections of the gated delta net, in one launch."""

import triton
import triton.language as tl

from fast.kernels.common import stored

MAX_ROWS = tl.constexpr(8)  # rows of a pass; the same as fast.target.MAX_ROWS


@triton.jit
def _taps(taps, column, TAPS: tl.constexpr):
    """The convolution's taps of some columns, [taps, columns] fp32. taps [columns, TAPS] bf16."""
    tap = tl.arange(0, triton.next_power_of_2(TAPS))[:, None]
    place = taps + column[None, :] * TAPS + tap
    return tl.load(place, mask=tap < TAPS, other=0.0).to(tl.float32)


@triton.jit
def _window(rows, column, position, M, RING: tl.constexpr, TAPS: tl.constexpr):
    """Some columns of the last TAPS positions, [taps, columns] bf16.

    rows [RING, M] bf16; the row of position p lies at p modulo RING, and rows before position 0 are zero.
    All taps are one load: if each row were loaded by itself, Triton would use the layout of the state and
    split each load into many narrow ones.
    """
    tap = tl.arange(0, triton.next_power_of_2(TAPS))[:, None]
    at = position - (TAPS - 1) + tap
    place = (at & (RING - 1)) * M + column[None, :]
    return tl.load(rows + place, mask=(tap < TAPS) & (at >= 0), other=0.0)


@triton.jit
def _read(
    rows, query, key, value, z, b, position, M, HV: tl.constexpr, RING: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """What a position needs of the projections: the windows of query, key and value, then z, b and a.

    Arguments query, key, value, z, b: their columns; a lies HV columns behind b.
    """
    line = rows + (position & (RING - 1)) * M
    return (
        _window(rows, query, position, M, RING, TAPS), _window(rows, key, position, M, RING, TAPS),
        _window(rows, value, position, M, RING, TAPS),
        tl.load(line + z), tl.load(line + b), tl.load(line + b + HV),
    )  # fmt: skip


@triton.jit
def _mixed(window, taps):
    """Causal convolution over a window [taps, columns], then SiLU, in fp32 [columns]."""
    total = tl.sum(window.to(tl.float32) * taps, 0)
    return total / (1 + tl.exp(-total))


@triton.jit
def softplus(x):
    """log(1 + e^x), with the full precision of float32 even where e^x is small."""
    power = tl.exp(tl.minimum(x, 20.0))
    sum = 1 + power
    small = tl.where(sum == 1, power, tl.log(sum) * (power / tl.where(sum == 1, 1.0, sum - 1)))
    return tl.where(x > 20, x, small)


@triton.jit(do_not_specialize=["rows", "slots"])
def delta(
    projected, taps, decay_log, decay_bias, norm, states, gated, squares, arrived, out,
    start, rows, slots, M, eps, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, TAPS: tl.constexpr, RING: tl.constexpr, SIGMOID: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out[row, head] = the gated norm of what the delta rule reads at a row.

    A program works on BLOCK_V columns of a value head. The program that finishes last at a head divides
    by the head's rms. Grid (HV, V / BLOCK_V).

    projected [RING, M] bf16, with columns q (H * K), k (H * K), v (HV * V), z (HV * V), b (HV), a (HV);
    the row of position p lies at p modulo RING.
    taps [2 H K + HV V, TAPS] bf16; decay_log (A_log) and decay_bias (dt_bias) [HV] fp32; norm [V] fp32.
    states [slots, HV, K, V] fp32: the state after position p lies at p modulo slots. The state before
    position `start` is read, and the state after each row is written.
    gated [rows, HV * V] and squares [HV, V / BLOCK_V, MAX_ROWS] fp32 are scratch. arrived [HV] int32
    has to be zero, and is zero again at the end.
    SIGMOID: the gate is sigmoid(z), not silu(z). Written: out [rows, HV * V] bf16.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    key_head = head // (HV // H)
    k, v = tl.arange(0, K), block * BLOCK_V + tl.arange(0, BLOCK_V)
    C: tl.constexpr = 2 * H * K + HV * V
    first = tl.load(start)
    rate = tl.exp(tl.load(decay_log + head))
    bias = tl.load(decay_bias + head)
    weight = tl.load(norm + v)
    place = (head * K + k[:, None]) * V + v[None, :]
    SIZE: tl.constexpr = HV * K * V
    state = tl.load(states + ((first - 1) & (slots - 1)) * SIZE + place)  # [K, BLOCK_V]
    # columns of the projections
    q_at, k_at, v_at = key_head * K + k, (H + key_head) * K + k, 2 * H * K + head * V + v
    z_at, b_at = C + head * V + v, C + HV * V + head
    q_taps, k_taps = _taps(taps, q_at, TAPS), _taps(taps, k_at, TAPS)
    v_taps = _taps(taps, v_at, TAPS)
    next_q, next_k, next_v, next_z, next_b, next_a = _read(
        projected, q_at, k_at, v_at, z_at, b_at, first, M, HV, RING, TAPS
    )
    for row in tl.range(0, rows):  # pyright: ignore
        position = first + row
        query, key, value = _mixed(next_q, q_taps), _mixed(next_k, k_taps), _mixed(next_v, v_taps)
        gate = next_z.to(tl.float32)
        strength = 1 / (1 + tl.exp(-next_b.to(tl.float32)))
        step = next_a.to(tl.float32) + bias
        # The next row's numbers come while this one is computed; the last row reads its own again.
        after = first + tl.minimum(row + 1, rows - 1)
        next_q, next_k, next_v, next_z, next_b, next_a = _read(
            projected, q_at, k_at, v_at, z_at, b_at, after, M, HV, RING, TAPS
        )
        query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6) * (K**-0.5)
        key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
        decayed = state * tl.exp(-rate * softplus(step))
        # The value that the memory holds for this key, [BLOCK_V].
        recalled = tl.sum(key[:, None] * decayed, 0)
        correction = strength * (value - recalled)
        # The compiler computes the state twice, in the layout of the sums and in that of the store. It
        # might fuse a separate product and sum in one of them alone; the next row would then read other
        # bits here than the next pass reads from memory. So the product and sum are one fma.
        state = tl.fma(key[:, None], correction[None, :], decayed)
        read = tl.sum(query[:, None] * state, 0)  # [BLOCK_V]
        tl.store(states + (position & (slots - 1)) * SIZE + place, state)
        opened = 1 / (1 + tl.exp(-gate))
        if not SIGMOID:
            opened *= gate
        tl.store(gated + (row * HV + head) * V + v, weight * read * opened)
        tl.store(squares + (head * (V // BLOCK_V) + block) * MAX_ROWS + row, tl.sum(read * read, 0))
    stored()
    before = tl.atomic_add(arrived + head, 1, sem="acq_rel", scope="gpu")
    if before == V // BLOCK_V - 1:
        m, part = tl.arange(0, MAX_ROWS)[:, None], tl.arange(0, V // BLOCK_V)[None, :]
        there = m < rows
        sums = squares + (head * (V // BLOCK_V) + part) * MAX_ROWS + m
        sum_of_squares = tl.sum(tl.load(sums, mask=there, other=0.0, cache_modifier=".cg"), 1)
        scale = tl.rsqrt(sum_of_squares / V + eps)[:, None]  # [MAX_ROWS, 1]
        columns = (m * HV + head) * V + tl.arange(0, V)[None, :]
        whole = tl.load(gated + columns, mask=there, other=0.0, cache_modifier=".cg") * scale
        tl.store(out + columns, whole.to(tl.bfloat16), mask=there)
        tl.store(arrived + head, 0)
