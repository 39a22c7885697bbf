"""The checks are checked: each planted fault must turn red, and red at the module that is broken.

A fault is a small wrong edit of the reference, as a slip of the hand would make it. `checks`
compares a MoE member with transformers, leaves first; on the healthy model it finds nothing, and
with a fault the first name it gives must be the module at fault (later ones contain it and may fail
too).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import reference.attention
import reference.deltanet
import reference.layer
import reference.mtp
import reference.rope
from qwen35.cache import DeltaState
from reference.attention import GatedAttention
from reference.layer import DecoderLayer
from reference.linear import GRID
from reference.model import Model
from reference.moe import MLP, GroupedExperts, Router
from reference.mtp import MTP
from reference.norm import RMSNorm, RMSNormGated
from tests.support.family import small_model
from tests.support.faults import delta_rule_with_late_decay
from tests.support.oracle import (
    COMPARISONS,
    Pairs,
    pair,
    relative,
    token_ids,
    within_twice,
)
from tests.support.oracle_mtp import OracleMTP, their_hidden, their_logits

MEMBER = "397B-A17B"
SEED = 7  # of the weights that `pair` gives to transformers
PROMPT = 130  # more than two chunks, then three cached tokens

pytestmark = pytest.mark.filterwarnings("ignore")


def compare_model(model: Model, theirs: Any) -> float:
    """The relative error of the whole trunk's logits."""
    ids = token_ids(PROMPT, model)
    return relative(model.lm_head(model(ids, model.new_cache())), their_logits(theirs, ids))


def compare_mtp(model: Model, theirs: Any) -> float:
    """The error of the MTP head over the trunk's states, and of one chained step."""
    healthy, _ = pair(MEMBER)
    oracle = OracleMTP(theirs, healthy)
    ids = token_ids(33, model)
    hidden, their_states = model(ids[:, :-1], model.new_cache()), their_hidden(theirs, ids[:, :-1])
    cache, their_cache = model.new_cache(), oracle.new_cache()
    first = model.draft(ids[:, 1:], hidden, cache)
    their_first = oracle(ids[:, 1:], their_states, their_cache)
    second = model.draft(ids[:, :1], first[:, -1:], cache)
    their_second = oracle(ids[:, :1], their_first[:, -1:], their_cache)
    return relative(torch.cat((first, second), 1), torch.cat((their_first, their_second), 1))


@cache
def truths(name: str) -> dict[float, dict[str, Tensor]]:
    """The float64 outputs of a module of transformers, by input scale. They are computed before any
    fault is planted, so that no fault reaches them."""
    wide = pair(MEMBER, torch.float64)
    return {
        scale: {what: truth for what, (_, truth) in COMPARISONS[name](*wide, PROMPT, scale).items()}
        for scale in (1.0, 0.01)
    }


@pytest.fixture(autouse=True)
def truths_before_faults(no_gradients: None) -> None:
    for name in COMPARISONS:
        truths(name)


def checks(model: Model) -> list[str]:
    """Names of the checks that fail, leaves first. One that breaks down has failed too.

    A module may err twice as much as transformers does in float32. The last two are end to end and carry
    the rounding of every layer, 2e-5 here; no fault below is that faint.
    """
    _, theirs = pair(MEMBER)

    def worst_module(name: str) -> float:
        """The error, as a share of the largest that is allowed."""
        found: list[float] = []
        for scale, truth in truths(name).items():
            rounded = COMPARISONS[name](model, theirs, PROMPT, scale)
            pairs = [within_twice(*rounded[what], truth[what]) for what in rounded]
            found += [error / most for error, most in pairs]
        return max(found, default=0.0)

    runs: list[tuple[str, Callable[[], float], float]] = [
        (name, lambda name=name: worst_module(name), 1.0) for name in COMPARISONS
    ]
    runs.append(("Model", lambda: compare_model(model, theirs), 1e-4))
    runs.append(("MTP", lambda: compare_mtp(model, theirs), 1e-4))
    failing = []
    for name, measure, most in runs:
        try:
            healthy = measure() <= most
        except (AssertionError, RuntimeError):
            healthy = False
        if not healthy:
            failing.append(name)
    return failing


# --- the faults. Each takes pytest's monkeypatch and the model, and breaks one thing.

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch, Model], None]
FAULTS: dict[str, tuple[str, Fault]] = {}


def fault(broken: str) -> Callable[[Fault], Fault]:
    """Register a fault; `broken` is the check that must be the first to fail."""

    def register(plant: Fault) -> Fault:
        FAULTS[plant.__name__] = (broken, plant)
        return plant

    return register


def replace_function(patch: Patch, name: str, wrong: Callable) -> None:
    """Replace a function in every module of the reference that uses it."""
    modules = (reference.attention, reference.deltanet, reference.layer, reference.rope)
    for module in modules:
        if hasattr(module, name):
            patch.setattr(module, name, wrong)


def replace_rules(patch: Patch, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Both delta rules, with their arguments changed on the way in."""
    for name in ("recurrent", "chunk"):
        healthy = getattr(reference.deltanet, name)

        def wrong(
            q: Tensor, k: Tensor, v: Tensor, healthy: Callable = healthy, **rest: Tensor
        ) -> tuple[Tensor, list[Tensor]]:
            changed = change({"q": q, "k": k, "v": v, **rest})
            return healthy(changed.pop("q"), changed.pop("k"), changed.pop("v"), **changed)

        patch.setattr(reference.deltanet, name, wrong)


def attention_layers(model: Model) -> list[GatedAttention]:
    return [layer.self_attn for layer in [*model.layers, *model.mtp.layers] if not layer.is_linear]


@fault("RMSNorm")
def norm_without_the_one(patch: Patch, model: Model) -> None:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    patch.setattr(RMSNorm, "forward", forward)


@fault("RMSNorm")
def norm_without_eps(patch: Patch, model: Model) -> None:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (1 + self.weight)

    patch.setattr(RMSNorm, "forward", forward)


@fault("RMSNormGated")
def plain_norm_with_a_one(patch: Patch, model: Model) -> None:
    healthy = RMSNormGated.forward

    def forward(self: RMSNormGated, x: Tensor, gate: Tensor) -> Tensor:
        return healthy(self, x, gate) * (1 + self.weight) / self.weight

    patch.setattr(RMSNormGated, "forward", forward)


@fault("RMSNormGated")
def gate_before_the_norm(patch: Patch, model: Model) -> None:
    def forward(self: RMSNormGated, x: Tensor, gate: Tensor) -> Tensor:
        gated = x * F.silu(gate)
        return self.weight * gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)

    patch.setattr(RMSNormGated, "forward", forward)


@fault("RMSNormGated")
def sigmoid_for_silu(patch: Patch, model: Model) -> None:
    for layer in model.layers:
        if layer.is_linear:
            layer.linear_attn.norm.gate_type = "sigmoid"


@fault("rope")
def interleaved_rope_pairs(patch: Patch, model: Model) -> None:
    def wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, passed = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
        even, odd = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
        return torch.cat((pairs.flatten(-2), passed), -1)

    replace_function(patch, "apply_rope", wrong)


@fault("rope")
def rope_turning_backwards(patch: Patch, model: Model) -> None:
    healthy = reference.rope.apply_rope
    replace_function(patch, "apply_rope", lambda x, cos, sin: healthy(x, cos, -sin))


@fault("rope")
def rope_on_all_channels(patch: Patch, model: Model) -> None:
    healthy, head_dim = reference.rope.rope_table, model.config.head_dim

    def wrong(positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> Any:
        return healthy(positions, head_dim, theta, dtype)

    replace_function(patch, "rope_table", wrong)


@fault("GatedAttention")
def positions_start_anew_each_pass(patch: Patch, model: Model) -> None:
    healthy = reference.rope.rope_table
    patch.setattr(reference.attention, "rope_table", lambda p, *rest: healthy(p - p[0], *rest))


@fault("MLP")
def gate_and_up_swapped(patch: Patch, model: Model) -> None:
    def forward(self: MLP, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))

    patch.setattr(MLP, "forward", forward)


@fault("Router")
def top_k_not_renormalised(patch: Patch, model: Model) -> None:
    for module in model.modules():
        if isinstance(module, Router):
            module.norm_topk_prob = False


@fault("Router")
def top_k_one_fewer(patch: Patch, model: Model) -> None:
    for module in model.modules():
        if isinstance(module, Router):
            module.top_k -= 1


@fault("Router")
def softmax_of_the_chosen_probabilities(patch: Patch, model: Model) -> None:
    healthy = Router.forward

    def forward(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        experts, weights = healthy(self, x)
        return experts, weights.softmax(-1)

    patch.setattr(Router, "forward", forward)


@fault("Experts")
def weights_in_the_order_of_the_experts(patch: Patch, model: Model) -> None:
    """The experts are sorted by index, but their weights are not."""
    healthy = GroupedExperts.forward

    def forward(self: GroupedExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return healthy(self, x, experts.sort(dim=-1).values, weights)

    patch.setattr(GroupedExperts, "forward", forward)


@fault("GatedAttention")
def gate_as_a_second_block(patch: Patch, model: Model) -> None:
    """[all queries | all gates] taken for [query, gate] of each head."""
    for attention in attention_layers(model):
        heads = model.config.num_attention_heads
        healthy = attention.q_proj.forward

        def wrong(x: Tensor, healthy: Callable = healthy, heads: int = heads) -> Tensor:
            halves = healthy(x).unflatten(-1, (2, heads, -1))  # half, head, channel
            return halves.transpose(-3, -2).flatten(-3)

        patch.setattr(attention.q_proj, "forward", wrong)


@fault("GatedAttention")
def no_query_and_key_norm(patch: Patch, model: Model) -> None:
    for attention in attention_layers(model):
        attention.q_norm, attention.k_norm = torch.nn.Identity(), torch.nn.Identity()


@fault("GatedAttention")
def scores_not_scaled(patch: Patch, model: Model) -> None:
    healthy = reference.attention.causal_attention
    root = model.config.head_dim**0.5
    patch.setattr(reference.attention, "causal_attention", lambda q, k, v: healthy(q * root, k, v))


@fault("GatedAttention")
def query_heads_tiled_over_kv_heads(patch: Patch, model: Model) -> None:
    healthy = reference.attention.causal_attention

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = k.shape[1]
        tiled = q.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
        out = healthy(tiled, k, v)
        return out.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    patch.setattr(reference.attention, "causal_attention", wrong)


@fault("GatedDeltaNet")
def decay_after_the_read(patch: Patch, model: Model) -> None:
    wrong = delta_rule_with_late_decay
    patch.setattr(reference.deltanet, "recurrent", wrong)
    patch.setattr(reference.deltanet, "chunk", wrong)


@fault("GatedDeltaNet")
def value_heads_tiled(patch: Patch, model: Model) -> None:
    """Value head h reads key head h mod H, not h // (HV / H)."""
    shared = model.config.linear_num_value_heads // model.config.linear_num_key_heads

    def change(a: dict[str, Tensor]) -> dict[str, Tensor]:
        tiled = {name: a[name][:, :, ::shared].repeat(1, 1, shared, 1) for name in ("q", "k")}
        return a | tiled

    replace_rules(patch, change)


@fault("GatedDeltaNet")
def beta_without_sigmoid(patch: Patch, model: Model) -> None:
    replace_rules(patch, lambda a: a | {"beta": a["beta"].logit()})


@fault("GatedDeltaNet")
def query_not_scaled(patch: Patch, model: Model) -> None:
    root = model.config.linear_key_head_dim**0.5
    replace_rules(patch, lambda a: a | {"q": a["q"] * root})


@fault("GatedDeltaNet")
def state_not_carried_across_a_chunk(patch: Patch, model: Model) -> None:
    healthy = reference.deltanet.chunk

    def wrong(
        q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        outputs, states = [], []
        for first in range(0, q.shape[1], GRID):
            cut = [x[:, first : first + GRID] for x in (q, k, v, g, beta)]
            read, after = healthy(*cut[:3], g=cut[3], beta=cut[4], state=torch.zeros_like(state))
            outputs.append(read)
            states += after
        return torch.cat(outputs, 1), states

    patch.setattr(reference.deltanet, "chunk", wrong)


@fault("GatedDeltaNet")
def recurrent_state_in_bfloat16(patch: Patch, model: Model) -> None:
    replace_rules(patch, lambda a: a | {"state": a["state"].bfloat16().to(a["state"].dtype)})


@fault("GatedDeltaNet")
def convolution_state_forgotten(patch: Patch, model: Model) -> None:
    healthy = DeltaState.advance

    def wrong(self: DeltaState, columns: Tensor, states: list[Tensor]) -> None:
        healthy(self, columns, states)
        self.conv = torch.zeros_like(self.conv)

    patch.setattr(DeltaState, "advance", wrong)


@fault("GatedDeltaNet")
def convolution_taps_reversed(patch: Patch, model: Model) -> None:
    healthy = reference.deltanet.causal_conv1d
    patch.setattr(
        reference.deltanet,
        "causal_conv1d",
        lambda columns, weight: healthy(columns, weight.flip(-1)),
    )


@fault("GatedDeltaNet")
def l2norm_of_the_mean(patch: Patch, model: Model) -> None:
    def wrong(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * x.shape[-1] ** -0.5

    patch.setattr(reference.deltanet, "l2norm", wrong)


@fault("SparseMoeBlock")
def no_shared_expert_gate(patch: Patch, model: Model) -> None:
    for name, module in model.named_modules():
        if name.endswith("shared_expert_gate"):
            patch.setattr(module, "forward", lambda x: x.new_full((*x.shape[:-1], 1), 100.0))


@fault("DecoderLayer")
def residual_of_the_normed_input(patch: Patch, model: Model) -> None:
    healthy = DecoderLayer.forward

    def forward(self: DecoderLayer, x: Tensor, state: Any) -> Tensor:
        return healthy(self, x, state) - x + self.input_layernorm(x)

    patch.setattr(DecoderLayer, "forward", forward)


@fault("Model")
def two_layers_exchanged(patch: Patch, model: Model) -> None:
    """Each layer is right, but their order is not."""
    model.layers[4], model.layers[5] = model.layers[5], model.layers[4]
    for name in COMPARISONS:  # the modules are looked up by layer, so the exchange shows there too
        patch.setitem(COMPARISONS, name, lambda *_: {})


@fault("MTP")
def mtp_halves_swapped(patch: Patch, model: Model) -> None:
    healthy = model.mtp.fc.forward
    patch.setattr(model.mtp.fc, "forward", lambda x: healthy(torch.cat(x.chunk(2, -1)[::-1], -1)))


@fault("MTP")
def mtp_fed_with_the_hidden_before_the_norm(patch: Patch, model: Model) -> None:
    """The trunk hands out its state before the final norm, and the head norms it for the logits."""
    norm, head = model.norm.forward, model.lm_head.forward
    patch.setattr(model.norm, "forward", lambda x: norm(x) if outside else x)
    patch.setattr(model.lm_head, "forward", lambda x: head(norm(x)))
    outside: list[str] = []  # the norm's own check calls it directly and must find it whole
    compare = COMPARISONS["RMSNorm"]

    def compare_norms(*arguments: Any) -> Pairs:
        outside.append("in the norm's check")
        try:
            return compare(*arguments)
        finally:
            outside.clear()

    patch.setitem(COMPARISONS, "RMSNorm", compare_norms)


@fault("MTP")
def mtp_without_its_own_norm(patch: Patch, model: Model) -> None:
    patch.setattr(model.mtp.norm, "forward", lambda x: x)


@fault("MTP")
def mtp_norms_exchanged(patch: Patch, model: Model) -> None:
    mtp: MTP = model.mtp
    embedding, hidden = mtp.pre_fc_norm_embedding, mtp.pre_fc_norm_hidden
    mtp.pre_fc_norm_embedding, mtp.pre_fc_norm_hidden = hidden, embedding


# --- the tests


def test_the_healthy_model_passes() -> None:
    assert checks(small_model(MEMBER, seed=SEED)) == []


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, plant = FAULTS[name]
    model = small_model(MEMBER, seed=SEED)
    plant(monkeypatch, model)
    failing = checks(model)
    assert failing, "nobody noticed"
    assert failing[0] == broken, failing


def test_faults_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks pass again after a fault is taken out, so the order of the tests does not matter."""
    with monkeypatch.context() as patch:
        for plant in (norm_without_the_one, decay_after_the_read, rope_on_all_channels):
            plant(patch, small_model(MEMBER, seed=SEED))
        assert checks(small_model(MEMBER, seed=SEED))
    assert checks(small_model(MEMBER, seed=SEED)) == []
