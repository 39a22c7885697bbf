"""The tree of nodes that `tools.inspect --nodes` prints, as loading would build it. Equal layers
share their lines, and so do equal experts."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from qwen35.config import Config
from qwen35.load import built_dtype, lay_out
from reference.model import Model
from weights.checkpoint import Checkpoint
from weights.entry import Entry
from weights.storage import DTYPE_NAMES

WIDTH = 100  # of a line, unless a single parameter needs more
RANGES = 3  # ranges of numbers that are listed; with more, "..." stands for some
QUANTIZED = {"mxfp4": "MXFP4Linear", "fp8": "FP8Linear"}  # classes of experts' matrices


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Node:
    """A node without its name, so that equal nodes compare equal. nodes: its children, as (names,
    node)."""

    kind: str
    parameters: tuple[Parameter, ...]
    nodes: tuple[tuple[tuple[str, ...], "Node"], ...]


def describe_nodes(config: Config, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The document that --json prints: class, parameters and child nodes, each with the names that
    share it.

    config: of the model that the checkpoint's tensors make. checkpoint: None if only the config is
    known. Parameters without a stored tensor are shown as BF16.
    """
    model = lay_out(config)
    root = _node(model, "", model, checkpoint)
    return _document(root)


def _node(module: nn.Module, path: str, model: Model, checkpoint: Checkpoint | None) -> Node:
    entry = _entry(f"{path}.weight", checkpoint)
    if entry is not None and entry.format != "plain" and ".experts." in path:
        assert entry.scale is not None
        rows, columns = entry.shape
        stored = (rows, columns // 2) if entry.format == "mxfp4" else (rows, columns)
        weight = Parameter("weight", stored, DTYPE_NAMES[entry.dtype])
        scale = Parameter("weight_scale", entry.scale_shape, DTYPE_NAMES[entry.scale.dtype])
        return Node(QUANTIZED[entry.format], (weight, scale), ())
    parameters = tuple(
        Parameter(name, tuple(parameter.shape), _dtype(f"{path}.{name}", checkpoint))
        for name, parameter in module.named_parameters(recurse=False)
    )
    # Numbered children (layers, experts) that are equal share an entry. Other children have their
    # own.
    alike: dict[tuple[str, Node], list[str]] = {}
    for name, child in module.named_children():
        node = _node(child, f"{path}.{name}" if path else name, model, checkpoint)
        alike.setdefault(("" if name.isdigit() else name, node), []).append(name)
    nodes = tuple((tuple(names), node) for (_, node), names in alike.items())
    return Node(type(module).__name__, parameters, nodes)


def _entry(name: str, checkpoint: Checkpoint | None) -> Entry | None:
    if checkpoint is None:
        return None
    if name == "lm_head.weight" and name not in checkpoint.entries:  # a tied head
        return checkpoint.entries.get("embed_tokens.weight")
    return checkpoint.entries.get(name)


def _dtype(name: str, checkpoint: Checkpoint | None) -> str:
    if checkpoint is None or (entry := _entry(name, checkpoint)) is None:
        return DTYPE_NAMES[torch.bfloat16]
    stored = "embed_tokens.weight" if name not in checkpoint.entries else name
    assert entry is checkpoint.entries[stored]
    return DTYPE_NAMES[built_dtype(checkpoint, stored)]


def _document(node: Node) -> dict[str, Any]:
    return {
        "class": node.kind,
        "parameters": [
            {"name": one.name, "shape": list(one.shape), "dtype": one.dtype}
            for one in node.parameters
        ],
        "nodes": [{"names": list(names), **_document(inner)} for names, inner in node.nodes],
    }


def print_nodes(document: dict[str, Any]) -> None:
    """Print the document as text: a line per node, indented below its parent."""
    rows = [("model", document["class"], _described(document)), *_rows(document, 1)]
    names, kinds = (max(len(row[i]) for row in rows) for i in (0, 1))
    for name, kind, parameters in rows:
        start = f"{name:<{names}}  {kind:<{kinds}}"
        for part in _lines(parameters, WIDTH - names - kinds - 4) or [""]:
            print(f"{start}  {part}".rstrip())
            start = " " * (names + kinds + 2)


def _rows(document: dict[str, Any], depth: int) -> list[tuple[str, str, list[str]]]:
    rows: list[tuple[str, str, list[str]]] = []
    for inner in document["nodes"]:
        name = "  " * depth + _ranges(inner["names"])
        rows.append((name, inner["class"], _described(inner)))
        rows += _rows(inner, depth + 1)
    return rows


def _described(document: dict[str, Any]) -> list[str]:
    return [f"{one['name']} {one['shape']} {one['dtype']}" for one in document["parameters"]]


def _ranges(names: list[str]) -> str:
    """Numbers as ranges, as in `0-2, 4-6, ... 56-58 (45)`. A single name stays as it is."""
    if not names[0].isdigit():
        return names[0]
    numbers = [int(name) for name in names]
    ends = [i for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1] + [len(numbers) - 1]
    starts = [0, *(end + 1 for end in ends[:-1])]
    found = [
        f"{numbers[a]}" if a == b else f"{numbers[a]}-{numbers[b]}"
        for a, b in zip(starts, ends, strict=True)
    ]
    if len(found) <= RANGES:
        return ", ".join(found)
    return f"{', '.join(found[: RANGES - 1])}, ... {found[-1]} ({len(numbers)})"


def _lines(parts: list[str], width: int) -> list[str]:
    """Join parts with commas into lines of at most `width` characters. A longer part has its own
    line."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return lines
