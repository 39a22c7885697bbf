"""Sources of a conversion: a folder, or a hub repository whose files are fetched one by one."""

import json
from pathlib import Path
from typing import Any, Protocol

from qwen35.errors import InputError
from weights.checkpoint import Checkpoint
from weights.hub import Repository
from weights.ranks import rank_folders
from weights.storage import Stored, open_file, read_json, using_record, write_whole


class Source(Protocol):
    """The interface of a source.

    name: as the user gives it.
    folder: the checkpoint folder.
    is_hollow: whether its files have only their headers.
    identity: facts that must not change until the end.
    open: returns the tensors of one file.
    close: releases a file that is not needed again.
    room: the bytes of disk that the source itself needs.
    """

    name: str
    folder: Path
    is_hollow: bool
    identity: dict[str, Any]

    def open(self, file: str) -> dict[str, Stored]: ...
    def close(self, file: str) -> None: ...
    def room(self) -> int: ...


class Folder:
    """A checkpoint folder as a source. It is only read."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder, self.is_hollow = str(folder.resolve()), folder, False
        self.identity = _identity(folder, [folder])

    def open(self, file: str) -> dict[str, Stored]:
        return open_file(self.folder / file)

    def close(self, file: str) -> None:
        pass

    def room(self) -> int:
        return 0


class Ranks(Folder):
    """The folders of all ranks of a group as a source: the checkpoint that they were cut from."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.identity = _identity(folder, rank_folders(folder))
        self.stored: list[Stored] | None = None

    def open(self, file: str) -> dict[str, Stored]:
        if self.stored is None:
            self.stored = list(Checkpoint(self.folder).listed.values())
        return {stored.name: stored for stored in self.stored if stored.file.name == file}


def folder_source(folder: Path) -> Folder:
    """A checkpoint's folder, or one with the folders of ranks."""
    return Ranks(folder) if rank_folders(folder) else Folder(folder)


def _identity(folder: Path, holders: list[Path]) -> dict[str, Any]:
    """Size and modification time of each file in these folders, by its name relative to
    `folder`."""
    files = sorted(file for holder in holders for file in holder.glob("*") if file.is_file())
    stats = {str(file.relative_to(folder)): file.stat() for file in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


class Hub:
    """A hub repository as a source. Its files are fetched one at a time: into `work`, and removed
    after use, or into the hub's own cache, and kept. `work` records the commit, so that a continued
    conversion uses the same one."""

    def __init__(self, name: str, work: Path, *, keep: bool) -> None:
        record = work / "source.json"
        begun = read_json(record) or {"repository": name, "commit": None}
        with using_record(record):
            repository, commit = begun["repository"], begun["commit"]
        if repository != name:
            raise InputError(
                f"{work.parent}: holds an unfinished conversion of {repository}; asked for is {name}"
            )
        self.repository = Repository(name, commit)
        self.name, self.folder, self.is_hollow = name, work / "headers", True
        self.files = None if keep else work / "files"
        self.identity = {"repository": name, "commit": self.repository.commit}
        write_whole(record, json.dumps(self.identity))
        for cut_off in work.glob("files/**/*.incomplete"):  # of a process that was killed
            cut_off.unlink()
        self.repository.fetch_headers(self.folder)

    def open(self, file: str) -> dict[str, Stored]:
        return open_file(self.repository.fetch(file, self.files))

    def close(self, file: str) -> None:
        if self.files:
            (self.files / file).unlink(missing_ok=True)

    def room(self) -> int:
        # A scale may be in another file than its weight, so two files may be here at a time.
        return sum(sorted(self.repository.sizes.values())[-2:]) if self.files else 0
