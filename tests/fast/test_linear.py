"""Products of a few rows, and what they are handed: computed by torch as the kernel's docstring says."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from fast import configs
from fast.launch import Launch, Scratch
from fast.linear import (
    Norm,
    Stream,
    in_bf16,
    interleaved,
    product,
    read_normed,
    stacked,
    twin,
    written,
)
from fast.target import ROWS
from qwen35.errors import InputError
from reference.norm import RMSNorm
from tests.support.fast_cases import CPU, random
from tests.support.plain_launches import plain

TARGET = "gfx950"


def numbers(seed: int, *shape: int) -> Tensor:
    """Small integers, whose products and sums are exact."""
    return (random(seed, *shape) * 2).round().clamp(-4, 4).bfloat16()


def close(found: Tensor, exact: Tensor) -> bool:
    return bool(((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all())


def norm_of(seed: int, D: int, eps: float = 0.25) -> RMSNorm:
    made = RMSNorm(D, eps).bfloat16().requires_grad_(False)
    made.weight.copy_(numbers(seed, D) / 8)
    return made


def a_stream(x: Tensor, norm: Norm, scratch: Scratch, parts: int = 2) -> Stream:
    made = Stream.empty("before", *x.shape, parts, TARGET, norm.eps, scratch)
    made.x.copy_(x)
    made.scaled.copy_(x.float() * (1 + norm.weight.float()))
    made.squares.fill_(torch.nan)
    made.squares[:, : len(x)] = x.float().square().unflatten(1, (parts, -1)).sum(-1).T
    return made


def run(launch: Launch, target: str = TARGET) -> None:
    """On outputs that are NaN."""
    for name in ("out", "scaled", "out_squares"):
        if not launch.arguments["RING"] or name != "out":
            launch.arguments[name].fill_(torch.nan)
    assert launch.arguments["ROWS"] == ROWS[target]
    plain(launch)


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_product_of_rows_with_a_matrix(rows: int, target: str):
    x, weight, scratch = numbers(1, rows, 48), numbers(2, 72, 48), Scratch(CPU)
    launch, out = product(x, weight, target, scratch)
    run(launch, target)
    assert torch.equal(out.double(), x.double() @ weight.double().T)
    assert launch.name == "linear N=72 K=48" and launch.arguments["residual"] is x
    assert out is scratch("linear", rows, 72)


def test_a_product_has_the_name_and_the_result_that_it_is_given():
    x, weight, scratch = numbers(1, 3, 48), numbers(2, 72, 48), Scratch(CPU)
    launch, out = product(x, weight, TARGET, scratch, name="a product")
    assert launch.name == "a product N=72 K=48" and out is scratch("a product", 3, 72)
    launch, out = product(x, weight, TARGET, scratch, name="a product", out="a result")
    assert launch.name == "a product N=72 K=48" and out is scratch("a result", 3, 72)


def test_a_residual_is_added():
    x, weight, beside = numbers(1, 3, 48), numbers(2, 72, 48), numbers(3, 3, 72)
    launch, out = product(x, weight, TARGET, Scratch(CPU), residual=beside)
    run(launch)
    assert torch.equal(out.double(), x.double() @ weight.double().T + beside.double())


def test_a_gate_and_an_up_are_activated():
    x, weight = numbers(1, 3, 48), numbers(2, 72, 48) / 16
    launch, out = product(x, weight, TARGET, Scratch(CPU), activated=True)
    run(launch)
    gate, up = (x.double() @ weight[first::2].double().T for first in (0, 1))
    assert out.shape == (3, 36) and close(out, gate * gate.sigmoid() * up)


def test_rows_of_a_stream_are_normalised_and_prepared_for_the_next_norm():
    x, weight = numbers(1, 3, 48), numbers(2, 72, 48) / 8
    before, after = norm_of(3, 48), norm_of(4, 72, 0.5)
    scratch = Scratch(CPU)
    given = a_stream(x, Norm.from_reference(before), scratch)
    beside = numbers(5, 3, 72)
    launch, out = product(
        given,
        weight,
        TARGET,
        scratch,
        residual=beside,
        then=Norm.from_reference(after),
        out="after",
    )
    run(launch)
    exact = before(x.double()) @ weight.double().T + beside.double()
    assert isinstance(out, Stream) and out.eps == 0.5 and close(out.x, exact)
    assert torch.equal(out.scaled, (out.x.float() * (1 + after.weight.float())).bfloat16())
    mean = out.squares[:, :3].sum(0) / 72
    normed = out.scaled.double() / (mean[:, None].double() + 0.5).sqrt()
    assert close(normed, after(out.x.double()))


def test_a_ring_takes_each_row_at_its_position():
    x, weight = numbers(1, 3, 48), numbers(2, 72, 48)
    ring, start = torch.zeros(16, 72).bfloat16(), torch.tensor([30], dtype=torch.int32)
    launch, out = product(x, weight, TARGET, Scratch(CPU), ring=(ring, start))
    run(launch)
    assert out is ring
    assert torch.equal(ring[[14, 15, 0]].double(), x.double() @ weight.double().T)
    assert not ring[1:14].any()


def test_the_table_decides_the_blocks_which_divide_what_is_summed(monkeypatch: pytest.MonkeyPatch):
    entry = {"N=72 K=48": {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 2, "num_stages": 1}}
    monkeypatch.setitem(configs.table()[TARGET], "linear", entry)
    launch, _ = product(numbers(1, 3, 48), numbers(2, 72, 48), TARGET, Scratch(CPU))
    blocks = launch.arguments["BLOCK_N"], launch.arguments["BLOCK_K"]
    assert (blocks, launch.grid) == ((32, 16), (3, 1, 1))
    assert (
        launch.options == {"num_warps": 2, "num_stages": 1} and launch.weight_bytes == 32 * 16 * 2
    )


def test_what_the_matrix_unit_does_not_take_is_refused():
    with pytest.raises(InputError) as caught:
        product(numbers(1, 3, 40), numbers(2, 72, 40), TARGET, Scratch(CPU))
    assert str(caught.value) == (
        "a product along 40 elements; the matrix unit takes multiples of 16"
    )


# ---- streams


def test_streams_of_two_names_share_no_memory():
    scratch = Scratch(CPU)
    first, second = (Stream.empty(n, 3, 48, 2, TARGET, 0.5, scratch) for n in ("a", "b"))
    fields = ("x", "scaled", "squares")
    assert len({getattr(s, f).data_ptr() for s in (first, second) for f in fields}) == 6
    assert first.x is scratch("a", 3, 48) and first.eps == 0.5
    assert first.squares.shape == (2, ROWS[TARGET]) and first.squares.dtype == torch.float32
    norm = Norm(numbers(1, 48), 0.5)
    outs = [written(name, 3, 48, 2, TARGET, norm, scratch)[1] for name in ("a", "b")]
    assert [out.x.data_ptr() for out in outs] == [first.x.data_ptr(), second.x.data_ptr()]
    assert outs[0].scaled is first.scaled and outs[0].squares is first.squares


def test_rows_without_a_norm_are_read_as_they_are():
    x = numbers(1, 3, 48)
    assert read_normed(x) == {"x": x, "squares": x, "eps": 1.0, "PARTS": 0}
    stream = a_stream(x, Norm(numbers(2, 48), 0.25), Scratch(CPU), parts=4)
    assert read_normed(stream) == {
        "x": stream.scaled, "squares": stream.squares, "eps": 0.25, "PARTS": 4,
    }  # fmt: skip


# ---- weights


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_a_quantised_weight_is_refused(dtype: torch.dtype):
    module: Any = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2, 2, dtype=dtype), requires_grad=False)
    with pytest.raises(
        InputError, match=re.escape(f"a weight in {dtype}; the fast path needs bf16")
    ):
        in_bf16(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_weights_become_bf16(dtype: torch.dtype):
    module = nn.Linear(8, 4, bias=False).to(dtype)
    taken = in_bf16(module)
    assert taken.dtype == torch.bfloat16 and not taken.requires_grad
    assert torch.equal(taken, module.weight.bfloat16())


def test_weights_that_are_joined_are_in_memory_once():
    layers = [nn.Linear(8, n, bias=False).bfloat16() for n in (3, 5, 2)]
    before = [layer.weight.clone() for layer in layers]
    whole = stacked(*layers)
    assert torch.equal(whole, torch.cat(before)) and not whole.requires_grad
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, old) and not layer.weight.requires_grad
        assert layer.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    gate, up = (nn.Linear(8, 3, bias=False).bfloat16() for _ in range(2))
    before = [gate.weight.clone(), up.weight.clone()]
    both = interleaved(gate, up)
    assert torch.equal(both[::2], before[0]) and torch.equal(both[1::2], before[1])
    for layer, old in ((gate, before[0]), (up, before[1])):
        assert torch.equal(layer.weight, old) and not layer.weight.requires_grad
        assert layer.weight.untyped_storage().data_ptr() == both.untyped_storage().data_ptr()
    assert not both.requires_grad


def test_a_twin_shares_its_nodes_until_one_is_replaced():
    module = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    second = twin(module)
    assert second[1] is module[1]
    second[0] = nn.ReLU()
    assert isinstance(module[0], nn.Identity)
