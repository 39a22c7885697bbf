"""The sum of all ranks' results, and the exchange of small tensors, over memory that the ranks share.

Every rank has slots for packets in its own memory, and the addresses of the other ranks' slots. A packet
is one 64-bit number: 32 bits of data below the epoch, so that a rank sees in the packet itself whether it
has arrived, and no flag has to travel behind the data. A rank writes its packets into a slot of every
rank, and waits for those of all ranks in its own slots (one-shot).

A program uses the same slots in every launch, two of them in turn, and counts its epochs by itself.
A slot is written again two epochs later. Every rank has read it by then: the writer has meanwhile got the
other ranks' packets of the epoch between, which they send after they have read the slot.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip


@triton.jit
def _row(x, row, N):
    """Pointers to pairs of bf16, as 32-bit words, of a row of N numbers."""
    return x.to(tl.pointer_type(tl.int32), bitcast=True) + row.to(tl.int64) * (N // 2)


@triton.jit
def _wide(words):
    """The two bf16 of each word in fp32: the one at the lower address, then the other."""
    low = (words << 16).to(tl.float32, bitcast=True)
    return low, (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _packed(low, high):
    """Two fp32 as one word of two bf16."""
    low = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    return low | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _write(pointers, packets):
    """Store packets so that other cards see them. They need no order among each other."""
    # For gfx950 Triton makes buffer instructions of both accesses, and drops that a load is volatile:
    # LLVM then reads memory once, before the loop that waits.
    if is_hip():
        tl.inline_asm_elementwise(
            "global_store_dwordx2 $1, $2, off sc0 sc1\n\tv_mov_b32 $0, 0", "=v,v,v,~{memory}",
            [pointers.to(tl.int64), packets], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(pointers, packets, cache_modifier=".wt")


@triton.jit
def _read(pointers):
    """Packets that other cards may write at any time, as they are in memory now."""
    if is_hip():
        return tl.inline_asm_elementwise(
            "global_load_dwordx2 $0, $1, off sc0 sc1\n\ts_waitcnt vmcnt(0)", "=&v,v,~{memory}",
            [pointers.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505 (Triton compiles only one of the two)
        return tl.load(pointers, volatile=True)


@triton.jit
def _send(words, addresses, place, epoch, rank, RANKS: tl.constexpr, PACKETS: tl.constexpr):
    """Write words [PACKETS] int32 as packets into a slot of every rank. place: the first packet of the
    slots [RANKS, PACKETS] of this program and epoch."""
    packets = (epoch.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(RANKS):  # pyright: ignore
        # Triton refuses pointers into the memory of another card as arguments, but not integers. Those
        # that fit into 32 bits arrive with 32, so they are converted.
        slots = addresses[peer].to(tl.int64).to(tl.pointer_type(tl.int64)) + place
        _write(slots + rank * PACKETS + tl.arange(0, PACKETS), packets)


@triton.jit
def _received(own, place, epoch, RANKS: tl.constexpr, PACKETS: tl.constexpr):
    """Wait for the packets of all ranks. Returns their words, [RANKS, PACKETS] int32."""
    lane = tl.arange(0, RANKS)[:, None] * PACKETS + tl.arange(0, PACKETS)[None, :]
    packets = _read(own + place + lane)
    while tl.max(((packets >> 32).to(tl.int32) != epoch).to(tl.int32)) != 0:
        packets = _read(own + place + lane)
    return packets.to(tl.int32)


@triton.jit
def _ordered_sum(words, RANKS: tl.constexpr):
    """The sum over all ranks from rank 0 upwards, in fp32, of words [RANKS, P] of two bf16 each: the sums
    [P] of the lower numbers, and of the others."""
    sender = tl.arange(0, RANKS)[:, None]
    low, high = _wide(tl.sum(tl.where(sender == 0, words, 0), 0))  # pyright: ignore
    for rank in tl.static_range(1, RANKS):  # pyright: ignore
        more_low, more_high = _wide(  # pyright: ignore
            tl.sum(tl.where(sender == rank, words, 0), 0)
        )
        low += more_low
        high += more_high
    return low, high


@triton.jit
def _beside(residual, next_norm, row, pair, D, HAS_RESIDUAL: tl.constexpr, HAS_NEXT: tl.constexpr):
    """The words that `_finish` needs: the residual of a block of a row, and the norm's weights. They are
    read before a program waits."""
    before = pair
    if HAS_RESIDUAL:
        before = tl.load(_row(residual, row, D) + pair)
    gain = pair
    if HAS_NEXT:
        gain = tl.load(_row(next_norm, row * 0, D) + pair)
    return before, gain


@triton.jit
def _finish(
    low, high, before, gain, out, scaled, out_squares, row, block, pair, D,
    HAS_RESIDUAL: tl.constexpr, HAS_NEXT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the residual, round once, and write a block of a row; HAS_NEXT as in kernels/linear.py."""
    if HAS_RESIDUAL:
        before_low, before_high = _wide(before)  # pyright: ignore
        low += before_low
        high += before_high
    words = _packed(low, high)
    tl.store(_row(out, row, D) + pair, words)
    if HAS_NEXT:
        low, high = _wide(words)
        gain_low, gain_high = _wide(gain)
        tl.store(_row(scaled, row, D) + pair, _packed(low * (1 + gain_low), high * (1 + gain_high)))
        tl.store(out_squares + block * ROWS + row, tl.sum(low * low + high * high, 0))


@triton.jit(do_not_specialize=["rank"])
def allreduce(
    part, own, addresses, epochs, residual, out, next_norm, scaled, out_squares, rank, D,
    HAS_RESIDUAL: tl.constexpr, HAS_NEXT: tl.constexpr, RANKS: tl.constexpr, PACKETS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """out[row] = (residual[row] +) the sum of part[row] over all ranks, in their order, rounded once.

    part, residual [rows, D] bf16. own: this rank's slots, int64 [programs, 2, RANKS, PACKETS]. addresses:
    a tuple of those of all ranks' slots. Written: out [rows, D] bf16, epochs [programs] int32, and
    packets in the slots.
    HAS_NEXT: scaled [rows, D] bf16 and out_squares [D / (2 PACKETS), ROWS] fp32 are written for the norm
    that follows, whose weight is next_norm [D] bf16. D is a multiple of 2 PACKETS. A row's bits do not
    depend on the other rows. Grid (rows, D / (2 PACKETS)).
    """
    row, block = tl.program_id(0), tl.program_id(1)
    program = row * tl.num_programs(1) + block
    pair = block * PACKETS + tl.arange(0, PACKETS)
    epoch = tl.load(epochs + program) + 1
    place = (program * 2 + epoch % 2).to(tl.int64) * (RANKS * PACKETS)
    words = tl.load(_row(part, row, D) + pair)
    _send(words, addresses, place, epoch, rank, RANKS, PACKETS)
    before, gain = _beside(residual, next_norm, row, pair, D, HAS_RESIDUAL, HAS_NEXT)
    received = _received(own, place, epoch, RANKS, PACKETS)
    tl.store(epochs + program, epoch)
    low, high = _ordered_sum(received, RANKS)
    _finish(
        low, high, before, gain, out, scaled, out_squares, row, block, pair, D, HAS_RESIDUAL, HAS_NEXT,
        ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def add(
    parts, residual, out, next_norm, scaled, out_squares, rows, D,
    HAS_RESIDUAL: tl.constexpr, HAS_NEXT: tl.constexpr, RANKS: tl.constexpr, PACKETS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`allreduce` of results that are all here already: parts [RANKS, rows, D] bf16. The bits are the
    same."""
    row, block = tl.program_id(0), tl.program_id(1)
    pair = block * PACKETS + tl.arange(0, PACKETS)
    sender = tl.arange(0, RANKS)[:, None]
    received = tl.load(_row(parts, sender * rows + row, D) + pair[None, :])
    before, gain = _beside(residual, next_norm, row, pair, D, HAS_RESIDUAL, HAS_NEXT)
    low, high = _ordered_sum(received, RANKS)
    _finish(
        low, high, before, gain, out, scaled, out_squares, row, block, pair, D, HAS_RESIDUAL, HAS_NEXT,
        ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rank", "words"])
def gather(
    x, own, addresses, epochs, out, rank, words, rows, RANKS: tl.constexpr, PACKETS: tl.constexpr
):  # fmt: skip
    """out[row] = x[row] of all ranks, one after the other in their order.

    x [rows, words] int32, out [rows, RANKS * words] int32; the others as in `allreduce`. Grid (programs):
    each takes every programs-th block of PACKETS words of x.
    """
    program = tl.program_id(0)
    lane, sender = tl.arange(0, PACKETS), tl.arange(0, RANKS)[:, None]
    epoch = tl.load(epochs + program)
    for first in tl.range(program * PACKETS, rows * words, tl.num_programs(0) * PACKETS):  # pyright: ignore
        epoch += 1
        place = (program * 2 + epoch % 2).to(tl.int64) * (RANKS * PACKETS)
        at = first + lane
        there = at < rows * words
        sent = tl.load(x + at, mask=there, other=0)
        _send(sent, addresses, place, epoch, rank, RANKS, PACKETS)
        received = _received(own, place, epoch, RANKS, PACKETS)
        row, column = at // words, at % words
        target = (row[None, :] * RANKS + sender) * words + column[None, :]
        tl.store(out + target, received, mask=there[None, :])
    tl.store(epochs + program, epoch)
