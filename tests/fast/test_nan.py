"""NaNs and infinities in the router, NaNs in hidden states, ids that are none: kernels in the emulator.

A NaN comes out as a NaN of its own row, and nothing addresses memory by a number that was not bounded
(the emulator refuses every access outside of an array).
"""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.fast_cases import (
    block_output,
    case,
    emulated,
    exact_router,
    output,
    picks,
    quiet_router,
    routing,
    slow_block,
)

NAN, INF = float("nan"), float("inf")
EXPERTS = 24, 32, 256, 512


def rows_of(E: int) -> dict[str, Tensor]:
    """Rows of logits [E] in bf16, each one that no sound model has."""
    normal = torch.randn(E, generator=torch.Generator().manual_seed(E))
    negative = torch.tensor([0xFFC0], dtype=torch.uint16).view(torch.bfloat16).float()

    def with_one(value: float | Tensor, place: int) -> Tensor:
        row = normal.clone()
        row[place] = value
        return row

    return {
        "a NaN": with_one(NAN, 5),
        "a negative NaN": with_one(negative, E - 1),
        "all NaN": torch.full((E,), NAN),
        "all negative NaN": negative.expand(E).clone(),
        "an infinity": with_one(INF, 3),
        "two infinities": with_one(INF, 3).index_fill(0, torch.tensor([7]), INF),
        "minus infinity": with_one(-INF, 2),
        "all minus infinity": torch.full((E,), -INF),
        "all equal": torch.zeros(E),
        "denormal": torch.full((E,), 1e-40),
    }


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("E", EXPERTS)
def test_ids_are_distinct_and_in_range_whatever_the_logits_are(E: int, norm: bool) -> None:
    """As the reference's: a row with a NaN has the first ids and weights that are NaN.

    The logits are put where the product's parts lie, since a product would mix NaNs and zeros.
    """
    named = rows_of(E)
    logits = torch.stack([*named.values()]).bfloat16()
    for first in range(0, len(logits), 5):
        part = logits[first : first + 5]
        gate = exact_router(torch.zeros(5, E, dtype=torch.bfloat16), 4, norm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            launches, choice = quiet_router(gate).launches(picks(5))
        choose = launches[1]
        parts = choose.arguments["parts"]
        parts.zero_()
        parts[0] = part.float()
        emulated([choose])
        probabilities = part.float().softmax(-1)
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        for row, name in enumerate(list(named)[first : first + 5]):
            found = choice.experts[row].tolist()
            assert len(set(found)) == 4, (name, found)
            assert all(0 <= expert < E for expert in found), (name, found)
            assert found == ids[row, :4].tolist(), name
            is_nan = bool(ranked[row].isnan().any())
            assert choice.weights[row].isnan().tolist() == [is_nan] * 4, name


@pytest.mark.parametrize("bad", [-1, 16, 17, 2**31 - 1, -(2**31)])
def test_an_id_that_is_none_leaves_no_array(bad: int) -> None:
    """It is taken for the nearest expert; the other row is what it would be."""
    chosen = case(routing("different", 2, 2, 16), E=16, D=128, I=128)
    good = output(chosen)
    ids = chosen.experts.clone()
    ids[0, 1] = bad
    got = output(replace(chosen, experts=ids))
    assert torch.equal(got[1], good[1])
    ids[0, 1] = 0 if bad < 0 else 15
    assert torch.equal(got, output(replace(chosen, experts=ids)))


@pytest.mark.parametrize("place", [0, 63, 127])
def test_a_nan_stays_in_its_row_and_is_not_hidden(place: int) -> None:
    """Through router, experts and shared expert: NaN in that row's output, nothing in the others."""
    block = slow_block(16, 128, 128, 4, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    clean = block_output(block, x)
    x[1, place] = NAN
    dirty = block_output(block, x)
    assert dirty[1].isnan().all()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
