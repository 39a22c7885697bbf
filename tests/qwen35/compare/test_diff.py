"""A diff is checked in both directions: what is broken is named, and what is whole passes.

Each fault is planted in one node of a candidate, as a class that stands for it or as one wrong tensor of
a folder, and the first row of the report must be that node. Then healthy candidates (other dtypes, other
roundings inside a node, other lengths), and what the report says of shapes, places and counts.
"""

import copy
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reference.attention
import reference.deltanet
from qwen35.cache import DeltaState, KVCache
from qwen35.compare.diff import diff, passes
from qwen35.compare.judge import MOST, Judge, Report, Row
from qwen35.compare.trace import trace
from qwen35.errors import InputError
from qwen35.load import TINY, Loader, load
from reference.attention import GatedAttention
from reference.deltanet import GatedDeltaNet
from reference.layer import DecoderLayer
from reference.moe import MLP, Experts, Router, SparseMoeBlock
from reference.mtp import MTP
from reference.norm import RMSNorm, RMSNormGated
from tests.support.checkpoints import (
    QWEN3_5,
    QWEN3_NEXT,
    Dialect,
    assert_names,
    edit_tensors,
    write,
)
from tests.support.faults import delta_rule_with_late_decay
from weights.convert import convert
from weights.output import Options

LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}  # a delta net, then attention
SIZES = LAYERS | {"num_experts": 12, "num_experts_per_tok": 3}
MEMBERS: dict[str, tuple[str, Dialect, dict[str, int]]] = {
    "moe": ("397B-A17B", QWEN3_5, SIZES),
    "dense": ("27B", QWEN3_5, LAYERS),
    "next": ("Qwen3-Next", QWEN3_NEXT, SIZES),
}
VOCABULARY = 160
DTYPES = [torch.float32, torch.bfloat16]
DELTA, ATTENTION = "layers.0.linear_attn", "layers.1.self_attn"


def random_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


IDS = random_ids(75)  # prefill of 64 and of 5, then decode of 1, 1 and 4 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that faults are planted in."""
    made = tmp_path_factory.mktemp("moe")
    member, dialect, sizes = MEMBERS["moe"]
    write(made, member, dialect, seed=7, **sizes)
    return made


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A folder of each member and seed, written when first asked for."""
    made: dict[tuple[str, int], Path] = {}

    def of(name: str, seed: int) -> Path:
        if (name, seed) not in made:
            member, dialect, sizes = MEMBERS[name]
            made[name, seed] = tmp_path_factory.mktemp(name)
            write(made[name, seed], member, dialect, seed=seed, **sizes)
        return made[name, seed]

    return of


def failing(report: Report) -> list[Row]:
    return [row for row in report.rows if not row.passed]


def row_of(report: Report, node: str, tensor: str = "output", phase: str = "prefill") -> Row:
    return next(r for r in report.rows if (r.node, r.tensor, r.phase) == (node, tensor, phase))


# --- faults: forwards that are slightly wrong. Each is a function (module, its arguments) -> its output.

Forward = Callable[..., Any]
FAULTS: dict[str, tuple[str, Forward]] = {}


def standing_in(forward: Forward) -> Any:
    """A replacement that keeps the node's class, weights and signature and computes `forward`."""

    class StandIn:
        @classmethod
        def from_reference(cls, module: nn.Module) -> nn.Module:
            fresh = copy.copy(module)
            healthy = type(module).forward.__get__(fresh)

            @wraps(healthy)
            def wrong(*arguments: Any) -> Any:
                return forward(fresh, *arguments)

            fresh.forward = wrong
            return fresh

    return StandIn


def fault(node: str) -> Callable[[Forward], Forward]:
    """Register a fault of this node."""

    def register(forward: Forward) -> Forward:
        FAULTS[forward.__name__] = (node, forward)
        return forward

    return register


def with_rules(
    self: GatedDeltaNet, x: Tensor, state: DeltaState, change: Callable[[dict], dict]
) -> Tensor:
    """The delta net with the arguments of its rules changed on the way in."""

    def changed(rule: Callable) -> Callable:
        def wrong(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> Any:
            return rule(**change({"q": q, "k": k, "v": v, **rest}))

        return wrong

    rules = {name: changed(getattr(reference.deltanet, name)) for name in ("recurrent", "chunk")}
    with mock.patch.multiple(reference.deltanet, **rules):
        return GatedDeltaNet.forward(self, x, state)


def with_attention(self: GatedAttention, x: Tensor, cache: KVCache, **functions: Any) -> Tensor:
    with mock.patch.multiple(reference.attention, **functions):
        return GatedAttention.forward(self, x, cache)


@fault("layers.0.input_layernorm")
def norm_without_the_one(self: RMSNorm, x: Tensor) -> Tensor:
    y = x.float()
    inverse_rms = torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
    return (y * inverse_rms * self.weight.float()).to(x.dtype)


@fault("layers.1.post_attention_layernorm")
def norm_of_the_centred_row(self: RMSNorm, x: Tensor) -> Tensor:
    return RMSNorm.forward(self, x - x.mean(-1, keepdim=True))


@fault("norm")
def final_norm_without_weight(self: RMSNorm, x: Tensor) -> Tensor:
    return RMSNorm.forward(self, x) / (1 + self.weight)


@fault(f"{DELTA}.norm")
def gate_before_the_norm(self: RMSNormGated, x: Tensor, gate: Tensor) -> Tensor:
    gated = x.float() * F.silu(gate.float())
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
    return (self.weight.float() * normed).to(x.dtype)


@fault(f"{DELTA}.norm")
def sigmoid_for_silu(self: RMSNormGated, x: Tensor, gate: Tensor) -> Tensor:
    open_gate = torch.full_like(gate, 30.0)  # silu(30) is 30
    return RMSNormGated.forward(self, x, open_gate) / 30 * gate.sigmoid()


@fault(f"{DELTA}.in_proj_b")
def strengths_of_the_next_head(self: nn.Module, x: Tensor) -> Tensor:
    return type(self).forward(self, x).roll(1, -1)


@fault(f"{ATTENTION}.q_proj")
def gate_as_a_second_block(self: nn.Module, x: Tensor) -> Tensor:
    halves = type(self).forward(self, x).unflatten(-1, (2, 8, -1))
    return halves.transpose(-3, -2).flatten(-3)


@fault(f"{ATTENTION}.k_norm")
def key_norm_left_out(self: RMSNorm, x: Tensor) -> Tensor:
    return x


@fault(ATTENTION)
def key_norm_not_called(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    bare = copy.copy(self)
    bare._modules = self._modules | {"k_norm": nn.Identity()}
    return GatedAttention.forward(bare, x, cache)


@fault(ATTENTION)
def rope_turning_backwards(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    healthy = reference.attention.apply_rope
    wrong = lambda x, cos, sin: healthy(x, cos, -sin)  # noqa: E731
    return with_attention(self, x, cache, apply_rope=wrong)


@fault(ATTENTION)
def rope_on_all_channels(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    wide = copy.copy(self)
    wide.rotary_dim = self.head_dim
    return GatedAttention.forward(wide, x, cache)


@fault(ATTENTION)
def rope_on_interleaved_pairs(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    def wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, passed = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
        even, odd = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
        return torch.cat((pairs.flatten(-2), passed), -1)

    return with_attention(self, x, cache, apply_rope=wrong)


def positions_start_anew_each_pass(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    healthy = reference.attention.rope_table
    return with_attention(self, x, cache, rope_table=lambda p, *rest: healthy(p - p[0], *rest))


FAULTS["positions_start_anew_each_pass"] = (ATTENTION, positions_start_anew_each_pass)


@fault(ATTENTION)
def scores_not_scaled(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    healthy, root = reference.attention.causal_attention, self.head_dim**0.5
    wrong = lambda q, k, v: healthy(q * root, k, v)  # noqa: E731
    return with_attention(self, x, cache, causal_attention=wrong)


@fault(ATTENTION)
def query_heads_tiled_over_kv_heads(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    healthy = reference.attention.causal_attention

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiled = q.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(1, 2)
        out = healthy(tiled, k, v)
        return out.unflatten(1, (k.shape[1], -1)).transpose(1, 2).flatten(1, 2)

    return with_attention(self, x, cache, causal_attention=wrong)


@fault(ATTENTION)
def output_gate_left_out(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    return with_attention(self, x, cache, sigmoid=torch.ones_like)


@fault(ATTENTION)
def a_query_sees_the_next_key(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared, T, P = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
        seen = torch.ones(T, P, dtype=torch.bool).tril(P - T + 1)
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    return with_attention(self, x, cache, causal_attention=wrong)


@fault(DELTA)
def decay_after_the_read(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    wrong = delta_rule_with_late_decay
    with mock.patch.multiple(reference.deltanet, recurrent=wrong, chunk=wrong):
        return GatedDeltaNet.forward(self, x, state)


@fault(DELTA)
def value_heads_tiled(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    shared = self.num_v_heads // self.num_k_heads

    def change(a: dict[str, Tensor]) -> dict[str, Tensor]:
        return a | {name: a[name][:, :, ::shared].repeat(1, 1, shared, 1) for name in ("q", "k")}

    return with_rules(self, x, state, change)


@fault(DELTA)
def written_with_full_strength(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    return with_rules(self, x, state, lambda a: a | {"beta": torch.ones_like(a["beta"])})


@fault(DELTA)
def decay_without_softplus(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    with mock.patch.object(reference.deltanet, "softplus", torch.relu):
        return GatedDeltaNet.forward(self, x, state)


@fault(DELTA)
def delta_query_not_scaled(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    root = self.head_k_dim**0.5
    return with_rules(self, x, state, lambda a: a | {"q": a["q"] * root})


@fault(DELTA)
def keys_not_normalised(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    with mock.patch.object(reference.deltanet, "l2norm", lambda x: x):
        return GatedDeltaNet.forward(self, x, state)


@fault(DELTA)
def recurrent_state_not_carried(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    return with_rules(self, x, state, lambda a: a | {"state": torch.zeros_like(a["state"])})


@fault(DELTA)
def convolution_state_not_carried(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    state.conv = torch.zeros_like(state.conv)
    return GatedDeltaNet.forward(self, x, state)


@fault(DELTA)
def convolution_state_lost_afterwards(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    """The output is right; the state that it leaves is not."""
    out = GatedDeltaNet.forward(self, x, state)
    state.conv = torch.zeros_like(state.conv)
    return out


@fault(DELTA)
def values_and_gates_exchanged(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    """What the convolution gives is taken for z, and in_proj_z for v."""
    split = self.num_v_heads, self.head_v_dim
    z = self.in_proj_z(x).float()
    mixed: list[Tensor] = []
    healthy = reference.deltanet.causal_conv1d

    def convolve(rows: Tensor, weight: Tensor) -> Tensor:
        mixed.append(healthy(rows, weight))
        return torch.cat((mixed[0][..., : -z.shape[-1]], z.to(mixed[0].dtype)), -1)

    class Norm(nn.Module):
        def forward(_, read: Tensor, gate: Tensor) -> Tensor:  # noqa: N805
            return self.norm(read, mixed[0][..., -z.shape[-1] :].unflatten(-1, split).to(x.dtype))

    exchanged = copy.copy(self)
    exchanged._modules = self._modules | {"norm": Norm()}
    with mock.patch.object(reference.deltanet, "causal_conv1d", convolve):
        return GatedDeltaNet.forward(exchanged, x, state)


@fault("layers.0.mlp.gate")
def router_not_renormalised(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    bare = copy.copy(self)
    bare.norm_topk_prob = False
    return Router.forward(bare, x)


@fault("layers.0.mlp.gate")
def router_weights_not_ranked_with_experts(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    experts, weights = Router.forward(self, x)
    return experts.flip(-1), weights


@fault("layers.1.mlp.gate")
def softmax_of_the_chosen_probabilities(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    experts, weights = Router.forward(self, x)
    return experts, weights.softmax(-1)


@fault("layers.1.mlp.gate")
def router_of_the_next_experts(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    experts, weights = Router.forward(self, x)
    return (experts + 1) % len(self.weight), weights


@fault("layers.1.mlp.experts")
def weights_in_the_order_of_the_experts(
    self: Experts, x: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    return Experts.forward(self, x, experts.sort(dim=-1).values, weights)


@fault("layers.0.mlp.experts")
def last_expert_forgotten(self: Experts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    return Experts.forward(self, x, experts[:, :-1], weights[:, :-1])


@fault("layers.0.mlp.shared_expert")
def gate_and_up_exchanged(self: MLP, x: Tensor) -> Tensor:
    return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


@fault("layers.0.mlp")
def shared_expert_without_gate(self: SparseMoeBlock, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    routed = self.experts(rows, *self.gate(rows))
    return (routed + self.shared_expert(rows)).view_as(x)


@fault("layers.1.mlp")
def shared_expert_forgotten(self: SparseMoeBlock, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    return self.experts(rows, *self.gate(rows)).view_as(x)


@fault("layers.1")
def residual_forgotten(self: DecoderLayer, x: Tensor, state: Any) -> Tensor:
    after_mixer = x + self.self_attn(self.input_layernorm(x), state)
    return self.mlp(self.post_attention_layernorm(after_mixer))


@fault("layers.0")
def residual_of_the_normed_input(self: DecoderLayer, x: Tensor, state: Any) -> Tensor:
    return DecoderLayer.forward(self, x, state) - x + self.input_layernorm(x)


@fault("mtp")
def mtp_halves_exchanged(self: MTP, embeds: Tensor, hidden: Tensor, cache: KVCache) -> Tensor:
    both = (self.pre_fc_norm_hidden(hidden), self.pre_fc_norm_embedding(embeds))
    return self.norm(self.layers[0](self.fc(torch.cat(both, -1)), cache))


@fault("mtp")
def mtp_hidden_not_normed(self: MTP, embeds: Tensor, hidden: Tensor, cache: KVCache) -> Tensor:
    fused = self.fc(torch.cat((self.pre_fc_norm_embedding(embeds), hidden), -1))
    return self.norm(self.layers[0](fused, cache))


@fault("mtp")
def mtp_without_its_last_norm(self: MTP, embeds: Tensor, hidden: Tensor, cache: KVCache) -> Tensor:
    both = (self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(hidden))
    return self.layers[0](self.fc(torch.cat(both, -1)), cache)


@fault("mtp")
def mtp_keys_not_carried(self: MTP, embeds: Tensor, hidden: Tensor, cache: KVCache) -> Tensor:
    fresh = KVCache(cache.k[:, :, :0], cache.v[:, :, :0])
    out = MTP.forward(self, embeds, hidden, fresh)
    cache.append(fresh.k[:, :, : fresh.length], fresh.v[:, :, : fresh.length])
    return out


@fault("lm_head")
def head_one_row_off(self: nn.Module, x: Tensor) -> Tensor:
    return type(self).forward(self, x).roll(1, -1)


@fault("embed_tokens")
def embedding_one_row_off(self: nn.Embedding, ids: Tensor) -> Tensor:
    return nn.Embedding.forward(self, (ids + 1) % self.num_embeddings)


BY_PHASE = {  # faults that the first pass cannot see
    "positions_start_anew_each_pass", "recurrent_state_not_carried",
    "convolution_state_not_carried", "mtp_keys_not_carried",
}  # fmt: skip


def assert_placed(report: Report, node: str) -> None:
    """The node comes first, and nothing else fails but what contains it."""
    assert not report.passed
    others = {row.node for row in failing(report)}
    assert report.rows[0].node == node, (report.rows[0], others)
    assert all(node == other or node.startswith(f"{other}.") for other in others), others


IN_BOTH = [(name, torch.bfloat16) for name in FAULTS] + [
    (name, torch.float32) for name in list(FAULTS)[::3]
]


@pytest.mark.parametrize(("name", "dtype"), IN_BOTH)
def test_a_fault_is_placed(name: str, dtype: torch.dtype, folder: Path) -> None:
    """Its stage alone is compared, to save time: the rows are those of a whole run (tested below)."""
    node, forward = FAULTS[name]
    stage = ".".join(node.split(".")[: 2 if node.startswith("layers") else 1])
    swaps = [(node, standing_in(forward))]
    assert_placed(diff(folder, IDS, swaps=swaps, dtype=dtype, decode=1, stages=stage.__eq__), node)


@pytest.mark.parametrize(
    "name", ["embedding_one_row_off", "decay_after_the_read", "router_of_the_next_experts"]
)
def test_a_fault_is_placed_among_all_stages(name: str, folder: Path) -> None:
    """The stages after it are given what the oracle computed, and stay clean."""
    node, forward = FAULTS[name]
    assert_placed(diff(folder, IDS, swaps=[(node, standing_in(forward))]), node)


@pytest.mark.parametrize("name", sorted(BY_PHASE))
def test_a_state_fault_shows_after_the_first_pass(name: str, folder: Path) -> None:
    """With a short prompt prefill is one pass: its rows pass, those of decode do not."""
    node, forward = FAULTS[name]
    report = diff(folder, IDS[:30], swaps=[(node, standing_in(forward))], dtype=torch.float32)
    assert report.rows[0].node == node
    assert {row.phase for row in failing(report)} == {"decode"}


def test_a_chunk_that_does_not_carry(folder: Path) -> None:
    """Inside one pass: only a prompt of 192 tokens and more has a pass of two chunks."""

    def forward(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
        healthy = reference.deltanet.chunk

        def wrong(
            q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
        ) -> Any:
            outputs, states = [], []
            for parts in zip(*(t.split(64, 1) for t in (q, k, v, g, beta)), strict=True):
                read, after = healthy(*parts[:3], g=parts[3], beta=parts[4], state=state)
                state = torch.zeros_like(state)
                outputs.append(read)
                states += after
            return torch.cat(outputs, 1), states

        with mock.patch.object(reference.deltanet, "chunk", wrong):
            return GatedDeltaNet.forward(self, x, state)

    swaps = [(DELTA, standing_in(forward))]
    report = diff(folder, random_ids(198), swaps=swaps, stages="layers.0".__eq__)
    assert_placed(report, DELTA)


def top_k_one_fewer(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    fewer = copy.copy(self)
    fewer.top_k -= 1
    return Router.forward(fewer, x)


def test_a_router_with_fewer_experts(folder: Path) -> None:
    swaps = [("layers.0.mlp.gate", standing_in(top_k_one_fewer))]
    assert_placed(diff(folder, IDS, swaps=swaps), "layers.0.mlp.gate")


def test_no_eps(tmp_path: Path) -> None:
    """Seen where the inputs are small: an embedding of a hundredth."""
    write(tmp_path, *MEMBERS["moe"][:2], **SIZES)
    edit_tensors(tmp_path, scale_embedding)

    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        bare = copy.copy(self)
        bare.eps = 0.0
        return RMSNorm.forward(bare, x)

    node = "layers.0.input_layernorm"
    assert_placed(diff(tmp_path, IDS[:9], swaps=[(node, standing_in(forward))]), node)


def scale_embedding(tensors: dict[str, Tensor]) -> None:
    tensors["model.language_model.embed_tokens.weight"] *= 0.01


# --- faults of a loader: a folder with one wrong tensor

PREFIX = "model.language_model.layers"


def gate_and_up_in_other_order(tensors: dict[str, Tensor]) -> None:
    fused = tensors[f"{PREFIX}.0.mlp.experts.gate_up_proj"]
    fused[3] = fused[3].roll(len(fused[3]) // 2, 0)


def edited(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return edit


LINEAR, FULL = f"{PREFIX}.0.linear_attn", f"{PREFIX}.1.self_attn"
# 2 key heads of 16, 8 value heads of 24: 32 rows of q, 32 of k, 192 of v
WRONG_TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], None]]] = {
    "one expert's gate and up exchanged": ("layers.0.mlp.experts", gate_and_up_in_other_order),
    "experts one off": (
        "layers.1.mlp.experts",
        edited(f"{PREFIX}.1.mlp.experts.down_proj", lambda t: t.roll(1, 0)),
    ),
    "k before q": (
        f"{DELTA}.in_proj_qkv",
        edited(f"{LINEAR}.in_proj_qkv.weight", lambda t: torch.cat((t[32:64], t[:32], t[64:]))),
    ),
    "taps reversed": (DELTA, edited(f"{LINEAR}.conv1d.weight", lambda t: t.flip(-1))),
    "A_log of the next head": (DELTA, edited(f"{LINEAR}.A_log", lambda t: t.roll(1))),
    "dt_bias of the next head": (DELTA, edited(f"{LINEAR}.dt_bias", lambda t: t.roll(1))),
    "norm around one": (f"{DELTA}.norm", edited(f"{LINEAR}.norm.weight", lambda t: t - 1)),
    "heads of another order": (
        f"{ATTENTION}.o_proj",
        edited(f"{FULL}.o_proj.weight", lambda t: t.roll(32, 1)),
    ),
    "a transposed square": (
        f"{ATTENTION}.k_proj",
        edited(f"{FULL}.k_proj.weight", lambda t: t.t()),
    ),
    "router's rows one off": (
        "layers.1.mlp.gate",
        edited(f"{PREFIX}.1.mlp.gate.weight", lambda t: t.roll(1, 0)),
    ),
    "halves of fc": ("mtp.fc", edited("mtp.fc.weight", lambda t: t.roll(64, 1))),
    "one row of the head": (
        "lm_head",
        edited("lm_head.weight", lambda t: torch.cat((t[1:], t[:1]))),
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_a_wrong_tensor_is_placed(name: str, folder: Path, tmp_path: Path) -> None:
    node, edit = WRONG_TENSORS[name]
    write(tmp_path, *MEMBERS["moe"][:2], seed=7, **SIZES)
    edit_tensors(tmp_path, edit)
    assert_placed(diff(folder, IDS[:20], candidate=tmp_path, decode=2), node)


# --- what is whole passes

LENGTHS = (2, 5, 63, 64, 65, 70, 130)


def assert_passes(report: Report) -> None:
    assert report.passed, failing(report)[:3]
    assert report.rows


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("seed", range(10))
def test_the_reference_passes(seed: int, member: str, members: Any) -> None:
    """Ten seeds; over them all lengths, both modes, oracles and dtypes take their turns."""
    ids = random_ids(LENGTHS[(seed + len(member)) % len(LENGTHS)], seed)
    assert_passes(
        diff(
            members(member, seed),
            ids,
            dtype=DTYPES[seed // 2 % 2],
            mode="local" if seed % 2 else "free",
            decode=seed % 7 if seed > 6 else 1,
            oracle_dtype=torch.float64 if seed % 3 == 0 else torch.float32,
        )
    )


def test_one_token(members: Any) -> None:
    assert_passes(diff(members("moe", 0), [3]))


def test_one_token_free(members: Any) -> None:
    assert_passes(diff(members("moe", 0), [3], mode="free"))


@pytest.mark.parametrize("mode", ["local", "free"])
def test_the_embedded_model_passes(mode: Any) -> None:
    ids = torch.randint(2000, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    report = diff(TINY, ids, mode=mode, decode=1, stages=lambda s: s in ("layers.0", "layers.3"))
    assert_passes(report)


def wider(dtype: torch.dtype) -> Any:
    """A node that computes all inside in `dtype` and rounds what it returns once, its state too."""

    def cast(value: Any, kind: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return value.to(kind) if value.is_floating_point() else value
        return value

    class Wider:
        @classmethod
        def from_reference(cls, module: nn.Module) -> nn.Module:
            fresh = copy.deepcopy(module).to(dtype)
            healthy = fresh.forward

            @wraps(healthy)
            def forward(*arguments: Any) -> Any:
                inside = [cast(a, dtype) for a in arguments]
                states = [i for i, a in enumerate(arguments) if is_dataclass(a)]
                for i in states:
                    inside[i] = copy.copy(arguments[i])
                    for f in fields(inside[i]):
                        setattr(inside[i], f.name, cast(getattr(inside[i], f.name), dtype))
                out = healthy(*inside)
                for i in states:
                    for f in fields(inside[i]):
                        held, new = getattr(arguments[i], f.name), getattr(inside[i], f.name)
                        kind = held.dtype if isinstance(held, Tensor) else dtype
                        setattr(arguments[i], f.name, cast(new, kind))
                if isinstance(out, tuple):
                    return out[0], out[1].float()
                return cast(out, arguments[0].dtype)

            fresh.forward = forward
            return fresh

    return Wider


WIDER = [
    "layers.0", "layers.1", "mtp", "*.linear_attn", "*.self_attn", "*layernorm", "*_proj", "*.mlp",
    "lm_head", "norm", "*.gate", "*.experts", "*.shared_expert", "*.shared_expert_gate", "*.k_norm",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WIDER)))
def test_a_better_node_passes(number: int, members: Any) -> None:
    """Fewer roundings than the yardstick: other errors, none larger."""
    member = "moe" if number % 2 else "next"
    inside = torch.float64 if number % 3 else torch.float32
    ids = random_ids(LENGTHS[number % len(LENGTHS)], number)
    swaps = [(WIDER[number], wider(inside))]
    folder = members(member, number % 10)
    report = diff(folder, ids, swaps=swaps, dtype=torch.bfloat16, decode=1)
    assert_passes(report)
    assert any(row.x_bf16 < 1 for row in report.rows if row.bf16)


FREE = [("dense", 0, "*.linear_attn"), ("dense", 1, "layers.0")] + [
    (member, seed, pattern)
    for seed, pattern in enumerate(
        [
            "layers.0",
            "layers.1",
            "mtp",
            "*.linear_attn",
            "*.self_attn",
            "*.mlp",
            "*.experts",
            "*.gate",
        ]
    )
    for member in ("moe", "next")
]


@pytest.mark.parametrize(("member", "seed", "pattern"), FREE)
def test_a_better_node_passes_free(member: str, seed: int, pattern: str, members: Any) -> None:
    """Its errors go on, other ones than the yardstick's, and flip experts: a verdict all the same."""
    swaps = [(pattern, wider(torch.float64))]
    ids = random_ids((9, 30, 70, 130)[seed % 4], seed)
    report = diff(members(member, seed), ids, swaps=swaps, dtype=torch.bfloat16, mode="free")
    assert_passes(report)
    assert any(row.max_abs != row.bf16 for row in report.rows)


@pytest.mark.parametrize("name", list(FAULTS)[::3])
def test_a_fault_is_seen_free(name: str, folder: Path) -> None:
    """Not placed: it goes on. But the node is among those that fail."""
    node, forward = FAULTS[name]
    swaps = [(node, standing_in(forward))]
    report = diff(folder, IDS, swaps=swaps, dtype=torch.bfloat16, mode="free")
    assert node in {row.node for row in failing(report)}


# --- other candidates


def test_a_built_model(folder: Path) -> None:
    """The same rows as the folder that it was built from, and its faults are placed."""
    model = load(folder, dtype=torch.bfloat16)
    assert diff(folder, IDS[:9], candidate=model) == diff(folder, IDS[:9], dtype=torch.bfloat16)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.roll(1, 0), requires_grad=False)
    assert_placed(diff(folder, IDS[:9], candidate=model), "lm_head")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 96}, ["hidden_size", "64", "96"]),
        ({"vocab_size": 192}, ["vocab_size", "160", "192"]),
        ({"num_experts": 16}, ["num_experts", "12", "16"]),
        ({"num_hidden_layers": 4}, ["num_hidden_layers", "2", "4"]),
        pytest.param(
            {"num_key_value_heads": 4},
            ["num_key_value_heads", "2", "4"],
        ),
        pytest.param(
            {"linear_num_value_heads": 4},
            ["linear_num_value_heads", "8", "4"],
        ),
    ],
)
def test_other_shapes(
    changes: dict[str, int], words: list[str], folder: Path, tmp_path: Path
) -> None:
    write(tmp_path, *MEMBERS["moe"][:2], **SIZES | changes)
    with pytest.raises(InputError) as caught:
        diff(folder, IDS[:9], candidate=tmp_path)
    assert_names(caught, words)


def test_a_candidate_without_mtp(folder: Path, tmp_path: Path) -> None:
    """A difference of shape as any other."""
    write(tmp_path, "397B-A17B", Dialect(mtp=False), seed=7, **SIZES)
    with pytest.raises(InputError, match="mtp"):
        diff(folder, IDS[:9], candidate=tmp_path)


def test_mxfp4_differs_in_its_experts(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mxfp4"
    convert(folder, target, Options("mxfp4"))
    report = diff(folder, IDS, candidate=target)
    nodes = {row.node for row in failing(report)}
    blocks = {"layers.0.mlp.experts", "layers.1.mlp.experts"}
    assert blocks <= nodes
    assert all(any(block.startswith(node) for block in blocks) for node in nodes), nodes
    assert report.rows[0].node in blocks


def test_a_trace(folder: Path) -> None:
    """One pass, compared free; a node is told by its name. A part of a trace gives a part of the rows."""
    report = diff(folder, IDS, candidate=trace(load(folder, dtype=torch.float32), IDS))
    assert_passes(report)
    assert report.tokens.compared == report.tokens.equal == len(IDS)
    taken = trace(load(folder, dtype=torch.bfloat16), IDS)
    report = diff(folder, IDS, candidate=taken)
    assert_passes(report)
    assert {row.phase for row in report.rows} == {"prefill"}
    taken["layers.1.self_attn"] = taken["layers.1.self_attn"] + 1
    rows = failing(diff(folder, IDS, candidate=taken))
    assert [row.node for row in rows] == ["layers.1.self_attn"]
    part = {name: output for name, output in taken.items() if name.endswith("input_layernorm")}
    assert len(diff(folder, IDS, candidate=part).rows) == len(part)


def test_a_trace_of_nothing(folder: Path) -> None:
    with pytest.raises(InputError):
        diff(folder, IDS[:9], candidate={"layers.O": torch.zeros(1)})


def test_a_trace_with_experts_that_are_not_there(folder: Path) -> None:
    taken = trace(load(folder, dtype=torch.bfloat16), IDS[:9])
    wrong = taken["layers.1.mlp.gate.0"].clone()
    wrong[3, 1] = 12
    taken["layers.1.mlp.gate.0"] = wrong
    with pytest.raises(InputError) as caught:
        diff(folder, IDS[:9], candidate=taken)
    assert_names(caught, ["layers.1.mlp.gate", "12"])


def test_what_has_no_counterpart_is_told(folder: Path) -> None:
    """A node that stands for several hides those inside."""

    class Fused(nn.Module):
        @classmethod
        def from_reference(cls, module: nn.Module) -> nn.Module:
            fresh = cls()
            fresh.held = [module]  # in a list: no child
            return fresh

        def forward(self, x: Tensor) -> Tensor:
            return self.held[0](x)

    report = diff(folder, IDS[:9], swaps=[("layers.1.mlp", Fused)])
    assert_passes(report)
    assert "layers.1.mlp.gate" in report.unmatched
    assert all(node.startswith("layers.1.mlp.") for node in report.unmatched)
    assert "layers.1.mlp" in {row.node for row in report.rows}
    assert not diff(folder, IDS[:9]).unmatched


def test_a_trace_of_other_ids(folder: Path) -> None:
    """Too short: another shape is a failing row, or refused."""
    taken = trace(load(folder, dtype=torch.bfloat16), IDS[:9])
    assert not diff(folder, IDS[:12], candidate=taken).passed


def test_chosen_stages(folder: Path) -> None:
    """Rows of these alone, equal to those of the whole run; none chosen is refused."""
    node, forward = FAULTS["decay_after_the_read"]
    swaps = [(node, standing_in(forward))]
    for mode in ("local", "free"):
        whole = diff(folder, IDS[:20], swaps=swaps, mode=mode)
        part = diff(
            folder, IDS[:20], swaps=swaps, mode=mode, stages=["layers.1", "norm"].__contains__
        )
        wanted = [r for r in whole.rows if r.node.startswith("layers.1") or r.node == "norm"]
        by_key = lambda row: (row.node, row.tensor, row.phase)  # noqa: E731
        assert sorted(part.rows, key=by_key) == sorted(wanted, key=by_key)
    with pytest.raises(InputError) as caught:
        diff(folder, IDS[:20], stages=lambda stage: False)
    assert_names(caught, ["layers.1", "lm_head", "mtp"])


@pytest.mark.parametrize(
    ("ids", "words"), [([], ["empty"]), ([5, 160], ["160", "159"]), ([-1], ["-1"])]
)
def test_bad_ids(ids: list[int], words: list[str], folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        diff(folder, ids)
    assert_names(caught, words)


# --- what a row says


def with_element(place: Sequence[int], value: float) -> Forward:
    """A node whose output has one wrong element in passes that are long enough."""

    def forward(self: nn.Module, *arguments: Any) -> Tensor:
        out = type(self).forward(self, *arguments).clone()
        if out.shape[1] > place[1]:
            out[tuple(place)] = value
        return out

    return forward


def test_the_worst_element(folder: Path) -> None:
    swaps = [("lm_head", standing_in(with_element((0, 7, 42), 1000.0)))]
    report = diff(folder, IDS[:20], swaps=swaps)
    row = row_of(report, "lm_head")
    assert report.rows[0] is row and row.worst == [0, 7, 42]
    assert row.shape == [1, 14, VOCABULARY]
    assert 990 < row.max_abs < 1010 and row.rel_rms > 1
    assert row.x_bf16 == pytest.approx(row.max_abs / max(row.bf16, row.floor))
    assert row_of(report, "lm_head", phase="decode").passed


def test_nan_is_counted(folder: Path) -> None:
    """In finite numbers, as JSON wants them."""
    swaps = [("layers.1.input_layernorm", standing_in(with_element((0, 3, 5), math.nan)))]
    report = diff(folder, IDS[:20], swaps=swaps)
    row = row_of(report, "layers.1.input_layernorm")
    assert report.rows[0] is row
    assert row.nonfinite == 1
    assert row.worst == [0, 3, 5] and row.max_abs == row.x_bf16 == MOST
    assert math.isfinite(row.rel_rms)


def test_histograms_count_every_element(folder: Path) -> None:
    """Over all passes of a phase; tokens that were left out are not in it."""
    for mode in ("local", "free"):
        report = diff(folder, IDS, mode=mode)
        lengths = {"prefill": 69, "decode": 6}
        for node, width in {
            "embed_tokens": 64,
            "lm_head": VOCABULARY,
            f"{DELTA}.in_proj_b": 8,
        }.items():
            for phase, tokens in lengths.items():
                assert sum(row_of(report, node, phase=phase).histogram) == tokens * width
        for phase, tokens in lengths.items():
            row = row_of(report, "layers.0.mlp.gate", phase=phase)
            assert sum(row.histogram) == (tokens - row.unsure) * SIZES["num_experts"]
        assert sum(row_of(report, "mtp").histogram) == 69 * 64 - 64 * row_of(report, "mtp").unsure


def test_a_router_that_chooses_others(folder: Path) -> None:
    """Flips and how sure the oracle was, from weights that say so."""
    _, forward = FAULTS["router_of_the_next_experts"]
    report = diff(folder, IDS, swaps=[("layers.1.mlp.gate", standing_in(forward))])
    row = row_of(report, "layers.1.mlp.gate")
    assert row.flips > 60 and 0.01 < row.margin < 1
    assert row_of(report, "layers.0.mlp.gate").margin < 0.01


def test_experts_that_rounding_may_flip(tmp_path: Path) -> None:
    """Two experts almost alike: which of them is chosen last is left open; elsewhere it is not."""
    write(tmp_path, *MEMBERS["moe"][:2], seed=7, **SIZES)
    name = f"{PREFIX}.0.mlp.gate.weight"
    step = torch.zeros(64).index_fill_(0, torch.tensor([5]), 2.0**-12)
    edit_tensors(tmp_path, lambda tensors: tensors[name][4].copy_(tensors[name][3].float() + step))

    def other(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        """Takes expert 4 for 3 where 3 is the last one chosen and 4 is not chosen, and back."""
        experts, weights = Router.forward(self, x)
        for one, two in ((3, 4), (4, 3)):
            last = (experts[:, -1] == one) & ~(experts == two).any(-1)
            if last.any():
                experts = experts.clone()
                experts[last, -1] = two
                return experts, weights
        return experts, weights

    swaps = [("layers.0.mlp.gate", standing_in(other))]
    report = diff(tmp_path, IDS, swaps=swaps, stages="layers.0".__eq__)
    assert_passes(report)
    row = row_of(report, "layers.0.mlp.gate")
    assert 0 < row.flips <= row.unsure < 69
    within, around = row_of(report, "layers.0.mlp"), row_of(report, "layers.0")
    assert row.unsure == within.unsure <= around.unsure


def test_state_rows(folder: Path) -> None:
    """Of each mixer, where it is: local by phase, free at the end and by stage."""
    local, free = (diff(folder, IDS, mode=mode) for mode in ("local", "free"))
    for node, tensors in ((DELTA, ("conv", "recurrent")), (ATTENTION, ("k", "v"))):
        for tensor in tensors:
            for phase in ("prefill", "decode"):
                row_of(local, node, tensor, phase)
            row_of(free, ".".join(node.split(".")[:2]), tensor, "after all")
    assert row_of(local, DELTA, "recurrent").shape == [1, 8, 16, 24]
    assert row_of(local, DELTA, "conv").shape == [1, 3, 256]
    assert row_of(local, ATTENTION, "k", "decode").shape == [1, 2, 75, 32]
    assert row_of(local, "mtp.layers.0.self_attn", "v", "decode").shape == [1, 2, 74, 32]
    assert row_of(free, "mtp", "k", "after all").shape == [1, 2, 74, 32]
    assert {r.node for r in local.rows if r.tensor != "output"} == {
        DELTA, ATTENTION, "mtp.layers.0.self_attn"
    }  # fmt: skip


def test_tokens(folder: Path) -> None:
    """A head that favours one token: where this first shows, and what it cost in the oracle's logits."""

    def biased(self: nn.Module, x: Tensor) -> Tensor:
        out = type(self).forward(self, x)
        return torch.cat((out[..., :9], out[..., 9:10] + 1.5, out[..., 10:]), -1)

    free = {"dtype": torch.float32, "mode": "free"}
    report = diff(folder, IDS, swaps=[("lm_head", standing_in(biased))], **free)
    model = load(folder, dtype=torch.float32)
    logits = trace(model, IDS, "lm_head")["lm_head"][0]
    best, at = logits.max(-1)
    other = ((logits[:, 9] + 1.5 > best) & (at != 9)).nonzero().flatten()
    assert report.tokens.compared == len(IDS)
    assert report.tokens.equal == len(IDS) - len(other)
    assert report.tokens.first == other[0]
    gap = best[other[0]] - logits[other[0], 9]
    assert report.tokens.margin == pytest.approx(gap.item(), abs=1e-5)
    healthy = diff(folder, IDS, **free).tokens
    assert healthy.equal == len(IDS) and healthy.first is None and healthy.margin is None


def test_order_of_rows() -> None:
    """Failing first, the inner node before the one around it, then by how far; passing rows last."""
    zero = torch.zeros(1, 2, 4)
    exact = torch.ones(1, 2, 4)
    rough = exact + 0.01
    judge = Judge()
    sizes = {"a": 5.0, "a.b": 0.1, "a.b.c": 0.05, "ab": 0.2, "d": 0.015, "e": 0.0}
    for node, size in sizes.items():
        judge.add(node, "output", "prefill", [exact, rough, exact + size])
    judge.add("zeros", "output", "prefill", [zero, zero, zero])
    judge.add("shape", "output", "prefill", [exact, rough, exact[:, :1]])
    rows = judge.report().rows
    assert [row.node for row in rows] == ["shape", "ab", "a.b.c", "a", "a.b", "d", "e", "zeros"]
    assert [row.passed for row in rows] == 5 * [False] + 3 * [True]


@pytest.mark.parametrize("tokens", [1, 2, 5, 63, 64, 65, 70, 130, 198, 1000])
@pytest.mark.parametrize("decode", [0, 1, 4, 5, 6])
def test_passes_take_each_token_once(tokens: int, decode: int) -> None:
    """In order; prefill starts on the grid, decode takes at most four."""
    plan = passes(tokens, min(decode, tokens - 1))
    assert [t for _, first, end in plan for t in range(first, end)] == list(range(tokens))
    for phase, first, end in plan:
        assert first % 64 == 0 if phase == "prefill" else end - first <= 4


# --- memory


@pytest.mark.parametrize("mode", ["local", "free"])
def test_one_stage_of_each_side_is_alive(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve layers, three sides: never the weights of four stages, and none are left."""
    write(tmp_path, "27B", QWEN3_5, num_hidden_layers=12)
    alive: list[str] = []
    most = 0
    healthy = Loader.stage

    def stage(self: Loader, name: str) -> nn.Module:
        nonlocal most
        module = healthy(self, name)
        alive.append(name)
        most = max(most, len(alive))
        weakref.finalize(next(module.parameters()), alive.remove, name)
        return module

    monkeypatch.setattr(Loader, "stage", stage)
    collects = gc.isenabled()
    gc.disable()  # what reference cycles keep alive counts
    try:
        assert_passes(diff(tmp_path, IDS[:6], mode=mode))
        assert most <= 3, most
        assert not alive
    finally:
        if collects:
            gc.enable()
