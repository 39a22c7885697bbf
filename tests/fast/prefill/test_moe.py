"""The feed-forward of a prompt's rows as gfx950 code in the emulator, beside the reference."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fast.launch import Launch
from fast.moe import Experts
from fast.prefill import moe
from fast.prefill.span import number_of_rows
from tests.support.fast_cases import (
    Case,
    case,
    exact_rows,
    expected,
    fast_block,
    fast_experts,
    routing,
    slow_block,
    too_far,
    wide_block,
)
from tests.support.fast_nodes import a_pass
from tests.support.prefill_nodes import CPU, Poisoned, cut_findings, prefill_findings
from tools.gfx950.target import compile_launch, emulate


def output(chosen: Case) -> Tensor:
    node = fast_experts(chosen.E, chosen.D, chosen.I)
    work, out = moe.experts(
        node, chosen.x, chosen.experts.int(), chosen.weights, number_of_rows(chosen.x), Poisoned(CPU),
        residual=chosen.residual,
    )  # fmt: skip
    emulate(work)
    return out


@pytest.mark.parametrize("kind", ["random", "same", "overlapping", "twice", "ends"])
def test_experts_whatever_the_rows_choose(kind: str):
    chosen = case(routing(kind, 40, 4, 24), residual=kind == "random")
    assert not too_far(output(chosen), *expected(chosen))


def test_an_expert_of_more_rows_than_a_tile_and_small_numbers():
    chosen = case(routing("same", 150, 2, 24), scale=0.01)
    assert not too_far(output(chosen), *expected(chosen))


def test_an_intermediate_size_that_is_padded():
    chosen = case(routing("random", 20, 4, 24), I=96)
    assert not too_far(output(chosen), *expected(chosen))


def test_the_rows_beside_a_row_decide_none_of_its_bits():
    chosen = case(routing("random", 90, 4, 24))
    whole, some = output(chosen), list(range(80, 90))
    assert torch.equal(output(chosen.rows(some)), whole[some])
    back = list(reversed(range(90)))
    assert torch.equal(output(chosen.rows(back)), whole[back])


@pytest.mark.parametrize("D, block", [(256, 256), (384, 256)])
def test_hoppers_activations_are_arranged_span_by_span(D: int, block: int):
    from triton.language import constexpr

    from fast.kernels.mxfp4 import arranged
    from fast.kernels.prefill.moe import arrange

    x, out = exact_rows(5, 3, D), torch.full((3, D), float("nan"), dtype=torch.bfloat16)
    sizes = {"D": D, "BLOCK": block}
    emulate(
        [Launch("arrange", arrange, (3, 2, 1), {"x": x, "out": out, **sizes}, {"num_warps": 4})]
    )
    places = [arranged.fn(constexpr(k)).value for k in range(D)]  # pyright: ignore
    assert torch.equal(out[:, places], x)


def test_hoppers_products_are_done_before_their_registers_are_written_again():
    """They read the decoded weights from registers while the program goes on. Without a wait behind the
    last of them the next weights overwrite those."""
    x, ids = exact_rows(6, 12, 256), routing("random", 12, 4, 24).int()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no configuration for these sizes
        node = Experts(24, 256, 128, "sm_90", CPU)
    work, _ = moe.experts(node, x, ids, torch.ones(12, 4), number_of_rows(x), Poisoned(CPU))
    (launch,) = (one for one in work if isinstance(one, Launch) and "gate_up" in one.name)
    text = compile_launch(launch, "sm_90").text
    (label,) = re.findall(r"(\$\w+):\s+// =>This Inner Loop Header", text)
    loop = text[text.index(f"{label}:") : text.index(f"bra \t{label};")]
    assert loop.count("wgmma.mma_async") == 8
    assert "wgmma.wait_group.sync.aligned 0" in loop[loop.rindex("wgmma.mma_async") :]


@pytest.mark.parametrize("shared", [0, 256])
def test_a_block_chooses_and_adds_as_the_reference_does(shared: int):
    slow = slow_block(16, 1024, 128, 4, shared)
    x = exact_rows(3, 20, 1024)
    work, out = moe.block(fast_block(slow), x, number_of_rows(x), Poisoned(CPU))
    emulate(work)
    assert not too_far(out, slow(x[None])[0], wide_block(slow, x.double()))


def test_a_sort_finds_each_pair_and_asks_for_no_more_tiles_than_there_are():
    E, block = 7, 4
    ids = torch.tensor([[3, 0], [3, 5], [3, 3], [6, 3], [5, 3]], dtype=torch.int32)
    sort = moe.Sort(ids, E, block, number_of_rows(ids), Poisoned(CPU))
    emulate(sort.work)
    by_expert = ids.flatten()[sort.order]
    assert by_expert.tolist() == sorted(ids.flatten().tolist())
    assert torch.equal(sort.order[sort.place_of_pair], torch.arange(10, dtype=torch.int32))
    tiles = [
        (expert, first)
        for expert, first in zip(sort.tile_expert.tolist(), sort.tile_first.tolist(), strict=True)
        if expert < E
    ]
    assert tiles == [(0, 0), (3, 1), (3, 5), (5, 7), (6, 9)]
    assert sort.expert_first.tolist() == [0, 1, 1, 1, 7, 7, 9, 10]


@pytest.mark.parametrize("linear", [True, False])
def test_a_layer_of_one_expert(linear: bool):
    """The layer has a single expert, because of several a row may choose others than in float64."""
    sizes = {"num_experts": 1, "num_experts_per_tok": 1}
    assert not prefill_findings(a_pass("layer", 70, linear=linear, length=64, **sizes))


def test_a_dense_layer():
    assert not prefill_findings(a_pass("layer", 20, name="27B", linear=False, length=64))


def test_a_layers_bits_are_the_same_in_one_pass_and_in_several():
    assert not cut_findings(a_pass("layer", 100, linear=False, length=64), (64,))


def test_rows_of_a_choice_that_is_no_expert_leave_no_array():
    """The bits of ids come from memory, so that another program can spoil them."""
    chosen = case(routing("random", 20, 4, 24))
    spoiled = chosen.experts.clone()
    spoiled[3, 1], spoiled[7, 0] = 24, 2**31 - 1
    out = output(replace(chosen, experts=spoiled))
    whole = output(chosen)
    intact = [row for row in range(20) if row not in (3, 7)]
    assert torch.equal(out[intact], whole[intact])
