"""The routed experts as one HIP kernel, as gfx950 code in the emulator, beside the reference."""

import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fast import hip_compiler
from fast.hip import HipLaunch
from fast.launch import Scratch
from fast.linear import Norm, Stream
from fast.moe import Experts
from fast.moe_hip import loads
from qwen35.errors import InputError
from tests.support.fast_cases import (
    CPU,
    TARGET,
    Case,
    bits,
    block_findings,
    block_output,
    case,
    emulated,
    exact_rows,
    expected,
    fast_experts,
    findings,
    launches_of,
    output,
    random,
    repeated_work,
    routing,
    slow_block,
    slow_experts,
    too_far,
)
from tests.support.hip_cases import epochs_of, fences, hip_case, hip_kernels, persistent

KINDS = ("same", "different", "overlapping", "twice", "ends", "returning")
META = torch.device("meta")


# ---- numbers


@pytest.mark.parametrize("rows", range(1, 9))
def test_no_row_is_off_by_more_than_twice_the_bf16_references_error(rows: int):
    assert not findings(hip_case(routing("random", rows, 3, 24), seed=rows))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_rows_choose(kind: str, scale: float, residual: bool):
    assert not findings(hip_case(routing(kind, 5, 3, 24), scale=scale, residual=residual))


@pytest.mark.parametrize(("E", "k"), [(512, 10), (256, 8)])
def test_as_many_experts_as_the_models_have(E: int, k: int):
    ids = routing("random", 8, k, E)
    ids[:, -1] = E - 1  # all rows
    assert not findings(hip_case(ids, E=E, D=128))


def test_all_rows_choose_one_expert():
    assert not findings(hip_case(torch.full((8, 1), 2), E=3))


@pytest.mark.parametrize(
    ("D", "I"),
    [(256, 256), (256, 512), (256, 1024), (384, 128), (640, 384), (256, 96), (2048, 256)],
)
def test_sizes_of_slices_and_sizes_that_are_odd(D: int, I: int):
    """96 is padded to 128."""
    assert not findings(hip_case(routing("overlapping", 2, 2, 3), E=3, D=D, I=I))


@pytest.mark.parametrize("I", [128, 1024])
def test_the_real_hidden_size_on_every_compute_unit(I: int):
    """The sizes of one of 8 ranks of the 397B, whose workgroups have one task or none, and of one rank,
    whose tasks are twice as large."""
    chosen = hip_case(routing("overlapping", 4, 2, 3), E=3, D=4096, I=I, workgroups=256)
    assert not findings(chosen)


@pytest.mark.parametrize("workgroups", [1, 2, 7, 40])
def test_a_grid_of_any_size_gives_equal_bits(workgroups: int):
    """One workgroup does all tasks; of 40 some have none."""
    ids = routing("overlapping", 4, 3, 24)
    chosen = hip_case(ids, workgroups=workgroups, residual=True)
    assert torch.equal(output(chosen), output(hip_case(ids, residual=True)))


def test_as_many_pairs_as_there_may_be():
    assert not findings(hip_case(routing("same", 8, 16, 24)))
    assert not findings(hip_case(routing("overlapping", 8, 10, 24)))


def test_an_experts_weights_are_read_once_however_many_rows_chose_it():
    assert not repeated_work(4, 3, kernel="hip")


def test_bytes_that_move_besides_the_weights():
    """One launch reads the weights of the chosen experts once. It writes `hidden` once, a share for each
    pair, the output and the counters."""
    rows, k, D, I = 4, 3, 256, 128
    chosen = hip_case(routing("overlapping", rows, k, 24))
    launches, _ = launches_of(chosen)
    (done,) = emulated(launches)
    listed = len(chosen.experts.unique())
    hidden = listed * rows * I * 2
    partial, out = rows * k * D * 4, rows * D * 2
    # Each task raises a counter; those for the rest of a list of 128 are raised too, and every workgroup
    # counts.
    tasks = listed * (2 * I // 64 + D // 256)
    counters = 8 * (tasks + 128 - listed + D // 256 + chosen.workgroups)
    assert done.bytes_written == hidden + partial + out + counters
    weights = listed * (3 * I * D // 2 + 3 * I * D // 32)
    assert done.bytes_read >= weights


@pytest.mark.parametrize(
    ("D", "I", "shared"), [(1024, 128, 256), (256, 1024, 1024), (256, 128, 32), (256, 128, 0)]
)
def test_a_whole_block_with_its_shared_expert(D: int, I: int, shared: int):
    slow = slow_block(16, D, I, 4, shared)
    assert not block_findings(slow, exact_rows(1, 3, D), "hip")


# ---- bits


@pytest.mark.parametrize("kind", ["random", "returning"])
def test_a_rows_bits_depend_neither_on_the_rows_beside_it_nor_on_the_order_of_the_waves(kind: str):
    chosen = hip_case(
        routing(kind, 3, 3, 24), residual=True, cancelling=kind == "returning", workgroups=3
    )
    assert not bits(chosen, seeds=(1,))


def test_a_blocks_rows_do_not_depend_on_each_other_or_on_the_order_of_the_waves():
    slow, x = slow_block(16, 256, 128, 4, 32), exact_rows(1, 3, 256)
    plain = block_output(slow, x, kernel="hip")
    assert torch.equal(block_output(slow, x, kernel="hip", seed=3), plain)
    for row in (0, 2):
        assert torch.equal(block_output(slow, x[[row]], kernel="hip"), plain[[row]])


def test_launches_one_after_the_other_need_no_preparation():
    """The rows of the next launch choose other experts, more of them or fewer, or there are other
    rows."""
    scratch = Scratch(CPU)
    for kind, rows in (("random", 4), ("same", 4), ("different", 8), ("ends", 1), ("random", 4)):
        chosen = hip_case(routing(kind, rows, 3, 24), D=384)
        launches, out = launches_of(chosen, scratch)
        emulated(launches)
        assert not too_far(out, *expected(chosen))
    assert epochs_of(launches[0], blocks=3) == 5


# ---- in the stream of rows


def streamed(seed: int | None = None) -> list[str]:
    """Rows that are to be normalised, and a norm that follows."""
    chosen = hip_case(routing("overlapping", 3, 2, 3), E=3, D=384, residual=True, workgroups=3)
    N, D = chosen.x.shape
    first, second = ((random(s, D) / 8).bfloat16() for s in (11, 12))
    scratch = Scratch(CPU)
    stream = Stream.empty("before", N, D, 3, TARGET, 1e-6, scratch)
    stream.scaled.copy_(chosen.x.float() * (1 + first.float()))
    stream.squares.fill_(torch.nan)  # that of rows that are not there is not read
    stream.squares[:, :N] = chosen.x.float().square().view(N, 3, -1).sum(-1).T
    packed = fast_experts(3, D, 128, "hip")
    packed.workgroups = 3
    launches, after = packed.launches(
        stream, chosen.experts.int(), chosen.weights, scratch,
        residual=chosen.residual, then=Norm(second, 1e-6),
    )  # fmt: skip
    emulated(launches, seed=seed)
    mean = chosen.x.double().square().mean(-1, keepdim=True)
    x = stream.scaled.double() / (mean + 1e-6).sqrt()
    slow = slow_experts(3, D, 128)
    assert chosen.residual is not None
    yardstick = slow(x.bfloat16(), chosen.experts, chosen.weights) + chosen.residual
    truth = slow(x, chosen.experts, chosen.weights.double()) + chosen.residual.double()
    found = too_far(after.x, yardstick, truth)
    kept = after.x.float()
    if not torch.equal(after.scaled, (kept * (1 + second.float())).bfloat16()):
        found.append("numbers: the scaled rows")
    squares = after.squares[:, :N].sum(0)
    if not torch.allclose(squares, kept.square().sum(-1), rtol=1e-5):
        found.append(f"numbers: squares {squares}")
    return found


@pytest.mark.parametrize("seed", [None, 4])
def test_rows_of_the_residual_stream_and_the_norm_that_follows(seed: int | None):
    assert not streamed(seed)


# ---- rows that are not as they should be


def test_ids_of_no_expert_make_their_own_rows_nan():
    ids = routing("different", 3, 2, 24)
    ids[0, 1], ids[2, 0] = -1, 24
    launches, out = launches_of(hip_case(ids))
    emulated(launches)
    assert out.isnan().all(-1).tolist() == [True, False, True]


def test_a_nan_in_a_row_comes_out_in_that_row_alone():
    chosen = hip_case(routing("same", 3, 2, 24))
    plain = output(chosen)
    chosen.x[1, 7] = torch.nan
    got, others = output(chosen), [0, 2]
    assert got[1].isnan().all() and torch.equal(got[others], plain[others])


# ---- what the emulator cannot show: the assembly has it


def test_stores_and_loads_of_other_workgroups_data_have_their_fences():
    assert not fences(hip_case(routing("random", 4, 3, 24)))


@pytest.mark.parametrize("launch", hip_kernels("moe"), ids=lambda launch: launch.name)
def test_weights_of_the_next_tasks_stay_on_their_way(launch: HipLaunch):
    """No wait of the loop over tasks waits for the loads of the last two tasks. The loop stores nothing
    to memory. The registers suffice for nine waves."""
    assert not persistent(launch)


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
@pytest.mark.parametrize(
    ("D", "I"), [(4096, 128), (4096, 1024), (1024, 512), (512, 640), (256, 768)]
)
def test_the_bytes_of_a_pass_are_those_of_the_kernels_plan(D: int, I: int, tmp_path: Path):
    """A wave computes one task while the loads of the next ones are on their way."""
    packed = Experts(2, D, I, TARGET, META, kernel="hip")
    x, ids = torch.empty(1, D, device=META).bfloat16(), torch.empty(1, 1, device=META).int()
    (launch,), _ = packed.launches(x, ids, torch.empty(1, 1, device=META), Scratch(META))
    assert launch.weight_bytes and launch.arguments["splits"] == 0
    source = tmp_path / "plan.hip"
    source.write_text(
        f'#include "moe_plan.h"\nstatic_assert(LOADS == {loads(D, I)}, "");\n'
        f'static_assert((AHEAD + 1) * STREAMERS * 64 * 16 * LOADS == {launch.weight_bytes}, "");\n'
    )
    compiler, folder = hip_compiler.find(), Path(hip_compiler.__file__).parent / "kernels"
    sizes = [f"-D{name}={size}" for name, size in launch.kernel.sizes]
    command = *compiler.clang, *compiler.flags, *sizes, "-fsyntax-only", f"-I{folder}", str(source)
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr


# ---- bad input


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_experts_that_the_kernel_does_not_take_are_refused():
    def of(D: int = 256, I: int = 128, target: str = TARGET, kernel: str = "hip", **more: bool):
        return lambda: Experts(2, D, I, target, META, kernel=kernel, **more)

    assert refused(of(kernel="cuda")) == "experts with kernel 'cuda'; expected triton or hip"
    assert refused(of(target="sm_90")) == "experts with kernel hip for sm_90; it is for gfx950"
    assert refused(of(fp4=False)) == "experts with kernel hip in bf16; it takes MXFP4"
    assert refused(of(D=1152)) == (
        "experts with kernel hip of hidden size 1152; expected a multiple of 128 up to 1024, or a "
        "multiple of that"
    )
    few = fast_experts(24, 256, 128, "hip")
    chosen = hip_case(routing("random", 2, 3, 24))
    given = chosen.x, chosen.experts.int(), chosen.weights, Scratch(CPU)
    shared = torch.zeros(1, 2, 24 + 1 + 96), torch.zeros(256, 48).bfloat16()
    assert refused(lambda: few.launches(*given, shared=shared)) == (
        "experts with kernel hip and a shared expert of intermediate size 48; expected a multiple of 32"
    )


def test_a_grid_that_the_card_does_not_run_at_once_is_refused():
    chosen: Case = hip_case(routing("random", 2, 3, 24), workgroups=257)
    assert refused(lambda: emulated(launches_of(chosen)[0])) == (
        "experts D=256 I=128: 257 workgroups wait for each other; this card runs 256 of them at once"
    )


def test_rows_that_the_kernel_cannot_take_are_refused():
    x: Tensor = torch.zeros(9, 256).bfloat16()
    ids, shares = torch.zeros(9, 2, dtype=torch.int32), torch.ones(9, 2)
    experts = fast_experts(24, 256, 128, "hip")
    assert refused(lambda: experts.launches(x, ids, shares, Scratch(CPU))) == (
        "experts: x of shape [9, 256] and torch.bfloat16; expected [1 to 8, 256], torch.bfloat16"
    )
    few = case(routing("random", 2, 3, 24), kernel="hip")
    call = lambda: experts(few.x, few.experts, few.weights)  # noqa: E731
    assert refused(call) == "the fast path runs on gfx950 and sm_90; this is cpu"
