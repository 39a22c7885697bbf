"""Checks of the HIP kernels: what their counters hold, what their code waits for; and planted faults."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fast import hip_compiler, moe_hip, router_hip
from fast.catalogue import hip_launches
from fast.hip import HipLaunch
from fast.launch import Launch
from tests.support.fast_cases import TARGET, Case, case, launches_of
from tests.support.fast_faults import Fault, as_tests
from tools.cards import workgroups_of_a_unit
from tools.gfx950.assembly import Program, hot_cycle, parse
from tools.gfx950.target import compile_launch

# Additions in the code that announce nothing: those for experts that are not in the list.
ABSENT = 2


def hip_kernels(name: str) -> list[HipLaunch]:
    """The catalogue's launches of one HIP kernel, by its name in the source."""
    hips = (launch for launch in hip_launches(TARGET) if isinstance(launch, HipLaunch))
    return [launch for launch in hips if launch.kernel.name == name]


def hip_case(experts: Tensor, **arguments: Any) -> Case:
    return case(experts, kernel="hip", **arguments)


def epochs_of(launch: Launch, blocks: int) -> int:
    """The number of launches that the launch's counters have counted. AssertionError unless all counters
    of a kind have the same value.

    blocks: how many blocks of the output's columns the kernel computes (DOWN_BLOCKS in the source).
    """
    counters = launch.arguments["counters"][:, 0]
    sizes = [moe_hip.MAX_PAIRS, blocks, launch.arguments["workgroups"]]
    arrived, stored, epochs, unused = counters.split([*sizes, len(counters) - sum(sizes)])
    count = int(epochs[0])
    assert (epochs == count).all(), epochs
    assert (arrived == arrived[0]).all() and arrived[0] > 0, arrived
    assert int(arrived[0]) % count == 0, arrived
    assert (stored == moe_hip.MAX_PAIRS * count).all(), stored
    assert not unused.any(), unused
    return count


def fences(chosen: Case) -> list[str]:
    """Findings on the machine code of the experts. A counter is raised after the wave's stores have been
    written back and waited for. A wave that has seen a counter drops what is cached before it loads
    anything or meets the others."""
    (launch,), _ = launches_of(chosen)
    program = parse(compile_launch(launch, TARGET).text, "moe")
    found, bare = [], unreleased(program)
    if bare != ABSENT:
        found.append(f"waiting: {bare} counters are raised without a release, expected {ABSENT}")
    code = [one.line for one in program.instructions]
    looks = [i for i, line in enumerate(code) if re.match(r"global_load_dwordx2 .* sc1$", line)]
    if not looks:
        found.append("waiting: nobody waits for a counter")
    return found + unacquired(program, looks, ("s_barrier", "s_endpgm"))


def router_fences(launch: Launch) -> list[str]:
    """Findings on the machine code of the router. The counter is raised after the wave's stores have been
    written back and waited for. After that, and after the last barrier, nobody loads anything before it
    drops what is cached."""
    program = parse(compile_launch(launch, TARGET).text, "router")
    names = [one.mnemonic for one in program.instructions]
    raised = names.index("global_atomic_add_x2")
    meeting = max(i for i, name in enumerate(names) if name == "s_barrier")
    assert raised < meeting, "the counter is raised after the last barrier"
    found = ["waiting: the counter is raised without a release"] * unreleased(program)
    return found + unacquired(program, [raised, meeting])


def unreleased(program: Program) -> int:
    """How many counters are raised without waiting for a write-back of the stores before it."""
    code, bare = [one.line for one in program.instructions], 0
    for i in (i for i, line in enumerate(code) if line.startswith("global_atomic_add")):
        stored = max((j for j in range(i) if "_store_" in code[j]), default=-1)
        back = [j for j in range(stored, i) if code[j].startswith("buffer_wbl2 sc1")]
        waits = [j for j in range(stored, i) if re.match(r"s_waitcnt vmcnt\(0\)", code[j])]
        bare += not (back and waits and back[-1] < waits[-1])
    return bare


def unacquired(program: Program, starts: list[int], until: tuple[str, ...] = ()) -> list[str]:
    """Findings on loads from memory, and instructions of `until`, that follow an instruction of `starts`
    without an invalidation of the caches in between."""
    code, found = [one.line for one in program.instructions], []
    for start in starts:
        rest, seen = [start + 1], set()
        while rest:
            i = rest.pop()
            if i in seen or i == len(code) or code[i].startswith("buffer_inv sc1"):
                continue
            seen.add(i)
            name = program.instructions[i].mnemonic
            loads = re.match(r"(global|buffer)_load", name) and "sc1" not in code[i]
            if loads or name in until:
                found.append(f"waiting: {code[i]} after {code[start]} without an acquire")
                break
            if name not in ("s_branch", "s_endpgm"):
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


# ---- planted faults


def plant(what: Fault, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the edits in copies of a kernel's sources. Each must fit in exactly one place of them."""
    files = hip_compiler.sources(moe_hip.SOURCE.with_name(what.module))
    texts = {file.name: file.read_text() for file in files}
    for old, new in what.edits:
        places = sum(text.count(old) for text in texts.values())
        assert places == 1, f"{places} places read {old!r}"
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    for name, text in texts.items():
        (folder / name).write_text(text)
    owner = {"moe.hip": moe_hip, "router.hip": router_hip}[what.module]
    patch.setattr(owner, "SOURCE", folder / what.module)
    patch.setenv("XDG_CACHE_HOME", str(folder))


as_hip_tests = partial(as_tests, plant=plant)
