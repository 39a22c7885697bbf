"""`python -m tools.trace MODEL (--prompt TEXT | --ids 1,2,3) -o FILE`: save the outputs of nodes.

`--show FILE` prints statistics of such a file instead (trace_show.py).
"""

import argparse
from pathlib import Path

from qwen35.cli import Parser, counted, device, output_file, parse_ids, print_json, run
from qwen35.compare.trace import trace
from qwen35.compare.trace_file import save_trace
from qwen35.errors import InputError
from qwen35.load import DTYPES, load, locate
from qwen35.tokenizer import Tokenizer
from tools import trace_show


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.trace",
        "Write the outputs of a model's nodes to a file, or print what such a file has.",
    )
    add = parser.add_argument
    parser.add_model(default=None)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="trace a pass over the tokens of TEXT")
    prompt.add_argument(
        "--ids", metavar="IDS", help="trace a pass over these token ids, as in 1,2,3"
    )
    prompt.add_argument(
        "--show", type=Path, metavar="FILE",
        help="print statistics of the trace in FILE; no model is loaded",
    )  # fmt: skip
    add("--node", metavar="GLOB",
        help="with --show: print only the nodes whose names fit GLOB, each with a histogram")  # fmt: skip
    add("--pattern", default="*", metavar="GLOB",
        help="take only the nodes whose names fit GLOB, as in 'layers.3.*' (default: *, "
        "all)")  # fmt: skip
    add("--locals", action="store_true", help="also trace the named locals of each node's forward")
    add("--dtype", choices=DTYPES,
        help="compute in this dtype (default: the checkpoint's own)")  # fmt: skip
    add("--device", type=device, metavar="D",
        help="compute on D: cpu, cuda or cuda:N (default: cpu)")  # fmt: skip
    add("-o", "--output", type=output_file, metavar="FILE", help="write the trace to FILE")
    add("--json", action="store_true",
        help="print one JSON document: what was written, or the statistics")  # fmt: skip
    return parser


def main(args: argparse.Namespace) -> int:
    if args.show is not None:
        return _show(args)
    if args.output is None:
        raise InputError("-o FILE is expected beside --prompt or --ids")
    if args.node is not None:
        raise InputError("--node goes with --show; --pattern chooses the nodes of a new trace")
    folder = locate(args.model)
    ids = parse_ids(args.ids) if args.ids is not None else Tokenizer(folder).encode(args.prompt)
    model = load(folder, dtype=DTYPES.get(args.dtype), device=args.device or "cpu")
    outputs = trace(model, ids, args.pattern, named_locals=args.locals)
    save_trace(args.output, outputs, model, ids)
    if args.json:
        shapes = {name: list(output.shape) for name, output in outputs.items()}
        print_json({"file": str(args.output), "ids": ids, "nodes": shapes})
    else:
        print(
            f"{counted(len(outputs), 'tensor')} for {counted(len(ids), 'token')} in {args.output}"
        )
    return 0


def _show(args: argparse.Namespace) -> int:
    others = {"": args.model, "-o ": args.output, "--dtype ": args.dtype, "--device ": args.device}
    given = [f"{name}{value}" for name, value in others.items() if value is not None]
    given += ["--locals"] * args.locals
    if given:
        raise InputError(f"--show reads a file and loads no model; {given[0]} is given")
    pattern = args.node or args.pattern
    trace_show.show(args.show, pattern, histograms=args.node is not None, as_json=args.json)
    return 0


if __name__ == "__main__":
    run(build_parser(), main)
