"""The checks of the fast path are checked: each planted fault in a kernel must be found in the emulator.

A fault is a small wrong edit of a kernel's source, as a slip of the hand would make it. The changed
module is imported from a file of its own and stands in for `fast.kernels`' one; then one of the checks
of test_fast_moe.py runs on it, and must find what the fault is registered with.

A barrier that is missing before the counter of arrivals cannot be planted: the compiler puts one there.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

import fast.kernels
from fast.kernels import moe, mxfp4, router
from tests.support.fast_cases import (
    bits,
    block_findings,
    case,
    choice_findings,
    exact_router,
    exact_rows,
    findings,
    picks,
    random,
    repeated_work,
    routing,
    slow_block,
)

MODULES = {"moe": moe, "mxfp4": mxfp4, "router": router}
Check = Callable[[], list[str]]
numbered = count()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


# ---- the checks


def experts() -> list[str]:
    return findings(case(routing("overlapping", 4, 3, 24)))


def experts_and_added() -> list[str]:
    return findings(case(routing("overlapping", 4, 3, 24), added=True))


def wide_experts() -> list[str]:
    """Two blocks along both sums."""
    return findings(case(routing("overlapping", 2, 2, 3), E=3, D=512, I=512))


def any_arrival() -> list[str]:
    """Workgroups side by side, where those without work arrive first, and one after the other."""
    chosen = case(routing("returning", 2, 3, 24), cancelling=True)
    return bits(chosen, batches=(1,), rows=False)


def once() -> list[str]:
    return repeated_work(4, 3)


def choice() -> list[str]:
    """Ties, and logits of which sums along K are exact, in rows that differ."""
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


# ---- the faults


@dataclass(frozen=True)
class Fault:
    """What is edited, in which module of `MODULES`; and the check that must find it, as what."""

    module: str
    edits: tuple[tuple[str, str], ...]
    check: Check
    kind: str


FAULTS: dict[str, Fault] = {}


def fault(name: str, module: str, check: Check, kind: str, *edits: tuple[str, str]) -> None:
    FAULTS[name] = Fault(module, edits, check, kind)


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
    ("activated.to(tl.bfloat16), mask=row < rows)", "activated.to(tl.bfloat16))"),
)  # fmt: skip
fault(
    "rows read without a mask", "mxfp4", experts, "memory",
    ("x_block = tl.load(x + m * K + k, mask=m < rows, other=0.0)", "x_block = tl.load(x + m * K + k)"),
)  # fmt: skip
fault(
    "the last block of the hidden size skipped", "moe", wide_experts, "numbers",
    ("tl.range(0, D, BLOCK_K)", "tl.range(0, D - BLOCK_K, BLOCK_K)"),
)  # fmt: skip
fault(
    "the last block of the intermediate size skipped", "moe", wide_experts, "numbers",
    ("tl.range(0, I, BLOCK_K)", "tl.range(0, I - BLOCK_K, BLOCK_K)"),
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
fault("added up too early", "moe", any_arrival, "arrived", ("pairs - 1", "pairs - 2"))
fault(
    "the shared expert forgotten", "moe", experts_and_added, "numbers", ("if HAS_ADDED", "if False")
)

fault(
    "ties to the higher index", "router", ties, "choice",
    ("tl.min(tl.where(keys == best, index, BLOCK_E), 0)", "tl.max(tl.where(keys == best, index, -1), 0)"),
)  # fmt: skip
fault("not renormalised", "router", choice, "choice", ("if NORM:", "if not NORM:"))
fault(
    "softmax without its maximum", "router", large_logits, "choice unwritten",
    ("tl.exp(logits - tl.max(logits, 0))", "tl.exp(logits)"),
)  # fmt: skip
fault(
    "a part of the sum forgotten", "router", choice, "choice",
    ("tl.static_range(1, SPLITS)", "tl.static_range(2, SPLITS)"),
)  # fmt: skip
fault(
    "all parts of the sum begin at 0", "router", choice, "choice",
    ("start = tl.program_id(1) * PART", "start = 0"),
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
    "the shared expert's gate and up swapped", "router", block, "numbers",
    ("gate = _summed(parts, E + 1 + i", "gate = _summed(parts, E + 1 + I + i"),
    ("up = _summed(parts, E + 1 + I + i", "up = _summed(parts, E + 1 + i"),
)  # fmt: skip
fault(
    "the shared expert open in all rows", "router", block, "numbers",
    ("if HAS_GAIN:", "if False:"),
)  # fmt: skip
fault(
    "the opening without its sigmoid", "router", block, "numbers",
    ("1 / (1 + tl.exp(-opening))", "opening"),
)  # fmt: skip


def planted(what: Fault, folder: Path) -> ModuleType:
    """The module with its edits, each of which fits in one place, imported under a name of its own."""
    source = inspect.getsource(MODULES[what.module])
    for old, new in what.edits:
        assert source.count(old) == 1, f"{source.count(old)} places read {old!r}"
        source = source.replace(old, new)
    path = folder / f"{what.module}_{next(numbered)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    what = FAULTS[name]
    faulty = planted(what, tmp_path)
    if what.module == "mxfp4":
        dot, faulty = faulty.dot, planted(Fault("moe", (), what.check, ""), tmp_path)
        faulty.dot = dot
    monkeypatch.setattr(fast.kernels, faulty.__name__.split("_")[0], faulty)
    found = what.check()
    assert found, "nothing was found"
    assert {line.split(":")[0] for line in found} & set(what.kind.split()), found[0]


@pytest.mark.parametrize("check", {what.check: None for what in FAULTS.values()})
def test_without_a_fault_nothing_is_found(check: Check):
    assert not check()
