"""The command line of a conversion, and the file that records it while the conversion runs."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights.storage import read_json, using_record

UNFINISHED = ".conversion"  # in a folder that weights/convert.py is still writing
TASK = "task.json"  # in UNFINISHED: what was asked for
SHARD_BYTES = 4_000_000_000  # default for the largest size of an output file
USUAL_WHAT = {"mxfp4": "experts", "fp8": "all-linear", "bf16": "experts"}  # by --to


def command(
    source: object, target: object, options: Mapping[str, Any], *, keep_source: bool = False
) -> str:
    """The command line of a conversion. options: the fields of `weights.output.Options`."""
    words = ["python", "-m", "tools.convert", str(source), str(target), "--to", options["to"]]
    if options["what"] != USUAL_WHAT.get(options["to"]):
        words += ["--what", options["what"]]
    if options["activations"] != "mxfp4":
        words += ["--activations", options["activations"]]
    if options["tp"] != 1:
        words += ["--tp", str(options["tp"])]
    if options["shard_bytes"] != SHARD_BYTES:
        words += ["--shard-bytes", str(options["shard_bytes"])]
    return shlex.join([*words, "--keep-source"] if keep_source else words)


def continuing(target: Path) -> str:
    """Say how to continue the unfinished conversion in a folder: "the same command continues it", with
    the command where it is known."""
    same = "the same command continues it"
    file = target / UNFINISHED / TASK
    task = read_json(file)
    if task is None or "asked" not in task:
        return same
    with using_record(file):
        asked = task["asked"]
        words = command(asked["source"], target, task["options"], keep_source=asked["keep_source"])
    return f"{same}: {words}"
