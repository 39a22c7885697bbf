"""`python -m tools.inspect MODEL`: describe a checkpoint from its headers alone.

`--prefix-cache DIR` describes the folder of a prefix cache instead (inspect_prefix.py). The figures
per rank are in inspect_ranks.py, and the tree of --nodes is in inspect_nodes.py.
"""

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from qwen35.cache import Cache, DeltaState
from qwen35.cli import Parser, folder_name, print_json, run
from qwen35.config import PUBLISHED, Config, disagreements
from qwen35.defaults import GENERATION, Defaults
from qwen35.errors import InputError
from qwen35.load import TINY, lay_out, shapes, text_model
from qwen35.tokenizer import Tokenizer, end_of_text, read_config
from tools.convert import leave_foreign
from tools.inspect_nodes import describe_nodes, print_nodes
from tools.inspect_prefix import describe_segments, list_folder, print_segments
from tools.inspect_ranks import (
    Kinds,
    conversion_rows,
    converted_kinds,
    describe_conversions,
    describe_rank,
    is_rank_folder,
    planned_kinds,
    print_rank,
    rank_rows,
    stored_kinds,
)
from weights.checkpoint import Checkpoint
from weights.command import UNFINISHED
from weights.entry import Entry
from weights.hub import Repository, is_hub_id
from weights.quantization import name_pattern
from weights.ranks import join_command, rank_folders
from weights.shard import Plan
from weights.storage import DTYPE_NAMES, INDEX, safetensors_files, some

# Files that are fetched from a hub repository, beside the headers of the weights. tokenizer.json is
# large; open_model fetches it only if it is needed.
HEADERS = ("config.json", INDEX, GENERATION, "tokenizer_config.json", "special_tokens_map.json")

# Parts of the model, each with a pattern of parameter names. The first pattern that fits counts.
PARTS = (
    ("MTP", "mtp.*"),
    ("routed experts", "*.mlp.experts.*"),
    ("shared experts", "*.mlp.shared_expert*"),
    ("routers", "*.mlp.gate.*"),
    ("dense MLPs", "*.mlp.*"),
    ("delta nets", "*.linear_attn.*"),
    ("attention", "*.self_attn.*"),
    ("embedding", "embed_tokens.*"),
    ("head", "lm_head.*"),
    ("norms", "*"),
)


@dataclass(frozen=True)
class Group:
    """Parameters of one kind, shape and format, over all layers and experts."""

    name: str  # of one of the parameters
    shape: tuple[int, ...]
    format: str  # "mxfp4", "fp8" or the dtype
    count: int = 0
    nbytes: int = 0  # of all parameters together

    @property
    def parameters(self) -> int:
        return self.count * math.prod(self.shape)

    @property
    def part(self) -> str:
        return next(part for part, pattern in PARTS if fnmatchcase(self.name, pattern))


def build_parser() -> Parser:
    about = (
        "Describe a checkpoint from the headers of its files alone. The exit status is 1 if it has a "
        "problem."
    )
    parser = Parser("python -m tools.inspect", about, computes=False)
    parser.add_model(
        "a folder (config.json alone will do), a hub id, `tiny` (the embedded model), or a published "
        f"size: {', '.join(PUBLISHED)}",
        default=None,
    )
    parser.add_argument(
        "--prefix-cache", type=folder_name, metavar="DIR",
        help="describe the prefix cache in DIR, instead of a MODEL",
    )  # fmt: skip
    parser.add_argument(
        "--nodes", action="store_true",
        help="print the tree of the nodes that loading builds, with their classes, shapes and dtypes, "
        "instead of the tables",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def groups_of(described: Iterable[tuple[Group, int]]) -> list[Group]:
    """Groups of parameters of the same kind. described: for each parameter an empty group and its
    bytes."""
    found: dict[tuple[str, tuple[int, ...], str], Group] = {}
    for one, nbytes in described:
        key = name_pattern(one.name), one.shape, one.format
        group = found.get(key, one)
        found[key] = replace(group, count=group.count + 1, nbytes=group.nbytes + nbytes)
    return list(found.values())


def parameters(groups: list[Group], config: Config) -> dict[str, int]:
    """Numbers of parameters. `active`: those that one token uses in the trunk, without embedding
    and head."""
    by_part: dict[str, int] = {}
    for group in groups:
        by_part[group.part] = by_part.get(group.part, 0) + group.parameters
    mtp, routed = by_part.pop("MTP", 0), by_part.get("routed experts", 0)
    trunk, embedding, head = (
        sum(by_part.values()),
        by_part.get("embedding", 0),
        by_part.get("head", 0),
    )
    hit = routed * config.num_experts_per_tok // config.num_experts if config.num_experts else 0
    active = trunk - routed + hit - embedding - head
    with_head = active + (embedding if config.tie_word_embeddings else head)
    return {
        "trunk": trunk,
        "routed_experts": routed,
        "embedding": embedding,
        "head": head,
        "mtp": mtp,
        "active": active,
        "active_with_head": with_head,
    }


def per_rank(stored: Kinds, config: Config) -> list[dict[str, Any]]:
    """For each TP size the bytes per rank, of weights and per sequence, or why the size does not
    fit."""
    return [
        row if "problem" in row else {**row, **state_bytes(Plan(config, row["tp"]).rank_config())}
        for row in rank_rows(stored)
    ]


def state_bytes(config: Config) -> dict[str, int]:
    """Bytes of the state of one sequence. It is BF16, except the float32 recurrent state
    (`qwen35/cache.py`)."""
    cache = Cache.empty(config, torch.bfloat16, torch.device("meta"), 1)
    states = [state for state in cache.layers if isinstance(state, DeltaState)]
    recurrent = sum(state.recurrent.nbytes for state in states)
    conv = sum(state.conv.nbytes for state in states)
    per_layer = 2 * config.num_key_value_heads * config.head_dim * torch.bfloat16.itemsize
    attention = config.layer_types.count("full_attention")
    return {
        "recurrent_state_bytes": recurrent,
        "conv_state_bytes": conv,
        "kv_bytes_per_token": attention * per_layer,
        "mtp_kv_bytes_per_token": config.mtp_num_hidden_layers * per_layer,
    }


@dataclass(frozen=True)
class Inspected:
    """What is known of a checkpoint. config: of the model that the tensors make. groups: its
    parameters.

    names: how the parameters are stored; empty if only the config is known.
    """

    config: Config
    groups: list[Group]
    names: dict[str, Any]
    problems: list[str]
    notes: list[str]
    ignored: dict[str, str]  # stored tensors that are not used, with the reasons
    defaults: Defaults
    stored: Kinds  # its parameters as stored, for the figures per rank
    converted: list[Kinds]  # its parameters after each conversion that could be made
    checkpoint: Checkpoint | None = None


def inspect_config(config: Config, folder: Path | None = None) -> Inspected:
    """Inspect a model without weights, as if all of it were BF16. folder: its text files, if
    any."""
    named = shapes(lay_out(config))
    groups = groups_of(
        (Group(name, shape, "BF16"), 2 * math.prod(shape)) for name, shape in named.items()
    )
    kinds = planned_kinds(named, config, "the config" if folder is None else str(folder))
    if folder is None:
        defaults = Defaults(stop_ids={number: ["config.json"] for number in config.eos_token_id})
        return Inspected(config, groups, {}, [], [], {}, defaults, *kinds)
    problems = disagreements(read_config(folder / "config.json"))
    defaults = _read_defaults(folder, config, problems)
    return Inspected(config, groups, {}, problems, [], {}, defaults, *kinds)


def _read_defaults(folder: Path, config: Config, problems: list[str]) -> Defaults:
    """The stop tokens and sampling settings of the files. Errors in them are added to
    `problems`."""
    try:
        has_text = (folder / "tokenizer.json").exists()
        tokenizer = Tokenizer(folder) if has_text else None
        defaults = Defaults.of_folder(folder, config, tokenizer)
    except InputError as error:
        problems.append(str(error))
        return Defaults()
    problems += [defaults.warning] if defaults.warning else []
    return defaults


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspected:
    """Inspect a checkpoint. Its problems are errors that keep it from loading, and contradictions
    between its files."""
    config = checkpoint.config
    problems = checkpoint.problems
    to_convert = checkpoint.copy()
    refusal = ""
    try:
        config = text_model(checkpoint)
        checkpoint.check_idle()
        checkpoint.check(shapes(lay_out(config)))
    except InputError as error:
        refusal = str(error)
        problems.append(refusal)
    leave_foreign(to_convert, checkpoint)
    defaults = _read_defaults(checkpoint.beside, config, problems)
    ignored = set(checkpoint.ignored)
    stored = [name for name in checkpoint.stored if name not in ignored]
    vision = [checkpoint.stored[name] for name in checkpoint.ignored if ".visual." in name]
    names = {
        "prefix": next(
            (n[: -len("embed_tokens.weight")] for n in stored if "embed_tokens" in n), ""
        ),
        "experts": _arrangement(stored, mtp=False),
        "mtp_experts": _arrangement(stored, mtp=True),
        "delta_projections": "grouped" if any("in_proj_qkvz" in n for n in stored) else "separate",
        "quantization": checkpoint.quantization and checkpoint.quantization.method,
        "files": len({tensor.file for tensor in checkpoint.stored.values()}),
        "ranks": len(checkpoint.ranks),
        "tensors": len(checkpoint.stored),
        "vision_parameters": sum(math.prod(tensor.shape) for tensor in vision),
        "vision_bytes": sum(tensor.nbytes for tensor in vision),
    }
    groups = groups_of(
        (Group(name, e.shape, _format(e)), e.nbytes) for name, e in checkpoint.entries.items()
    )
    if checkpoint.ranks:
        checkpoint.notes.append(
            f"the folders of {len(checkpoint.ranks)} ranks, read as the checkpoint that was cut; they "
            f"are joined by: {join_command(checkpoint.folder)}"
        )
    return Inspected(
        config, groups, names, problems, checkpoint.notes, checkpoint.ignored, defaults,
        stored_kinds(checkpoint, config), converted_kinds(to_convert, refusal), checkpoint,
    )  # fmt: skip


def _format(entry: Entry) -> str:
    return DTYPE_NAMES[entry.dtype] if entry.format == "plain" else entry.format


def _arrangement(stored: list[str], *, mtp: bool) -> str | None:
    experts = [name for name in stored if ".experts." in name and name.startswith("mtp.") == mtp]
    if not experts:
        return None
    return "fused" if any(name.endswith(".gate_up_proj") for name in experts) else "one by one"


def open_model(model: str) -> Inspected:
    """Inspect MODEL: a folder, `tiny`, a published size or a hub id. Of a hub repository only
    headers and small files are fetched. tokenizer.json is fetched only if no other file has the id
    of the end-of-text token. InputError if MODEL is none of these."""
    if not model:  # which Python takes for the current folder
        raise InputError("model = ''; expected 'tiny', a folder, a hub id or a published size")
    folder = TINY if model == "tiny" else Path(model)
    if not folder.is_dir():
        if model in PUBLISHED:
            return inspect_config(Config.published(model))
        if not is_hub_id(model):
            known = ", ".join(PUBLISHED)
            what = "is a file, no folder" if folder.is_file() else "no such folder"
            raise InputError(f"{model}: {what}, no hub id (owner/name), none of {known}")
        with tempfile.TemporaryDirectory() as headers:
            repository = Repository(model)
            repository.fetch_headers(Path(headers), HEADERS)
            name, number = end_of_text(Path(headers))
            if name is not None and number is None and "tokenizer.json" in repository.sizes:
                repository.fetch("tokenizer.json", Path(headers))
            return _inspect_folder(Path(headers), is_hollow=True)
    return _inspect_folder(folder)


def _inspect_folder(folder: Path, *, is_hollow: bool = False) -> Inspected:
    is_checkpoint = (folder / INDEX).exists() or safetensors_files(folder)
    if is_checkpoint or (folder / UNFINISHED).exists() or rank_folders(folder):
        return inspect_checkpoint(Checkpoint(folder, is_hollow=is_hollow))
    return inspect_config(Config.from_file(folder / "config.json"), folder)


def describe(found: Inspected) -> dict[str, Any]:
    """The document that --json prints."""
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    order = [part for part, _ in PARTS]
    for group in sorted(found.groups, key=lambda group: order.index(group.part)):
        new = {
            "part": group.part,
            "format": group.format,
            "tensors": 0,
            "parameters": 0,
            "bytes": 0,
        }
        row = parts.setdefault((group.part, group.format), new)
        row["tensors"] += group.count
        row["parameters"] += group.parameters
        row["bytes"] += group.nbytes
    return {
        "config": {
            "model_type": found.config.model_type,
            "layers": found.config.num_hidden_layers,
            "hidden_size": found.config.hidden_size,
            "num_experts": found.config.num_experts,
            "num_experts_per_tok": found.config.num_experts_per_tok,
            "context": found.config.max_position_embeddings,
        },
        "names": found.names,
        "parameters": parameters(found.groups, found.config),
        "parts": list(parts.values()),
        "ranks": per_rank(found.stored, found.config),
        "conversions": describe_conversions(found.converted),
        "stop_ids": {str(number): files for number, files in found.defaults.stop_ids.items()},
        "sampling": found.defaults.advice,
        "not_followed": found.defaults.not_followed,
        "ignored": _reasons(found.ignored),
        "notes": found.notes,
        "problems": found.problems,
    }


def _reasons(ignored: dict[str, str]) -> dict[str, dict[str, int]]:
    """For each reason the number of unused tensors of each kind."""
    counted: dict[str, Counter[str]] = {}
    for name, reason in ignored.items():
        counted.setdefault(name_pattern(reason), Counter())[name_pattern(name)] += 1
    return {reason: dict(patterns) for reason, patterns in counted.items()}


def print_document(document: dict[str, Any]) -> None:
    """Print the document as text."""
    config, names, counts = document["config"], document["names"], document["parameters"]
    experts = (
        f", top {config['num_experts_per_tok']} of {config['num_experts']} experts"
        if config["num_experts"]
        else ""
    )
    print(
        f"{config['model_type']}, {config['layers']} layers of width {config['hidden_size']}{experts}"
    )
    if names:
        experts = f"experts {names['experts']}" if names["experts"] else "no experts"
        if names["mtp_experts"]:
            experts += f", the MTP's {names['mtp_experts']}"
        claim = names["quantization"] or "none"
        files = "1 file" if names["files"] == 1 else f"{names['files']} files"
        print(
            f"{names['tensors']} tensors in {files}{' a rank' if names['ranks'] else ''}, "
            f"named {names['prefix']}*; {experts};"
        )
        print(f"delta-net projections {names['delta_projections']}; quantization_config: {claim}")
        if names["vision_parameters"]:
            print(f"vision tower, not used: {_gb(names['vision_bytes'])}")
    else:
        print("no weights here: figures from the config alone, as if all were BF16")
    shown = {name: _billions(count) for name, count in counts.items()}
    print(
        f"trunk {shown['trunk']} parameters, active for a token {shown['active']}, with the head "
        f"{shown['active_with_head']}; MTP {shown['mtp']}"
    )
    print()
    _print_table(
        ["part", "format", "tensors", "parameters", "size"],
        [
            [p["part"], p["format"], str(p["tensors"]), _billions(p["parameters"]), _gb(p["bytes"])]
            for p in document["parts"]
        ],
    )
    print()
    _print_table(
        ["TP", "weights per rank", "delta state", "KV per token", "MTP's KV per token"],
        [
            [str(row["tp"]), f"- {row['problem']}"]
            if "problem" in row
            else [
                str(row["tp"]),
                _gb(row["weight_bytes"]),
                f"{(row['recurrent_state_bytes'] + row['conv_state_bytes']) / 1e6:.3f} MB",
                f"{row['kv_bytes_per_token']} B",
                f"{row['mtp_kv_bytes_per_token']} B",
            ]
            for row in document["ranks"]
        ],
    )
    print()
    rows, reasons = conversion_rows(document, _gb)
    _print_table(["converted --to", *(f"TP {row['tp']}" for row in document["ranks"])], rows)
    for reason in reasons:
        print(reason)
    print()
    stops = (f"{number} ({', '.join(files)})" for number, files in document["stop_ids"].items())
    print(f"end-of-text tokens: {'; '.join(stops) or 'none'}")
    if document["sampling"]:
        advice = ", ".join(f"{name} {value}" for name, value in document["sampling"].items())
        print(f"advised for a conversation: {advice}")
    for reason, patterns in document["ignored"].items():
        kinds = [f"{pattern} ({count} x)" for pattern, count in patterns.items()]
        print(f"not used: {some(kinds)}: {reason}")
    for note in document["notes"]:
        print(f"note: {note}")
    if not document["problems"]:
        print("no problems")
    for problem in document["problems"]:
        print(f"problem: {problem}")


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    whole = [row for row in rows if len(row) == len(header)]
    widths = [max(len(row[i]) for row in [header, *whole]) for i in range(len(header))]
    for row in [header, *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.3f} M"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"


def main(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.prefix_cache is None):
        given = "neither is" if args.model is None else "both are"
        raise InputError(f"one of MODEL and --prefix-cache is expected; {given} given")
    if args.prefix_cache is not None and args.nodes:
        raise InputError("--nodes describes MODEL; --prefix-cache is given")
    if args.prefix_cache is not None:
        listed = list_folder(args.prefix_cache)
        document, show = describe_segments(listed), print_segments
        failed = any(one.damaged for one in listed)
    elif args.nodes:
        found = open_model(args.model)
        document, show = describe_nodes(found.config, found.checkpoint), print_nodes
        failed = bool(found.problems)
    elif is_rank_folder(Path(args.model)):
        document, show = describe_rank(Path(args.model)), print_rank
        failed = bool(document["problems"])
    else:
        document, show = describe(open_model(args.model)), print_document
        failed = bool(document["problems"])
    if args.json:
        print_json(document)
    else:
        show(document)
    return 1 if failed else 0


if __name__ == "__main__":
    run(build_parser(), main)
