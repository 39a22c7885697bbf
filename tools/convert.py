"""`python -m tools.convert SRC DST --to mxfp4|fp8|bf16`: convert a checkpoint, tensor by tensor.

The result is a whole checkpoint, or one folder per rank. The source may be such folders of ranks
too.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from qwen35.cli import SIZE_RULE, Parser, counted, print_json, run, size
from qwen35.errors import InputError
from qwen35.load import COPIES, TINY, lay_out, shapes, text_model, warn_of_problems
from qwen35.progress import Progress
from weights.checkpoint import Checkpoint
from weights.command import SHARD_BYTES, USUAL_WHAT
from weights.convert import convert
from weights.hub import is_hub_id
from weights.output import WHAT, Options
from weights.quantization import PREFIX
from weights.shard import SIZES
from weights.verify import dry_run, verify

# How the report describes each value of `weights.output.To`.
BECOMES = {
    "copy": "copied",
    "mxfp4": "quantised to MXFP4",
    "fp8": "quantised to FP8",
    "bf16": "decoded to BF16",
}


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.convert",
        "Convert a checkpoint to another format, one tensor at a time. The same command continues a "
        "conversion that was stopped.",
    )
    add = parser.add_argument
    add("source", metavar="SRC",
        help="a checkpoint's folder, a hub id, `tiny` (the embedded model), or a folder with the "
        "folders of all ranks, which are then joined; nothing is written there")  # fmt: skip
    add("target", metavar="DST", type=Path, help="a folder that is empty or not there yet")
    add("--to", choices=("mxfp4", "fp8", "bf16"), required=True, help="convert to this format")
    add("--what", choices=WHAT,
        help="convert only the trunk's experts, or all linear layers (default, as published: experts for "
        "mxfp4, all-linear for fp8)")  # fmt: skip
    add("--activations", choices=("mxfp4", "bf16"),
        help="with --to mxfp4: say in config.json that activations are in mxfp4 too, as AMD's "
        "checkpoints do, or that only weights are quantised (default: mxfp4)")  # fmt: skip
    add("--tp", type=int, choices=SIZES, default=1,
        help="write a folder for each of so many ranks (default: 1, one whole checkpoint)")  # fmt: skip
    add("--keep-source", action="store_true",
        help="keep the files of a hub id in its cache; without it each is removed once it is "
        "converted")  # fmt: skip
    add("--shard-bytes", type=size, default=SHARD_BYTES, metavar="N",
        help=f"write files of at most N bytes. {SIZE_RULE} (default: 4GB)")  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true",
        help="say what would be written, and write nothing")  # fmt: skip
    mode.add_argument("--verify", action="store_true",
        help="compare a finished DST with what SRC gives, bit for bit, and exit with 1 if they "
        "differ")  # fmt: skip
    add("--json", action="store_true", help="print the report as one JSON document")
    return parser


def check(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint's tensors make a model of its config, and give the warnings of
    loading. InputError if they do not."""
    as_a_model = checkpoint.copy()  # unused tensors are set aside in the copy only
    try:
        as_a_model.check_idle()
        as_a_model.check(shapes(lay_out(text_model(as_a_model))))
    finally:
        warn_of_problems(as_a_model, stacklevel=2)
    leave_foreign(checkpoint, as_a_model)


def leave_foreign(checkpoint: Checkpoint, as_a_model: Checkpoint) -> None:
    """Set aside the tensors that a conversion does not copy: those that stand in a file that no
    index lists and are no part of the model. as_a_model: a copy of the checkpoint, checked as a
    model."""
    foreign = checkpoint.unlisted & as_a_model.ignored.keys() - checkpoint.ignored.keys()
    if checkpoint.is_hollow:  # copies were not compared; loading the output compares them
        foreign = {name for name in foreign if PREFIX.sub("", name) not in COPIES}
    checkpoint.ignored |= {name: as_a_model.ignored[name] for name in foreign}


def say_plan(args: argparse.Namespace, plan: dict[str, Any]) -> int:
    """Print what a conversion would write. Returns the exit status."""
    place = next(p for p in (args.target.absolute(), *args.target.absolute().parents) if p.exists())
    document = {
        "source": args.source,
        "target": str(args.target),
        **plan,
        "free_bytes": shutil.disk_usage(place).free,
    }
    if args.json:
        print_json(document)
        return 0
    files, folders = plan["files"], plan["folders"]
    print(f"{args.target}: nothing is written, this is what would be")
    if folders:
        print(f"{len(folders)} folders, {folders[0]} to {folders[-1]}; each of them has")
    for file in files:
        print(f"  {file['file']}  {file['tensors']} tensors, {file['bytes']} bytes")
    print(f"  {', '.join(plan['beside'])}")
    if plan["done"]:
        print(f"{plan['done']} of {len(files)} files are there, of a conversion that was stopped")
    kinds = [f"{count} {BECOMES[to]}" for to, count in plan["parameters"].items()]
    print(f"parameters: {', '.join(kinds)}")
    dtypes = [f"{dtype} {nbytes}" for dtype, nbytes in plan["bytes_by_dtype"].items()]
    ranks = f", of {len(folders)} ranks together" if folders else ""
    print(f"bytes by dtype{ranks}: {', '.join(dtypes)}; together {plan['bytes']}")
    print(f"disk: {plan['disk_bytes']} bytes are needed, {document['free_bytes']} are free")
    return 0


def say_verified(args: argparse.Namespace, source: Path | str, options: Options) -> int:
    """Compare a finished conversion with its source, and print the result. Returns the exit
    status."""
    with Progress("verified", is_bytes=True) as bar:
        found = verify(source, args.target, options, check=check, progress=bar.at)
    if args.json:
        document = {
            "tensors": found.tensors, "bytes": found.nbytes, "difference": found.difference
        }  # fmt: skip
        print_json(document)
    elif found.difference is None:
        print(
            f"{args.target}: {found.tensors} tensors, {found.nbytes} bytes, config.json and the files "
            f"beside it are what {args.source} gives, bit for bit"
        )
    else:
        print(f"{found.difference}; {found.tensors} tensors before it are the same")
    return 0 if found.difference is None else 1


def main(args: argparse.Namespace) -> int:
    if str(args.target) == "tiny":
        raise InputError("DST tiny: this name means the embedded checkpoint wherever one is named")
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
    if args.keep_source and not is_hub:
        raise InputError(f"--keep-source is for the files of a hub id; {args.source} is none")
    what = args.what or USUAL_WHAT[args.to]
    options = Options(args.to, what, args.activations or "mxfp4", args.tp, args.shard_bytes)
    source = args.source if is_hub else folder
    if args.dry_run:
        return say_plan(args, dry_run(source, args.target, options, check))
    if args.verify:
        return say_verified(args, source, options)
    with Progress("converted", is_bytes=True) as bar:
        report = convert(
            source, args.target, options,
            keep_source=args.keep_source, check=check, progress=bar.at,
        )  # fmt: skip
    if args.json:
        print_json(report)
        return 0
    print(f"{counted(report['files'], 'file')}, {report['bytes'] / 1e9:.3f} GB in {args.target}")
    errors = report["errors"]
    if not errors:
        print(f"all tensors are copies: nothing of {args.source} was in another format")
    else:
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
