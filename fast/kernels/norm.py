"""The RMS norm as a launch of its own, for rows that more than one product reads."""

import triton
import triton.language as tl


@triton.jit
def norm(x, weight, out, count, eps, D: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = x[row] / rms(x[row]) * (1 + weight), x [rows, D] bf16, weight [D] bf16, out bf16.

    Grid (rows). LAST: out has a single row, the norm of row count[0] - 1 of x; count [1] int32, grid (1).
    """
    row = tl.program_id(0).to(tl.int64)
    source = row
    if LAST:
        source = tl.load(count).to(tl.int64) - 1
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(x + source * D + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    factor = 1 + tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, (value * scale * factor).to(tl.bfloat16), mask=inside)
