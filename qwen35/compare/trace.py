"""Traces: the outputs of a model's nodes, by name, for one prompt."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from qwen35.arguments import shown, token_ids
from qwen35.errors import InputError
from qwen35.load import load
from qwen35.node_error import blaming
from qwen35.swap import nodes
from qwen35.tokenizer import Tokenizer
from reference.model import Model

TRACED = ("reference.", "fast.")  # packages whose locals a trace may have


@torch.inference_mode()
def trace(
    model: Model | str | Path,
    ids: Sequence[int] | Tensor | str,
    pattern: str = "*",
    *,
    named_locals: bool = False,
) -> dict[str, Tensor]:
    """Run `ids`, or a text, from an empty cache. Returns name -> output for each matching node.

    model: from `load`; a name or folder is loaded.

    `lm_head` holds the logits of all positions [B, T, vocab]. A node with several outputs gives
    name.0, name.1, ... (a router: the experts, their weights). An expert that no token reached has
    no entry. The MTP head runs over ids[1:], as in a prefill. All hooks are removed. NodeError if a
    swapped node fails.

    named_locals: also the tensors that a node's forward, and the functions of `reference` and
    `fast` that it calls, had bound to names when they returned, as in `layers.0.linear_attn:beta`
    and `layers.0.linear_attn:chunk.state`.
    """
    if not isinstance(model, Model):
        model = load(model)
    ids = prompt_ids(ids, model.folder)
    model.config.check_prompt(ids, new_tokens=0)
    found = nodes(model, pattern)
    cache = model.new_cache()
    tokens = torch.tensor([ids], device=model.embed_tokens.weight.device)
    outputs: dict[str, Tensor] = {}
    with blaming(model):
        with recording({n: m for n, m in found.items() if not _is_mtp(n)}, outputs, named_locals):
            hidden = model(tokens, cache)
            model.lm_head(hidden)
        mtp_nodes = {n: m for n, m in found.items() if _is_mtp(n)}
        if mtp_nodes and len(ids) > 1:
            with recording(mtp_nodes, outputs, named_locals):
                model.draft(tokens[:, 1:], hidden[:, :-1], cache)
    return outputs


def prompt_ids(given: Any, folder: Path | None) -> list[int]:
    """Token ids from ids or a text. folder: has the tokenizer. InputError for anything else."""
    if isinstance(given, str):
        if folder is None:
            raise InputError("this model has no folder with a tokenizer; token ids are expected")
        return Tokenizer(folder).encode(given)
    ids = token_ids(given)
    if ids is None:
        raise InputError(f"ids = {shown(given)}; expected token ids or a text")
    return ids


def _is_mtp(name: str) -> bool:
    return name == "mtp" or name.startswith("mtp.")


@contextmanager
def recording(
    modules: dict[str, nn.Module], outputs: dict[str, Tensor], named_locals: bool = False
) -> Iterator[None]:
    """Record the outputs of these modules in `outputs` while the block runs. Tensors are not
    copied, because no forward of this project writes into its earlier outputs."""

    def record(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            outputs[name] = value.detach()
        elif isinstance(value, tuple):
            for i, part in enumerate(value):
                record(f"{name}.{i}", part)

    names = {id(module): name for name, module in modules.items()}

    def keep(module: nn.Module, _: object, output: object) -> None:
        if id(module) in names:
            record(names[id(module)], output)

    # One global hook, because a hook on each module would cost as much as some nodes.
    handle = register_module_forward_hook(keep)
    profiler = sys.getprofile()  # the caller's, such as a coverage tool
    if named_locals:
        sys.setprofile(_profiler(names, record))
    try:
        yield
    finally:
        sys.setprofile(profiler)
        handle.remove()


def _profiler(
    names: dict[int, str], record: Callable[[str, object], None]
) -> Callable[[FrameType, str, object], None]:
    """A profile function that records the locals of forwards, and of the functions in TRACED packages
    that they call, when they return. Names in the source become names in the trace."""
    # The nodes whose forwards run, innermost last. None is a node that is not traced.
    running: list[str | None] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "return") or not frame.f_globals.get("__name__", "").startswith(
            TRACED
        ):
            return
        function = frame.f_code.co_name
        is_forward = function == "forward" and "self" in frame.f_locals
        if event == "call":
            if is_forward:
                running.append(names.get(id(frame.f_locals["self"])))
            return
        node = running[-1] if running else None
        if node is not None and not function.startswith("<"):
            stem = f"{node}:" if is_forward else f"{node}:{function}."
            for name, value in frame.f_locals.items():
                if isinstance(value, Tensor):
                    record(f"{stem}{name}", value)
        if is_forward:
            running.pop()

    return profile
