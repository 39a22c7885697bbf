"""Measure the cost of tracing: a traced pass beside a plain one, and the memory of tools.diff.

The passes run the embedded model in one process, in turn. The memory is that of a process that
compares a synthetic checkpoint with itself, for several numbers of layers. The feed-forward weights
of this checkpoint are holes in a sparse file.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from qwen35.cli import Parser, at_least_one
from qwen35.compare.trace import trace
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import TINY, load
from qwen35.progress import steps
from tools.bench import report
from tools.bench.mapped import write_sparse

MOST_LAYERS, MOST_INTERMEDIATE = 1_000, 1_000_000  # the sparse file then has up to 6 TB


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--lengths", type=at_least_one, nargs="+", default=[4, 64, 512, 2048], metavar="N",
        help="trace passes over N tokens (default: 4 64 512 2048)")  # fmt: skip
    add("--layers", type=at_least_one, nargs="*", default=[4, 40], metavar="N",
        help="compare synthetic checkpoints of N layers; without a number none is compared "
        "(default: 4 40)")  # fmt: skip
    add("--intermediate", type=at_least_one, default=8192, metavar="I",
        help="let their feed-forwards have an intermediate size of I (default: 8192)")  # fmt: skip
    add("--repeats", type=at_least_one, default=21, metavar="R",
        help="time each pass R times (default: 21)")  # fmt: skip
    parser.set_defaults(threads=1)


def tracing(lengths: list[int], repeats: int) -> list[report.Row]:
    """Time plain and traced passes through the trunk, the head and the MTP head."""
    model = load(TINY)

    @torch.inference_mode()
    def plain(ids: list[int]) -> None:
        tokens, cache = torch.tensor([ids]), model.new_cache()
        hidden = model(tokens, cache)
        model.lm_head(hidden)
        model.draft(tokens[:, 1:], hidden[:, :-1], cache)

    rows: list[report.Row] = []
    for length in steps(lengths, "lengths"):
        ids = [i % 1000 for i in range(length)]
        runs = {"plain": lambda ids=ids: plain(ids), "traced": lambda ids=ids: trace(model, ids)}
        seconds = report.alternate(runs, repeats)
        of_pairs = [t / p for p, t in zip(seconds["plain"], seconds["traced"], strict=True)]
        for name, taken in seconds.items():
            rows.append({"pass": name, "tokens": length} | report.spread(taken))
        rows[-1]["of_medians"] = rows[-1]["median_ms"] / rows[-2]["median_ms"]
        rows[-1]["of_minima"] = rows[-1]["min_ms"] / rows[-2]["min_ms"]
        rows[-1]["median_of_pairs"] = statistics.median(of_pairs)
    return rows


def layered_config(layers: int, intermediate: int) -> dict[str, Any]:
    """The config of a dense model. Almost all weights of its layers are in the feed-forwards."""
    return {
        "model_type": "qwen3_5_text", "vocab_size": 512, "hidden_size": 512,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "intermediate_size": intermediate,
        "mtp_num_hidden_layers": 0,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }  # fmt: skip


def memory(layers: int, intermediate: int) -> report.Row:
    """Seconds and peak anonymous memory of one run of tools.diff."""
    with tempfile.TemporaryDirectory() as folder:
        config = layered_config(layers, intermediate)
        write_sparse(Path(folder), config, holes=".mlp.")
        taken, peak = report.watch(["tools.diff", folder, "--ids", "1,2,3,4,5", "--decode", "1"])
    layer_mib = 3 * config["hidden_size"] * intermediate * 4 / 2**20
    return {
        "pass": "tools.diff", "layers": layers, "layer_mib_float32": layer_mib,
        "seconds": taken, "anonymous_mib": peak / 2**20,
    }  # fmt: skip


def main(args: argparse.Namespace) -> int:
    context = Config.from_file(TINY / "config.json").max_position_embeddings
    for length in args.lengths:
        if length > context:
            raise InputError(
                f"--lengths {length}; the embedded model's context has {context} tokens"
            )
    for option, size, most in (
        ("layers", max(args.layers, default=1), MOST_LAYERS),
        ("intermediate", args.intermediate, MOST_INTERMEDIATE),
    ):
        if size > most:
            raise InputError(f"--{option} {size}; expected at most {most:,}")
    rows = tracing(args.lengths, args.repeats)
    rows += [memory(layers, args.intermediate) for layers in steps(args.layers, "models compared")]
    described = {"repeats": args.repeats, "threads": args.threads}
    report.emit("diff", described, rows, only_json=args.json)
    return 0
