"""The launches of every kernel at the sizes of the published model, to be compiled, not run: their
tensors have no memory."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fast.allreduce import AllReduce, Gathered, OneShot
from fast.launch import Launch, Scratch, Work
from fast.layer import DecoderLayer
from fast.moe import Experts, SparseMoeBlock
from fast.mtp import MTP
from fast.prefill import layer as prefill
from fast.router import Router
from fast.step import Step
from qwen35.cache import KV_CACHE_DTYPES, Cache, KVCache
from qwen35.config import Config
from qwen35.errors import InputError

PUBLISHED, SMALLER = "397B-A17B", "35B-A3B"
RANKS = (1, 2, 4, 8)
DIVIDED = (
    "num_attention_heads", "linear_num_key_heads", "linear_num_value_heads",
    "moe_intermediate_size", "shared_expert_intermediate_size", "vocab_size",
)  # fmt: skip
CAPACITY, DRAFTS, PREFILL_ROWS = 16_384, 3, 2048


def sliced(config: Config, ranks: int) -> Config:
    """One rank's share of a model: heads, intermediate sizes and the vocabulary are divided.

    InputError that names the first size that the number of ranks does not divide.
    """
    for name in DIVIDED:
        if getattr(config, name) % ranks:
            raise InputError(f"{name} = {getattr(config, name)} does not divide by {ranks} ranks")
    shares: dict[str, Any] = {name: getattr(config, name) // ranks for name in DIVIDED}
    # With more ranks than key heads, each rank keeps the one that its query heads read.
    shares["num_key_value_heads"] = max(1, config.num_key_value_heads // ranks)
    return replace(config, **shares)


class Alone:
    """One rank of a group that is not there: the sizes are all that compiling needs."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    sum = gather

    def exchange(self, value: Any) -> list[Any]:
        raise NotImplementedError


def launches(target: str, build: Callable[[Config], Any]) -> Iterator[Launch]:
    """Yield each kernel and shape of the 397B once: those of a decode round on 1, 2, 4 and 8 ranks, with
    both kinds of exchange, and those of a prompt's pass on 1 and 8.

    build: makes a reference model of a config, on the device meta.
    """
    seen: set[str] = set()
    meta = torch.device("meta")
    for ranks in RANKS:
        config = sliced(Config.published(PUBLISHED), ranks)
        config = replace(config, num_hidden_layers=4, layer_types=config.layer_types[:4])
        model = build(replace(config, num_experts=1, num_experts_per_tok=1)).bfloat16()
        fast(model, config, target, meta)
        alone = Alone(ranks)
        exchanges: list[AllReduce | None] = [None]
        if ranks > 1:
            exchanges = [Gathered(alone), OneShot.alone(alone, meta)]
        for exchange in exchanges:
            for layer in (*model.layers, model.mtp.layer):
                layer.ranks = exchange
            for work in _works(model, config, ranks, meta):
                if isinstance(work, Launch) and work.name not in seen:
                    seen.add(work.name)
                    yield work


def hip_launches(target: str) -> Iterator[Launch]:
    """The HIP kernels of a block of experts and, of the same sizes, Triton's: of the 397B on 1, 2, 4 and
    8 ranks. HIP alone: of the 35B-A3B on 1, 2 and 4."""
    for name, ranks, kernel in (
        *((PUBLISHED, ranks, kernel) for ranks in RANKS for kernel in ("hip", "triton")),
        *((SMALLER, ranks, "hip") for ranks in RANKS[:-1]),
    ):
        config = sliced(Config.published(name), ranks)
        block = moe_block(config, config.num_experts, target, kernel, torch.device("meta"))
        x = torch.empty(DRAFTS + 1, config.hidden_size, dtype=torch.bfloat16, device="meta")
        yield from block.launches(x, Scratch(x.device))[0]


def moe_block(
    config: Config, E: int, target: str, kernel: str, device: torch.device
) -> SparseMoeBlock:
    """A block of E experts with a model's other sizes, whose weights are not filled."""
    D, I = config.hidden_size, config.shared_expert_intermediate_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the smaller model's sizes are not in Triton's table
        experts = Experts(E, D, config.moe_intermediate_size, target, device, kernel=kernel)
    rows = torch.empty(E + 1 + 2 * I, D, dtype=torch.bfloat16, device=device)
    top_k, norm = config.num_experts_per_tok, config.norm_topk_prob
    gate = Router(rows, E, top_k, norm, target, kernel)
    return SparseMoeBlock(gate, experts, torch.empty(D, I, dtype=torch.bfloat16, device=device))


def _works(model: Any, config: Config, ranks: int, device: torch.device) -> Iterator[Work]:
    """The work of a round with each kind of KV cache and, for 1 and 8 ranks, of a prompt's pass."""
    for model.kv_cache_dtype in KV_CACHE_DTYPES:
        yield from Step(model, CAPACITY, DRAFTS).work
    if ranks not in (RANKS[0], RANKS[-1]):
        return  # a prompt's kernels have the same blocks on any number of ranks
    x = torch.empty(PREFILL_ROWS, config.hidden_size, dtype=torch.bfloat16, device=device)
    # The keys are one piece, or several.
    for before, dtype in itertools.product((0, CAPACITY - PREFILL_ROWS), KV_CACHE_DTYPES):
        cache = Cache.empty(config, torch.bfloat16, device, kv_cache_dtype=dtype)
        cache.reserve(before + PREFILL_ROWS)
        for layer, state in zip(model.layers, cache.layers, strict=True):
            if isinstance(state, KVCache):
                state.length = before
            yield from prefill.on_state(prefill.on_layer, layer, x, state, Scratch(device))[0]


def fast(model: Any, config: Config, target: str, device: torch.device) -> None:
    """Replace a reference model's layers and MTP head by the fast ones, with experts on `device` whose
    weights are not filled."""
    for layer in (*model.layers, *model.mtp.layers):
        sizes = config.num_experts, config.hidden_size, config.moe_intermediate_size
        gate = layer.mlp.gate
        gate.top_k = config.num_experts_per_tok
        gate.weight = torch.nn.Parameter(
            gate.weight.new_empty(config.num_experts, config.hidden_size), requires_grad=False
        )
        layer.mlp.experts = Experts(*sizes, target, device)
    for i, layer in enumerate(model.layers):
        model.layers[i] = DecoderLayer.from_reference(layer, target)
    model.mtp = MTP.from_reference(model.mtp, target)
    model.config = config
