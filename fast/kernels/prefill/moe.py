"""The experts for many rows: a grouped matrix product over (row, slot) pairs sorted by expert.

A program multiplies BLOCK_M pairs of one expert by BLOCK_N rows of that expert's weights. MXFP4
weights are decoded right before the product. Each pair is a separate row of the product, so no
other pair affects its bits.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip_cdna4

from fast.kernels.common import bounded, stored
from fast.kernels.mxfp4 import arranged, product_of_tiles
from fast.kernels.router import TOGETHER, choose_rows


@triton.jit
def choose(
    logits, experts, weights, filled, N, E: tl.constexpr, TOP_K: tl.constexpr, NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The TOP_K experts of each row and their weights, as `route` chooses them.

    logits [rows, N] fp32, of which the first E columns are the router's -> experts [rows, TOP_K] int32,
    weights [rows, TOP_K] fp32. filled [1] int32 is the number of rows; here and below the arrays may have
    room for more. Grid (rows / TOGETHER rounded up).
    """
    rows = tl.load(filled)
    first = tl.program_id(0) * TOGETHER
    choose_rows(logits, experts, weights, first, rows, N, E, TOP_K, NORM, 1, BLOCK_E)


@triton.jit
def activate(logits, out, filled, N, FIRST: tl.constexpr, I: tl.constexpr, BLOCK: tl.constexpr):
    """Compute silu(gate) * up of the shared expert, out [rows, I] bf16.

    logits [rows, N] fp32 has the gates in columns FIRST to FIRST + I, and the ups after them. filled: as
    in `choose`. Grid (rows).
    """
    if tl.program_id(0) >= tl.load(filled):
        return
    line = tl.program_id(0).to(tl.int64)
    for first in tl.range(0, I, BLOCK):  # pyright: ignore
        i = first + tl.arange(0, BLOCK)
        gates = logits + line * N + FIRST + i
        # Both are rounded to bf16, as the products of the reference are.
        gate = tl.load(gates, mask=i < I, other=0.0).to(tl.bfloat16).to(tl.float32)
        up = tl.load(gates + I, mask=i < I, other=0.0).to(tl.bfloat16).to(tl.float32)
        activated = gate / (1 + tl.exp(-gate)) * up
        tl.store(out + line * I + i, activated.to(tl.bfloat16), mask=i < I)


@triton.jit
def arrange(x, out, D: tl.constexpr, BLOCK: tl.constexpr):
    """Write out [rows, D] bf16, which is x [rows, D] bf16 with its columns `arranged`. Grid (rows, D /
    BLOCK rounded up)."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = tl.program_id(0).to(tl.int64) * D
    tl.store(
        out + line + arranged(column), tl.load(x + line + column, mask=column < D), mask=column < D
    )


@triton.jit(do_not_specialize=["tiles"])
def count(
    chosen, ranks, counts, expert_first, tile_expert, tile_first, filled, tiles,
    E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the pairs of each expert, and cut them into tiles of up to TILE pairs of one expert.

    chosen [rows * TOP_K] int32, the expert of each pair; filled: as in `choose`. Writes ranks [pairs]
    int32: how many pairs of the same expert were counted before, in any order. counts [E + 1] int32 has
    to be zero; the last element counts the programs that are done. The last program writes expert_first
    [E + 1] int32, the first place of each expert, and of each tile the expert and the first place:
    tile_expert and tile_first [tiles] int32. An unused tile has the expert E. A pair without a valid
    expert is not counted; `place` gives it place 0. Grid (pairs / BLOCK rounded up).
    """
    pairs = tl.load(filled) * TOP_K
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + pair, mask=pair < pairs, other=E)
    is_expert = (expert >= 0) & (expert < E)
    own = counts + bounded(expert, E)
    rank = tl.atomic_add(own, 1, mask=is_expert, sem="relaxed", scope="gpu")
    tl.store(ranks + pair, rank, mask=is_expert)
    stored()
    before = tl.atomic_add(counts + E, 1, sem="acq_rel", scope="gpu")
    if before == tl.num_programs(0) - 1:
        e = tl.arange(0, BLOCK_E)
        held = tl.load(counts + e, mask=e < E, other=0, cache_modifier=".cg")
        first = tl.cumsum(held) - held
        tl.store(expert_first + e, first, mask=e < E)
        tl.store(expert_first + E, tl.sum(held))
        needed = (held + TILE - 1) // TILE
        tile = tl.cumsum(needed) - needed
        for i in tl.range(0, tl.max(needed)):  # pyright: ignore
            at, there = tile + i, (i < needed) & (tile + i < tiles)
            tl.store(tile_expert + bounded(at, tiles), e, mask=there)
            tl.store(tile_first + bounded(at, tiles), first + i * TILE, mask=there)
        for unused in tl.range(bounded(tl.sum(needed), tiles + 1), tiles, BLOCK):  # pyright: ignore
            at = unused + tl.arange(0, BLOCK)
            tl.store(tile_expert + at, E, mask=at < tiles)


@triton.jit
def place(
    chosen, ranks, expert_first, order, place_of_pair, filled, E: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Give each pair its place: order [pairs] int32 has the pair at each place, and place_of_pair [pairs]
    int32 the place of each pair. The others are those of `count`. Grid (pairs / BLOCK rounded up)."""
    pairs = tl.load(filled) * TOP_K
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + pair, mask=pair < pairs, other=E)
    is_expert = (expert >= 0) & (expert < E)
    first = tl.load(expert_first + bounded(expert, E), mask=is_expert, other=0)
    at = bounded(first + tl.load(ranks + pair, mask=is_expert, other=0), pairs)
    tl.store(order + at, pair, mask=is_expert)
    tl.store(place_of_pair + pair, at, mask=pair < pairs)


@triton.jit(do_not_specialize=["pairs"])
def grouped(
    x, order, tile_expert, tile_first, expert_first, weight, scale, out, pairs,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, FP4: tl.constexpr,
    ACTIVATED: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[p] = weight[expert of p] @ x of p, for the pairs p in the order of their experts.

    TOP_K > 0: x is [rows, K] bf16, and pair p reads row order[p] // TOP_K, with order [pairs]
    int32. TOP_K = 0: x is [pairs, K] bf16. tile_expert [tiles] int32: the expert of each tile of
    BLOCK_M pairs, or E for an unused tile. tile_first [tiles] int32: its first pair. expert_first
    [E + 1] int32: the first pair of each expert. FP4: weight [E, N, K/2] and scale [E, N, K/32]
    uint8, in tiles of TILE_N rows by TILE_K elements; otherwise weight [E, N, K] bf16. Writes out
    [pairs, N] bf16. ACTIVATED: rows 2 i and 2 i + 1 of weight are a gate and an up, and out [pairs,
    N / 2] is silu(gate) * up. Grid (N / BLOCK_N, tiles).

    On Hopper the columns of x are `arranged` for FP4 weights, and so are those of out if ACTIVATED.
    """
    expert = tl.load(tile_expert + tl.program_id(1))
    if (expert >= 0) & (expert < E):
        pair = tl.load(tile_first + tl.program_id(1)) + tl.arange(0, BLOCK_M)
        last = tl.minimum(tl.load(expert_first + expert + 1), pairs)
        inside = (pair >= 0) & (pair < last)
        line = bounded(pair, pairs).to(tl.int64)
        source = line
        if TOP_K:
            source = bounded(tl.load(order + line) // TOP_K, pairs // TOP_K).to(tl.int64)
        rows = x + source[:, None] * K  # [BLOCK_M, 1]; rows without a pair are not stored
        n = expert.to(tl.int64) * N + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        if FP4:
            acc = product_of_tiles(
                rows, weight, scale, n, K, TILE_N, TILE_K, BLOCK_M, BLOCK_N, BLOCK_K
            )
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            along = tl.arange(0, BLOCK_K)
            for k in tl.range(0, K, BLOCK_K):
                columns = tl.load(weight + n * K + k + along[None, :])  # [BLOCK_N, BLOCK_K]
                acc = tl.dot(tl.load(rows + k + along[None, :]), tl.trans(columns), acc)
        if ACTIVATED:
            gate, up = acc.reshape(BLOCK_M, BLOCK_N // 2, 2).split()
            hidden = gate / (1 + tl.exp(-gate)) * up  # [BLOCK_M, BLOCK_N/2]
            i = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            if FP4 and not is_hip_cdna4():
                i = arranged(i)
            places = out + line[:, None] * (N // 2) + i[None, :]
            tl.store(places, hidden.to(tl.bfloat16), mask=inside[:, None])
        else:
            i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
            places = out + line[:, None] * N + i[None, :]
            tl.store(places, acc.to(tl.bfloat16), mask=inside[:, None])


@triton.jit
def combine(
    by_pair, place_of_pair, weights, logits, shared, residual, out, filled, N, D: tl.constexpr,
    TOP_K: tl.constexpr, GATE: tl.constexpr, HAS_SHARED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the outputs of each row's experts with their weights, in the order of slots. out [rows,
    D] bf16.

    The shared expert, times its sigmoid gate, and the residual are added if they are there. by_pair
    [rows * TOP_K, D] bf16 is sorted by expert. place_of_pair [rows * TOP_K] int32 is the place of
    each pair in it. weights [rows, TOP_K] fp32; shared, residual [rows, D] bf16; logits [rows, N]
    fp32, whose column GATE is the shared expert's gate. filled: as in `choose`. Grid (rows, D / BLOCK
    rounded up).
    """
    rows = tl.load(filled)
    if tl.program_id(0) >= rows:
        return
    line = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = bounded(tl.load(place_of_pair + line * TOP_K + slot), rows.to(tl.int64) * TOP_K)
        share = tl.load(weights + line * TOP_K + slot)
        total += share * tl.load(by_pair + pair * D + d, mask=d < D, other=0.0).to(tl.float32)
    if HAS_SHARED:
        gate = tl.load(logits + line * N + GATE).to(tl.bfloat16).to(tl.float32)
        opened = 1 / (1 + tl.exp(-gate))
        total += opened * tl.load(shared + line * D + d, mask=d < D, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + line * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + line * D + d, total.to(tl.bfloat16), mask=d < D)
