"""Checkpoint folders: every dialect gives the same model, and every bad file gives one line."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import TINY, load, locate
from reference.model import Model
from tests.support.checkpoints import (
    IDS,
    INDEX,
    QWEN3_5,
    QWEN3_6,
    QWEN3_NEXT,
    SINGLE,
    Dialect,
    assert_names,
    edit_json,
    edit_tensors,
    logits_of,
    write,
    write_hole,
    write_index,
    write_tensors,
)
from tests.support.family import FAMILY, randomise
from tests.support.memory import peak_anonymous_memory
from tests.support.oracle import within_twice
from weights.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]


def model_of(expected: dict[str, Tensor], sizes: dict[str, Any]) -> Model:
    """A model that holds exactly these parameters, built without the loader."""
    config = Config.from_dict(sizes)
    if not any(name.startswith("mtp.") for name in expected):
        config = replace(config, mtp_num_hidden_layers=0)
    model = Model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(expected[name])
    return model.eval().requires_grad_(False)


# --- dialects -------------------------------------------------------------------------------------

DIALECTS = {
    "qwen3.5": QWEN3_5,
    "qwen3.6": QWEN3_6,
    "per-expert trunk, fused mtp": replace(QWEN3_5, fused_trunk=False, fused_mtp=True),
    "per-expert both": replace(QWEN3_5, fused_trunk=False, fused_mtp=False),
    "fused both": replace(QWEN3_5, fused_mtp=True),
    "short prefix, flat": replace(QWEN3_5, prefix="model.", nested=False, visual=False),
    "no prefix": replace(QWEN3_5, prefix=""),
    "old rope keys": replace(QWEN3_5, nested=False, old_rope=True),
    "shards": replace(QWEN3_5, shards=4),
    "without mtp": replace(QWEN3_5, mtp=False),
    "qwen3-next": QWEN3_NEXT,
    "grouped, fused": replace(QWEN3_NEXT, fused_trunk=True, fused_mtp=True, shards=1, wide=True),
}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())
def test_every_dialect_gives_the_same_model(tmp_path: Path, dialect: Dialect) -> None:
    """One set of values, a dozen layouts: the same parameters and the same bits of logits."""
    expected = write(tmp_path, "122B-A10B", dialect)
    model = load(tmp_path, dtype=torch.float32)
    found = {name: p.float() for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
    assert (model.mtp is not None) == dialect.mtp
    assert torch.equal(logits_of(model), logits_of(model_of(expected, FAMILY["122B-A10B"])))


@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_every_member_loads(tmp_path: Path, member: str, nested: bool) -> None:
    """Dense, tied, any head ratio; a tied model has one matrix under two names."""
    dialect = QWEN3_NEXT if member == "Qwen3-Next" else QWEN3_5
    expected = write(tmp_path, member, replace(dialect, nested=nested))
    assert ("lm_head.weight" in expected) is not FAMILY[member]["tie_word_embeddings"]
    model = load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(model), logits_of(model_of(expected, FAMILY[member])))
    tied = model.lm_head.weight is model.embed_tokens.weight
    assert tied is FAMILY[member]["tie_word_embeddings"]


def test_tied_flag_may_stand_in_the_text_config(tmp_path: Path) -> None:
    """The flag is at the top level in some repositories and in text_config in others."""
    write(tmp_path, "0.8B", replace(QWEN3_5, nested=True))
    document = json.loads((tmp_path / "config.json").read_text())
    document["text_config"]["tie_word_embeddings"] = document.pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(document))
    model = load(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_tied_checkpoint_may_repeat_its_head(tmp_path: Path) -> None:
    """Some exporters write the tied matrix twice; the second one is put aside and listed."""
    write(tmp_path, "0.8B")
    embedding = "model.language_model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    model = load(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_vision_tensors_are_listed_as_ignored(tmp_path: Path) -> None:
    """What is left out is said, by its name in the file."""
    write(tmp_path)
    assert sorted(Checkpoint(tmp_path).ignored) == [
        "model.visual.blocks.0.norm1.bias",
        "model.visual.merger.linear_fc1.weight",
        "model.visual.patch_embed.proj.weight",
    ]


def test_mtp_tensors_are_put_aside_where_the_config_has_no_mtp(tmp_path: Path) -> None:
    """mtp_num_hidden_layers = 0 wins over what lies in the file."""
    expected = write(tmp_path, "0.8B", QWEN3_5)
    document = json.loads((tmp_path / "config.json").read_text())
    document["text_config"]["mtp_num_hidden_layers"] = 0
    (tmp_path / "config.json").write_text(json.dumps(document))
    model = load(tmp_path)
    assert model.mtp is None
    assert {name for name, _ in model.named_parameters()} == {
        name for name in expected if not name.startswith("mtp.")
    }


def test_symlinked_shards_work(tmp_path: Path) -> None:
    """A hub cache is a folder of links into another one."""
    write(tmp_path / "blobs", "0.8B", replace(QWEN3_5, shards=2))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert torch.equal(logits_of(load(snapshot)), logits_of(load(tmp_path / "blobs")))


def test_an_index_wins_over_a_single_file(tmp_path: Path) -> None:
    """Left-overs of an interrupted conversion are named beside an index, and not used."""
    expected = write(tmp_path, "0.8B", replace(QWEN3_5, shards=2))
    before = logits_of(load(tmp_path))
    again = {"model.language_model.norm.weight": torch.ones(64), "left.over": torch.ones(1)}
    save_file(again, tmp_path / SINGLE)
    with pytest.warns(UserWarning, match="not used where another file has the name: .*norm"):
        assert torch.equal(logits_of(load(tmp_path)), before)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check({name: tuple(tensor.shape) for name, tensor in expected.items()})
    assert checkpoint.entries.keys() == expected.keys()
    assert "not part of this model" in checkpoint.ignored["left.over"]


def test_the_embedded_checkpoint_loads() -> None:
    """No download: the default model comes with the repository and has a drafting head."""
    assert locate(None) == TINY
    model = load(locate(None))
    assert model.mtp is not None
    assert logits_of(model).isfinite().all()


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wide", "asked", "dense", "exact", "experts"),
    [
        (True, None, torch.bfloat16, torch.float32, torch.bfloat16),
        (True, torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
        (True, torch.float32, torch.float32, torch.float32, torch.bfloat16),
        (True, torch.float64, torch.float64, torch.float64, torch.bfloat16),
        (False, None, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (False, torch.float32, torch.float32, torch.float32, torch.bfloat16),
    ],
)
def test_dtypes_of_a_loaded_model(
    tmp_path: Path,
    wide: bool,
    asked: torch.dtype | None,
    dense: torch.dtype,
    exact: torch.dtype,
    experts: torch.dtype,
) -> None:
    """A_log and the delta net's norm are never narrowed; experts keep the file's dtype."""
    write(tmp_path, dialect=replace(QWEN3_5, wide=wide))
    for name, parameter in load(tmp_path, dtype=asked).named_parameters():
        if ".experts." in name:
            assert parameter.dtype == experts, name
        elif name.endswith((".A_log", ".linear_attn.norm.weight")):
            assert parameter.dtype == exact, name
        else:
            assert parameter.dtype == dense, name


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64])
def test_the_checkpoints_own_dtype_is_the_default(tmp_path: Path, stored: torch.dtype) -> None:
    """Fine-tunes come in other plain dtypes than BF16."""
    expected = write(tmp_path, "0.8B", dtype=stored)
    model = load(tmp_path)
    assert model.embed_tokens.weight.dtype == stored
    assert torch.equal(model.norm.weight.double(), expected["norm.weight"].to(stored).double())
    assert logits_of(model).isfinite().all()


def test_parameters_ask_for_no_gradients_and_the_model_is_in_eval_mode(tmp_path: Path) -> None:
    """What is loaded is for inference."""
    write(tmp_path, "0.8B")
    model = load(tmp_path)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


# --- memory ---------------------------------------------------------------------------------------


def write_sparse(folder: Path, sizes: dict[str, Any]) -> int:
    """A checkpoint of zeros that takes no disk: a header, then a hole. Returns its bytes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    with torch.device("meta"):
        model = Model(replace(Config.from_dict(sizes), mtp_num_hidden_layers=0))
    experts, width, hidden = (
        sizes[key] for key in ("num_experts", "moe_intermediate_size", "hidden_size")
    )
    described: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        stored_as = name if name.startswith("lm_head.") else f"model.language_model.{name}"
        if ".experts." in name:
            block = stored_as.split(".experts.")[0]
            described[f"{block}.experts.gate_up_proj"] = "BF16", (experts, 2 * width, hidden)
            described[f"{block}.experts.down_proj"] = "BF16", (experts, hidden, width)
        else:
            described[stored_as] = "BF16", tuple(parameter.shape)
    return write_hole(folder / SINGLE, described)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_untouched_experts_are_never_read(tmp_path: Path, dtype: str) -> None:
    """8 GB of experts open and generate in a fraction of that, in their dtype or another."""
    sizes = FAMILY["35B-A3B"] | {
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "hidden_size": 1024,
        "num_experts": 512,
        "moe_intermediate_size": 1280,
    }
    assert write_sparse(tmp_path, sizes) > 8e9
    command = [sys.executable, "-m", "qwen35.generate", "--model", str(tmp_path), "--dtype", dtype]
    command += ["--prompt-ids", "1", "--max-new-tokens", "1", "--ignore-eos"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        peak = peak_anonymous_memory(process.pid, lambda: process.poll() is None)
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.split() == ["0"]  # all logits are equal: the lowest id
    assert 0 < peak < 1.5 * 2**30


# --- transformers ---------------------------------------------------------------------------------


def library_model(name: str, member: str, seed: int = 0) -> Any:
    """A random model of transformers' class `name` with a member's small shape."""
    sizes = {k: v for k, v in FAMILY[member].items() if k != "model_type"}
    class_of_config = getattr(transformers, name).config_class
    config = class_of_config(**sizes, attn_implementation="eager")
    model = getattr(transformers, name)(config)
    randomise(model, seed)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("Qwen3_5MoeForCausalLM", "122B-A10B"),
        ("Qwen3_5ForCausalLM", "27B"),
        ("Qwen3_5ForCausalLM", "0.8B"),
        ("Qwen3NextForCausalLM", "Qwen3-Next"),
    ],
)
def test_a_folder_of_transformers_gives_its_logits(tmp_path: Path, name: str, member: str) -> None:
    """`save_pretrained` writes neither MTP tensors nor a tokenizer; the numbers are the library's.

    The two-times rule: our float32 may be twice as far from float64 as the library's float32 is.
    """
    library = library_model(name, member)
    library.save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.float32)
    assert model.mtp is None
    with torch.inference_mode():
        theirs = library(IDS).logits[0]
    ours = logits_of(model)
    error, most = within_twice(ours, theirs, logits_of(load(tmp_path, dtype=torch.float64)))
    assert error <= most
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_sharded_folder_of_transformers_loads(tmp_path: Path) -> None:
    """Its shards and index are those of a hub repository."""
    library = library_model("Qwen3_5ForCausalLM", "27B")
    library.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / INDEX).exists()
    parameters = dict(library.named_parameters())
    for name, parameter in load(tmp_path).named_parameters():
        stored_as = name if name.startswith("lm_head.") else f"model.{name}"
        assert torch.equal(parameter, parameters[stored_as])


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
    """Without a network the line says why, and names what was asked for."""
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
    """As after a download that stopped."""
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
