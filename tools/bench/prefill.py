"""Time prefill on a GPU: tokens/s of one forward pass with random weights, and the time per kernel.

--config and --tp are those of `bench step`: one rank's slice of 397B without the all-reduces, or a
smaller model. `--layers N` builds only N layers of the trunk; the time of the whole pass is then
scaled up. --tokens is the length of the pass (`--prefill-chunk` of a prompt). --context is the
number of tokens in the cache before it.

Each launch of a delta-net layer and of an attention layer is timed in its own graph, and multiplied
by the number of such layers. share_of_matrix is its FLOP/s relative to a product of two bf16
matrices of 8,192 rows in the same run. `torch_us` is the time of the same operation in torch:
`F.linear` for products, and `scaled_dot_product_attention` for attention without context.

--peers adds a row for each node of one layer that another library has too: the time of all its
launches together, and the time of the library's call. The calls are `fla`'s chunked delta rule, the
routed experts of `triton_kernels` from the chosen ids, and `scaled_dot_product_attention` with the
context. A whole model on one rank without context is also compared with the transformers library's, in
bf16. A library that is not installed has no row.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fast.launch import Launch, Scratch, Work
from fast.prefill import layer as prefill
from qwen35.cache import KV_CACHE_DTYPES, Cache, KVCache
from qwen35.cli import Parser, at_least_one, at_least_zero
from qwen35.config import Config
from qwen35.errors import InputError
from reference.model import Model
from tools.bench import gpu, report
from tools.bench.step import SIZES, random_model, share_of

SIDE = 8192  # rows and columns of the matrices that `matrix_rate` multiplies


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--config", choices=[*SIZES, "tiny"], default="397b",
        help="time a model of this size, with random weights (default: 397b)")  # fmt: skip
    add("--tp", type=at_least_one, default=8, metavar="N",
        help="share the model among N ranks, and time one of them (default: 8)")  # fmt: skip
    add("--layers", type=at_least_one, metavar="N",
        help="build only N layers of the trunk, a multiple of 4 (default: all)")  # fmt: skip
    add("--tokens", type=at_least_one, default=2048, metavar="T",
        help="time a pass of T tokens (default: 2048)")  # fmt: skip
    add("--context", type=at_least_zero, default=0, metavar="T",
        help="let T tokens be in the cache before the pass (default: 0)")  # fmt: skip
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="store keys and values in the model's dtype (auto) or in e4m3 (fp8) (default: "
        "auto)")  # fmt: skip
    add("--repeats", type=at_least_one, default=10, metavar="R",
        help="time R replays of each graph (default: 10)")  # fmt: skip
    add("--no-nodes", action="store_true", help="time only the whole pass")
    add("--peers", action="store_true",
        help="also time the same nodes of the libraries that are installed")  # fmt: skip


def matrix_rate(device: torch.device, repeats: int = 10) -> float:
    """The FLOP/s of a bf16 product of two large matrices: the median of `repeats`."""
    a, b = (torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(2))
    us = statistics.median(gpu.Graph([lambda: a @ b]).microseconds(repeats))
    return 2 * SIDE**3 / us * 1e6


def filled(model: Model, tokens: int) -> Cache:
    """A cache of `tokens` tokens with random keys, values and states."""
    cache = model.new_cache()
    for state in cache.layers:
        if isinstance(state, KVCache):
            k, v = (
                torch.randn(*state.k.shape[:2], tokens, state.k.shape[3], device=state.k.device)
                for _ in range(2)
            )
            state.append(k.bfloat16(), v.bfloat16())
        else:
            state.conv.normal_()
            state.recurrent.normal_().mul_(0.1)
    cache.advance(tokens)
    return cache


def operations(launch: Launch, context: int) -> float:
    """The FLOPs of a launch's matrix products, with a multiplication and an addition as two."""
    a, kind = launch.arguments, launch.kernel.__name__
    if kind == "linear":
        return 2.0 * len(a["x"]) * a["N"] * a["K"]
    if kind == "grouped":
        return 2.0 * a["pairs"] * a["N"] * a["K"]
    if kind == "attend":
        skipped = a["first"] * a["PIECE"]
        room = launch.grid[2] * a["PIECE"]
        seen = sum(min(max(context + row + 1 - skipped, 0), room) for row in range(len(a["q"])))
        return 4.0 * a["H"] * a["K"] * seen
    if kind in ("solve", "scan", "read"):
        chunks, K, V = a["qk"].shape[0] / 64, a["K"], a["V"]
        each = {
            "solve": 64 * 64 * (2 * K + V) + 14 * 64**3,
            "scan": 2 * 64 * K * V,
            "read": 64 * 64 * (K + V) + 64 * K * V,
        }[kind]
        return 2.0 * chunks * a["HV"] * each
    return 0.0


def peer(launch: Launch, context: int) -> Callable[[], Tensor] | None:
    """A call of the same operation in torch, or None if torch has none."""
    a, kind = launch.arguments, launch.kernel.__name__
    if kind == "linear" and not a["ACTIVATED"]:
        return lambda: F.linear(a["x"], a["weight"])
    if kind == "attend" and not context and not a["SPLIT"]:
        q = a["q"].transpose(0, 1)[None]
        k, v = (a[name][None, :, : len(a["q"])] for name in ("keys", "values"))
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return None


def main(args: argparse.Namespace) -> int:
    device, target = gpu.find()
    whole = share_of(args.config, args.tp)
    count = args.layers or whole.num_hidden_layers
    if count % 4 or count > whole.num_hidden_layers:
        raise InputError(
            f"--layers {count}; expected a multiple of 4 up to {whole.num_hidden_layers}"
        )
    config = replace(whole, num_hidden_layers=count, layer_types=whole.layer_types[:count])
    with torch.inference_mode():
        rate = matrix_rate(device)
        model = random_model(config, device)
        model.kv_cache_dtype = args.kv_cache_dtype
        rows = _measured(args, model, whole, rate)
    names = ("config", "tp", "tokens", "context", "kv_cache_dtype", "repeats")
    report.emit(
        "prefill", {"target": target} | {n: getattr(args, n) for n in names}, rows,
        only_json=args.json, device=torch.cuda.get_device_name(device), matrix_tflop_s=rate * 1e-12,
    )  # fmt: skip
    return 0


def _measured(
    args: argparse.Namespace, model: Model, whole: Config, rate: float
) -> list[report.Row]:
    device, layers = model.embed_tokens.weight.device, len(model.layers)
    cache = filled(model, args.context)
    cache.reserve(args.context + args.tokens)
    ids = torch.randint(len(model.embed_tokens.weight), (1, args.tokens), device=device)

    def one_pass() -> None:
        model(ids, cache)
        for state in cache.layers:
            if isinstance(state, KVCache):
                state.rollback(args.tokens)
        cache.length = args.context

    first, second = gpu.events(one_pass, args.repeats), gpu.events(one_pass, args.repeats)
    us = statistics.median(first) * whole.num_hidden_layers / layers
    rows: list[report.Row] = [{
        "name": "pass" if layers == whole.num_hidden_layers else "pass of all layers, by proportion",
        "layers": whole.num_hidden_layers, "us": us,
        "us_again": statistics.median(second) * whole.num_hidden_layers / layers,
        "tokens_per_s": args.tokens / us * 1e6,
    }]  # fmt: skip
    if args.no_nodes and not args.peers:
        return rows
    x = torch.randn(args.tokens, whole.hidden_size, device=device).bfloat16()
    summed = done = 0.0
    works: list[list[Work]] = []
    for kind in ("linear_attention", "full_attention"):
        place = model.config.layer_types.index(kind)
        times = whole.layer_types.count(kind)
        state: Any = cache.layers[place]
        scratch = Scratch(device)
        work, _ = prefill.on_state(prefill.on_layer, model.layers[place], x, state, scratch)
        for one in work:
            one()
        works.append(work)
        for one in work if not args.no_nodes else ():
            row = _timed(one, times, args, rate)
            if row is not None:
                summed += row["us"]
                done += row.pop("operations")
                rows.append(row)
        if isinstance(state, KVCache):
            state.rollback(args.tokens)
    if not args.no_nodes:
        rows[0]["share_of_matrix"] = done / rate / (us * 1e-6)
        rows.append({"name": "sum of launches", "us": summed})
    if args.peers:
        from tools.bench import prefill_peers  # Triton is needed from here on

        layer: Any = model.layers[0]
        node = getattr(layer.feed_forward, "experts", None)
        top_k = whole.num_experts_per_tok
        rows += prefill_peers.rows_of_nodes(*works, node, args.tokens, top_k, args.repeats)
        is_whole = args.tp == 1 and layers == whole.num_hidden_layers and not args.context
        if is_whole and args.config in SIZES:
            rows += prefill_peers.row_of_model(SIZES[args.config], us, ids, args.repeats)
    return rows


def _timed(one: Work, times: int, args: argparse.Namespace, rate: float) -> report.Row | None:
    """The row of a launch in its own graph, counted for `times` layers. None for torch's operations,
    which move a state or fill a buffer."""
    if not isinstance(one, Launch):
        return None
    us = statistics.median(gpu.Graph([one]).microseconds(args.repeats))
    done = operations(one, args.context)
    row: report.Row = {
        "name": one.name.removeprefix("prefill "), "layers": times, "us": us * times,
        "operations": done * times, "share_of_matrix": done / rate / (us * 1e-6),
    }  # fmt: skip
    other = peer(one, args.context)
    if other is not None:
        row["torch_us"] = times * statistics.median(gpu.Graph([other]).microseconds(args.repeats))
    return row
