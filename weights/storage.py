"""Safetensors files as named tensors, with mapped bytes that are read on demand.

The safetensors library checks each file. The bytes are mapped here, once per file, because the
library's own reads touch the first page of every tensor, and a checkpoint with separate experts has
a hundred thousand tensors.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen35.config_json import read_object
from qwen35.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE = 1 << 22  # elements that are compared at a time
PARTIAL = ".partial"  # suffix of a file that is being written

# Dtypes as safetensors writes them.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, under its name in the file. `read` gives a view of the mapped bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Opened:
    """The tensors of a folder.

    listed: those of model.safetensors, or of the files that the folder's index names.
    unlisted: those of the other safetensors files. Their names may also be in `listed`.
    problems: a line for each of these other files that cannot be read.
    """

    listed: list[Stored]
    unlisted: list[Stored]
    problems: list[str]


def indexed_files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files of a folder, each with the tensors that its index promises (None: no index).

    Without an index it is model.safetensors, and without that all safetensors files of the folder.
    """
    if not (folder / INDEX).exists():
        files = [folder / SINGLE] if (folder / SINGLE).exists() else safetensors_files(folder)
        if not files:
            raise InputError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        return dict.fromkeys(files)
    try:
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        promised: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            promised.setdefault(file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / INDEX}: no readable weight_map: {error!r}") from None
    for file in promised:
        # A hub cache links its files elsewhere, which is fine; a *name* that leaves the folder is not.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
            or not file.isprintable()
        ):
            raise InputError(f"{folder / INDEX}: {file!r} is not a safetensors file of this folder")
    return {folder / file: promised[file] for file in sorted(promised)}


def safetensors_files(folder: Path) -> list[Path]:
    """All safetensors files of a folder, sorted, without hidden ones."""
    return sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("."))


def open_folder(folder: Path) -> Opened:
    """The tensors of all files of a folder, in the order of files and names.

    InputError for a file of the index that is missing, cut off or not as the index says, and for a name
    in two of them. Errors of other files are lines in `problems`, because nothing needs these files.
    """
    found: dict[str, Stored] = {}
    files = indexed_files(folder)
    listed_in = {name: file.name for file, names in files.items() for name in names or ()}
    for file, promised in files.items():
        stored = open_file(file)
        names = set(stored)
        if promised is not None and names != promised:
            only_here, only_there = sorted(names - promised), sorted(promised - names)
            twice = [name for name in only_here if name in listed_in]
            if twice:
                raise InputError(
                    f"{file}: {twice[0]} is in this file and, says {INDEX}, in {listed_in[twice[0]]}"
                )
            where = (
                f"{file}: in the file but not in {INDEX}"
                if only_here
                else f"{file}: in {INDEX} but not in the file"
            )
            raise InputError(f"{where}: {some(only_here or only_there)}")
        twice = sorted(names & found.keys())
        if twice:
            raise InputError(
                f"{file}: {twice[0]} is in this file and in {found[twice[0]].file.name}"
            )
        found |= {name: stored[name] for name in sorted(names)}
    opened = Opened(list(found.values()), [], [])
    for file in safetensors_files(folder):
        if file in files:
            continue
        try:
            stored = open_file(file)
        except InputError as error:
            opened.problems.append(f"{error}; it is in no index, and not used")
        else:
            opened.unlisted.extend(stored[name] for name in sorted(stored))
    return opened


def open_file(file: Path) -> dict[str, Stored]:
    """The tensors of one file by name, as views of its mapping. InputError if it is missing or
    damaged."""
    try:
        with safe_open(file, framework="pt"):  # checks the header against the file
            pass
        described_by_name, start = read_header(file)
        size = file.stat().st_size
        mapping = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not a whole safetensors file: {reason}") from None
    content = torch.tensor([], dtype=torch.uint8).set_(mapping)[start:]  # pyright: ignore

    def stored(name: str, described: dict[str, Any]) -> Stored:
        kind, shape = described["dtype"], tuple(described["shape"])
        if not name.isprintable() or math.prod(size or 1 for size in shape) >= 1 << 63:
            raise InputError(f"{file}: no tensor: {name!r} of shape {list(shape)}")
        if kind not in DTYPES:
            raise InputError(f"{file}: {name} has dtype {kind}; known are {', '.join(DTYPES)}")
        dtype = DTYPES[kind]

        def read() -> Tensor:
            first, end = described["data_offsets"]
            numbers = content[first:end]
            if numbers.storage_offset() % dtype.itemsize:  # legal but rare; it needs a copy
                numbers = numbers.clone()
            return numbers.view(dtype).view(shape)

        return Stored(name, file, dtype, shape, read)

    return {name: stored(name, described) for name, described in described_by_name.items()}


def same_values(a: Stored, b: Stored) -> bool:
    """Whether two tensors have the same values; the same bits if they have the same dtype. They are
    read in pieces, because a head may have 2 GB."""
    if a.shape != b.shape or (a.dtype != b.dtype and 1 in (a.dtype.itemsize, b.dtype.itemsize)):
        return False  # one-byte numbers mean nothing without their scales
    pieces = zip(a.read().flatten().split(PIECE), b.read().flatten().split(PIECE), strict=True)
    if a.dtype == b.dtype:
        return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pieces)
    return all(torch.equal(x.double(), y.double()) for x, y in pieces)


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file without its metadata, and where the tensors' bytes start."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def header(described: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The start of a safetensors file with tensors of these names, dtypes and shapes in this order:
    the length of the header and its JSON. The bytes of the tensors follow without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in described:
        first, end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [first, end]
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def row_major(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, as in a file. Contiguous tensors are not copied."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def whole(file: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to. It is renamed to `file` when the block ends, and removed if the
    block fails.

    partial: that path; by default a hidden file beside `file`, with the process id in its name. An
    OSError names `file`, also if the disk is full.
    """
    path = partial or file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield path
        path.replace(file)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(path), path):
            error.filename = str(file)
        raise


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file atomically: it is complete or not there, even after a crash of the machine."""
    with (
        whole(file, file.with_name(f"{file.name}{PARTIAL}")) as partial,
        partial.open("wb") as handle,
    ):
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file that a conversion wrote, or None if there is no such file."""
    return read_object(file) if file.exists() else None


@contextmanager
def using_record(file: Path) -> Iterator[None]:
    """Turn an error of a block that uses what `file` holds into an InputError, because a file that
    somebody else has changed may lack any key."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not what a conversion writes: {error!r}") from None


def some(names: list[str]) -> str:
    """The first three of a list of names, and the number of the others."""
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
