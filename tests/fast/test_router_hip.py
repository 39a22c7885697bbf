"""What only the HIP kernel of the router has, and whole blocks of HIP kernels, in the emulator.

test_router.py has the checks of the choice that it shares with Triton's kernel.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fast.hip import HipLaunch
from fast.launch import Launch, Scratch
from fast.linear import Stream
from fast.router import Choice, Router
from qwen35.errors import InputError
from tests.support.fast_cases import (
    CPU,
    TARGET,
    block_findings,
    choice_findings,
    emulated,
    exact_router,
    exact_rows,
    picks,
    quiet_router,
    random,
    slow_block,
)
from tests.support.fast_streams import clear_rows, norm, stream_findings, stream_launches
from tests.support.hip_cases import hip_kernels, router_fences
from tools.compile import lane_bytes
from tools.gfx950.assembly import parse
from tools.gfx950.target import compile_launch

META = torch.device("meta")


def router(E: int = 24, D: int = 1152, shared: int = 16, top_k: int = 5) -> Router:
    """A router with random weights, the shared expert's rows included. Its columns are two parts, and its
    last tile is not full."""
    weight = (random(3, E + 1 + 2 * shared, D) * D**-0.5).bfloat16()
    return Router(weight, E, top_k, True, TARGET, "hip")


def choice_of(
    node: Router, x: Tensor | Stream, scratch: Scratch | None = None, **settings: int
) -> tuple[Choice, Launch]:
    launch, choice = node.launch(x, scratch or Scratch(CPU))
    emulated([launch], **settings)
    return choice, launch


def rows_of(choice: Choice) -> tuple[Tensor, ...]:
    """All that the launch wrote, row by row."""
    return choice.experts, choice.weights, choice.parts.transpose(0, 1)


# ---- numbers


def sums_findings(node: Router, x: Tensor) -> list[str]:
    """Findings on the sums of all columns: off by more than the rounding of K products in fp32."""
    choice, _ = choice_of(node, x)
    wide = x.double() @ node.weight.double().T
    allowed = 2.0**-20 * (x.double().abs() @ node.weight.double().abs().T)
    off = (choice.parts.double().sum(0) - wide).abs()
    if choice.parts.isnan().any():
        return [f"unwritten: {int(choice.parts.isnan().sum())} sums"]
    return [] if (off <= allowed).all() else [f"numbers: a sum is off by {off.max():.2e}"]


@pytest.mark.parametrize("rows", range(1, 9))
def test_all_columns_of_any_number_of_rows(rows: int):
    assert not sums_findings(router(), random(rows, rows, 1152).bfloat16())


@pytest.mark.parametrize("shared", [128, 256, 512])
def test_the_real_sizes(shared: int):
    """One of 8, 4 and 2 ranks of the 397B; on 8 ranks all workgroups are fewer than the compute units."""
    assert not sums_findings(router(512, 4096, shared, 10), random(1, 4, 4096).bfloat16())


@pytest.mark.parametrize("parts", [1, 5, 128, 300])
def test_rows_that_are_normalised_first(parts: int):
    """Squares of rows that are not there are not read."""
    node, x = router(), random(1, 3, 1152).bfloat16()
    squares = torch.full((parts, 16), torch.nan)
    squares[:, :3] = random(2, parts, 3).square() * 1152 / parts
    choice, _ = choice_of(node, Stream(x, x, squares, 1e-6))
    scale = (squares[:, :3].double().sum(0) / 1152 + 1e-6).rsqrt()
    wide = x.double() @ node.weight.double().T * scale[:, None]
    assert torch.allclose(choice.parts.double().sum(0), wide, rtol=1e-5, atol=1e-5)


# ---- bits


@pytest.mark.parametrize("settings", [{}, {"seed": 1}, {"batch": 1}], ids=str)
def test_a_rows_bits_depend_neither_on_the_rows_beside_it_nor_on_who_is_last(
    settings: dict[str, int],
):
    node, x = router(), random(4, 4, 1152).bfloat16()
    whole = rows_of(choice_of(node, x)[0])
    for rows in ([0, 1, 2, 3], [3, 2, 1, 0], [0], [3], [1, 2]):
        for got, among in zip(rows_of(choice_of(node, x[rows], **settings)[0]), whole, strict=True):
            assert torch.equal(got, among[rows])


def test_launches_one_after_the_other_need_no_preparation():
    """The counter only grows, whatever the number of rows is."""
    node, scratch = router(), Scratch(CPU)
    for time, rows in enumerate((3, 8, 1, 3), 1):
        x = random(rows, rows, 1152).bfloat16()
        choice, launch = choice_of(node, x, scratch)
        assert launch.arguments["counter"].tolist() == [time * 4 * 2, *[0] * 15]
        for got, alone in zip(rows_of(choice), rows_of(choice_of(node, x)[0]), strict=True):
            assert torch.equal(got, alone)


def test_bytes_that_are_written():
    """The sums, the choice, and 8 bytes of the counter for each workgroup."""
    node = router()
    launch, _ = node.launch(random(1, 3, 1152).bfloat16(), Scratch(CPU))
    (done,) = emulated([launch])
    assert done.bytes_written == 4 * (2 * 3 * 57 + 2 * 3 * 5) + 8 * 4 * 2


# ---- rows that are not as they should be


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_a_row_that_is_no_number_has_distinct_experts_and_weights_of_nan(value: float):
    node, x = router(), random(5, 3, 1152).bfloat16()
    plain = rows_of(choice_of(node, x)[0])
    x[1, 7] = value
    got = rows_of(choice_of(node, x)[0])
    for ours, before in zip(got, plain, strict=True):
        assert torch.equal(ours[[0, 2]], before[[0, 2]])
    assert got[1][1].isnan().all() and got[0][1].tolist() == [0, 1, 2, 3, 4]


def nan_norm_findings(sign: float) -> list[str]:
    """Findings on a row whose norm is a NaN of that sign, and so are its experts' logits. Lanes without
    an expert always compute a negative one. The choice must not depend on a NaN's bits."""
    node, x = router(), random(5, 3, 1152).bfloat16()
    squares = torch.full((1, 16), 1152.0)
    squares[0, 1] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    choice, _ = choice_of(node, Stream(x, x, squares, 1e-6))
    found = [] if choice.weights[1].isnan().all() else ["numbers: weights of a row of NaN"]
    wanted, got = list(range(node.top_k)), choice.experts[1].tolist()
    return found + ([] if got == wanted else [f"choice: {got}, expected {wanted}"])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_nan_of_either_sign_has_the_same_experts(sign: float):
    assert not nan_norm_findings(sign)


# ---- whole blocks of HIP kernels, and in the stream of rows


@pytest.mark.parametrize("scale", [1.0, 2.0**-7])
@pytest.mark.parametrize("shared", [0, 32, 256])
def test_a_block_with_and_without_a_shared_expert(shared: int, scale: float):
    block = slow_block(16, 1024, 128, 4, shared)
    assert not block_findings(block, exact_rows(1, 5, 1024, scale), "hip")


@pytest.mark.parametrize("rows", [1, 8])
def test_a_block_whose_weights_are_not_renormalised(rows: int):
    block = slow_block(16, 1024, 128, 4, 128, norm=False)
    assert not block_findings(block, exact_rows(rows, rows, 1024), "hip")


@pytest.mark.parametrize(("rows", "shared", "parts"), [(1, 256, 4), (8, 256, 1), (5, 0, 8)])
def test_a_stream_is_normalised_and_left_for_the_next_norm(rows: int, shared: int, parts: int):
    block, before, after = slow_block(16, 1024, 128, 4, shared), norm(1, 1024, 0.5), norm(2, 1024)
    x = clear_rows(block, before, rows, seed=rows)
    assert not stream_findings(block, before, after, x, parts, "hip")


def test_a_streams_bits_do_not_depend_on_the_rows_beside_a_row():
    block, before, after = slow_block(16, 1024, 128, 4, 256), norm(1, 1024), norm(2, 1024)
    x = clear_rows(block, before, 4)

    def left(rows: list[int]) -> list[Tensor]:
        launches, out = stream_launches(block, before, after, x[rows], kernel="hip")
        emulated(launches)
        return [out.x, out.scaled, out.squares[:, : len(rows)].T]

    whole = left([0, 1, 2, 3])
    for rows in ([3, 2, 1, 0], [1, 2]):
        for got, among in zip(left(rows), whole, strict=True):
            assert torch.equal(got, among[rows])


# ---- what the emulator cannot show: the assembly has it


def test_the_counter_and_the_sums_of_others_have_their_fences():
    assert not router_fences(router().launch(random(1, 3, 1152).bfloat16(), Scratch(CPU))[0])


def streaming(launch: HipLaunch) -> list[str]:
    """Findings on the machine code: a spill, or a wait before all weights have been requested."""
    program = parse(compile_launch(launch, TARGET).text, "router")
    resources = program.resources
    found = [
        f"spills: {name} {resources[name]}"
        for name in ("vgpr_spills", "sgpr_spills", "scratch")
        if resources[name]
    ]
    first = next(i for i, one in enumerate(program.instructions) if "vmcnt" in one.line)
    wide = [lane_bytes(one) == 16 for one in program.instructions[:first]]
    if sum(wide) != 8:
        found.append(f"waiting: {sum(wide)} loads before the first wait, of 8")
    return found


@pytest.mark.parametrize("launch", hip_kernels("router"), ids=lambda launch: launch.name)
def test_all_weights_are_requested_before_anything_is_waited_for(launch: HipLaunch):
    """4 loads of weights and 4 of rows, each of 16 bytes a lane."""
    assert not streaming(launch)


# ---- bad input


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_routers_that_the_kernel_does_not_take_are_refused():
    def of(D: int = 256, k: int = 5, target: str = TARGET, kernel: str = "hip"):
        weight = torch.zeros(24, D, dtype=torch.bfloat16, device=META)
        return lambda: Router(weight, 24, k, True, target, kernel).launch(
            torch.zeros(2, D).bfloat16(), Scratch(META)
        )

    assert refused(of(kernel="cuda")) == "a router with kernel 'cuda'; expected triton or hip"
    assert refused(of(target="sm_90")) == "a router with kernel hip for sm_90; it is for gfx950"
    assert refused(of(D=272)) == (
        "a router with kernel hip of hidden size 272; expected a multiple of 32"
    )
    assert refused(of(k=17)) == "the router's top 17 of 24 experts; expected 1 to 16"
    x = torch.zeros(9, 1152).bfloat16()
    assert refused(lambda: router().launch(x, Scratch(CPU))) == (
        "the router: x of shape [9, 1152] and torch.bfloat16; expected [1 to 8, 1152], torch.bfloat16"
    )
    gate = exact_router(random(9, 2, 24).bfloat16(), 5)
    assert refused(lambda: quiet_router(gate, "hip")(picks(2))) == (
        "the fast path runs on gfx950 and sm_90; this is cpu"
    )
    assert not choice_findings(gate, picks(2), kernel="hip")
