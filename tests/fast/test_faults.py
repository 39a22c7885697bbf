"""Planted faults in the kernels of the experts and the router: the checks of this folder must find each.

A fault is a small wrong edit of a kernel's source, as a slip of the hand would make it. A barrier that is
missing before the counter of arrivals cannot be planted: the compiler puts one there.
"""

import pytest
import torch

pytest.importorskip("triton")

from fast import configs
from fast.launch import Scratch
from tests.support.fast_cases import (
    CPU,
    TARGET,
    bits,
    block_findings,
    case,
    choice_findings,
    emulated,
    exact_router,
    exact_rows,
    fast_experts,
    findings,
    picks,
    random,
    repeated_work,
    routing,
    slow_block,
    waits_for_stores,
)
from tests.support.fast_faults import Faults, as_tests
from tests.support.fast_streams import clear_rows, norm, stream_findings
from tools.gfx950.target import compile_launch

FAULTS = Faults()
fault = FAULTS.add


# ---- the checks


def experts() -> list[str]:
    return findings(case(routing("overlapping", 4, 3, 24)))


def experts_and_residual() -> list[str]:
    return findings(case(routing("overlapping", 4, 3, 24), residual=True))


def wide_experts() -> list[str]:
    """Both products sum over two blocks."""
    D, I = 1024, 512
    for kernel, length in (("gate_up", D), ("down", I)):
        config = configs.lookup("gfx950", kernel, configs.key(D=D, I=I))
        assert config["BLOCK_K"] == length // 2
    return findings(case(routing("overlapping", 2, 2, 3), E=3, D=D, I=I))


def any_arrival() -> list[str]:
    """Workgroups side by side, where those without work arrive first, and one after the other."""
    chosen = case(routing("returning", 2, 3, 24), cancelling=True)
    return bits(chosen, batches=(1,), rows=False)


def once() -> list[str]:
    return repeated_work(4, 3)


def choice() -> list[str]:
    """Rows that differ, with ties, and with logits whose sums along K are exact."""
    return choice_findings(slow_block(24, 1024, 128, 5, 0).gate, exact_rows(1, 3, 1024))


def unnormalised() -> list[str]:
    gate = exact_router((random(3, 4, 24) * 2 - 5).bfloat16(), 5, norm=False)
    return choice_findings(gate, picks(4))


def ties() -> list[str]:
    return choice_findings(exact_router(torch.zeros(2, 24).bfloat16(), 5), picks(2))


def rounded() -> list[str]:
    gate = exact_router(torch.zeros(1, 24).bfloat16(), 3)
    gate.weight.data[4, 7], gate.weight.data[9, 7], gate.weight.data[9, 900] = 256, 256, 1
    x = torch.zeros(1, 1024).bfloat16()
    x[:, 7] = x[:, 900] = 1
    return choice_findings(gate, x)


def large_logits() -> list[str]:
    return choice_findings(exact_router((random(6, 2, 24) * 9 + 200).bfloat16(), 5), picks(2))


def block() -> list[str]:
    return block_findings(slow_block(16, 1024, 128, 4, 256), exact_rows(1, 3, 1024))


def bf16_block() -> list[str]:
    return block_findings(slow_block(16, 1024, 96, 4, 48, fp4=False), exact_rows(1, 3, 1024))


def block_in_a_stream() -> list[str]:
    slow = slow_block(16, 1024, 128, 4, 256)
    before = norm(1, 1024)
    return stream_findings(slow, before, norm(2, 1024), clear_rows(slow, before, 3))


def foreign_ids() -> list[str]:
    """Ids below and above all experts give NaN in their own rows, and in no other."""
    ids = routing("different", 3, 2, 24)
    ids[0, 1], ids[2, 0] = -1, 24
    chosen = case(ids)
    launches, out = fast_experts(24, 256, 128).launches(
        chosen.x, ids.int(), chosen.weights, Scratch(CPU)
    )
    emulated(launches)
    got = out.isnan().all(-1).tolist()
    return [] if got == [True, False, True] else [f"foreign: rows of NaN {got}"]


def waiting_experts() -> list[str]:
    launches, _ = fast_experts(24, 256, 128).launches(
        case(ids := routing("random", 2, 3, 24)).x, ids.int(), torch.ones(2, 3), Scratch(CPU)
    )
    waits = waits_for_stores(compile_launch(launches[1], TARGET))
    return [] if waits else ["waiting: the counter is raised before all stores are done"]


def one_by_one() -> list[str]:
    """Workgroups run one after the other."""
    gate = slow_block(24, 1024, 128, 5, 0).gate
    return choice_findings(gate, exact_rows(1, 3, 1024), batch=1)


def five_rows() -> list[str]:
    return choice_findings(slow_block(24, 1024, 128, 5, 0).gate, exact_rows(1, 5, 1024))


# ---- the faults

SILU = "gate / (1 + tl.exp(-gate)) * up  # [BLOCK_N/2, ROWS]"
SCALES = "scales = scale + place(n, group, D // 32, TILE_K // 32, TILE_N)"
SHARE = "share = tl.load(weights + row * TOP_K + slot,"
SOURCE = "source = tl.load(first + row * TOP_K + slot, mask=row < rows, other=0)"
FIRST = "tl.where(chosen == tl.load(experts + pair), earlier, pair)"

fault("gate and up swapped", "moe", experts, "numbers", ("gate, up = acc", "up, gate = acc"))
fault("SiLU forgotten", "moe", experts, "numbers", (SILU, "gate * up"))
fault(
    "the scale of the neighbouring group", "moe", experts, "numbers",
    (SCALES, SCALES.replace("group", "group ^ 1")),
)  # fmt: skip
fault(
    "the scales of the row below", "moe", experts, "numbers",
    (SCALES, SCALES.replace("(n,", "(n ^ 1,")),
)  # fmt: skip
fault(
    "high nibble first", "mxfp4", experts, "numbers",
    ("dot_scaled(weight,", "dot_scaled((weight >> 4) | (weight << 4),"),
)  # fmt: skip
fault(
    "an expert's rows counted without its up rows", "moe", experts, "numbers",
    ("expert * (2 * I)", "expert * I"),
)  # fmt: skip
fault(
    "down of the first pair's expert", "moe", experts, "numbers",
    ("(tl.load(experts + pair), E).to(tl.int64) * D", "(tl.load(experts), E).to(tl.int64) * D"),
)  # fmt: skip
fault(
    "pairs of other experts taken to be the same", "moe", experts, "numbers",
    (FIRST, FIRST.replace("==", "!=")),
)  # fmt: skip
fault(
    "every pair taken to be the first one of its expert", "moe", once, "work",
    (FIRST, FIRST.replace("earlier, pair", "pair, pair")),
)  # fmt: skip
fault(
    "hidden rows stored without a mask", "moe", experts, "memory",
    ("i, activated.to(tl.bfloat16), mask=row < rows)", "i, activated.to(tl.bfloat16))"),
)  # fmt: skip
fault(
    "rows read without a mask", "mxfp4", experts, "memory",
    ("x_block = tl.load(x + m * K + k, mask=m < rows, other=0.0)", "x_block = tl.load(x + m * K + k)"),
)  # fmt: skip
fault(
    "the last block of the hidden size skipped", "moe", wide_experts, "numbers",
    ("tl.range(0, D, BLOCK_K):\n                w, s",
     "tl.range(0, D - BLOCK_K, BLOCK_K):\n                w, s"),
)  # fmt: skip
fault(
    "the last block of the intermediate size skipped", "moe", wide_experts, "numbers",
    ("tl.range(0, I, BLOCK_K):\n                    w, s",
     "tl.range(0, I - BLOCK_K, BLOCK_K):\n                    w, s"),
)  # fmt: skip
fault(
    "hidden rows counted by the rows there are", "moe", experts, "numbers unwritten",
    ("x = hidden + pair * 8 * I", "x = hidden + pair * rows * I"),
)  # fmt: skip
fault(
    "the share of the next slot", "moe", experts, "numbers",
    (SHARE, SHARE.replace("slot", "(slot + 1) % TOP_K")),
)  # fmt: skip
fault(
    "a pair's own part taken where the first pair's is meant", "moe", experts, "unwritten",
    (SOURCE, "source = row * TOP_K + slot"),
)  # fmt: skip
fault("shares forgotten", "moe", experts, "numbers", ("total += share * ", "total += "))
fault(
    "the sum begins with the slot that arrives last", "moe", any_arrival, "bits",
    (SHARE, SHARE.replace("slot", "(slot + pair) % TOP_K")),
    (SOURCE, SOURCE.replace("slot", "(slot + pair) % TOP_K")),
)  # fmt: skip
fault(
    "the counter not set back", "moe", experts, "arrived",
    ("        tl.store(arrived + tl.program_id(0), 0)", ""),
)  # fmt: skip
fault(
    "added up too early",
    "moe",
    any_arrival,
    "arrived",
    ("tl.num_programs(1) - 1", "tl.num_programs(1) - 2"),
)
fault(
    "the residual forgotten",
    "moe",
    experts_and_residual,
    "numbers",
    ("if HAS_RESIDUAL", "if False"),
)
fault(
    "ties to the higher index", "router", ties, "choice",
    ("tl.min(tl.where(keys == best, index, BLOCK_E), 0)", "tl.max(tl.where(keys == best, index, -1), 0)"),
    ("tl.min(lowest.reshape", "tl.max(lowest.reshape"),
)  # fmt: skip
fault("not renormalised", "router", choice, "choice", ("if NORM:", "if not NORM:"))
fault(
    "softmax without its maximum", "router", large_logits, "choice unwritten",
    ("tl.exp(logits - _of_rows(largest, LANES))", "tl.exp(logits)"),
)  # fmt: skip
fault(
    "a part of the sum forgotten", "common", choice, "choice",
    ("tl.static_range(1, SPLITS)", "tl.static_range(2, SPLITS)"),
)  # fmt: skip
fault(
    "all parts of the sum begin at 0", "router", choice, "choice",
    ("begin = tl.program_id(1) * PART", "begin = 0"),
)  # fmt: skip
fault(
    "experts that are not there share in the softmax", "router", unnormalised, "choice",
    ('logits = tl.where(index < E, rounded, float("-inf"))', "logits = rounded"),
)  # fmt: skip
fault(
    "logits not rounded to bf16", "router", rounded, "choice",
    ("logits.to(tl.bfloat16).to(tl.float32)", "logits"),
)  # fmt: skip
fault(
    "a chosen expert stays in the choice", "router", choice, "choice",
    ("keys = tl.where(index == expert, -1, keys)", ""),
)  # fmt: skip
fault(
    "rows of the weight read beyond its end", "router", choice, "memory",
    ("tl.minimum(n, N - 1)", "n"),
)  # fmt: skip
fault(
    "the shared expert's gate and up swapped", "moe", block, "numbers",
    ("gate = summed(parts, row, E + 1 + i", "gate = summed(parts, row, E + 1 + I + i"),
    ("up = summed(parts, row, E + 1 + I + i", "up = summed(parts, row, E + 1 + i"),
)  # fmt: skip
fault(
    "the shared expert forgotten", "moe", block, "numbers",
    ("        if SHARED_I > 0:\n            pointers", "        if False:\n            pointers"),
)  # fmt: skip
fault(
    "the shared expert let through in all rows", "moe", block, "numbers",
    ("        acc *= 1 / (1 + tl.exp(-opened))\n", ""),
)  # fmt: skip
fault(
    "the shared expert's gate without its sigmoid", "moe", block, "numbers",
    ("acc *= 1 / (1 + tl.exp(-opened))", "acc *= opened"),
)  # fmt: skip
fault(
    "the router chooses too early", "router", one_by_one, "unwritten choice arrived",
    ("tl.num_programs(0) * tl.num_programs(1) - 1", "tl.num_programs(0) * tl.num_programs(1) - 2"),
)  # fmt: skip
fault(
    "only four rows are chosen for", "router", five_rows, "unwritten choice",
    ("tl.range(0, rows, TOGETHER)", "tl.range(0, TOGETHER, TOGETHER)"),
)  # fmt: skip
fault(
    "the router's counter not set back", "router", choice, "arrived",
    ("        tl.store(arrived, 0)\n", "        pass\n"),
)  # fmt: skip
fault(
    "the shared expert's rows after the first block of columns not activated", "moe", block,
    "numbers unwritten",
    ("tl.range(tl.program_id(0) * BLOCK, I, tl.num_programs(0) * BLOCK)",
     "tl.range(tl.program_id(0) * BLOCK, BLOCK, tl.num_programs(0) * BLOCK)"),
)  # fmt: skip
fault(
    "the last block of the shared expert's sum skipped", "moe", block, "numbers",
    ("tl.range(0, SHARED_I, BLOCK_I)", "tl.range(0, SHARED_I - BLOCK_I, BLOCK_I)"),
)  # fmt: skip
fault(
    "the shared expert's SiLU forgotten", "moe", block, "numbers",
    ("activated = gate / (1 + tl.exp(-gate)) * up\n        tl.store(shared",
     "activated = gate * up\n        tl.store(shared"),
)  # fmt: skip
fault(
    "the shared expert opened by an expert's logit", "moe", block, "numbers",
    ("opened = summed(parts, row, E, ", "opened = summed(parts, row, E - 1, "),
)  # fmt: skip
fault(
    "the shared expert's part taken where a pair's is meant", "moe", block, "numbers unwritten",
    ("partial + (pairs * 8 + row) * D + column, acc", "partial + row * D + column, acc"),
)  # fmt: skip
fault(
    "ids of no expert taken for the nearest one", "moe", foreign_ids, "foreign",
    ("(chosen >= 0) & (chosen < E)", "chosen == chosen"),
)  # fmt: skip
fault(
    "ids above all experts taken for the last one", "moe", foreign_ids, "foreign",
    ("(chosen >= 0) & (chosen < E)", "chosen >= 0"),
)  # fmt: skip
fault(
    "the counter raised before all waves have stored", "common", waiting_experts, "waiting",
    ("    if is_hip():\n", "    if False:\n"),
)  # fmt: skip
fault(
    "the last block of the hidden size skipped in bf16", "moe", bf16_block, "numbers",
    ("tl.range(0, D, BLOCK_K):\n                acc = _dot",
     "tl.range(0, D - BLOCK_K, BLOCK_K):\n                acc = _dot"),
)  # fmt: skip
fault(
    "the last block of the intermediate size skipped in bf16", "moe", bf16_block, "numbers",
    ("tl.range(0, I, BLOCK_K):\n                    acc = _dot",
     "tl.range(0, I - BLOCK_K, BLOCK_K):\n                    acc = _dot"),
)  # fmt: skip
fault(
    "rows read without a mask in bf16", "moe", bf16_block, "memory",
    ("columns = tl.load(x + m * K + k + along[:, None], mask=m < rows, other=0.0)",
     "columns = tl.load(x + m * K + k + along[:, None])"),
)  # fmt: skip
# In the residual stream.
fault(
    "the router's logits without the norm's rms", "router", block_in_a_stream, "numbers choice",
    ("acc *= inverse_rms(squares, K, eps, PARTS, ROWS)[None, :]", "acc *= 1.0"),
)  # fmt: skip
fault(
    "the experts' gate and up without the norm's rms", "moe", block_in_a_stream, "numbers",
    ("acc *= inverse_rms(squares, D, eps, PARTS, ROWS)[None, :]", "acc *= 1.0"),
)  # fmt: skip
fault(
    "squares left in the place of the first block", "moe", block_in_a_stream, "numbers unwritten",
    ("block, inside = tl.program_id(0), ", "block, inside = 0, "),
)  # fmt: skip
fault(
    "scaled rows and squares not left", "moe", block_in_a_stream, "numbers unwritten",
    ("if HAS_NEXT", "if False"),
)  # fmt: skip
fault(
    "what is left for the next norm taken before the residual", "moe", block_in_a_stream, "numbers",
    ("        if HAS_RESIDUAL:\n            total +=",
     "        bare = total\n        if HAS_RESIDUAL:\n            total +="),
    ("store_scaled(total, next_norm", "store_scaled(bare, next_norm"),
)  # fmt: skip


test_a_fault_is_found, test_without_a_fault_nothing_is_found = as_tests(FAULTS, __name__)
