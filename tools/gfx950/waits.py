"""Checks that a kernel waits for its loads, by the rules of s_waitcnt, on all paths through the code.

An instruction that accesses memory ends some time after it was issued. Until then a register that it
loads must be neither read nor written. The rules (CDNA3 ISA, 4.4):

vmcnt counts vector loads, stores and atomics, which end in the order in which they were issued. lgkmcnt
counts accesses of the LDS, which also end in order, and scalar loads, which end in any order. The two
kinds are not ordered relative to each other, so a scalar load has surely ended only when lgkmcnt is 0. A
store has read its data when it is issued, so no counter guards the registers with the data.

s_barrier does not wait for the wave's own accesses of the LDS, so an access must have ended before the
barrier that separates it from the accesses of other waves.

buffer_wbl2 makes earlier stores visible outside the cache. It must have ended before an atomic or a store
that tells others about these stores. (LLVM before its pull request 178316, and so Triton 3.7, does not
count a write-back, and leaves out this wait where no other access has yet to end.)

The check reads the text once, when a kernel is loaded. It follows all paths through the branches, also
those that no input takes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tools.gfx950.assembly import EmulatorError, Program
from tools.gfx950.effects import (
    COUNTERS,
    LARGEST,
    LDS,
    WRITE_BACK,
    Effects,
    counters_of,
    names_of,
)
from tools.gfx950.flow import Block, blocks_of, facts


@dataclass(frozen=True)
class Pending:
    """The registers that loads have not written yet, on any path to an instruction.

    vector, lds: a set for each of the latest instructions of this unit, the latest one first. A register
        is only in the first set that may contain it.
    scalar: the registers of all scalar loads.
    stored: whether there was a store after the last write-back.
    """

    vector: tuple[int, ...] = ()
    lds: tuple[int, ...] = ()
    scalar: int = 0
    stored: bool = False

    def all(self) -> int:
        found = self.scalar
        for registers in (*self.vector, *self.lds):
            found |= registers
        return found

    def issue(self, what: Effects) -> "Pending":
        started = what.writes | what.starts
        if what.starts == WRITE_BACK:
            started = WRITE_BACK * self.stored
        if what.unit == "scalar":
            return replace(self, scalar=self.scalar | started)
        if what.unit == "vector":
            vector = _begin(self.vector, started, LARGEST["vmcnt"])
            stored = what.stores or (self.stored and what.starts != WRITE_BACK)
            return replace(self, vector=vector, stored=stored)
        return replace(self, lds=_begin(self.lds, started, LARGEST["lgkmcnt"]))

    def wait(self, counters: dict[str, int]) -> "Pending":
        left = self
        if (count := counters.get("vmcnt", 63)) < LARGEST["vmcnt"]:
            left = replace(left, vector=_trimmed(left.vector[:count]))
        if (count := counters.get("lgkmcnt", 15)) < LARGEST["lgkmcnt"]:
            left = replace(left, lds=_trimmed(left.lds[:count]))
            if count == 0:
                left = replace(left, scalar=0)
        return left

    def joined(self, other: "Pending") -> "Pending":
        return Pending(
            _joined(self.vector, other.vector),
            _joined(self.lds, other.lds),
            self.scalar | other.scalar,
            self.stored or other.stored,
        )


def check(program: Program, every: Sequence[Effects]) -> None:
    """EmulatorError for the first instruction, in the order of the text, that does not wait.

    every: the effects of each instruction. The message names the kernel, the instruction and its place,
    the register, the load, and the s_waitcnt that is missing.
    """
    code = program.instructions
    waits = {
        i: counters_of(instruction)
        for i, instruction in enumerate(code)
        if instruction.mnemonic == "s_waitcnt"
    }
    blocks = blocks_of(program)

    def through(block: Block, state: Pending, *, complain: bool = False) -> Pending:
        pending = state.all()
        for i in range(block.start, block.end):
            what = every[i]
            if complain and pending:
                touched = what.reads | what.writes | what.ended
                if touched & pending and (wrong := touched & _too_early(what, state)):
                    raise _error(program, every, blocks, i, wrong & -wrong, state)
            if what.unit:
                state = state.issue(what)
            elif i in waits:
                state = state.wait(waits[i])
            else:
                continue
            pending = state.all()
        return state

    before = facts(blocks, Pending(), through, Pending.joined)
    for i in sorted(before):
        through(blocks[i], before[i], complain=True)


def _too_early(what: Effects, state: Pending) -> int:
    """The pending registers that an instruction must not access, but does. A load may have the
    destination of an earlier load of its own unit, if the unit keeps the order."""
    again = what.writes & ~what.reads
    found = state.scalar
    for unit, sets in (("vector", state.vector), ("lds", state.lds)):
        for registers in sets:
            found |= registers & ~again if unit == what.unit else registers
    return found


def _begin(sets: tuple[int, ...], registers: int, most: int) -> tuple[int, ...]:
    """The sets after one more instruction of a unit. The last set has the registers of all older
    instructions."""
    older = [before & ~registers for before in sets]
    if len(older) == most:
        last = older.pop()
        older[-1] |= last
    return (registers, *older)


def _trimmed(sets: tuple[int, ...]) -> tuple[int, ...]:
    """Remove empty sets at the end."""
    end = len(sets)
    while end and not sets[end - 1]:
        end -= 1
    return sets[:end]


def _joined(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """Join the sets of two paths. A register is in the set of the later one of two instructions, because
    a wait for this one is also a wait for the other."""
    seen, found = 0, []
    for i in range(max(len(left), len(right))):
        both = (left[i] if i < len(left) else 0) | (right[i] if i < len(right) else 0)
        found.append(both & ~seen)
        seen |= both
    return _trimmed(tuple(found))


def _error(
    program: Program,
    every: Sequence[Effects],
    blocks: tuple[Block, ...],
    place: int,
    register: int,
    state: Pending,
) -> EmulatorError:
    code = program.instructions
    unit, left = "scalar", 0
    for name, sets in (("vector", state.vector), ("lds", state.lds)):
        for i, registers in enumerate(sets):
            if registers & register:
                unit, left = name, i
    load = _latest(every, blocks, place, register, unit)
    counter = COUNTERS[unit]
    if register == LDS:
        does = "lets other waves go on before the end of"
    elif register == WRITE_BACK:
        does = "may be seen before what was stored earlier, since it does not await"
    else:
        verb = "reads" if every[place].reads & register else "overwrites"
        does = f"{verb} {names_of(register)[0]}, which may not have arrived from"
    return EmulatorError(
        f"{program.name}, line {code[place].number}: {code[place].line!r} {does} {code[load].line!r} of "
        f"line {code[load].number}: no s_waitcnt {counter}({left}) in between"
    )


def _latest(
    every: Sequence[Effects], blocks: tuple[Block, ...], place: int, register: int, unit: str
) -> int:
    """The nearest instruction before a place, on any path to it, that loads a register."""
    before: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for follower in block.next:
            before[follower].append(i)
    here = next(i for i, block in enumerate(blocks) if block.start <= place < block.end)
    queue, seen = deque([(here, place)]), set()
    while queue:
        index, end = queue.popleft()
        for i in range(end - 1, blocks[index].start - 1, -1):
            what = every[i]
            if what.unit == unit and (what.writes | what.starts) & register:
                return i
        for earlier in before[index]:
            if earlier not in seen:
                seen.add(earlier)
                queue.append((earlier, blocks[earlier].end))
    return place
