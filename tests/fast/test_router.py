"""The router, and the block in whose first launch it is, as gfx950 code in the emulator beside the
reference: alone, and in the residual stream with a norm on either side."""

import pytest
import torch

pytest.importorskip("triton")

from fast.launch import Scratch
from fast.router import Router, power_of_two
from fast.target import KERNELS
from tests.support.fast_cases import (
    CPU,
    TARGET,
    block_findings,
    block_output,
    choice_findings,
    counters,
    emulated,
    exact_router,
    exact_rows,
    integers,
    picks,
    quiet_router,
    random,
    slow_block,
    waits_for_stores,
)
from tests.support.fast_streams import clear_rows, norm, stream_findings, stream_launches
from tools.gfx950.target import compile_launch


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Triton's kernel, and the one in HIP."""
    return request.param


def test_512_experts_top_10(kernel: str):
    assert not choice_findings(
        exact_router((random(1, 3, 512) * 4).bfloat16(), 10), picks(3), kernel=kernel
    )


def test_256_experts_top_8(kernel: str):
    assert not choice_findings(
        exact_router((random(2, 3, 256) * 4).bfloat16(), 8), picks(3), kernel=kernel
    )


def test_weights_that_are_not_renormalised(kernel: str):
    gate = exact_router((random(3, 4, 24) * 2 - 5).bfloat16(), 5, norm=False)
    assert not choice_findings(gate, picks(4), kernel=kernel)


def test_a_number_of_experts_that_is_no_power_of_two_and_all_of_them_chosen(kernel: str):
    assert not choice_findings(
        exact_router((random(4, 2, 11) - 3).bfloat16(), 11), picks(2), kernel=kernel
    )


def test_ties_go_to_the_lower_index(kernel: str):
    """Logits from 0 to 3, each of which many experts have; then all logits equal."""
    logits = torch.cat([integers(5, 0, 3, 3, 24), torch.full((1, 24), -7)]).bfloat16()
    assert not choice_findings(exact_router(logits, 10), picks(4), kernel=kernel)


def test_equal_rows_of_the_weight_are_a_tie_in_any_sum(kernel: str):
    gate = slow_block(24, 1024, 128, 5, 0).gate
    tied = exact_router(torch.zeros(1, 24).bfloat16(), 5)
    tied.weight.data.copy_(gate.weight[torch.arange(24) % 3])
    ids, _ = tied(exact_rows(1, 4, 1024))
    assert (ids.sort(-1).values // 3 < 8).all() and (ids % 3 == ids[:, :1] % 3).all()
    assert not choice_findings(tied, exact_rows(1, 4, 1024), kernel=kernel)


def test_logits_are_rounded_to_bf16_before_they_are_compared(kernel: str):
    """Expert 9 has 257, which is 256 in bf16: a tie with expert 4, which comes first."""
    gate = exact_router(torch.zeros(1, 24).bfloat16(), 3)
    gate.weight.data[4, 7], gate.weight.data[9, 7], gate.weight.data[9, 900] = 256, 256, 1
    x = torch.zeros(2, 1024).bfloat16()
    x[:, 7] = x[:, 900] = 1
    assert gate(x)[0][:, :2].tolist() == [[4, 9]] * 2
    assert not choice_findings(gate, x, kernel=kernel)


def test_logits_so_large_that_exp_would_overflow(kernel: str):
    assert not choice_findings(
        exact_router((random(6, 2, 24) * 9 + 200).bfloat16(), 5), picks(2), kernel=kernel
    )


def test_probabilities_that_underflow_tie_at_zero(kernel: str):
    """All experts but three are chosen, with logits that fall, and that rise."""
    steps = torch.tensor([0.0, -3.0, -30.0] + [-200.0 - i for i in range(21)])
    logits = torch.stack([steps, steps.flip(0)]).bfloat16()
    assert not choice_findings(exact_router(logits, 8), picks(2), kernel=kernel)


def test_subnormal_probabilities_keep_their_order(kernel: str):
    logits = torch.cat([torch.zeros(1), -torch.arange(80.0, 103.0)])[None].bfloat16()
    assert not choice_findings(exact_router(logits, 16), picks(1), kernel=kernel)


def test_a_router_called_as_a_module(monkeypatch: pytest.MonkeyPatch):
    """Its launch runs on the rows; the indices are int64."""
    monkeypatch.setattr("fast.router.run", lambda work, device: emulated(work))
    gate = exact_router((random(8, 3, 24) * 4).bfloat16(), 5)
    experts, weights = Router.from_reference(gate, TARGET)(picks(3))
    theirs, their_weights = gate(picks(3))
    assert experts.dtype == torch.int64 and torch.equal(experts, theirs)
    assert torch.allclose(weights, their_weights.float(), atol=1e-6)


def test_what_a_router_says_of_itself():
    rows = torch.zeros(24 + 1 + 2 * 32, 1024).bfloat16()
    assert Router(rows[:24], 24, 5, True, TARGET).extra_repr() == "1024 -> top 5 of 24, gfx950"
    shared = "1024 -> top 5 of 24, and a shared expert of 32"
    assert Router(rows, 24, 5, True, TARGET).extra_repr() == f"{shared}, gfx950"
    assert Router(rows, 24, 5, True, TARGET, "hip").extra_repr() == f"{shared}, HIP, gfx950"


def test_blocks_are_powers_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 256, 257)] == [1, 2, 4, 4, 8, 256, 512]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("scale", [1.0, 2.0**-7])
def test_sums_along_the_hidden_size(kernel: str, rows: int, scale: float):
    gate = slow_block(24, 1024, 128, 5, 0).gate
    assert not choice_findings(gate, exact_rows(rows, rows, 1024, scale), kernel=kernel)


@pytest.mark.parametrize("D", [96, 1152])
def test_a_hidden_size_that_the_tables_splits_do_not_divide(kernel: str, D: int):
    gate = slow_block(24, D, 128, 5, 0).gate
    assert not choice_findings(gate, exact_rows(1, 3, D), kernel=kernel)


def test_where_the_choice_is_another_the_logits_are_a_rounding_apart(kernel: str):
    """Sums that round: a chosen expert's float64 logit reaches the k-th largest, but for a bf16 step."""
    gate = exact_router(torch.zeros(1, 256).bfloat16(), 8)
    gate.weight.data.copy_(random(7, 256, 1024) / 32)
    x = random(8, 4, 1024).bfloat16()
    launch, choice = quiet_router(gate, kernel).launch(x, Scratch(CPU))
    emulated([launch])
    logits = x.double() @ gate.weight.double().T
    least = logits.sort(-1, descending=True).values[:, 7:8]
    chosen = logits.gather(1, choice.experts.long())
    assert (chosen >= least - 2.0**-7 * least.abs()).all()
    assert all(len(set(row)) == 8 for row in choice.experts.tolist())


def test_waves_in_random_order_choose_the_same(kernel: str):
    assert not choice_findings(
        exact_router(random(9, 2, 24).bfloat16(), 5), picks(2), seed=3, kernel=kernel
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_whoever_arrives_last_chooses_the_same(kernel: str, batch: int):
    gate = slow_block(24, 1024, 128, 5, 0).gate
    assert not choice_findings(gate, exact_rows(1, 5, 1024), batch=batch, kernel=kernel)


def test_a_second_run_needs_no_preparation(kernel: str):
    """The counter is left as it was found."""
    launch, choice = quiet_router(slow_block(24, 1024, 128, 5, 0).gate, kernel).launch(
        exact_rows(1, 3, 1024), Scratch(CPU)
    )
    emulated([launch])
    first = choice.experts.clone(), choice.weights.clone()
    emulated([launch])
    assert torch.equal(choice.experts, first[0]) and torch.equal(choice.weights, first[1])


def test_every_wave_waits_for_its_stores_before_the_counter_is_raised():
    """The router is among them: its last program reads the parts of all others."""
    launch, _ = quiet_router(slow_block(24, 1024, 128, 5, 0).gate).launch(
        exact_rows(1, 3, 1024), Scratch(CPU)
    )
    assert waits_for_stores(compile_launch(launch, TARGET))


# ---- the block


@pytest.mark.parametrize("scale", [1.0, 2.0**-7])
@pytest.mark.parametrize("shared", [0, 48, 256])
def test_a_block_with_and_without_a_shared_expert(shared: int, scale: float):
    assert not block_findings(slow_block(16, 1024, 128, 4, shared), exact_rows(1, 5, 1024, scale))


@pytest.mark.parametrize("rows", [1, 8])
def test_a_block_whose_weights_are_not_renormalised(rows: int):
    block = slow_block(16, 1024, 128, 4, 128, norm=False)
    assert not block_findings(block, exact_rows(rows, rows, 1024))


def test_a_blocks_row_alone_has_the_bits_that_it_has_among_others():
    block, x = slow_block(16, 1024, 128, 4, 256), exact_rows(2, 3, 1024)
    together = block_output(block, x)
    for row in (0, 2):
        assert torch.equal(block_output(block, x[[row]]), together[[row]])
    assert torch.equal(block_output(block, x.flip(0)), together.flip(0))


@pytest.mark.parametrize(
    "settings",
    [{"batch": 1}, {"batch": 5}, {"seed": 1}, pytest.param({"seed": 2}, marks=pytest.mark.slow)],
)
def test_whoever_arrives_last_a_blocks_bits_are_the_same(settings: dict[str, int]):
    """The programs of the shared expert are among those that arrive."""
    block, x = slow_block(16, 1024, 128, 4, 256), exact_rows(2, 2, 1024)
    assert torch.equal(block_output(block, x, **settings), block_output(block, x))


def test_a_block_of_bf16_experts():
    assert not block_findings(slow_block(16, 1024, 96, 4, 48, fp4=False), exact_rows(1, 5, 1024))


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
@pytest.mark.parametrize("shared", [0, 256])
def test_a_stream_is_normalised_and_left_for_the_next_norm(rows: int, shared: int):
    block, before, after = slow_block(16, 1024, 128, 4, shared), norm(1, 1024), norm(2, 1024)
    x = clear_rows(block, before, rows, seed=rows)
    assert not stream_findings(block, before, after, x)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_however_many_blocks_the_squares_come_in(parts: int):
    block, before, after = slow_block(16, 1024, 128, 4, 48), norm(1, 1024), norm(2, 1024)
    assert not stream_findings(block, before, after, clear_rows(block, before, 4), parts)


def test_an_eps_as_large_as_the_mean_square_counts():
    block, before, after = slow_block(16, 1024, 128, 4, 256), norm(1, 1024, 0.5), norm(2, 1024)
    assert not stream_findings(block, before, after, clear_rows(block, before, 4))


def test_a_stream_through_bf16_experts():
    block = slow_block(16, 1024, 96, 4, 48, fp4=False)
    before, after = norm(1, 1024), norm(2, 1024)
    assert not stream_findings(block, before, after, clear_rows(block, before, 5))


def test_a_streams_bits_do_not_depend_on_the_rows_beside_a_row_or_on_who_arrives_last():
    """Waves in random order are slow in the emulator, so they run on a block of 256 columns. Its
    router's sums have two parts, as those of 1,024 columns have."""

    def left(D: int, rows: list[int], **settings: int) -> list[torch.Tensor]:
        block, before, after = slow_block(16, D, 128, 4, D // 4), norm(1, D), norm(2, D)
        x = clear_rows(block, before, 4)
        launches, out = stream_launches(block, before, after, x[rows])
        emulated(launches, **settings)
        assert not counters(launches)
        return [out.x, out.scaled, out.squares[:, : len(rows)].T]

    every = [0, 1, 2, 3]
    whole = left(1024, every)
    for rows in ([3, 2, 1, 0], [0], [3], [1, 2]):
        for got, among in zip(left(1024, rows), whole, strict=True):
            assert torch.equal(got, among[rows])
    plain = left(256, every)
    for settings in ({"batch": 1}, {"seed": 1}):
        assert all(map(torch.equal, left(256, every, **settings), plain))
