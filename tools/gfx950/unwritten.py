"""Finds reads of registers that nothing has written.

For most reads an analysis of the loaded kernel proves that the register has been written in all active
lanes, on all paths through the code. It follows EXEC and the masks in SGPRs, with facts about the lanes
in them. The remaining reads are checked while the kernel runs, lane by lane.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import EmulatorError, Instruction, Program
from tools.gfx950.effects import BANKS, SCALARS, Effects, names_of
from tools.gfx950.flow import Block, blocks_of, facts
from tools.gfx950.operands import Operand, parse_operand, register
from tools.gfx950.registry import Action, plain
from tools.gfx950.vector import LANE, dpp_permutation
from tools.gfx950.waves import EXEC, Waves

EVERYTHING = (1 << 1200) - 1


@dataclass(frozen=True)
class Lanes:
    """Facts about the lanes of a mask. written: a set of registers that are written in each of them.
    all: whether the mask has all 64 lanes."""

    written: int
    all: bool = False


@dataclass(frozen=True)
class Known:
    """Facts that hold on all paths to an instruction.

    everywhere: the registers that are written in all lanes, with SGPRs and SCC.
    active: the facts about the lanes of EXEC.
    masks: those about the lanes of masks in pairs of SGPRs, by the number of the first SGPR.
    """

    everywhere: int
    active: Lanes
    masks: dict[int, Lanes] = field(default_factory=dict)

    def joined(self, other: "Known") -> "Known":
        everywhere = self.everywhere & other.everywhere
        both = self.masks.keys() & other.masks.keys()
        return Known(
            everywhere,
            self._common(self.active, other, other.active),
            {pair: self._common(self.masks[pair], other, other.masks[pair]) for pair in both},
        )

    def _common(self, mine: Lanes, other: "Known", others: Lanes) -> Lanes:
        written = (mine.written | self.everywhere) & (others.written | other.everywhere)
        return Lanes(written, mine.all and others.all)

    def without(self, registers: int) -> "Known":
        """The same, but these registers may be unwritten anywhere."""
        masks = {
            pair: replace(lanes, written=lanes.written & ~registers)
            for pair, lanes in self.masks.items()
        }
        active = replace(self.active, written=self.active.written & ~registers)
        return Known(self.everywhere & ~registers, active, masks)

    def of(self, operand: Operand) -> Lanes:
        """The facts about the lanes of a mask that an operand holds."""
        if operand.kind == "constant" and operand.value == 0:
            return Lanes(EVERYTHING)
        if operand.kind == "constant" and operand.value == -1:
            return Lanes(self.everywhere, True)
        if operand.kind == "s" and operand.index == EXEC:
            return self.active
        found = self.masks.get(operand.index) if operand.kind == "s" else None
        return found or Lanes(self.everywhere)


def possible(program: Program, every: Sequence[Effects], first: int) -> dict[int, int]:
    """The registers that an instruction may read before anything has written them, as a set by the
    instruction's index.

    every: the effects of each instruction. first: the registers that are written at the start.
    """
    code = program.instructions
    blocks = blocks_of(program)
    found: dict[int, int] = {}

    def through(block: Block, known: Known, *, collect: bool = False) -> Known:
        for i in range(block.start, block.end):
            what = every[i]
            if collect:
                written = known.everywhere
                if what.lanes in ("active", "first"):
                    written |= known.active.written
                if open_ := what.reads & ~written:
                    found[i] = open_
            if what.writes:
                known = _after(code[i], what, known)
        return known

    before = facts(blocks, Known(first, Lanes(first, True)), through, Known.joined)
    for i in sorted(before):
        through(blocks[i], before[i], collect=True)
    return found


def _after(instruction: Instruction, what: Effects, known: Known) -> Known:
    """The facts after an instruction that writes registers."""
    written = what.writes & ~what.kept if _skips_lanes(instruction) else what.writes
    if what.passed & ~(known.everywhere | known.active.written):
        written &= ~what.onto
        known = known.without(what.onto)
    everywhere = known.everywhere | (written & SCALARS)
    if what.lanes == "all" or (what.lanes == "active" and known.active.all):
        everywhere |= written
    active = known.active
    if what.lanes != "one":
        active = replace(active, written=active.written | written)
    scalars = what.writes >> BANKS["s"] & ((1 << 128) - 1)
    known = Known(everywhere, active, known.masks)
    return _with_masks(instruction, scalars, known) if scalars else known


def _skips_lanes(instruction: Instruction) -> bool:
    """Whether DPP or v_writelane leaves lanes as they are."""
    return instruction.mnemonic.endswith("_dpp") or plain(instruction.mnemonic) == "v_writelane_b32"


def _with_masks(instruction: Instruction, scalars: int, known: Known) -> Known:
    """The facts after an instruction that writes these SGPRs, some of which may be masks."""
    new = _masks(instruction, known)
    active = known.active
    if scalars >> EXEC & 3:
        active = new.pop(EXEC, Lanes(known.everywhere))
        active = replace(active, written=active.written | known.everywhere)
    masks = {pair: lanes for pair, lanes in known.masks.items() if not scalars >> pair & 3}
    return Known(known.everywhere, active, masks | new)


def _masks(instruction: Instruction, known: Known) -> dict[int, Lanes]:
    """The facts about the masks that an instruction computes, by the number of the first SGPR."""
    mnemonic = plain(instruction.mnemonic)
    if mnemonic.startswith("v_cmp"):  # its lanes are among the active ones
        lanes = replace(known.active, all=False)
        pair = parse_operand(instruction.operands[0]).index
        return {pair: lanes} | ({EXEC: lanes} if mnemonic.startswith("v_cmpx") else {})
    if not mnemonic.endswith("_b64") or not mnemonic.startswith("s_"):
        return {}
    destination, *sources = (parse_operand(text) for text in instruction.operands)
    given = [known.of(operand) for operand in sources]
    name = mnemonic.removeprefix("s_").removesuffix("_b64")
    if name.endswith("_saveexec"):
        made = _combined(name.removesuffix("_saveexec"), [given[0], known.active])
        return {destination.index: known.active, EXEC: made or Lanes(known.everywhere)}
    made = _combined(name, given)
    return {destination.index: made} if made else {}


def _combined(name: str, given: list[Lanes]) -> Lanes | None:
    """The facts about the result of an operation on masks. None for operations that are not followed."""
    if name == "mov":
        return given[0]
    if len(given) != 2:
        return None
    a, b = given
    if name == "and":
        return Lanes(a.written | b.written, a.all and b.all)
    if name == "andn2":
        return Lanes(a.written)
    if name in ("or", "cselect"):
        whole = (a.all or b.all) if name == "or" else (a.all and b.all)
        return Lanes(a.written & b.written, whole)
    if name == "xor":
        return Lanes(a.written & b.written)
    return None


# ---- while a kernel runs


def watched(
    program: Program,
    every: Sequence[Effects],
    actions: Sequence[Action | None],
    first: int,
) -> tuple[list[Action | None], dict[int, Action], list[bool]]:
    """Add checks of the reads in `possible` to the actions of a kernel.

    Returns the actions; the checks for branches, whose action is None, by their index; and for each
    watched register, which has a row of `Waves.written`, whether it is written at the start.
    """
    reads = possible(program, every, first)
    registers = 0
    for read in reads.values():
        registers |= read
    rows = {name: i for i, name in enumerate(_bits(registers))}
    found, checks = list(actions), {}
    for i, (instruction, what) in enumerate(zip(program.instructions, every, strict=True)):
        read, write = reads.get(i, 0), what.writes & registers
        if not read and not write:
            continue
        passed = rows[_bits(read & what.passed)[0]] if read & what.passed else None
        read &= ~what.passed
        check = _check(instruction, what, {bit: rows[bit] for bit in _bits(read)}) if read else None
        action = actions[i]
        if action is None:
            if check:
                checks[i] = check
            continue
        mark = None
        if write:
            mark = _mark(instruction, what, {bit: rows[bit] for bit in _bits(write)}, passed)
        found[i] = _around(check, action, mark)
    return found, checks, [bool(first >> bit & 1) for bit in rows]


def _bits(registers: int) -> list[int]:
    return [bit for bit in range(registers.bit_length()) if registers >> bit & 1]


def _around(check: Action | None, action: Action, mark: Action | None) -> Action:
    def run(waves: Waves) -> None:
        if check:
            check(waves)
        if mark:
            mark(waves)  # before the action, which may change EXEC
        action(waves)

    return run


def _lanes(instruction: Instruction, what: Effects) -> Callable[[Waves], NDArray[np.bool_]]:
    """The lanes, [W, 64] or [1, 1], whose vector registers an instruction reads or writes."""
    if what.lanes == "all":
        return lambda waves: np.ones((1, 1), bool)
    if what.lanes == "first":
        return lambda waves: np.argmax(waves.active, axis=1)[:, None] == LANE
    if what.lanes == "one":
        read_lane = register(parse_operand(instruction.operands[2]))
        return lambda waves: (read_lane(waves)[:, :1] & 63) == LANE
    return lambda waves: waves.active


def _check(instruction: Instruction, what: Effects, rows: dict[int, int]) -> Action:
    lanes = _lanes(instruction, what)
    scalars = np.array([bool(1 << bit & SCALARS) for bit in rows])[:, None, None]
    names, places = [names_of(1 << bit)[0] for bit in rows], np.array(list(rows.values()))

    def check(waves: Waves) -> None:
        wrong = ~waves.written[places] & (scalars | lanes(waves))
        if wrong.any():
            which, _, lane = np.argwhere(wrong)[0]
            where = "" if scalars[which, 0, 0] else f" in lane {lane}"
            raise EmulatorError(f"a read of {names[which]}, which nothing has written{where}")

    return check


def _mark(
    instruction: Instruction, what: Effects, rows: dict[int, int], passed: int | None
) -> Action:
    """An action that notes what an instruction writes. passed: the row of the register in
    `Effects.passed`, if it may be unwritten."""
    lanes = _lanes(instruction, what)
    if instruction.mnemonic.endswith("_dpp"):
        lanes = dpp_permutation(instruction).writes
    places = list(rows.items())

    def mark(waves: Waves) -> None:
        for bit, row in places:
            here = np.ones((1, 1), bool) if 1 << bit & SCALARS else lanes(waves)
            if passed is not None and 1 << bit & what.onto:
                waves.written[row] &= ~here | waves.written[passed]
                here = here & waves.written[passed]
            waves.written[row] |= here

    return mark
