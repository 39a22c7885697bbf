"""Helpers of the conversion tests: small checkpoints, contents of folders, expected results."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from tests.support.checkpoints import (
    INDEX,
    MXFP4_ATTENTION,
    MXFP4_MTP,
    MXFP4_SHARED,
    QUANTIZED_SIZES,
    QWEN3_5,
    QWEN3_5_FP8,
    QWEN3_6,
    QWEN3_NEXT,
    QWEN3_NEXT_FP8,
    Dialect,
    group_projections,
    write,
)
from tests.support.command import outcome
from tests.support.dialects import MEMBER
from tests.support.family import FAMILY
from tools.convert import build_parser, main
from weights import mxfp4
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options
from weights.quantization import PREFIX

SIZES = FAMILY[MEMBER] | QUANTIZED_SIZES

CONFIG = Config.from_dict(SIZES)

BF16, F32, U8 = torch.bfloat16, torch.float32, torch.uint8

TO_MXFP4, TO_BF16 = Options("mxfp4"), Options("bf16")

ALL_LINEAR = Options("mxfp4", "all-linear")


# A model of two layers and two experts, for tests that convert it many times.
LITTLE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by relative name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder. Asserts that each is in the file that the index names."""
    found: dict[str, Tensor] = {}
    home: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        assert not held.keys() & found.keys()
        found |= held
        home |= dict.fromkeys(held, file.name)
    if (folder / INDEX).exists():
        assert json.loads((folder / INDEX).read_text())["weight_map"] == home
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Assert the same names, dtypes, shapes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        other = wanted[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert tensor.flatten().view(U8).equal(other.contiguous().flatten().view(U8)), name


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Assert that the block does not write, create, rename or remove anything in the folder."""

    def state() -> Any:
        files = sorted(folder.rglob("*"))
        return contents(folder), [(str(f), f.stat().st_mtime_ns, f.stat().st_ino) for f in files]

    before = state()
    yield
    assert state() == before


EXPERTS_CHOSEN = r"layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight"

LINEAR_CHOSEN = (
    r"(mtp\.)?layers\.\d+\.(mlp\.((shared_expert|experts\.\d+)\.)?(gate|up|down)_proj"
    r"|self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkvz?|in_proj_z|out_proj))\.weight"
)

CHOSEN = {"experts": EXPERTS_CHOSEN, "all-linear": LINEAR_CHOSEN}


def wanted_of(
    source: Path, values: dict[str, Tensor], dialect: Dialect, config: Config, what: str | None
) -> dict[str, Tensor]:
    """The tensors that a conversion of `source` has to give, from its bytes and parameter values.

    what: a key of CHOSEN, or None for a conversion to BF16.
    """
    values = group_projections(values, config) if dialect.grouped else values
    wanted: dict[str, Tensor] = {}
    before = tensors_of(source)
    for name, tensor in before.items():
        bare = PREFIX.sub("", name)
        if bare.endswith(("_scale", "_scale_inv")):
            continue
        block, _, fused = bare.rpartition(".experts.")
        parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(fused)
        params = (
            [
                f"{block}.experts.{e}.{p}_proj.weight"
                for e in range(config.num_experts)
                for p in parts
            ]
            if parts
            else [bare]
        )
        stays = what is not None and tensor.dtype == U8
        if not stays and (what is None or not re.fullmatch(CHOSEN[what], params[0])):
            is_plain = tensor.dtype in (BF16, F32)
            wanted[name] = tensor if is_plain else values[bare].float().bfloat16()
            continue
        for param in params:
            full = name.removesuffix(bare) + param
            if tensor.dtype == U8:  # MXFP4 already
                packed, scale = tensor, before[f"{name}_scale"].view(U8)
            else:
                packed, scale = mxfp4.quantize(values[param].float())
            wanted |= {full: packed, f"{full}_scale": scale}
    return wanted


SOURCES = {
    "qwen3.5": QWEN3_5,
    "qwen3.6": QWEN3_6,
    "per expert, flat": replace(
        QWEN3_5, fused_trunk=False, prefix="model.", nested=False, visual=False
    ),
    "no prefix": replace(QWEN3_5, prefix="", shards=3),
    "without mtp": replace(QWEN3_5, mtp=False),
    "qwen3-next": QWEN3_NEXT,
    "fp8": QWEN3_5_FP8,
    "fp8, small blocks": replace(QWEN3_5_FP8, block=(32, 48), shards=1),
    "qwen3-next fp8": QWEN3_NEXT_FP8,
}

MIXED = {
    "mxfp4, mixers fp8": MXFP4_ATTENTION,
    "mxfp4, mtp experts too": MXFP4_MTP,
    "mxfp4, shared expert too": MXFP4_SHARED,
}

MANY_SOURCES = {**SOURCES, **MIXED}


def cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run `python -m tools.convert` in this process. Returns status, stdout and stderr."""
    return outcome(build_parser, main, capsys, *args)


def check_refused(
    capsys: pytest.CaptureFixture[str],
    source: Path,
    target: Path,
    *args: object,
    words: list[str],
    left: bool = False,
) -> None:
    """Assert exit status 2, one line with these words, an unchanged source, and no files left
    behind.

    left: whether the target existed before and stays as it was, or holds an unfinished conversion.
    """
    args = args if "--to" in args else ("--to", "mxfp4", *args)
    place = source if source.is_dir() else source.parent
    before = contents(target) if left and target.is_dir() else {}
    with untouched(place) if not target.is_relative_to(place) else untouched(source.parent):
        status, out, err = cli(capsys, source, target, *args)
    assert (status, out) == (2, ""), err
    assert err.count("\n") == 1
    assert not [word for word in words if word not in err], err
    if left:
        assert not target.is_dir() or contents(target) == before
    else:
        assert not target.exists()


@pytest.fixture
def little(tmp_path: Path) -> Path:
    """A small source in one file."""
    write(tmp_path / "in", MEMBER, **LITTLE)
    return tmp_path / "in"


class StoppedError(Exception):
    """Stands for any event that ends a process early."""


def stop_at(source: Path, target: Path, options: Options, part: float) -> None:
    """Stop a conversion after a fraction `part` of its bytes. The target is then unfinished."""

    def progress(done: int, total: int) -> None:
        if done > part * total:
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, target, options, progress=progress)
    with pytest.raises(InputError, match="unfinished"):
        Checkpoint(target)
