"""Executes gfx950 kernels (MI355X, CDNA4) with numpy, from the compiler's text assembly.

It shows whether a compiled kernel computes the right thing, on a machine without the card. It finds
accesses outside of an array, LDS races, reads before a load has been waited for and reads of what nothing
has written (docs/emulator.md), which the card does not report. It does not model caches or wait states:
every instruction completes before the next one (`timeline` estimates times afterwards). Scratch, flat
addresses, images, fp6, sparse and 4x4 matrix instructions and LDS atomics are not emulated, and are
refused by name. `vector_ops` and `matrix` say where rounding may differ from the card's, `formats` and
`converts` which modes of the card are assumed.
"""

import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product

import numpy as np
from numpy.typing import NDArray

from tools.gfx950 import (
    access,
    converts,
    lanes,
    matrix,
    scalar,
    unwritten,
    vector_converts,
    vector_ops,
    waits,
)
from tools.gfx950.arrivals import Arrivals
from tools.gfx950.assembly import EmulatorError, Instruction, parse
from tools.gfx950.effects import BANKS, effects
from tools.gfx950.memory import Lds, Memory, lds_pitch
from tools.gfx950.operands import parse_operand
from tools.gfx950.registry import BUILDERS, Action, plain
from tools.gfx950.waves import EXEC, LANES, VCC, Waves, mask_of

__all__ = ["Argument", "EmulatorError", "Kernel", "Statistics"]

# Importing them fills BUILDERS.
DEFINING = (access, converts, lanes, matrix, scalar, vector_converts, vector_ops)

Argument = np.ndarray | tuple[str, int | float]
Trace = Callable[[int, Waves], None]
SCALARS = {"i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "f32": "<f", "f64": "<d"}
SCALARS |= {"u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"}

BRANCHES = ("s_branch", "s_cbranch_scc0", "s_cbranch_scc1", "s_cbranch_vccz", "s_cbranch_vccnz")
BRANCHES += ("s_cbranch_execz", "s_cbranch_execnz")
CONTROL = (*BRANCHES, "s_barrier", "s_endpgm", "s_sleep")

LIMIT = 1_000_000_000  # instructions of all waves of a launch
# In random order, a wave that meets no barrier for so many instructions may be waiting for another wave.
PATIENCE = 20_000
# Waves that sleep so many times in turn, each, while none of them stores anything, will do so for ever.
SLEEPS = 20


@dataclass
class Statistics:
    """Counts of a run.

    instructions: an instruction that four waves execute counts four times. bytes_read, bytes_written:
    accesses of global memory; a byte that two lanes read counts twice. by_mnemonic: the instructions by
    mnemonic, without the suffix of the encoding.
    """

    instructions: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    by_mnemonic: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.instructions + other.instructions,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.by_mnemonic + other.by_mnemonic,
        )


class Kernel:
    """One kernel of an assembly file, ready to run.

    Raises EmulatorError, with the line of every instruction that is not emulated, or of the first one
    that does not wait for a load (`waits`). program: the parsed text. effects: of each instruction.
    """

    def __init__(self, text: str, name: str) -> None:
        self.program = parse(text, name)
        self._actions: list[Action | None] = []  # None for CONTROL
        unknown: dict[str, str] = {}
        for instruction in self.program.instructions:
            try:
                self._actions.append(self._build(instruction))
            except EmulatorError as error:
                unknown.setdefault(instruction.line, str(error))
        if unknown:
            problems = "; ".join(f"{line!r}: {why}" for line, why in unknown.items())
            raise EmulatorError(f"{name}: {problems}")
        self.effects = tuple(effects(i) for i in self.program.instructions)
        waits.check(self.program, self.effects)
        self._loads_to_lds = any(what.lds == "load" for what in self.effects)
        if self._loads_to_lds:
            for i, what in enumerate(self.effects):
                if what.unit == "vector":
                    self._actions[i] = _counted(self._actions[i])
        first = 1 | sum(1 << (BANKS["s"] + i) for i in self._first_scalars())
        self._actions, self._checks, self._watched = unwritten.watched(
            self.program, self.effects, self._actions, first
        )
        self._vgprs, self._agprs = self._registers()
        self._mnemonics = [plain(i.mnemonic) for i in self.program.instructions]

    def run(
        self,
        arguments: Sequence[Argument],
        grid: tuple[int, int, int],
        num_warps: int,
        lds_bytes: int,
        *,
        names: Sequence[str] = (),
        seed: int | None = None,
        batch: int = 32,
        races: bool = True,
        limit: int = LIMIT,
        reaches: Sequence[np.ndarray] = (),
        only: Sequence[tuple[int, int, int]] | None = None,
        trace: Trace | None = None,
    ) -> Statistics:
        """Run a grid of workgroups of num_warps waves; arrays are pointers and are written in place.

        arguments: numpy arrays, or scalars such as ("i32", 7); pointers that Triton appends for itself
        may be left out.
        lds_bytes: LDS that the launch adds to what the kernel declares.
        names: of the arguments, in their order, for errors.
        seed: None runs waves in lockstep, which is fast; a number runs them one at a time up to the next
        barrier, in random order.
        batch: how many workgroups run at the same time. Batches follow one another in ascending order,
        and within a batch all workgroups make progress, so a workgroup may wait for lower ones.
        races: raise for LDS races and for reads of LDS bytes that no wave has written, see `Lds`.
        limit: the most instructions that all waves together may execute.
        reaches: arrays whose addresses on the host are among the arguments.
        only: the workgroups of the grid to run; None: all.
        trace: is called with each instruction's index in the program and the waves that execute it.

        EmulatorError, with the line of assembly, for any access outside of an array or of the LDS, and
        for reads of registers that nothing has written (`unwritten`).
        """
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        named = [n for n, a in zip(names, arguments, strict=False) if isinstance(a, np.ndarray)]
        segment = np.zeros(self._segment_size(arguments), np.uint8)
        memory = Memory([*arrays, segment, *reaches], named)
        self._fill(segment, arguments, memory, grid, num_warps)
        counts = np.zeros(len(self._actions), np.int64)
        run = _Run(
            self,
            memory,
            counts,
            limit,
            None if seed is None else np.random.default_rng(seed),
            trace,
        )
        size = self.program.directives.get("group_segment_fixed_size", 0) + lds_bytes
        order = iter(only) if only is not None else _ascending(grid)
        with np.errstate(all="ignore"):
            pointer = np.array([memory.address(len(arrays))], np.uint64)  # to the arguments
            while workgroups := list(islice(order, batch)):
                pitch = lds_pitch(size)
                arrivals = Arrivals(len(workgroups), pitch) if self._loads_to_lds else None
                lds = Lds(len(workgroups), size, races=races, arrivals=arrivals)
                waves = self._start(workgroups, num_warps, memory, lds)
                waves.write_s64(self._pointer_register(), pointer)
                run.batch(waves, num_warps)
        by_mnemonic: Counter[str] = Counter()
        for mnemonic, count in zip(self._mnemonics, counts.tolist(), strict=True):
            by_mnemonic[mnemonic] += count
        by_mnemonic = +by_mnemonic  # drops zeros
        return Statistics(int(counts.sum()), memory.bytes_read, memory.bytes_written, by_mnemonic)

    def _build(self, instruction: Instruction) -> Action | None:
        mnemonic = plain(instruction.mnemonic)
        if mnemonic in BRANCHES and instruction.operands[0] not in self.program.labels:
            raise EmulatorError("the branch's label is not in the kernel")
        if mnemonic in CONTROL:
            return None
        if mnemonic not in BUILDERS:
            raise EmulatorError("the instruction is not known")
        return BUILDERS[mnemonic](instruction)

    def _registers(self) -> tuple[int, int]:
        """How many VGPRs and AGPRs the code names; at least one VGPR, which holds the lane's number."""
        most = {"v": 1, "a": 0}
        for instruction in self.program.instructions:
            for text in instruction.operands:
                if any(letter in text for letter in "va"):
                    try:
                        operand = parse_operand(text)
                    except EmulatorError:  # a label, a counter of s_waitcnt
                        continue
                    if operand.kind in most:
                        end = operand.index + operand.count
                        most[operand.kind] = max(most[operand.kind], end)
        # One more, since an instruction may write a pair of registers whose operand names the first.
        return most["v"] + 1, most["a"]

    # ---- how a workgroup starts

    def _pointer_register(self) -> int:
        """The first of the two SGPRs that point to the arguments. They follow the SGPRs of the scratch
        buffer, the dispatch packet and the queue, where the kernel asks for these."""
        directives = self.program.directives
        if not directives.get("user_sgpr_kernarg_segment_ptr", 1):
            raise EmulatorError(f"{self.program.name} does not ask for its arguments")
        sizes = {"private_segment_buffer": 4, "dispatch_ptr": 2, "queue_ptr": 2}
        return sum(n for what, n in sizes.items() if directives.get(f"user_sgpr_{what}"))

    def _workgroup_registers(self) -> dict[int, int]:
        """The axis of a workgroup's number -> the SGPR that holds it at the start."""
        directives = self.program.directives
        asked = [
            axis
            for axis, letter in enumerate("xyz")
            if directives.get(f"system_sgpr_workgroup_id_{letter}", int(letter == "x"))
        ]
        first = directives.get("user_sgpr_count", 2)
        return {axis: first + i for i, axis in enumerate(asked)}

    def _first_scalars(self) -> list[int]:
        """The SGPRs that are written at the start."""
        pointer = self._pointer_register()
        return [pointer, pointer + 1, EXEC, EXEC + 1, *self._workgroup_registers().values()]

    def _start(
        self, workgroups: list[tuple[int, int, int]], num_warps: int, memory: Memory, lds: Lds
    ) -> Waves:
        """All waves of a batch of workgroups at the first instruction."""
        owner = np.repeat(np.arange(len(workgroups)), num_warps)
        number = np.tile(np.arange(num_warps), len(workgroups))
        waves = Waves(self._vgprs, self._agprs, owner, number, memory, lds, len(self._watched))
        waves.written[self._watched] = True
        waves.write_s64(EXEC, np.array([2**64 - 1], np.uint64))
        for axis, register in self._workgroup_registers().items():
            waves.sgpr[register] = np.array(workgroups)[owner, axis]
        # A lane's number has three fields of 10 bits. y and z are 0: Triton's workgroups have one axis.
        waves.vgpr[0] = number[:, None] * LANES + np.arange(LANES)
        return waves

    # ---- the argument buffer

    def _segment_size(self, arguments: Sequence[Argument]) -> int:
        declared = self.program.directives.get("kernarg_size", 0)
        return max(declared, 8 * len(arguments) + 64)

    def _fill(
        self,
        segment: NDArray[np.uint8],
        arguments: Sequence[Argument],
        memory: Memory,
        grid: tuple[int, int, int],
        num_warps: int,
    ) -> None:
        """Write the arguments at the offsets of the kernel's metadata; without metadata one after the
        other, each aligned to its size."""
        places = self.program.parameters
        explicit = [p for p in places if not p.kind.startswith("hidden_")]
        missing = explicit[len(arguments) :]
        if places and (len(arguments) > len(explicit) or any(p.size != 8 for p in missing)):
            raise EmulatorError(
                f"{self.program.name}: {len(arguments)} arguments, the kernel has {len(explicit)}"
            )
        end, pointers = 0, 0
        for i, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                data = struct.pack("<Q", memory.address(pointers))
                pointers += 1
            else:
                kind, value = argument
                if kind not in SCALARS:
                    raise EmulatorError(
                        f"argument {i}: type {kind!r} is none of {', '.join(SCALARS)}"
                    )
                data = struct.pack(SCALARS[kind], value)
            start = explicit[i].offset if places else -(-end // len(data)) * len(data)
            if places and explicit[i].size != len(data):
                raise EmulatorError(
                    f"argument {i} has {len(data)} bytes, the kernel's has {explicit[i].size}"
                )
            end = start + len(data)
            segment[start:end] = np.frombuffer(data, np.uint8)
        launch = {f"hidden_block_count_{c}": n for c, n in zip("xyz", grid, strict=True)}
        launch |= {f"hidden_group_size_{c}": 1 for c in "yz"}
        launch["hidden_group_size_x"] = num_warps * LANES
        for place in places:
            if place.kind in launch:
                data = launch[place.kind].to_bytes(place.size, "little")
                segment[place.offset : place.offset + place.size] = np.frombuffer(data, np.uint8)


class _Run:
    """Schedules the waves of one batch of workgroups after another.

    A group is a set of waves at the same instruction. It runs until it ends, meets a barrier, or branches
    backwards while others are in the queue, whose end it then joins. So waves that spin cannot keep
    others from the work that they wait for. A group that sleeps gives way at once. In lockstep, groups
    in the queue at the same instruction are joined; in random order a group is one wave, and gives way
    only after PATIENCE instructions.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        counts: NDArray[np.int64],
        limit: int,
        random: np.random.Generator | None,
        trace: Trace | None = None,
    ) -> None:
        self._instructions = kernel.program.instructions
        self._actions, self._checks = kernel._actions, kernel._checks
        labels = kernel.program.labels
        self._targets = [
            labels.get(i.operands[0], -1) if i.operands else -1 for i in self._instructions
        ]
        self._mnemonics = [i.mnemonic for i in self._instructions]
        self._memory, self._counts, self._limit, self._random = memory, counts, limit, random
        self._trace = trace

    def batch(self, waves: Waves, num_warps: int) -> None:
        """Run all waves from the first instruction to their ends."""
        self._num_warps = num_warps
        workgroups = len(waves) // num_warps
        self._met = np.zeros(workgroups, np.int64)  # waves that are at a barrier, or have ended
        self._ended = np.zeros(workgroups, np.int64)
        self._queue: deque[tuple[int, Waves]] = deque()
        self._waiting: list[tuple[int, Waves]] = []
        self._sleeps, self._stored = 0, self._memory.bytes_written
        parts = [waves] if self._random is None else _one_by_one(waves)
        self._queue.extend((0, part) for part in parts)
        while self._queue:
            place, group = self._next()
            self._advance(place, group)

    def _next(self) -> tuple[int, Waves]:
        if self._random is not None:
            chosen = int(self._random.integers(len(self._queue)))
            self._queue.rotate(-chosen)
            return self._queue.popleft()
        place, first = self._queue.popleft()
        same = [group for other, group in self._queue if other == place]
        if same:
            self._queue = deque(entry for entry in self._queue if entry[0] != place)
        return place, Waves.join([first, *same])

    def _advance(self, place: int, waves: Waves) -> None:
        """Run one group until it stops or others get their turn."""
        actions, counts, size, steps = self._actions, self._counts, len(waves), 0
        trace = self._trace
        woke = place if place and self._mnemonics[place - 1] == "s_sleep" else -1
        while place < len(actions):
            action = actions[place]
            counts[place] += size
            steps += 1
            if trace is not None:
                trace(place, waves)
            if action is not None:
                self._quoting(place, action, waves)
                place += 1
                continue
            mnemonic = self._mnemonics[place]
            if mnemonic in ("s_endpgm", "s_barrier"):
                self._sleeps = 0
                self._meet(waves, None if mnemonic == "s_endpgm" else place + 1)
                return
            if mnemonic == "s_sleep":
                self._sleep(place)
                self._queue.append((place + 1, waves))
                return
            if place in self._checks:
                self._quoting(place, self._checks[place], waves)
            taken = _condition(mnemonic, waves)
            target, came_from = self._targets[place], place
            if taken.all():
                backwards, place = target <= place, target
            elif not taken.any():
                backwards, place = False, place + 1
            else:
                self._queue.append((target, waves.select(taken)))
                waves, backwards, place = waves.select(~taken), False, place + 1
                size = len(waves)
            if backwards:
                if counts.sum() > self._limit:
                    raise EmulatorError(
                        f"more than {self._limit} instructions: does this loop end?"
                    )
                if self._queue and (self._random is None or steps > PATIENCE):
                    if not place < woke <= came_from:
                        self._sleeps = 0
                    self._queue.append((place, waves))
                    return
        raise EmulatorError("the code ends without s_endpgm")

    def _quoting(self, place: int, action: Action, waves: Waves) -> None:
        """Do an instruction's action. Errors quote its line."""
        try:
            action(waves)
        except EmulatorError as error:
            raise EmulatorError(f"{error}, at: {self._instructions[place].line}") from None
        except Exception as error:  # a defect of the emulator
            error.add_note(f"emulating: {self._instructions[place].line}")
            raise

    def _sleep(self, place: int) -> None:
        """A group sleeps. EmulatorError if all groups have done nothing else for long."""
        if self._stored != self._memory.bytes_written:
            self._stored, self._sleeps = self._memory.bytes_written, 0
        self._sleeps += 1
        if self._sleeps > SLEEPS * (len(self._queue) + 1):
            raise EmulatorError(
                "all waves that are left wait in their sleep, or at a barrier, for what none of them "
                f"stores, at: {self._instructions[place].line}"
            )

    def _meet(self, waves: Waves, place: int | None) -> None:
        """Waves have met a barrier, after which they go on at `place`; None: they have ended. A workgroup
        leaves the barrier when none of its waves runs any more; nobody waits for waves that have
        ended."""
        arrived = np.bincount(waves.workgroup, minlength=len(self._met))
        self._met += arrived
        if place is None:
            self._ended += arrived
        else:
            self._waiting.append((place, waves))
        complete = (self._met == self._num_warps) & (self._ended < self._num_warps)
        if not self._waiting or not complete.any():
            return
        still: list[tuple[int, Waves]] = []
        freed: list[tuple[int, Waves]] = []
        for there, group in self._waiting:
            leaves = complete[group.workgroup]
            if leaves.all():
                freed.append((there, group))
            elif leaves.any():
                freed.append((there, group.select(leaves)))
                still.append((there, group.select(~leaves)))
            else:
                still.append((there, group))
        for _, group in freed:
            group.lds.barrier(group.workgroup)
        self._met[complete] = self._ended[complete]
        self._waiting = still
        self._queue.extend(freed)


def _counted(action: Action | None) -> Action:
    """An action that is counted for `Arrivals`."""
    assert action is not None

    def run(waves: Waves) -> None:
        if waves.lds.arrivals is not None:
            waves.lds.arrivals.issue(waves)
        action(waves)

    return run


def _ascending(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    return ((x, y, z) for z, y, x in product(*(range(n) for n in reversed(grid))))


def _one_by_one(waves: Waves) -> Iterator[Waves]:
    return (waves.select(np.array([i])) for i in range(len(waves)))


def _condition(mnemonic: str, waves: Waves) -> NDArray[np.bool_]:
    """Which waves take a branch."""
    if mnemonic == "s_branch":
        return np.ones(len(waves), bool)
    what, holds = mnemonic.removeprefix("s_cbranch_"), mnemonic.endswith(("nz", "1"))
    if what.startswith("scc"):
        return waves.scc == holds
    mask = waves.read_s64(VCC) if what.startswith("vcc") else mask_of(waves.active)
    return (mask != 0) == holds
