"""The shapes, places and counts in a row of a diff."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35.cache import DeltaState, KVCache
from qwen35.compare.diff import diff, passes
from qwen35.compare.judge import MOST, Judge, Report, Row, Tokens
from qwen35.compare.trace import trace
from qwen35.load import load
from reference.attention import GatedAttention
from reference.deltanet import GatedDeltaNet
from reference.moe import Router
from tests.support.checkpoints import (
    edit_tensors,
    write,
)
from tests.support.diffs import (  # noqa: F401
    ATTENTION,
    DELTA,
    FAULTS,
    IDS,
    MEMBERS,
    PREFIX,
    SIZES,
    VOCABULARY,
    Forward,
    assert_passes,
    folder,
    standing_in,
)


def row_of(report: Report, node: str, tensor: str = "output", phase: str = "prefill") -> Row:
    return next(r for r in report.rows if (r.node, r.tensor, r.phase) == (node, tensor, phase))


# --- what a row says


def with_element(place: Sequence[int], value: float) -> Forward:
    """A node whose output has one wrong element in passes that are long enough."""

    def forward(self: nn.Module, *arguments: Any) -> Tensor:
        out = type(self).forward(self, *arguments).clone()
        if out.shape[1] > place[1]:
            out[tuple(place)] = value
        return out

    return forward


def test_the_worst_element(folder: Path) -> None:
    swaps = [("lm_head", standing_in(with_element((0, 7, 42), 1000.0)))]
    report = diff(folder, IDS[:20], swaps=swaps)
    row = row_of(report, "lm_head")
    assert report.rows[0] is row and row.worst == [0, 7, 42]
    assert row.shape == [1, 14, VOCABULARY] and row.span == [0, 14]
    assert (row.position, row.channel) == (7, [42])
    assert 990 < row.max_abs < 1010 and row.rel_rms > 1
    assert row.x_bf16 == pytest.approx(row.max_abs / max(row.bf16, row.floor))
    assert row_of(report, "lm_head", phase="decode").passed


def in_the_second_pass(index: Sequence[int]) -> Forward:
    """A node whose output has one wrong element in the pass of tokens 64 to 68."""

    def forward(self: nn.Module, *arguments: Any) -> Tensor:
        out = type(self).forward(self, *arguments).clone()
        if out.shape[0 if out.dim() == 2 else 1] == 5:
            out[tuple(index)] = 1000.0
        return out

    return forward


@pytest.mark.parametrize("mode", ["local", "free"])
@pytest.mark.parametrize(
    ("node", "index", "channel"),
    [
        ("layers.1.self_attn", (0, 3, 42), [42]),
        ("layers.0.mlp.shared_expert", (3, 42), [42]),  # of rows
        (f"{ATTENTION}.q_norm", (0, 3, 5, 21), [5, 21]),  # of heads
        ("embed_tokens", (0, 3, 42), [42]),
        ("mtp.fc", (0, 3, 42), [42]),
    ],
)
def test_a_place_is_of_the_whole_sequence(
    node: str, index: Sequence[int], channel: list[int], mode: Any, folder: Path
) -> None:
    """The fourth token of the pass from 64 on is the one at position 67; the shape is that pass's."""
    report = diff(folder, IDS, swaps=[(node, standing_in(in_the_second_pass(index)))], mode=mode)
    row = row_of(report, node)
    assert not row.passed
    assert (row.position, row.channel) == (67, channel)
    assert row.worst == list(index)
    assert row.span == [64, 69] and 5 in row.shape
    heads = "head 5, " if len(channel) > 1 else ""
    assert row.place == f"prefill 64-68, worst at token 67, {heads}channel {channel[-1]}"


def test_a_place_in_a_state(folder: Path) -> None:
    """Keys count from the first token, the convolution's rows end with the pass, a matrix has none."""

    def forgetful(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
        out = GatedDeltaNet.forward(self, x, state)
        if x.shape[1] == 5:
            state.conv[0, 1, 7] = 1000.0
            state.recurrent = state.recurrent.clone()
            state.recurrent[0, 3, 2, 1] = 1000.0
        return out

    def wrong_keys(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
        out = GatedAttention.forward(self, x, cache)
        if x.shape[1] == 5:
            cache.v[0, 1, 67, 9] = 1000.0
        return out

    swaps = [(DELTA, standing_in(forgetful)), (ATTENTION, standing_in(wrong_keys))]
    report = diff(folder, IDS, swaps=swaps, stages=["layers.0", "layers.1"].__contains__)
    conv, recurrent = (row_of(report, DELTA, name) for name in ("conv", "recurrent"))
    v = row_of(report, ATTENTION, "v")
    assert (conv.position, conv.channel, conv.span) == (67, [7], [64, 69])
    assert (recurrent.position, recurrent.channel) == (None, [3, 2, 1])
    assert recurrent.place == "prefill 64-68, worst at head 3, channel [2, 1]"
    assert (v.position, v.channel, v.shape) == (67, [1, 9], [1, 2, 69, 32])
    assert not (conv.passed or recurrent.passed or v.passed)


def test_a_place_in_a_decode_pass(folder: Path) -> None:
    """One pass has one token, the other has the last four."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out = type(self).forward(self, x).clone()
        if out.shape[1] == 4:
            out[0, 2, 9] = 1000.0
        return out

    report = diff(folder, IDS, swaps=[("lm_head", standing_in(forward))], stages="lm_head".__eq__)
    row = row_of(report, "lm_head", phase="decode")
    assert (row.position, row.channel, row.span) == (73, [9], [71, 75])
    assert row.place.startswith("decode 71-74, worst at token 73, ")
    healthy = diff(folder, IDS[:3], decode=1, stages="lm_head".__eq__)
    assert row_of(healthy, "lm_head", phase="decode").place.startswith("decode 2, worst at token 2")


def test_another_shape_stays_a_failure() -> None:
    """It stays one if a later pass has the right shape."""
    judge = Judge()
    for tested in (torch.ones(1, 3, 4), torch.ones(1, 2, 4), torch.ones(1, 3, 4)):
        judge.add("a", "output", "prefill", [torch.ones(1, 3, 4), torch.ones(1, 3, 4), tested])
    (row,) = judge.report().rows
    assert not row.passed and row.max_abs == MOST and row.shape == [1, 2, 4]


def test_a_report_is_short() -> None:
    """A line when all pass, and a table of at most ten rows when not."""
    exact, rough = torch.ones(1, 2, 4), torch.full((1, 2, 4), 1.01)
    judge = Judge()
    for i in range(40):
        judge.add(f"good.{i}", "output", "prefill", [exact, rough, exact + 0.001 * i / 40])
    assert re.fullmatch(
        r"pass: 40 rows, at most 0\.0975 x bf16: good\.39, .*", repr(judge.report())
    )
    judge.add("bad", "output", "prefill", [exact, rough, exact + 9], span=(64, 66))
    lines = str(judge.report()).splitlines()
    assert len(lines) == 3 and lines[0] == "FAIL: 1 of 41 rows differ"
    assert "bad [1, 2, 4], prefill 64-65, worst at token 64, channel 0" in lines[2]
    for i in range(29):
        judge.add(f"bad{i}", "output", "prefill", [exact, rough, exact + 9])
    lines = str(judge.report()).splitlines()
    assert len(lines) == 13 and lines[-1].startswith("10 of 30 failing rows shown")
    assert repr(Judge().report()) == "pass: 0 rows"


def test_nan_is_counted(folder: Path) -> None:
    """All numbers of the row are finite, because JSON knows no others."""
    swaps = [("layers.1.input_layernorm", standing_in(with_element((0, 3, 5), math.nan)))]
    report = diff(folder, IDS[:20], swaps=swaps)
    row = row_of(report, "layers.1.input_layernorm")
    assert report.rows[0] is row
    assert row.nonfinite == 1
    assert row.worst == [0, 3, 5] and row.max_abs == row.x_bf16 == MOST
    assert math.isfinite(row.rel_rms)


def test_histograms_count_every_element(folder: Path) -> None:
    """Over all passes of a phase; tokens that were left out are not in it."""
    for mode in ("local", "free"):
        report = diff(folder, IDS, mode=mode)
        lengths = {"prefill": 69, "decode": 6}
        for node, width in {
            "embed_tokens": 64,
            "lm_head": VOCABULARY,
            f"{DELTA}.in_proj_b": 8,
        }.items():
            for phase, tokens in lengths.items():
                assert sum(row_of(report, node, phase=phase).histogram) == tokens * width
        for phase, tokens in lengths.items():
            row = row_of(report, "layers.0.mlp.gate", phase=phase)
            assert sum(row.histogram) == (tokens - row.unsure) * SIZES["num_experts"]
        assert sum(row_of(report, "mtp").histogram) == 69 * 64 - 64 * row_of(report, "mtp").unsure


def test_a_router_that_chooses_others(folder: Path) -> None:
    """Flips and how sure the oracle was, from weights that say so."""
    _, forward = FAULTS["router_of_the_next_experts"]
    report = diff(folder, IDS, swaps=[("layers.1.mlp.gate", standing_in(forward))])
    row = row_of(report, "layers.1.mlp.gate")
    assert row.flips > 60 and 0.01 < row.margin < 1
    assert row_of(report, "layers.0.mlp.gate").margin < 0.01


def test_experts_that_rounding_may_flip(tmp_path: Path) -> None:
    """Two experts almost alike: which of them is chosen last is left open; elsewhere it is not."""
    write(tmp_path, *MEMBERS["moe"][:2], seed=7, **SIZES)
    name = f"{PREFIX}.0.mlp.gate.weight"
    step = torch.zeros(64).index_fill_(0, torch.tensor([5]), 2.0**-12)
    edit_tensors(tmp_path, lambda tensors: tensors[name][4].copy_(tensors[name][3].float() + step))

    def other(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        """Takes expert 4 for 3 where 3 is the last one chosen and 4 is not chosen, and back."""
        experts, weights = Router.forward(self, x)
        for one, two in ((3, 4), (4, 3)):
            last = (experts[:, -1] == one) & ~(experts == two).any(-1)
            if last.any():
                experts = experts.clone()
                experts[last, -1] = two
                return experts, weights
        return experts, weights

    swaps = [("layers.0.mlp.gate", standing_in(other))]
    report = diff(tmp_path, IDS, swaps=swaps, stages="layers.0".__eq__)
    assert_passes(report)
    row = row_of(report, "layers.0.mlp.gate")
    assert 0 < row.flips <= row.unsure < 69
    within, around = row_of(report, "layers.0.mlp"), row_of(report, "layers.0")
    assert row.unsure == within.unsure <= around.unsure


def test_state_rows(folder: Path) -> None:
    """Each mixer has rows for its state: one a phase in local mode, one at the end in free mode and
    by stage."""
    local, free = (diff(folder, IDS, mode=mode) for mode in ("local", "free"))
    for node, tensors in ((DELTA, ("conv", "recurrent")), (ATTENTION, ("k", "v"))):
        for tensor in tensors:
            for phase in ("prefill", "decode"):
                row_of(local, node, tensor, phase)
            row_of(free, ".".join(node.split(".")[:2]), tensor, "after all")
    assert row_of(local, DELTA, "recurrent").shape == [1, 8, 16, 24]
    assert row_of(local, DELTA, "conv").shape == [1, 3, 256]
    keys = row_of(local, ATTENTION, "k", "decode")
    assert keys.shape == [1, 2, keys.span[1], 32]
    values = row_of(local, "mtp.layers.0.self_attn", "v", "decode")
    assert values.shape == [1, 2, values.span[1], 32]
    assert row_of(free, "mtp", "k", "after all").shape == [1, 2, 74, 32]
    assert {r.node for r in local.rows if r.tensor != "output"} == {
        DELTA, ATTENTION, "mtp.layers.0.self_attn"
    }  # fmt: skip


def test_tokens(folder: Path) -> None:
    """A head that favours one token: where this first shows, and what it cost in the oracle's logits."""

    def biased(self: nn.Module, x: Tensor) -> Tensor:
        out = type(self).forward(self, x)
        return torch.cat((out[..., :9], out[..., 9:10] + 1.5, out[..., 10:]), -1)

    free = {"dtype": torch.float32, "mode": "free"}
    report = diff(folder, IDS, swaps=[("lm_head", standing_in(biased))], **free)
    model = load(folder, dtype=torch.float32)
    logits = trace(model, IDS, "lm_head")["lm_head"][0]
    best, at = logits.max(-1)
    other = ((logits[:, 9] + 1.5 > best) & (at != 9)).nonzero().flatten()
    assert report.tokens.compared == len(IDS)
    assert report.tokens.equal == len(IDS) - len(other)
    assert report.tokens.first == other[0]
    gap = best[other[0]] - logits[other[0], 9]
    assert report.tokens.margin == pytest.approx(gap.item(), abs=1e-5)
    healthy = diff(folder, IDS, **free).tokens
    assert healthy.equal == len(IDS) and healthy.first is None and healthy.margin is None


def test_order_of_rows() -> None:
    """Failing first, the inner node before the one around it, then by how far; passing rows last."""
    zero = torch.zeros(1, 2, 4)
    exact = torch.ones(1, 2, 4)
    rough = exact + 0.01
    judge = Judge()
    sizes = {"a": 5.0, "a.b": 0.1, "a.b.c": 0.05, "ab": 0.2, "d": 0.015, "e": 0.0}
    for node, size in sizes.items():
        judge.add(node, "output", "prefill", [exact, rough, exact + size])
    judge.add("zeros", "output", "prefill", [zero, zero, zero])
    judge.add("shape", "output", "prefill", [exact, rough, exact[:, :1]])
    rows = judge.report().rows
    assert [row.node for row in rows] == ["shape", "ab", "a.b.c", "a", "a.b", "d", "e", "zeros"]
    assert [row.passed for row in rows] == 5 * [False] + 3 * [True]


@pytest.mark.parametrize("tokens", [1, 2, 5, 63, 64, 65, 70, 130, 198, 1000])
@pytest.mark.parametrize("decode", [0, 1, 4, 5, 6])
def test_passes_take_each_token_once(tokens: int, decode: int) -> None:
    """The tokens come in order. Prefill passes start on the grid; decode passes have at most four
    tokens."""
    plan = passes(tokens, min(decode, tokens - 1))
    assert [t for _, first, end in plan for t in range(first, end)] == list(range(tokens))
    for phase, first, end in plan:
        assert first % 64 == 0 if phase == "prefill" else end - first <= 4


def test_a_report_is_true_if_it_has_passed() -> None:
    """Therefore `assert diff(...)` is a check."""
    good, bad = Row("a", "output", "prefill"), Row("b", "output", "prefill", passed=False)
    assert Report([good], Tokens(), [])
    assert not Report([good, bad], Tokens(), [])
