"""Traces as safetensors files, with the ids, the config's hash and the dtype in the metadata."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen35.cli import parse_ids
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import text_model
from qwen35.reading import existing_file
from reference.model import Model
from weights.checkpoint import Checkpoint
from weights.storage import whole

FORMAT = "qwen35-trace-1"
BINS = 24  # intervals of a histogram


@dataclass(frozen=True)
class Statistics:
    """Statistics of one tensor of a trace.

    mean, std, low, high, max_abs: over the finite elements, in float64 (NaN where there are none; std
    divides by their number). zeros, not_finite: shares of all elements, 0 to 1. counts: finite elements
    in each of BINS equal intervals from low to high.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    low: float
    high: float
    max_abs: float
    zeros: float
    not_finite: float
    counts: list[int]


def config_hash(config: Config) -> str:
    """A hash of a config, as 16 hex digits."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:16]


def save_trace(path: Path, outputs: dict[str, Tensor], model: Model, ids: list[int]) -> None:
    """Write a trace as safetensors, atomically, with ids, config hash and dtype in its metadata."""
    metadata = {
        "format": FORMAT,
        "ids": json.dumps(ids),
        "config": config_hash(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    # They are copied, because two nodes may return the same tensor, and safetensors refuses shared
    # memory.
    tensors = {name: output.cpu().contiguous().clone() for name, output in outputs.items()}
    try:
        with whole(path) as unfinished:
            save_file(tensors, unfinished, metadata)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from None


def read_trace(file: Path, folder: Path) -> tuple[dict[str, Tensor], list[int]]:
    """A trace and its ids. InputError if the file is incomplete, no trace, or of another config."""
    with _opened(file) as (handle, metadata):
        outputs = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    ours = config_hash(text_model(Checkpoint(folder)))
    if metadata.get("config") != ours:
        raise InputError(
            f"{file}: traced with config {metadata.get('config')}, {folder} has {ours}"
        )
    try:
        return outputs, parse_ids(metadata.get("ids", "").strip("[]"))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def trace_statistics(file: Path, pattern: str = "*") -> Iterator[Statistics]:
    """Statistics of the nodes of a trace that fit a glob, in the order of layers, a tensor at a time.

    No model is needed. InputError when the file is no whole trace, or when no node fits.
    """
    with _opened(file) as (handle, _):
        names = sorted(handle.keys(), key=_by_number)
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise InputError(
                f"{file}: pattern {pattern!r} matches no node; the nearest are {', '.join(near)}"
            )
        for name in found:
            yield statistics_of(name, handle.get_tensor(name))


def statistics_of(name: str, tensor: Tensor) -> Statistics:
    """Statistics of a tensor of any shape and dtype, computed in float64."""
    wide = tensor.flatten().double()
    finite = wide[wide.isfinite()]
    mean = finite.mean()  # NaN if there is none
    low, high = finite.aminmax() if len(finite) else (mean, mean)
    shares = [float(which.double().mean()) if len(wide) else 0.0 for which in
              (wide == 0, ~wide.isfinite())]  # fmt: skip
    return Statistics(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        mean=float(mean),
        std=float((finite - mean).square().mean().sqrt()),
        low=float(low),
        high=float(high),
        max_abs=max(abs(float(low)), abs(float(high))),
        zeros=shares[0],
        not_finite=shares[1],
        counts=_histogram(finite, float(low), float(high)),
    )


def _histogram(values: Tensor, low: float, high: float) -> list[int]:
    """Counts in BINS equal intervals. Equal values are all in the first interval."""
    if not low < high:
        return [len(values), *[0] * (BINS - 1)]
    return torch.histc(values, BINS, min=low, max=high).long().tolist()


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers.2 before layers.10: a number with more digits is larger."""
    parts = re.split(r"(\d+)", name)
    return [(len(part), part) if part.isdecimal() else (-1, part) for part in parts]


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a file with safetensors. Yields it and its metadata. InputError if it is incomplete or
    no trace."""
    existing_file(file)
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != FORMAT:
                found = metadata.get("format")
                raise InputError(f"{file}: its format is {found!r}; expected {FORMAT!r}")
            yield handle, metadata
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole trace: {' '.join(str(error).split())}") from None
