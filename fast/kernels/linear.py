"""Products of a few rows with a matrix, with the norm before them and the residual after them.

A norm has no launch of its own. A kernel that writes rows x for a norm also writes them scaled, x * (1 +
w) in bf16, and the sum of x^2 of each block of columns. The product that follows reads the scaled rows
and multiplies its sums by 1 / rms(x) at the end.
"""

import triton
import triton.language as tl


@triton.jit
def inverse_rms(squares, width, eps, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """1 / sqrt(mean of x^2 + eps) for rows of `width` numbers, [ROWS] fp32. squares [PARTS, ROWS] fp32:
    the rows' sums of x^2 over parts of the columns."""
    part = tl.arange(0, triton.next_power_of_2(PARTS))[:, None]
    place = part * ROWS + tl.arange(0, ROWS)[None, :]
    sums = tl.load(squares + place, mask=part < PARTS, other=0.0, cache_modifier=".cg")
    return tl.rsqrt(tl.sum(sums, 0) / width + eps)


@triton.jit
def store_scaled(value, next_norm, scaled, squares, block, row, n, inside, N, ROWS: tl.constexpr):
    """Write the scaled rows and the squares that a norm needs. value [BLOCK_N, ROWS] fp32: columns n
    [BLOCK_N, 1] of rows of N."""
    kept = tl.where(inside, value.to(tl.bfloat16).to(tl.float32), 0.0)
    factor = 1 + tl.load(next_norm + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(scaled + row * N + n, (kept * factor).to(tl.bfloat16), mask=inside)
    tl.store(squares + block * ROWS + tl.arange(0, ROWS), tl.sum(kept * kept, 0))


@triton.jit(do_not_specialize=["rows"])
def linear(
    x, squares, weight, residual, out, next_norm, scaled, out_squares, start, rows, N, eps,
    K: tl.constexpr, PARTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NEXT: tl.constexpr,
    ACTIVATED: tl.constexpr, RING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """out[row, n] = (residual[row, n] +) sum over k of x[row, k] * weight[n, k].

    x [rows, K] bf16, weight [N, K] bf16, residual [rows, N] bf16. Written: out [rows, N] bf16.
    PARTS > 0: x is the scaled rows of a norm, and squares [PARTS, ROWS] fp32 are their sums of x^2.
    HAS_NEXT: scaled [rows, N] bf16 and out_squares [N / BLOCK_N, ROWS] fp32 are written for the norm that
    follows, whose weight is next_norm [N] bf16.
    ACTIVATED: rows 2 i and 2 i + 1 of weight are a gate and an up; out [rows, N / 2] is silu(gate) * up.
    RING > 0: out is [RING, N], and a row is written at (start[0] + row) modulo RING.
    A row's bits do not depend on the other rows. Grid (N / BLOCK_N rounded up).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    # A last block that is not full reads the last row again, and does not store that result.
    weights = weight + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    inputs = x + row[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for offset in tl.range(0, K, BLOCK_K):
        w = tl.load(weights + offset)
        columns = tl.load(inputs + offset, mask=row[None, :] < rows, other=0.0)
        acc = tl.dot(w, columns, acc)
    if PARTS > 0:
        acc *= inverse_rms(squares, K, eps, PARTS, ROWS)[None, :]
    if ACTIVATED:
        gate, up = acc.reshape(BLOCK_N // 2, 2, ROWS).permute(0, 2, 1).split()
        hidden = gate / (1 + tl.exp(-gate)) * up  # [BLOCK_N/2, ROWS]
        i = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[:, None]
        inside = (i < N // 2) & (row[None, :] < rows)
        tl.store(out + row[None, :] * (N // 2) + i, hidden.to(tl.bfloat16), mask=inside)
    else:
        column, line = n[:, None], row[None, :]
        inside = (column < N) & (line < rows)
        if HAS_RESIDUAL:
            acc += tl.load(residual + line * N + column, mask=inside, other=0.0).to(tl.float32)
        if RING:
            line = ((tl.load(start) + row) % RING)[None, :]
        tl.store(out + line * N + column, acc.to(tl.bfloat16), mask=inside)
        if HAS_NEXT:
            block = tl.program_id(0)
            store_scaled(acc, next_norm, scaled, out_squares, block, line, column, inside, N, ROWS)
