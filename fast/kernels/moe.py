"""The experts in two launches: gate-up with SiLU, then down with the sum over a row's experts.

A program works for one pair (row, slot) of the router's choice. The first pair that chose an expert
computes all rows, and later pairs with the same expert do nothing, so that its weights are read once. A
row's bits do not depend on the rows beside it: each row is a column of its own in the matrix unit, and
its sum runs over its own slots.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fast.kernels.common import bounded, stored, summed
from fast.kernels.linear import inverse_rms, store_scaled
from fast.kernels.mxfp4 import dot, place

MAX_PAIRS = tl.constexpr(128)  # the most rows times top-k, 8 * 16, a power of two


@triton.jit
def _first(experts, pair):
    """The first pair that chose the same expert."""
    earlier = tl.arange(0, MAX_PAIRS)
    chosen = tl.load(experts + earlier, mask=earlier < pair, other=-1)
    return tl.min(tl.where(chosen == tl.load(experts + pair), earlier, pair), 0)


@triton.jit
def _dot_bf16(
    weight, n, x, k, K, rows, acc, BLOCK_K: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """acc [BLOCK_N, ROWS] fp32 + weight @ x^T over elements k to k + BLOCK_K of K.

    weight [..., K] bf16, of which rows n [BLOCK_N, 1] (int64) are read; x [rows, K] bf16.
    """
    along = tl.arange(0, BLOCK_K)
    m = tl.arange(0, ROWS)[None, :]
    columns = tl.load(x + m * K + k + along[:, None], mask=m < rows, other=0.0)
    return tl.dot(tl.load(weight + n * K + k + along[None, :]), columns, acc)


@triton.jit
def _activate(
    parts, shared, rows, width, E: tl.constexpr, I: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """shared[row, i] = silu(gate) * up, from the shared expert's columns of the router's parts."""
    row = tl.arange(0, ROWS)[:, None]
    for first in tl.range(tl.program_id(0) * BLOCK, I, tl.num_programs(0) * BLOCK):  # pyright: ignore
        i = first + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (i < I)
        gate = summed(parts, row, E + 1 + i, inside, rows, width, SPLITS)
        up = summed(parts, row, E + 1 + I + i, inside, rows, width, SPLITS)
        activated = gate / (1 + tl.exp(-gate)) * up
        tl.store(shared + row * I + i, activated.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["rows", "pairs"])
def gate_up(
    x, squares, experts, weight, scale, first, hidden, parts, shared, rows, pairs, shared_width, eps,
    PARTS: tl.constexpr, E: tl.constexpr, D: tl.constexpr, I: tl.constexpr, FP4: tl.constexpr,
    SHARED_I: tl.constexpr, SPLITS: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """hidden[pair, row] = silu(gate(x[row])) * up(x[row]), for the first pair of each expert.

    x [rows, D] bf16; PARTS > 0: the scaled rows of a norm, and squares [PARTS, ROWS] fp32 are their sums
    of x^2 (kernels/linear.py). experts [rows * k] int32; an id that is not one of E experts gives NaN.
    FP4: weight [E, 2 I, D/2] uint8 (gate row 0, up row 0, gate row 1, ...) and scale [E, 2 I, D/32]
    uint8, both in tiles of TILE_N rows by TILE_K elements; otherwise weight [E, 2 I, D] bf16. If TILE_N
    is not 1, BLOCK_K must be a multiple of TILE_K.
    Written: hidden [rows * k, 8, I] bf16; first [rows * k] int32, the first pair of each pair's expert.
    Grid (2 I / BLOCK_N, rows * k).

    SHARED_I > 0: the grid's second size is one more, and these programs write the shared expert's
    activation shared [rows, SHARED_I] bf16. They read parts [SPLITS, rows, shared_width] fp32 as `route`
    writes them, whose columns are E logits, the shared expert's gate, SHARED_I gates and SHARED_I ups.
    """
    if OVERLAP:
        gdc_launch_dependents()  # `down` may fetch its weights as soon as there is room
    pair = tl.program_id(1)
    if SHARED_I > 0 and pair == pairs:
        _activate(parts, shared, rows, shared_width, E, SHARED_I, SPLITS, BLOCK_N, ROWS)
        return
    chosen = tl.load(experts + pair)
    expert = bounded(chosen, E).to(tl.int64)
    earliest = _first(experts, pair)
    if tl.program_id(0) == 0:
        tl.store(first + pair, earliest)
    if earliest == pair:
        n = expert * (2 * I) + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
        if FP4:
            byte, group = tl.arange(0, BLOCK_K // 2)[None, :], tl.arange(0, BLOCK_K // 32)[None, :]
            codes = weight + place(n, byte, D // 2, TILE_K // 2, TILE_N)
            scales = scale + place(n, group, D // 32, TILE_K // 32, TILE_N)
            for k in tl.range(0, D, BLOCK_K):
                w, s = tl.load(codes + k // 2 * TILE_N), tl.load(scales + k // 32 * TILE_N)
                acc = dot(w, s, x + k, D, rows, acc, BLOCK_N, BLOCK_K, ROWS)
        else:
            for k in tl.range(0, D, BLOCK_K):
                acc = _dot_bf16(weight, n, x, k, D, rows, acc, BLOCK_K, ROWS)
        if PARTS > 0:
            acc *= inverse_rms(squares, D, eps, PARTS, ROWS)[None, :]
        gate, up = acc.reshape(BLOCK_N // 2, 2, ROWS).permute(0, 2, 1).split()
        activated = gate / (1 + tl.exp(-gate)) * up  # [BLOCK_N/2, ROWS]
        activated = tl.where((chosen >= 0) & (chosen < E), activated, float("nan"))
        i = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[:, None]
        row = tl.arange(0, ROWS)[None, :]
        tl.store(hidden + (pair * 8 + row) * I + i, activated.to(tl.bfloat16), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "pairs"])
def down(
    hidden, experts, first, weights, weight, scale, parts, shared, shared_weight, partial, arrived,
    residual, out, next_norm, scaled, out_squares, rows, pairs, shared_width, E: tl.constexpr,
    TOP_K: tl.constexpr, D: tl.constexpr, I: tl.constexpr, FP4: tl.constexpr, SHARED_I: tl.constexpr,
    SPLITS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NEXT: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[row] = sum over slots of weights[row, slot] * down(hidden of the slot's expert)
    (+ the shared expert of the row) (+ residual[row]).

    hidden and first as `gate_up` writes them, weights [rows * k] fp32. FP4: weight [E, D, I/2] and scale
    [E, D, I/32] uint8; otherwise weight [E, D, I] bf16. residual [rows, D] bf16.
    SHARED_I > 0: shared [rows, SHARED_I] bf16 and parts as in `gate_up`, from which the shared expert's
    gate is read; shared_weight [D, SHARED_I] bf16.
    HAS_NEXT: as in kernels/linear.py.
    partial [rows * k + 1, 8, D] fp32 is scratch. arrived [D / BLOCK_N] int32 has to be zero, and is zero
    again at the end. Written: out [rows, D] bf16.
    Grid (D / BLOCK_N, rows * k), or rows * k + 1 with a shared expert. The program that finishes last at
    a block of columns adds the slots up, always in their order.
    """
    pair = tl.program_id(1)
    row = tl.arange(0, ROWS)[None, :]
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    if SHARED_I > 0 and pair == pairs:
        if OVERLAP:
            gdc_wait()
        n = column.to(tl.int64)
        for k in tl.range(0, SHARED_I, BLOCK_I):  # pyright: ignore
            acc = _dot_bf16(shared_weight, n, shared, k, SHARED_I, rows, acc, BLOCK_I, ROWS)
        opened = summed(parts, row, E, row < rows, rows, shared_width, SPLITS)
        acc *= 1 / (1 + tl.exp(-opened))
        tl.store(partial + (pairs * 8 + row) * D + column, acc, mask=row < rows)
    else:
        n = bounded(tl.load(experts + pair), E).to(tl.int64) * D + column
        earliest = _first(experts, pair)
        # Loads before the wait do not need the results of `gate_up` and overlap with its end. They
        # include the weights if these are a single block; to fetch the first of several costs more than
        # it saves.
        WHOLE: tl.constexpr = FP4 and I == BLOCK_K
        if OVERLAP and not WHOLE:
            gdc_wait()
        if earliest == pair:
            x = hidden + pair * 8 * I
            if FP4:
                codes = weight + n * (I // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
                scales = scale + n * (I // 32) + tl.arange(0, BLOCK_K // 32)[None, :]
                for k in tl.range(0, I, BLOCK_K):
                    w, s = tl.load(codes + k // 2), tl.load(scales + k // 32)
                    if OVERLAP and WHOLE:
                        gdc_wait()
                    acc = dot(w, s, x + k, I, rows, acc, BLOCK_N, BLOCK_K, ROWS)
            else:
                for k in tl.range(0, I, BLOCK_K):
                    acc = _dot_bf16(weight, n, x, k, I, rows, acc, BLOCK_K, ROWS)
            tl.store(partial + (pair * 8 + row) * D + column, acc, mask=row < rows)
        elif OVERLAP and WHOLE:
            gdc_wait()
    stored()
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    if before == tl.num_programs(1) - 1:
        total = tl.zeros((BLOCK_N, ROWS), tl.float32)
        for slot in tl.static_range(TOP_K):
            source = tl.load(first + row * TOP_K + slot, mask=row < rows, other=0)  # [1, ROWS]
            source = bounded(source, pairs)
            share = tl.load(weights + row * TOP_K + slot, mask=row < rows, other=0.0)
            pointers = partial + (source * 8 + row) * D + column
            total += share * tl.load(pointers, mask=row < rows, other=0.0, cache_modifier=".cg")
        if SHARED_I > 0:
            pointers = partial + (pairs * 8 + row) * D + column
            total += tl.load(pointers, mask=row < rows, other=0.0, cache_modifier=".cg")
        place = row * D + column
        if HAS_RESIDUAL:
            total += tl.load(residual + place, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out + place, total.to(tl.bfloat16), mask=row < rows)
        if HAS_NEXT:
            block, inside = tl.program_id(0), (row < rows) & (column < D)
            store_scaled(total, next_norm, scaled, out_squares, block, row, column, inside, D, ROWS)
        tl.store(arrived + tl.program_id(0), 0)
