"""Router logits and the shared expert's gate-up as one product, then the choice: two launches.

The product is cut along K into SPLITS parts, so that a small matrix keeps the whole chip reading. The
second launch adds them in a fixed order: a row's experts in one program, its shared expert in another.
"""

import triton
import triton.language as tl


@triton.jit
def linear(
    x, weight, gain, out, rows, N,
    K: tl.constexpr, SPLITS: tl.constexpr, HAS_GAIN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[split, row, n] = sum over the split's part of K of x[row] * weight[n] (* gain[row]).

    x [rows, K] bf16, weight [N, K] bf16, gain [rows] fp32 -> out [SPLITS, rows, N] fp32.
    Grid (N / BLOCK_N rounded up, SPLITS).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    # A last block that is not full reads the last row again, and drops what comes of it.
    weights = weight + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    inputs = x + row[None, :] * K + k[:, None]
    PART: tl.constexpr = K // SPLITS
    start = tl.program_id(1) * PART
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for offset in tl.range(0, PART, BLOCK_K):
        w = tl.load(weights + start + offset)
        columns = tl.load(inputs + start + offset, mask=row[None, :] < rows, other=0.0)
        acc = tl.dot(w, columns, acc)
    if HAS_GAIN:
        acc *= tl.load(gain + row, mask=row < rows, other=0.0)[None, :]
    place = (tl.program_id(1) * rows + row[None, :]) * N + n[:, None]
    tl.store(out + place, acc, mask=(n[:, None] < N) & (row[None, :] < rows))


@triton.jit
def _summed(parts, column, mask, rows, N, SPLITS: tl.constexpr):
    """The parts of a row's columns, added in order, fp32."""
    total = tl.load(parts + column, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):  # pyright: ignore
        total += tl.load(parts + split * rows * N + column, mask=mask, other=0.0)
    return total


@triton.jit
def choose(
    parts, experts, weights, hidden, shared_gate, rows, N,
    E: tl.constexpr, TOP_K: tl.constexpr, NORM: tl.constexpr, I: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Program (row, 0): softmax over E logits, the TOP_K largest, ties to the lower index, renormalised.
    Program (row, 1): the shared expert's silu(gate) * up, and the sigmoid that it is let through by.

    parts [SPLITS, rows, N] fp32 with columns E logits, 1 opening, I gates, I ups (N = E when I is 0)
    -> experts [rows, TOP_K] int32, weights [rows, TOP_K] fp32, hidden [rows, I] bf16, shared_gate [rows].
    """
    row = tl.program_id(0)
    parts += row * N
    if tl.program_id(1) == 0:
        index = tl.arange(0, BLOCK_E)
        logits = _summed(parts, index, index < E, rows, N, SPLITS)
        # As the reference's product is rounded: what ties there ties here.
        rounded = logits.to(tl.bfloat16).to(tl.float32)
        logits = tl.where(index < E, rounded, float("-inf"))
        exponentials = tl.exp(logits - tl.max(logits, 0))
        probabilities = exponentials / tl.sum(exponentials, 0)
        # Of numbers that are not negative the bits have their order; -1 is below all of them. A NaN makes
        # every probability of its row one, of either sign: as one key they tie, so the ids stay distinct
        # and in range, and are the reference's; the weights are NaN.
        bits = probabilities.to(tl.int32, bitcast=True)
        keys = tl.where(probabilities == probabilities, bits, 0x7FC00000)
        keys = tl.where(index < E, keys, -1)
        slot = tl.arange(0, 16)
        chosen = tl.zeros((16,), tl.int32)
        values = tl.zeros((16,), tl.float32)
        for place in tl.static_range(TOP_K):
            best = tl.max(keys, 0)
            expert = tl.min(tl.where(keys == best, index, BLOCK_E), 0)
            keys = tl.where(index == expert, -1, keys)
            chosen = tl.where(slot == place, expert, chosen)
            values = tl.where(slot == place, best.to(tl.float32, bitcast=True), values)
        if NORM:
            values /= tl.sum(values, 0)
        tl.store(experts + row * TOP_K + slot, chosen, mask=slot < TOP_K)
        tl.store(weights + row * TOP_K + slot, values, mask=slot < TOP_K)
    elif I > 0:
        i = tl.arange(0, BLOCK_I)
        gate = _summed(parts, E + 1 + i, i < I, rows, N, SPLITS)
        up = _summed(parts, E + 1 + I + i, i < I, rows, N, SPLITS)
        activated = gate / (1 + tl.exp(-gate)) * up
        tl.store(hidden + row * I + i, activated.to(tl.bfloat16), mask=i < I)
        opening = _summed(parts, E, True, rows, N, SPLITS)
        tl.store(shared_gate + row, 1 / (1 + tl.exp(-opening)))
