"""`python -m tools.convert SRC DST --to mxfp4|bf16`: one checkpoint format into another, streaming."""

import argparse
import copy
from pathlib import Path

from qwen35.cli import Parser, print_json, run
from qwen35.errors import InputError
from qwen35.load import COPIES, TINY, lay_out, shapes, text_model, warn_of_problems
from qwen35.progress import Progress
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.hub import is_hub_id
from weights.output import SHARD_BYTES, WHAT, Options
from weights.quantization import PREFIX
from weights.shard import SIZES


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.convert",
        "Convert a checkpoint. A conversion that was stopped is continued by the same command.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="a checkpoint folder, a hub id, or `tiny`; it is only read")
    add("target", metavar="DST", type=Path, help="a folder that is empty or not there yet")
    add("--to", choices=("mxfp4", "fp8", "bf16"), required=True)
    add("--what", choices=WHAT,
        help="default: experts (the trunk's) for mxfp4, all-linear for fp8, as published")  # fmt: skip
    add("--activations", choices=("mxfp4", "bf16"),
        help="what mxfp4's claim says of them (default mxfp4, as AMD's; bf16: weights only)")  # fmt: skip
    add(
        "--tp", type=int, choices=SIZES, default=1, help="ranks: a folder for each (default: whole)"
    )
    add(
        "--keep-source", action="store_true", help="of a hub id: keep what is fetched, in its cache"
    )
    size = f"of an output file, at most (default: {SHARD_BYTES})"
    add("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help=size)
    add("--json", action="store_true", help="print the report as one JSON document")
    return parser


def check(checkpoint: Checkpoint) -> None:
    """Raise InputError unless a checkpoint's tensors make a model of its config; warn as loading does."""
    as_a_model = copy.copy(checkpoint)  # what is no part of it is put aside here only
    as_a_model.entries, as_a_model.ignored = dict(checkpoint.entries), dict(checkpoint.ignored)
    as_a_model.notes, as_a_model.problems = [], list(checkpoint.problems)
    try:
        as_a_model.check_idle()
        as_a_model.check(shapes(lay_out(text_model(as_a_model))))
    finally:
        warn_of_problems(as_a_model, stacklevel=2)
    # What stands in a file that no index lists, and is no part of the model, is not carried along.
    foreign = checkpoint.unlisted & as_a_model.ignored.keys() - checkpoint.ignored.keys()
    if checkpoint.is_hollow:  # these were not compared: loading the output does it
        foreign = {name for name in foreign if PREFIX.sub("", name) not in COPIES}
    checkpoint.ignored |= {name: as_a_model.ignored[name] for name in foreign}


def main(args: argparse.Namespace) -> int:
    if args.shard_bytes < 1:
        raise InputError(f"--shard-bytes {args.shard_bytes}; expected a positive number")
    folder = TINY if args.source == "tiny" else Path(args.source)
    is_hub = not folder.is_dir() and is_hub_id(args.source)
    if args.to == "bf16" and args.what:
        raise InputError(
            f"--what {args.what} goes with --to mxfp4 or fp8; bf16 takes all that is quantised"
        )
    if args.activations and args.to != "mxfp4":
        raise InputError(f"--activations {args.activations} goes with --to mxfp4, not {args.to}")
    what = args.what or ("all-linear" if args.to == "fp8" else "experts")
    options = Options(args.to, what, args.activations or "mxfp4", args.tp, args.shard_bytes)
    with Progress("converted", is_bytes=True) as bar:
        report = convert(
            args.source if is_hub else folder, args.target, options,
            keep_source=args.keep_source, check=check, progress=bar.at,
        )  # fmt: skip
    if args.json:
        print_json(report)
        return 0
    print(f"{report['files']} files, {report['bytes'] / 1e9:.3f} GB in {args.target}")
    errors = report["errors"]
    if errors:
        print("relative RMS  worst group  tensors  kind")
    for kind, error in errors.items():
        relative, worst = error["relative_rms"], error["worst_group"]
        print(f"{relative:>12.3%}  {worst:>11.3%}  {error['tensors']:>7}  {kind}")
    lost_most = max(errors.values(), key=lambda error: error["worst_group"], default=None)
    if lost_most and lost_most["worst_at"]:
        print(f"the worst group is {lost_most['worst_at']}")
    return 0


if __name__ == "__main__":
    run(build_parser(), main)
