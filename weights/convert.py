"""Checkpoint to checkpoint, tensor by tensor: to MXFP4 in AMD's dialect, to FP8 in Qwen's, or back to
BF16; whole, or a folder for each rank.

What is written is decided from headers, before any weight is read (`weights/output.py`). A file is
written under another name and renamed when it is whole, `config.json` comes last. So a conversion that
was killed continues with the first file that is missing, and its folder is no checkpoint until then.
Progress lies in a sub-folder, UNFINISHED, that is removed at the end.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen35.errors import InputError
from weights.checkpoint import UNFINISHED, Checkpoint
from weights.hub import BESIDE, WEIGHTS
from weights.output import Item, Options, OutputFile, arrange, convert_tensor, cut, items_of
from weights.quantization import PREFIX, fp8_claim, mxfp4_claim, name_pattern
from weights.rounding import Rounding
from weights.shard import Plan, Shard
from weights.source import Folder, Hub
from weights.storage import (
    INDEX,
    PARTIAL,
    Stored,
    header,
    open_file,
    read_json,
    row_major,
    same_values,
    write_whole,
)

FINISHED = f"{UNFINISHED}.done"  # what is about to be removed
TASK = "task.json"
REPORT = "conversion.json"

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
        self.checkpoint = Checkpoint(self.source.headers, is_hollow=self.source.is_hollow)
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
        report, is_tied = self._report(), self._is_tied()
        for rank, folder in enumerate(self.folders):
            self._finish(folder, rank, report, is_tied=is_tied)
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
                        handle.write(row_major(cut(tensor, shard, slot.per)))
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

    def _is_tied(self) -> bool:
        """Whether the config ties the head to the embedding, and the head that is written allows it."""
        if not self.checkpoint.config.tie_word_embeddings:
            return False
        ends = ("embed_tokens.weight", "lm_head.weight")
        written = [
            (self._name(number), slot.name)
            for number, file in enumerate(self.files)
            for slot in file.slots
            if PREFIX.sub("", slot.name) in ends
        ]
        if len(written) < len(ends):
            return True
        pairs = [
            [open_file(folder / file)[name] for file, name in written] for folder in self.folders
        ]
        return all(same_values(one, other) for one, other in pairs)

    def _finish(self, folder: Path, rank: int, report: dict[str, Any], *, is_tied: bool) -> None:
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
        write_whole(folder / "config.json", json.dumps(self._config(rank, is_tied), indent=2))

    def _config(self, rank: int, is_tied: bool) -> dict[str, Any]:
        """The source's config.json with what the output claims about its formats and its head."""
        document = dict(self.checkpoint.document)
        document.pop("quantization_config", None)
        if isinstance(text := document.get("text_config"), dict):
            document["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
        if self.checkpoint.config.tie_word_embeddings and not is_tied:
            document["tie_word_embeddings"] = False
            if "tie_word_embeddings" in document.get("text_config", {}):
                document["text_config"]["tie_word_embeddings"] = False
        if self.options.to == "mxfp4":
            claim = mxfp4_claim(self._excluded(), self.options.activations)
            document["quantization_config"] = claim
        elif self.options.to == "fp8":
            document["quantization_config"] = fp8_claim(self._excluded())
        if self.options.tp > 1:
            document["tensor_parallel"] = {"rank": rank, "size": self.options.tp}
        return document

    def _excluded(self) -> list[str]:
        """The modules with a matrix (or a filter) that is not quantised, by their names in the file; of
        fused experts each by itself, since engines ask for each."""
        excluded = ["lm_head"]
        for item in (item for file in self.files for item, _ in file.items):
            is_quantised = item.format == self.options.to
            if is_quantised or len(item.entry.shape) < 2 or "embed_tokens" in item.name:
                continue
            bare = PREFIX.sub("", item.name)
            if bare in self.checkpoint.run_time:
                continue
            is_fused = item.name == item.entry.stored_as and item.entry.is_fused_experts
            names = self.checkpoint.parts[item.name] if is_fused else [bare]
            prefix = item.name.removesuffix(bare)
            excluded += [prefix + name.removesuffix(".weight") for name in names]
        return list(dict.fromkeys(excluded))


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
    with file.open("w", encoding="utf-8") as handle:
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
