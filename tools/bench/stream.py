"""Measure one stream with a long prompt: tokens/s and time to first token.

Both are given as median and 90th percentile; at least 90% of the runs are as good as the latter.
Each run takes another piece of held-out text as its prompt. Decoding is greedy and does not stop at
an end-of-text token. A first run, which compiles kernels and captures graphs, is not counted.
"""

import argparse
import math
import statistics
from collections.abc import Sequence

import torch

from qwen35.cache import KV_CACHE_DTYPES
from qwen35.cli import Parser, at_least_one, at_least_two
from qwen35.errors import InputError
from qwen35.generation import Generation
from qwen35.load import DTYPES, load, locate
from qwen35.paths import PATHS
from qwen35.progress import steps
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from tools.bench import report
from tools.bench.language import HELDOUT


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    parser.add_model()
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    add("--device", default="cpu", metavar="D")
    add("--path", choices=PATHS, default="auto")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto")
    add("--prompt-tokens", type=at_least_one, default=10_000, metavar="T")
    add("--new-tokens", type=at_least_two, default=1_500, metavar="N")
    add("--draft-tokens", type=int, default=3, metavar="K")
    add("--prefill-chunk", type=int, metavar="N", help="default: as many as fit")
    add("--runs", type=at_least_one, default=10, metavar="R")


def ninetieth_percentile(values: Sequence[float], *, more_is_slower: bool) -> float:
    """The 90th percentile: at least 90% of the runs are as good or better."""
    ordered = sorted(values, reverse=not more_is_slower)
    return ordered[math.ceil(0.9 * len(ordered)) - 1]


def main(args: argparse.Namespace) -> int:
    folder = locate(args.model)
    model = load(
        folder, dtype=DTYPES.get(args.dtype), device=args.device, path=args.path,
        kv_cache_dtype=args.kv_cache_dtype,
    )  # fmt: skip
    tokenizer = Tokenizer(folder)
    text = tokenizer.encode(HELDOUT.read_text(encoding="utf-8"))
    if len(text) < args.prompt_tokens:
        raise InputError(f"--prompt-tokens {args.prompt_tokens}; the held-out text has {len(text)}")
    room = len(text) - args.prompt_tokens
    starts = [0, *(room * run // args.runs for run in range(args.runs))]  # the first is not counted
    speeds: list[float] = []
    waits: list[float] = []
    tokens = forwards = 0
    path = ""
    for run, first in enumerate(steps(starts, "runs")):
        generation = Generation(
            model, text[first : first + args.prompt_tokens], args.new_tokens,
            Sampling(vocab=tokenizer.size), frozenset(), args.draft_tokens, args.prefill_chunk,
        )  # fmt: skip
        for _ in generation:
            pass
        path = generation.path
        if run:
            speeds.append(generation.tokens_per_s)
            waits.append(generation.ttft_s)
            tokens += generation.draft.tokens
            forwards += generation.draft.forwards
    rows: list[report.Row] = [
        {
            "name": "tokens/s", "p50": statistics.median(speeds),
            "p90": ninetieth_percentile(speeds, more_is_slower=False),
            "least": min(speeds), "most": max(speeds),
        },
        {
            "name": "first token, s", "p50": statistics.median(waits),
            "p90": ninetieth_percentile(waits, more_is_slower=True),
            "least": min(waits), "most": max(waits),
        },
    ]  # fmt: skip
    names = (
        "prompt_tokens",
        "new_tokens",
        "draft_tokens",
        "prefill_chunk",
        "kv_cache_dtype",
        "runs",
    )
    config: dict[str, object] = {
        "model": args.model,
        "path": path,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    config |= {name: getattr(args, name) for name in names}
    config["tokens_per_forward"] = tokens / forwards if forwards else 1.0
    is_gpu = model.embed_tokens.weight.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if is_gpu else report.device_name()
    report.emit("stream", config, rows, only_json=args.json, device=device)
    return 0
