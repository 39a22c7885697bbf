"""A checkpoint folder: which tensors it holds, under the model's own names, mapped and read when asked.

One name space: `Checkpoint.entries` is keyed by parameter names of `reference.model.Model`, whatever the
dialect on disk. An entry knows where its bytes lie and how to view them. The safetensors library checks
each file; the bytes are mapped here, once a file, because the library's own reads touch the first page
of every tensor, and a checkpoint with an expert a tensor has a hundred thousand of them.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Dtypes as safetensors writes them. PLAIN are those that a weight may have without scales beside it.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
PLAIN = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Entry:
    """One parameter: its shape and dtype (known from the header) and how to get it."""

    stored_as: str  # the tensor's name in the file
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Checkpoint:
    """The BF16 dialects of Qwen3.5, 3.6 and 3-Next, in one file or in shards.

    config: the shape that `config.json` states. entries: by parameter name. ignored: names in the
    file that are no part of the text model (the vision tower).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder")
        self.config = Config.from_file(self.folder / "config.json")
        self.entries: dict[str, Entry] = {}
        self.ignored: list[str] = []
        for file, expected in _shards(self.folder):
            stored = _stored(file)
            names = set(stored)
            if expected is not None and names != expected:
                only_here, only_there = sorted(names - expected), sorted(expected - names)
                where = (
                    f"{file}: in the file but not in {INDEX}"
                    if only_here
                    else f"{file}: in {INDEX} but not in the file"
                )
                raise InputError(f"{where}: {_some(only_here or only_there)}")
            for name in sorted(names):
                self._add(stored[name], file)

    def _add(self, whole: Entry, file: Path) -> None:
        name = re.sub(r"^model\.(language_model\.)?", "", whole.stored_as)
        if name.startswith("visual."):
            self.ignored.append(whole.stored_as)
            return
        if whole.dtype not in (DTYPES[kind] for kind in PLAIN):
            kind = next(kind for kind, dtype in DTYPES.items() if dtype == whole.dtype)
            raise InputError(
                f"{file}: {whole.stored_as} has dtype {kind}; readable are {', '.join(PLAIN)}"
            )
        for part_name, part in _split(name, whole, self.config):
            if part_name in self.entries:
                other = self.entries[part_name].stored_as
                raise InputError(
                    f"{file}: {part_name} is given twice, by {other} and by {whole.stored_as}"
                )
            self.entries[part_name] = part

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Compare the books with the parameters that a model has: names, then shapes, both ways."""
        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise InputError(f"{self.folder}: missing {_some(missing)}")
        unknown = [e.stored_as for name, e in self.entries.items() if name not in expected]
        if unknown:
            raise InputError(f"{self.folder}: not part of this model: {_some(unknown)}")
        for name, shape in expected.items():
            if self.entries[name].shape != shape:
                raise InputError(
                    f"{self.folder}: {name} has shape {list(self.entries[name].shape)} in the file, "
                    f"the config needs {list(shape)}"
                )

    def ignore(self, prefix: str) -> None:
        """Put the entries under `prefix` aside, as no part of the model to be built."""
        for name in [name for name in self.entries if name.startswith(prefix)]:
            self.ignored.append(self.entries.pop(name).stored_as)


def _shards(folder: Path) -> Iterable[tuple[Path, set[str] | None]]:
    """Each safetensors file with the names that the index promises in it (None without an index)."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise InputError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        return [(folder / SINGLE, None)]
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        promised: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            promised.setdefault(file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX}: no readable weight_map: {error!r}") from None
    for file in promised:
        # A hub cache links its files elsewhere, which is fine; a *name* that leaves the folder is not.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise InputError(f"{folder / INDEX}: {file!r} is not a safetensors file of this folder")
    return [(folder / file, names) for file, names in sorted(promised.items())]


def _stored(file: Path) -> dict[str, Entry]:
    """The tensors of one file by their stored names, as views of its mapping."""
    try:
        with safe_open(file, framework="pt"):  # checks the header against the file
            pass
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
        size = file.stat().st_size
        mapping = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{file}: not a whole safetensors file: {error}") from None
    content = torch.tensor([], dtype=torch.uint8).set_(mapping)[8 + length :]  # pyright: ignore

    def entry(name: str, described: dict[str, Any]) -> Entry:
        kind, shape = described["dtype"], tuple(described["shape"])
        if kind not in DTYPES:
            raise InputError(f"{file}: {name} has dtype {kind}; known are {', '.join(DTYPES)}")
        dtype = DTYPES[kind]

        def read() -> Tensor:
            first, end = described["data_offsets"]
            stored = content[first:end]
            if stored.storage_offset() % dtype.itemsize:  # legal, and rare: such a tensor is copied
                stored = stored.clone()
            return stored.view(dtype).view(shape)

        return Entry(name, shape, dtype, read)

    return {name: entry(name, d) for name, d in header.items() if name != "__metadata__"}


def _split(name: str, whole: Entry, config: Config) -> Iterable[tuple[str, Entry]]:
    """The parameters that one stored tensor carries: several where experts or projections are fused."""
    layer, _, leaf = name.rpartition(".experts.")
    if leaf == "gate_up_proj":  # [E, 2I, D]: of each expert the gate's rows, then the up's
        half = _size(whole, 3)[1] // 2
        for e in range(whole.shape[0]):
            expert = f"{layer}.experts.{e}"
            yield f"{expert}.gate_proj.weight", _part(whole, lambda t, e=e: t[e, :half])
            yield f"{expert}.up_proj.weight", _part(whole, lambda t, e=e: t[e, half:])
    elif leaf == "down_proj":  # [E, D, I]
        for e in range(_size(whole, 3)[0]):
            yield f"{layer}.experts.{e}.down_proj.weight", _part(whole, lambda t, e=e: t[e])
    elif name.endswith(".in_proj_qkvz.weight"):
        stem = name.removesuffix("_qkvz.weight")
        yield f"{stem}_qkv.weight", _part(whole, lambda t: _ungroup(t, config, "qkv"))
        yield f"{stem}_z.weight", _part(whole, lambda t: _ungroup(t, config, "z"))
    elif name.endswith(".in_proj_ba.weight"):
        stem = name.removesuffix("_ba.weight")
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


def _part(whole: Entry, view: Callable[[Tensor], Tensor]) -> Entry:
    """A view of a stored tensor as an entry of its own; the shape is found without reading."""
    try:
        shape = view(torch.empty(whole.shape, device="meta")).shape
    except RuntimeError:
        raise InputError(
            f"{whole.stored_as} has shape {list(whole.shape)}, which the config's heads do not divide"
        ) from None
    return Entry(whole.stored_as, tuple(shape), whole.dtype, lambda: view(whole.read()))


def _ungroup(packed: Tensor, config: Config, wanted: str) -> Tensor:
    """Qwen3-Next's rows, grouped by key head as [q | k | v r heads | z r heads] (or [b r | a r] with
    r = HV / H value heads a key head), in Qwen3.5's order: all of q, then k, then v; z; b; a."""
    H, D = config.linear_num_key_heads, packed.shape[-1]
    shared = config.linear_num_value_heads // H
    K, V = config.linear_key_head_dim, config.linear_value_head_dim * shared
    sizes = [K, K, V, V] if wanted in ("qkv", "z") else [shared, shared]
    parts = packed.view(H, sum(sizes), D).split(sizes, dim=1)
    chosen = {"qkv": parts[:3], "z": parts[3:], "b": parts[:1], "a": parts[1:]}[wanted]
    return torch.cat([part.reshape(-1, D) for part in chosen])


def _some(names: list[str]) -> str:
    """The first few of a list of names, and how many more."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
