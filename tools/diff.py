"""`python -m tools.diff MODEL`: find the nodes that differ from the reference, and by how much."""

import argparse
import random
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.cli import (
    CHECKPOINT,
    Parser,
    at_least_one,
    at_least_zero,
    counted,
    device,
    output_file,
    parse_ids,
    print_json,
    run,
)
from qwen35.compare.diff import diff
from qwen35.compare.judge import MODES, Report, table
from qwen35.compare.trace_file import read_trace
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import DTYPES, locate
from qwen35.parallel.ranks import add_ranks, on_ranks
from qwen35.progress import Progress
from qwen35.swap import parse_swap
from qwen35.tokenizer import Tokenizer
from tools.environment import environment
from tools.peer import in_transformers
from tools.report import page
from weights.quantization import PREFIX
from weights.storage import whole

DECODED = 6  # default of --decode
SHOWN = 20  # printed rows; up to twice as many if more of them fail; --json has all
LISTED = 8  # printed names of nodes, per class
FACTS = ("qwen35", "torch", "triton", "python", "system", "processor", "GPU")  # of `environment`


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.diff",
        "Compare a candidate with the reference, node by node, in units of bfloat16's own error. The "
        "exit status is 1 if a node differs.",
    )
    add = parser.add_argument
    parser.add_model(f"the reference: {CHECKPOINT}")
    candidate = parser.add_argument_group("candidate (default: MODEL itself, in --dtype)")
    candidate.add_argument(
        "--swap", action="append", default=[], metavar="PATTERN=MODULE:CLASS",
        help="replace the nodes whose names fit PATTERN by CLASS of MODULE or of FILE.py, which has "
        "from_reference(node); may be given more than once",
    )  # fmt: skip
    candidate.add_argument(
        "--against", metavar="MODEL|TRACE|transformers",
        help="compare with another checkpoint, with a trace that tools.trace has written, or with the "
        "transformers library on the same folder",
    )  # fmt: skip
    candidate.add_argument(
        "--dtype", choices=DTYPES,
        help="compute the candidate in this dtype (default: the checkpoint's own; bfloat16 for "
        "transformers)",
    )  # fmt: skip
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="compare over the tokens of TEXT")
    prompt.add_argument("--ids", metavar="IDS", help="compare over these token ids, as in 1,2,3")
    prompt.add_argument(
        "--random", type=at_least_one, metavar="N", help="compare over N random ids (default: 200)"
    )
    add("--seed", type=int, metavar="S",
        help="draw the random ids with the seed S (default: 0)")  # fmt: skip
    add("--decode", type=at_least_zero, metavar="N",
        help="decode the last N ids one by one; those before them are the prompt (default: "
        "6)")  # fmt: skip
    add("--mode", choices=MODES,
        help="local: give every node the reference's inputs; free: give it those of its own side, as is "
        "always done with a trace or transformers (default: local)")  # fmt: skip
    add("--oracle", choices=("float32", "float64"), default="float32",
        help="compute the reference that all are compared with in this dtype (default: "
        "float32)")  # fmt: skip
    add("--device", type=device, default="cpu", metavar="D",
        help="compute all sides on D: cpu, cuda or cuda:N (default: cpu)")  # fmt: skip
    add("--layers", metavar="A-B",
        help="compare only the layers A to B, counted from 0 (default: everything)")  # fmt: skip
    add(
        "--report",
        type=output_file,
        metavar="FILE",
        help="also write the report to FILE, as an HTML page",
    )
    add_ranks(parser)
    add("--json", action="store_true", help="print one JSON document")
    return parser


@torch.inference_mode()
def trace_of_transformers(folder: Path, ids: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The outputs of the modules of the transformers library for the same folder, by our node
    names.

    Its routers return (logits, weights, experts); here they are stored as ours: experts, weights.
    """
    model = in_transformers(folder, dtype)
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if name.endswith(".gate"):
            outputs[f"{name}.0"], outputs[f"{name}.1"] = output[2], output[1]
            return
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            outputs[name] = first

    for full, module in model.named_modules():
        name = PREFIX.sub("", full)
        if name:
            module.register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
    model(torch.tensor([ids]))
    return outputs


def chosen_stages(text: str | None, layers: int) -> Callable[[str], bool]:
    """Whether a stage is in `--layers`. layers: how many there are."""
    if text is None:
        return lambda stage: True
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text, re.ASCII)
    if not match:
        raise InputError(f"--layers {text!r}; expected a number or a range, as in 0-3")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < layers:
        raise InputError(f"--layers {text}; expected A-B within the layers 0 to {layers - 1}")
    names = {f"layers.{i}" for i in range(first, last + 1)}
    return lambda stage: stage in names


def prompt_ids(args: argparse.Namespace, folder: Path) -> list[int]:
    if args.ids is not None:
        return parse_ids(args.ids)
    if args.prompt is not None:
        return Tokenizer(folder).encode(args.prompt)
    count = 200 if args.random is None else args.random
    config = Config.from_file(folder / "config.json")
    if count > config.max_position_embeddings:
        raise InputError(
            f"--random {count}; the context has {config.max_position_embeddings} tokens"
        )
    return random.Random(args.seed or 0).choices(range(config.vocab_size), k=count)


def described(args: argparse.Namespace, ids: list[int]) -> dict[str, str]:
    """What is needed to repeat a comparison: the command, the tokens, the versions and the
    machine."""
    found = environment()
    is_drawn = args.ids is None and args.prompt is None and not _is_trace(args.against)
    tokens = (
        f"{len(ids)} random ids of seed {args.seed or 0}" if is_drawn else f"{len(ids)} given ids"
    )
    own = {"command": args.command, "tokens": tokens, "device": str(args.device)}
    return own | {name: found[name] for name in FACTS}


def _is_trace(against: str | None) -> bool:
    return bool(against) and str(against).endswith(".safetensors")


def document(report: Report, title: str, mode: str, made: dict[str, str]) -> dict[str, Any]:
    """The document that --json prints and --report shows. made: the result of `described`."""
    rows = [{**asdict(row), "pass": row.passed} for row in report.rows]
    for row in rows:
        del row["passed"]
    return {
        "pass": report.passed, "title": title, "mode": mode, "rows": rows,
        "tokens": asdict(report.tokens), "unmatched": report.unmatched,
        "swapped": report.swapped, "run": made,
    }  # fmt: skip


def print_rows(report: Report) -> None:
    """Print the worst rows, then the summary lines."""
    failing, every = len(report.failing), len(report.rows)
    shown = min(every, max(SHOWN, min(failing, 2 * SHOWN)))
    print("\n".join(table(report.rows[:shown])))
    tokens = report.tokens
    if tokens.compared:
        first = "" if tokens.first is None else f"; the first other one is at {tokens.first}"
        margin = "" if tokens.margin is None else f", logits {tokens.margin:.3g} apart"
        print(f"most likely tokens: {tokens.equal} of {tokens.compared} equal{first}{margin}")
    for line in swapped_lines(report):
        print(line)
    if report.unmatched:
        count, first = len(report.unmatched), report.unmatched[0]
        print(f"not compared, since the candidate has no such output: {count} nodes ({first}, ...)")
    if shown < failing:
        print(f"{shown} of {failing} failing rows shown; --json and --report have all")
    elif shown < every:
        print(f"{shown} of {every} rows shown, worst first; --json and --report have all")
    print(f"{failing} of {every} rows differ" if failing else f"all {every} rows pass")


def swapped_lines(report: Report) -> list[str]:
    """One line per class that was swapped in, and a line on swapped nodes that no row compares."""
    compared = {row.node for row in report.rows}
    lines: list[str] = []
    for kind in dict.fromkeys(report.swapped.values()):
        nodes = [node for node, other in report.swapped.items() if other == kind]
        lines.append(f"{kind} stands for {_few(nodes)}")
    unseen = [node for node in report.swapped if node not in compared]
    return [*lines, *([f"not compared, though swapped: {_few(unseen)}"] if unseen else [])]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def main(args: argparse.Namespace) -> int:
    folder = locate(args.model)
    is_trace = _is_trace(args.against)
    if args.ranks.size > 1 and (args.against == "transformers" or is_trace):
        raise InputError(f"--against {args.against} is not cut over ranks; --tp is {args.tp}")
    if args.mode == "local" and (args.against == "transformers" or is_trace):
        raise InputError(f"--mode local needs a model; {args.against} is compared in the mode free")
    if args.decode is not None and (args.against == "transformers" or is_trace):
        raise InputError(f"--decode {args.decode}: {args.against} is one pass over all ids")
    if args.seed is not None and (args.prompt is not None or args.ids is not None or is_trace):
        raise InputError(f"--seed {args.seed} draws random ids; the ids are given")
    candidate: Path | dict[str, Tensor] | None = None
    if args.against == "transformers":
        if args.swap:
            raise InputError(f"--swap {args.swap[0]!r} goes with MODEL, not with transformers")
        ids = prompt_ids(args, folder)
        Config.from_file(folder / "config.json").check_prompt(ids, new_tokens=0)
        candidate = trace_of_transformers(folder, ids, DTYPES[args.dtype or "bfloat16"])
    elif is_trace:
        given = {
            "prompt": args.prompt, "random": args.random, "dtype": args.dtype, "swap": args.swap or None,
        }  # fmt: skip
        if others := [f"--{name}" for name, value in given.items() if value is not None]:
            raise InputError(f"{others[0]} is no option beside a trace, {args.against}")
        candidate, ids = read_trace(Path(args.against), folder)
        if args.ids is not None and parse_ids(args.ids) != ids:
            raise InputError(f"{args.against}: traced with ids {ids}, asked for are {args.ids}")
    else:
        candidate = locate(args.against, args.ranks) if args.against else None
        ids = prompt_ids(args, folder)
    layers = Config.from_file(folder / "config.json").num_hidden_layers
    stages = chosen_stages(args.layers, layers)
    swaps = [parse_swap(text) for text in args.swap]
    # transformers has computed in --dtype already.
    dtype = None if isinstance(candidate, dict) else DTYPES.get(args.dtype)
    with Progress("stages") as bar:
        report = diff(
            folder, ids, candidate=candidate, swaps=swaps, dtype=dtype,
            mode=args.mode or "local", oracle_dtype=DTYPES[args.oracle],
            decode=DECODED if args.decode is None else args.decode, stages=stages,
            device=args.device, progress=bar.at, ranks=args.ranks,
        )  # fmt: skip
    against = args.against or ", ".join(args.swap) or (args.dtype or "the checkpoint's own dtype")
    if args.ranks.size > 1:
        against += f", over {args.ranks.size} ranks"
    mode = "free" if isinstance(candidate, dict) else args.mode or "local"
    title = f"{args.model} against {against}: {mode}, {counted(len(ids), 'token')}"
    found = document(report, title, mode, described(args, ids))
    if args.report and args.ranks.rank == 0:
        try:
            with whole(args.report) as unfinished:
                unfinished.write_text(page(found), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{args.report}: {error.strerror}") from None
    if args.json:
        print_json(found)
    else:
        print_rows(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    parser = build_parser()
    run(parser, on_ranks(parser, main))
