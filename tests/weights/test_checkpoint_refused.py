"""Checkpoints that are refused, each in one line that names the thing."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35.errors import InputError
from qwen35.load import load, locate
from tests.support.checkpoints import (
    INDEX,
    QWEN3_5,
    QWEN3_NEXT,
    SINGLE,
    assert_names,
    edit_json,
    edit_tensors,
    logits_of,
    write,
    write_index,
    write_tensors,
)

# --- bad checkpoints ------------------------------------------------------------------------------


PREFIX = "model.language_model."


NORM = f"{PREFIX}layers.0.input_layernorm.weight"


FUSED = f"{PREFIX}layers.0.mlp.experts.gate_up_proj"


DOWN = f"{PREFIX}layers.1.mlp.experts.down_proj"


SINGLE_EXPERT = f"{PREFIX}layers.0.mlp.experts.3.up_proj.weight"


def _set(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], list[str]]] = {
    "missing": (lambda t: t.pop(NORM), ["missing", "layers.0.input_layernorm.weight"]),
    "missing fused experts": (lambda t: t.pop(FUSED), ["missing", "layers.0.mlp.experts.0"]),
    "missing embedding": (
        lambda t: t.pop(f"{PREFIX}embed_tokens.weight"),
        ["missing", "embed_tokens.weight"],
    ),
    "misnamed": (
        lambda t: t.update({f"{PREFIX}layers.0.input_norm.weight": t.pop(NORM)}),
        ["layers.0.input_layernorm.weight"],
    ),
    "unknown": (
        _set(f"{PREFIX}layers.0.extra.weight", torch.ones(3)),
        [f"{PREFIX}layers.0.extra.weight", "not part"],
    ),
    "a layer too many": (
        _set(f"{PREFIX}layers.8.input_layernorm.weight", torch.ones(64)),
        [f"{PREFIX}layers.8.input_layernorm.weight", "not part"],
    ),
    "wrong shape": (
        _set(NORM, torch.ones(63)),
        ["layers.0.input_layernorm.weight", "[63]", "[64]"],
    ),
    "transposed": (
        lambda t: t.update({f"{PREFIX}layers.3.self_attn.o_proj.weight": torch.ones(256, 64)}),
        ["layers.3.self_attn.o_proj.weight", "[256, 64]", "[64, 256]"],
    ),
    "fused experts, odd rows": (
        _set(FUSED, torch.ones(16, 63, 64)),
        ["layers.0.mlp.experts.0", "64"],
    ),
    "fused experts, two axes": (_set(FUSED, torch.ones(64, 64)), [FUSED, "[64, 64]", "3"]),
    "fused experts, no axis": (_set(DOWN, torch.ones(())), [DOWN, "[]", "3"]),
    "too few fused experts": (
        _set(DOWN, torch.ones(15, 64, 32)),
        [DOWN, "[15, 64, 32]", "num_experts = 16"],
    ),
    "too many fused experts": (
        _set(DOWN, torch.ones(17, 64, 32)),
        [DOWN, "[17, 64, 32]", "num_experts = 16"],
    ),
    "wrong dtype": (
        _set(NORM, torch.ones(64, dtype=torch.uint8)),
        [NORM, "U8", "BF16"],
    ),
    "a boolean": (_set(NORM, torch.ones(64, dtype=torch.bool)), [NORM, "BOOL", "BF16"]),
    "fused and per expert at once": (
        _set(SINGLE_EXPERT, torch.ones(32, 64)),
        ["layers.0.mlp.experts.3.up_proj.weight", "twice", FUSED, SINGLE_EXPERT],
    ),
    "two prefixes at once": (
        _set("model.norm.weight", torch.ones(64)),
        ["norm.weight", "twice", "model.norm.weight", f"{PREFIX}norm.weight"],
    ),
    "half an mtp head": (
        lambda t: t.pop("mtp.fc.weight"),
        ["missing", "mtp.fc.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_bad_tensors_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: list[str]
) -> None:
    """The tensor, and both values where there are two."""
    write(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, words)


def test_grouped_projections_that_the_heads_do_not_divide(tmp_path: Path) -> None:
    """Qwen3-Next's packing is undone by the config's head counts."""
    write(tmp_path, "Qwen3-Next", replace(QWEN3_NEXT, shards=1))
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    edit_tensors(tmp_path, _set(name, torch.ones(225, 64)))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, [name, "[225, 64]"])


def test_a_missing_folder(tmp_path: Path) -> None:
    """Neither guessed nor downloaded: an absolute path is a folder."""
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(InputError, match="no such folder"):
        locate(tmp_path / "absent")
    with pytest.raises(InputError, match=r"absent.*owner/name"):
        locate("absent")


def test_a_folder_without_weights_or_config(tmp_path: Path) -> None:
    """Each names the file that was looked for."""
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load(tmp_path)
    write(tmp_path, "0.8B")
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, [str(tmp_path), SINGLE, INDEX])


def test_pickles_are_not_read(tmp_path: Path) -> None:
    """A folder that holds only a pickle has no weights."""
    write(tmp_path, "0.8B")
    torch.save(load_file(tmp_path / SINGLE), tmp_path / "pytorch_model.bin")
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InputError, match="neither"):
        load(tmp_path)


def test_a_hub_model_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no network, the line says why, and names what was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection\nmore\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError) as caught:
        locate("nobody/nothing")
    assert_names(caught, ["nobody/nothing", "no connection"])


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated in the data": _truncate,
    "truncated in the header": lambda file: os.truncate(file, 100),
    "empty": lambda file: os.truncate(file, 0),
    "garbage": lambda file: file.write_bytes(b"not a safetensors file " * 50),
    "header length beyond the file": lambda file: file.write_bytes(b"\xff" * 8 + b"{}"),
    "a header of 2^60 bytes": lambda file: file.write_bytes(
        struct.pack("<Q", 1 << 60) + file.read_bytes()[8:]
    ),
    "trailing bytes": lambda file: file.write_bytes(file.read_bytes() + b"x" * 64),
    "a pickle": lambda file: torch.save({"a": torch.ones(2)}, file),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """Nothing of a file that is not whole is used."""
    write(tmp_path, "0.8B")
    damage(tmp_path / SINGLE)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, [str(tmp_path / SINGLE)])


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file, whatever becomes of it; the tensors' bytes stay."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


OTHER_NORM = f"{PREFIX}layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[OTHER_NORM].update(data_offsets=h[NORM]["data_offsets"]),
        lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 128]),
        lambda h: h[NORM].update(data_offsets=[-128, 0]),
        lambda h: h[NORM].update(shape=[1 << 30, 1 << 30]),
        lambda h: h[NORM].update(shape=[1 << 62], data_offsets=[0, 1 << 63]),
    ],
    ids=["overlap", "beyond the file", "before it", "2^60 numbers", "2^62 numbers, 2^63 bytes"],
)
def test_tensors_that_lie_elsewhere_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """A hostile header may point two names at the same bytes, or one outside the file."""
    write(tmp_path, "0.8B")
    edit_header(tmp_path / SINGLE, change)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, [str(tmp_path / SINGLE)])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A whole checkpoint of two shards, with a stranger's file beside the folder."""
    folder = tmp_path / "model"
    write(folder, "0.8B", replace(QWEN3_5, shards=2))
    write_tensors(tmp_path, {"x": torch.ones(1)})
    return folder


def weight_map(folder: Path) -> dict[str, Any]:
    """The names and files that an index promises."""
    return json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "sub/model.safetensors",
        "./model-00001-of-00002.safetensors",
        "..",
        "",
        "model-00001-of-00002.bin",
        "/model.safetensors",
        "ABSOLUTE",
        7,
        None,
        ["model-00001-of-00002.safetensors"],
    ],
    ids=repr,
)
def test_an_index_may_not_leave_its_folder(sharded: Path, file: Any) -> None:
    """A file name of an index is a plain name of a safetensors file."""
    outside = str(sharded.parent / SINGLE) if file == "ABSOLUTE" else file
    names = weight_map(sharded)
    names["norm.weight"] = outside
    write_index(sharded, names)
    with pytest.raises(InputError) as caught:
        load(sharded)
    assert_names(caught, [str(sharded / INDEX)])


def test_an_index_that_names_an_absent_tensor(sharded: Path) -> None:
    """The promise and the file are both named."""
    names = weight_map(sharded)
    names["model.language_model.ghost.weight"] = "model-00002-of-00002.safetensors"
    write_index(sharded, names)
    with pytest.raises(InputError) as caught:
        load(sharded)
    assert_names(caught, ["ghost.weight", "model-00002-of-00002.safetensors", INDEX])


def test_an_index_that_forgets_a_tensor(sharded: Path) -> None:
    """A shard of another conversion holds names that the index does not promise."""
    names = weight_map(sharded)
    forgotten = sorted(names)[0]
    file = names.pop(forgotten)
    write_index(sharded, names)
    with pytest.raises(InputError) as caught:
        load(sharded)
    assert_names(caught, [forgotten, file, INDEX])


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    """Which of the two would count is not for the reader to choose."""
    file = sharded / "model-00002-of-00002.safetensors"
    twice, home = next(item for item in weight_map(sharded).items() if item[1] != file.name)
    save_file(load_file(file) | {twice: load_file(sharded / home)[twice]}, file)
    with pytest.raises(InputError) as caught:
        load(sharded)
    assert_names(caught, [str(file), twice, home])


def test_a_missing_shard_is_named(sharded: Path) -> None:
    """A download that stopped leaves such a folder."""
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: no such file"):
        load(sharded)


def test_a_dangling_link_is_named(sharded: Path) -> None:
    """A hub cache whose blobs were deleted."""
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to("gone")
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: no such file"):
        load(sharded)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}', '{"weight_map": null}']
)
def test_an_index_that_cannot_be_read(sharded: Path, content: str) -> None:
    """The index is named; no traceback of the JSON reader."""
    (sharded / INDEX).write_text(content)
    with pytest.raises(InputError, match="weight_map"):
        load(sharded)


def test_an_empty_index_misses_everything(sharded: Path) -> None:
    """No tensor at all is a missing tensor; files that it does not list are read all the same."""
    write_index(sharded, {})
    before = logits_of(load(sharded))
    for file in sharded.glob("*.safetensors"):
        file.rename(file.with_suffix(".other"))
    with pytest.raises(InputError, match=r"0 parameters.*8 layers"):
        load(sharded)
    assert before.isfinite().all()


def test_the_config_of_another_model_is_caught(tmp_path: Path) -> None:
    """A wrong size in the config shows as the first tensor whose shape differs."""
    write(tmp_path, "0.8B", replace(QWEN3_5, nested=False))
    edit_json(tmp_path / "config.json", intermediate_size=100)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, ["mlp.gate_proj.weight", "[96, 64]", "[100, 64]"])
