"""The transformers library as an independent oracle: its modules, with our weights, beside ours.

A comparison takes our model and that of transformers, and returns the outputs of both, by name.
Both get the same inputs at each module, because the residual stream and the logits would hide a
broken mixer. Comparisons look up functions when they are called, so that they see a fault that is
patched into the reference.

transformers casts to float32 explicitly: `.float()` in the norms, `dtype=float` in the softmaxes,
and `.to(float32)` in the delta rule. Therefore its float64 models have errors of about 1e-7.
`as_wide_as_the_input` turns these casts off for float64 tensors, without a change of its code. Only
the RoPE table remains float32, with the same bits on both sides. With it our float64 model must
agree up to float64 rounding, so that every term that is wrong by 1e-7 is found. The effect of the
casts themselves is checked in float32.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

import reference.deltanet
import reference.rope
from qwen35.cache import DeltaState, KVCache
from reference.model import Model
from tests.support.family import FAMILY, small_model

Pairs = dict[str, tuple[Tensor, Tensor]]  # by name, (ours, transformers')

LENGTHS = (1, 63, 64, 65, 130)  # one token; about one chunk of the delta rule; over two of them
SCALES = (1.0, 0.01)
# Number of sequences in a comparison of mixers. If a query is nearly orthogonal to its key, the
# output of the delta rule cancels, and the norm after it magnifies the rounding errors of the
# projections. Measured at a cosine of 0.005: 2.9e-7 in q becomes 6e-6 in that head (1e-15 in
# float64). Enough rows average this out.
BATCH = 8

# The largest relative difference of a module from that of transformers in float64, with the same
# inputs. Rounding errors are a thousand times smaller, so this checks the formula.
EXACT = 1e-12


def relative(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||, in float64. A NaN or another shape fails."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    a, b = ours.double(), theirs.double()
    assert a.isfinite().all() and b.isfinite().all(), "not finite"
    if not b.any():
        return float(a.norm())
    return float((a - b).norm() / b.norm())


def row_error(got: Tensor, truth: Tensor) -> float:
    """The median of the relative errors of all rows. A row is the last axis."""
    assert got.shape == truth.shape, f"{tuple(got.shape)} against {tuple(truth.shape)}"
    assert got.isfinite().all() and truth.isfinite().all(), "not finite"
    errors = (got.double() - truth.double()).norm(dim=-1)
    sizes = truth.double().norm(dim=-1)
    errors = torch.where(sizes > 0, errors / sizes, errors)  # a row of zeros: absolute
    return float(errors.flatten().median())


def within_twice(ours: Tensor, yardstick: Tensor, truth: Tensor) -> tuple[float, float]:
    """The two-times rule: (our error, the largest allowed error), both against `truth`.

    The limit is twice the error of `yardstick`, which is the same computation in the same
    precision, plus the machine epsilon of the output's dtype. It is no constant, because each
    processor rounds both sides in its own way. The error is that of the median row. A few rows
    magnify rounding errors a hundredfold end to end, and there it is chance which of two correct
    computations has the larger error (measured ratios for single rows are 0.2 to 10). float64
    comparisons check the formula in every row. This rule checks that float32 loses no more
    precision than necessary.

    AssertionError if our dtype is narrower than that of `yardstick`: its epsilon would allow the
    rounding.
    """
    eps = torch.finfo(ours.dtype).eps
    assert eps <= torch.finfo(yardstick.dtype).eps, f"{ours.dtype} against {yardstick.dtype}"
    return row_error(ours, truth), 2 * row_error(yardstick, truth) + eps


# --- transformers' model with our weights


class _WideMode(TorchFunctionMode):
    """While it is active, an explicit cast from float64 to float32 returns the tensor unchanged."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def as_wide_as_the_input(dtype: torch.dtype) -> Iterator[None]:
    """For float64, turn the casts of transformers to float32 off. Other dtypes change nothing."""
    if dtype != torch.float64:
        yield
        return
    with _WideMode():
        yield


def _their_config(name: str) -> tuple[Any, type]:
    """transformers' config and class for a family member."""
    values = dict(FAMILY[name])
    kind = values.pop("model_type")
    if kind == "qwen3_next":
        rope = values["rope_parameters"]
        values["rope_parameters"] = {k: v for k, v in rope.items() if not k.startswith("mrope")}
        config, cls = transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM
    elif kind == "qwen3_5_moe_text":
        config, cls = transformers.Qwen3_5MoeTextConfig, transformers.Qwen3_5MoeForCausalLM
    else:
        config, cls = transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM
    made = config(**values)
    made._attn_implementation = "eager"
    made._experts_implementation = "eager"
    return made, cls


def _grouped(parts: list[Tensor], key_heads: int) -> Tensor:
    """Qwen3-Next's packing: rows grouped by key head, and within a head by part."""
    hidden = parts[0].shape[-1]
    return torch.cat([p.view(key_heads, -1, hidden) for p in parts], dim=1).reshape(-1, hidden)


def translate(
    model: nn.Module, wanted: list[str], key_heads: int, prefix: str
) -> dict[str, Tensor]:
    """The tensors with the names `wanted` of transformers, made from our parameters.

    prefix: what transformers puts before our names (`model.` in a language model).
    """
    ours = dict(model.named_parameters(remove_duplicate=False))
    experts = range(len({n.split(".experts.")[1].split(".")[0] for n in ours if ".experts." in n}))
    state = {}
    for full in wanted:
        name = full.removeprefix(prefix)
        stem, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            halves = ("gate_proj", "up_proj")
            pairs = [[ours[f"{stem}.{e}.{h}.weight"] for h in halves] for e in experts]
            state[full] = torch.stack([torch.cat(pair) for pair in pairs])
        elif leaf == "down_proj":
            state[full] = torch.stack([ours[f"{stem}.{e}.down_proj.weight"] for e in experts])
        elif name.endswith("in_proj_qkvz.weight"):
            qkv = ours[name.replace("qkvz", "qkv")]
            z = ours[name.replace("qkvz", "z")]
            keys = (len(qkv) - len(z)) // 2  # as many rows of values as of z
            state[full] = _grouped([*qkv.split([keys, keys, len(z)]), z], key_heads)
        elif name.endswith("in_proj_ba.weight"):
            b_and_a = [ours[name.replace("in_proj_ba", f"in_proj_{x}")] for x in "ba"]
            state[full] = _grouped(b_and_a, key_heads)
        else:
            state[full] = ours[name]
    return state


def load_into(theirs: nn.Module, ours: nn.Module, key_heads: int, prefix: str) -> None:
    """Copy our weights into a module of transformers. The names have to match exactly."""
    names = list(theirs.state_dict())
    state = translate(ours, names, key_heads, prefix)
    theirs.load_state_dict(state, strict=True)


def their_model(name: str, model: Model) -> Any:
    """The causal language model of transformers for a family member, with our weights and dtype."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config, cls = _their_config(name)
    theirs = cls(config).eval().requires_grad_(False)
    dtype = model.embed_tokens.weight.dtype
    theirs.to(dtype)
    # `.to` has also cast the RoPE frequencies. They stay float32, with the same bits.
    rotary = theirs.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.float()
    load_into(theirs, model, config.linear_num_key_heads, "model.")
    return theirs


@cache
def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Model, Any]:
    """(our model, transformers') of a family member with the same random weights."""
    model = small_model(name, seed=7, dtype=dtype)
    return model, their_model(name, model)


def random(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random normal numbers. They are the same in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def token_ids(count: int, model: Model, seed: int = 0) -> Tensor:
    """[1, count] token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, count), generator=generator)


# --- running transformers' modules


def their_rope(theirs: Any, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """cos and sin of positions first .. first + T - 1, for x [B, T, D]."""
    positions = torch.arange(first, first + x.shape[1])[None]
    return theirs.model.rotary_emb(x, positions)


def causal_mask(x: Tensor, past: int) -> Tensor:
    """The mask that eager attention adds to its scores, [1, 1, T, past + T]."""
    T = x.shape[1]
    return torch.full((1, 1, T, past + T), -torch.inf, dtype=x.dtype).triu(past + 1)


def their_attention_arguments(theirs: Any, x: Tensor, cache: Any, past: int) -> dict[str, Any]:
    return {
        "position_embeddings": their_rope(theirs, x, past),
        "attention_mask": causal_mask(x, past),
        "past_key_values": cache,
    }


def state_pairs(ours: KVCache | DeltaState, theirs: Any) -> Pairs:
    """The state of a layer in our cache and in that of transformers.

    Theirs has four convolution columns, but no later token uses the oldest.
    """
    if isinstance(ours, KVCache):
        return {
            "keys": (ours.k[:, :, : ours.length], theirs.keys),
            "values": (ours.v[:, :, : ours.length], theirs.values),
        }
    kept = ours.conv.shape[1]
    return {
        "conv state": (ours.conv.transpose(1, 2), theirs.conv_states[0][..., -kept:]),
        "recurrent state": (ours.recurrent, theirs.recurrent_states[0]),
    }


def state_errors(ours: KVCache | DeltaState, theirs: Any) -> dict[str, float]:
    """The relative differences of one layer's states."""
    return {what: relative(*both) for what, both in state_pairs(ours, theirs).items()}


def layer_index(model: Model, kind: str) -> int:
    """The index of the second layer of a kind, if there is one. The first would hide a wrong
    index."""
    found = [i for i, layer_type in enumerate(model.config.layer_types) if layer_type == kind]
    return found[min(1, len(found) - 1)]


def dtype_of(model: Model) -> torch.dtype:
    return model.embed_tokens.weight.dtype


def _then_decode(
    model: Model,
    theirs: Any,
    layer: int,
    x: Tensor,
    run: Callable[[Tensor, Any], Tensor],
    run_theirs: Callable[[Tensor, Any, int], Tensor],
    prompt: int,
) -> Pairs:
    """Run a prompt and then single tokens on both sides, each with its cache. Returns outputs and
    states."""
    state = model.new_cache(batch=x.shape[0]).layers[layer]
    their_cache = DynamicCache(config=theirs.config)
    outputs, their_outputs = [], []
    pairs: Pairs = {}
    edges = [0, *range(prompt, x.shape[1] + 1)]
    for first, last in pairwise(edges):
        part = x[:, first:last]
        outputs.append(run(part, state))
        with as_wide_as_the_input(x.dtype):
            their_outputs.append(run_theirs(part, their_cache, first))
        when = "prompt" if first == 0 else f"decode {last - prompt}"
        for what, (mine, other) in state_pairs(state, their_cache.layers[layer]).items():
            pairs[f"{when} {what}"] = mine.clone(), other.clone()
    pairs["prompt output"] = outputs[0], their_outputs[0]
    pairs["decode output"] = torch.cat(outputs[1:], 1), torch.cat(their_outputs[1:], 1)
    return pairs


def _passes(model: Model, prompt: int, scale: float, seed: int) -> list[Tensor]:
    """Inputs [prompt, D] of passes without state: one pass, or many if it has only one row, because
    the rounding of one row is random."""
    count = 2 * BATCH if prompt == 1 else 1
    shape = (count * prompt, model.config.hidden_size)
    return list(random(*shape, seed=seed, dtype=dtype_of(model), scale=scale).split(prompt))


# --- the comparisons: (model, theirs, prompt length, input scale) -> both sides, by name


def compare_norm(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    """Compare every zero-centred norm of the trunk, because each has its own weights."""
    pairs: Pairs = {}
    others = dict(theirs.named_modules())
    for name, module in model.named_modules():
        if name.startswith("mtp") or type(module).__name__ != "RMSNorm":
            continue
        dim = module.weight.shape[0]
        x = random(1, prompt, dim, seed=1, dtype=dtype_of(model), scale=scale)
        with as_wide_as_the_input(x.dtype):
            other = others[f"model.{name}"](x)
        pairs[name] = (module(x), other)
    return pairs


def compare_gated_norm(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    i = layer_index(model, "linear_attention")
    module, other = model.layers[i].linear_attn.norm, theirs.model.layers[i].linear_attn.norm
    dim = module.weight.shape[0]
    x = random(2, prompt, 3, dim, seed=2, dtype=dtype_of(model), scale=scale)
    gate = random(2, prompt, 3, dim, seed=3, dtype=dtype_of(model), scale=3 * scale)
    with as_wide_as_the_input(x.dtype):
        expected = other(x, gate)
    return {"output": (module(x, gate), expected)}


def compare_rope(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    """Compare the RoPE table and the rotation, from position 0 and from position 3000."""
    config, dtype = model.config, dtype_of(model)
    i = layer_index(model, "full_attention")
    turn = sys.modules[type(theirs.model).__module__].apply_rotary_pos_emb
    assert theirs.model.layers[i].self_attn.head_dim == config.head_dim
    pairs: Pairs = {}
    for first in (0, 3000):
        q = random(1, 3, prompt, config.head_dim, seed=4, dtype=dtype, scale=scale)
        k = random(1, 2, prompt, config.head_dim, seed=5, dtype=dtype, scale=scale)
        positions = torch.arange(first, first + prompt)
        table = reference.rope.rope_table(positions, config.rotary_dim, config.rope_theta, dtype)
        with as_wide_as_the_input(dtype):
            their_table = their_rope(theirs, k[:, 0], first)
            other_q, other_k = turn(q, k, *their_table)
        half = config.rotary_dim // 2
        for what, mine, other in zip(("cos", "sin"), table, their_table, strict=True):
            pairs[f"{what} from {first}"] = (mine, other[0, :, :half])
        pairs[f"queries from {first}"] = (reference.rope.apply_rope(q, *table), other_q)
        pairs[f"keys from {first}"] = (reference.rope.apply_rope(k, *table), other_k)
    return pairs


def compare_mlp(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    i = layer_index(model, "linear_attention")
    ours, other = model.layers[i].mlp, theirs.model.layers[i].mlp
    if model.config.num_experts:
        ours, other = ours.shared_expert, other.shared_expert
    passes = _passes(model, prompt, scale, seed=6)
    return {"output": (torch.cat([*map(ours, passes)]), torch.cat([*map(other, passes)]))}


def compare_router(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    """Compare the weights as a matrix over all experts, which hides the order of the chosen
    ones."""
    if not model.config.num_experts:
        return {}
    i = layer_index(model, "linear_attention")
    ours, other = model.layers[i].mlp.gate, theirs.model.layers[i].mlp.gate

    def spread(experts: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        empty = like.new_zeros(len(experts), model.config.num_experts)
        return empty.scatter(1, experts, weights.to(empty.dtype))

    mine, others = [], []
    for x in _passes(model, prompt, scale, seed=7):
        experts, weights = ours(x)
        with as_wide_as_the_input(x.dtype):
            _, other_weights, other_experts = other(x)
        assert experts.shape == other_experts.shape, "another number of experts"
        mine.append(spread(experts, weights, weights))
        others.append(spread(other_experts, other_weights, weights))
    return {"weights": (torch.cat(mine), torch.cat(others))}


def compare_experts(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    """Compare the experts. Both sides get the same ids, which leave out the last expert."""
    if not model.config.num_experts:
        return {}
    i = layer_index(model, "linear_attention")
    k, E = model.config.num_experts_per_tok, model.config.num_experts
    generator = torch.Generator().manual_seed(9)
    likely = torch.linspace(1.0, 0.0, E)  # the last one is never chosen
    mine, others = [], []
    for x in _passes(model, prompt, scale, seed=8):
        experts = torch.multinomial(likely.expand(prompt, E), k, generator=generator)
        weights = torch.rand(prompt, k, generator=generator).to(x.dtype)
        mine.append(model.layers[i].mlp.experts(x, experts, weights))
        others.append(theirs.model.layers[i].mlp.experts(x, experts, weights))
    return {"output": (torch.cat(mine), torch.cat(others))}


def compare_attention(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    i = layer_index(model, "full_attention")
    ours, other = model.layers[i].self_attn, theirs.model.layers[i].self_attn
    x = random(
        BATCH, prompt + 3, model.config.hidden_size, seed=10, dtype=dtype_of(model), scale=scale
    )

    def run_theirs(part: Tensor, cache: Any, past: int) -> Tensor:
        return other(part, **their_attention_arguments(theirs, part, cache, past))[0]

    return _then_decode(model, theirs, i, x, ours, run_theirs, prompt)


def compare_delta_net(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    i = layer_index(model, "linear_attention")
    ours, other = model.layers[i].linear_attn, theirs.model.layers[i].linear_attn
    x = random(
        BATCH, prompt + 3, model.config.hidden_size, seed=11, dtype=dtype_of(model), scale=scale
    )

    def run_theirs(part: Tensor, cache: Any, past: int) -> Tensor:
        return other(part, cache_params=cache)

    return _then_decode(model, theirs, i, x, ours, run_theirs, prompt)


def compare_moe(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    if not model.config.num_experts:
        return {}
    i = layer_index(model, "full_attention")
    mine, others = [], []
    for x in _passes(model, prompt, scale, seed=12):
        mine.append(model.layers[i].mlp(x[None]))
        with as_wide_as_the_input(x.dtype):
            others.append(theirs.model.layers[i].mlp(x[None]))
    return {"output": (torch.cat(mine, 1), torch.cat(others, 1))}


def compare_layer(model: Model, theirs: Any, prompt: int, scale: float) -> Pairs:
    """Compare a whole decoder layer with each kind of mixer."""
    pairs: Pairs = {}
    for kind in ("linear_attention", "full_attention"):
        i = layer_index(model, kind)
        x = random(
            4, prompt + 2, model.config.hidden_size, seed=13, dtype=dtype_of(model), scale=scale
        )

        def run_theirs(part: Tensor, cache: Any, past: int, i: int = i, kind: str = kind) -> Tensor:
            arguments = their_attention_arguments(theirs, part, cache, past)
            if kind == "linear_attention":
                arguments["attention_mask"] = None
            return theirs.model.layers[i](part, **arguments)

        found = _then_decode(model, theirs, i, x, model.layers[i], run_theirs, prompt)
        pairs |= {f"{kind} {what}": both for what, both in found.items()}
    return pairs


# Leaves come first, so that the first failing comparison names the broken module.
COMPARISONS: dict[str, Callable[[Model, Any, int, float], Pairs]] = {
    "RMSNorm": compare_norm,
    "RMSNormGated": compare_gated_norm,
    "rope": compare_rope,
    "MLP": compare_mlp,
    "Router": compare_router,
    "Experts": compare_experts,
    "GatedAttention": compare_attention,
    "GatedDeltaNet": compare_delta_net,
    "SparseMoeBlock": compare_moe,
    "DecoderLayer": compare_layer,
}
