"""Replacing nodes: names, weights, what is refused, and that a block puts everything back."""

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35.compare.trace import trace
from qwen35.errors import InputError
from qwen35.load import Loader, load
from qwen35.node_error import NodeError
from qwen35.swap import A_CLASS, as_swaps, matching, nodes, outermost, swap, swapped
from reference.model import Model
from reference.moe import MLP, Experts
from reference.norm import RMSNorm
from tests.support.checkpoints import QWEN3_5, logits_of, write
from tests.support.family import small_model
from tests.support.oracle import within_twice

IDS = [5, 17, 42, 7, 99, 3, 58]


class Doubled(nn.Module):
    """An RMSNorm whose result counts twice."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    @classmethod
    def from_reference(cls, module: nn.Module) -> "Doubled":
        if not isinstance(module, RMSNorm):
            raise InputError(f"{type(module).__name__} is no RMSNorm")
        return cls(module)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.norm(x)


class Renamed(Doubled):
    """The same with another name for its argument."""

    def forward(self, rows: Tensor) -> Tensor:  # pyright: ignore
        return self.norm(rows)


class Fused(nn.Module):
    """Experts in two tensors; the per-expert ones are let go."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    @classmethod
    def from_reference(cls, module: nn.Module) -> "Fused":
        assert isinstance(module, Experts)
        gate_up = [torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in module]
        return cls(torch.stack(gate_up), torch.stack([e.down_proj.weight for e in module]))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        gate_up = torch.einsum("nd,nkid->nki", x, self.gate_up[experts].to(x.dtype))
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = nn.functional.silu(gate) * up
        out = torch.einsum("nki,nkdi->nkd", hidden, self.down[experts].to(x.dtype))
        return (out * weights[..., None].to(x.dtype)).sum(1)


def logits(model: Model) -> Tensor:
    """The logits of a short prompt."""
    return trace(model, IDS, "lm_head")["lm_head"]


def test_swap_replaces_what_matches_and_says_so() -> None:
    """Exactly these nodes, in the order of the model; `print` shows them; the sum follows."""
    model = small_model("397B-A17B")
    before = trace(model, IDS, "layers.*_layernorm")
    names = swap(model, "layers.[02].input_layernorm", Doubled)
    assert names == ["layers.0.input_layernorm", "layers.2.input_layernorm"]
    assert [n for n, m in model.named_modules() if isinstance(m, Doubled)] == names
    assert "(input_layernorm): Doubled" in str(model)
    after = trace(model, IDS, "layers.*_layernorm")
    first = "layers.0.input_layernorm"
    assert torch.equal(after[first], 2 * before[first])


def test_experts_in_another_layout_give_the_same_and_let_the_old_go() -> None:
    """A node that packs its weights: same numbers, and the old tensors are gone."""
    model = small_model("397B-A17B")
    wanted = logits(model)
    old = weakref.ref(model.layers[0].mlp.experts[0].gate_proj.weight)
    names = swap(model, "layers.*.mlp.experts", Fused)
    gc.collect()
    assert len(names) == model.config.num_hidden_layers
    assert old() is None
    error, most = within_twice(
        logits(model), wanted, logits(small_model("397B-A17B", dtype=torch.float64))
    )
    assert error <= most


def test_a_block_puts_the_nodes_back() -> None:
    """It does so when it ends in an error, too."""
    model = small_model("35B-A3B")
    before, wanted = str(model), logits(model)
    with swapped(model, "layers.*.post_attention_layernorm", Doubled) as names:
        assert len(names) == model.config.num_hidden_layers
        assert not torch.equal(logits(model), wanted)
    assert str(model) == before
    assert torch.equal(logits(model), wanted)
    with pytest.raises(ZeroDivisionError), swapped(model, "norm", Doubled):
        raise ZeroDivisionError
    assert str(model) == before


def test_nothing_that_matches_names_the_nearest() -> None:
    """A slip of the pen is answered with the name that was meant."""
    model = small_model("35B-A3B")
    with pytest.raises(InputError, match=r"'layers\.3\.self_atn'.*layers\.3\.self_attn"):
        swap(model, "layers.3.self_atn", Doubled)


def test_nodes_inside_an_expert_are_there_if_they_are_named() -> None:
    model = small_model("35B-A3B")
    inside = [f"layers.0.mlp.experts.1.{name}_proj" for name in ("gate", "up", "down")]
    assert list(nodes(model, "layers.0.mlp.experts.1.*")) == inside
    assert "layers.0.mlp.experts" in nodes(model, "layers.0.mlp.*")
    assert not {*inside} & {*nodes(model, "layers.0.mlp.*")}
    for pattern, said in (("layers", " that runs by itself$"), ("x.y", "; the nearest are mtp")):
        with pytest.raises(InputError, match=f"^pattern '{pattern}' matches no node{said}"):
            nodes(model, pattern)


@pytest.mark.parametrize(
    ("swaps", "said"),
    [
        ([("norm", nn.ReLU)], "replacement .*ReLU'> has no from_reference"),
        ([("norm", 3)], "replacement 3 has no from_reference"),
        ([3], rf"swaps: 3; expected pairs \(PATTERN, class\) or PATTERN={A_CLASS}"),
        ([(1, Doubled)], rf"swaps: \(1, .*Doubled'>\); expected pairs .* or PATTERN={A_CLASS}"),
        ([("a", "b", "c")], r"swaps: \('a', 'b', 'c'\); expected pairs .*"),
        (["norm"], rf"swaps 'norm'; expected PATTERN={A_CLASS}"),
        ("norm=", rf"swaps 'norm='; expected PATTERN={A_CLASS}"),
        ("=torch.nn:ReLU", rf"swaps '=torch.nn:ReLU'; expected PATTERN={A_CLASS}"),
        ([("norm", "nowhere:X")], "replacement 'nowhere:X': ModuleNotFoundError: .*"),
        ([("norm", "nowhere.py:X")], r"replacement 'nowhere\.py:X': nowhere\.py: no such file"),
        ([("norm", "a:b.py:X")], r"replacement 'a:b\.py:X': a:b\.py: no such file"),
        ([("norm", ":X")], rf"replacement ':X'; expected {A_CLASS}"),
        ([("norm", "torch.nn:X")], r"replacement 'torch\.nn:X': torch\.nn has no X"),
    ],
)
def test_what_is_no_swap_is_said(swaps: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}$"):
        as_swaps(swaps)


@pytest.mark.parametrize(("given", "said"), [(None, "None"), (3, "a int")])
def test_what_is_no_module_is_refused(given: Any, said: str) -> None:
    class Wrong:
        from_reference = staticmethod(lambda module: given)

    text = f"^norm: from_reference returned {said}; expected a torch module$"
    with pytest.raises(NodeError, match=text):
        swap(small_model("35B-A3B"), "norm", Wrong)  # pyright: ignore


def test_pairs_and_texts_are_swaps() -> None:
    name = f"{__name__}:Doubled"
    for given in (("norm", Doubled), ("norm", name), f"norm={name}"):
        assert as_swaps([given]) == [("norm", Doubled)]
    assert as_swaps(f"norm={name}") == [("norm", Doubled)]


def test_another_signature_is_refused() -> None:
    """The node, and both parameter lists."""
    model = small_model("35B-A3B")
    before = str(model)
    with pytest.raises(InputError, match=r"^norm: Renamed\.forward takes \(rows\).*\(x\)"):
        swap(model, "norm", Renamed)
    assert str(model) == before


def test_a_refusal_of_the_node_comes_through() -> None:
    """If `from_reference` cannot take a node, its own error is raised."""
    with pytest.raises(InputError, match="MLP is no RMSNorm"):
        swap(small_model("35B-A3B"), "layers.0.mlp.shared_expert", Doubled)


def test_nodes_inside_a_node_go_with_it() -> None:
    """A pattern that fits a node and its parts replaces the node once."""
    model = small_model("35B-A3B")
    found = matching(model, "layers.0.mlp*")
    assert len(found) > 10
    assert list(outermost(found)) == ["layers.0.mlp"]


def test_swaps_while_loading(tmp_path: Path) -> None:
    """The same model as loading first and swapping then, without both sets of experts at once."""
    write(tmp_path, "35B-A3B", QWEN3_5)
    alive = most = 0

    class Counted(Fused):
        @classmethod
        def from_reference(cls, module: nn.Module) -> "Counted":
            nonlocal alive, most
            alive += 1
            weakref.finalize(module[0], died)
            most = max(most, alive)
            return super().from_reference(module)  # pyright: ignore

    def died() -> None:
        nonlocal alive
        alive -= 1

    gc.collect()
    swaps = [("*.mlp.experts", Counted), ("norm", Doubled)]
    model = load(tmp_path, dtype=torch.float32, swaps=swaps)
    assert most == 1
    assert isinstance(model.norm, Doubled)
    assert isinstance(model.mtp.layers[0].mlp.experts, Counted)
    plain = load(tmp_path, dtype=torch.float32)
    swap(plain, "*.mlp.experts", Fused)
    swap(plain, "norm", Doubled)
    assert torch.equal(logits_of(model), logits_of(plain))


def test_a_swap_of_a_whole_stage_and_one_that_matches_nothing(tmp_path: Path) -> None:
    """A layer or the final norm is a node as any other; a pattern without a node fails before loading."""
    write(tmp_path, "35B-A3B", QWEN3_5)

    class Silent(nn.Module):
        @classmethod
        def from_reference(cls, module: nn.Module) -> "Silent":
            return cls()

        def forward(self, x: Tensor, state: object) -> Tensor:
            return x

    model = load(tmp_path, swaps=[("layers.2", Silent)])
    assert isinstance(model.layers[2], Silent)
    with pytest.raises(InputError, match=r"layers\.99"):
        load(tmp_path, swaps=[("layers.99", Silent)])


def test_one_stage_at_a_time(tmp_path: Path) -> None:
    """A loader gives each stage with its weights and keeps none of it."""
    expected = write(tmp_path, "35B-A3B", QWEN3_5)
    loader = Loader(tmp_path, dtype=torch.float32)
    assert loader.stages == [
        "embed_tokens", *(f"layers.{i}" for i in range(8)), "norm", "lm_head", "mtp"
    ]  # fmt: skip
    for name in loader.stages:
        stage = loader.stage(name)
        for parameter_name, parameter in stage.named_parameters():
            full = f"{name}.{parameter_name}"
            assert torch.equal(parameter.float(), expected[full]), full
        assert all(p.is_meta for p in loader.skeleton.parameters())


def test_a_tied_head_is_a_stage_too(tmp_path: Path) -> None:
    """Its weight is the embedding's."""
    expected = write(tmp_path, "0.8B", QWEN3_5)
    head = Loader(tmp_path).stage("lm_head")
    assert torch.equal(head.weight.float(), expected["embed_tokens.weight"])


def test_named_locals_of_a_trace() -> None:
    """Names of the source, under the node whose forward had them; outputs as without them."""
    model = small_model("397B-A17B")
    plain = trace(model, IDS, "layers.0.*")
    full = trace(model, IDS, "layers.0.*", named_locals=True)
    assert {name for name in full if ":" not in name} == set(plain)
    assert all(torch.equal(full[name], tensor) for name, tensor in plain.items())
    beta, g = full["layers.0.linear_attn:beta"], full["layers.0.linear_attn:g"]
    heads = model.config.linear_num_value_heads
    assert beta.shape == g.shape == (1, len(IDS), heads)
    assert beta.min() > 0 and beta.max() < 1 and g.max() < 0
    assert full["layers.0.mlp.gate:probabilities"].sum(-1).allclose(torch.ones(len(IDS)))
    assert "layers.0.linear_attn:chunk.k" in full
    assert torch.equal(
        full["layers.0.mlp.shared_expert:x"], full["layers.0.post_attention_layernorm"][0]
    )
    assert not [name for name in full if name.startswith("layers.1")]


def test_a_trace_leaves_nothing_behind() -> None:
    """No hook, no profile function, and the model computes as before; also after an error."""
    model = small_model("35B-A3B")
    wanted = logits(model)
    healthy = MLP.forward

    def broken(self: MLP, x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    MLP.forward = broken
    try:
        with pytest.raises(RuntimeError, match="broken"):
            trace(model, IDS, named_locals=True)
    finally:
        MLP.forward = healthy
    assert sys.getprofile() is None
    assert not [m for m in model.modules() if m._forward_hooks]
    assert torch.equal(logits(model), wanted)
