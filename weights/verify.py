"""Verifies a finished conversion: every tensor is computed again from the source and compared."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.config_json import read_object
from qwen35.errors import InputError
from weights.checkpoint import Checkpoint
from weights.command import UNFINISHED, continuing
from weights.convert import check_target, is_done, with_stored
from weights.outline import Outline
from weights.output import Item, Options, Slot, convert_tensor, cut
from weights.rounding import Rounding
from weights.source import Hub, Source, folder_source
from weights.storage import DTYPE_NAMES, Stored, open_folder, row_major, some

LISTS = ("exclude", "modules_to_not_convert")  # their order does not matter


@contextmanager
def source_of(source: Path | str) -> Iterator[Source]:
    """Open a folder, or a hub repository whose files are fetched one by one into a temporary folder."""
    if isinstance(source, Path):
        yield folder_source(source)
        return
    with tempfile.TemporaryDirectory() as work:
        yield Hub(source, Path(work), keep=False)


def dry_run(
    source: Path | str, target: Path, options: Options, check: Callable[[Checkpoint], object]
) -> dict[str, Any]:
    """Describe what a conversion would write, without writing anything: see `Outline.describe`.

    It also has `done`, the number of files that an unfinished conversion in `target` has written, and
    `disk_bytes`, the disk space that is still needed. InputError wherever `convert` would refuse before
    its first byte, except for a full disk.
    """
    check_target(target)
    with source_of(source) as opened:
        outline = Outline(opened, options, check)
        numbers = range(len(outline.files))
        left = [number for number in numbers if not is_done(target, outline, number)]
        room = outline.room(left)
    return {**outline.describe(), "done": len(numbers) - len(left), "disk_bytes": room}


@dataclass(frozen=True)
class Verified:
    """The result of a comparison. tensors, nbytes: the number of equal tensors, and their bytes.
    difference: the first difference, or None."""

    tensors: int
    nbytes: int
    difference: str | None


class _DifferenceError(Exception):
    """Raised at the first difference, which ends the comparison."""


def verify(
    source: Path | str,
    target: Path,
    options: Options,
    *,
    check: Callable[[Checkpoint], object] = lambda checkpoint: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Verified:
    """Compare the folder `target` with the result of `convert`: tensors, config.json and the small
    files. Tensors may be distributed over files in another way.

    InputError for a target that cannot be read, is cut off or unfinished, and for a source that `convert`
    refuses.
    """
    if (target / UNFINISHED).exists():
        raise InputError(f"{target}: an unfinished conversion; {continuing(target)}")
    with source_of(source) as opened:
        outline = Outline(opened, options, check)
        comparison = _Comparison(opened, outline, target)
        try:
            comparison.run(progress)
        except _DifferenceError as found:
            return Verified(comparison.tensors, comparison.nbytes, str(found))
    return Verified(comparison.tensors, comparison.nbytes, None)


class _Comparison:
    def __init__(self, source: Source, outline: Outline, target: Path) -> None:
        self.source, self.outline = source, outline
        self.tensors = self.nbytes = 0
        self.folders = {folder: target / folder for folder in outline.folders}
        self.documents = {
            name: read_object(folder / "config.json") for name, folder in self.folders.items()
        }
        self.held: dict[str, dict[str, Stored]] = {}
        for name, folder in self.folders.items():
            self.held[name] = {stored.name: stored for stored in open_folder(folder).listed}
        self.opened: dict[str, dict[str, Stored]] = {}

    def run(self, progress: Callable[[int, int], object]) -> None:
        wanted = self.outline.file_names().keys()
        for folder, held in self.held.items():
            path = self.folders[folder]
            if missing := sorted(wanted - held.keys()):
                raise _DifferenceError(f"{path}: lacks {some(missing)}")
            if more := sorted(held.keys() - wanted):
                raise _DifferenceError(
                    f"{path}: holds {some(more)}, which the source does not give"
                )
        self._compare_documents()
        last_use = {n: i for i, file in enumerate(self.outline.files) for n in file.sources}
        for number, file in enumerate(self.outline.files):
            for item, slots in file.items:
                self._compare(item, slots)
                progress(self.nbytes, self.outline.total)
            for name in [name for name in self.opened if last_use[name] <= number]:
                del self.opened[name]
                self.source.close(name)

    def _compare(self, item: Item, slots: tuple[Slot, ...]) -> None:
        entry = with_stored(item.entry, self._real)
        tensors = convert_tensor(entry, item.name, item.to, Rounding())
        for rank, folder in enumerate(self.outline.folders):
            shard = self.outline.shard(item, rank)
            for tensor, slot in zip(tensors, slots, strict=True):
                _compare(self.held[folder][slot.name], cut(tensor, shard, slot.per))
                self.tensors += 1
                self.nbytes += slot.nbytes

    def _real(self, stored: Stored) -> Stored:
        file = stored.file.name
        if file not in self.opened:
            self.opened[file] = self.source.open(file)
        return self.opened[file][stored.name]

    def _compare_documents(self) -> None:
        is_tied = self.outline.is_tied(lambda folder, name: self.held[folder][name])
        for rank, (name, folder) in enumerate(self.folders.items()):
            wanted = _unordered(self.outline.config(rank, is_tied=is_tied))
            found = _unordered(self.documents[name])
            for key in sorted(wanted.keys() | found.keys()):
                if found.get(key) != wanted.get(key):
                    raise _DifferenceError(
                        f"{folder / 'config.json'}: {key} is not what the source gives"
                    )
            for file in self.outline.beside:
                there = folder / file.name
                if not there.is_file() or there.read_bytes() != file.read_bytes():
                    raise _DifferenceError(f"{there}: is not the source's")


def _unordered(document: dict[str, Any]) -> dict[str, Any]:
    """A config.json with its lists of modules sorted."""
    claim = document.get("quantization_config")
    if not isinstance(claim, dict):
        return document
    lists = {key: sorted(claim[key]) for key in LISTS if isinstance(claim.get(key), list)}
    return {**document, "quantization_config": {**claim, **lists}}


def _compare(found: Stored, wanted: Tensor) -> None:
    """Raise _DifferenceError, with the first number that differs."""
    where = f"{found.file}: {found.name}"
    if (found.dtype, found.shape) != (wanted.dtype, tuple(wanted.shape)):
        raise _DifferenceError(
            f"{where} has {DTYPE_NAMES[found.dtype]} {list(found.shape)}, the source gives "
            f"{DTYPE_NAMES[wanted.dtype]} {list(wanted.shape)}"
        )
    ours, theirs = (
        torch.frombuffer(row_major(t), dtype=torch.uint8) for t in (found.read(), wanted)
    )
    if torch.equal(ours, theirs):
        return
    size = found.dtype.itemsize
    first = int((ours != theirs).nonzero()[0]) // size
    place = [int(i) for i in torch.unravel_index(torch.tensor(first), found.shape)]
    numbers = (bytes(t[first * size : (first + 1) * size].tolist()).hex() for t in (ours, theirs))
    raise _DifferenceError(
        f"{where}{place} has the bytes {next(numbers)}, the source gives {next(numbers)}"
    )
