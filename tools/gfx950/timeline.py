"""How long a launch takes on a card, estimated from the instructions that its waves execute.

The emulator runs some workgroups of the launch and records each wave's instructions. `alone` goes through
them as a compute unit would that has nothing else to do. A wave issues its instructions in order. A load
ends a fixed time after it was issued, s_waitcnt waits for it, and s_barrier waits for the workgroup's
other waves. `launch_time` then puts all workgroups of the grid on the card.

What this leaves out: caches (every vector load takes as long as one from memory), contention of
workgroups on the same unit for anything but instructions and loaded bytes, and dependences between
instructions that are no loads. No MI355X has been measured with it.
"""

import math
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fast.launch import Launch
from tools import cards
from tools.gfx950.assembly import Instruction
from tools.gfx950.effects import counters_of
from tools.gfx950.emulator import Kernel
from tools.gfx950.target import compile_launch, emulate, loaded
from tools.gfx950.waves import LANES, Waves

SIMDS = 4  # of a compute unit; schedulers of an SM
SAMPLES = 6  # workgroups of a launch that are executed

# Bytes of a lane, by the end of a load's or store's mnemonic.
_WIDTHS = {"x4": 16, "x3": 12, "x2": 8, "b128": 16, "b96": 12, "b64": 8, "byte": 1, "short": 2}
_MATRIX = re.compile(r"v_mfma_(?:scale_)?f\d+_(\d+)x(\d+)x(\d+)_?(\w*)")
# Vector instructions that take a SIMD four times as long as others.
_SLOW = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos|mul_lo_u32|mul_hi)")


@dataclass(frozen=True)
class Card:
    """What a launch meets.

    units: compute units (SMs), each with SIMDS SIMDs. ghz: their clock. memory_gb_s: what a plain read of
    the memory reaches. load_ns: from the issue of a vector load to its data. scalar_ns: the same of a
    scalar load, lds_cycles of an access of the LDS. launch_us: what an empty launch costs in a graph.
    vector_cycles: how long 64 lanes of a vector instruction take a SIMD. matrix_flops: of a SIMD in a
    cycle, in bf16. load_bytes: how much a unit loads in a cycle.
    """

    name: str
    units: int
    ghz: float
    memory_gb_s: float
    load_ns: float
    scalar_ns: float
    lds_cycles: float
    launch_us: float
    vector_cycles: float
    matrix_flops: float
    load_bytes: float


# Clocks, units and rates are those of the data sheets. MI355X: read bandwidth from ROCm/rocm-systems
# #8480, a load by itself of 840 ns from the notes of fleet-chiplet-megakernel, the cost of a launch from
# sglang #27630. H200: read bandwidth and launch as in LOG.md. Other latencies are assumptions.
MI355X = Card("MI355X", cards.UNITS, 2.4, 6910, 800, 300, 64, 4.0, 4, 1024, 64)
H200 = Card("H200", 132, 1.75, 4350, 650, 250, 30, 1.1, 2, 1024, 128)


@dataclass(frozen=True)
class Estimate:
    """The microseconds of a launch without its own cost, one for each thing that may be the slowest.

    latency: its waves' loads, waits and instructions, one after the other. issue: all vector and matrix
    instructions on all SIMDs. loads: all loaded bytes through the units. memory: the bytes that it must
    move, at the card's bandwidth.
    """

    latency: float
    issue: float
    loads: float
    memory: float

    @property
    def us(self) -> float:
        return max(self.latency, self.issue, self.loads, self.memory)

    @property
    def limit(self) -> str:
        """The name of the slowest."""
        return max(vars(self), key=vars(self).__getitem__)


@dataclass(frozen=True)
class Executed:
    """Some workgroups of a launch, as the emulator executed them.

    waves: for each workgroup, the indices of the instructions of each of its waves. count: workgroups of
    the whole grid. of_a_unit: how many a compute unit of an MI355X holds at once.
    """

    kernel: Kernel
    waves: list[list[list[int]]]
    count: int
    of_a_unit: int


def execute(launch: Launch, samples: int = SAMPLES) -> Executed:
    """Run a few workgroups of a launch, spread over its grid, in the emulator. Its tensors are on the
    CPU.

    If its workgroups count each other, the others run too, so that the last one finds itself to be the
    last. InputError and EmulatorError as in `emulate`.
    """
    compiled = compile_launch(launch, "gfx950")
    kernel = loaded(compiled)
    counting = any("_atomic_" in i.mnemonic for i in kernel.program.instructions)
    places: dict[int, list[int]] = {}

    def trace(place: int, waves: Waves) -> None:
        for wave in waves.wave.tolist():
            places[wave].append(place)

    workgroups: list[list[list[int]]] = []
    before = 0
    for number in spread(math.prod(launch.grid), samples):
        if counting:
            others = [_place(n, launch.grid) for n in range(before, number)]
            emulate([launch], races=False, only=others)
            before = number + 1
        places = defaultdict(list)
        emulate([launch], batch=1, races=False, only=[_place(number, launch.grid)], trace=trace)
        workgroups.append([places[wave] for wave in range(compiled.num_warps)])
    program = kernel.program
    lds = program.directives.get("group_segment_fixed_size", 0) + compiled.shared
    fits = cards.workgroups_of_a_unit(program.resources["vgpr"], lds, compiled.num_warps)
    return Executed(kernel, workgroups, math.prod(launch.grid), max(1, fits))


def spread(count: int, samples: int) -> list[int]:
    """At most so many of the numbers below count, ascending, from the first to the last."""
    return sorted({round(i * (count - 1) / max(1, samples - 1)) for i in range(samples)})


def _place(number: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """The place in the grid of workgroup `number`, in ascending order."""
    x, y, _ = grid
    return number % x, number // x % y, number // (x * y)


def launch_time(done: Executed, moved: float, card: Card) -> Estimate:
    """The estimate of a launch. moved: the bytes that it must read or write at least once.

    A card with another number of registers is taken to hold as many workgroups in a unit as an MI355X.
    """
    costs = [_cost(i, card) for i in done.kernel.program.instructions]
    alone = [_alone(done.kernel, costs, waves, card) for waves in done.waves]
    busy, loaded_bytes = (
        done.count
        * float(np.mean([sum(costs[p][i] for w in waves for p in w) for waves in done.waves]))
        for i in (0, 1)
    )
    at_once = done.of_a_unit * card.units
    usual = float(np.mean(alone[:-1] or alone))  # the last one may have more to do
    ns = max(max(alone), usual * done.count / at_once)
    cycle = 1 / card.ghz
    return Estimate(
        latency=ns * 1e-3,
        issue=busy * cycle / (card.units * SIMDS) * 1e-3,
        loads=loaded_bytes / card.load_bytes * cycle / card.units * 1e-3,
        memory=moved / card.memory_gb_s * 1e-3,
    )


def _cost(instruction: Instruction, card: Card) -> tuple[float, float]:
    """The cycles of a SIMD that an instruction takes, and the bytes of global memory that it loads or
    stores."""
    name = instruction.mnemonic
    if found := _MATRIX.match(name):
        m, n, k = map(int, found.groups()[:3])
        faster = 4 if "f8f6f4" in name else 1
        return 2 * m * n * k / (card.matrix_flops * faster), 0
    if name.startswith("v_"):
        return card.vector_cycles * (4 if _SLOW.match(name) else 1), 0
    if name.startswith(("global_", "buffer_")):
        width = next((size for end, size in _WIDTHS.items() if end in name), 4)
        return 0, width * LANES
    return 0, 0


def _alone(
    kernel: Kernel, costs: Sequence[tuple[float, float]], waves: list[list[int]], card: Card
) -> float:
    """The nanoseconds of a workgroup that has a compute unit for itself."""
    code, every, cycle = kernel.program.instructions, kernel.effects, 1 / card.ghz
    now = [0.0] * len(waves)
    at = [0] * len(waves)
    vector: list[deque[float]] = [deque() for _ in waves]  # when loads and stores end, in order
    others: list[deque[float]] = [deque() for _ in waves]  # accesses of the LDS, and scalar loads

    def until_a_barrier(wave: int) -> bool:
        """Go on to the next barrier, or to the end. Returns whether there is more."""
        places, time = waves[wave], now[wave]
        queues = {"vmcnt": vector[wave], "lgkmcnt": others[wave]}
        for i in range(at[wave], len(places)):
            place = places[i]
            name, unit = code[place].mnemonic, every[place].unit
            busy, size = costs[place]
            time += max(busy, 1) * cycle + size / card.load_bytes * cycle
            if name == "s_barrier":
                now[wave], at[wave] = time, i + 1
                return True
            if name == "s_waitcnt":
                for counter, left in counters_of(code[place]).items():
                    queue = queues.get(counter, ())
                    while len(queue) > left:
                        time = max(time, queue.popleft())
            elif unit == "vector":
                vector[wave].append(time + card.load_ns)
            elif unit == "lds":
                others[wave].append(time + card.lds_cycles * cycle)
            elif unit == "scalar":
                others[wave].append(time + card.scalar_ns)
        now[wave], at[wave] = time, len(places)
        return False

    while any(still := [until_a_barrier(wave) for wave in range(len(waves))]):
        together = max(time for time, more in zip(now, still, strict=True) if more)
        now = [max(time, together) if more else time for time, more in zip(now, still, strict=True)]
    return max(now)
