"""The tensor-parallel plan: what the ranks compute adds up to the whole, and nothing is held twice or by
nobody. Modules of a rank are the reference's own, with `Plan.rank_config` and the plan's cuts; sums
over ranks are another order of summation, so float64 must agree to rounding.
"""

import functools
import gc
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weights.shard
from qwen35.cache import Cache
from qwen35.config import PUBLISHED, Config
from reference.model import Model
from tests.support.family import FAMILY, SHARED, randomise
from tests.support.oracle import EXACT, relative, token_ids
from tests.support.shards import noise
from weights.checkpoint import _ungroup
from weights.shard import KEYS, TABLE, VALUES, Plan, Section, Shard

STEPS = (65, 1, 3)  # a prompt of more than one chunk, then cached decode passes


KINDS = ["linear_attention", "full_attention"]


# Shapes that eight ranks divide: K != V, I != shared I, every ratio of heads that the family has.
WIDE: dict[str, dict[str, Any]] = {
    "sparse, ratio 4": SHARED
    | {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 2,
        "layer_types": KINDS,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "dense and sparse, ratio 2": SHARED
    | {
        "model_type": "qwen3_next",
        "num_hidden_layers": 2,
        "layer_types": KINDS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
        "intermediate_size": 96,
    },
    "dense, ratio 3": SHARED
    | {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 2,
        "layer_types": KINDS,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 24,
        "intermediate_size": 96,
    },
    "dense, tied, ratio 1": SHARED
    | {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 2,
        "layer_types": KINDS,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
        "intermediate_size": 80,
        "tie_word_embeddings": True,
    },
}


CASES = [(name, size) for name in WIDE for size in (1, 2, 4, 8)] + [
    ("397B-A17B", 2), ("Qwen3-Next", 2), ("27B", 2), ("0.8B", 4), ("4B", 4),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@functools.cache
def whole_model(name: str) -> Model:
    """The whole model in float64. Nobody alters it."""
    model = Model(Config.from_dict((WIDE | FAMILY)[name]))
    randomise(model, seed=5)
    return model.double().eval().requires_grad_(False)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters, a tied one under both of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def rank_model(whole: Model, plan: Plan, rank: int) -> Model:
    """The reference with one rank's sizes and weights."""
    with torch.device("meta"):
        model = Model(plan.rank_config())
    own = {n: plan.shard(n, t.shape, rank).cut(t) for n, t in stored(whole).items()}
    model.load_state_dict(own, assign=True)
    return model.eval().requires_grad_(False)


# --- the ranks' contributions add up


def contributions(model: Model) -> dict[str, Tensor]:
    """The outputs of each module that is cut, for the same random input: prefill and decode passes
    of every mixer, every feed-forward and its two parts, in the trunk and in the MTP head."""
    D = model.config.hidden_size
    passes = [noise(2, T, D, seed=T) for T in STEPS]
    cache = model.new_cache(batch=2)
    blocks = [(f"layers.{i}", layer, cache.layers[i]) for i, layer in enumerate(model.layers)]
    assert model.mtp is not None and cache.mtp is not None
    blocks.append(("mtp.layers.0", model.mtp.layers[0], cache.mtp))
    found = {}
    for name, layer, state in blocks:
        kind = "linear_attn" if layer.is_linear else "self_attn"
        mixer = layer.get_submodule(kind)
        found[f"{name}.{kind}"] = torch.cat([mixer(x, state) for x in passes], dim=1)
        found[f"{name}.mlp"] = torch.cat([layer.mlp(x) for x in passes], dim=1)
        if hasattr(layer.mlp, "experts"):
            rows = passes[0].flatten(0, 1)
            found[f"{name}.mlp.experts"] = layer.mlp.experts(rows, *layer.mlp.gate(rows))
            found[f"{name}.mlp.shared_expert"] = layer.mlp.shared_expert(rows)
    return found


def red(whole: Model, plan: Plan) -> dict[str, float]:
    """The modules whose ranks do not add up to the whole, and by how much, relative."""
    ranks = [contributions(rank_model(whole, plan, r)) for r in range(plan.size)]
    errors = {
        name: relative(sum((rank[name] for rank in ranks), torch.zeros_like(truth)), truth)
        for name, truth in contributions(whole).items()
    }
    return {name: error for name, error in errors.items() if error > EXACT}


@pytest.mark.parametrize(("name", "size"), CASES)
def test_the_sum_over_ranks_is_the_whole(name: str, size: int) -> None:
    whole = whole_model(name)
    assert not red(whole, Plan(whole.config, size))


def test_each_kind_of_module_is_summed() -> None:
    """The test above sees all of them."""
    seen = {re.sub(r"\d+", "N", m) for name in WIDE for m in contributions(whole_model(name))}
    kinds = ["self_attn", "mlp", "mlp.experts", "mlp.shared_expert"]
    expected = {f"{layer}.{kind}" for layer in ("layers.N", "mtp.layers.N") for kind in kinds}
    assert seen == expected | {"layers.N.linear_attn"}


def embedded(ranks: list[Model], plan: Plan, ids: Tensor) -> Tensor:
    """Each rank looks up the rows that it has; the others count as zero."""
    shape = (plan.config.vocab_size, plan.config.hidden_size)
    total = torch.zeros(*ids.shape, shape[1], dtype=torch.float64)
    for rank, model in enumerate(ranks):
        shard = plan.shard("embed_tokens.weight", shape, rank)
        ((first, end),) = shard.ranges or ((0, shape[0]),)
        held = (ids >= first) & (ids < end)
        rows = model.embed_tokens((ids - first).where(held, 0))
        total += rows * held[..., None]
    return total


def layer_sum(layers: list[Any], states: list[Any], x: Tensor) -> Tensor:
    """One decoder layer: two sums over ranks."""

    def mixed(layer: Any, state: Any) -> Tensor:
        mixer = layer.linear_attn if layer.is_linear else layer.self_attn
        return mixer(layer.input_layernorm(x), state)

    after = x + torch.stack(list(map(mixed, layers, states))).sum(0)
    parts = [layer.mlp(layer.post_attention_layernorm(after)) for layer in layers]
    return after + torch.stack(parts).sum(0)


def group_pass(
    ranks: list[Model], plan: Plan, ids: Tensor, next_ids: Tensor, caches: list[Cache]
) -> tuple[Tensor, Tensor]:
    """The whole model as a group runs it: logits of the trunk and of one MTP pass behind it."""
    hidden = embedded(ranks, plan, ids)
    for i in range(len(ranks[0].layers)):
        states = [cache.layers[i] for cache in caches]
        hidden = layer_sum([model.layers[i] for model in ranks], states, hidden)
    normed = [model.norm(hidden) for model in ranks]
    logits = torch.cat([m.lm_head(x) for m, x in zip(ranks, normed, strict=True)], dim=-1)
    heads: list[Any] = [model.mtp for model in ranks]
    embeds = embedded(ranks, plan, next_ids)
    both = torch.cat(
        (heads[-1].pre_fc_norm_embedding(embeds), heads[-1].pre_fc_norm_hidden(normed[-1])), -1
    )
    states = [cache.mtp for cache in caches]
    drafted = layer_sum([head.layers[0] for head in heads], states, heads[0].fc(both))
    drafts = [m.lm_head(h.norm(drafted)) for m, h in zip(ranks, heads, strict=True)]
    return logits, torch.cat(drafts, dim=-1)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_a_group_is_the_model(name: str, size: int) -> None:
    """Embedding, layers, head and MTP in a row, prefill then decode: the logits of the whole."""
    whole = whole_model(name)
    plan = Plan(whole.config, size)
    ranks = [rank_model(whole, plan, r) for r in range(size)]
    caches, cache = [model.new_cache() for model in ranks], whole.new_cache()
    for count in STEPS:
        ids, next_ids = (token_ids(count, whole, seed=seed) for seed in (count, count + 100))
        hidden = whole(ids, cache)
        logits, drafts = group_pass(ranks, plan, ids, next_ids, caches)
        assert relative(logits, whole.lm_head(hidden)) < EXACT
        draft = whole.lm_head(whole.draft(next_ids, hidden, cache))
        assert relative(drafts, draft) < EXACT


# --- a wrong plan does not add up


FAULTED = "sparse, ratio 4"


AS_ONE = Section("linear_num_key_heads", lambda c: c.conv_dim // c.linear_num_key_heads)


QKV, CONV = "layers.N.linear_attn.in_proj_qkv.weight", "layers.N.linear_attn.conv1d.weight"


QUERY = Section("num_attention_heads", lambda c: c.head_dim)


WRONG_LINES: dict[str, tuple[list[tuple[str, int | None, tuple[Section, ...]]], str]] = {
    "q, k and v in one piece": ([(QKV, 0, (AS_ONE,)), (CONV, 0, (AS_ONE,))], "linear_attn"),
    "the projection alone in one piece": ([(QKV, 0, (AS_ONE,))], "linear_attn"),
    "the convolution alone in one piece": ([(CONV, 0, (AS_ONE,))], "linear_attn"),
    "v before q and k": ([(QKV, 0, (VALUES, KEYS, KEYS))], "linear_attn"),
    "queries apart from gates": (
        [("layers.N.self_attn.q_proj.weight", 0, (QUERY, QUERY))],
        "self_attn",
    ),
}  # fmt: skip


def kinds_of(names: Any) -> set[str]:
    return {re.sub(r"^(mtp\.)?layers\.\d+\.", "", name) for name in names}


def test_a_sound_plan_has_no_fault() -> None:
    assert not red(whole_model(FAULTED), Plan(whole_model(FAULTED).config, 4))


@pytest.mark.parametrize("fault", WRONG_LINES)
def test_a_wrong_line_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen at the module that is cut wrong, and nowhere else."""
    lines, module = WRONG_LINES[fault]
    monkeypatch.setattr(weights.shard, "TABLE", (*lines, *TABLE))
    assert kinds_of(red(whole_model(FAULTED), Plan(whole_model(FAULTED).config, 4))) == {module}


def dealt(count: int, size: int, rank: int) -> tuple[int, int]:
    """KV heads dealt out in turns instead of to neighbours."""
    if count >= size:
        return rank * count // size, (rank + 1) * count // size
    return rank % count, rank % count + 1


def reversed_key_heads(count: int, size: int, rank: int) -> tuple[int, int]:
    """Key heads (8 of them) from the last to the first, value heads from the first."""
    own = size - 1 - rank if count == 8 else rank
    return own * count // size, own * count // size - (-count // size)


def first_for_all(count: int, size: int, rank: int) -> tuple[int, int]:
    """A rank number that never arrives: everybody holds the first part."""
    return 0, -(-count // size)


@pytest.mark.parametrize(
    ("units", "modules"),
    [
        (dealt, {"self_attn"}),
        (reversed_key_heads, {"linear_attn"}),
        (first_for_all, {"linear_attn", "self_attn", "mlp", "mlp.experts", "mlp.shared_expert"}),
    ],
)
def test_wrong_units_are_seen(
    units: Any, modules: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.shard, "units", units)
    assert kinds_of(red(whole_model(FAULTED), Plan(whole_model(FAULTED).config, 4))) == modules


@pytest.mark.parametrize(
    "forgotten", ["conv1d.weight", "A_log", "dt_bias", "out_proj.weight", "in_proj_z.weight"]
)
def test_a_tensor_left_whole_does_not_fit(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's modules refuse it: their sizes are the plan's own."""
    line = (f"layers.N.linear_attn.{forgotten}", None, ())
    monkeypatch.setattr(weights.shard, "TABLE", (line, *TABLE))
    whole = whole_model(FAULTED)
    with pytest.raises(RuntimeError, match=re.escape(forgotten)):
        rank_model(whole, Plan(whole.config, 4), 0)


# --- coverage of the published models


@functools.cache
def shapes(name: str, experts: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published model with so many experts."""
    gc.disable()  # it would walk a hundred thousand modules again and again, half of the time here
    try:
        with torch.device("meta"):
            model = Model(with_experts(name, experts))
    finally:
        gc.enable()
    return {n: tuple(p.shape) for n, p in stored(model).items()}


def with_experts(name: str, experts: int) -> Config:
    config = Config.published(name)
    top = min(config.num_experts_per_tok, experts)
    return replace(config, num_experts=experts, num_experts_per_tok=top)


def kind_of(name: str) -> str:
    """A module's name without its numbers. A layer of the MTP head counts as a layer."""
    return re.sub(r"\.\d+\.", ".N.", re.sub(r"^mtp\.layers", "layers", name))


WHOLE_ON_EACH = {
    "norm.weight", "mtp.norm.weight", "mtp.fc.weight",
    "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight",
    *(f"layers.N.{name}.weight" for name in (
        "input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm",
        "linear_attn.norm", "mlp.gate", "mlp.shared_expert_gate",
    )),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_tensor_of_the_397b_has_one_place(size: int) -> None:
    """The ranks' ranges are the axis, each element once; KV heads size / 2 times where size > 2."""
    plan = Plan(Config.published("397B-A17B"), size)
    named = shapes("397B-A17B", 512)
    # Delta nets, attentions, the rest of 60 layers, MTP, ends, and experts.
    assert len(named) == 45 * 9 + 15 * 6 + 60 * 7 + 17 + 3 + 61 * 512 * 3
    by_kind: dict[str, list[Shard]] = {}
    for name, shape in named.items():
        kind = kind_of(name)
        if kind in by_kind:
            assert plan.shard(name, shape, size - 1) == by_kind[kind][-1], name
            continue
        shards = by_kind[kind] = [plan.shard(name, shape, rank) for rank in range(size)]
        is_kv = kind.endswith((".k_proj.weight", ".v_proj.weight"))
        times = max(1, size // 2) if is_kv else 1
        if size == 1 or kind in WHOLE_ON_EACH:
            assert shards == [Shard(None)] * size, name
            assert plan.extent(name) is None or size == 1
            continue
        (axis,) = {shard.axis for shard in shards}
        assert axis is not None, name
        counts = torch.zeros(shape[axis], dtype=torch.int)
        for first, end in (found for shard in shards for found in shard.ranges):
            counts[first:end] += 1
        assert (counts == times).all(), name
        assert plan.extent(name) == (axis, shape[axis])
        held = shards[0].shape_of(shape)
        assert Fraction(held[axis], shape[axis]) == Fraction(times, size)
    assert by_kind.keys() >= WHOLE_ON_EACH


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_shards_fill_a_rank_of_every_published_model(name: str, size: int) -> None:
    """The cut shapes are those of modules with a rank's sizes, for each rank."""
    experts = min(2, Config.published(name).num_experts)
    plan = Plan(with_experts(name, experts), size)
    with torch.device("meta"):
        rank = {n: p.shape for n, p in stored(Model(plan.rank_config())).items()}
    some = {kind_of(n): (n, shape) for n, shape in shapes(name, experts).items()}
    for name_of_one, shape in some.values():
        cut = {plan.shard(name_of_one, shape, r).cut(torch.empty(shape, device="meta")).shape
               for r in range(size)}  # fmt: skip
        assert cut == {rank[name_of_one]}, name_of_one


ATTENTION, DELTA, FF = "layers.3.self_attn", "layers.0.linear_attn", "layers.0.mlp"


BY_HAND = [
    # q: 3 * 16/8 * 128; k: 2048 on; v: 4096 + 3 * 64/8 * 128
    (f"{DELTA}.in_proj_qkv.weight", (12288, 4096), 3, 0, [(768, 1024), (2816, 3072), (7168, 8192)]),
    (f"{DELTA}.conv1d.weight", (12288, 1, 4), 3, 0, [(768, 1024), (2816, 3072), (7168, 8192)]),
    (f"{DELTA}.in_proj_z.weight", (8192, 4096), 1, 0, [(1024, 2048)]),
    (f"{DELTA}.in_proj_a.weight", (64, 4096), 7, 0, [(56, 64)]),
    (f"{DELTA}.A_log", (64,), 2, 0, [(16, 24)]),
    (f"{DELTA}.out_proj.weight", (4096, 8192), 1, 1, [(1024, 2048)]),
    (f"{DELTA}.in_proj_qkvz.weight", (20480, 4096), 1, 0, [(2560, 5120)]),
    (f"{DELTA}.in_proj_ba.weight", (128, 4096), 7, 0, [(112, 128)]),
    (f"{ATTENTION}.q_proj.weight", (16384, 4096), 7, 0, [(14336, 16384)]),
    (f"{ATTENTION}.k_proj.weight", (512, 4096), 3, 0, [(0, 256)]),
    (f"{ATTENTION}.k_proj.weight", (512, 4096), 5, 0, [(256, 512)]),
    ("mtp.layers.0.self_attn.v_proj.weight", (512, 4096), 4, 0, [(256, 512)]),
    (f"{ATTENTION}.o_proj.weight", (4096, 8192), 2, 1, [(2048, 3072)]),
    (f"{ATTENTION}.q_norm.weight", (256,), 2, None, []),
    (f"{FF}.experts.7.gate_proj.weight", (1024, 4096), 2, 0, [(256, 384)]),
    (f"{FF}.experts.7.down_proj.weight", (4096, 1024), 2, 1, [(256, 384)]),
    (f"{FF}.experts.7.down_proj.weight_scale", (4096, 1024), 2, 1, [(256, 384)]),
    (f"{FF}.experts.7.up_proj.weight_scale_inv", (1024, 4096), 0, 0, [(0, 128)]),
    (f"{FF}.experts.gate_up_proj", (512, 2048, 4096), 2, 1, [(256, 384), (1280, 1408)]),
    ("mtp.layers.0.mlp.experts.down_proj", (512, 4096, 1024), 7, 2, [(896, 1024)]),
    (f"{FF}.shared_expert.down_proj.weight", (4096, 1024), 1, 1, [(128, 256)]),
    (f"{FF}.gate.weight", (512, 4096), 1, None, []),
    ("model.language_model.embed_tokens.weight", (248320, 4096), 1, 0, [(31040, 62080)]),
    ("lm_head.weight", (248320, 4096), 7, 0, [(217280, 248320)]),
    ("model.norm.weight", (4096,), 7, None, []),
    ("mtp.fc.weight", (4096, 8192), 7, None, []),
    ("model.visual.blocks.3.attn.qkv.weight", (3456, 1152), 7, None, []),
]


@pytest.mark.parametrize(("name", "shape", "rank", "axis", "ranges"), BY_HAND)
def test_ranges_worked_out_by_hand(
    name: str, shape: tuple[int, ...], rank: int, axis: int | None, ranges: list[tuple[int, int]]
) -> None:
    """397B over eight ranks."""
    plan = Plan(Config.published("397B-A17B"), 8)
    assert plan.shard(name, shape, rank) == Shard(axis, tuple(ranges))
    for prefix in ("model.", "model.language_model."):
        if not name.startswith("model."):
            assert plan.shard(prefix + name, shape, rank) == Shard(axis, tuple(ranges))


def test_qwen3_next_groups_are_the_separate_projections() -> None:
    """A rank's part of the grouped rows, ungrouped, is its part of the separate matrices."""
    config = Config.from_dict(WIDE["sparse, ratio 4"] | {"model_type": "qwen3_next"})
    plan, stem = Plan(config, 4), "layers.0.linear_attn.in_proj"
    values = config.linear_num_value_heads * config.linear_value_head_dim
    fused = {"qkvz": noise(config.conv_dim + values, 3), "ba": noise(64, 3)}
    for group, wanted in (("qkvz", "qkv"), ("qkvz", "z"), ("ba", "b"), ("ba", "a")):
        packed = fused[group]
        flat = _ungroup(packed, config, wanted)
        for rank in range(4):
            part = plan.shard(f"{stem}_{group}.weight", packed.shape, rank).cut(packed)
            own = plan.shard(f"{stem}_{wanted}.weight", flat.shape, rank).cut(flat)
            assert torch.equal(_ungroup(part, plan.rank_config(), wanted), own)
