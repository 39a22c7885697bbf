"""Convert a checkpoint tensor by tensor: to MXFP4 in AMD's dialect, to FP8 in Qwen's, or to BF16.

The result is a whole checkpoint, or a folder for each rank. The output is planned from headers,
before any weight is read (`weights/output.py`). A file is written under another name, and renamed
when it is complete. `config.json` is written last. Therefore a conversion that was killed continues
with the first missing file, and its folder is no checkpoint until it is finished. The progress is
recorded in a sub-folder, UNFINISHED, which is removed at the end.
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
from weights.checkpoint import Checkpoint
from weights.command import TASK, UNFINISHED, continuing
from weights.entry import Entry
from weights.outline import Outline
from weights.output import Item, Options, OutputFile, convert_tensor, cut
from weights.quantization import PREFIX, name_pattern
from weights.ranks import REPORT
from weights.rounding import Rounding
from weights.source import Hub, Source, folder_source
from weights.storage import (
    INDEX,
    PARTIAL,
    Stored,
    open_file,
    read_json,
    row_major,
    using_record,
    write_whole,
)

FINISHED = f"{UNFINISHED}.done"  # the name of UNFINISHED while it is removed

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

    keep_source: leave the files that were fetched from the hub in its cache.
    check: called with the source before anything is written; its exceptions end the conversion.
    progress: called with the bytes of output that are done, and their total.

    Returns the report that is also written as conversion.json: the relative RMS error of each kind of
    tensor that was converted, and its worst group.

    InputError if `target` has other content, or an unfinished conversion of something else. InputError
    for bad input as in `Checkpoint`, and for weights that are not finite; then nothing is left behind.
    InputError when the disk is full or the hub out of reach; then the same call continues.
    """
    if isinstance(source, Path) and target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target}: lies inside {source}, which is only read")
    with _disk_errors(target), ExitStack() as stack:
        work, finished = target / UNFINISHED, target / FINISHED
        if finished.exists():  # a conversion that was killed while it removed its records
            return _finished(target, source, options)
        check_target(target)
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


def check_target(target: Path) -> None:
    """InputError if a conversion into this folder can neither begin nor continue."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is there already as a file; expected an empty folder or none")
    is_new = not target.exists() or (target / UNFINISHED).exists()
    if not is_new and any(target.iterdir()):
        raise InputError(f"{target}: is there already and not empty; nothing is overwritten")


class WeightError(InputError):
    """A weight of the source that cannot be converted."""


class _Conversion:
    """A planned conversion. `run` writes the files that are not there yet."""

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
        self.source: Source = (
            folder_source(source) if is_folder else Hub(source, self.work, keep=keep_source)
        )
        task = {"source": self.source.identity, "options": asdict(options)}
        with using_record(self.work / TASK):
            _compare(target, read_json(self.work / TASK) or task, task)
        self.outline = Outline(self.source, options, check)
        self.files = self.outline.files
        # After the last file that needs it, a source file is closed.
        self.last_use = {name: i for i, file in enumerate(self.files) for name in file.sources}
        self.total = self.outline.total
        self.done = 0
        self.opened: dict[str, dict[str, Stored]] = {}
        self.folders = [target / folder for folder in self.outline.folders]
        for left_over in target.rglob(f"*{PARTIAL}"):
            left_over.unlink()
        self._check_space()
        for folder in self.folders:
            folder.mkdir(exist_ok=True)
        asked = {"source": self.source.name, "keep_source": keep_source}
        write_whole(self.work / TASK, json.dumps({**task, "asked": asked}))

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
        files = self.outline.file_names()

        def written(folder: str, name: str) -> Stored:
            return open_file(self.target / folder / files[name])[name]

        report, is_tied = self._report(), self.outline.is_tied(written)
        for rank, folder in enumerate(self.folders):
            self._finish(folder, rank, report, is_tied=is_tied)
        finished = self.work.rename(self.target / FINISHED)  # now it is complete
        shutil.rmtree(finished)
        return report

    def _is_done(self, number: int) -> bool:
        return is_done(self.target, self.outline, number)

    def _errors_of(self, number: int) -> Path:
        return errors_of(self.target, number)

    def _check_space(self) -> None:
        left = [number for number in range(len(self.files)) if not self._is_done(number)]
        needed, free = self.outline.room(left), shutil.disk_usage(self.target).free
        if needed > free:
            then = continuing(self.target) if (self.work / TASK).exists() else "nothing is written"
            raise InputError(
                f"{self.target}: {needed} bytes are needed, {free} are free on the disk; {then}"
            )

    def _write(self, number: int, file: OutputFile) -> None:
        """Write one output file for every rank under another name, note its errors, then rename it."""
        errors: dict[str, Rounding] = {}
        finals = [folder / self.outline.name(number) for folder in self.folders]
        partials = [final.with_name(f"{final.name}{PARTIAL}") for final in finals]
        with ExitStack() as stack:
            handles = [stack.enter_context(partial.open("wb")) for partial in partials]
            for handle in handles:
                handle.write(self.outline.header(file))
            for item, slots in file.items:
                tensors = self._convert(item, errors)
                for rank, handle in enumerate(handles):
                    shard = self.outline.shard(item, rank)
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

    def _convert(self, item: Item, errors: dict[str, Rounding]) -> list[Tensor]:
        """The output tensors of an item, whole, in the order of its slots."""
        entry = with_stored(item.entry, self._real)
        error = Rounding()
        try:
            tensors = convert_tensor(entry, item.name, item.to, error)
        except InputError as bad:
            raise WeightError(str(bad)) from None
        if item.to != "copy":
            errors.setdefault(name_pattern(PREFIX.sub("", item.name)), Rounding()).merge(error)
        return tensors

    def _real(self, stored: Stored) -> Stored:
        """The same tensor in its source file, which is opened (and downloaded) if it is not yet."""
        file = stored.file.name
        if file not in self.opened:
            self.opened[file] = self.source.open(file)
        return self.opened[file][stored.name]

    def _report(self) -> dict[str, Any]:
        errors: dict[str, Rounding] = {}
        for number in range(len(self.files)):
            file = self._errors_of(number)
            with using_record(file):
                for name, described in (read_json(file) or {}).items():
                    errors.setdefault(name, Rounding()).merge(Rounding(**described))
        return {
            **asdict(self.options),
            "files": len(self.files) * self.options.tp,
            "bytes": self.total,
            "errors": {name: error.summary() for name, error in errors.items()},
        }

    def _finish(self, folder: Path, rank: int, report: dict[str, Any], *, is_tied: bool) -> None:
        """Write the files beside the weights. config.json comes last, because nothing loads without
        it."""
        for file in self.outline.beside:
            write_whole(folder / file.name, file.read_bytes())
        write_whole(folder / INDEX, self.outline.index())
        write_whole(folder / REPORT, json.dumps(report, indent=2))
        config = self.outline.config(rank, is_tied=is_tied)
        write_whole(folder / "config.json", json.dumps(config, indent=2))


def with_stored(entry: Entry, real: Callable[[Stored], Stored]) -> Entry:
    """An entry whose stored tensors are replaced by `real`."""
    scale = entry.scale
    return replace(entry, weight=real(entry.weight), scale=real(scale) if scale else None)


# --- the folder -------------------------------------------------------------------------------------


def errors_of(target: Path, number: int) -> Path:
    """The file with the rounding errors of an output file. It exists while the conversion is
    unfinished."""
    return target / UNFINISHED / f"{number + 1:05d}.json"


def is_done(target: Path, outline: Outline, number: int) -> bool:
    """Whether an output file of an unfinished conversion is complete on every rank."""
    files = [target / folder / outline.name(number) for folder in outline.folders]
    return errors_of(target, number).exists() and all(file.exists() for file in files)


def _compare(target: Path, begun: dict[str, Any], task: dict[str, Any]) -> None:
    """InputError, with the first setting that has changed since the conversion was begun."""
    for part, now in task.items():
        before = begun[part]
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise InputError(
                    f"{target}: holds an unfinished conversion whose {part} had {key} = "
                    f"{before.get(key)}; now it is {now.get(key)}"
                )


def _clear(target: Path, made: list[Path]) -> None:
    """Remove everything that a conversion wrote. made: the folders that it created, innermost
    first."""
    if made:
        shutil.rmtree(made[-1])
        return
    for child in target.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()


def _finished(target: Path, source: Path | str, options: Options) -> dict[str, Any]:
    """Remove the records of a complete conversion, and return its report. InputError if its settings
    were different."""
    traces = target / FINISHED
    begun = read_json(traces / TASK)
    if begun is not None:  # None: it was being removed already
        now = folder_source(source).identity if isinstance(source, Path) else {"repository": source}
        task = {"source": now, "options": asdict(options)}
        with using_record(traces / TASK):
            before = {name: value for name, value in begun["source"].items() if name != "commit"}
            _compare(target, {"source": before, "options": begun["options"]}, task)
    reports = sorted(target.glob(REPORT)) or sorted(target.glob(f"*/{REPORT}"))
    if not reports:
        raise InputError(f"{traces}: left by a conversion, but there is no {REPORT}; remove it")
    report = read_json(reports[0]) or {}
    if any(report.get(name) != value for name, value in asdict(options).items()):
        raise InputError(f"{target}: holds a finished conversion with other options")
    shutil.rmtree(traces)
    return report


@contextmanager
def _locked(file: Path, target: Path) -> Iterator[None]:
    """Hold a lock that keeps other processes out. The system releases it when this process ends."""
    with file.open("w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{target}: another process is converting into it") from None
        yield


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that is not writable, into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if (target / UNFINISHED).exists():  # otherwise such files are not ours
            for partial in target.rglob(f"*{PARTIAL}"):
                partial.unlink(missing_ok=True)
        begun = (target / UNFINISHED / TASK).exists()
        then = f"; what is whole stays, and {continuing(target)}" if begun else ""
        reason = f"{error.filename or target}: {error.strerror or error}"
        raise InputError(f"{reason}{then}") from None
