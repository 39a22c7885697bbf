"""Checks of the HIP kernel of the routed experts: what its counters hold, and what its code waits for."""

import re
from typing import Any

from torch import Tensor

from fast import moe_hip
from fast.hip import HipLaunch
from fast.launch import Launch
from tests.support.fast_cases import TARGET, Case, case, launches_of
from tools.cards import workgroups_of_a_unit
from tools.gfx950.assembly import hot_cycle, parse
from tools.gfx950.target import compile_launch

# Additions in the code that announce nothing: those for experts that are not in the list.
ABSENT = 2


def hip_case(experts: Tensor, **arguments: Any) -> Case:
    return case(experts, kernel="hip", **arguments)


def uneven(launch: Launch) -> int:
    """The epochs that the launch's counters have counted. AssertionError unless all counters of a kind
    stand at the same multiple of it."""
    counters = launch.arguments["counters"][:, 0]
    groups = moe_hip.MAX_PAIRS, -launch.arguments["workgroups"]
    arrived, stored, epochs = counters[: groups[0]], counters[groups[0] : groups[1]], None
    epochs = counters[groups[0] :]
    epochs, stored = epochs[epochs > 0], stored[stored > 0]
    assert len(arrived.unique()) == 1, arrived
    last = int(epochs[-1])
    assert int(arrived[0]) % last == 0 and (stored[:1] == moe_hip.MAX_PAIRS * last).all()
    assert (epochs[-launch.arguments["workgroups"] :] == last).all(), epochs
    return last


def fences(chosen: Case) -> list[str]:
    """Findings on the machine code. A counter is raised after the wave's stores have been written back
    and waited for. A wave that has seen a counter drops what is cached before it loads anything or meets
    the others."""
    (launch,), _ = launches_of(chosen)
    program = parse(compile_launch(launch, TARGET).text, "moe")
    code = [one.line for one in program.instructions]
    bare = 0
    for i in (i for i, line in enumerate(code) if line.startswith("global_atomic_add")):
        stored = max((j for j in range(i) if "_store_" in code[j]), default=-1)
        back = [j for j in range(stored, i) if code[j].startswith("buffer_wbl2 sc1")]
        waits = [j for j in range(stored, i) if re.match(r"s_waitcnt vmcnt\(0\)", code[j])]
        bare += not (back and waits and back[-1] < waits[-1])
    found = []
    if bare != ABSENT:
        found.append(f"waiting: {bare} counters are raised without a release, expected {ABSENT}")
    looks = [i for i, line in enumerate(code) if re.match(r"global_load_dwordx2 .* sc1$", line)]
    if not looks:
        found.append("waiting: nobody waits for a counter")
    for look in looks:
        rest, seen = [look + 1], set()
        while rest:
            i = rest.pop()
            if i in seen or code[i].startswith("buffer_inv sc1"):
                continue
            seen.add(i)
            name = program.instructions[i].mnemonic
            loads = re.match(r"(global|buffer)_load", name) and "sc1" not in code[i]
            if loads or name in ("s_barrier", "s_endpgm"):
                found.append(f"waiting: {code[i]} after {code[look]} without an acquire")
                break
            if name != "s_branch":
                rest.append(i + 1)
            if name.startswith(("s_branch", "s_cbranch")):
                rest.append(program.labels[program.instructions[i].operands[0]])
    return found


def persistent(launch: HipLaunch) -> list[str]:
    """Findings on the loop over tasks: a wait that drains the loads of tasks to come, a store, a spill,
    too many registers."""
    compiled = compile_launch(launch, TARGET)
    program = parse(compiled.text, "moe")
    blocks = hot_cycle(program)
    loop = [instruction for block in blocks for instruction in block]
    resources = program.resources
    found = [
        f"spills: {name} {resources[name]}"
        for name in ("vgpr_spills", "sgpr_spills", "scratch")
        if resources[name]
    ]
    load = moe_hip.loads(
        *(dict(launch.kernel.sizes)[n] for n in ("HIDDEN_SIZE", "INTERMEDIATE_SIZE"))
    )
    ahead = 2 * (load + load // 4)
    waits = [int(n) for one in loop for n in re.findall(r"vmcnt\((\d+)\)", one.line)]
    if not waits or min(waits) < ahead:
        found.append(f"waiting: vmcnt({min(waits, default=0)}), expected at least {ahead}")
    found += [f"stores: {one.line}" for one in loop if "_store_" in one.mnemonic]
    lds = program.directives["group_segment_fixed_size"]
    if workgroups_of_a_unit(resources["vgpr"], lds, compiled.num_warps) < 1:
        found.append(f"registers: {resources['vgpr']}, LDS {lds}")
    return found
