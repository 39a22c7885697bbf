"""What `load` is asked for: dtypes by their names, and files of the hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from qwen35.errors import InputError
from qwen35.load import TINY, Loader, locate


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
