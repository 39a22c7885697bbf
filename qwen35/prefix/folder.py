"""The store of a prefix cache in a folder: each segment is a safetensors file, named after its key.

Several processes may use one folder. A process that changes it holds a lock on the folder. A
process that uses a file holds a shared lock on the file, so that no other process evicts it. The
system releases the locks of a process that dies. A file is written under another name and renamed
when it is complete. Its metadata are checked when it is found (its name is the hash of its ids),
and its bytes before they are used.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen35.errors import InputError
from qwen35.prefix.keys import chained, root_of
from qwen35.prefix.store import Segment
from reference.linear import GRID
from weights.storage import open_file, row_major, whole

FORMAT = "qwen35-prefix-1"
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Found:
    """A file of the folder. segment: None if it cannot be used; `problem` says why. removable:
    whether it is ours (complete or not) and counts in the budget."""

    size: int
    segment: Segment | None
    identity: dict[str, str]
    problem: str = ""
    removable: bool = True


class Folder:
    """The store of a prefix cache on disk, which processes share.

    identity: what the bits depend on (`prefix.keys.identity`). InputError if the folder cannot be
    made.
    """

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder, self.identity = folder, identity
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise InputError(f"{folder}: no folder for a prefix cache: {error.strerror}") from None
        self.looked_at: dict[tuple[str, int, int], Found] = {}
        self.in_use: dict[str, list[int]] = {}  # descriptors that hold a shared lock, by key

    def __del__(self) -> None:
        if hasattr(self, "lock"):
            os.close(self.lock)

    def files(self) -> dict[str, Found]:
        """All files with names of segments, by key, the least recently used first."""
        listed: list[tuple[int, str, Found]] = []
        for entry in os.scandir(self.folder):
            if not NAME.fullmatch(entry.name):
                continue
            try:
                stat = entry.stat(follow_symlinks=False)
                if not S_ISREG(stat.st_mode):
                    continue
                # A change of the file changes this key.
                known = (entry.name, stat.st_size, stat.st_ctime_ns)
                found = self.looked_at.get(known) or examine(Path(entry.path))
            except FileNotFoundError:  # evicted by somebody else
                continue
            self.looked_at[known] = found
            listed.append((stat.st_mtime_ns, entry.name.partition(".")[0], found))
        return {key: found for _, key, found in sorted(listed, key=lambda item: item[:2])}

    def problems(self) -> list[str]:
        """One line for each kind of file that is not used."""
        lines: dict[str, int] = {}
        for found in self.files().values():
            line = found.problem
            if found.segment is not None and found.identity != self.identity:
                both = {
                    n: (self.identity.get(n), found.identity.get(n))
                    for n in self.identity | found.identity
                }
                name, (here, there) = next(
                    (n, pair) for n, pair in both.items() if pair[0] != pair[1]
                )
                line = f"{name} is {here!r} here and {there!r} there"
            if line:
                lines[line] = lines.get(line, 0) + 1
        return [f"{self.folder}: {n} left alone: {line}" for line, n in lines.items()]

    # The methods of `prefix.store.Store`.

    def segments(self) -> dict[str, Segment]:
        return {k: found.segment for k, found in self.files().items() if found.segment is not None}

    def read(self, segment: Segment) -> dict[str, Tensor] | None:
        """The mapped tensors of a segment, or None if they or the metadata are damaged."""
        file = self._path(segment.key)
        try:
            tensors = {name: stored.read() for name, stored in open_file(file).items()}
            with safe_open(file, framework="pt") as handle:
                metadata: dict[str, str] = handle.metadata() or {}
            whole = metadata.get("sha256") == checksum(metadata, tensors)
            return tensors if whole and examine(file).segment == segment else None
        except (InputError, SafetensorError, OSError):
            return None

    def discard(self, key: str) -> None:
        with self.exclusive(), suppress(OSError):
            self._path(key).unlink()

    def write(self, segment: Segment, ids: list[int], tensors: dict[str, Tensor]) -> str | None:
        on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        metadata = {
            "format": FORMAT,
            "identity": json.dumps(self.identity),
            "parent": segment.parent,
            "first": str(segment.first),
            "ids": json.dumps(ids),
        }
        metadata["sha256"] = checksum(metadata, on_cpu)
        unfinished = self.folder / f".{segment.key}{UNFINISHED}"
        try:
            with whole(self._path(segment.key), unfinished):
                save_file(on_cpu, unfinished, metadata)
        except (OSError, SafetensorError) as error:
            return f"{self.folder}: {' '.join(str(error).split())}"
        return None

    def remove_unreadable(self) -> int:
        damaged = {k: f for k, f in self.files().items() if f.segment is None and f.removable}
        return sum(found.size for key, found in damaged.items() if not self.remove(key))

    def is_free(self, key: str) -> bool:
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def remove(self, key: str) -> bool:
        if not self.is_free(key):
            return False
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError:  # the folder is read-only
            return False
        return True

    def size(self, segment: Segment) -> int:
        return segment.nbytes + overhead(segment.end - segment.first, json.dumps(self.identity))

    def pin(self, key: str) -> bool:
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY)
        except OSError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        self.in_use.setdefault(key, []).append(descriptor)
        with suppress(OSError):  # in a read-only folder the order of use is not recorded
            os.utime(descriptor)
        return True

    def unpin(self, key: str) -> None:
        os.close(self.in_use[key].pop())

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the folder's lock, and remove half-written files of processes that died."""
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        try:
            for name in os.listdir(self.folder):
                if name.startswith(".") and name.endswith(UNFINISHED):
                    with suppress(OSError):
                        os.unlink(self.folder / name)
            yield
        finally:
            fcntl.flock(self.lock, fcntl.LOCK_UN)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def examine(file: Path) -> Found:
    """Read only the header of a file, and check it against the name. FileNotFoundError if it is
    gone."""
    size = file.stat().st_size
    try:
        with safe_open(file, framework="pt") as handle:
            metadata: dict[str, Any] = handle.metadata() or {}
            names = set(handle.keys())
        version = metadata.get("format")
        if version != FORMAT:
            problem = f"its format is {version!r}, known is {FORMAT!r}"
            return Found(size, None, {}, problem, removable=False)
        identity = {str(n): str(v) for n, v in json.loads(metadata["identity"]).items()}
        first, ids = int(metadata["first"]), json.loads(metadata["ids"])
        parent = metadata["parent"]
        blocks = tuple(chained(parent, ids)[1:])
        fits = first or parent == root_of(identity)
        on_grid = first % GRID == len(ids) % GRID == 0
        if not blocks or blocks[-1] != file.name.partition(".")[0] or not fits or not on_grid:
            raise ValueError("its name is not the hash of what it holds")
        nbytes = size - overhead(len(ids), metadata["identity"])
        segment = Segment(parent, first, first + len(ids), blocks, "mtp.k" in names, nbytes)
        return Found(size, segment, identity)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError,
            RecursionError) as error:  # fmt: skip
        return Found(size, None, {}, f"damaged: {' '.join(str(error).split())}")


def overhead(tokens: int, identity: str) -> int:
    """An upper bound, for the budget, on the bytes of a file's header with its metadata."""
    return (1 << 15) + 12 * tokens + 2 * len(identity)


def checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a file's metadata and of its tensors' names, dtypes, shapes and bytes."""
    said = {name: value for name, value in metadata.items() if name != "sha256"}
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(row_major(tensor) if tensor.numel() else b"")
    return total.hexdigest()
