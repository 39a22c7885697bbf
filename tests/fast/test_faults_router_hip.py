"""Planted faults in the HIP kernel of the router: the checks of this folder must find each."""

import pytest
import torch

pytest.importorskip("triton")

from fast.launch import Scratch
from tests.fast.test_router_hip import (
    choice_of,
    nan_norm_findings,
    router,
    rows_of,
    streaming,
    sums_findings,
)
from tests.support.fast_cases import (
    CPU,
    choice_findings,
    exact_router,
    exact_rows,
    picks,
    random,
    slow_block,
)
from tests.support.fast_faults import Check, Faults
from tests.support.fast_streams import clear_rows, norm, stream_findings
from tests.support.hip_cases import as_hip_tests, router_fences
from tools.gfx950.emulator import EmulatorError

FAULTS = Faults()


def fault(name: str, check: Check, kind: str, *edits: tuple[str, str]) -> None:
    FAULTS.add(name, "router.hip", check, kind, *edits)


# ---- the checks


def sums() -> list[str]:
    """Two parts along the columns, the second of which not all streamers have, and a tile not full."""
    try:
        return sums_findings(router(), random(1, 3, 1152).bfloat16())
    except EmulatorError as error:
        return [f"memory: {error}"]


def choice() -> list[str]:
    """Rows that differ, with ties, and with logits whose sums along K are exact."""
    return choice_findings(
        slow_block(24, 1152, 128, 5, 0).gate, exact_rows(1, 3, 1152), kernel="hip"
    )


def eight_rows() -> list[str]:
    gate = slow_block(24, 1152, 128, 5, 0).gate
    return choice_findings(gate, exact_rows(1, 8, 1152), kernel="hip")


def unnormalised() -> list[str]:
    gate = exact_router((random(3, 4, 24) * 2 - 5).bfloat16(), 5, norm=False)
    return choice_findings(gate, picks(4), kernel="hip")


def ties() -> list[str]:
    """Between lanes, and between the experts of a lane."""
    return choice_findings(exact_router(torch.zeros(2, 130).bfloat16(), 10), picks(2), kernel="hip")


def many() -> list[str]:
    logits = (random(1, 3, 512) * 4).bfloat16()
    return choice_findings(exact_router(logits, 10), picks(3), kernel="hip")


def rounded() -> list[str]:
    gate = exact_router(torch.zeros(1, 24).bfloat16(), 3)
    gate.weight.data[4, 7], gate.weight.data[9, 7], gate.weight.data[9, 900] = 256, 256, 1
    x = torch.zeros(1, 1024).bfloat16()
    x[:, 7] = x[:, 900] = 1
    return choice_findings(gate, x, kernel="hip")


def large_logits() -> list[str]:
    gate = exact_router((random(6, 2, 24) * 9 + 200).bfloat16(), 5)
    return choice_findings(gate, picks(2), kernel="hip")


def underflow() -> list[str]:
    steps = torch.tensor([0.0, -3.0, -30.0] + [-200.0 - i for i in range(21)])
    gate = exact_router(torch.stack([steps, steps.flip(0)]).bfloat16(), 8)
    return choice_findings(gate, picks(2), kernel="hip")


def one_by_one() -> list[str]:
    """Workgroups run one after the other."""
    gate = slow_block(24, 1152, 128, 5, 0).gate
    return choice_findings(gate, exact_rows(1, 3, 1152), batch=1, kernel="hip")


def again() -> list[str]:
    """Several launches with one counter, and who is last differs."""
    node, scratch = router(), Scratch(CPU)
    for time, rows in enumerate((3, 8, 1), 1):
        x = random(rows, rows, 1152).bfloat16()
        choice, launch = choice_of(node, x, scratch, batch=time)
        if launch.arguments["counter"][0] != time * 8:
            return [f"arrived: {launch.arguments['counter'].tolist()}"]
        if not torch.equal(choice.experts, choice_of(node, x)[0].experts):
            return [f"choice: of launch {time}"]
    return []


def any_rows() -> list[str]:
    node, x = router(), random(4, 4, 1152).bfloat16()
    whole = rows_of(choice_of(node, x)[0])
    alone = rows_of(choice_of(node, x[[1]])[0])
    same = all(torch.equal(a, b[[1]]) for a, b in zip(alone, whole, strict=True))
    return [] if same else ["bits: a row alone"]


def any_order() -> list[str]:
    node, x = router(), random(4, 2, 1152).bfloat16()
    orders: tuple[dict[str, int], ...] = ({}, {"batch": 1}, {"seed": 1}, {"seed": 2}, {"seed": 3})
    try:
        plain, *others = (rows_of(choice_of(node, x, **order)[0]) for order in orders)
    except EmulatorError as error:
        return [f"memory: {error}"]
    same = all(torch.equal(a, b) for got in others for a, b in zip(got, plain, strict=True))
    return [] if same else ["bits: another order"]


def stream() -> list[str]:
    slow, before = slow_block(16, 1024, 128, 4, 256), norm(1, 1024)
    return stream_findings(slow, before, norm(2, 1024), clear_rows(slow, before, 3), kernel="hip")


def nan_norm() -> list[str]:
    return nan_norm_findings(1.0)


def waiting() -> list[str]:
    return router_fences(router().launch(random(1, 3, 1152).bfloat16(), Scratch(CPU))[0])


def requesting() -> list[str]:
    launch, _ = router(512, 4096, 128, 10).launch(random(1, 4, 4096).bfloat16(), Scratch(CPU))
    return streaming(launch)  # pyright: ignore (a HipLaunch)


# ---- the faults

LOAD = "w[s] = *(const bf16x8*)(line + s * DEPTH);"
ROW = "const __bf16* row = a.x + (long)column * D + first * DEPTH + group * 8;"
LOGIT = "a.sums[((long)split * a.rows + row) * N + least(expert, E - 1)]"
STREAMED = "    stream(lds, a, tile, split, wave, lane);\n    meet();\n"
RELEASE = '__builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");\n  u64'
RAISED = "(before + 1) % (TILES * SPLITS) == 0"

fault(
    "rows of the weight read beyond its end", sums, "memory",
    ("least(tile * TILE + column, N - 1)", "(tile * TILE + column)"),
)  # fmt: skip
fault(
    "rows of x that are not there are read", sums, "memory",
    ("if (column < a.rows) {", "{"),
)  # fmt: skip
fault(
    "columns read beyond the end of a row", sums, "memory numbers",
    ("constexpr bool EVEN = SPLITS * STREAMERS * OWN == STEPS", "constexpr bool EVEN = true"),
)  # fmt: skip
fault(
    "all parts of the sum begin at 0", sums, "numbers",
    ("first = (split * STREAMERS + wave) * OWN", "first = wave * OWN"),
)  # fmt: skip
fault(
    "the last step of a streamer's sum skipped", sums, "numbers",
    ("s < OWN; s++) acc =", "s < OWN - 1; s++) acc ="),
)  # fmt: skip
fault(
    "columns of x in another order than the weight's", sums, "numbers",
    (ROW, ROW.replace("group * 8", "(group ^ 1) * 8")),
)  # fmt: skip
fault(
    "a streamer's sums left in another one's place", sums, "numbers memory unwritten",
    ("&lds.sums[wave][column]", "&lds.sums[wave / 2 * 2][column]"),
)  # fmt: skip
fault(
    "one streamer's sums forgotten", sums, "numbers",
    ("wave < STREAMERS; wave++) sum +=", "wave < STREAMERS - 1; wave++) sum +="),
)  # fmt: skip
fault(
    "sums stored for columns that are not there", sums, "memory numbers",
    ("if (column < N) to[column]", "to[column]"),
)  # fmt: skip
fault(
    "sums stored for rows that are not there", sums, "memory numbers",
    ("if (row >= a.rows) return;", ""),
)  # fmt: skip
fault(
    "parts of the sums in one place", sums, "numbers unwritten",
    ("to = a.sums + ((long)split * a.rows + row) * N", "to = a.sums + (long)row * N"),
)  # fmt: skip
fault(
    "one barrier too few before the sums are added", any_order, "memory bits",
    ("    meet();  // the streamers' sums are there\n", ""),
    (STREAMED, STREAMED.replace("    meet();\n", "")),
)  # fmt: skip
fault(
    "one barrier too few before the choice", any_order, "memory bits",
    ("  meet();  // the messenger knows whether this workgroup is the last\n", ""),
)  # fmt: skip
fault(
    "streamers summed in an order that depends on the rows", any_rows, "bits",
    ("&lds.sums[wave][row][pair]", "&lds.sums[(wave + a.rows) % STREAMERS][row][pair]"),
)  # fmt: skip
fault(
    "the router chooses too early", one_by_one, "unwritten choice",
    (RAISED, "before + 2 == TILES * SPLITS"),
)  # fmt: skip
fault(
    "counters used again: the count of the first launch alone", again, "choice",
    (RAISED, "before + 1 == TILES * SPLITS"),
)  # fmt: skip
fault(
    "one workgroup more waited for than there are", choice, "choice unwritten",
    (RAISED, "(before + 1) % (TILES * SPLITS + 1) == 0"),
)  # fmt: skip
fault(
    "a workgroup counted twice", again, "arrived choice",
    ("__hip_atomic_fetch_add(counter, 1,", "__hip_atomic_fetch_add(counter, 2,"),
)  # fmt: skip
fault(
    "nobody chooses for the last rows", eight_rows, "unwritten choice",
    ("if (wave >= rows ||", "if (wave >= 4 ||"),
)  # fmt: skip
fault(
    "every wave chooses for the first row", choice, "choice unwritten",
    ("choose(a, wave, lane);", "choose(a, 0, lane);"),
)  # fmt: skip
fault(
    "a part of the sum forgotten", choice, "choice",
    ("for (int split = 0; split < SPLITS", "for (int split = 1; split < SPLITS"),
)  # fmt: skip
fault(
    "logits not rounded to bf16", rounded, "choice",
    ("(float)(__bf16)sum", "sum"),
)  # fmt: skip
fault(
    "experts that are not there share in the softmax", unnormalised, "choice",
    ("expert < E ? (float)(__bf16)sum : -__builtin_inff()", "(float)(__bf16)sum"),
)  # fmt: skip
fault(
    "a probability of zero below an expert that is chosen", underflow, "choice",
    ("keys[i] = 1 + (p[i]", "keys[i] = (p[i]"), ("(float, best - 1)", "(float, best)"),
)  # fmt: skip
fault(
    "softmax without its maximum", large_logits, "choice unwritten",
    ("__builtin_elementwise_exp(p[i] - largest)", "__builtin_elementwise_exp(p[i])"),
)  # fmt: skip
fault(
    "the maximum of one row of lanes", large_logits, "choice unwritten",
    ("[](float x, float y) { return __builtin_fmaxf(x, y); }", "[](float x, float y) { return x; }"),
)  # fmt: skip
fault(
    "probabilities of half the lanes summed", many, "choice",
    ("ROW_BCAST_31, 0b1100, ALL", "ROW_BCAST_31, 0, ALL"),
)  # fmt: skip
fault(
    "ties to the higher lane", ties, "choice",
    ("__builtin_ctzll(ballot(own < EACH))", "(__builtin_popcountll(ballot(own < EACH)) - 1)"),
)  # fmt: skip
fault(
    "ties to the higher expert of a lane", ties, "choice",
    ("for (int i = EACH - 1; i >= 0; i--) own", "for (int i = 0; i < EACH; i++) own"),
)  # fmt: skip
fault(
    "a chosen expert stays in the choice", choice, "choice",
    ("lane * EACH + i == found ? 0 : keys[i]", "keys[i]"),
)  # fmt: skip
fault(
    "a lane's chosen expert takes the lane's others with it", many, "choice",
    ("lane * EACH + i == found ? 0", "lane == holder ? 0"),
)  # fmt: skip
fault(
    "the place of an expert in its own lane", many, "choice",
    ("__builtin_amdgcn_readlane(own, holder)", "__builtin_amdgcn_readfirstlane(own)"),
)  # fmt: skip
fault(
    "not renormalised", choice, "choice", ("NORMALISED ? share / total", "!NORMALISED ? share / total")
)  # fmt: skip
fault(
    "the choice stored for slots that are not there", many, "choice memory",
    ("if (lane < TOP_K) {", "if (lane < TOP_K + 1) {"),
)  # fmt: skip
fault(
    "the router's logits without the norm's rms", stream, "numbers choice",
    ("to[column] = sum[c] * inverse;", "to[column] = sum[c];"),
)  # fmt: skip
fault(
    "the rms of another row", stream, "numbers choice unwritten",
    ("* SQUARES + lane % MAX_ROWS]", "* SQUARES + (lane + 1) % MAX_ROWS]"),
)  # fmt: skip
fault(
    "the sums' counter raised before the stores are done", waiting, "waiting",
    (RELEASE, "u64"),
)  # fmt: skip
fault(
    "sums read as they were cached before the count", waiting, "waiting",
    ('  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");\n  choose', "  choose"),
)  # fmt: skip
fault(
    "a streamer waits for each load", requesting, "waiting",
    (LOAD, f'{{ {LOAD} asm volatile("s_waitcnt vmcnt(0)" ::: "memory"); }}'),
)  # fmt: skip
fault(
    "each NaN with a key of its own", nan_norm, "choice",
    ("(p[i] == p[i] ? __builtin_bit_cast(unsigned, p[i]) : 0x7fc00000)",
     "__builtin_bit_cast(unsigned, p[i])"),
)  # fmt: skip


test_a_fault_is_found, test_without_a_fault_nothing_is_found = as_hip_tests(FAULTS, __name__)
