"""Files that no index lists: what is read of them, what is not, and that either is said."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35.errors import InputError
from qwen35.load import load
from tests.support.checkpoints import (
    QUANTIZED_SIZES,
    QWEN3_5,
    QWEN3_5_FP8,
    SINGLE,
    logits_of,
    write,
)
from tests.support.conversions import cli
from tests.support.dialects import quiet_load
from tools.convert import check
from tools.inspect import describe, inspect_checkpoint, open_model
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options
from weights.storage import DTYPE_NAMES, INDEX

PREFIX = "model.language_model."
Tensors = dict[str, Tensor]


def same_model(folder: Path, whole: Path) -> None:
    """The logits of both folders are the same to the bit."""
    assert torch.equal(logits_of(load(folder)), logits_of(load(whole)))


def apart(folder: Path, part: str, file: str) -> None:
    """Move the tensors of a part into a file of their own, which no index names."""
    tensors = load_file(folder / SINGLE)
    moved = {name: tensors.pop(name) for name in list(tensors) if part in name}
    assert moved and tensors
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    (folder / SINGLE).unlink()
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file(moved, folder / file)


def test_an_mtp_head_in_a_file_of_its_own(tmp_path: Path, capfd: Any) -> None:
    """Published so: it drafts, `inspect` names the file, and a conversion takes it along."""
    write(tmp_path / "whole", "35B-A3B")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    apart(tmp_path / "parts", "mtp.", "mtp.safetensors")
    same_model(tmp_path / "parts", tmp_path / "whole")
    model = load(tmp_path / "parts")
    assert model.mtp is not None
    found = describe(open_model(str(tmp_path / "parts")))
    assert found["problems"] == []
    assert any(
        note.startswith("mtp.safetensors: in no index; read from it") for note in found["notes"]
    )
    for source in ("whole", "parts"):
        convert(tmp_path / source, tmp_path / f"{source}-fp4", Options("mxfp4"))
    ours, theirs = (Checkpoint(tmp_path / f"{source}-fp4") for source in ("parts", "whole"))
    assert ours.entries.keys() == theirs.entries.keys()
    assert ours.notes == []


def test_files_that_are_no_part_of_the_model(tmp_path: Path) -> None:
    """An adapter, a broken file, a second copy: named, and in nobody's way; hidden ones are not seen."""
    write(tmp_path / "a", "0.8B")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    folder = tmp_path / "b"
    save_file({"base.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    (folder / ".hidden.safetensors").write_bytes(b"nothing")
    shutil.copy(folder / SINGLE, folder / "consolidated.safetensors")
    with pytest.warns(UserWarning) as caught:
        same_model(folder, tmp_path / "a")
    said = " ".join(str(warning.message) for warning in caught)
    assert "broken.safetensors: not a whole safetensors file" in said
    assert (
        "consolidated.safetensors: in no index; not read from it, since model.safetensors has them"
        in said
    )
    adapter = "adapter_model.safetensors: in no index; not read from it, as no part of this model"
    assert f"{adapter}: base.lora_A.weight" in said
    assert ".hidden" not in said
    found = describe(open_model(str(folder)))
    assert len(found["problems"]) == 3
    assert found["notes"] == []
    assert any("not part of this model" in reason for reason in found["ignored"])
    with pytest.warns(UserWarning) as caught:
        convert(folder, tmp_path / "ranks", Options("bf16", tp=2), check=check)
    assert " ".join(str(warning.message) for warning in caught) == said
    assert not list((tmp_path / "ranks").rglob("*adapter*"))
    [index] = {file.read_text() for file in (tmp_path / "ranks").rglob(INDEX)}
    assert "base.lora_A.weight" not in json.loads(index)["weight_map"]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A model whose MTP head is in a file that no index lists, beside the same in one file."""
    write(tmp_path / "whole", "0.8B")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    apart(tmp_path / "parts", "mtp.", "mtp.safetensors")
    return tmp_path / "parts"


def second(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Another file with an MTP head, which sorts before the first one."""
    tensors = load_file(folder / "mtp.safetensors")
    change(tensors)
    save_file(tensors, folder / "draft.safetensors")


def test_two_files_with_the_same(parts: Path) -> None:
    """Either may be read."""
    second(parts, lambda tensors: None)
    model = quiet_load(parts)
    assert torch.equal(logits_of(model), logits_of(load(parts.parent / "whole")))
    assert model.mtp is not None
    found = describe(open_model(str(parts)))
    assert found["problems"] == []
    same = "since draft.safetensors has them, and are the same: mtp.fc.weight,"
    assert any(note.startswith("mtp.safetensors") and same in note for note in found["notes"])


@pytest.mark.parametrize("how", ["a bit", "dtype", "shape"])
def test_two_files_that_differ(parts: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    """Nothing says which is meant, so neither is taken, nor anything written."""
    name = "mtp.fc.weight"

    def change(tensors: Tensors) -> None:
        if how == "a bit":
            tensors[name].view(torch.int16)[-1, -1] ^= 1
        else:
            old = tensors[name]
            tensors[name] = old.float() if how == "dtype" else torch.cat([old, old])

    second(parts, change)
    theirs = load_file(parts / "draft.safetensors")[name]
    kind = f"{DTYPE_NAMES[theirs.dtype]} {list(theirs.shape)}"
    words = f"from {name} in draft.safetensors ({kind}), and no index says which of them is meant"
    with pytest.raises(InputError, match=re.escape(words)):
        load(parts)
    [problem] = describe(open_model(str(parts)))["problems"]
    assert words in problem
    target = parts.parent / "out"
    status, _, err = cli(capsys, parts, target, "--to", "fp8")
    assert status == 2 and words in err and err.count("\n") == 1
    assert not target.exists()


def test_two_files_that_are_not_needed(parts: Path) -> None:
    """They may differ, and both are named."""
    save_file({"lora": torch.ones(2)}, parts / "a.safetensors")
    save_file({"lora": torch.ones(3)}, parts / "b.safetensors")
    with pytest.warns(UserWarning) as caught:
        same_model(parts, parts.parent / "whole")
    said = [str(warning.message) for warning in caught]
    assert [line.split(": ")[1] for line in said] == ["a.safetensors", "b.safetensors"]
    assert all(line.endswith("no part of this model: lora") for line in said)


def test_two_files_of_which_only_headers_are_there(parts: Path) -> None:
    """The repository is on a hub. The line gives the choice, with both files."""
    second(parts, lambda tensors: tensors["mtp.fc.weight"].mul_(2))
    checkpoint = Checkpoint(parts, is_hollow=True)
    check(checkpoint)
    found = inspect_checkpoint(checkpoint)
    [line] = found.problems
    assert line.startswith(
        "mtp.safetensors: in no index; not read from it, since draft.safetensors"
    )
    assert "were not compared" in line


def test_a_second_copy_under_other_names(tmp_path: Path) -> None:
    """Names without the prefix, and fused experts beside single ones: the index comes first."""
    write(tmp_path / "a", "35B-A3B", replace(QWEN3_5, fused_trunk=False))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / SINGLE)
    bare = {n.removeprefix(PREFIX): t * 2 for n, t in tensors.items() if "norm" in n}
    experts = [n for n in tensors if n.startswith(f"{PREFIX}layers.0.mlp.experts.") and "down" in n]
    fused = torch.stack([tensors[name] for name in experts])
    bare["layers.0.mlp.experts.down_proj"] = fused * 2
    save_file(bare, tmp_path / "b" / "other.safetensors")
    with pytest.warns(UserWarning) as caught:
        same_model(tmp_path / "b", tmp_path / "a")
    said = " ".join(str(warning.message) for warning in caught)
    assert "other.safetensors: in no index; not read from it, since model.safetensors has" in said
    assert "down_proj.weight is given twice, by" in said and "it is not used" in said


def test_scales_of_the_index_come_first(tmp_path: Path) -> None:
    """A scale under another name in a file that no index lists does not stop a weight that has one."""
    write(tmp_path / "a", "397B-A17B", replace(QWEN3_5_FP8, shards=1), **QUANTIZED_SIZES)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    name = f"{PREFIX}layers.0.mlp.experts.0.up_proj.weight_scale"
    save_file({name: torch.ones(2, 2)}, tmp_path / "b" / "scales.safetensors")
    with pytest.warns(UserWarning, match=f"scales.safetensors: in no index; not read .*: {name}"):
        same_model(tmp_path / "b", tmp_path / "a")
    with pytest.warns(UserWarning, match="scales.safetensors: in no index; not read"):
        convert(tmp_path / "b", tmp_path / "c", Options("bf16"), check=check)
    same_model(tmp_path / "c", tmp_path / "a")


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_no_index_lists(parts: Path, equal: bool) -> None:
    """It does not change a tied model, which is whole without it; a conversion leaves it out."""
    name = f"{PREFIX}embed_tokens.weight"
    embedding = load_file(parts / "model-00001-of-00001.safetensors")[name]
    save_file({"lm_head.weight": embedding * (1 if equal else 2)}, parts / "head.safetensors")
    if equal:
        assert quiet_load(parts).config.tie_word_embeddings
    else:
        with pytest.warns(
            UserWarning, match="lm_head.weight is not used: .* head.safetensors, which has it,"
        ):
            same_model(parts, parts.parent / "whole")
    convert(parts, parts.parent / "out", Options("fp8", "all-linear"), check=check)
    assert "lm_head.weight" not in Checkpoint(parts.parent / "out").stored
    assert quiet_load(parts.parent / "out").config.tie_word_embeddings


def test_a_head_that_only_another_file_has(tmp_path: Path) -> None:
    """A model that is not tied needs it."""
    write(tmp_path / "a", "27B")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    apart(tmp_path / "b", "lm_head", "head.safetensors")
    quiet_load(tmp_path / "b")
    same_model(tmp_path / "b", tmp_path / "a")


def test_an_embedding_of_its_own_in_another_file(parts: Path) -> None:
    """An MTP head with one is refused wherever it lies."""
    second(parts, lambda tensors: tensors.update({"mtp.embed_tokens.weight": torch.ones(2, 2)}))
    with pytest.raises(InputError, match=r"mtp\.embed_tokens\.weight differs from embed_tokens"):
        load(parts)


def test_shards_without_their_index(tmp_path: Path) -> None:
    """All safetensors files of a folder are its weights, where nothing says more."""
    write(tmp_path, "0.8B", replace(QWEN3_5, shards=3))
    before = logits_of(load(tmp_path))
    (tmp_path / INDEX).unlink()
    assert torch.equal(logits_of(load(tmp_path)), before)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="missing"):
        load(tmp_path)
