"""The figures of a report, from numbers that can be checked by hand: all are sums of few powers of 2."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35.cache import DeltaState
from qwen35.compare.judge import BINS, MOST, Judge, Report, Row, Tokens, place_of, table, times

BF16 = torch.bfloat16
# The largest is 16, so half a unit in the last place of bfloat16 is 16 / 256.
ORACLE = torch.tensor([[[1.0, 2, 4, 8], [0, -16, 1, 1]]], dtype=torch.float64)


def off(changes: dict[tuple[int, int], float], oracle: Tensor = ORACLE) -> Tensor:
    """The oracle's numbers in bfloat16, with errors in some places (token, channel)."""
    result = oracle.clone()
    for (token, channel), error in changes.items():
        result[0, token, channel] += error
    assert torch.equal(result.to(BF16).double(), result)
    return result.to(BF16)


ROUGH = off({(0, 1): 0.25, (1, 3): -0.125})


def only(judge: Judge) -> Row:
    (row,) = judge.report().rows
    return row


# --- one tensor


def test_the_figures_of_a_row() -> None:
    judge = Judge()
    tested = off({(0, 0): 0.25, (1, 2): 1.0})
    judge.add("a", "output", "prefill", [ORACLE, ROUGH, tested], span=(64, 66))
    row = only(judge)
    assert (row.max_abs, row.bf16, row.floor, row.x_bf16) == (1, 0.25, 1 / 16, 4)
    assert row.rel_rms == pytest.approx(math.sqrt(1.0625 / 343), rel=1e-12)
    assert row.bf16_rms == pytest.approx(math.sqrt(0.078125 / 343), rel=1e-12)
    assert (row.shape, row.worst, row.span) == ([1, 2, 4], [0, 1, 2], [64, 66])
    assert (row.position, row.channel) == (65, [2])
    assert (row.elements, row.nonfinite, row.unsure, row.flips, row.margin) == (8, 0, 0, 0, 0)
    # In units of 0.25: 4, 1 and six times nothing.
    assert row.histogram == [{0: 6, 16: 1, 18: 1}.get(i, 0) for i in range(BINS)]
    assert not row.passed


def test_histograms_end_with_what_is_larger_or_smaller() -> None:
    """The unit is the yardstick's error, or the floor if that is larger."""
    judge = Judge()
    errors = {(0, 0): 2.0**-7, (0, 2): 8.0, (1, 0): 2.0**-30, (1, 1): 2.0**14 + 16}
    judge.add("a", "output", "prefill", [ORACLE, off({}), off(errors)])
    found = {i: count for i, count in enumerate(only(judge).histogram) if count}
    assert found == {0: 5, 13: 1, 23: 2}


@pytest.mark.parametrize(("error", "passed"), [(0.5625, True), (0.5703125, False)])
def test_a_row_passes_up_to_twice_the_yardsticks_error_and_half_an_ulp(
    error: float, passed: bool
) -> None:
    judge = Judge()
    judge.add("a", "output", "prefill", [ORACLE, ROUGH, off({(1, 2): -error})])
    assert only(judge).passed is passed


def test_the_largest_of_several_passes() -> None:
    """The place and the shape are those of its pass, the first one of equals; counts are of all."""
    judge = Judge()
    short = ORACLE[:, :1]
    judge.add("a", "output", "prefill", [ORACLE, off({}), off({(0, 1): 0.25})], span=(0, 2))
    sides = [short, off({(0, 0): 0.5}, short), off({(0, 3): 2}, short)]
    judge.add("a", "output", "prefill", sides, span=(2, 3))
    judge.add("a", "output", "prefill", [ORACLE, off({}), off({(1, 3): 2})], span=(3, 5))
    row = only(judge)
    assert (row.max_abs, row.bf16, row.floor) == (2, 0.5, 1 / 16)
    assert (row.shape, row.worst, row.span) == ([1, 1, 4], [0, 0, 3], [2, 3])
    assert (row.position, row.channel, row.elements) == (2, [3], 20)
    assert sum(row.histogram) == 20
    total = 2 * 343 + 85
    assert row.rel_rms == pytest.approx(math.sqrt(8.0625 / total), rel=1e-12)
    assert row.bf16_rms == pytest.approx(math.sqrt(0.25 / total), rel=1e-12)


def test_phases_and_tensors_are_rows_of_their_own() -> None:
    judge = Judge()
    for key in (("a", "output", "prefill"), ("a", "output", "decode"), ("a", "k", "decode")):
        judge.add(*key, [ORACLE, ROUGH, ROUGH])
    assert {(r.node, r.tensor, r.phase, r.elements) for r in judge.report().rows} == {
        ("a", "output", "prefill", 8), ("a", "output", "decode", 8), ("a", "k", "decode", 8)
    }  # fmt: skip


def test_an_exact_row_has_a_place_and_no_error() -> None:
    judge = Judge()
    judge.add("a", "output", "prefill", [ORACLE, off({}), off({})], span=(8, 10))
    row = only(judge)
    assert (row.max_abs, row.x_bf16, row.worst, row.position) == (0, 0, [0, 0, 0], 8)
    assert row.passed


@pytest.mark.parametrize(("tested", "x"), [(0.0, 0.0), (0.5, MOST)])
def test_where_all_should_be_zero(tested: float, x: float) -> None:
    """Nothing can be divided by then."""
    judge, zeros = Judge(), torch.zeros(1, 2, 4)
    judge.add("a", "output", "prefill", [zeros, zeros, zeros + tested])
    row = only(judge)
    assert (row.x_bf16, row.rel_rms, row.bf16_rms) == (x, 0, 0)
    assert row.passed is (x == 0)


def test_other_axes_with_as_many_elements_are_the_same_tensor() -> None:
    judge = Judge()
    judge.add("a", "output", "prefill", [ORACLE, ROUGH, off({(1, 2): 1}).reshape(2, 4)])
    row = only(judge)
    assert (row.shape, row.worst, row.max_abs) == ([1, 2, 4], [0, 1, 2], 1)


def test_another_shape_fails() -> None:
    judge = Judge()
    judge.add("a", "output", "prefill", [ORACLE, ROUGH, ROUGH[:, :1]], span=(64, 66))
    row = only(judge)
    assert (row.max_abs, row.x_bf16, row.passed) == (MOST, MOST, False)
    assert (row.shape, row.span, row.elements) == ([1, 1, 4], [64, 66], 0)


def test_a_state_before_its_first_token_is_no_failure() -> None:
    judge, none = Judge(), torch.zeros(1, 2, 0, 4)
    judge.add("a", "k", "decode", [none, none, none])
    row = only(judge)
    assert (row.shape, row.elements, row.passed) == ([1, 2, 0, 4], 0, True)


def test_tokens_that_rounding_may_change_are_left_out() -> None:
    judge = Judge()
    unsure = torch.tensor([False, True])
    tested = off({(0, 3): 0.125, (1, 2): 1.0})
    for _ in range(2):
        judge.add("a", "output", "prefill", [ORACLE, ROUGH, tested], unsure)
    row = only(judge)
    assert (row.max_abs, row.bf16, row.floor) == (0.125, 0.25, 8 / 256)
    assert (row.unsure, row.elements, sum(row.histogram)) == (2, 8, 8)
    assert row.rel_rms == pytest.approx(0.125 / math.sqrt(85), rel=1e-12)


def test_nan_and_infinity_are_counted_where_the_oracle_has_numbers() -> None:
    judge = Judge()
    tested = off({})
    tested[0, 0, 1], tested[0, 1, 0], tested[0, 1, 3] = math.nan, math.inf, -math.inf
    judge.add("a", "output", "prefill", [ORACLE, ROUGH, tested], torch.tensor([True, False]))
    judge.add("a", "output", "prefill", [ORACLE, ROUGH, ROUGH])
    row = only(judge)
    assert (row.nonfinite, row.max_abs, row.x_bf16, row.passed) == (2, MOST, MOST, False)
    assert row.worst == [0, 1, 0] and math.isfinite(row.rel_rms)


# --- the mode free


def test_the_mode_free_judges_the_mean_square() -> None:
    """One large error passes, where the yardstick has several smaller ones."""
    exact = torch.ones(1, 8, 4)
    rough, tested = exact + 0.25, exact.clone()
    tested[0, 3, 1] = 2
    rows = {}
    for mode in ("local", "free"):
        judge = Judge(mode)  # pyright: ignore
        judge.add("a", "output", "prefill", [exact, rough, tested])
        rows[mode] = only(judge)
    assert rows["local"].x_bf16 == 4 and not rows["local"].passed
    assert rows["free"].x_bf16 == pytest.approx(1 / math.sqrt(2), rel=1e-12)
    assert rows["free"].passed and rows["free"].max_abs == 1


@pytest.mark.parametrize(("yardstick", "passed"), [(127 / 512, True), (126 / 512, False)])
def test_a_mean_square_passes_up_to_twice_the_yardsticks_and_half_an_ulp(
    yardstick: float, passed: bool
) -> None:
    """0.5 is twice 127 / 512 and 1 / 256."""
    judge, exact = Judge("free"), torch.ones(1, 16, 4, dtype=torch.float64)
    judge.add("a", "output", "prefill", [exact, exact + yardstick, (exact + 0.5).to(BF16)])
    assert only(judge).passed is passed


@pytest.mark.parametrize(("tokens", "passed"), [(31, True), (32, False)])
def test_a_few_elements_have_no_mean_square_to_judge(tokens: int, passed: bool) -> None:
    judge, exact = Judge("free"), torch.ones(1, tokens, 1)
    judge.add("a", "output", "prefill", [exact, exact, exact + 4])
    assert only(judge).passed is passed
    judge.add("a", "output", "prefill", [exact[:, :1], exact[:, :1], exact[:, :1] * math.nan])
    assert not only(judge).passed


# --- routers, states, tokens


def chosen(*experts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first of the experts of each token has weight 0.75, the second 0.25."""
    return torch.tensor(experts), torch.tensor([[0.75, 0.25]] * len(experts))


def test_a_router_is_compared_as_weights_of_all_experts() -> None:
    judge = Judge(experts=4)
    oracle, other = chosen((0, 1), (2, 3), (0, 3)), chosen((0, 1), (2, 0), (0, 2))
    gap, unsure = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([False, False, True])
    for span in ((0, 3), (3, 6)):
        judge.add_choice("r", "prefill", [oracle, oracle, other], gap, unsure, span)
    row = only(judge)
    assert (row.tensor, row.phase, row.shape) == ("output", "prefill", [3, 4])
    assert (row.flips, row.margin, row.unsure) == (4, 0.25, 2)
    assert row.elements == 8  # two experts of two tokens, twice
    assert (row.max_abs, row.worst, row.position, row.channel) == (0.25, [1, 0], 1, [0])
    assert not row.passed


def test_a_router_in_another_order_chooses_the_same() -> None:
    judge = Judge(experts=4)
    oracle = chosen((0, 1), (2, 3))
    other = tuple(part.flip(-1) for part in oracle)
    gap, sure = torch.tensor([0.5, 0.25]), torch.tensor([False, False])
    judge.add_choice("r", "prefill", [oracle, oracle, other], gap, sure)
    row = only(judge)
    assert (row.flips, row.margin, row.max_abs, row.passed) == (0, 0, 0, True)


def test_a_router_of_fewer_tokens_fails() -> None:
    judge = Judge(experts=4)
    oracle = chosen((0, 1), (2, 3))
    gap, sure = torch.tensor([0.5, 0.25]), torch.tensor([False, False])
    judge.add_choice("r", "prefill", [oracle, oracle, chosen((0, 2))], gap, sure)
    row = only(judge)
    assert (row.shape, row.passed, row.flips) == ([1, 4], False, 0)


def test_the_tensors_of_a_state() -> None:
    judge = Judge()
    conv, recurrent = torch.ones(1, 3, 4), torch.ones(1, 2, 2, 2)
    wrong = recurrent.clone()
    wrong[0, 1, 0, 1] = 3
    states = [DeltaState(conv, matrix) for matrix in (recurrent, recurrent, wrong)]
    judge.add_states("m", "decode", states, (7, 9))
    rows = {row.tensor: row for row in judge.report().rows}
    assert rows.keys() == {"conv", "recurrent"} and rows["conv"].passed
    assert (rows["recurrent"].channel, rows["recurrent"].span) == ([1, 0, 1], [7, 9])
    assert {(row.node, row.phase) for row in rows.values()} == {("m", "decode")}


def test_the_likeliest_tokens() -> None:
    """Positions count through the passes; the first other token stays the first."""
    judge = Judge()
    logits = torch.eye(5)[None, :3].contiguous()  # the likeliest are 0, 1, 2
    other = logits.clone()
    other[0, 1, 4] = 2
    judge.add_tokens(logits, logits)
    judge.add_tokens(logits, other)
    assert judge.tokens == Tokens(compared=6, equal=5, first=4, margin=1.0)
    last = logits.clone()
    last[0, :, 3] = 2
    judge.add_tokens(logits * 8, last)
    judge.add_tokens(logits, logits[:, :2])
    assert judge.tokens == Tokens(compared=9, equal=5, first=4, margin=1.0)
    assert judge.report().tokens is judge.tokens


# --- places and texts


@pytest.mark.parametrize(
    ("tensor", "index", "shape", "span", "place"),
    [
        ("output", [4], [9], (), (4, [])),
        ("output", [5, 3], [9, 4], (64, 73), (69, [3])),
        ("output", [0, 5, 3], [1, 9, 4], (), (5, [3])),
        ("output", [0, 5, 2, 3], [1, 9, 4, 8], (64, 73), (69, [2, 3])),
        ("recurrent", [0, 1, 2, 3], [1, 2, 4, 8], (64, 69), (None, [1, 2, 3])),
        ("conv", [0, 2, 7], [1, 3, 256], (64, 69), (68, [7])),
        ("conv", [0, 0, 7], [1, 3, 256], (0, 3), (0, [7])),
        ("conv", [0, 0, 7], [1, 3, 256], (0, 2), (None, [7])),
        ("k", [0, 1, 67, 9], [1, 2, 69, 32], (64, 69), (67, [1, 9])),
        ("v_scale", [0, 1, 67, 0], [1, 2, 69, 1], (), (67, [1, 0])),
    ],
)
def test_the_place_of_an_element(
    tensor: str, index: list[int], shape: list[int], span: Sequence[int], place: Any
) -> None:
    assert place_of(tensor, index, shape, span) == place


def test_a_table_of_rows() -> None:
    """Rows that pass and that fail, and what is said of NaN and of experts."""
    rows = [
        Row("a.b", "output", "prefill", x_bf16=12.3456, max_abs=0.5, rel_rms=0.01, shape=[1, 2, 4],
            span=[64, 66], position=65, channel=[2], flips=1, passed=False),
        Row("a", "k", "decode", x_bf16=MOST, max_abs=MOST, nonfinite=3, shape=[1, 2], span=[7, 8],
            flips=2, passed=False),
        Row("c", "output", "after all", x_bf16=0.98, max_abs=0.25, rel_rms=1e-3, shape=[2],
            position=3, channel=[5, 2]),
    ]  # fmt: skip
    assert table(rows) == [
        "        x bf16   max |d|   rel rms  node, shape and place",
        "DIFF      12.3  5.00e-01  1.00e-02  a.b [1, 2, 4], prefill 64-65, worst at token 65, "
        "channel 2, 1 token with other experts",
        "DIFF       inf       inf  0.00e+00  a/k [1, 2], decode 7, 3 not finite, "
        "2 tokens with other experts",
        "ok        0.98  2.50e-01  1.00e-03  c [2], after all, worst at token 3, head 5, channel 2",
    ]
    assert [times(row) for row in rows] == ["12.3", "inf", "0.98"]


def test_the_text_of_a_report() -> None:
    good = Row("c", "output", "decode", x_bf16=0.5, position=3)
    better = Row("d", "output", "decode", x_bf16=0.25)
    text = repr(Report([better, good], Tokens(), []))
    assert text == "pass: 2 rows, at most 0.5 x bf16: c, decode, worst at token 3"
    bad = [Row(f"b{i}", "output", "prefill", passed=False) for i in range(11)]
    lines = repr(Report([*bad[:10], good], Tokens(), [])).split("\n")
    assert lines == ["FAIL: 10 of 11 rows differ", *table(bad[:10])]
    lines = repr(Report([*bad, good], Tokens(), [])).split("\n")
    assert lines == [
        "FAIL: 11 of 12 rows differ", *table(bad[:10]),
        "10 of 11 failing rows shown; all are in .failing",
    ]  # fmt: skip


def test_nodes_that_were_not_called_are_sorted() -> None:
    judge = Judge()
    judge.unmatched |= {"layers.1", "embed_tokens", "norm"}
    assert judge.report().unmatched == ["embed_tokens", "layers.1", "norm"]
