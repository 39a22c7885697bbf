"""Checkpoint to checkpoint, tensor by tensor: to MXFP4 in AMD's dialect, or back to BF16; whole, or a
folder for each rank.

What is written is decided from headers, before any weight is read: `plan` says what becomes of each
tensor, `arrange` which file it goes to. A file is written under another name and renamed when it is
whole, `config.json` comes last. So a conversion that was killed continues with the first file that is
missing, and its folder is no checkpoint until then. Progress lies in a sub-folder, UNFINISHED, that is
removed at the end.
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qwen35.errors import InputError
from weights import mxfp4
from weights.checkpoint import UNFINISHED, Checkpoint
from weights.entry import PACKED, Entry, check_scale, owner_of, stem_of
from weights.hub import BESIDE, WEIGHTS
from weights.quantization import PREFIX, mxfp4_claim, name_pattern
from weights.rounding import Rounding
from weights.shard import Plan, Shard
from weights.source import Folder, Hub
from weights.storage import INDEX, PARTIAL, Stored, header, read_json, row_major, write_whole

FINISHED = f"{UNFINISHED}.done"  # what is about to be removed
LARGEST_SCALE = 252  # with the next one 4 and 6 are beyond float32 and bfloat16
TASK = "task.json"
REPORT = "conversion.json"
SHARD_BYTES = 4_000_000_000

# Which linear layers are quantised, by name less the prefix. Whatever is chosen, the router, the gate of
# the shared expert, in_proj_a and in_proj_b (in_proj_ba), the convolution, mtp.fc, embedding, head and
# the vision tower are not, as in all published repositories.
WHAT = {
    "experts": ("layers.*.mlp.experts.*_proj",),
    "all-linear": tuple(
        f"{trunk}layers.*.{module}"
        for trunk in ("", "mtp.")
        for module in (
            "mlp.*_proj",  # dense, shared and routed
            "self_attn.*_proj",
            "linear_attn.in_proj_qkv*",  # Qwen3-Next: in_proj_qkvz
            "linear_attn.in_proj_z",
            "linear_attn.out_proj",
        )
    ),
}


@dataclass(frozen=True)
class Options:
    """to: the format. what: key of WHAT, for MXFP4. tp: ranks. shard_bytes: of a file, at most."""

    to: Literal["mxfp4", "bf16"]
    what: str = "experts"
    tp: int = 1
    shard_bytes: int = SHARD_BYTES


# --- what becomes of each tensor --------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One tensor of the output. per: elements of the last axis that one of its values holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    per: int = 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Item:
    """One parameter of the output: `entry` is what it is made of, `name` and `to` what it becomes."""

    name: str
    entry: Entry
    to: Literal["copy", "mxfp4", "bf16"]

    @property
    def is_mxfp4(self) -> bool:
        return self.to == "mxfp4" or (self.to == "copy" and self.entry.format == "mxfp4")

    @property
    def files(self) -> list[str]:
        """The source files that hold it: two where its scales lie in the next one."""
        parts = (self.entry.weight, self.entry.scale)
        return list(dict.fromkeys(part.file.name for part in parts if part is not None))

    def slots(self) -> tuple[Slot, ...]:
        """What is written for it, whole."""
        shape = self.entry.shape
        if not self.is_mxfp4:
            dtype = torch.bfloat16 if self.to == "bf16" else self.entry.dtype
            return (Slot(self.name, dtype, shape),)
        *rows, K = shape
        return (
            Slot(self.name, torch.uint8, (*rows, K // 2), 2),
            Slot(f"{self.name}_scale", torch.uint8, (*rows, K // mxfp4.GROUP), mxfp4.GROUP),
        )


def items_of(checkpoint: Checkpoint, options: Options) -> list[Item]:
    """What the output consists of, in the order of the source's files.

    To MXFP4: what is chosen is quantised, fused experts one by one; what is MXFP4 already stays so; what
    is FP8 and not chosen becomes BF16. To BF16: all that is quantised. The rest is copied as it is, under
    its own name. InputError where nothing is to be done, or where 32 does not divide a chosen matrix's K.
    """
    chosen = WHAT[options.what] if options.to == "mxfp4" else ()
    ignored = set(checkpoint.ignored)
    items: list[Item] = []
    for stored in checkpoint.stored.values():
        if owner_of(stored.name, checkpoint.stored) is not None:  # written with its weight
            continue
        if stored.name in ignored:
            if stored.name not in checkpoint.unlisted:
                items.append(Item(stored.name, Entry(stored, stored.shape), "copy"))
            continue
        whole = checkpoint.whole(stored)
        own_name = stem_of(stored.name) + ".weight" if stored.name.endswith(PACKED) else stored.name
        bare = PREFIX.sub("", stored.name)
        prefix = stored.name.removesuffix(bare)
        parts = [
            (prefix + name, checkpoint.entries[name]) for name in checkpoint.parts[stored.name]
        ]
        named = parts if whole.is_fused_experts else [(own_name, whole)]
        is_decoded = whole.format == "fp8" or (options.to == "bf16" and whole.format == "mxfp4")
        module = PREFIX.sub("", named[0][0]).removesuffix(".weight")
        if any(fnmatchcase(module, pattern) for pattern in chosen):
            to = "copy" if whole.format == "mxfp4" else "mxfp4"
            items += [Item(name, entry, to) for name, entry in named]
        else:
            # Experts that are quantised in one tensor have scales of their own: they go one by one.
            kept = named if is_decoded else [(own_name, whole)]
            items += [Item(name, entry, "bf16" if is_decoded else "copy") for name, entry in kept]
    target = f"{options.to} ({options.what})" if chosen else options.to
    is_change = any(item.to != "copy" for item in items) or options.tp > 1
    if not is_change or (chosen and not any(item.is_mxfp4 for item in items)):
        raise InputError(f"{checkpoint.folder}: nothing to convert to {target}")
    for item in items:
        if item.to == "mxfp4" and item.entry.shape[-1] % mxfp4.GROUP:
            raise InputError(
                f"{item.name} has shape {list(item.entry.shape)}; MXFP4 needs a multiple of "
                f"{mxfp4.GROUP} on its last axis"
            )
    return items


# --- where it goes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFile:
    """Items of one source file that go into one file (one for each rank), with a rank's slots: the same
    names, sizes and places for all ranks."""

    items: tuple[tuple[Item, tuple[Slot, ...]], ...]

    @property
    def slots(self) -> list[Slot]:
        return [slot for _, slots in self.items for slot in slots]

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(file for item, _ in self.items for file in item.files))


def arrange(items: list[Item], ranks: Plan, limit: int) -> list[OutputFile]:
    """Fill files of at most `limit` bytes (or one item) in order; no file takes from two source files
    but for scales. InputError where a rank's part would split a group of 32."""
    files: list[OutputFile] = []
    current: list[tuple[Item, tuple[Slot, ...]]] = []
    size = 0
    for item in items:
        slots = item.slots()
        if ranks.size > 1:
            shard = ranks.shard(item.name, item.entry.shape, 0)
            slots = tuple(_cut_slot(slot, shard) for slot in slots)
        nbytes = sum(slot.nbytes for slot in slots)
        changes_source = current and current[0][0].files[0] != item.files[0]
        if current and (changes_source or size + nbytes > limit):
            files.append(OutputFile(tuple(current)))
            current, size = [], 0
        current.append((item, slots))
        size += nbytes
    return [*files, OutputFile(tuple(current))]


def _cut_slot(slot: Slot, shard: Shard) -> Slot:
    try:
        cut = _cut(torch.empty(slot.shape, device="meta"), shard, slot.per)
    except InputError as error:
        raise InputError(f"{slot.name}: {error}") from None
    return replace(slot, shape=tuple(cut.shape))


def _cut(tensor: Tensor, shard: Shard, per: int) -> Tensor:
    """A rank's part; values are packed along the last axis, `per` elements in one."""
    return shard.cut(tensor, per if shard.axis == tensor.dim() - 1 else 1)


# --- the conversion ---------------------------------------------------------------------------------


def convert(
    source: Path | str,
    target: Path,
    options: Options,
    *,
    keep_source: bool = False,
    check: Callable[[Checkpoint], object] = lambda checkpoint: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Convert a folder (a Path), or a hub repository (its name), into the folder `target`.

    check: called with the source before anything is written; what it raises ends the conversion.
    progress: called with the bytes of output that are done and their total. keep_source: leave what was
    fetched from the hub in its cache. Returns the report that is also written as conversion.json: the
    relative RMS error of each kind of tensor that was converted, and its worst group.

    InputError where `target` has content, or an unfinished conversion of something else; for bad input
    as `Checkpoint` says, and for weights that are not finite: then nothing is left behind; when the disk
    is full or the hub out of reach: then the same call continues.
    """
    if isinstance(source, Path) and target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target}: lies inside {source}, which is only read")
    with _disk_errors(target), ExitStack() as stack:
        work, finished = target / UNFINISHED, target / FINISHED
        if finished.exists():  # killed when all was done but to remove the traces
            return _finished(target, source, options)
        is_new = not target.exists() or work.exists()
        if not is_new and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target}: there is something already; nothing is overwritten")
        made = [folder for folder in (target, *target.parents) if not folder.exists()]
        work.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_locked(work / "lock", target))
        try:
            conversion = _Conversion(source, target, options, keep_source, check, progress)
        except BaseException:
            if not (work / TASK).exists():  # nothing was begun
                _clear(target, made)
            raise
        try:
            return conversion.run()
        except WeightError:  # the source has to change, so this cannot be continued
            _clear(target, made)
            raise


class WeightError(InputError):
    """A weight of the source that cannot be converted."""


class _Conversion:
    """A conversion that is planned: `run` does what is left of it."""

    def __init__(
        self,
        source: Path | str,
        target: Path,
        options: Options,
        keep_source: bool,
        check: Callable[[Checkpoint], object],
        progress: Callable[[int, int], object],
    ) -> None:
        self.work = target / UNFINISHED
        self.target, self.options, self.progress = target, options, progress
        is_folder = isinstance(source, Path)
        self.source = Folder(source) if is_folder else Hub(source, self.work, keep=keep_source)
        task = {"source": self.source.identity, "options": asdict(options)}
        _compare(target, read_json(self.work / TASK) or task, task)
        self.checkpoint = Checkpoint(self.source.headers)
        check(self.checkpoint)
        self.ranks = Plan(self.checkpoint.config, options.tp)
        items = items_of(self.checkpoint, options)
        self.files = arrange(items, self.ranks, options.shard_bytes)
        # After the last file that needs it, a source file is closed.
        self.last_use = {name: i for i, file in enumerate(self.files) for name in file.sources}
        self.total = sum(file.nbytes for file in self.files) * options.tp
        self.done = 0
        self.opened: dict[str, dict[str, Stored]] = {}
        names = [f"rank-{rank}-of-{options.tp}" for rank in range(options.tp)]
        self.folders = [target / name for name in names] if options.tp > 1 else [target]
        for left_over in target.rglob(f"*{PARTIAL}"):
            left_over.unlink()
        self._check_space()
        for folder in self.folders:
            folder.mkdir(exist_ok=True)
        write_whole(self.work / TASK, json.dumps(task))

    def run(self) -> dict[str, Any]:
        for number, file in enumerate(self.files):
            if self._is_done(number):
                self.done += file.nbytes * self.options.tp
                self.progress(self.done, self.total)
                continue
            self._write(number, file)
            for name in [name for name in self.opened if self.last_use[name] <= number]:
                del self.opened[name]
                self.source.close(name)
        report = self._report()
        for rank, folder in enumerate(self.folders):
            self._finish(folder, rank, report)
        finished = self.work.rename(self.target / FINISHED)  # at once: from here on it is whole
        shutil.rmtree(finished)
        return report

    def _name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{len(self.files):05d}{WEIGHTS}"

    def _errors_of(self, number: int) -> Path:
        return self.work / f"{number + 1:05d}.json"

    def _is_done(self, number: int) -> bool:
        files = [folder / self._name(number) for folder in self.folders]
        return self._errors_of(number).exists() and all(file.exists() for file in files)

    def _check_space(self) -> None:
        left = [file for number, file in enumerate(self.files) if not self._is_done(number)]
        needed = sum(file.nbytes for file in left) * self.options.tp + self.source.room()
        free = shutil.disk_usage(self.target).free
        if needed > free:
            raise InputError(
                f"{self.target}: {needed} bytes are needed, {free} are free on the disk"
            )

    def _write(self, number: int, file: OutputFile) -> None:
        """One output file, for every rank: under another name first, then its errors, then its name."""
        errors: dict[str, Rounding] = {}
        finals = [folder / self._name(number) for folder in self.folders]
        partials = [final.with_name(f"{final.name}{PARTIAL}") for final in finals]
        with ExitStack() as stack:
            handles = [stack.enter_context(partial.open("wb")) for partial in partials]
            for handle in handles:
                handle.write(header([(slot.name, slot.dtype, slot.shape) for slot in file.slots]))
            for item, slots in file.items:
                tensors = self._convert(item, errors)
                for rank, handle in enumerate(handles):
                    shard = self._shard(item, rank)
                    for tensor, slot in zip(tensors, slots, strict=True):
                        handle.write(row_major(_cut(tensor, shard, slot.per)))
                        self.done += slot.nbytes
                self.progress(self.done, self.total)
            for handle in handles:
                handle.flush()
                os.fsync(handle.fileno())
        described = {name: asdict(error) for name, error in errors.items()}
        write_whole(self._errors_of(number), json.dumps(described))
        for partial, final in zip(partials, finals, strict=True):
            partial.replace(final)

    def _shard(self, item: Item, rank: int) -> Shard:
        if self.options.tp == 1:
            return Shard(None)
        return self.ranks.shard(item.name, item.entry.shape, rank)

    def _convert(self, item: Item, errors: dict[str, Rounding]) -> list[Tensor]:
        """The output tensors of an item, whole, in the order of its slots."""
        weight, scale = item.entry.weight, item.entry.scale
        entry = replace(item.entry, weight=self._real(weight), scale=scale and self._real(scale))
        error = Rounding()
        try:
            tensors = convert_tensor(entry, item.name, item.to, error)
        except InputError as bad:
            raise WeightError(str(bad)) from None
        if item.to != "copy":
            errors.setdefault(name_pattern(PREFIX.sub("", item.name)), Rounding()).merge(error)
        return tensors

    def _real(self, stored: Stored) -> Stored:
        """The same tensor in its source file, of which only the header may have been here until now."""
        file = stored.file.name
        if file not in self.opened:
            self.opened[file] = self.source.open(file)
        return self.opened[file][stored.name]

    def _report(self) -> dict[str, Any]:
        errors: dict[str, Rounding] = {}
        for number in range(len(self.files)):
            for name, described in (read_json(self._errors_of(number)) or {}).items():
                errors.setdefault(name, Rounding()).merge(Rounding(**described))
        return {
            **asdict(self.options),
            "files": len(self.files) * self.options.tp,
            "bytes": self.total,
            "errors": {name: error.summary() for name, error in errors.items()},
        }

    def _finish(self, folder: Path, rank: int, report: dict[str, Any]) -> None:
        """What stands beside the weights; config.json, without which nothing loads, comes last."""
        for file in self.source.headers.iterdir():
            if not file.is_file():
                continue
            if file.name.endswith(BESIDE) and file.name not in ("config.json", INDEX, REPORT):
                write_whole(folder / file.name, file.read_bytes())
        weight_map = {
            slot.name: self._name(number)
            for number, file in enumerate(self.files)
            for slot in file.slots
        }
        size = sum(file.nbytes for file in self.files)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(folder / INDEX, json.dumps(index, indent=2))
        write_whole(folder / REPORT, json.dumps(report, indent=2))
        write_whole(folder / "config.json", json.dumps(self._config(rank), indent=2))

    def _config(self, rank: int) -> dict[str, Any]:
        """The source's config.json with what the output claims about its formats."""
        document = dict(self.checkpoint.document)
        document.pop("quantization_config", None)
        if isinstance(text := document.get("text_config"), dict):
            document["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
        if self.options.to == "mxfp4":
            document["quantization_config"] = mxfp4_claim(self._excluded())
        if self.options.tp > 1:
            document["tensor_parallel"] = {"rank": rank, "size": self.options.tp}
        return document

    def _excluded(self) -> list[str]:
        """The modules with a matrix (or a filter) that is not MXFP4, by their names in the file; of
        fused experts each by itself, since engines ask for each."""
        excluded = ["lm_head"]
        for item in (item for file in self.files for item, _ in file.items):
            if item.is_mxfp4 or len(item.entry.shape) < 2 or "embed_tokens" in item.name:
                continue
            bare = PREFIX.sub("", item.name)
            is_fused = item.name == item.entry.stored_as and item.entry.is_fused_experts
            names = self.checkpoint.parts[item.name] if is_fused else [bare]
            prefix = item.name.removesuffix(bare)
            excluded += [prefix + name.removesuffix(".weight") for name in names]
        return list(dict.fromkeys(excluded))


def convert_tensor(
    entry: Entry, name: str, to: Literal["copy", "mxfp4", "bf16"], error: Rounding
) -> list[Tensor]:
    """A parameter in another format: one tensor, or MXFP4's bytes [N, K/2] and scales [N, K/32].

    error: what is lost is added to it, under `name`. InputError for a number that is not finite.
    """
    if to == "copy":
        if entry.scale is None:
            return [entry.read()]
        powers = entry.scale.read().view(torch.uint8)
        check_scale(powers, entry.stored_as)
        return [entry.weight.read(), powers]
    exact = entry.read() if entry.scale is None else entry.read(torch.float32)
    if to == "bf16":
        rounded = exact.bfloat16()
        if not rounded.isfinite().all():
            raise InputError(f"{entry.stored_as}: {name} holds an infinity or a NaN")
        error.add(name, exact.flatten(0, -2), lambda rows: rounded.flatten(0, -2)[rows].float())
        return [rounded]
    packed, powers = mxfp4.quantize(exact)
    if (powers > LARGEST_SCALE).any():
        raise InputError(
            f"{entry.stored_as}: {name} holds an infinity, a NaN or a magnitude of 2^127 x 1.75 "
            "and more, which MXFP4 cannot hold"
        )

    def decoded(rows: slice) -> Tensor:
        return mxfp4.dequantize(packed[rows], powers[rows], torch.float32)

    error.add(name, exact, decoded)
    return [packed, powers]


# --- the folder -------------------------------------------------------------------------------------


def _compare(target: Path, begun: dict[str, Any], task: dict[str, Any]) -> None:
    """Raise InputError naming what is not as when the conversion was begun."""
    for part, now in task.items():
        before = begun[part]
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise InputError(
                    f"{target}: holds an unfinished conversion whose {part} had {key} = "
                    f"{before.get(key)}; now it is {now.get(key)}"
                )


def _clear(target: Path, made: list[Path]) -> None:
    """Take away what a conversion wrote. made: the folders that it had to make, the innermost first."""
    if made:
        shutil.rmtree(made[-1])
        return
    for child in target.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()


def _finished(target: Path, source: Path | str, options: Options) -> dict[str, Any]:
    """Remove the traces of a conversion that is whole; return its report. InputError when it was not the
    one that is asked for."""
    traces = target / FINISHED
    begun = read_json(traces / TASK)
    if begun is not None:  # None: it was being removed already
        now = Folder(source).identity if isinstance(source, Path) else {"repository": source}
        before = {name: value for name, value in begun["source"].items() if name != "commit"}
        task = {"source": now, "options": asdict(options)}
        _compare(target, {"source": before, "options": begun["options"]}, task)
    reports = sorted(target.glob(REPORT)) or sorted(target.glob(f"*/{REPORT}"))
    if not reports:
        raise InputError(f"{traces}: left by a conversion, but there is no {REPORT}; remove it")
    report = read_json(reports[0])
    if any(report[name] != value for name, value in asdict(options).items()):
        raise InputError(f"{target}: holds a finished conversion with other options")
    shutil.rmtree(traces)
    return report


@contextmanager
def _locked(file: Path, target: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{target}: another process is converting into it") from None
        yield


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """A full disk or a folder that is not writable as one line."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if (target / UNFINISHED).exists():  # else what ends so is somebody else's
            for partial in target.rglob(f"*{PARTIAL}"):
                partial.unlink(missing_ok=True)
        raise InputError(f"{error.filename or target}: {error.strerror or error}") from None
