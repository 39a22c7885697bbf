"""The delta net and attention of a prompt's rows as gfx950 code in the emulator, beside the reference."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fast.kernels.prefill.deltanet import _product
from fast.launch import Launch
from fast.prefill import attention
from tests.support.fast_nodes import a_pass
from tests.support.prefill_nodes import cut_findings, prefill_findings, prefilled
from tools.gfx950.target import emulate


@triton.jit
def multiply(a, b, out, SIZE: tl.constexpr):
    """out = a @ b, all [SIZE, SIZE] fp32."""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + place, _product(tl.load(a + place), tl.load(b + place)))


@pytest.mark.parametrize("rows, scale", [(9, 1.0), (64, 1.0), (65, 0.01), (130, 1.0)])
def test_a_delta_nets_outputs_and_the_state_it_leaves(rows: int, scale: float):
    assert not prefill_findings(a_pass("linear_attn", rows, scale=scale))


@pytest.mark.parametrize("sizes", [
    {"linear_key_head_dim": 64, "linear_value_head_dim": 16},
    {"linear_key_head_dim": 128, "linear_value_head_dim": 128},  # as published
    {"linear_conv_kernel_dim": 2}, {"linear_conv_kernel_dim": 8},
    {"output_gate_type": "sigmoid"}, {"rms_norm_eps": 0.5},
])  # fmt: skip
def test_other_sizes_taps_and_gates_of_a_delta_net(sizes: dict[str, object]):
    assert not prefill_findings(a_pass("linear_attn", 70, **sizes))


def test_keys_that_are_all_alike():
    """The correction of each token then undoes nearly all that the one before it wrote: the triangular
    system's inverse is at its worst."""
    what = a_pass("linear_attn", 70)
    what.x[:] = what.x[:1]
    assert not prefill_findings(what)


def test_the_product_for_the_inverse_has_22_bits_of_each_number():
    """Also of numbers whose second half would be subnormal in fp16."""
    torch.manual_seed(0)
    a, b = (torch.randn(64, 64) * torch.logspace(-4, 0, 64) for _ in range(2))
    out = torch.full((64, 64), float("nan"))
    arguments = {"a": a, "b": b, "out": out, "SIZE": 64}
    emulate([Launch("multiply", multiply, (1, 1, 1), arguments, {"num_warps": 4})])
    wide = a.double() @ b.double()
    assert ((out - wide).abs() <= 2**-20 * (a.double().abs() @ b.double().abs())).all()


def test_a_delta_nets_bits_are_the_same_in_one_pass_and_in_several():
    assert not cut_findings(a_pass("linear_attn", 140), (64, 128))


@pytest.mark.parametrize("rows, length, scale", [
    (9, 0, 1.0), (64, 0, 0.01), (70, 64, 1.0), (130, 192, 1.0)
])  # fmt: skip
def test_attentions_outputs_and_the_keys_and_values_it_leaves(rows: int, length: int, scale: float):
    assert not prefill_findings(a_pass("self_attn", rows, length=length, scale=scale))


@pytest.mark.parametrize("name", ["27B", "0.8B"])
def test_other_head_counts_of_attention(name: str):
    assert not prefill_findings(a_pass("self_attn", 20, name=name, length=64))


def test_attentions_bits_are_the_same_in_one_pass_and_in_several():
    assert not cut_findings(a_pass("self_attn", 200, length=64), (64, 128))


@pytest.mark.parametrize("room", [0, 1 << 28])
@pytest.mark.parametrize("rows, length", [(70, 128), (130, 64)])
def test_attention_whose_keys_are_read_in_pieces(
    room: int, rows: int, length: int, monkeypatch: pytest.MonkeyPatch
):
    """One after the other, or all at the same time."""
    monkeypatch.setattr(attention, "PIECE", 64)
    monkeypatch.setattr(attention, "ROOM", room)
    assert not prefill_findings(a_pass("self_attn", rows, length=length))


def test_pieces_give_the_same_bits_at_once_and_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    """The whole pass reads two of its five pieces at the same time. Of its parts, the first has two
    pieces, and the others read all of theirs at the same time."""
    monkeypatch.setattr(attention, "PIECE", 64)
    what = a_pass("self_attn", 200, length=64)
    config = what.model.config
    row = 4 * config.num_attention_heads * config.head_dim  # bytes
    monkeypatch.setattr(attention, "ROOM", 2 * 200 * row)
    assert not cut_findings(what, (64, 128))


def test_attention_over_a_cache_in_e4m3_reads_what_the_cache_holds():
    """The pass reads its own rows from the cache too, so that its bits do not depend on where a
    prompt is cut."""
    assert not cut_findings(a_pass("self_attn", 140, length=64, fp8=True), (64,))


@pytest.mark.parametrize(
    "settings", [pytest.param({"seed": 1}, marks=pytest.mark.slow), {"batch": 1}]
)
def test_the_order_in_which_waves_run_decides_no_bit(settings: dict[str, int]):
    what = a_pass("linear_attn", 70)
    plain, other = prefilled(what), prefilled(what, **settings)
    assert torch.equal(plain.out, other.out)
    assert torch.equal(plain.state["recurrent"], other.state["recurrent"])
