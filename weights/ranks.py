"""Reads the folders of ranks that `tools.convert --tp N` writes as one whole checkpoint.

A tensor is joined from the ranks' parts when it is read.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.config import Config
from qwen35.config_json import read_object
from qwen35.errors import InputError
from weights.command import UNFINISHED, USUAL_WHAT, command, continuing
from weights.shard import SIZES, Plan, Shard, join
from weights.storage import DTYPE_NAMES, Opened, Stored, open_folder, read_json, some

FOLDER = re.compile(r"rank-(\d+)-of-(\d+)")
REPORT = "conversion.json"  # the report of a conversion, beside its weights
PACKED = (1, 2, 32, 128)  # possible numbers of elements in a stored value, along the axis of a cut


def folder_names(size: int) -> list[str]:
    """The folder names of all ranks, in their order."""
    return [f"rank-{rank}-of-{size}" for rank in range(size)]


def rank_folders(parent: Path) -> list[Path]:
    """The folders of all ranks in `parent`, in their order. Empty if there are none.

    InputError if one is missing, or if they belong to groups of several or unknown sizes. A folder with
    its own config.json is a checkpoint, whatever else is in it.
    """
    if not parent.is_dir() or (parent / "config.json").exists():
        return []
    matches = [FOLDER.fullmatch(child.name) for child in parent.iterdir() if child.is_dir()]
    sizes = sorted({int(match[2]) for match in matches if match})
    if not sizes:
        return []
    if len(sizes) > 1:
        raise InputError(
            f"{parent}: holds the ranks of groups of {' and of '.join(map(str, sizes))}"
        )
    if sizes[0] not in SIZES:
        known = ", ".join(map(str, SIZES))
        raise InputError(
            f"{parent}: holds a rank of {sizes[0]}; known sizes of a group are {known}"
        )
    folders = [parent / name for name in folder_names(sizes[0])]
    missing = [folder.name for folder in folders if not folder.is_dir()]
    if missing:
        raise InputError(
            f"{parent}: holds the folders of {sizes[0]} ranks, but not {some(missing)}"
        )
    return folders


def rank_of(document: Mapping[str, Any], file: Path) -> tuple[int, int] | None:
    """The rank and the number of ranks in a config.json, or None for a whole checkpoint. InputError if
    they are invalid."""
    if (claim := document.get("tensor_parallel")) is None:
        return None
    rank, size = (claim.get("rank"), claim.get("size")) if isinstance(claim, dict) else (None, None)
    if not isinstance(rank, int) or not isinstance(size, int) or not 0 <= rank < size:
        raise InputError(
            f"{file}: tensor_parallel = {claim!r}; expected a rank below a size, both whole numbers"
        )
    return rank, size


def join_command(parent: Path) -> str:
    """The command that joins the ranks in `parent` to one checkpoint, in the same format."""
    asked = {"to": "bf16", "what": USUAL_WHAT["bf16"], "activations": "mxfp4"}
    reports = sorted(parent.glob(f"*/{REPORT}"))
    try:
        written = (read_json(reports[0]) if reports else None) or {}
    except InputError:
        written = {}  # whoever calls this has a better error to report
    known = {key: written[key] for key in asked if isinstance(written.get(key), str)}
    usual = command(parent, "WHOLE", {"tp": 1, "shard_bytes": 0, **asked, **known})
    return usual.removesuffix(" --shard-bytes 0")


def without_config(folder: Path) -> str:
    """An error message: why a folder without config.json is no checkpoint, and how to get one."""
    if (folder / UNFINISHED).exists():
        return f"{folder}: an unfinished conversion; {continuing(folder)}"
    if ranks := rank_folders(folder):
        how = join_command(folder)
        return f"{folder}: holds the folders of {len(ranks)} ranks, which are joined by: {how}"
    return f"{folder / 'config.json'}: no such file"


def open_ranks(folders: list[Path], config: Config) -> Opened:
    """The tensors of all ranks, joined. config: of the whole model.

    InputError if the ranks have different names, or if parts do not fit the plan.
    """
    for rank, folder in enumerate(folders):
        file = folder / "config.json"
        if rank_of(read_object(file), file) != (rank, len(folders)):
            raise InputError(f"{file}: is not that of rank {rank} of {len(folders)}")
    plan = Plan(config, len(folders))
    opened = [open_folder(folder) for folder in folders]
    held = [{stored.name: stored for stored in one.listed} for one in opened]
    for folder, other in zip(folders, held, strict=True):
        if apart := sorted(held[0].keys() ^ other.keys()):
            raise InputError(f"{folder}: holds other tensors than {folders[0].name}: {some(apart)}")
    last: dict[str, Tensor] = {}  # the tensor joined last: its experts are read one after another
    listed = [_joined(plan, [one[name] for one in held], last) for name in held[0]]
    return Opened(listed, [], [problem for one in opened for problem in one.problems])


def _joined(plan: Plan, parts: list[Stored], last: dict[str, Tensor]) -> Stored:
    """One tensor of the whole checkpoint. It has the file of rank 0's part."""
    first = parts[0]
    for part in parts:
        if (part.dtype, part.shape) != (first.dtype, first.shape):
            raise InputError(
                f"{part.file}: {part.name} has {DTYPE_NAMES[part.dtype]} {list(part.shape)}, rank 0 has "
                f"{DTYPE_NAMES[first.dtype]} {list(first.shape)}"
            )
    extent = plan.extent(first.name)
    if extent is None:
        read = _reader(parts, [Shard(None)] * plan.size, 1, last)
        return Stored(first.name, first.file, first.dtype, first.shape, read)
    axis, length = extent
    sizes = [0] * axis + [length]
    shards = [plan.shard(first.name, sizes, rank) for rank in range(plan.size)]
    held = sum(end - start for start, end in shards[0].ranges)
    stored = first.shape[axis] if axis < len(first.shape) else 0
    per = held // stored if stored and held % stored == 0 else 0
    if per not in PACKED:
        raise InputError(
            f"{first.file}: {first.name} has shape {list(first.shape)}; a rank holds {held} elements "
            f"on axis {axis}"
        )
    shape = (*first.shape[:axis], length // per, *first.shape[axis + 1 :])
    read = _reader(parts, shards, per, last)
    return Stored(first.name, first.file, first.dtype, shape, read)


def _reader(
    parts: list[Stored], shards: list[Shard], per: int, last: dict[str, Tensor]
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        name = parts[0].name
        if name not in last:
            tensors = [part.read() for part in parts]
            whole = join(shards, tensors, per)
            for part, shard, tensor in zip(parts, shards, tensors, strict=True):
                again = shard.cut(whole, per)
                if not torch.equal(_bits(again), _bits(tensor)):
                    raise InputError(
                        f"{part.file}: {name} differs from what other ranks hold of the same rows"
                    )
            last.clear()
            last[name] = whole
        return last[name]

    return read


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
