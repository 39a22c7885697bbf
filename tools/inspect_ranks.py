"""The figures per rank that `tools.inspect` prints: which tensor-parallel sizes fit a model, before and
after each conversion, and what the folder of one rank holds."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.cli import counted
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.tokenizer import read_config
from weights.checkpoint import Checkpoint
from weights.entry import Entry
from weights.output import Item, Options, check_choice, fit, is_chosen, items_of
from weights.quantization import name_pattern
from weights.ranks import REPORT, folder_names, join_command, rank_of
from weights.shard import SIZES
from weights.storage import INDEX, Stored, open_folder, read_json

TARGETS = (
    Options("bf16"),
    Options("mxfp4", "experts"),
    Options("mxfp4", "all-linear"),
    Options("fp8", "all-linear"),
)


@dataclass(frozen=True)
class Kinds:
    """The parameters of a model or of a conversion: one item of each kind, and their counts.

    config: determines how they are cut. problem: why there is no such conversion; `items` is then
    empty.
    """

    config: Config
    items: list[Item]
    counts: list[int]
    problem: str = ""


def kinds_of(items: Iterable[Item], config: Config) -> Kinds:
    """Group items that are cut alike: those of equal shapes and formats whose names differ only in
    the numbers of layer and expert."""
    first: dict[tuple[object, ...], Item] = {}
    counts: Counter[tuple[object, ...]] = Counter()
    for item in items:
        entry = item.entry
        is_fp8 = item.to == "copy" and entry.format == "fp8"
        scales = (entry.scale_shape, entry.scale_block) if is_fp8 else ()
        kind = (name_pattern(item.name), entry.shape, entry.dtype, item.format, item.to, scales)
        first.setdefault(kind, item)
        counts[kind] += 1
    return Kinds(config, list(first.values()), [counts[kind] for kind in first])


def stored_kinds(checkpoint: Checkpoint, config: Config) -> Kinds:
    """The kinds of a checkpoint as it is stored."""
    copies = (Item(name, entry, "copy") for name, entry in checkpoint.entries.items())
    return kinds_of(copies, config)


def converted_kinds(checkpoint: Checkpoint, problem: str) -> list[Kinds]:
    """The kinds of a checkpoint's conversions to TARGETS. problem: why no conversion is possible,
    or ""."""
    if problem:
        return [Kinds(checkpoint.config, [], [], problem) for _ in TARGETS]
    found = []
    for options in TARGETS:
        try:
            found.append(kinds_of(items_of(checkpoint, options), checkpoint.config))
        except InputError as error:
            found.append(Kinds(checkpoint.config, [], [], str(error)))
    return found


def planned_kinds(
    shapes: dict[str, tuple[int, ...]], config: Config, where: str
) -> tuple[Kinds, list[Kinds]]:
    """The stored and converted kinds of a model of which only the shapes are known. It is taken as
    BF16 with separate experts. where: names the model in errors."""

    def copied(name: str, shape: tuple[int, ...]) -> Item:
        stored = Stored(name, Path("config.json"), torch.bfloat16, shape, _absent)
        return Item(name, Entry(stored, shape), "copy")

    whole = kinds_of((copied(name, shape) for name, shape in shapes.items()), config)
    found = []
    for options in TARGETS:
        items = [
            replace(item, to=options.to) if is_chosen(item.name, options) else item
            for item in whole.items
        ]
        try:
            check_choice(items, options, where)
            found.append(Kinds(config, items, whole.counts))
        except InputError as error:
            found.append(Kinds(config, [], [], str(error)))
    return whole, found


def _absent() -> Tensor:
    raise AssertionError("there is nothing to be read")


def rank_rows(kinds: Kinds) -> list[dict[str, Any]]:
    """For each TP size the bytes of a rank's tensors, or why the model cannot be cut to that
    size."""
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        try:
            if kinds.problem:
                raise InputError(kinds.problem)
            held = fit(kinds.items, kinds.config, size)
        except InputError as error:
            rows.append({"tp": size, "problem": str(error)})
            continue
        nbytes = [sum(slot.nbytes for slot in slots) for _, slots in held]
        total = sum(count * each for count, each in zip(kinds.counts, nbytes, strict=True))
        rows.append({"tp": size, "weight_bytes": total})
    return rows


def describe_conversions(converted: list[Kinds]) -> list[dict[str, Any]]:
    """What `tools.convert --tp` would write, for each of TARGETS."""
    return [
        {"to": options.to, "what": options.what, "ranks": rank_rows(kinds)}
        for options, kinds in zip(TARGETS, converted, strict=True)
    ]


def conversion_rows(document: dict[str, Any], shown: Any) -> tuple[list[list[str]], list[str]]:
    """The rows of a table, and lines that say why a size does not fit, unless `ranks` already says
    so.

    shown: formats a number of bytes.
    """
    known = {row["tp"]: row.get("problem") for row in document["ranks"]}
    rows, reasons = [], {}
    for conversion in document["conversions"]:
        to, what = conversion["to"], conversion["what"]
        name = to if to == "bf16" else f"{to} --what {what}"
        cells = [
            shown(row["weight_bytes"]) if "weight_bytes" in row else "no"
            for row in conversion["ranks"]
        ]
        rows.append([name, *cells])
        for row in conversion["ranks"]:
            if "problem" in row and row["problem"] != known[row["tp"]]:
                reasons.setdefault((name, row["problem"]), []).append(str(row["tp"]))
    lines = [f"no {name} at TP {', '.join(at)}: {why}" for (name, why), at in reasons.items()]
    return rows, lines


# --- one rank's folder ------------------------------------------------------------------------------


def is_rank_folder(folder: Path) -> bool:
    """Whether a folder holds one rank's part of a checkpoint. InputError if its config is
    damaged."""
    file = folder / "config.json"
    return file.is_file() and rank_of(read_config(file), file) is not None


def describe_rank(folder: Path) -> dict[str, Any]:
    """The document that --json prints for the folder of one rank."""
    file = folder / "config.json"
    part = rank_of(read_config(file), file)
    assert part is not None, "the caller has asked"
    rank, size = part
    opened = open_folder(folder)
    parent = folder.resolve().parent
    report = read_json(folder / REPORT) or {}
    return {
        "rank": rank,
        "size": size,
        "written_as": {key: report.get(key) for key in ("to", "what", "activations")},
        "files": len({stored.file for stored in opened.listed}),
        "tensors": len(opened.listed),
        "bytes": sum(stored.nbytes for stored in opened.listed),
        "missing_ranks": [
            name
            for name in folder_names(size)
            if not (parent / name / INDEX).exists() and name != folder.resolve().name
        ],
        "join": join_command(folder.parent if folder.name else parent),
        "problems": opened.problems,
    }


def print_rank(document: dict[str, Any]) -> None:
    """Print the document as text."""
    to, what = document["written_as"]["to"], document["written_as"]["what"]
    written = "" if to is None else f", written by tools.convert --to {to}"
    if to in ("mxfp4", "fp8"):
        written += f" --what {what}"
    print(f"rank {document['rank']} of {document['size']} of a tensor-parallel group{written}")
    print(
        f"{document['tensors']} tensors, {document['bytes']} bytes in "
        f"{counted(document['files'], 'file')}; no checkpoint by itself"
    )
    if document["missing_ranks"]:
        print(f"not beside it: {', '.join(document['missing_ranks'])}")
    print(f"all ranks are joined by: {document['join']}")
    if not document["problems"]:
        print("no problems")
    for problem in document["problems"]:
        print(f"problem: {problem}")
