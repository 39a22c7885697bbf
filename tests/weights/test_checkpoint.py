"""Checkpoint folders: every dialect gives the same model, and every bad file gives one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from qwen35.config import Config
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
    logits_of,
    write,
    write_hole,
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


def test_vision_tensors_are_listed_as_ignored(tmp_path: Path) -> None:
    """A tensor that is left out is named as in the file."""
    write(tmp_path)
    assert sorted(Checkpoint(tmp_path).ignored) == [
        "model.visual.blocks.0.norm1.bias",
        "model.visual.merger.linear_fc1.weight",
        "model.visual.patch_embed.proj.weight",
    ]


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
    with pytest.warns(
        UserWarning, match="in no index; not read from it, since .* has them: .*norm"
    ):
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
    """A model is loaded for inference."""
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
