"""Nodes called as modules, over the reference's own caches: in a pass of a few rows, and in the next."""

import copy

import pytest
import torch

pytest.importorskip("triton")

from fast.launch import Scratch
from fast.linear import Norm, Stream
from qwen35.cache import DeltaState, KVCache
from tests.support.fast_cases import CPU, emulated, too_far
from tests.support.fast_nodes import a_pass, fast, fast_node, numbers
from tools.gfx950.target import emulate


@pytest.mark.parametrize(("kind", "linear", "fp8"), [
    ("linear_attn", True, False), ("self_attn", False, False), ("self_attn", False, True),
    ("layer", True, False), ("layer", False, True),
])  # fmt: skip
def test_two_passes_through_forward_are_one_pass_of_launches(
    kind: str, linear: bool, fp8: bool, monkeypatch: pytest.MonkeyPatch
):
    """The outputs have the same bits, and so has what the reference's cache or state then holds."""
    for module in ("attention", "deltanet", "layer"):
        monkeypatch.setattr(f"fast.{module}.run", lambda launches, device: emulated(launches))
    sizes = {"num_experts": 1, "num_experts_per_tok": 1} if kind == "layer" else {}
    what = a_pass(kind, 3, length=126, linear=linear, fp8=fp8, **sizes)
    expected = fast(what, capacity=200)
    node, state = fast_node(what.node), what.state.copy()
    parts = [node(what.x[None, first:last], state)[0].clone() for first, last in ((0, 2), (2, 3))]
    assert torch.equal(torch.cat(parts), expected.out)
    if isinstance(state, KVCache):
        assert state.length == 126 + 3
        before = numbers(what.state)
        for name, held in numbers(state).items():
            assert torch.equal(held[:, :, :126], before[name]), name
            assert torch.equal(held[0, :, 126:].transpose(0, 1), expected.state[name]), name
    else:
        left = state.tensors()
        assert torch.equal(left["conv"][0], expected.state["conv"])
        assert torch.equal(left["recurrent"][0], expected.state["recurrent"][-1])


@pytest.mark.parametrize("linear", [True, False])
def test_two_sequences_are_two_rows_of_the_batch(linear: bool, monkeypatch: pytest.MonkeyPatch):
    """A layer's launches take one sequence, so that several go through its nodes."""
    for module in ("attention", "deltanet", "layer", "linear", "moe", "router"):
        monkeypatch.setattr(
            f"fast.{module}.run", lambda work, device: emulated(work), raising=False
        )
    what = a_pass("layer", 3, name="27B", linear=linear)
    node, state = fast_node(what.node), what.state.copy()
    if isinstance(state, KVCache):
        both = KVCache(*(x.repeat(2, 1, 1, 1) for x in (state.k, state.v)), length=state.length)
    else:
        both = DeltaState(state.conv.repeat(2, 1, 1), state.recurrent.repeat(2, 1, 1, 1))
    out = node(what.x.repeat(2, 1, 1), both)
    assert out.shape == (2, 3, what.x.shape[1]) and torch.equal(out[0], out[1])


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("name", ["27B", "397B-A17B"])
def test_a_feed_forward_called_as_a_module(name: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Of a few rows, and of so many that a prompt's kernels take them. What follows may be a norm."""
    monkeypatch.setattr("fast.moe.run", emulate)
    sizes = {"num_experts": 1, "num_experts_per_tok": 1} if name != "27B" else {}
    what = a_pass("layer", rows, name=name, **sizes)
    mlp, x = what.node.mlp, what.x[None]
    node = fast_node(what.node).feed_forward
    assert not too_far(node(x), mlp(x), copy.deepcopy(mlp).double()(x.double()))
    norm = Norm(torch.ones(x.shape[-1]).bfloat16(), 1e-6)
    _, after = node.launches(x[0, :3], Scratch(CPU), residual=x[0, :3], then=norm)
    assert isinstance(after, Stream) and after.eps == 1e-6
