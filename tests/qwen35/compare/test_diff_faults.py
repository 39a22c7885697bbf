"""Planted faults, through the command line: exit status 1, and the first row is the node that was broken.

There are two kinds: nodes that compute something else (every second one of `test_diff.py`), and a loader
that reads a checkpoint wrongly. For the latter the reference is the same model in another dialect, which
the fault does not touch.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weights.checkpoint
import weights.fp8
import weights.mxfp4
from qwen35.cli import run
from tests.support.checkpoints import (
    MXFP4,
    QUANTIZED_SIZES,
    QWEN3_5_FP8,
    QWEN3_6,
    QWEN3_NEXT,
    Dialect,
    write,
    write_plain,
)
from tests.support.diffs import FAULTS, MEMBERS, SIZES, standing_in
from tests.support.family import FAMILY
from tools.diff import build_parser, main

Rows = list[dict[str, Any]]


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Rows]:
    """Exit status and rows of `tools.diff --json`."""
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, [*map(str, arguments), "--json"])
    assert isinstance(ended.value.code, int)
    out, err = capsys.readouterr()
    assert not err
    return ended.value.code, json.loads(out)["rows"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("moe")
    write(made, *MEMBERS["moe"][:2], seed=7, **SIZES)
    return made


@pytest.mark.parametrize("name", list(FAULTS)[::2])
def test_a_broken_node(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, forward = FAULTS[name]
    monkeypatch.setattr(sys.modules[__name__], "Planted", standing_in(forward), raising=False)
    swap = f"{node}={__name__}:Planted"
    status, rows = compared(capsys, folder, "--swap", swap, "--random", 75)
    assert status == 1
    assert rows[0]["node"] == node


# --- a loader that reads wrongly

Wrong = tuple[object, str, Callable[[Any], Any]]  # where, which function, healthy one -> wrong one


def nibbles_exchanged(healthy: Any) -> Any:
    return lambda weight, *rest: healthy(weight >> 4 | weight << 4, *rest)


def scales_of(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda healthy: lambda weight, scale, *rest: healthy(weight, change(scale), *rest)


def names_changed(change: Callable[[str], str]) -> Callable[[Any], Any]:
    """Change the names of the parts that a fused tensor is split into."""

    def wrong(healthy: Any) -> Any:
        def split(*arguments: Any) -> Iterable[tuple[str, Any]]:
            parts = list(healthy(*arguments))
            return [(change(name) if len(parts) > 1 else name, part) for name, part in parts]

        return split

    return wrong


def gate_for_up(name: str) -> str:
    return re.sub("gate_proj|up_proj", lambda m: {"g": "up_proj", "u": "gate_proj"}[m[0][0]], name)


def next_expert(name: str) -> str:
    """Exchange the names of experts 0 and 1."""
    return re.sub(r"(?<=experts\.)\d", lambda m: {"0": "1", "1": "0"}.get(m[0], m[0]), name)


def heads_tiled(healthy: Any) -> Any:
    """Qwen3-Next's rows taken as if each kind stood in one piece."""

    def wrong(packed: Tensor, config: Any, wanted: str) -> Tensor:
        before = {"z": "qkv", "a": "b"}.get(wanted)
        first = len(healthy(packed, config, before)) if before else 0
        return packed[first : first + len(healthy(packed, config, wanted))]

    return wrong


PLAIN = Dialect(fused_trunk=False)  # as the model has them: nothing fused, nothing grouped
CHECKPOINT, READ_MXFP4, READ_FP8 = weights.checkpoint, weights.mxfp4, weights.fp8
EXPERTS = r"(mtp\.)?layers\.\d\.mlp\.experts"
LOADER_FAULTS: dict[str, tuple[Dialect, Wrong, str]] = {
    "high nibble first": (MXFP4, (READ_MXFP4, "dequantize", nibbles_exchanged), EXPERTS),
    "scale of the next group": (
        MXFP4, (READ_MXFP4, "dequantize", scales_of(lambda s: s.roll(1, -1))), EXPERTS,
    ),
    "scale of the next row": (
        MXFP4, (READ_MXFP4, "dequantize", scales_of(lambda s: s.roll(1, 0))), EXPERTS,
    ),
    "scales twice as large": (
        MXFP4, (READ_MXFP4, "dequantize", scales_of(lambda s: s + 1)), EXPERTS,
    ),
    "scale of the next block": (
        QWEN3_5_FP8, (READ_FP8, "dequantize", scales_of(lambda s: s.roll(1, -1))), r".*_proj.*|.*experts",
    ),
    "scales left out": (
        QWEN3_5_FP8, (READ_FP8, "dequantize", scales_of(torch.ones_like)), r".*_proj.*|.*experts",
    ),
    "gate for up": (QWEN3_6, (CHECKPOINT, "_split", names_changed(gate_for_up)), EXPERTS),
    "one expert for another": (QWEN3_6, (CHECKPOINT, "_split", names_changed(next_expert)), EXPERTS),
    "heads tiled": (QWEN3_NEXT, (CHECKPOINT, "_ungroup", heads_tiled), r".*\.in_proj_.*"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADER_FAULTS)
def test_a_broken_loader(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Healthy first, which passes; then broken. The node is one that holds what was read wrongly."""
    dialect, (module, function, wrong), node = LOADER_FAULTS[name]
    member = "Qwen3-Next" if dialect is QWEN3_NEXT else "35B-A3B"
    expected = write(tmp_path / "read", member, dialect, **QUANTIZED_SIZES)
    if dialect.quantized:
        write_plain(tmp_path / "plain", expected, torch.float64, FAMILY[member] | QUANTIZED_SIZES)
    else:
        write(tmp_path / "plain", member, PLAIN, **QUANTIZED_SIZES)
    arguments = [tmp_path / "plain", "--against", tmp_path / "read", "--random", 20]
    assert compared(capsys, *arguments)[0] == 0
    monkeypatch.setattr(module, function, wrong(getattr(module, function)))
    status, rows = compared(capsys, *arguments)
    assert status == 1
    assert re.fullmatch(node, rows[0]["node"]), rows[0]["node"]
