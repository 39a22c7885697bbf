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
from qwen35.cli import Parser, at_least_one, at_least_two, device
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.generation import Generation, check_counts, check_limits
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
    add("--dtype", choices=DTYPES,
        help="compute in this dtype (default: the checkpoint's own)")  # fmt: skip
    add("--device", type=device, default="cpu", metavar="D",
        help="compute on D: cpu, cuda or cuda:N (default: cpu)")  # fmt: skip
    add("--path", choices=PATHS, default="auto",
        help="run the fast path, the reference, or the fast path wherever it can run (default: "
        "auto)")  # fmt: skip
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="store keys and values in the model's dtype (auto) or in e4m3 (fp8) (default: "
        "auto)")  # fmt: skip
    add("--prompt-tokens", type=at_least_one, default=10_000, metavar="T",
        help="let each prompt have T tokens (default: 10,000)")  # fmt: skip
    add("--new-tokens", type=at_least_two, default=1_500, metavar="N",
        help="generate N tokens in each run (default: 1,500)")  # fmt: skip
    add("--draft-tokens", type=int, default=3, metavar="K",
        help="draft K tokens in each round (default: 3)")  # fmt: skip
    add("--prefill-chunk", type=int, metavar="N",
        help="compute N prompt tokens per pass, a multiple of 64 (default: as many as fit)")  # fmt: skip
    add("--runs", type=at_least_one, default=10, metavar="R",
        help="count R runs, after one that is not counted (default: 10)")  # fmt: skip


def ninetieth_percentile(values: Sequence[float], *, more_is_slower: bool) -> float:
    """The 90th percentile: at least 90% of the runs are as good or better."""
    ordered = sorted(values, reverse=not more_is_slower)
    return ordered[math.ceil(0.9 * len(ordered)) - 1]


def main(args: argparse.Namespace) -> int:
    folder = locate(args.model)
    config = Config.from_file(folder / "config.json")
    tokenizer = Tokenizer(folder)
    text = tokenizer.encode(HELDOUT.read_text(encoding="utf-8"))
    if len(text) < args.prompt_tokens:
        raise InputError(f"--prompt-tokens {args.prompt_tokens}; the held-out text has {len(text)}")
    config.check_prompt(text[: args.prompt_tokens], args.new_tokens)
    check_counts(args.new_tokens, args.prefill_chunk, args.draft_tokens)
    check_limits(config, args.draft_tokens, None, None)
    model = load(
        folder, dtype=DTYPES.get(args.dtype), device=args.device, path=args.path,
        kv_cache_dtype=args.kv_cache_dtype,
    )  # fmt: skip
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
            speed = generation.tokens_per_s
            assert speed is not None, "two tokens or more have a decode speed"
            speeds.append(speed)
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
    described: dict[str, object] = {
        "model": args.model,
        "path": path,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    described |= {name: getattr(args, name) for name in names}
    described["tokens_per_forward"] = tokens / forwards
    is_gpu = model.embed_tokens.weight.device.type == "cuda"
    where = torch.cuda.get_device_name(args.device) if is_gpu else report.device_name()
    report.emit("stream", described, rows, only_json=args.json, device=where)
    return 0
