"""From token ids to the first rows of the trunk and of the MTP head."""

import triton
import triton.language as tl

from fast.kernels.common import bounded


@triton.jit
def _token(ids, row, vocab):
    """A token id from memory, limited to the vocabulary, so that no address leaves the table."""
    return bounded(tl.load(ids + row), vocab).to(tl.int64)


@triton.jit
def embed(
    table, ids, out, next_norm, scaled, squares, vocab,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[row] = table[ids[row]], and its scaled rows and squares for the norm that follows
    (kernels/linear.py).

    table [vocab, D] bf16, ids [rows] int32, next_norm [D] bf16. Written: out and scaled [rows, D] bf16,
    squares [1, ROWS] fp32. Grid (rows).
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(table + _token(ids, row, vocab) * D + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    factor = 1 + tl.load(next_norm + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, value, mask=inside)
    tl.store(scaled + row * D + column, (wide * factor).to(tl.bfloat16), mask=inside)
    tl.store(squares + row, tl.sum(wide * wide, 0))


@triton.jit(do_not_specialize=["first"])
def embed_part(table, ids, out, first, count, D: tl.constexpr, BLOCK: tl.constexpr):
    """`embed` of a rank whose table [count, D] bf16 begins at id `first`: out[row] = table[ids[row] -
    first], or zeros where another rank has that id. Without a norm. Grid (rows)."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    own = tl.load(ids + row) - first
    there = (own >= 0) & (own < count) & (column < D)
    value = tl.load(table + bounded(own, count).to(tl.int64) * D + column, mask=there, other=0.0)
    tl.store(out + row * D + column, value, mask=column < D)


@triton.jit
def mtp_input(
    table, ids, hidden, embedding_norm, hidden_norm, out, vocab, eps, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[row] = the normalised embedding of ids[row], followed by the normalised hidden[row].

    table [vocab, D] bf16, ids [rows] int32, hidden [rows, D] bf16; both norms multiply by 1 + weight,
    [D] bf16. Written: out [rows, 2 D] bf16. Grid (rows, 2), a program for each half.
    """
    row, half = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < D
    if half == 0:
        value = tl.load(table + _token(ids, row, vocab) * D + column, mask=inside, other=0.0)
        factor = tl.load(embedding_norm + column, mask=inside, other=0.0)
    else:
        value = tl.load(hidden + row * D + column, mask=inside, other=0.0)
        factor = tl.load(hidden_norm + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    normed = wide * scale * (1 + factor.to(tl.float32))
    tl.store(out + (row * 2 + half) * D + column, normed.to(tl.bfloat16), mask=inside)
