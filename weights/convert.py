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
from weights.checkpoint import SCALES, UNFINISHED, Checkpoint, Entry, check_scale
from weights.hub import BESIDE, WEIGHTS
from weights.quantization import PREFIX, kind, mxfp4_claim
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
# the shared expert, in_proj_a and in_proj_b, the convolution, embedding and head are not, as in all
# published repositories.
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
class Item:
    """One tensor of the output: `entry` is what it is made of, `name` and `to` what it becomes."""

    name: str
    entry: Entry
    to: Literal["copy", "mxfp4", "bf16"]

    @property
    def files(self) -> list[str]:
        """The source files that hold it: two where its scales lie in the next one."""
        parts = (self.entry.weight, self.entry.scale)
        return list(dict.fromkeys(part.file.name for part in parts if part is not None))

    def outputs(self) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
        """Name, dtype and shape of what is written; elements of the last axis that an entry holds."""
        shape = self.entry.shape
        if self.to == "mxfp4" or (self.entry.format == "mxfp4" and self.to == "copy"):
            *rows, K = shape
            return [
                (self.name, torch.uint8, (*rows, K // 2), 2),
                (f"{self.name}_scale", torch.uint8, (*rows, K // mxfp4.GROUP), mxfp4.GROUP),
            ]
        return [(self.name, torch.bfloat16 if self.to == "bf16" else self.entry.dtype, shape, 1)]


def plan(checkpoint: Checkpoint, options: Options) -> list[Item]:
    """What the output consists of, in the order of the source's files.

    To MXFP4, fused experts are taken apart, and what is quantised but not chosen becomes BF16. What is
    neither is copied as it is, under its own name. InputError where nothing is to be done, or where a
    chosen matrix cannot be cut into groups of 32.
    """
    chosen = WHAT[options.what] if options.to == "mxfp4" else ()
    parts: dict[str, list[tuple[str, Entry]]] = {}
    for name, entry in checkpoint.entries.items():
        parts.setdefault(entry.stored_as, []).append((name, entry))
    items: list[Item] = []
    for stored in checkpoint.stored.values():
        if stored.name in checkpoint.ignored:
            items.append(Item(stored.name, Entry(stored, stored.shape), "copy"))
        elif not stored.name.endswith(SCALES):
            prefix = stored.name.removesuffix(PREFIX.sub("", stored.name))
            whole = checkpoint.whole(stored)
            fused = ".experts." in stored.name and not stored.name.endswith(".weight")
            named = parts[stored.name] if fused else [(PREFIX.sub("", stored.name), whole)]
            module = named[0][0].removesuffix(".weight")
            if not any(fnmatchcase(module, pattern) for pattern in chosen):
                to = "copy" if whole.format == "plain" else "bf16"
                items.append(Item(stored.name, whole, to))
                continue
            for name, entry in named:
                to = "copy" if entry.format == "mxfp4" else "mxfp4"
                items.append(Item(prefix + name, entry, to))
    if options.tp == 1 and all(item.to == "copy" for item in items):
        target = f"{options.to} ({options.what})" if chosen else options.to
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
class Slot:
    """One output tensor of an item in a rank's file: the same place and size for each rank."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of a rank's part
    per: int  # elements of the last axis of the item that one entry stands for

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutputFile:
    """Items of one source file that go into one file (one for each rank), with their slots."""

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


def arrange(items: list[Item], shards: Plan, limit: int) -> list[OutputFile]:
    """Fill files of at most `limit` bytes (or one item) in order; no file takes from two source files
    but for scales. InputError where a rank's part would split a group of 32."""
    files: list[OutputFile] = []
    current: list[tuple[Item, tuple[Slot, ...]]] = []
    size = 0
    for item in items:
        shard = shards.shard(item.name, item.entry.shape, 0)
        slots = tuple(
            Slot(name, dtype, _cut_shape(shard, shape, per, item.name), per)
            for name, dtype, shape, per in item.outputs()
        )
        nbytes = sum(slot.nbytes for slot in slots)
        changes_source = current and current[0][0].files[0] != item.files[0]
        if current and (changes_source or size + nbytes > limit):
            files.append(OutputFile(tuple(current)))
            current, size = [], 0
        current.append((item, slots))
        size += nbytes
    return [*files, OutputFile(tuple(current))]


def _per(shard: Shard, dims: int, per: int) -> int:
    """What one entry stands for along the axis that is cut: entries are packed along the last one."""
    return per if shard.axis == dims - 1 else 1


def _cut_shape(shard: Shard, shape: tuple[int, ...], per: int, name: str) -> tuple[int, ...]:
    try:
        cut = shard.cut(torch.empty(shape, device="meta"), _per(shard, len(shape), per))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return tuple(cut.shape)


# --- the conversion ---------------------------------------------------------------------------------


def convert(
    source: Path | str,
    target: Path,
    options: Options,
    *,
    keep_source: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Convert a folder (a Path), or a hub repository (its name), into the folder `target`.

    progress: called with the bytes of output that are done and their total. keep_source: leave what was
    fetched from the hub in its cache. Returns the report that is also written as conversion.json: the
    relative RMS error of each kind of tensor that was converted, and its worst group.

    InputError where `target` has content, or an unfinished conversion of something else; for bad input
    as `Checkpoint` says, and for weights that are not finite: then nothing is left behind; when the disk
    is full or the hub out of reach: then the same call continues.
    """
    work, finished = target / UNFINISHED, target / FINISHED
    if finished.exists():  # a conversion was killed when all was done but to remove its traces
        shutil.rmtree(finished)
        return next(read_json(report) for report in sorted(target.rglob(REPORT)))
    existed = target.exists()
    if existed and not work.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: there is something already; a conversion overwrites nothing")
    if isinstance(source, Path) and target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target}: lies inside {source}, which is only read")
    with _disk_errors(target), ExitStack() as stack:
        work.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_locked(work / "lock", target))
        try:
            conversion = _Conversion(source, target, options, keep_source, progress)
        except BaseException:
            if not (work / TASK).exists():  # nothing was begun
                _clear(target, keep=existed)
            raise
        try:
            return conversion.run()
        except WeightError:  # the source has to change, so this cannot be continued
            _clear(target, keep=existed)
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
        progress: Callable[[int, int], object],
    ) -> None:
        self.work = target / UNFINISHED
        self.target, self.options, self.progress = target, options, progress
        is_folder = isinstance(source, Path)
        self.source = Folder(source) if is_folder else Hub(source, self.work, keep=keep_source)
        task = {"source": self.source.identity, "options": asdict(options)}
        _compare(target, read_json(self.work / TASK) or task, task)
        self.checkpoint = Checkpoint(self.source.headers)
        self.shards = Plan(self.checkpoint.config, options.tp)
        items = plan(self.checkpoint, options)
        self.files = arrange(items, self.shards, options.shard_bytes)
        ranks = [f"rank-{rank}-of-{options.tp}" for rank in range(options.tp)]
        self.folders = [target / rank for rank in ranks] if options.tp > 1 else [target]
        for left_over in target.rglob(f"*{PARTIAL}"):
            left_over.unlink()
        self._check_space()
        for folder in self.folders:
            folder.mkdir(exist_ok=True)
        write_whole(self.work / TASK, json.dumps(task))

    def run(self) -> dict[str, Any]:
        total = sum(file.nbytes for file in self.files) * self.options.tp
        self.done = 0
        self.opened: dict[str, dict[str, Stored]] = {}
        for number, file in enumerate(self.files):
            if not self._is_done(number):
                self._write(number, file, total)
                later = {name for other in self.files[number + 1 :] for name in other.sources}
                for name in set(self.opened) - later:
                    del self.opened[name]
                    self.source.close(name)
            else:
                self.done += file.nbytes * self.options.tp
                self.progress(self.done, total)
        report = self._report(total)
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

    def _write(self, number: int, file: OutputFile, total: int) -> None:
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
                    shard = self.shards.shard(item.name, item.entry.shape, rank)
                    for tensor, slot in zip(tensors, slots, strict=True):
                        part = shard.cut(tensor, _per(shard, tensor.dim(), slot.per))
                        handle.write(row_major(part))
                        self.done += slot.nbytes
                self.progress(self.done, total)
            for handle in handles:
                handle.flush()
                os.fsync(handle.fileno())
        described = {name: asdict(error) for name, error in errors.items()}
        write_whole(self._errors_of(number), json.dumps(described))
        for partial, final in zip(partials, finals, strict=True):
            partial.replace(final)

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
            errors.setdefault(kind(PREFIX.sub("", item.name)), Rounding()).merge(error)
        return tensors

    def _real(self, stored: Stored) -> Stored:
        """The same tensor in its source file, of which only the header may have been here until now."""
        file = stored.file.name
        if file not in self.opened:
            self.opened[file] = self.source.open(file)
        return self.opened[file][stored.name]

    def _report(self, total: int) -> dict[str, Any]:
        errors: dict[str, Rounding] = {}
        for number in range(len(self.files)):
            for name, described in (read_json(self._errors_of(number)) or {}).items():
                errors.setdefault(name, Rounding()).merge(Rounding(**described))
        return {
            **asdict(self.options),
            "files": len(self.files) * self.options.tp,
            "bytes": total,
            "errors": {name: error.summary() for name, error in errors.items()},
        }

    def _finish(self, folder: Path, rank: int, report: dict[str, Any]) -> None:
        """What stands beside the weights; config.json, without which nothing loads, comes last."""
        for file in self.source.headers.iterdir():
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
        parts: dict[str, list[str]] = {}
        for name, entry in self.checkpoint.entries.items():
            parts.setdefault(entry.stored_as, []).append(name)
        excluded: list[str] = []
        for item, slots in (pair for file in self.files for pair in file.items):
            if len(slots) > 1 or len(item.entry.shape) < 2 or "embed_tokens" in item.name:
                continue
            bare = PREFIX.sub("", item.name)
            fused = ".experts." in item.name and not item.name.endswith(".weight")
            for name in parts[item.entry.stored_as] if fused else [bare]:
                excluded.append(item.name.removesuffix(bare) + name.removesuffix(".weight"))
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
            raise InputError(f"{entry.stored_as}: holds an infinity or a NaN")
        error.add(name, exact, lambda rows: rounded[rows].float())
        return [rounded]
    packed, powers = mxfp4.quantize(exact)
    if (powers > LARGEST_SCALE).any():
        raise InputError(
            f"{entry.stored_as}: holds an infinity, a NaN or a magnitude of 2^127 x 1.75 and more, "
            "which MXFP4 cannot"
        )
    decode = mxfp4.dequantize
    error.add(name, exact, lambda rows: decode(packed[rows], powers[rows], torch.float32))
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


def _clear(target: Path, *, keep: bool) -> None:
    """Take away what a conversion wrote; the folder too, unless it was there before."""
    shutil.rmtree(target)
    if keep:
        target.mkdir()


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
        for partial in target.rglob(f"*{PARTIAL}"):
            partial.unlink(missing_ok=True)
        raise InputError(f"{error.filename or target}: {error.strerror or error}") from None
