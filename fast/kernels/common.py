"""Functions of several kernels: safe indices, powers of two, stores for other programs, sums of parts."""

import triton
import triton.language as tl
from triton.language.target_info import is_hip


@triton.jit
def bounded(index, count):
    """An index from memory, limited to 0 .. count - 1, so that no address leaves an array."""
    return tl.minimum(tl.maximum(index, 0), count - 1)


@triton.jit
def from_e8m0(exponent):
    """2^(exponent - 127) in fp32. exponent: uint8 or int32, 1 to 254."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def stored():
    """A barrier after which other programs may be told to read what this program has stored.

    On gfx950 the compiler makes only one wave wait for its stores, the one that tells the other programs.
    This makes all waves wait for theirs.
    """
    if is_hip():
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v,~{memory}", [tl.arange(0, 64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def summed(parts, row, column, mask, rows, N, SPLITS: tl.constexpr):
    """The sum over SPLITS, in order, of some rows and columns of parts [SPLITS, rows, N] fp32."""
    total = tl.load(parts + row * N + column, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):  # pyright: ignore
        pointers = parts + (split * rows + row) * N + column
        total += tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
    return total
