"""The blocks of a kernel, and what holds at their beginnings."""

from tools.gfx950.assembly import Program, parse
from tools.gfx950.flow import Block, blocks_of, facts


def program(text: str) -> Program:
    lines = "\n".join(line if line.endswith(":") else f"\t{line}" for line in text.splitlines())
    return parse(f"k:\n{lines}\n", "k")


def test_blocks_end_at_branches_and_labels() -> None:
    """What follows a jump or the end of the program is a block that nothing leads to."""
    text = """s_cbranch_scc1 .L1
s_branch .L2
s_nop 0
.L1:
s_endpgm
s_nop 1
.L2:
s_cbranch_scc0 .L2
s_endpgm"""
    assert blocks_of(program(text)) == (
        Block(0, 1, (1, 3)),
        Block(1, 2, (5,)),
        Block(2, 3, (3,)),
        Block(3, 4, ()),
        Block(4, 5, (5,)),
        Block(5, 6, (6, 5)),
        Block(6, 7, ()),
    )


def test_a_branch_may_lead_to_the_next_instruction_or_to_the_end() -> None:
    text = "s_cbranch_scc1 .L1\n.L1:\ns_cbranch_scc0 .L2\ns_nop 0\n.L2:"
    assert blocks_of(program(text)) == (Block(0, 1, (1,)), Block(1, 2, (2,)), Block(2, 3, ()))


def test_facts_hold_on_all_paths() -> None:
    """A way that leads back takes facts away. A block is done after all those before it in the text."""
    text = """s_nop 0
.L1:
s_cbranch_scc1 .L2
s_nop 1
s_branch .L3
.L2:
s_nop 2
.L3:
s_cbranch_scc0 .L1
s_endpgm
s_nop 3"""
    blocks = blocks_of(program(text))
    visited: list[int] = []

    def through(block: Block, state: frozenset[int]) -> frozenset[int]:
        visited.append(block.start)
        return state - {0} | {block.start} if block.start == 4 else state | {block.start}

    before = facts(blocks, frozenset({0}), through, frozenset.intersection)
    starts = {blocks[i].start: set(state) for i, state in before.items()}
    assert starts == {0: {0}, 1: set(), 2: {1}, 4: {1}, 5: {1}, 6: {1, 5}}
    assert visited == [0, 1, 2, 4, 5, 1, 2, 4, 6]
