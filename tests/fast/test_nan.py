"""NaNs and infinities in the router, NaNs in hidden states, ids that are none: kernels in the emulator.

A NaN comes out as a NaN of its own row, and nothing addresses memory by a number that was not bounded
(the emulator refuses every access outside of an array).
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fast.launch import Scratch
from fast.target import KERNELS
from tests.support.fast_cases import (
    CPU,
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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("E", EXPERTS)
def test_ids_are_distinct_and_in_range_whatever_the_logits_are(
    E: int, norm: bool, kernel: str
) -> None:
    """As the reference's: a row with a NaN has the first ids and weights that are NaN.

    One row at a time: its x is 1 at one column, where the weight has the logits. Two rows would mix NaNs
    and zeros.
    """
    for name, logits in rows_of(E).items():
        row = logits.bfloat16()
        gate = exact_router(torch.zeros(1, E, dtype=torch.bfloat16), 4, norm, D=128)
        gate.weight.data[:, 7] = row
        launch, choice = quiet_router(gate, kernel).launch(picks(1, 128), Scratch(CPU))
        emulated([launch])
        ranked, ids = row.float().softmax(-1).sort(descending=True, stable=True)
        found = choice.experts[0].tolist()
        assert len(set(found)) == 4, (name, found)
        assert all(0 <= expert < E for expert in found), (name, found)
        assert found == ids[:4].tolist(), name
        is_nan = bool(ranked.isnan().any())
        assert choice.weights[0].isnan().tolist() == [is_nan] * 4, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("norm", [True, False])
def test_rows_with_a_nan_or_infinities_leave_the_choice_of_the_rows_beside_them_as_it_is(
    norm: bool, kernel: str
) -> None:
    """Products of finite numbers that overflow: each row has two columns, one in each half of the sum,
    where the weight is large enough. Infinity minus infinity makes the NaN."""
    E, large = 24, 3e38
    gate = exact_router(torch.zeros(1, E, dtype=torch.bfloat16), 4, norm, D=256)
    rows = torch.randn(8, E, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight = gate.weight.data
    weight[:, 7:87:10] = rows.T
    columns = {1: (5, large, -large), 3: (0, large, 0), 4: (23, -large, 0), 6: (9, -large, large)}
    for row, (expert, first, second) in columns.items():
        weight[expert, 10 * row + 7], weight[expert, 10 * row + 135] = first, second
    x = torch.zeros(8, 256).bfloat16()
    for row in range(8):
        x[row, [10 * row + 7, 10 * row + 135]] = 4
    logits = rows.float() * 4
    for row, value in {1: NAN, 3: INF, 4: -INF, 6: NAN}.items():
        logits[row, columns[row][0]] = value
    launch, choice = quiet_router(gate, kernel).launch(x, Scratch(CPU))
    assert len(choice.parts) == {"triton": 2, "hip": 1}[kernel]  # hip: streamers have the halves
    emulated([launch])
    ranked, ids = logits.bfloat16().float().softmax(-1).sort(descending=True, stable=True)
    assert ranked[1].isnan().all() and ranked[3].isnan().all()
    assert torch.equal(choice.experts.long(), ids[:, :4])
    assert torch.equal(choice.weights.isnan(), ranked[:, :4].isnan())
    sound = [0, 2, 4, 5, 7]
    shares = ranked[sound, :4] / (ranked[sound, :4].sum(-1, keepdim=True) if norm else 1)
    assert torch.allclose(choice.weights[sound], shares, rtol=3e-6)


@pytest.mark.parametrize("bad", [-1, 16, 17, 2**31 - 1, -(2**31)])
def test_an_id_that_is_none_leaves_no_array_and_makes_its_row_nan(bad: int) -> None:
    """The other row is what it would be."""
    chosen = case(routing("different", 2, 2, 16), E=16, D=128, I=128)
    good = output(chosen)
    ids = chosen.experts.clone()
    ids[0, 1] = bad
    got = output(replace(chosen, experts=ids))
    assert torch.equal(got[1], good[1])
    assert got[0].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("place", [0, 63, 127])
def test_a_nan_stays_in_its_row_and_is_not_hidden(place: int, kernel: str) -> None:
    """The NaN goes through router, experts and shared expert. It is in its row's output, and in no
    other."""
    block = slow_block(16, 128, 128, 4, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    clean = block_output(block, x, kernel=kernel)
    x[1, place] = NAN
    dirty = block_output(block, x, kernel=kernel)
    assert dirty[1].isnan().all()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
