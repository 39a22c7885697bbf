"""A kernel with every kind of parameter."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def copy(x, out, rows, N, factor, BLOCK: tl.constexpr):
    """out[row, n] = factor * x[row, n] of arrays [rows, N]. Grid (rows)."""
    row = tl.program_id(0)
    for first in tl.range(0, N, BLOCK):  # pyright: ignore
        n = first + tl.arange(0, BLOCK)
        inside = (n < N) & (row < rows)
        tl.store(out + row * N + n, factor * tl.load(x + row * N + n, mask=inside), mask=inside)
