"""Checks that all ranks read the same checkpoint."""

import hashlib
import json
from pathlib import Path

from weights.checkpoint import Checkpoint
from weights.shard import Plan

ENDS = 1 << 20  # bytes that are hashed at each end of a file


def ends_of(file: Path) -> bytes:
    """The first and last ENDS bytes of a file, which may overlap."""
    with file.open("rb") as handle:
        first = handle.read(ENDS)
        handle.seek(max(0, file.stat().st_size - ENDS))
        return first + handle.read(ENDS)


def contents(checkpoint: Checkpoint, plan: Plan) -> str:
    """A label of the checkpoint that a rank reads. It is the same on all ranks that read the same
    weights.

    It is a hash of config.json and of the files' names and sizes. For a whole checkpoint the first and
    last MiB of each file are hashed too, for one rank's part the tensors that all ranks hold whole
    (norms, routers). Not every byte is hashed, so checkpoints that differ elsewhere have the same label.
    """
    total = hashlib.sha256(json.dumps(checkpoint.document, sort_keys=True).encode())
    for file in sorted(checkpoint.folder.glob("*.safetensors")):
        total.update(f"{file.name} {file.stat().st_size}\n".encode())
        if not checkpoint.is_part:
            total.update(ends_of(file))
    if checkpoint.is_part:
        for name, entry in sorted(checkpoint.entries.items()):
            if plan.is_whole(name):
                total.update(name.encode() + entry.read().double().numpy().tobytes())
    return f"{'one part' if checkpoint.is_part else 'whole'} {total.hexdigest()[:12]}"
