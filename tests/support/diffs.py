"""Helpers of the tests of `diff`: checkpoints, and forward functions that are slightly wrong."""

import copy
from collections.abc import Callable
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
from qwen35.compare.judge import Report, Row
from reference.attention import GatedAttention
from reference.deltanet import GatedDeltaNet
from reference.layer import DecoderLayer
from reference.moe import MLP, Experts, Router, SparseMoeBlock
from reference.mtp import MTP
from reference.norm import RMSNorm, RMSNormGated
from tests.support.checkpoints import QWEN3_5, QWEN3_NEXT, Dialect, write
from tests.support.faults import delta_rule_with_late_decay

LAYERS = {"num_hidden_layers": 2, "full_attention_interval": 2}  # a delta net, then attention
SIZES = LAYERS | {"num_experts": 12, "num_experts_per_tok": 3}

MEMBERS: dict[str, tuple[str, Dialect, dict[str, int]]] = {
    "moe": ("397B-A17B", QWEN3_5, SIZES),
    "dense": ("27B", QWEN3_5, LAYERS),
    "next": ("Qwen3-Next", QWEN3_NEXT, SIZES),
}

VOCABULARY = 160
DELTA, ATTENTION = "layers.0.linear_attn", "layers.1.self_attn"


def random_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


IDS = random_ids(75)  # prefill passes of 64 and 5 tokens, then decode passes of 1, 1 and 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that faults are planted in."""
    made = tmp_path_factory.mktemp("moe")
    member, dialect, sizes = MEMBERS["moe"]
    write(made, member, dialect, seed=7, **sizes)
    return made


def failing(report: Report) -> list[Row]:
    return [row for row in report.rows if not row.passed]


Forward = Callable[..., Any]
FAULTS: dict[str, tuple[str, Forward]] = {}


def standing_in(forward: Forward) -> Any:
    """A replacement class for nodes. It keeps class, weights and signature, but computes
    `forward`."""

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
    """A decorator that registers a fault of this node in FAULTS."""

    def register(forward: Forward) -> Forward:
        FAULTS[forward.__name__] = (node, forward)
        return forward

    return register


def with_rules(
    self: GatedDeltaNet, x: Tensor, state: DeltaState, change: Callable[[dict], dict]
) -> Tensor:
    """The delta net's forward, with changed arguments of its two delta rules."""

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


@fault(ATTENTION)
def positions_start_anew_each_pass(self: GatedAttention, x: Tensor, cache: KVCache) -> Tensor:
    healthy = reference.attention.rope_table
    return with_attention(self, x, cache, rope_table=lambda p, *rest: healthy(p - p[0], *rest))


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
    """The output is right, but the convolution state after it is wrong."""
    out = GatedDeltaNet.forward(self, x, state)
    state.conv = torch.zeros_like(state.conv)
    return out


@fault(DELTA)
def values_and_gates_exchanged(self: GatedDeltaNet, x: Tensor, state: DeltaState) -> Tensor:
    """z is taken from the convolution, and v from in_proj_z."""
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


BY_PHASE = {  # faults that do not show in the first pass
    "positions_start_anew_each_pass", "recurrent_state_not_carried",
    "convolution_state_not_carried", "mtp_keys_not_carried",
}  # fmt: skip


def assert_placed(report: Report, node: str) -> None:
    """Assert that the node is the first row, and that only it and nodes that contain it fail."""
    assert not report.passed
    others = {row.node for row in failing(report)}
    assert report.rows[0].node == node, (report.rows[0], others)
    assert all(node == other or node.startswith(f"{other}.") for other in others), others


IN_BOTH = [(name, torch.bfloat16) for name in FAULTS] + [
    (name, torch.float32) for name in list(FAULTS)[::3]
]


def top_k_one_fewer(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    fewer = copy.copy(self)
    fewer.top_k -= 1
    return Router.forward(fewer, x)


def scale_embedding(tensors: dict[str, Tensor]) -> None:
    tensors["model.language_model.embed_tokens.weight"] *= 0.01


PREFIX = "model.language_model.layers"


def assert_passes(report: Report) -> None:
    assert report.passed, failing(report)[:3]
    assert report.rows
