"""The router in one launch: a product for its logits and the shared expert's gate-up, then the choice.

The product is cut along K into SPLITS parts, so that even a small matrix keeps the whole chip reading.
The program that finishes last adds the parts in a fixed order and chooses the experts.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from fast.kernels.common import stored, summed
from fast.kernels.linear import inverse_rms

TOGETHER = tl.constexpr(4)  # rows that one step chooses for, however many the pass has


@triton.jit(do_not_specialize=["rows"])
def route(
    x, squares, weight, parts, arrived, experts, weights, rows, N, eps,
    K: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr,
    NORM: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Softmax over E logits, then the TOP_K largest; ties go to the lower index. NORM: renormalised.

    x [rows, K] bf16; PARTS > 0: the scaled rows of a norm, and squares [PARTS, ROWS] fp32 are their sums
    of x^2 (kernels/linear.py). weight [N, K] bf16: E rows for the logits, then the shared expert's rows.
    Written: parts [SPLITS, rows, N] fp32, from which the experts' launches read the shared expert's
    columns; experts [rows, TOP_K] int32; weights [rows, TOP_K] fp32. arrived [1] int32 has to be zero,
    and is zero again at the end. Grid (N / BLOCK_N rounded up, SPLITS).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    # A last block that is not full reads the last row again, and does not store that result.
    lines = weight + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    inputs = x + row[None, :] * K + k[:, None]
    PART: tl.constexpr = K // SPLITS
    begin = tl.program_id(1) * PART
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for offset in tl.range(0, PART, BLOCK_K):
        w = tl.load(lines + begin + offset)
        columns = tl.load(inputs + begin + offset, mask=row[None, :] < rows, other=0.0)
        acc = tl.dot(w, columns, acc)
    if PARTS > 0:
        acc *= inverse_rms(squares, K, eps, PARTS, ROWS)[None, :]
    place = (tl.program_id(1) * rows + row[None, :]) * N + n[:, None]
    tl.store(parts + place, acc, mask=(n[:, None] < N) & (row[None, :] < rows))
    stored()
    before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if before == tl.num_programs(0) * tl.num_programs(1) - 1:
        for first in tl.range(0, rows, TOGETHER):
            choose_rows(parts, experts, weights, first, rows, N, E, TOP_K, NORM, SPLITS, BLOCK_E)
        tl.store(arrived, 0)


@triton.jit
def _of_rows(x, LANES: tl.constexpr):
    """Repeat each row's number [TOGETHER] for its LANES places, [1, TOGETHER * LANES]."""
    return tl.broadcast_to(x[:, None], TOGETHER, LANES).reshape(1, TOGETHER * LANES)


@triton.jit
def choose_rows(
    parts, experts, weights, first, rows, N,
    E: tl.constexpr, TOP_K: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Choose and write the experts of TOGETHER rows from `first`, and their weights.

    Numbers are [BLOCK_E / LANES, TOGETHER * LANES]: expert e of a row is at (e // LANES, row * LANES +
    e % LANES). So the compiler gives each of four warps a whole row, and a row's maximum needs no
    exchange between warps.
    """
    WARP: tl.constexpr = 64 if is_hip() else 32  # pyright: ignore[reportAssignmentType]
    LANES: tl.constexpr = BLOCK_E if BLOCK_E < WARP else WARP
    place = tl.arange(0, TOGETHER * LANES)[None, :]
    lane, row = place % LANES, first + place // LANES
    index = tl.arange(0, BLOCK_E // LANES)[:, None] * LANES + lane
    logits = summed(parts, row, index, (index < E) & (row < rows), rows, N, SPLITS)
    # The logits are rounded as the reference's are, so that the same ones tie.
    rounded = logits.to(tl.bfloat16).to(tl.float32)
    logits = tl.where(index < E, rounded, float("-inf"))
    largest = tl.max(tl.max(logits, 0).reshape(TOGETHER, LANES), 1)
    exponentials = tl.exp(logits - _of_rows(largest, LANES))
    total = tl.sum(tl.sum(exponentials, 0).reshape(TOGETHER, LANES), 1)
    probabilities = exponentials / _of_rows(total, LANES)
    # Numbers that are not negative are ordered as their bits are; -1 is below all of them. One NaN makes
    # every probability of its row NaN, of either sign. All get the same key and tie, so the ids are the
    # reference's: distinct and in range. The weights are NaN.
    bits = probabilities.to(tl.int32, bitcast=True)
    bits = tl.where(probabilities == probabilities, bits, 0x7FC00000)
    keys = tl.where(index < E, bits, -1)
    # Slot s is at lane s. There are at least as many lanes as slots.
    chosen = tl.zeros((1, TOGETHER * LANES), tl.int32)
    values = tl.zeros((1, TOGETHER * LANES), tl.float32)
    for slot in tl.static_range(TOP_K):
        best = _of_rows(tl.max(tl.max(keys, 0).reshape(TOGETHER, LANES), 1), LANES)
        lowest = tl.min(tl.where(keys == best, index, BLOCK_E), 0)
        expert = _of_rows(tl.min(lowest.reshape(TOGETHER, LANES), 1), LANES)
        keys = tl.where(index == expert, -1, keys)
        chosen = tl.where(lane == slot, expert, chosen)
        values = tl.where(lane == slot, best.to(tl.float32, bitcast=True), values)
    if NORM:
        total = tl.sum(values.reshape(TOGETHER, LANES), 1)
        values /= _of_rows(total, LANES)
    inside = (lane < TOP_K) & (row < rows)
    tl.store(experts + row * TOP_K + lane, chosen, mask=inside)
    tl.store(weights + row * TOP_K + lane, values, mask=inside)
