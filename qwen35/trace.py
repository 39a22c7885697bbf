"""The outputs of a model's nodes, by name, for one prompt."""

import hashlib
import json
import os
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen35.config import Config
from qwen35.errors import InputError
from reference.model import Model


def nodes(model: Model, pattern: str) -> dict[str, nn.Module]:
    """The modules whose name matches a glob. What happens inside a routed expert is left out unless
    the pattern names it (`layers.3.mlp.experts.7.*`). Raises when nothing matches."""
    inside = ".experts." in pattern
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if name and fnmatchcase(name, pattern) and (inside or ".experts." not in name)
        if not isinstance(module, nn.ModuleList) or name.endswith(".experts")
    }
    if not found:
        raise InputError(
            f"pattern {pattern!r} matches no node; names look like layers.3.mlp.experts"
        )
    return found


@torch.inference_mode()
def trace(model: Model, ids: list[int], pattern: str = "*") -> dict[str, Tensor]:
    """Run `ids` from an empty cache; return name -> output of each matching node.

    `lm_head` holds the logits of all positions [B, T, vocab]. A node with several outputs gives
    name.0, name.1, ... (a router: the experts, their weights). An expert that no token reached has no
    entry. The MTP head runs over ids[1:], as in a prefill. No hook stays behind.
    """
    model.config.check_prompt(ids, new_tokens=0)
    found = nodes(model, pattern)
    cache = model.new_cache()
    tokens = torch.tensor([ids], device=model.embed_tokens.weight.device)
    outputs: dict[str, Tensor] = {}
    with _recording({n: m for n, m in found.items() if not _is_mtp(n)}, outputs):
        hidden = model(tokens, cache)
        model.lm_head(hidden)
    mtp_nodes = {n: m for n, m in found.items() if _is_mtp(n)}
    if mtp_nodes and len(ids) > 1:
        with _recording(mtp_nodes, outputs):
            model.draft(tokens[:, 1:], hidden[:, :-1], cache)
    return outputs


def _is_mtp(name: str) -> bool:
    return name == "mtp" or name.startswith("mtp.")


class _recording:  # noqa: N801 (a context manager, used like a function)
    """Hooks that copy outputs into `outputs`, taken off on leaving."""

    def __init__(self, modules: dict[str, nn.Module], outputs: dict[str, Tensor]) -> None:
        self.modules, self.outputs = modules, outputs

    def __enter__(self) -> None:
        self.handles = [
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: self.record(name, output)  # pyright: ignore
            )
            for name, module in self.modules.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def record(self, name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        if isinstance(output, Tensor):
            self.outputs[name] = output.detach().clone()
            return
        for i, part in enumerate(output):
            self.outputs[f"{name}.{i}"] = part.detach().clone()


def config_hash(config: Config) -> str:
    """Sixteen hex digits that two equal shapes share."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:16]


def save_trace(path: Path, outputs: dict[str, Tensor], model: Model, ids: list[int]) -> None:
    """Write a trace as safetensors, whole or not at all; ids, config hash and dtype in its metadata."""
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    metadata = {
        "format": "qwen35-trace-1",
        "ids": json.dumps(ids),
        "config": config_hash(model.config),
        "dtype": dtype,
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tensors = {name: output.cpu().contiguous() for name, output in outputs.items()}
        save_file(tensors, unfinished, metadata)
        unfinished.replace(path)
    except Exception as error:  # the library's own SafetensorError, or an OSError
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error}") from None
