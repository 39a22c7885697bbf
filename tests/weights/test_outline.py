"""The outline of a conversion: what it says before a weight is read is what is then written."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import (
    MXFP4,
    QWEN3_5_FP8,
    QWEN3_6,
    QWEN3_NEXT,
    edit_json,
    edit_tensors,
    write,
)
from tests.support.conversions import LITTLE, MEMBER
from weights.convert import convert
from weights.outline import BLOCK, Outline
from weights.output import Options
from weights.source import folder_source
from weights.storage import INDEX, Stored, open_file

SIZES = LITTLE | {"shared_expert_intermediate_size": 64, "moe_intermediate_size": 64}


def outline(folder: Path, options: Options, seen: Any = lambda checkpoint: None) -> Outline:
    return Outline(folder_source(folder), options, seen)


def on_disk(files: Iterable[Path]) -> int:
    return sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in files)


CASES = {
    "to mxfp4": (QWEN3_6, Options("mxfp4", shard_bytes=200_000)),
    "to fp8": (QWEN3_6, Options("fp8", "all-linear")),
    "from fp8": (QWEN3_5_FP8, Options("mxfp4", "all-linear", "bf16")),
    "decoded": (MXFP4, Options("bf16", shard_bytes=100_000)),
    "for two ranks": (QWEN3_NEXT, Options("mxfp4", tp=2, shard_bytes=50_000)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_written(case: str, tmp_path: Path) -> None:
    dialect, options = CASES[case]
    write(tmp_path / "in", MEMBER, dialect, tokenizer=True, **SIZES)
    for name in ("README.md", "notes.txt", "conversion.json", ".hidden.json"):
        (tmp_path / "in" / name).write_text("{}")
    (tmp_path / "in" / "folder.json").mkdir()
    seen: list[Any] = []
    plan = outline(tmp_path / "in", options, seen.append)
    assert seen == [plan.checkpoint]
    out = tmp_path / "out"
    convert(tmp_path / "in", out, options)
    folders = [out / name for name in plan.folders]
    assert plan.folders == ([""] if options.tp == 1 else ["rank-0-of-2", "rank-1-of-2"])
    said = plan.describe()
    assert said["folders"] == [name for name in plan.folders if name]
    files = sorted(file.name for file in folders[0].glob("*.safetensors"))
    assert [plan.name(i) for i in range(len(plan.files))] == files
    assert [row["file"] for row in said["files"]] == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    nbytes: dict[str, int] = {}
    for rank, folder in enumerate(folders):
        for file, row, part in zip(files, said["files"], plan.files, strict=True):
            held = load_file(folder / file)
            assert (row["tensors"], row["bytes"]) == (len(held), (folder / file).stat().st_size)
            assert (folder / file).read_bytes().startswith(plan.header(part))
            for stored in open_file(folder / file).values():
                kind = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.float32: "F32",
                        torch.float8_e4m3fn: "F8_E4M3"}[stored.dtype]  # fmt: skip
                nbytes[kind] = nbytes.get(kind, 0) + stored.nbytes
        assert {
            name: file for file in files for name in load_file(folder / file)
        } == plan.file_names()
        assert (folder / INDEX).read_text() == plan.index()
        config = plan.config(rank, is_tied=False)
        assert json.loads((folder / "config.json").read_text()) == config
        assert config.get("tensor_parallel") == (
            {"rank": rank, "size": 2} if options.tp == 2 else None
        )
        assert {file.name for file in folder.iterdir()} == {*files, *said["beside"]}
    assert said["beside"][:3] == ["config.json", INDEX, "conversion.json"]
    assert "notes.txt" in said["beside"] and "README.md" not in said["beside"]
    assert said["bytes_by_dtype"] == nbytes
    assert said["bytes"] == plan.total == sum(nbytes.values())
    items = [item for file in plan.files for item, _ in file.items]
    assert said["parameters"] == {
        to: sum(item.to == to for item in items) for to in {item.to for item in items}
    }
    index = json.loads(plan.index())
    assert plan.index() == json.dumps(index, indent=2)  # for readers, too
    assert index["metadata"]["total_size"] * options.tp == plan.total
    assert [*index["weight_map"]] == sorted(index["weight_map"])
    # The room is enough for all files, and for not much more.
    everything = [file for file in out.rglob("*") if file.is_file()]
    room = plan.room([*range(len(files))])
    assert on_disk(everything) < room < on_disk(everything) + (60 + 8 * len(files)) * BLOCK
    weights = [folder / file for folder in folders for file in files]
    rest = plan.room([])
    assert (
        room - rest >= on_disk(weights) and room - rest <= on_disk(weights) + 4 * len(files) * BLOCK
    )
    last = [folder / files[-1] for folder in folders]
    one = plan.room([len(files) - 1]) - rest
    assert on_disk(last) + BLOCK <= one <= on_disk(last) + 4 * BLOCK


def test_modules_that_stay_are_excluded(tmp_path: Path) -> None:
    """Matrices and convolutions, fused experts one by one; no norm, no embedding, no scale."""
    write(tmp_path, MEMBER, replace(QWEN3_6, shards=1), **SIZES)
    layer = "model.language_model.layers"
    scale = f"{layer}.1.self_attn.k_scale"
    edit_tensors(tmp_path, lambda tensors: tensors.update({scale: torch.ones(2, 1)}))
    claim = outline(tmp_path, Options("mxfp4")).config(0, is_tied=True)["quantization_config"]
    excluded = claim["exclude"]
    assert excluded[0] == "lm_head" and len(set(excluded)) == len(excluded)
    assert {f"{layer}.0.linear_attn.conv1d", f"{layer}.1.mlp.gate", "mtp.fc"} <= {*excluded}
    assert {f"mtp.layers.0.mlp.experts.{i}.{p}_proj" for i in range(2) for p in ("up", "down")} <= {
        *excluded
    }
    for name in excluded:
        assert not name.endswith(("norm", "embed_tokens", "k_scale", "A_log")), name
        assert "layers.0.mlp.experts" not in name or name.startswith("mtp.")


def test_a_config_says_the_formats_and_the_head(tmp_path: Path) -> None:
    """An old claim goes, wherever it stands; the head is tied only if it is in the output."""
    write(tmp_path, "0.8B", num_hidden_layers=2, full_attention_interval=2)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    claim = {"quant_method": "fp8"}
    changes = {"quantization_config": claim, "tie_word_embeddings": True}
    edit_json(tmp_path / "config.json", text_config=text | changes, **changes)
    plan = outline(tmp_path, Options("bf16"))
    for is_tied in (True, False):
        config = plan.config(0, is_tied=is_tied)
        for part in (config, config["text_config"]):
            assert "quantization_config" not in part
            assert part["tie_word_embeddings"] is is_tied
    edit_json(tmp_path / "config.json", text_config=text)
    config = outline(tmp_path, Options("bf16")).config(0, is_tied=False)
    assert "tie_word_embeddings" not in config["text_config"]
    fp8 = outline(tmp_path, Options("fp8", "all-linear")).config(0, is_tied=True)
    assert fp8["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_a_head_is_tied_if_the_output_has_one_or_two_alike(
    tied: bool, stored: bool, tmp_path: Path
) -> None:
    write(tmp_path, "0.8B", num_hidden_layers=1, full_attention_interval=1)
    edit_json(tmp_path / "config.json", tie_word_embeddings=tied)
    name = "model.language_model.embed_tokens.weight"
    if stored or not tied:
        edit_tensors(tmp_path, lambda ts: ts.update({"lm_head.weight": ts[name].clone()}))
    plan = outline(tmp_path, Options("bf16"))
    held = open_file(tmp_path / "model.safetensors")
    other = replace(held[name], read=lambda: held[name].read() + 1)

    def written(folder: str, asked: str) -> Stored:
        assert folder == ""
        return held[asked]

    def differs(folder: str, asked: str) -> Stored:
        return other if asked == name else held[asked]

    assert plan.is_tied(written) is tied
    assert plan.is_tied(differs) is (tied and not stored)
