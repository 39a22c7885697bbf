"""Planted faults in the HIP kernel of the routed experts: the checks of this folder must find each."""

import torch

from fast.launch import Scratch
from tests.fast.test_moe_hip import streamed
from tests.support.fast_cases import (
    CPU,
    bits,
    block_findings,
    emulated,
    exact_rows,
    expected,
    findings,
    launches_of,
    output,
    repeated_work,
    routing,
    slow_block,
    too_far,
)
from tests.support.fast_faults import Check, Faults
from tests.support.hip_cases import (
    as_hip_tests,
    epochs_of,
    fences,
    hip_case,
    hip_kernels,
    persistent,
)
from tools.gfx950.emulator import EmulatorError

FAULTS = Faults()


def fault(name: str, check: Check, kind: str, *edits: tuple[str, str]) -> None:
    FAULTS.add(name, "moe.hip", check, kind, *edits)


# ---- the checks


def experts() -> list[str]:
    return findings(hip_case(routing("overlapping", 4, 3, 24), residual=True))


def wide_experts() -> list[str]:
    """All workgroups have several tasks of each kind, and a row of the weights several steps."""
    return findings(hip_case(routing("overlapping", 2, 2, 3), E=3, D=2048, I=256))


def long_rows() -> list[str]:
    """Two streamers share a row of down."""
    return findings(hip_case(routing("overlapping", 2, 2, 3), E=3, I=1024))


def many_pairs() -> list[str]:
    return findings(hip_case(routing("same", 8, 10, 24)))


def any_order() -> list[str]:
    chosen = hip_case(routing("different", 1, 3, 24), D=128, workgroups=3)
    plain = output(chosen)
    for seed in range(6):
        if not torch.equal(output(chosen, seed=seed), plain):
            return [f"bits: waves in order {seed}"]
    return []


def any_rows() -> list[str]:
    return bits(hip_case(routing("returning", 2, 3, 24), cancelling=True, workgroups=3))


def alone() -> list[str]:
    """One workgroup has to publish each task before it waits for it."""
    ids = routing("overlapping", 2, 3, 24)
    return [
        line
        for chosen in (ids, torch.zeros_like(ids))  # the second one has a single expert
        for line in findings(hip_case(chosen, workgroups=1))
    ]


def few_tasks() -> list[str]:
    """More workgroups than tasks of a kind."""
    return findings(hip_case(routing("overlapping", 1, 2, 3), E=3, workgroups=11))


def again() -> list[str]:
    """Several launches, with fewer and with more experts than the one before."""
    scratch, launches = Scratch(CPU), []
    for kind, rows in (("random", 3), ("ends", 2), ("different", 4)):
        chosen = hip_case(routing(kind, rows, 3, 24), D=384)
        launches, out = launches_of(chosen, scratch)
        try:
            emulated(launches)
        except EmulatorError as error:
            return [f"memory: {error}"]
        if found := too_far(out, *expected(chosen)):
            return found
    try:
        return [] if epochs_of(launches[0], blocks=3) == 3 else ["arrived: other epochs"]
    except AssertionError:
        return ["arrived: counters of one kind differ"]


def once() -> list[str]:
    return repeated_work(4, 3, kernel="hip")


def foreign_ids() -> list[str]:
    ids = routing("different", 3, 2, 24)
    ids[0, 1], ids[2, 0] = -1, 24
    launches, out = launches_of(hip_case(ids))
    emulated(launches)
    got = out.isnan().all(-1).tolist()
    return [] if got == [True, False, True] else [f"foreign: rows of NaN {got}"]


def waiting() -> list[str]:
    return fences(hip_case(routing("random", 4, 3, 24)))


def streaming() -> list[str]:
    *_, launch = (one for one in hip_kernels("moe") if one.name == "experts D=4096 I=128")
    return persistent(launch)


def block() -> list[str]:
    return block_findings(slow_block(16, 256, 128, 4, 64), exact_rows(1, 3, 256), "hip")


def stream() -> list[str]:
    return streamed()


def any_grid() -> list[str]:
    plain, *others = (
        output(hip_case(routing("returning", 2, 3, 24), cancelling=True, workgroups=grid))
        for grid in (3, 4, 5)
    )
    return [] if all(torch.equal(plain, other) for other in others) else ["bits: another grid"]


# ---- the faults

SUM = "int pair = row * TOP_K + slot;"
FETCH = "if (gates < downs) fetch(lds, gates % 2, a, task(gates), epochs, lane);"
LAST_GATE = "if (gates > 0) publish_gate(lds, (gates - 1) % 2, a, task(gates - 1), inverse, lane);"

fault(
    "gate and up swapped", experts, "numbers",
    ("gate = sum[0] * inverse, up = sum[1]", "up = sum[0] * inverse, gate = sum[1]"),
)  # fmt: skip
fault(
    "SiLU forgotten", experts, "numbers",
    ("activated = gate / (1 + __builtin_elementwise_exp(-gate)) * up", "activated = gate * up"),
)  # fmt: skip
fault(
    "the scale of the neighbouring group",
    experts,
    "numbers",
    (">> 8 * group", ">> 8 * (group ^ 1)"),
)
fault(
    "the scales of the row below", experts, "numbers",
    ("load_b32(scale_buffer, line / 16", "load_b32(scale_buffer, (line ^ 128) / 16"),
)  # fmt: skip
fault(
    "bytes of codes in another order", experts, "numbers",
    ("a = decoded<0>", "b = decoded<0>"), ("b = decoded<1>", "a = decoded<1>"),
)  # fmt: skip
fault(
    "an expert's rows counted without its up rows", experts, "numbers",
    ("(task.down ? D : 2 * I)", "(task.down ? D : I)"),
)  # fmt: skip
fault(
    "down of the first expert of the list", experts, "numbers",
    ("bounded(expert_at(lds.list, task.u)) *", "bounded(expert_at(lds.list, task.down ? 0 : task.u)) *"),
)  # fmt: skip
fault(
    "rows of x that are not there are read", experts, "memory",
    ("if (column < a.rows && D_STEPS", "if (D_STEPS"),
)  # fmt: skip
fault(
    "a streamer without columns counts those of another", experts, "numbers memory",
    (" && D_STEPS * wave < D / STEP)", ")"), ("+ wave * D_STEPS * STEP", "+ wave % 2 * D_STEPS * STEP"),
)  # fmt: skip
fault(
    "the last step of the hidden size skipped", wide_experts, "numbers",
    ("s < D_STEPS; s++) {\n      int l", "s < D_STEPS - 1; s++) {\n      int l"),
)  # fmt: skip
fault(
    "the last step of the intermediate size skipped", wide_experts, "numbers",
    ("for (int s = 0; s < I_PART; s++) {", "for (int s = 0; s < I_PART - 1; s++) {"),
)  # fmt: skip
fault(
    "the share of the next slot",
    experts,
    "numbers",
    ("a.weights[pair] *", "a.weights[row * TOP_K + (slot + 1) % TOP_K] *"),
)
fault("shares forgotten", experts, "numbers", ("total += a.weights[pair] * ", "total += "))
fault("the residual forgotten", experts, "numbers", ("if (a.residual) total", "if (false) total"))
fault(
    "slots added in an order that depends on the rows", any_rows, "bits",
    (SUM, SUM.replace("slot", "(slot + a.rows) % TOP_K")),
)  # fmt: skip
fault(
    "slots added in an order that depends on the workgroup", any_grid, "bits",
    (SUM, SUM.replace("slot", "(slot + __builtin_amdgcn_workgroup_id_x()) % TOP_K")),
)  # fmt: skip
fault(
    "down starts when all but one block of gate-up are there", any_order, "bits",
    ("epochs * GATE_BLOCKS);", "epochs * GATE_BLOCKS - 1);"),
)  # fmt: skip
fault(
    "down does not wait", any_order, "bits",
    ("wait_for(arrived(a, task.u), epochs * GATE_BLOCKS);", ""),
)  # fmt: skip
fault(
    "the sum starts when all but one expert are there", any_order, "bits",
    ("epochs * MAX_PAIRS);", "epochs * MAX_PAIRS - 1);"),
)  # fmt: skip
fault(
    "the sum waits for the columns of another block", any_order, "bits",
    ("stored(a, block * SUMMED / COLUMNS), epochs", "stored(a, DOWN_BLOCKS), 0 * epochs"),
)  # fmt: skip
fault(
    "counters used again: the epoch is not counted", again, "unwritten numbers arrived",
    ("if (lane == 0) *epoch(a, workgroup) = epochs;", ""),
)  # fmt: skip
fault(
    "counters used again: nobody arrives for experts that are not in the list", again, "memory arrived",
    ("add(arrived(a, u), GATE_BLOCKS);", ";"),
)  # fmt: skip
fault(
    "the shares of experts that are not in the list are not counted", experts, "memory",
    ("add(stored(a, b), MAX_PAIRS - r.count);", ";"),
)  # fmt: skip
fault(
    "a deadlock: waits for a task that it has not published", alone, "memory",
    (LAST_GATE, ""), (FETCH, f"{FETCH}\n  {LAST_GATE}"),
)  # fmt: skip
fault(
    "a deadlock: waits for one block more than there are", experts, "memory",
    ("epochs * GATE_BLOCKS);", "epochs * GATE_BLOCKS + 1);"),
)  # fmt: skip
fault(
    "a deadlock: the last down task of a workgroup is not published", experts, "memory",
    ("if (gates < i && i <= downs) publish_down", "if (gates < i && i < downs) publish_down"),
)  # fmt: skip
fault(
    "one barrier too few in a workgroup without down tasks", few_tasks, "memory numbers unwritten",
    ("if (own.gates == own.padded) meet();", ""),
)  # fmt: skip
fault(
    "one buffer of sums instead of two", experts, "memory",
    ("gate_task(lds, i % 2, w[b]", "gate_task(lds, 0, w[b]"),
    ("publish_gate(lds, (i - 1) % 2", "publish_gate(lds, 0"),
    ("publish_gate(lds, (gates - 1) % 2", "publish_gate(lds, 0"),
)  # fmt: skip
fault(
    "arrays of the LDS that 16 bytes are read from lie at multiples of four", experts, "memory",
    ("struct alignas(16) Shared {", "struct Shared {\n  List list;"),
    ("[SUMMED];\n  List list;", "[SUMMED];"),
)  # fmt: skip
fault(
    "one buffer of hidden rows instead of two", wide_experts, "memory numbers",
    ("fetch(lds, (i + 1) % 2", "fetch(lds, i % 2"),
)  # fmt: skip
fault(
    "only the first 64 pairs get their shares", many_pairs, "unwritten",
    ("part < 2; part++)\n    for (u64", "part < 1; part++)\n    for (u64"),
)  # fmt: skip
fault(
    "a pair's slot taken for its row", experts, "numbers",
    ("row = pair / TOP_K;", "row = pair % TOP_K;"),
)  # fmt: skip
fault(
    "every pair taken to be the first one of its expert", once, "work",
    ("(low & lower) == 0 && pairs", "pairs"),
)  # fmt: skip
fault(
    "ids of no expert give zeros", foreign_ids, "foreign",
    ("known ? activated : __builtin_nanf(\"\")", "known ? activated : 0"),
)  # fmt: skip
fault("the norm's rms forgotten", stream, "numbers", ("if (parts == 0) return 1;", "return 1;"))
fault(
    "squares left in the place of the first block", stream, "numbers",
    ("a.out_squares[block * SQUARES + row]", "a.out_squares[row]"),
)  # fmt: skip
fault(
    "what is left for the next norm is not rounded first", stream, "numbers",
    ("float kept = (float)rounded", "float kept = total"),
)  # fmt: skip
fault(
    "a counter raised before the stores are done", waiting, "waiting",
    ('__builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");', ""),
)  # fmt: skip
fault(
    "data read as it was cached before the wait", waiting, "waiting",
    ('    __builtin_amdgcn_s_sleep(1);\n  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");',
     "    __builtin_amdgcn_s_sleep(1);"),
)  # fmt: skip
fault(
    "a barrier that waits for the weights to come", streaming, "waiting",
    ("__builtin_amdgcn_s_barrier();", 'asm volatile("s_waitcnt vmcnt(0)\\ns_barrier");'),
)  # fmt: skip
fault(
    "more registers than nine waves have",
    streaming,
    "spills registers waiting",
    ("AHEAD = LOADS > 4 ? 1 : 2", "AHEAD = 4"),
)


fault(
    "the shared expert's gate and up swapped", block, "numbers",
    ("gate = routed(a, row, E + 1 + column), up", "up = routed(a, row, E + 1 + column), gate"),
)  # fmt: skip
fault(
    "the shared expert let through in all rows", block, "numbers",
    ("sum / (1 + __builtin_elementwise_exp(-routed(a, row, E)))", "sum"),
)  # fmt: skip
fault(
    "the shared expert opened by an expert's logit", block, "numbers",
    ("routed(a, row, E)", "routed(a, row, E - 1)"),
)  # fmt: skip
fault(
    "the shared expert's SiLU forgotten", block, "numbers",
    ("(__bf16)(gate / (1 + __builtin_elementwise_exp(-gate)) * up)", "(__bf16)(gate * up)"),
)  # fmt: skip
fault(
    "the second half of long rows of down forgotten", long_rows, "numbers",
    ("if (HALVES == 2) sum", "if (false) sum"),
)  # fmt: skip
fault(
    "hidden columns of the first half taken for the second", long_rows, "numbers",
    ("+ half * I_PART * STEP + group * 32", "+ group * 32"),
)  # fmt: skip
fault("the shared expert forgotten", block, "numbers", ("  if (SHARED) {", "  if (false) {"))
fault(
    "the last step of the shared expert's sum skipped", block, "numbers",
    ("part < PARTS; part++) sum", "part < 1; part++) sum"),
)  # fmt: skip
fault(
    "a part of the router's product forgotten", block, "numbers",
    ("for (int split = 0; split < a.splits", "for (int split = 1; split < a.splits"),
)  # fmt: skip


test_a_fault_is_found, test_without_a_fault_nothing_is_found = as_hip_tests(FAULTS, __name__)
