"""From hidden states to tokens: the logits, the likeliest token, and which drafts are accepted."""

import triton
import triton.language as tl

NOT_FINITE = tl.constexpr(-1)  # the `place` of a block in which a logit is NaN or plus infinity


@triton.jit(do_not_specialize=["rows"])
def head(
    x, weight, logits, best, place, rows, N, vocab,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """logits[row, n] = sum over k of x[row, k] * weight[n, k], and the largest logit of each block.

    x [rows, K] bf16, weight [N, K] bf16. Written: logits [rows, N] bf16; best [blocks, ROWS] fp32, the
    largest logit of a block's BLOCK_N ids, those from `vocab` on left out; place [blocks, ROWS] int32,
    the lowest id that has it, or NOT_FINITE. Grid (N / BLOCK_N rounded up).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    weights = weight + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    inputs = x + row[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for offset in tl.range(0, K, BLOCK_K):
        columns = tl.load(inputs + offset, mask=row[None, :] < rows, other=0.0)
        acc = tl.dot(tl.load(weights + offset), columns, acc)
    rounded = acc.to(tl.bfloat16)
    inside = (n[:, None] < N) & (row[None, :] < rows)
    tl.store(logits + row[None, :].to(tl.int64) * N + n[:, None], rounded, mask=inside)
    value = rounded.to(tl.float32)
    wrong = tl.sum((value < float("inf")).to(tl.int32), 0) < BLOCK_N  # [ROWS], NaN too
    candidate = tl.where(n[:, None] < vocab, value, float("-inf"))
    largest = tl.max(candidate, 0)
    first = tl.min(tl.where(candidate == largest[None, :], n[:, None], N), 0)
    at = tl.program_id(0) * ROWS + row
    tl.store(best + at, largest)
    tl.store(place + at, tl.where(wrong, NOT_FINITE, first))


@triton.jit(do_not_specialize=["first"])
def pick(
    best, place, tokens, largest, blocks, first, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    OF_PART: tl.constexpr,
):  # fmt: skip
    """tokens[row] = the lowest id that has the row's largest logit, or NOT_FINITE where a logit is NaN or
    plus infinity.

    best, place: rows of STRIDE numbers, one for each of `blocks` blocks, as `head` writes them. OF_PART:
    ids count from `first`, the first id of a rank, and largest[row] fp32, the largest logit, is written
    too. Grid (rows).
    """
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    value = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.full((BLOCK,), 0, tl.int32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, blocks, BLOCK):
        there = start + block < blocks
        at = (start + block) * STRIDE + row
        other = tl.load(best + at, mask=there, other=float("-inf"))
        found = tl.load(place + at, mask=there, other=0)
        wrong |= (found == NOT_FINITE).to(tl.int32)
        higher = other > value  # where two are equal, the earlier block's id stays
        value = tl.where(higher, other, value)
        token = tl.where(higher, found, token)
    highest = tl.max(value, 0)
    lowest = tl.min(tl.where(value == highest, token, 0x7FFFFFFF), 0)
    if OF_PART:
        lowest += first
        tl.store(largest + row, highest)
    tl.store(tokens + row, tl.where(tl.max(wrong, 0) > 0, NOT_FINITE, lowest))


@triton.jit
def accept(rows_ids, picked, fresh, starts, report, DRAFTS: tl.constexpr, BLOCK: tl.constexpr):
    """Keep the drafts that are the model's own tokens, and prepare the next round. One program.

    rows_ids [1 + DRAFTS] int32: the newest token, then the drafts. picked [1 + DRAFTS] int32: the token
    that the model chooses after each of them. Written: fresh [1], how many of `picked` are new tokens;
    starts [1 + DRAFTS], where the next passes begin, first the trunk's, then the MTP head's; rows_ids[0],
    the newest token; report [2 + DRAFTS], fresh and then picked.
    """
    i = tl.arange(0, BLOCK)
    own = tl.load(picked + i, mask=i <= DRAFTS, other=0)
    draft = tl.load(rows_ids + 1 + i, mask=i < DRAFTS, other=0)
    count = tl.min(tl.where((i >= DRAFTS) | (draft != own), i, DRAFTS), 0) + 1
    before = tl.load(starts)
    after = before + count
    tl.debug_barrier()
    # The MTP head stays one row behind: its first pass pairs each new token with the row before it.
    follows = tl.where(i == 0, after, tl.where(i == 1, before, after + i - 2))
    tl.store(starts + i, follows, mask=i <= DRAFTS)
    tl.store(rows_ids, tl.sum(tl.where(i == count - 1, own, 0), 0))
    tl.store(fresh, count)
    tl.store(report, count)
    tl.store(report + 1 + i, own, mask=i <= DRAFTS)
