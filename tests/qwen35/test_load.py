"""What `load` is asked for, and what of the file it takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from qwen35.errors import InputError
from qwen35.load import TINY, Loader, load, locate
from qwen35.parallel.ranks import Ranks
from tests.support.checkpoints import FP8_CHANNEL, QUANTIZED_SIZES, QWEN3_5_FP8, write
from tests.support.ranks import on_threads


def test_a_dtype_or_its_name() -> None:
    for name in ("float32", "bfloat16", "float64"):
        wanted = getattr(torch, name)
        assert Loader(TINY, dtype=name).dtype is Loader(TINY, dtype=wanted).dtype is wanted
    assert Loader(TINY, dtype=torch.float16).dtype is torch.float16
    for bad in ("float8", "", torch.int32, 4):
        with pytest.raises(InputError, match=r"dtype = .*; expected float32, bfloat16, float64"):
            Loader(TINY, dtype=bad)  # pyright: ignore


def test_pickles_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything else that a repository holds is."""
    pickles = ["pytorch_model.bin", "old/model.pt", "consolidated.00.pth"]
    others = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "bin/notes.txt"]
    left: list[str] = []

    def download(name: str, **given: Any) -> str:
        assert name == "owner/name"
        left.extend(filter_repo_objects([*pickles, *others], **given))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("owner/name") == tmp_path
    assert left == others


def test_scales_are_cut_with_their_rows(tmp_path: Path) -> None:
    """Even if there are only two, one for each rank."""
    sizes = QUANTIZED_SIZES | {
        "linear_num_key_heads": 4, "shared_expert_intermediate_size": 256, "intermediate_size": 256,
    }  # fmt: skip
    dialect = replace(QWEN3_5_FP8, claim="quark", quantized=(("*.mlp.experts.*", FP8_CHANNEL),))
    write(tmp_path, "35B-A3B", dialect, **sizes | {"moe_intermediate_size": 2})
    name = "experts.5.up_proj"
    whole = Loader(tmp_path).stage("layers.1.mlp").get_submodule(name)

    def part(ranks: Ranks) -> Any:
        return load(tmp_path, ranks=ranks).get_submodule(f"layers.1.mlp.{name}")

    for rank, found in enumerate(on_threads(2, part)):
        assert torch.equal(
            found.weight.view(torch.uint8), whole.weight.view(torch.uint8)[rank, None]
        )
        assert torch.equal(found.weight_scale, whole.weight_scale[rank, None])


def test_blocks_have_the_size_that_the_file_says(tmp_path: Path) -> None:
    write(tmp_path, "35B-A3B", replace(QWEN3_5_FP8, block=(64, 32)), **QUANTIZED_SIZES)
    loader = Loader(tmp_path)
    expert = loader.stage("layers.0.mlp").get_submodule("experts.3.down_proj")
    entry = loader.checkpoint.entries["layers.0.mlp.experts.3.down_proj.weight"]
    decoded = expert(torch.eye(192)).T
    assert torch.equal(decoded, entry.read(torch.float32))
