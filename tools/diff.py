"""`python -m tools.diff MODEL`: which node differs from the reference, and by how much."""

import argparse
import random
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwen35.cli import Parser, parse_ids, print_json, run
from qwen35.compare.diff import diff
from qwen35.compare.judge import MOST, Report
from qwen35.compare.trace_file import read_trace
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import DTYPES, locate
from qwen35.parallel.ranks import add_ranks, on_ranks
from qwen35.swap import parse_swap
from qwen35.tokenizer import Tokenizer
from tools.report import page
from weights.quantization import PREFIX
from weights.storage import whole

SHOWN = 20  # rows printed for people; --json has all


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.diff",
        "Compare a candidate with the reference, node by node, in units of bfloat16's own error. "
        "Exit status 1 when a node differs.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="the reference: a checkpoint folder, a hub id, or `tiny`")
    candidate = parser.add_argument_group("candidate (default: MODEL itself, in --dtype)")
    candidate.add_argument(
        "--swap", action="append", default=[], metavar="PATTERN=MODULE:CLASS",
        help="replace the nodes that fit; CLASS has from_reference(node); may be repeated",
    )  # fmt: skip
    against = "another checkpoint, a trace, or the same folder in the transformers library"
    candidate.add_argument("--against", metavar="MODEL|TRACE|transformers", help=against)
    candidate.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--ids", metavar="IDS", help="token ids: 1,2,3")
    prompt.add_argument("--random", type=int, metavar="N", help="N random ids (default: 200)")
    add("--seed", type=int, default=0, help="of random ids")
    add("--decode", type=int, default=6, metavar="N", help="of the last ids, decoded (default: 6)")
    add("--mode", choices=("local", "free"), default="local")
    add("--oracle", choices=("float32", "float64"), default="float32")
    add("--layers", metavar="A-B", help="compare these layers only, as in 0-3")
    add("--report", type=Path, metavar="FILE", help="also write a page, as HTML")
    add_ranks(parser)
    add("--json", action="store_true", help="print one JSON document")
    return parser


@torch.inference_mode()
def trace_of_transformers(folder: Path, ids: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The outputs of that library's modules for the same folder, under our names and as our nodes return
    them: its routers have (logits, weights, experts)."""
    try:
        import transformers
    except ImportError:
        raise InputError("transformers is not installed; pip install -e '.[test]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
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


def chosen_stages(text: str | None) -> Callable[[str], bool]:
    if text is None:
        return lambda stage: True
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise InputError(f"--layers {text!r}; expected a number or a range, as in 0-3")
    first, last = int(match[1]), int(match[2] or match[1])
    names = {f"layers.{i}" for i in range(first, last + 1)}
    return lambda stage: stage in names


def prompt_ids(args: argparse.Namespace, folder: Path) -> list[int]:
    if args.ids is not None:
        return parse_ids(args.ids)
    if args.prompt is not None:
        return Tokenizer(folder).encode(args.prompt)
    count = 200 if args.random is None else args.random
    vocabulary = Config.from_file(folder / "config.json").vocab_size
    return random.Random(args.seed).choices(range(vocabulary), k=count)


def document(report: Report, title: str, mode: str) -> dict[str, Any]:
    """What --json prints and --report shows."""
    rows = [{**asdict(row), "pass": row.passed} for row in report.rows]
    for row in rows:
        del row["passed"]
    return {
        "pass": report.passed, "title": title, "mode": mode, "rows": rows,
        "tokens": asdict(report.tokens), "unmatched": report.unmatched,
    }  # fmt: skip


def print_rows(found: dict[str, Any]) -> None:
    rows = found["rows"]
    failing = sum(not row["pass"] for row in rows)
    print(f"{'':4}  {'x bf16':>8}  {'max |d|':>8}  {'rel rms':>8}  node")
    for row in rows[: max(SHOWN, min(failing, 2 * SHOWN))]:
        times = "inf" if row["x_bf16"] >= MOST else f"{row['x_bf16']:.3g}"
        name = row["node"] if row["tensor"] == "output" else f"{row['node']}/{row['tensor']}"
        verdict = "ok" if row["pass"] else "DIFF"
        figures = f"{times:>8}  {row['max_abs']:>8.2e}  {row['rel_rms']:>8.2e}"
        where = f"{name} {row['shape']}, {row['phase']}, worst at {row['worst']}"
        broken = f", {row['nonfinite']} not finite" if row["nonfinite"] else ""
        flips = f", {row['flips']} tokens with other experts" if row["flips"] else ""
        print(f"{verdict:4}  {figures}  {where}{broken}{flips}")
    tokens = found["tokens"]
    if tokens["compared"]:
        first = "" if tokens["first"] is None else f"; the first other one is at {tokens['first']}"
        margin = "" if tokens["margin"] is None else f", logits {tokens['margin']:.3g} apart"
        print(f"most likely tokens: {tokens['equal']} of {tokens['compared']} equal{first}{margin}")
    if found["unmatched"]:
        count, first = len(found["unmatched"]), found["unmatched"][0]
        print(f"not compared, since the candidate has no such output: {count} nodes ({first}, ...)")
    print(f"{failing} of {len(rows)} rows differ" if failing else f"all {len(rows)} rows pass")


def main(args: argparse.Namespace) -> int:
    folder = locate(args.model)
    if args.report and not args.report.parent.is_dir():
        raise InputError(f"{args.report}: {args.report.parent} is not a folder")
    if args.decode < 0:
        raise InputError(f"--decode {args.decode}; expected an integer >= 0")
    is_folder = args.against != "transformers" and not (args.against or "").endswith(".safetensors")
    if args.ranks.size > 1 and not is_folder:
        raise InputError(f"--against {args.against} is not cut over ranks; --tp is {args.tp}")
    candidate: Path | dict[str, Tensor] | None = None
    if args.against == "transformers":
        ids = prompt_ids(args, folder)
        candidate = trace_of_transformers(folder, ids, DTYPES[args.dtype or "bfloat16"])
    elif args.against and args.against.endswith(".safetensors"):
        if args.prompt is not None or args.random is not None or args.swap or args.dtype:
            raise InputError("a trace goes with none of --prompt, --random, --swap and --dtype")
        candidate, ids = read_trace(Path(args.against), folder)
        if args.ids is not None and parse_ids(args.ids) != ids:
            raise InputError(f"{args.against}: traced with ids {ids}, asked for are {args.ids}")
    else:
        candidate = locate(args.against, args.ranks) if args.against else None
        ids = prompt_ids(args, folder)
    swaps = [parse_swap(text) for text in args.swap]
    with tqdm(desc="stages", unit="", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = diff(
            folder, ids, candidate=candidate, swaps=swaps, dtype=DTYPES.get(args.dtype),
            mode=args.mode, oracle_dtype=DTYPES[args.oracle], decode=args.decode,
            stages=chosen_stages(args.layers), progress=progress, ranks=args.ranks,
        )  # fmt: skip
    against = args.against or ", ".join(args.swap) or (args.dtype or "the checkpoint's own dtype")
    if args.ranks.size > 1:
        against += f", over {args.ranks.size} ranks"
    mode = "free" if isinstance(candidate, dict) else args.mode
    title = f"{args.model} against {against}: {mode}, {len(ids)} tokens"
    found = document(report, title, mode)
    if args.report and args.ranks.rank == 0:
        try:
            with whole(args.report) as unfinished:
                unfinished.write_text(page(found), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{args.report}: {error.strerror}") from None
    if args.json:
        print_json(found)
    else:
        print_rows(found)
    return 0 if report.passed else 1


if __name__ == "__main__":
    parser = build_parser()
    run(parser, on_ranks(parser, main))
