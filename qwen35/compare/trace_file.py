"""A trace as a file: safetensors, with the ids, the config's hash and the dtype in its metadata."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen35.cli import parse_ids
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import text_model
from reference.model import Model
from weights.checkpoint import Checkpoint
from weights.storage import whole

FORMAT = "qwen35-trace-1"


def config_hash(config: Config) -> str:
    """Sixteen hex digits that two equal shapes share."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:16]


def save_trace(path: Path, outputs: dict[str, Tensor], model: Model, ids: list[int]) -> None:
    """Write a trace as safetensors, whole or not at all; ids, config hash and dtype in its metadata."""
    metadata = {
        "format": FORMAT,
        "ids": json.dumps(ids),
        "config": config_hash(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    # Copies, since a node may return what its last part returned.
    tensors = {name: output.cpu().contiguous().clone() for name, output in outputs.items()}
    try:
        with whole(path) as unfinished:
            save_file(tensors, unfinished, metadata)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from None


def read_trace(file: Path, folder: Path) -> tuple[dict[str, Tensor], list[int]]:
    """A trace and its ids. InputError when it is cut off, no trace, or of another config."""
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            outputs = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole trace: {' '.join(str(error).split())}") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{file}: its format is {metadata.get('format')!r}; expected {FORMAT!r}")
    ours = config_hash(text_model(Checkpoint(folder)))
    if metadata.get("config") != ours:
        raise InputError(
            f"{file}: traced with config {metadata.get('config')}, {folder} has {ours}"
        )
    try:
        return outputs, parse_ids(metadata.get("ids", "").strip("[]"))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
