"""The control flow of a kernel: its basic blocks, and facts that hold at their beginnings."""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TypeVar

from tools.gfx950.assembly import Program

State = TypeVar("State")


@dataclass(frozen=True)
class Block:
    """The instructions from `start` to `end` - 1, which are executed one after the other. next: the
    indices of the blocks that may follow."""

    start: int
    end: int
    next: tuple[int, ...]


def blocks_of(program: Program) -> tuple[Block, ...]:
    """The basic blocks in the order of the text. A branch to the end of the code leads to no block."""
    code, labels = program.instructions, program.labels
    starts = {0, *labels.values()}
    for i, instruction in enumerate(code):
        if instruction.mnemonic.startswith(("s_branch", "s_cbranch", "s_endpgm")):
            starts.add(i + 1)
    edges = sorted(start for start in starts if start < len(code))
    index = {start: i for i, start in enumerate(edges)}
    blocks: list[Block] = []
    for start, end in zip(edges, [*edges[1:], len(code)], strict=True):
        last = code[end - 1]
        follows: list[int] = []
        if not last.mnemonic.startswith(("s_branch", "s_endpgm")):
            follows.append(end)
        if last.mnemonic.startswith(("s_branch", "s_cbranch")):
            follows.append(labels[last.operands[0]])
        blocks.append(Block(start, end, tuple({index[f]: None for f in follows if f in index})))
    return tuple(blocks)


def facts(
    blocks: tuple[Block, ...],
    first: State,
    through: Callable[[Block, State], State],
    joined: Callable[[State, State], State],
) -> dict[int, State]:
    """The facts that hold at the beginning of each block, on all paths to it, by the block's index.
    Unreachable blocks are left out.

    first: the facts at the beginning of the kernel.
    through: the facts after a block, from those before it.
    joined: the facts that hold where two paths meet. It may only remove facts, and there are finitely
        many, so the iteration ends.
    """
    before = {0: first}
    waiting = [0]
    while waiting:
        place = heappop(waiting)  # the first in the text, as most blocks before it are then done
        after = through(blocks[place], before[place])
        for follower in blocks[place].next:
            new = after
            if follower in before:
                new = joined(before[follower], after)
                if new == before[follower]:
                    continue
            before[follower] = new
            if follower not in waiting:
                heappush(waiting, follower)
    return before
