"""A checkpoint folder of any dialect: its parameters by the model's own names.

The keys of `Checkpoint.entries` are the parameter names of `reference.model.Model`. An entry knows
the format of its numbers, where they are stored, and how to read them.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen35.config import Config, disagreements
from qwen35.errors import InputError
from weights import fp8
from weights.command import UNFINISHED, continuing
from weights.entry import (
    FUSED,
    PLAIN,
    RUN_TIME,
    Entry,
    check_readable,
    entry_of,
    is_run_time_scale,
    owner_of,
    weight_name,
)
from weights.expert_scales import expert_scales, is_unscaled
from weights.quantization import PREFIX, Quantization, compare, name_pattern
from weights.ranks import join_command, open_ranks, rank_folders, rank_of
from weights.shard import Plan
from weights.storage import DTYPE_NAMES, Stored, open_folder, same_values, some

# Buffers that older versions of transformers also stored.
COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
FOREIGN = "in a file that no index lists, and not part of this model"


class Checkpoint:
    """The dialects of Qwen3.5, 3.6 and 3-Next: BF16, FP8 and MXFP4, in one file or in shards.

    config: the shape that `config.json` states.
    document: the content of that file. quantization: its claim about formats.
    is_part: whether the folder has the part of one rank, which must be `rank` of `size`. Then `config`
        has the sizes of that part, and `whole_config` those of the whole model.
    stored: all tensors, by their names in the files.
    entries: all parameters, by their names in the model.
    parts: the names of the parameters in each stored tensor.
    ignored: for each stored tensor that is no part of the text model, the reason.
    problems: lines for a warning, where the files do not agree with their claims.
    notes: lines that are good to know.
    unlisted: the names of tensors from files that no index lists.
    computed: stored buffers that follow from the config.
    is_hollow: whether the files have only headers, so that no numbers can be compared.
    ranks: the folders of all ranks of a group, if the folder holds them (`tools.convert --tp`). It is
        then read as the checkpoint that they were cut from.
    beside: the folder with config.json and the other small files.

    InputError, one line, for a folder that is no such checkpoint, or not a whole one.
    """

    def __init__(
        self, folder: str | Path, *, is_hollow: bool = False, rank: int = 0, size: int = 1
    ) -> None:
        self.folder, self.is_hollow = Path(folder), is_hollow
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder")
        if (self.folder / UNFINISHED).exists():
            raise InputError(f"{self.folder}: an unfinished conversion; {continuing(self.folder)}")
        self.ranks = rank_folders(self.folder)
        self.beside = self.ranks[0] if self.ranks else self.folder
        config_file = self.beside / "config.json"
        self.config = Config.from_file(config_file)
        self.document = json.loads(config_file.read_bytes())
        part = rank_of(self.document, config_file)
        self.is_part, self.whole_config = part is not None and not self.ranks, self.config
        if part is not None and self.is_part:
            held = f"{self.folder}: holds rank {part[0]} of {part[1]}"
            if size == 1:
                raise InputError(
                    f"{held}, but a whole checkpoint is needed here; "
                    f"the ranks are joined by: {join_command(self.folder.parent)}"
                )
            if part != (rank, size):
                raise InputError(f"{held}, and rank {rank} of {size} is read here")
            self.config = Plan(self.config, size).rank_config()
        self.document.pop("tensor_parallel", None)
        try:
            self.quantization = Quantization.from_config(self.document)
        except InputError as error:
            raise InputError(f"{config_file}: {error}") from None
        self.entries: dict[str, Entry] = {}
        self.parts: dict[str, list[str]] = {}
        self.ignored: dict[str, str] = {}
        self.idle: dict[str, Stored] = {}  # name of an unused scale -> the plain weight beside it
        ranks = self.ranks
        opened = open_ranks(ranks, self.config) if ranks else open_folder(self.folder)
        self.listed = {stored.name: stored for stored in opened.listed}
        self.stored = dict(self.listed)
        self.notes: list[str] = []
        self.problems = list(opened.problems)
        self.unlisted: set[str] = set()
        self.computed: list[Stored] = []
        # Tensors of unlisted files with equal names, the first one first.
        self.rivals: list[tuple[Stored, Stored]] = []
        self._merge(opened.unlisted)
        formats: dict[str, str] = {}
        # A foreign format's own tensors say more than its weights' dtypes, so they are checked first.
        for stored in opened.listed:
            if not PREFIX.sub("", stored.name).startswith("visual."):
                check_readable(stored)
        for stored in self.stored.values():
            self._add(stored, formats)
        for name in {entry.scale.name for entry in self.entries.values() if entry.scale}:
            if self.idle.pop(name, None):  # it serves one expert, if not the first one
                del self.ignored[name]
        problems, notes = compare(self.quantization, formats)
        self.problems += [*disagreements(self.document), *problems]
        self.notes += notes

    def copy(self) -> "Checkpoint":
        """A copy with separate entries, ignored tensors, notes and problems."""
        other = copy.copy(self)
        other.entries, other.ignored = dict(self.entries), dict(self.ignored)
        other.notes, other.problems = list(self.notes), list(self.problems)
        return other

    def _merge(self, unlisted: list[Stored]) -> None:
        """Add tensors of files that no index lists, if their names without prefix are new."""
        by_name = {PREFIX.sub("", name): stored for name, stored in self.stored.items()}
        skipped: dict[tuple[str, str], list[str]] = {}
        for stored in unlisted:
            first = by_name.setdefault(PREFIX.sub("", stored.name), stored)
            if first is stored:
                self.stored[stored.name] = stored
                self.unlisted.add(stored.name)
            elif first.name in self.unlisted:
                self.rivals.append((first, stored))
            else:
                skipped.setdefault((stored.file.name, first.file.name), []).append(stored.name)
        self.problems += [
            f"{file}: in no index; not read from it, since {first} has them: {some(names)}"
            for (file, first), names in skipped.items()
        ]

    def _add(self, stored: Stored, formats: dict[str, str]) -> None:
        name = PREFIX.sub("", stored.name)
        if name.startswith("visual."):
            self.ignored[stored.name] = "the vision tower, of which nothing is used"
            return
        if COMPUTED.search(name):
            self.ignored[stored.name] = "computed from the config"
            self.computed.append(stored)
            return
        if is_run_time_scale(stored, self.config):
            self.ignored[stored.name] = "a scale for run time; the weights are exact without it"
            return
        try:
            owner = owner_of(stored.name, self.stored)
            if owner is not None:
                self._check_scale(stored, self.stored[owner])
                return
            whole = self.whole(stored)
            parts = dict(_split(weight_name(name), whole, self.config))
            for part in [part for part in parts if part in self.entries]:
                other = self.entries[part].weight
                where = "" if other.file == stored.file else f" of {other.file.name}"
                raise InputError(
                    f"{part} is given twice, by {other.name}{where} and by {stored.name}"
                )
        except InputError as error:
            if stored.name in self.unlisted:
                self.problems.append(f"{stored.file.name}: {error}; it is not used")
                self.ignored[stored.name] = "in a file that no index lists, and of no use"
                return
            raise InputError(f"{stored.file}: {error}") from None
        module, _, leaf = stored.name.rpartition(".")
        if whole.is_fused_experts:  # config.json speaks of each expert by itself
            prefix = stored.name.removesuffix(name)
            formats |= {prefix + n.removesuffix(".weight"): whole.format for n in parts}
        elif leaf.startswith("weight") and len(whole.shape) == 2 and "embed_tokens" not in name:
            formats[module] = whole.format
        self.parts[stored.name] = list(parts)
        self.entries |= parts

    def _check_scale(self, scale: Stored, weight: Stored) -> None:
        """Ignore the scale of a matrix that is not quantised. transformers writes such a scale, with
        whatever was in memory."""
        if weight.dtype in PLAIN:
            self.ignored[scale.name] = f"{weight.name} is not quantised, so it has no scales"
            self.idle[scale.name] = weight

    def whole(self, stored: Stored) -> Entry:
        """A whole stored tensor as an entry. Scales that the index lists have precedence over those of
        other files."""
        block = self.quantization.block if self.quantization else fp8.BLOCK
        try:
            return entry_of(stored, self.listed, block, self.config.num_experts)
        except InputError:
            if not self.unlisted:
                raise
        return entry_of(stored, self.stored, block, self.config.num_experts)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise InputError unless the entries have the names and shapes of a model's parameters."""
        self._judge_unlisted(expected)
        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise InputError(f"{self.folder}: missing {some(missing)}")
        unknown = [e.stored_as for name, e in self.entries.items() if name not in expected]
        if unknown:
            raise InputError(f"{self.folder}: not part of this model: {some(unknown)}")
        for name, shape in expected.items():
            if self.entries[name].shape != shape:
                raise InputError(
                    f"{self.folder}: {name} has shape {list(self.entries[name].shape)} in the file, "
                    f"the config needs {list(shape)}"
                )

    def _judge_unlisted(self, expected: Container[str]) -> None:
        """Add notes on the tensors of unlisted files that are used, and ignore the other ones.

        InputError if the model needs a tensor that two of these files have with different numbers.
        """
        used: set[str] = set()
        for name, entry in list(self.entries.items()):
            if name in expected:
                used |= {part.name for part in (entry.weight, entry.scale) if part}
            elif entry.stored_as in self.unlisted:
                self.ignored[self.entries.pop(name).stored_as] = FOREIGN
        known = used | self.ignored.keys()
        read: dict[str, list[str]] = {}
        unread: dict[str, list[str]] = {}
        extra = [stored for name, stored in self.stored.items() if name in self.unlisted]
        for first, stored in [*((stored, stored) for stored in extra), *self.rivals]:
            if self.ignored.get(first.name) == FOREIGN or first.name not in known:
                self.ignored[first.name] = FOREIGN
                unread.setdefault(stored.file.name, []).append(stored.name)
            elif first is stored and first.name in used:
                read.setdefault(stored.file.name, []).append(stored.name)
        self.notes += [
            f"{file}: in no index; read from it: {some(names)}" for file, names in read.items()
        ]
        self.problems += [
            f"{file}: in no index; not read from it, as no part of this model: {some(names)}"
            for file, names in unread.items()
        ]
        self._compare_rivals(used)

    def _compare_rivals(self, used: Container[str]) -> None:
        skipped: dict[tuple[str, str], list[str]] = {}
        for first, stored in self.rivals:
            if first.name not in used:
                continue
            skipped.setdefault((stored.file.name, first.file.name), []).append(stored.name)
            is_same = self.is_hollow or (first.dtype == stored.dtype and same_values(first, stored))
            if not is_same:
                this, that = (
                    f"{one.name} in {one.file.name} ({DTYPE_NAMES[one.dtype]} {list(one.shape)})"
                    for one in (stored, first)
                )
                raise InputError(
                    f"{self.folder}: {this} differs from {that}, and no index says which of them is meant"
                )
        lines = self.problems if self.is_hollow else self.notes
        how = "but were not compared with it" if self.is_hollow else "and are the same"
        lines += [
            f"{file}: in no index; not read from it, since {first} has them, {how}: {some(names)}"
            for (file, first), names in skipped.items()
        ]

    @property
    def run_time(self) -> dict[str, Stored]:
        """Run-time scales, such as those of an FP8 cache, by their names without prefix."""
        found = (name for name in self.ignored if RUN_TIME.match(name))
        return {PREFIX.sub("", name): self.stored[name] for name in found}

    def check_idle(self) -> None:
        """Add a problem for unused scales that are not 1. A hollow checkpoint is not checked.

        InputError if the plain weight beside such a scale has only FP8 numbers, as if the scale had
        not been applied.
        """
        kinds: Counter[str] = Counter()
        for name, weight in ({} if self.is_hollow else self.idle).items():
            scale = self.stored[name].read()
            values = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
            if not bool((values.float() != 1).any()):
                continue
            if is_unscaled(weight.read()):
                raise InputError(
                    f"{self.folder}: {weight.name} has dtype {DTYPE_NAMES[weight.dtype]} and holds FP8 "
                    f"numbers (e4m3) to which {name} was not applied"
                )
            kinds[name_pattern(PREFIX.sub("", name))] += 1
        self.problems += [
            f"{pattern} ({count} x): not applied, though it is not 1: the weight beside it is not "
            "quantised"
            for pattern, count in kinds.items()
        ]

    def ignore(self, prefix: str, reason: str) -> None:
        """Remove the entries whose names begin with `prefix`, because the model does not have them."""
        for name in [name for name in self.entries if name.startswith(prefix)]:
            self.ignored[self.entries.pop(name).stored_as] = reason


def _split(name: str, whole: Entry, config: Config) -> Iterable[tuple[str, Entry]]:
    """The parameters in one stored tensor. Fused experts or projections have several."""
    layer, _, leaf = name.rpartition(".experts.")
    if leaf in FUSED and _size(whole, 3)[0] != config.num_experts:
        raise InputError(
            f"{whole.stored_as} has shape {list(whole.shape)}; num_experts = {config.num_experts}"
        )
    if leaf == "gate_up_proj":  # [E, 2I, D]: of each expert the gate's rows, then the up's
        half = whole.shape[1] // 2
        for e in range(config.num_experts):
            expert = f"{layer}.experts.{e}"
            yield f"{expert}.gate_proj.weight", _expert(whole, e, 0, half)
            yield f"{expert}.up_proj.weight", _expert(whole, e, half, half)
    elif leaf == "down_proj":  # [E, D, I]
        for e in range(config.num_experts):
            yield f"{layer}.experts.{e}.down_proj.weight", _expert(whole, e, 0, whole.shape[1])
    elif name.endswith(".in_proj_qkvz.weight"):
        stem = name.removesuffix("_qkvz.weight")
        _size(whole, 2)
        yield f"{stem}_qkv.weight", _part(whole, lambda t: _ungroup(t, config, "qkv"))
        yield f"{stem}_z.weight", _part(whole, lambda t: _ungroup(t, config, "z"))
    elif name.endswith(".in_proj_ba.weight"):
        stem = name.removesuffix("_ba.weight")
        _size(whole, 2)
        yield f"{stem}_b.weight", _part(whole, lambda t: _ungroup(t, config, "b"))
        yield f"{stem}_a.weight", _part(whole, lambda t: _ungroup(t, config, "a"))
    else:
        yield name, whole


def _size(entry: Entry, dims: int) -> tuple[int, ...]:
    if len(entry.shape) != dims:
        raise InputError(
            f"{entry.stored_as} has shape {list(entry.shape)}; {dims} axes were expected"
        )
    return entry.shape


def _expert(whole: Entry, expert: int, first: int, rows: int) -> Entry:
    """Rows first .. first + rows of one expert of a fused tensor, as an entry."""

    def numbers(t: Tensor) -> Tensor:
        return t[expert, first : first + rows]

    if whole.scale is None:
        return _part(whole, numbers)
    E, N, K = whole.shape
    part = range(first, first + rows)
    scales, block = expert_scales(whole.scale, expert, E, (N, K), part, whole.block)
    shape = (rows, K)
    share = rows / (E * N) if E * N else 0.0
    return replace(whole, shape=shape, block=block, slices=(numbers, scales), scale_share=share)


def _part(whole: Entry, view: Callable[[Tensor], Tensor]) -> Entry:
    """A view of a stored tensor as an entry. Its shape is found without reading the tensor."""
    try:
        shape = view(torch.empty(whole.shape, device="meta")).shape
    except RuntimeError:
        raise InputError(
            f"{whole.stored_as} has shape {list(whole.shape)}, which the config's heads do not divide"
        ) from None
    return replace(whole, shape=tuple(shape), view=view)


def _ungroup(packed: Tensor, config: Config, wanted: str) -> Tensor:
    """Return rows of Qwen3-Next's projections in Qwen3.5's order. wanted: "qkv", "z", "b" or "a".

    Qwen3-Next groups its rows by key head: [q, k, v of r heads, z of r heads], or [b of r heads, a of
    r heads], where r = HV / H is the number of value heads of a key head.
    """
    H, D = config.linear_num_key_heads, packed.shape[-1]
    shared = config.linear_num_value_heads // H
    K, V = config.linear_key_head_dim, config.linear_value_head_dim * shared
    sizes = [K, K, V, V] if wanted in ("qkv", "z") else [shared, shared]
    parts = packed.view(H, sum(sizes), D).split(sizes, dim=1)
    chosen = {"qkv": parts[:3], "z": parts[3:], "b": parts[:1], "a": parts[1:]}[wanted]
    return torch.cat([part.reshape(-1, D) for part in chosen])
