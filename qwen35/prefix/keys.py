"""The keys of a prefix cache: chained hashes of the ids, starting with all that the bits depend on.

Another checkpoint, dtype, device or set of swapped nodes computes other bits, so its keys must differ:
`identity` lists what is hashed before the first block.
"""

import hashlib
import json
import platform
from functools import cache
from pathlib import Path

import numpy as np
import torch

from qwen35.parallel.checkpoint import ends_of
from qwen35.parallel.nodes import ranks_of
from qwen35.swap import nodes
from reference.linear import GRID
from reference.model import Model


def chained(root: str, ids: list[int]) -> list[str]:
    """The root, and the hash after each whole block of `ids`. A hash covers the hash before it and
    64 ids."""
    whole = len(ids) // GRID
    hashes = [root]
    for block in np.array(ids[: whole * GRID], dtype="<i8").reshape(whole, GRID):
        hashes.append(hashlib.sha256(bytes.fromhex(hashes[-1]) + block.tobytes()).hexdigest())
    return hashes


def root_of(identity: dict[str, str]) -> str:
    """The hash that a chain of blocks starts with."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def identity(model: Model, checkpoint: str) -> dict[str, str]:
    """All that the bits of a state depend on, except the tokens. Processes with equal identities
    may share states. checkpoint: the `fingerprint` of its files."""
    device = model.embed_tokens.weight.device
    classes = [f"{n}={type(m).__module__}.{type(m).__name__}" for n, m in nodes(model, "*").items()]
    swapped = [
        line for line in classes if not line.partition("=")[2].startswith(("reference.", "torch."))
    ]
    ranks = ranks_of(model)
    part = {"part": f"rank {ranks.rank} of {ranks.size}"} if ranks.size > 1 else {}
    return part | {
        "checkpoint": checkpoint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": model.kv_cache_dtype,
        "path": "; ".join(swapped) or "reference",
        "nodes": hashlib.sha256("\n".join(classes).encode()).hexdigest()[:16],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "torch": torch.__version__,
    }


@cache
def processor() -> str:
    """The name of the CPU, and the instruction set that torch uses on it."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
    )


def fingerprint(folder: Path) -> str:
    """A hash of a checkpoint's files, as 16 hex digits: names, sizes, modification times,
    config.json, and the first and last MiB of each weight file. Hashing every byte of 400 GB would
    take minutes."""
    total = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        stat = file.stat()
        total.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        total.update(ends_of(file))
    return total.hexdigest()[:16]
