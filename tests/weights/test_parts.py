"""What a checkpoint makes of its tensors: parts of fused ones, blocks and formats as it claims them."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import MXFP4, QWEN3_5, QWEN3_5_FP8, QWEN3_NEXT, edit_json, write
from tests.support.conversions import LITTLE, MEMBER
from weights.checkpoint import Checkpoint

SIZES = LITTLE | {"shared_expert_intermediate_size": 64, "moe_intermediate_size": 64}
EXPERTS = "layers.1.mlp.experts"


def test_fused_experts_are_read_one_by_one(tmp_path: Path) -> None:
    """Of gate and up, the gate's rows come first."""
    write(tmp_path, MEMBER, QWEN3_5, **SIZES)
    held = load_file(tmp_path / "model.safetensors")
    fused = held[f"model.language_model.{EXPERTS}.gate_up_proj"]
    down = held[f"model.language_model.{EXPERTS}.down_proj"]
    entries = Checkpoint(tmp_path).entries
    for e in range(2):
        parts = {"gate": fused[e, :64], "up": fused[e, 64:], "down": down[e]}
        for name, expected in parts.items():
            entry = entries[f"{EXPERTS}.{e}.{name}_proj.weight"]
            assert entry.shape == tuple(expected.shape) and torch.equal(entry.read(), expected)


def test_grouped_projections_are_parted(tmp_path: Path) -> None:
    """And every other parameter is what was written."""
    expected = write(tmp_path, "Qwen3-Next", replace(QWEN3_NEXT, shards=1), **SIZES)
    entries = Checkpoint(tmp_path).entries
    assert entries.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(entries[name].read().float(), tensor), name


def test_blocks_are_those_of_the_claim(tmp_path: Path) -> None:
    dialect = replace(QWEN3_5_FP8, shards=1, block=(32, 64))
    write(tmp_path, MEMBER, dialect, **SIZES)
    checkpoint = Checkpoint(tmp_path)
    entry = checkpoint.entries[f"{EXPERTS}.0.up_proj.weight"]
    assert (entry.block, entry.scale_block) == ((32, 64), (32, 64))


def test_formats_are_compared_with_the_claim(tmp_path: Path) -> None:
    """Those of a healthy folder agree; a list that leaves out a quantised module does not."""
    write(tmp_path, MEMBER, replace(MXFP4, shards=1), **SIZES)
    assert Checkpoint(tmp_path).problems == []
    claim = Checkpoint(tmp_path).document["quantization_config"]
    name = f"model.language_model.{EXPERTS}.0.up_proj"
    edit_json(
        tmp_path / "config.json",
        quantization_config=claim | {"exclude": [*claim["exclude"], name]},
    )
    (problem,) = Checkpoint(tmp_path).problems
    assert "layers.*.mlp.experts.*.up_proj" in problem


def test_files_that_no_index_lists(tmp_path: Path) -> None:
    """A quantised weight with its scales is taken from there; one without is of no use."""
    write(tmp_path, MEMBER, replace(MXFP4, shards=1), **SIZES)
    name = f"model.language_model.{EXPERTS}.1.up_proj.weight"
    held = load_file(tmp_path / "model.safetensors")
    moved = {n: held.pop(n) for n in (name, f"{name}_scale")}
    save_file(held, tmp_path / "model.safetensors")
    more = "model.language_model.layers.7.extra.weight"
    codes = torch.zeros(4, 64).to(torch.float8_e4m3fn)
    save_file(moved | {more: codes}, tmp_path / "other.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.entries[f"{EXPERTS}.1.up_proj.weight"].format == "mxfp4"
    assert checkpoint.ignored[more] == "in a file that no index lists, and of no use"
    (problem,) = (line for line in checkpoint.problems if more in line)
    assert problem.startswith("other.safetensors: ") and problem.endswith("; it is not used")
