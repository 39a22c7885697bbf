"""The routed experts in two launches: gate-up with SiLU, then down with the sum over a row's experts.

A program works for one pair (row, slot) of the router's choice, and does nothing when an earlier pair
chose the same expert: the first computes all rows, so that an expert's weights are read once. The rows
beside a row decide none of its bits: each is a column of its own in the matrix unit, and its sum runs
over its own slots.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import is_hip

from fast.kernels.mxfp4 import dot, place

MAX_PAIRS = tl.constexpr(128)  # rows times top-k, rounded up to a power of two


@triton.jit
def _first(experts, pair):
    """The first pair that chose the same expert."""
    earlier = tl.arange(0, MAX_PAIRS)
    chosen = tl.load(experts + earlier, mask=earlier < pair, other=-1)
    return tl.min(tl.where(chosen == tl.load(experts + pair), earlier, pair), 0)


@triton.jit
def _bounded(index, count):
    """An index that was read from memory, made one of `count`, so that no address leaves an array."""
    return tl.minimum(tl.maximum(index, 0), count - 1)


@triton.jit
def _stored():
    """A barrier behind which all that this program stored is where other programs can be told of it.

    On gfx950 the compiler lets only the wave that tells them wait for its stores, not the others.
    """
    if is_hip():
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v,~{memory}", [tl.arange(0, 64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def gate_up(
    x, experts, weight, scale, first, hidden, rows, E,
    D: tl.constexpr, I: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """hidden[pair, row] = silu(gate(x[row])) * up(x[row]), for the first pair of each expert.

    x [rows, D] bf16, experts [rows * k] int32, weight [E, 2 I, D/2] uint8 (gate row 0, up row 0, gate row
    1, ...) and scale [E, 2 I, D/32] uint8, both in tiles of TILE_N rows by TILE_K elements -> hidden
    [rows * k, 8, I] bf16, first [rows * k] int32: the first pair of each pair's expert. An id that is
    none of E experts is taken for the nearest one.
    Grid (2 I / BLOCK_N, rows * k).
    """
    if OVERLAP:
        gdc_launch_dependents()  # `down` may fetch its weights as soon as there is room
    pair = tl.program_id(1)
    expert = _bounded(tl.load(experts + pair), E).to(tl.int64)
    earliest = _first(experts, pair)
    if tl.program_id(0) == 0:
        tl.store(first + pair, earliest)
    if earliest == pair:
        n = expert * (2 * I) + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        byte, group = tl.arange(0, BLOCK_K // 2)[None, :], tl.arange(0, BLOCK_K // 32)[None, :]
        codes = weight + place(n, byte, D // 2, TILE_K // 2, TILE_N)
        scales = scale + place(n, group, D // 32, TILE_K // 32, TILE_N)
        acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            w, s = tl.load(codes + k // 2 * TILE_N), tl.load(scales + k // 32 * TILE_N)
            acc = dot(w, s, x + k, D, rows, acc, BLOCK_N, BLOCK_K, ROWS)
        gate, up = acc.reshape(BLOCK_N // 2, 2, ROWS).permute(0, 2, 1).split()
        activated = gate / (1 + tl.exp(-gate)) * up  # [BLOCK_N/2, ROWS]
        i = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[:, None]
        row = tl.arange(0, ROWS)[None, :]
        tl.store(hidden + (pair * 8 + row) * I + i, activated.to(tl.bfloat16), mask=row < rows)


@triton.jit
def down(
    hidden, experts, first, weights, weight, scale, partial, arrived, added, out, rows, pairs, E,
    TOP_K: tl.constexpr, D: tl.constexpr, I: tl.constexpr, HAS_ADDED: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[row] = sum over slots of weights[row, slot] * down(hidden of the slot's expert) (+ added[row]).

    hidden and first as `gate_up` leaves them, weights [rows * k] fp32, weight [E, D, I/2] uint8, scale
    [E, D, I/32] uint8, partial [rows * k, 8, D] fp32 scratch, arrived [D / BLOCK_N] int32 zeros (and
    zeros again at the end), added [rows, D] fp32 -> out [rows, D] bf16. Grid (D / BLOCK_N, rows * k). The
    program that arrives last at a block of columns adds it up, always in the order of the slots.
    """
    pair = tl.program_id(1)
    row = tl.arange(0, ROWS)[None, :]
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    n = _bounded(tl.load(experts + pair), E).to(tl.int64) * D + column
    codes = weight + n * (I // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    scales = scale + n * (I // 32) + tl.arange(0, BLOCK_K // 32)[None, :]
    earliest = _first(experts, pair)
    # What is before the wait does not need `gate_up`, and overlaps with its end: the weights too, if they
    # are one block. Of several, to fetch the first by itself costs more than it saves.
    if OVERLAP and (I > BLOCK_K or earliest < pair):
        gdc_wait()
    if earliest == pair:
        acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
        x = hidden + pair * 8 * I
        for k in tl.range(0, I, BLOCK_K):
            w, s = tl.load(codes + k // 2), tl.load(scales + k // 32)
            if OVERLAP and I == BLOCK_K:
                gdc_wait()
            acc = dot(w, s, x + k, I, rows, acc, BLOCK_N, BLOCK_K, ROWS)
        tl.store(partial + (pair * 8 + row) * D + column, acc, mask=row < rows)
    _stored()
    before = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    if before == pairs - 1:
        total = tl.zeros((BLOCK_N, ROWS), tl.float32)
        for slot in tl.static_range(TOP_K):
            source = tl.load(first + row * TOP_K + slot, mask=row < rows, other=0)  # [1, ROWS]
            source = _bounded(source, pairs)
            share = tl.load(weights + row * TOP_K + slot, mask=row < rows, other=0.0)
            pointers = partial + (source * 8 + row) * D + column
            total += share * tl.load(pointers, mask=row < rows, other=0.0, cache_modifier=".cg")
        place = row * D + column
        if HAS_ADDED:
            total += tl.load(added + place, mask=row < rows, other=0.0)
        tl.store(out + place, total.to(tl.bfloat16), mask=row < rows)
        tl.store(arrived + tl.program_id(0), 0)
