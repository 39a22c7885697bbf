"""Measure what bitwise exactness costs on the reference path.

The reference pads matrix products to fixed numbers of rows. It is compared with the same model
without padding, which is faster, but whose bits depend on the drafting depth and the prefill chunk.
Prefill, and decode without drafts and with three, run the embedded model in one process, in turn.
"""

import argparse
from collections.abc import Callable
from unittest import mock

import torch

import reference.linear
import reference.moe
from qwen35.cli import Parser, at_least_one
from qwen35.config import Config
from qwen35.generation import Generation, prefill
from qwen35.load import DTYPES, TINY, load
from qwen35.progress import steps
from qwen35.sampling import Sampling
from tools.bench import report


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="bfloat16",
        help="compute in this dtype (default: bfloat16)")  # fmt: skip
    add("--prompt-tokens", type=at_least_one, default=2048, metavar="N",
        help="time the prefill of N tokens (default: 2048)")  # fmt: skip
    add("--new-tokens", type=at_least_one, default=48, metavar="N",
        help="time decoding of N tokens (default: 48)")  # fmt: skip
    add("--repeats", type=at_least_one, default=7, metavar="R",
        help="time each of them R times (default: 7)")  # fmt: skip
    parser.set_defaults(threads=2)


def unpadded(run: Callable[[], object]) -> Callable[[], object]:
    """A function that calls `run` without the padding of products."""

    def go() -> None:
        with (
            mock.patch.object(reference.linear, "row_tile", lambda rows: rows),
            mock.patch.object(reference.moe, "row_tile", lambda rows: 1),
        ):
            run()

    return go


def main(args: argparse.Namespace) -> int:
    config = Config.from_file(TINY / "config.json")
    ids = [i % 1000 for i in range(min(args.prompt_tokens, config.max_position_embeddings + 1))]
    config.check_prompt(ids, new_tokens=0)
    config.check_prompt(ids[:4], args.new_tokens)
    model = load(TINY, dtype=DTYPES[args.dtype])

    def decode(depth: int) -> None:
        result = Generation(model, ids[:4], args.new_tokens, Sampling(), frozenset(), depth)
        for _ in result:
            pass

    @torch.inference_mode()
    def prompt() -> None:
        prefill(model, ids, model.new_cache(), chunk=args.prompt_tokens, draft=False)

    ways: dict[str, Callable[[], object]] = {
        f"prefill of {args.prompt_tokens} tokens": prompt,
        f"{args.new_tokens} tokens, no drafts": lambda: decode(0),
        f"{args.new_tokens} tokens, three drafts": lambda: decode(3),
    }
    rows: list[report.Row] = []
    for name, run in steps(ways.items(), "measurements"):
        seconds = report.alternate({"exact": run, "unpadded": unpadded(run)}, args.repeats)
        for path, taken in seconds.items():
            rows.append({"what": name, "products": path} | report.spread(taken))
        rows[-2]["times_unpadded"] = rows[-2]["median_ms"] / rows[-1]["median_ms"]
    described = {"dtype": args.dtype, "threads": args.threads, "repeats": args.repeats}
    report.emit("exactness", described, rows, only_json=args.json)
    return 0
