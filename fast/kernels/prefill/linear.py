"""Matrix products of many rows with a bf16 weight.

Each sum runs along K in blocks of a fixed size. Therefore the bits of a row depend neither on the
number of rows nor on its position among them.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(program, rows, N, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of rows and the block of columns of a program.

    Programs go through GROUP blocks of rows one column block at a time, so the weights of a column block
    are still in the last-level cache when the next block of rows reads them.
    """
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * column_blocks)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = program % (GROUP * column_blocks)
    return first + inside % size, inside // size


@triton.jit
def linear(
    x, weight, residual, out, filled, N, K: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATED: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[row, n] = (residual[row, n] +) sum over k of x[row, k] * weight[n, k].

    x [rows, K] bf16, weight [N, K] bf16, residual [rows, N] bf16 -> out [rows, N] bf16 or fp32. filled
    [1] int32 is the number of rows; the arrays may have room for more.
    ACTIVATED: rows 2 i and 2 i + 1 of weight are a gate and an up, and out [rows, N / 2] is
    silu(gate) * up. Grid ((rows / BLOCK_M rounded up) * (N / BLOCK_N rounded up)).
    """
    rows = tl.load(filled)
    if tl.program_id(0) >= tl.cdiv(rows, BLOCK_M) * tl.cdiv(N, BLOCK_N):
        return
    block, column_block = tile_of(  # pyright: ignore
        tl.program_id(0), rows, N, GROUP, BLOCK_M, BLOCK_N
    )
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Indices beyond the last row or column read the last one again; the store masks them.
    inputs = x + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * K + k[None, :]
    weights = weight + tl.minimum(n, N - 1)[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for offset in tl.range(0, K, BLOCK_K):
        if K % BLOCK_K:
            is_k = offset + k < K
            a = tl.load(inputs + offset, mask=is_k[None, :], other=0.0)
            b = tl.load(weights + offset, mask=is_k[:, None], other=0.0)
        else:
            a, b = tl.load(inputs + offset), tl.load(weights + offset)
        acc = tl.dot(a, b, acc)
    line = row[:, None].to(tl.int64)
    if ACTIVATED:
        gate, up = acc.reshape(BLOCK_M, BLOCK_N // 2, 2).split()
        hidden = gate / (1 + tl.exp(-gate)) * up  # [BLOCK_M, BLOCK_N/2]
        i = (column_block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2))[None, :]
        inside = (line < rows) & (i < N // 2)
        tl.store(out + line * (N // 2) + i, hidden.to(out.dtype.element_ty), mask=inside)
    else:
        inside = (line < rows) & (n[None, :] < N)
        place = line * N + n[None, :]
        if HAS_RESIDUAL:
            acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)
