"""Conversions: every byte of the output follows from the source, and a kill at any step costs nothing."""

import builtins
import fcntl
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen35.cli import run
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import TINY, load
from reference.model import Model
from tests.support.checkpoints import (
    INDEX,
    MXFP4,
    MXFP4_ATTENTION,
    MXFP4_MTP,
    MXFP4_SHARED,
    QUANTIZED_SIZES,
    QWEN3_5,
    QWEN3_5_FP8,
    QWEN3_6,
    QWEN3_NEXT,
    QWEN3_NEXT_FP8,
    SINGLE,
    TEXT_VOCAB,
    Dialect,
    assert_names,
    edit_tensors,
    group_projections,
    logits_of,
    write,
    write_hole,
    write_plain,
)
from tests.support.family import FAMILY
from tests.support.memory import peak_anonymous_memory
from tests.support.oracle import within_twice
from tools.convert import build_parser, main
from weights import mxfp4
from weights.checkpoint import UNFINISHED, Checkpoint
from weights.convert import FINISHED, REPORT, convert
from weights.output import Options
from weights.quantization import PREFIX
from weights.shard import Plan, join

ROOT = Path(__file__).parents[2]
MEMBER = "397B-A17B"
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


# --- what a folder holds --------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors, read by the safetensors library; each is in the file that the index says."""
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
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        other = wanted[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert tensor.flatten().view(U8).equal(other.contiguous().flatten().view(U8)), name


def quiet_load(folder: Path, dtype: torch.dtype | None = None) -> Model:
    """Load, and take a warning for an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, dtype=dtype)


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing in the folder is written, created, renamed or removed."""

    def state() -> Any:
        files = sorted(folder.rglob("*"))
        return contents(folder), [(str(f), f.stat().st_mtime_ns, f.stat().st_ino) for f in files]

    before = state()
    yield
    assert state() == before


# --- to MXFP4 -------------------------------------------------------------------------------------

EXPERTS_CHOSEN = r"layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight"
LINEAR_CHOSEN = (
    r"(mtp\.)?layers\.\d+\.(mlp\.((shared_expert|experts\.\d+)\.)?(gate|up|down)_proj"
    r"|self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkvz?|in_proj_z|out_proj))\.weight"
)
CHOSEN = {"experts": EXPERTS_CHOSEN, "all-linear": LINEAR_CHOSEN}


def wanted_of(
    source: Path, values: dict[str, Tensor], dialect: Dialect, config: Config, what: str | None
) -> dict[str, Tensor]:
    """What a conversion of `source` has to hold, from its bytes and the values of its parameters.

    what: key of CHOSEN; None for a conversion to BF16.
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


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Dialect], tuple[Path, dict[str, Tensor]]]:
    """A folder of each dialect, written once, and its parameters."""
    known: dict[Dialect, tuple[Path, dict[str, Tensor]]] = {}

    def folder(dialect: Dialect) -> tuple[Path, dict[str, Tensor]]:
        if dialect not in known:
            path = tmp_path_factory.mktemp("source")
            known[dialect] = path, write(path, MEMBER, dialect, **QUANTIZED_SIZES)
        return known[dialect]

    return folder


Written = Callable[[Dialect], tuple[Path, dict[str, Tensor]]]
MANY_SOURCES = {**SOURCES, **MIXED}


@pytest.mark.parametrize("what", CHOSEN)
@pytest.mark.parametrize("name", MANY_SOURCES)
def test_to_mxfp4(written: Written, tmp_path: Path, name: str, what: str) -> None:
    """Chosen matrices are the quantised values of the source's, MXFP4 stays as it is, the rest is its
    bytes or its BF16; the claim agrees with the tensors, and the source stays as it is."""
    dialect = MANY_SOURCES[name]
    source, values = written(dialect)
    with untouched(source):
        if what == "experts" and dialect in (MXFP4_MTP, MXFP4_SHARED):
            with pytest.raises(InputError, match="nothing to convert"):
                convert(source, tmp_path / "out", Options("mxfp4", what))
            return
        convert(source, tmp_path / "out", Options("mxfp4", what, shard_bytes=300_000))
    wanted = wanted_of(source, values, dialect, CONFIG, what)
    assert_same(tensors_of(tmp_path / "out"), wanted)
    found = Checkpoint(tmp_path / "out")
    assert found.problems == []
    assert found.config == Checkpoint(source).config
    assert found.entries.keys() == values.keys()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in wanted.values())}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def amd_table(c: Config) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of AMD's MXFP4 repository, written out (the vision tower aside)."""
    D, E = c.hidden_size, c.num_experts
    I, S = c.moe_intermediate_size, c.shared_expert_intermediate_size
    V, HV = c.linear_value_head_dim * c.linear_num_value_heads, c.linear_num_value_heads
    Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    text = "model.language_model."
    table: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{text}embed_tokens.weight": (BF16, (c.vocab_size, D)),
        f"{text}norm.weight": (BF16, (D,)),
        "lm_head.weight": (BF16, (c.vocab_size, D)),
        "mtp.fc.weight": (BF16, (D, 2 * D)),
        "mtp.norm.weight": (BF16, (D,)),
        "mtp.pre_fc_norm_embedding.weight": (BF16, (D,)),
        "mtp.pre_fc_norm_hidden.weight": (BF16, (D,)),
    }
    attention = {
        "self_attn.q_proj.weight": (BF16, (2 * Q, D)),
        "self_attn.k_proj.weight": (BF16, (KV, D)),
        "self_attn.v_proj.weight": (BF16, (KV, D)),
        "self_attn.o_proj.weight": (BF16, (D, Q)),
        "self_attn.q_norm.weight": (BF16, (c.head_dim,)),
        "self_attn.k_norm.weight": (BF16, (c.head_dim,)),
    }
    delta_net = {
        "linear_attn.in_proj_qkv.weight": (BF16, (c.conv_dim, D)),
        "linear_attn.in_proj_z.weight": (BF16, (V, D)),
        "linear_attn.in_proj_b.weight": (BF16, (HV, D)),
        "linear_attn.in_proj_a.weight": (BF16, (HV, D)),
        "linear_attn.conv1d.weight": (BF16, (c.conv_dim, 1, 4)),
        "linear_attn.A_log": (F32, (HV,)),
        "linear_attn.dt_bias": (BF16, (HV,)),
        "linear_attn.norm.weight": (F32, (c.linear_value_head_dim,)),
        "linear_attn.out_proj.weight": (BF16, (D, V)),
    }
    beside = {
        "input_layernorm.weight": (BF16, (D,)),
        "post_attention_layernorm.weight": (BF16, (D,)),
        "mlp.gate.weight": (BF16, (E, D)),
        "mlp.shared_expert_gate.weight": (BF16, (1, D)),
        "mlp.shared_expert.gate_proj.weight": (BF16, (S, D)),
        "mlp.shared_expert.up_proj.weight": (BF16, (S, D)),
        "mlp.shared_expert.down_proj.weight": (BF16, (D, S)),
    }
    packed, plain = {}, {}
    for e in range(E):
        for proj, (N, K) in {"gate": (I, D), "up": (I, D), "down": (D, I)}.items():
            packed[f"mlp.experts.{e}.{proj}_proj.weight"] = U8, (N, K // 2)
            packed[f"mlp.experts.{e}.{proj}_proj.weight_scale"] = U8, (N, K // 32)
            plain[f"mlp.experts.{e}.{proj}_proj.weight"] = BF16, (N, K)
    for i, layer_type in enumerate(c.layer_types):
        mixer = attention if layer_type == "full_attention" else delta_net
        layer = mixer | beside | packed
        table |= {f"{text}layers.{i}.{name}": kind for name, kind in layer.items()}
    return table | {f"mtp.layers.0.{n}": kind for n, kind in (attention | beside | plain).items()}


@pytest.mark.parametrize("dialect", [QWEN3_5, QWEN3_5_FP8], ids=["bf16", "fp8"])
def test_the_output_has_the_tensors_of_amds_repository(
    written: Written, tmp_path: Path, dialect: Dialect
) -> None:
    """Every name, dtype and shape; and the keys of its quantization_config."""
    convert(written(dialect)[0], tmp_path / "out", TO_MXFP4)
    found = {
        name: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors_of(tmp_path / "out").items()
        if ".visual." not in name
    }
    assert found == amd_table(CONFIG)
    claim = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    numbers = {
        "dtype": "fp4", "is_dynamic": False, "qscheme": "per_group", "group_size": 32, "ch_axis": -1,
        "round_method": "half_even", "scale_type": "float", "scale_format": "e8m0",
        "scale_calculation_mode": "even", "observer_cls": "PerBlockMXObserver",
    }  # fmt: skip
    everywhere = claim["global_quant_config"]
    assert numbers.items() <= everywhere["weight"].items()
    assert everywhere["input_tensors"] == everywhere["weight"] | {"is_dynamic": True}
    assert everywhere["output_tensors"] is everywhere["bias"] is None
    assert claim["quant_method"] == "quark"
    assert claim["quant_mode"] == "eager_mode"
    for key in ("layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config"):
        assert claim[key] == {}
    assert claim["export"] == {
        "kv_cache_group": [],
        "pack_method": "reorder",
        "weight_format": "real_quantized",
        "weight_merge_groups": None,
    }
    text = "model.language_model.layers."
    listed = {
        "lm_head",
        "mtp.fc",
        "model.visual.merger.linear_fc1",
        "model.visual.patch_embed.proj",
    }
    linear = ("conv1d", "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj")
    listed |= {f"{text}0.linear_attn.{name}" for name in linear}
    for layer in (f"{text}1.", "mtp.layers.0."):
        listed |= {f"{layer}self_attn.{letter}_proj" for letter in "qkvo"}
    shared = [f"shared_expert.{p}_proj" for p in ("gate", "up", "down")]
    for layer in (f"{text}0.", f"{text}1.", "mtp.layers.0."):
        listed |= {f"{layer}mlp.{name}" for name in ("gate", "shared_expert_gate", *shared)}
    for e in range(CONFIG.num_experts):
        listed |= {f"mtp.layers.0.mlp.experts.{e}.{p}_proj" for p in ("gate", "up", "down")}
    assert sorted(claim["exclude"]) == sorted(listed)


def test_all_linear_chooses_these_modules(written: Written, tmp_path: Path) -> None:
    """Mixers, shared and routed experts, of the trunk and of the MTP layer, and nothing else."""
    convert(written(QWEN3_5)[0], tmp_path / "out", ALL_LINEAR)
    scales = [name for name in tensors_of(tmp_path / "out") if name.endswith("_scale")]
    found = {PREFIX.sub("", name).removesuffix(".weight_scale") for name in scales}
    delta_net = ["in_proj_qkv", "in_proj_z", "out_proj"]
    wanted = {f"layers.0.linear_attn.{name}" for name in delta_net}
    for layer in ("layers.1", "mtp.layers.0"):
        wanted |= {f"{layer}.self_attn.{letter}_proj" for letter in "qkvo"}
    experts = ["shared_expert", *(f"experts.{e}" for e in range(CONFIG.num_experts))]
    for layer in ("layers.0", "layers.1", "mtp.layers.0"):
        for proj in ("gate", "up", "down"):
            wanted |= {f"{layer}.mlp.{expert}.{proj}_proj" for expert in experts}
    assert found == wanted


def test_all_linear_of_a_dense_model(tmp_path: Path) -> None:
    """Of a model without experts there is something to quantise too, the MTP layer included."""
    values = write(tmp_path / "in", "27B")
    convert(tmp_path / "in", tmp_path / "out", ALL_LINEAR)
    config = Config.from_dict(FAMILY["27B"])
    wanted = wanted_of(tmp_path / "in", values, QWEN3_5, config, "all-linear")
    found = tensors_of(tmp_path / "out")
    assert_same(found, wanted)
    assert "mtp.layers.0.mlp.down_proj.weight_scale" in found
    assert Checkpoint(tmp_path / "out").problems == []


@pytest.mark.parametrize("what", CHOSEN)
@pytest.mark.parametrize("dialect", [QWEN3_6, QWEN3_5_FP8, MXFP4_ATTENTION], ids=lambda d: d.claim)
def test_the_output_is_the_model_of_its_decoded_values(
    written: Written, tmp_path: Path, dialect: Dialect, what: str
) -> None:
    """It loads without a warning, and gives the logits of a plain folder with the same values."""
    source, values = written(dialect)
    convert(source, tmp_path / "out", Options("mxfp4", what))
    held = tensors_of(tmp_path / "out")
    decoded = {}
    for name, value in values.items():
        stored = name if name.startswith(("mtp.", "lm_head.")) else f"model.language_model.{name}"
        if re.fullmatch(CHOSEN[what], name):
            packed, scale = held[stored], held[f"{stored}_scale"]
            decoded[name] = mxfp4.dequantize(packed, scale, torch.float64)
        elif value.dtype == torch.float64:  # was quantised, is no more
            decoded[name] = value.float().bfloat16().float()
        else:
            decoded[name] = value
    write_plain(tmp_path / "plain", decoded, F32, SIZES)
    logits = logits_of(quiet_load(tmp_path / "out", F32))
    assert torch.equal(logits, logits_of(quiet_load(tmp_path / "plain", F32)))
    assert logits.isfinite().all()


def test_odd_sizes_stay_readable(tmp_path: Path) -> None:
    """Three value heads: what lies behind six bytes of dt_bias is not aligned to its dtype."""
    sizes = LITTLE | {"linear_num_value_heads": 3, "linear_num_key_heads": 1}
    write(tmp_path / "in", MEMBER, **sizes)
    convert(tmp_path / "in", tmp_path / "out", TO_MXFP4)
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    name = "model.language_model.layers.0.linear_attn.norm.weight"
    assert torch.equal(before[name], after[name])
    assert logits_of(quiet_load(tmp_path / "out")).isfinite().all()


def test_what_belongs_to_a_model_comes_along(tmp_path: Path) -> None:
    """Tokenizer, template and stop ids, byte for byte; no other weights, no old report."""
    write(tmp_path / "in", MEMBER, tokenizer=True, **LITTLE)
    for name in ("vocab.txt", "old.bin", "other.safetensors", "README.md", REPORT):
        (tmp_path / "in" / name).write_text("1")
    convert(tmp_path / "in", tmp_path / "out", TO_MXFP4)
    before, after = contents(tmp_path / "in"), contents(tmp_path / "out")
    along = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.txt"]
    assert sorted(after) == sorted(
        [*along, "config.json", REPORT, INDEX, "model-00001-of-00001.safetensors"]
    )
    assert all(after[name] == before[name] for name in along)
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    assert new.pop("quantization_config")
    assert new == old
    assert new["text_config"]["vocab_size"] == TEXT_VOCAB


def test_files_are_filled_to_the_limit(written: Written, tmp_path: Path) -> None:
    """No file is larger than asked for unless it holds a single matrix, and two neighbours of the same
    source file would not fit into one."""
    limit = 100_000
    convert(written(QWEN3_6)[0], tmp_path / "out", replace(TO_MXFP4, shard_bytes=limit))
    sizes = []
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        held = load_file(file)
        sizes.append(sum(tensor.nbytes for tensor in held.values()))
        matrices = {name.removesuffix("_scale") for name in held}
        assert sizes[-1] <= limit or len(matrices) == 1
    assert len(sizes) > 10


# --- to BF16 and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, d in MANY_SOURCES.items() if d.quantized])
def test_to_bf16(written: Written, tmp_path: Path, name: str) -> None:
    """The rounding of each exact value; of MXFP4 the value itself."""
    dialect = MANY_SOURCES[name]
    source, values = written(dialect)
    convert(source, tmp_path / "out", TO_BF16)
    found = tensors_of(tmp_path / "out")
    assert_same(found, wanted_of(source, values, dialect, CONFIG, None))
    assert Checkpoint(tmp_path / "out").quantization is None
    for stored, tensor in tensors_of(source).items():
        if tensor.dtype == U8 and stored.endswith(".weight"):
            exact = values[PREFIX.sub("", stored)]
            assert torch.equal(found[stored].double(), exact)
    quiet_load(tmp_path / "out")


def test_there_and_back_is_the_same(written: Written, tmp_path: Path) -> None:
    """MXFP4 to BF16 to MXFP4: each byte of a source in which no group has a smaller scale to offer."""
    dialect = replace(MXFP4, shards=1)
    shutil.copytree(written(dialect)[0], tmp_path / "in")

    def canonical(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if f"{n}_scale" in tensors]:
            codes = tensors[name].view(-1, 16)  # [groups, 16]
            codes[:, 3] |= 7  # element 6 of each group is 6 or -6
            codes[::3, :] |= 128  # negative numbers and negative zeros
            codes[::97, :] = 0  # a group of zeros
            tensors[f"{name}_scale"].view(-1)[::97] = 0

    edit_tensors(tmp_path / "in", canonical)
    convert(tmp_path / "in", tmp_path / "plain", TO_BF16)
    report = convert(tmp_path / "plain", tmp_path / "back", TO_MXFP4)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "in"))
    assert {error["relative_rms"] for error in report["errors"].values()} == {0.0}
    claim = json.loads((tmp_path / "in/config.json").read_text())["quantization_config"]
    back = json.loads((tmp_path / "back/config.json").read_text())["quantization_config"]
    listed = {
        name for name in claim["exclude"] if "norm" not in name and "embed_tokens" not in name
    }
    missing = {
        n for n in listed - set(back["exclude"]) if not n.endswith(("A_log", "dt_bias", "bias"))
    }
    assert not missing


def test_transformers_loads_the_bf16_output(written: Written, tmp_path: Path) -> None:
    """Its logits are ours, by the two-times rule."""
    import transformers

    convert(written(MXFP4)[0], tmp_path / "out", TO_BF16)
    name = "Qwen3_5MoeForCausalLM"
    library = getattr(transformers, name).from_pretrained(
        tmp_path / "out", dtype=F32, attn_implementation="eager"
    )
    ids = torch.arange(3, 80)[None]
    with torch.inference_mode():
        theirs = library.eval()(ids).logits[0]
    ours = logits_of(quiet_load(tmp_path / "out", F32), ids)
    truth = logits_of(quiet_load(tmp_path / "out", torch.float64), ids)
    error, most = within_twice(ours, theirs, truth)
    assert error <= most


# --- a folder for each rank -----------------------------------------------------------------------

TP_SIZES = QUANTIZED_SIZES | {
    "linear_num_key_heads": 4,
    "linear_value_head_dim": 32,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("to", ["experts", "all-linear", "bf16"])
def test_ranks_join_to_the_whole(tmp_path: Path, size: int, to: str) -> None:
    """Each tensor of the whole conversion, bit for bit, from its parts; with two KV heads for four
    ranks, MXFP4's groups along K, and fused projections."""
    dialect = replace(QWEN3_5_FP8 if to == "bf16" else QWEN3_6, shards=2)
    write(tmp_path / "in", MEMBER, dialect, **TP_SIZES)
    options = Options("bf16") if to == "bf16" else Options("mxfp4", to, shard_bytes=200_000)
    convert(tmp_path / "in", tmp_path / "whole", options)
    report = convert(tmp_path / "in", tmp_path / "ranks", replace(options, tp=size))
    ranks = [f"rank-{rank}-of-{size}" for rank in range(size)]
    assert sorted(place.name for place in (tmp_path / "ranks").iterdir()) == ranks
    parts = [tensors_of(tmp_path / "ranks" / rank) for rank in ranks]
    whole = tensors_of(tmp_path / "whole")
    assert all(part.keys() == whole.keys() for part in parts)
    shards = Plan(Config.from_dict(FAMILY[MEMBER] | TP_SIZES), size)
    cut = 0
    for name, tensor in whole.items():
        weight = name.removesuffix("_scale")
        per = 1 if f"{weight}_scale" not in whole else 32 if name != weight else 2
        shape = list(tensor.shape)
        shape[-1] *= per
        held = [shards.shard(name, shape, rank) for rank in range(size)]
        along = per if held[0].axis == tensor.dim() - 1 else 1
        joined = join(held, [part[name] for part in parts], along)
        assert_same({name: joined}, {name: tensor})
        cut += parts[0][name].numel() < tensor.numel()
    assert cut > 90
    for rank, (name, part) in enumerate(zip(ranks, parts, strict=True)):
        folder = tmp_path / "ranks" / name
        document = json.loads((folder / "config.json").read_text())
        assert document.pop("tensor_parallel") == {"rank": rank, "size": size}
        assert document == json.loads((tmp_path / "whole/config.json").read_text())
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in part.values())
        assert json.loads((folder / REPORT).read_text()) == report
    with pytest.raises(InputError) as caught:
        load(tmp_path / "ranks" / ranks[1])
    assert_names(caught, [ranks[1], "rank", str(size)])
    with pytest.raises(InputError, match=r"config\.json"):
        load(tmp_path / "ranks")


def test_ranks_of_a_checkpoint_that_stays_as_it_is(tmp_path: Path) -> None:
    """BF16 to BF16 is nothing to do, but for ranks."""
    write(tmp_path / "in", MEMBER, **LITTLE)
    convert(tmp_path / "in", tmp_path / "out", replace(TO_BF16, tp=2))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    whole = tensors_of(tmp_path / "in")[name]  # [E, 2I, D]
    gate, up = whole.chunk(2, dim=1)
    for rank in range(2):
        part = tensors_of(tmp_path / f"out/rank-{rank}-of-2")[name]
        wanted = torch.cat([gate.chunk(2, dim=1)[rank], up.chunk(2, dim=1)[rank]], dim=1)
        assert torch.equal(part, wanted)


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({}, 2, ["layers.0.mlp.experts.0.down_proj", "16", "32"]),
        ({"moe_intermediate_size": 96}, 2, ["layers.0.mlp.experts.0.down_proj", "48", "32"]),
        ({}, 4, ["linear_num_key_heads", "4"]),
        ({"vocab_size": 161}, 2, ["vocab_size = 161", "2"]),
    ],
)
def test_groups_and_heads_that_ranks_would_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, int], size: int,
    words: list[str],
) -> None:  # fmt: skip
    """The tensor and the numbers are named, and nothing is written."""
    write(tmp_path / "in", MEMBER, **LITTLE, **changes)
    check_refused(capsys, tmp_path / "in", tmp_path / "out", "--tp", size, words=words)


# --- the report -----------------------------------------------------------------------------------


def relative_rms(exact: list[Tensor], found: list[Tensor]) -> float:
    """Over several tensors, in float64."""
    lost = sum((a.double() - b.double()).square().sum() for a, b in zip(exact, found, strict=True))
    return math.sqrt(lost / sum(a.double().square().sum() for a in exact))


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Relative RMS errors are those of a plain computation; the worst group is the one planted; file,
    --json and the table say the same."""
    write(tmp_path / "in", MEMBER, QWEN3_5_FP8, **QUANTIZED_SIZES)
    # Codes 4 and 0.75: the latter is a tie, which goes to 1. No group of random codes loses as much.
    worst = "model.language_model.layers.1.mlp.experts.5.up_proj.weight"
    for file in (tmp_path / "in").glob("*.safetensors"):
        held = load_file(file)
        if worst in held:
            held[worst].view(U8)[77, 96:128] = 0x34  # 0.75
            held[worst].view(U8)[77, 101] = 0x48  # 4
        if f"{worst}_scale_inv" in held:
            held[f"{worst}_scale_inv"].fill_(2.0**-9)
        save_file(held, file)
    status, out, err = cli(
        capsys,
        tmp_path / "in",
        tmp_path / "out",
        "--to",
        "mxfp4",
        "--shard-bytes",
        200_000,
        "--json",
    )
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((tmp_path / "out" / REPORT).read_text())
    exact, found = Checkpoint(tmp_path / "in").entries, Checkpoint(tmp_path / "out").entries
    kinds: dict[str, list[str]] = {}
    for name, entry in exact.items():
        if entry.format == "fp8":
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    assert report["errors"].keys() == kinds.keys()
    for kind, names in kinds.items():
        said = report["errors"][kind]
        before = [exact[name].read(torch.float64) for name in names]
        after = [found[name].read(torch.float64) for name in names]
        assert said["tensors"] == len(names)
        assert said["elements"] == sum(tensor.numel() for tensor in before)
        assert said["relative_rms"] == pytest.approx(relative_rms(before, after), rel=1e-6)
        groups = [
            relative_rms([a], [b])
            for x, y in zip(before, after, strict=True)
            for a, b in zip(x.view(-1, 32), y.view(-1, 32), strict=True)
        ] if "layers.*.mlp.experts.*.up_proj" in kind else []  # fmt: skip
        assert not groups or said["worst_group"] == pytest.approx(max(groups), rel=1e-6)
    planted = report["errors"]["layers.*.mlp.experts.*.up_proj.weight"]
    assert planted["worst_at"] == f"{worst}[77, 96:128]"
    wanted = math.sqrt(31 * 0.25**2 / (16 + 31 * 0.75**2))
    assert planted["worst_group"] == pytest.approx(wanted, rel=1e-6)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert report["files"] == len(files) > 5
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    status, table, _ = cli(capsys, tmp_path / "in", tmp_path / "again", "--to", "mxfp4")
    assert status == 0
    assert f"{planted['worst_group']:.3%}" in table
    assert f"the worst group is {worst}[77, 96:128]" in table
    assert all(kind in table for kind in kinds)


def test_the_report_of_a_continued_conversion(written: Written, tmp_path: Path) -> None:
    """It counts the files that an earlier run wrote, too."""
    source = written(QWEN3_6)[0]
    options = replace(TO_MXFP4, shard_bytes=100_000)
    whole = convert(source, tmp_path / "whole", options)
    stop_at(source, tmp_path / "out", options, 0.5)
    assert convert(source, tmp_path / "out", options) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- what is refused ------------------------------------------------------------------------------


def cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """`python -m tools.convert` in this process: status, stdout, stderr."""
    with pytest.raises(SystemExit) as left:
        run(build_parser(), main, [str(argument) for argument in args])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def check_refused(
    capsys: pytest.CaptureFixture[str],
    source: Path,
    target: Path,
    *args: object,
    words: list[str],
    left: bool = False,
) -> None:
    """Exit status 2, one line that holds these words, the source as it was, and nothing left behind.

    left: whether the target was there before and stays as it was, or holds an unfinished conversion.
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


def test_a_missing_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, and no folder is made."""
    (tmp_path / "file").write_text("x")
    for name in ("absent", "file"):
        source = tmp_path / name
        check_refused(capsys, source, tmp_path / "out", words=[str(source), "no such folder"])
    (tmp_path / "empty").mkdir()
    check_refused(
        capsys, tmp_path / "empty", tmp_path / "out", words=["config.json", "no such file"]
    )


def test_a_target_with_content(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with anything in it, or a file, stays as it is; an empty folder will do."""
    target = little.parent / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    check_refused(capsys, little, target, words=[str(target), "already"], left=True)
    shutil.rmtree(target)
    target.write_text("a file")
    check_refused(capsys, little, target, words=[str(target), "already"], left=True)
    assert target.read_text() == "a file"
    target.unlink()
    target.mkdir()
    assert cli(capsys, little, target, "--to", "mxfp4")[0] == 0
    check_refused(capsys, little, target, words=[str(target), "already"], left=True)


def test_a_target_inside_the_source(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The source is only read: neither below it nor in its place, by whatever path."""
    (little.parent / "link").symlink_to(little)
    for target in (little / "out", little / "a/b", little.parent / "link/out"):
        check_refused(capsys, little, target, words=[str(target), "inside"])
    check_refused(capsys, little, little, words=[str(little), "inside"], left=True)


@pytest.mark.parametrize(
    ("member", "dialect", "args", "words"),
    [
        (MEMBER, QWEN3_5, ("--to", "bf16"), ["nothing to convert", "bf16"]),
        ("27B", QWEN3_5, ("--to", "mxfp4"), ["nothing to convert", "mxfp4", "experts"]),
        (MEMBER, MXFP4, ("--to", "mxfp4"), ["nothing to convert", "mxfp4"]),
    ],
    ids=["bf16 to bf16", "a dense model's experts", "mxfp4 to mxfp4"],
)
def test_nothing_to_convert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], member: str, dialect: Dialect,
    args: tuple[str, ...], words: list[str],
) -> None:  # fmt: skip
    """A copy was hardly meant."""
    write(tmp_path / "in", member, dialect)
    check_refused(capsys, tmp_path / "in", tmp_path / "out", *args, words=words)


@pytest.mark.parametrize(
    ("what", "changes", "words"),
    [
        (
            "experts",
            {"moe_intermediate_size": 24},
            ["experts.0.down_proj.weight", "[64, 24]", "32"],
        ),
        ("experts", {"hidden_size": 80}, ["experts.0.gate_proj.weight", "[32, 80]", "32"]),
        (
            "all-linear",
            {"shared_expert_intermediate_size": 40},
            ["shared_expert.down_proj.weight", "[64, 40]", "32"],
        ),
    ],
)
def test_rows_that_groups_do_not_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, changes: dict[str, int],
    words: list[str],
) -> None:  # fmt: skip
    """The matrix, its shape and the size of a group are named before a weight is read."""
    write(tmp_path / "in", MEMBER, **LITTLE, **changes)
    check_refused(capsys, tmp_path / "in", tmp_path / "out", "--what", what, words=words)


FUSED = "model.language_model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**127 * 1.75])
def test_a_weight_that_is_not_finite(
    little: Path, capsys: pytest.CaptureFixture[str], bad: float
) -> None:
    """Found when it is converted: the stored tensor is named, and no checkpoint comes of it."""
    edit_tensors(little, lambda tensors: tensors[FUSED][1, 40, 3].fill_(bad))
    check_stopped(capsys, little, [FUSED, "infinity", "NaN"])


def check_stopped(capsys: pytest.CaptureFixture[str], source: Path, words: list[str]) -> None:
    """A bad weight stops a conversion with one line; the source has to change, so nothing stays."""
    target = source.parent / "out"
    with untouched(source):
        status, out, err = cli(capsys, source, target, "--to", "mxfp4", "--shard-bytes", 20_000)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err
    assert not target.exists()


def test_a_nan_scale_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """255 in e8m0: it is copied no more than it is decoded."""
    dialect = replace(MXFP4_ATTENTION, shards=1)
    write(tmp_path / "in", MEMBER, dialect, **QUANTIZED_SIZES)
    name = "model.language_model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensors(tmp_path / "in", lambda t: t[f"{name}_scale"][3, 1].fill_(255))
    check_stopped(capsys, tmp_path / "in", [name, "255"])
    status, _, err = cli(capsys, tmp_path / "in", tmp_path / "other", "--to", "bf16")
    assert (status, err.count("\n")) == (2, 1)
    assert name in err


def test_an_fp8_code_that_is_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An e4m3 NaN has no MXFP4."""
    write(tmp_path / "in", MEMBER, replace(QWEN3_5_FP8, shards=1), **QUANTIZED_SIZES)
    name = "model.language_model.layers.0.mlp.experts.7.down_proj.weight"
    edit_tensors(tmp_path / "in", lambda t: t[name].view(U8)[9, 9].fill_(0x7F))
    check_stopped(capsys, tmp_path / "in", [name, "NaN"])
    status, _, err = cli(capsys, tmp_path / "in", tmp_path / "other", "--to", "bf16")
    assert (status, err.count("\n")) == (2, 1)
    assert name in err


@pytest.mark.parametrize("size", [1, 2])
def test_a_disk_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Seen before the first byte is written; both numbers are said."""
    write(tmp_path / "in", MEMBER, **LITTLE | {"moe_intermediate_size": 64})
    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        check_refused(
            capsys,
            tmp_path / "in",
            tmp_path / "out",
            "--tp",
            size,
            words=["1234", "needed", "free"],
        )


def test_a_target_that_cannot_be_written(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below a file, and where no file can be made."""
    (little.parent / "file").write_text("x")
    for target in (little.parent / "file/out", Path("/proc/out"), Path("/proc/self/fd/out")):
        check_refused(capsys, little, target, words=[str(target)])


def test_two_at_once(little: Path) -> None:
    """The second of two processes is told so, and does the first no harm."""
    options = replace(TO_MXFP4, shard_bytes=20_000)
    refused = []

    def second(done: int, total: int) -> None:
        with pytest.raises(InputError) as caught:
            convert(little, little.parent / "out", options)
        assert_names(caught, [str(little.parent / "out"), "another process"])
        refused.append(done)

    convert(little, little.parent / "out", options, progress=second)
    convert(little, little.parent / "alone", options)
    assert len(refused) > 5
    assert contents(little.parent / "out") == contents(little.parent / "alone")


class StoppedError(Exception):
    """Stands for whatever ends a process early."""


def stop_at(source: Path, target: Path, options: Options, part: float) -> None:
    """Run a conversion until this part of its bytes is done."""

    def progress(done: int, total: int) -> None:
        if done > part * total:
            raise StoppedError

    with pytest.raises(StoppedError):
        convert(source, target, options, progress=progress)
    with pytest.raises(InputError, match="unfinished"):
        Checkpoint(target)


def test_an_unfinished_conversion_of_something_else(
    little: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other options, or a source that has changed: both values are named, and what is done stays."""
    target = little.parent / "out"
    options = replace(TO_MXFP4, shard_bytes=20_000)
    stop_at(little, target, options, 0.5)
    asked = ("--shard-bytes", 20_000)
    check_refused(
        capsys, little, target, "--what", "all-linear", *asked, left=True,
        words=["unfinished", "options", "what = experts", "all-linear"],
    )  # fmt: skip
    check_refused(
        capsys, little, target, "--shard-bytes", 30_000, left=True, words=["20000", "30000"]
    )
    check_refused(
        capsys, little, target, "--tp", 2, *asked, left=True, words=["tp = 1", "now it is 2"]
    )
    stat = (little / SINGLE).stat()
    os.utime(little / SINGLE, ns=(stat.st_atime_ns, stat.st_mtime_ns + 5))
    words = ["unfinished", SINGLE, str(stat.st_mtime_ns), str(stat.st_mtime_ns + 5)]
    check_refused(capsys, little, target, *asked, left=True, words=words)
    os.utime(little / SINGLE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    config = (little / "config.json").read_text()
    times = (little / "config.json").stat()
    (little / "config.json").write_text(f"{config} ")
    words = ["config.json", str(len(config)), str(len(config) + 1)]
    check_refused(capsys, little, target, *asked, left=True, words=words)
    (little / "config.json").write_text(config)
    os.utime(little / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    convert(little, target, options)
    convert(little, little.parent / "alone", options)
    assert contents(target) == contents(little.parent / "alone")


def test_bad_arguments(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, before anything is opened."""
    for args in (("--to", "fp7"), ("--tp", 3), ("--what", "some"), ("--shard-bytes", 0)):
        check_refused(capsys, little, little.parent / "out", *args, words=[str(args[1])])
    status, _, err = cli(capsys, little, little.parent / "out")
    assert (status, err.count("\n")) == (2, 1)


def test_a_source_that_is_no_model(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor too few, and one too many, are named before anything is written."""
    edit_tensors(little, lambda tensors: tensors.pop("model.language_model.norm.weight"))
    check_refused(capsys, little, little.parent / "out", words=["missing norm.weight"])
    edit_tensors(little, lambda t: t.update({"model.language_model.norm.weight": torch.ones(64)}))
    edit_tensors(little, lambda tensors: tensors.update(extra=torch.ones(3)))
    check_refused(capsys, little, little.parent / "out", words=["not part of this model", "extra"])


def test_folders_made_for_a_target_go_again(
    little: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those above it too; one that was there stays, and so does what a link points to."""
    edit_tensors(little, lambda tensors: tensors[FUSED][1, 40, 3].fill_(math.nan))
    check_refused(capsys, little, little.parent / "a/b/c", words=[FUSED])
    assert not (little.parent / "a").exists()
    (little.parent / "there").mkdir()
    (little.parent / "link").symlink_to("there")
    check_refused(capsys, little, little.parent / "link", words=[FUSED], left=True)
    assert list((little.parent / "there").iterdir()) == []


def test_names_that_are_too_long(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, as for any other name."""
    for source, target in ((little, "x" * 5000), ("y" * 5000, little.parent / "out")):
        status, out, err = cli(capsys, source, target, "--to", "mxfp4")
        assert (status, out, err.count("\n")) == (2, "", 1), err


def test_folders_beside_the_weights_are_left_out(little: Path) -> None:
    """One that is called like a small file too."""
    (little / "notes.txt").mkdir()
    convert(little, little.parent / "out", TO_MXFP4)
    assert not (little.parent / "out" / "notes.txt").exists()


def test_traces_of_another_conversion(little: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was killed while it cleared up is finished by the same command only."""
    target = little.parent / "out"
    convert(little, target, TO_MXFP4)
    (target / FINISHED).mkdir()
    check_refused(capsys, little, target, "--tp", 2, words=["other options"], left=True)
    assert cli(capsys, little, target, "--to", "mxfp4")[0] == 0
    assert not (target / FINISHED).exists()
    (target / FINISHED).mkdir()
    (target / REPORT).unlink()
    check_refused(capsys, little, target, words=[FINISHED, REPORT], left=True)


# --- killed ---------------------------------------------------------------------------------------


class Counted:
    """A file opened for writing, each write of which is a step; half of a fatal one is written."""

    def __init__(self, handle: Any, step: Callable[[Callable[[], object]], object]) -> None:
        self.handle, self.step = handle, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def __enter__(self) -> "Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def write(self, content: Any) -> None:
        half = content[: len(content) // 2]
        self.step(lambda: (self.handle.write(half), self.handle.flush()))
        self.handle.write(content)


def die_at(last: int) -> list[str]:
    """Make this process kill itself before the last-th thing that it does to the disk.

    Returns a list that grows by the name of each such thing.
    """
    steps: list[str] = []

    def step(name: str, at_the_end: Callable[[], object] = lambda: None) -> None:
        steps.append(name)
        if len(steps) == last:
            at_the_end()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            step(f"{event} {args[0]}")

    open_path = Path.open

    def counted(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return open_path(path, mode, *args, **kwargs)
        step(f"open {path}")
        handle = open_path(path, mode, *args, **kwargs)
        return Counted(handle, lambda fatal: step(f"write {path}", fatal))

    sys.addaudithook(audit)
    setattr(Path, "open", counted)  # noqa: B010
    # The machine stays up, so nothing has to reach the disk.
    setattr(os, "fsync", lambda number: step(f"fsync {number}"))  # noqa: B010
    return steps


def serve_children() -> None:
    """A child for each line of JSON on stdin, which runs the command line; the imports are paid once.

    Prints the child's process id, and its exit status when it has ended.
    """
    torch.set_num_threads(1)
    torch.cat([torch.empty(1, device="meta")] * 2)  # imports half of torch
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_child(task)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _be_child(task: dict[str, Any]) -> None:
    status = 99
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(f"{task['said']}.{name}", flags), number)
        if task["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest_file"],) * 2)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        steps = die_at(task["die_at"]) if task["die_at"] is not None else []
        try:
            run(build_parser(), main, task["args"])
        except SystemExit as left:
            status = int(left.code or 0)
        setattr(Path, "open", builtins.open)  # noqa: B010
        if steps:
            print(json.dumps(steps))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Children:
    """Runs of `python -m tools.convert` in children of one process that has its imports behind it."""

    def __init__(self, place: Path, **environment: str) -> None:
        self.said = place / "said"
        command = "from tests.weights.test_convert import serve_children; serve_children()"
        self.server = subprocess.Popen(
            [sys.executable, "-c", command], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | environment,
        )  # fmt: skip

    def start(self, *args: object, die_at: int | None = None, largest_file: int = 0) -> int:
        """Start one; returns its process id."""
        assert self.server.stdin and self.server.stdout
        task = {"args": [str(a) for a in args], "said": str(self.said), "die_at": die_at}
        self.server.stdin.write(json.dumps(task | {"largest_file": largest_file}) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> tuple[int, str, str]:
        """Exit status (negative: a signal's), stdout and stderr of the one that was started."""
        assert self.server.stdout
        status = int(self.server.stdout.readline())
        out, err = (Path(f"{self.said}.{name}").read_text() for name in ("stdout", "stderr"))
        return status, out, err

    def run(self, *args: object, die_at: int | None = None, largest_file: int = 0) -> Any:
        self.start(*args, die_at=die_at, largest_file=largest_file)
        return self.wait()

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """Closed at the end of the module."""
    started = Children(tmp_path_factory.mktemp("children"))
    yield started
    started.close()


def is_complete(folder: Path) -> bool:
    """Whether a folder can be read as a checkpoint; all else is one line."""
    try:
        Checkpoint(folder)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_every_step(tmp_path: Path, children: Children, size: int) -> None:
    """Before each write, fsync, rename and removal: what is there is no checkpoint unless it is whole,
    and the next run makes the same bytes of it."""
    source, alone, target = (tmp_path / name for name in ("in", "alone", "out"))
    write(source, MEMBER, replace(QWEN3_5, mtp=False, visual=False), tokenizer=True, **LITTLE,
          moe_intermediate_size=64)  # fmt: skip
    args = ("--to", "mxfp4", "--tp", size, "--shard-bytes", 150_000)
    status, out, err = children.run(source, alone, *args, die_at=0)
    assert status == 0, err
    steps = json.loads(out.splitlines()[-1])
    wanted = contents(alone)
    assert 2 <= len(list(alone.rglob("*.safetensors"))) // size <= 6
    with untouched(source):
        # With ranks there are more steps, but no other ones: every third, and all at the end.
        count = len(steps) + 1
        chosen = (
            range(1, count) if size == 1 else [*range(1, count - 30, 3), *range(count - 30, count)]
        )
        for last in chosen:
            status, _, _ = children.run(source, target, *args, die_at=last)
            assert status == -signal.SIGKILL, steps[last - 1]
            unfinished = (target / UNFINISHED).exists()
            if is_complete(target):
                assert size == 1 and not unfinished, steps[last - 1]
            if not unfinished and target.exists() and any(target.iterdir()):
                # All is there, and something that is about to be removed.
                left = {name: c for name, c in contents(target).items() if FINISHED not in name}
                assert left == wanted, steps[last - 1]
            done = {f: f.stat().st_ino for f in target.rglob("*.safetensors")}
            status, _, err = children.run(source, target, *args, die_at=0)
            if status:  # it was whole before
                assert "already" in err and not unfinished, (steps[last - 1], err)
            assert contents(target) == wanted, steps[last - 1]
            # Of the file that was just to be renamed, one rank may have it and another not.
            redone = [file for file, inode in done.items() if file.stat().st_ino != inode]
            assert len(redone) < size, steps[last - 1]
            shutil.rmtree(target)


def test_killed_again_and_again(tmp_path: Path, children: Children) -> None:
    """Forty output files with a kill in every few of them: each run goes on where the last one ended,
    and touches no file that was finished."""
    source, alone, target = (tmp_path / name for name in ("in", "alone", "out"))
    write(source, MEMBER, QWEN3_6, **QUANTIZED_SIZES)
    args = ("--to", "mxfp4", "--shard-bytes", 60_000)
    assert children.run(source, alone, *args)[0] == 0
    total = len(list(alone.glob("*.safetensors")))
    assert total >= 30
    chosen = random.Random(1)
    seen: dict[str, tuple[int, int]] = {}
    runs = 0
    while runs < 100:
        status, _, err = children.run(source, target, *args, die_at=chosen.randint(15, 120))
        finished = {f.name: f.stat() for f in target.glob("*.safetensors")}
        now = {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in finished.items()}
        assert {name: now[name] for name in seen} == seen
        seen = now
        if status == 0:
            break
        assert status == -signal.SIGKILL, err
        runs += 1
        if is_complete(target):  # killed while it cleared up
            assert children.run(source, target, *args)[0] == 0
            break
    assert contents(target) == contents(alone)
    assert runs > 5


def test_the_process_killed_at_random_times(tmp_path: Path) -> None:
    """The command itself, by the clock: a part of a second after its work has begun."""
    source, alone, target = TINY, tmp_path / "alone", tmp_path / "out"
    options = replace(ALL_LINEAR, shard_bytes=200_000)
    convert(source, alone, options)
    assert len(list(alone.glob("*.safetensors"))) >= 30
    command = [sys.executable, "-m", "tools.convert", "tiny", str(target), "--to", "mxfp4"]
    command += ["--what", "all-linear", "--shard-bytes", "200000"]
    chosen = random.Random(0)
    for _ in range(4):
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            before = len(list(target.glob("*.safetensors"))) if target.exists() else 0
            while process.poll() is None:
                found = list(target.glob("*.safetensors")) if target.exists() else []
                if len(found) > before + 5:
                    time.sleep(chosen.uniform(0, 0.03))
                    process.kill()
                    break
                time.sleep(0.001)
        assert process.returncode == -signal.SIGKILL
        assert not is_complete(target)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert contents(target) == contents(alone)


def test_a_disk_that_fills_up(tmp_path: Path, children: Children) -> None:
    """A write that fails (here: a limit to the size of a file) is one line, without half a file; with
    room again the same command finishes."""
    source, alone, target = (tmp_path / name for name in ("in", "alone", "out"))
    write(source, MEMBER, **LITTLE)
    args = (source, target, "--to", "mxfp4", "--shard-bytes", 25_000)
    status, out, err = children.run(*args, largest_file=24_000)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert "File too large" in err
    assert not list(target.rglob("*.partial"))
    assert not is_complete(target)
    assert children.run(*args)[0] == 0
    convert(source, alone, replace(TO_MXFP4, shard_bytes=25_000))
    assert contents(target) == contents(alone)


def test_finished_files_are_not_written_again(little: Path) -> None:
    """Neither opened for writing nor replaced."""
    options = replace(TO_MXFP4, shard_bytes=20_000)
    target = little.parent / "out"
    stop_at(little, target, options, 0.6)
    before = {file: file.stat() for file in target.glob("*.safetensors")}
    assert len(before) > 2
    convert(little, target, options)
    for file, stat in before.items():
        now = file.stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_a_lock_that_outlived_its_process_is_none(little: Path) -> None:
    """A kill leaves the file behind, not the lock; while it is held, nobody else gets in."""
    target = little.parent / "out"
    stop_at(little, target, TO_MXFP4, 0.1)
    lock = target / UNFINISHED / "lock"
    assert lock.exists()
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            convert(little, target, TO_MXFP4)
    convert(little, target, TO_MXFP4)
    assert not (target / UNFINISHED).exists()


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_small(tmp_path: Path) -> None:
    """A source of 2 GB, of which a part of the size of one expert is in memory at a time."""
    if shutil.disk_usage(tmp_path).free < 4e9:
        pytest.skip("needs 4 GB of disk")
    sizes = FAMILY["35B-A3B"] | LITTLE | {
        "hidden_size": 2048, "num_experts": 80, "moe_intermediate_size": 1024,
    }  # fmt: skip
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(sizes))
    with torch.device("meta"):
        model = Model(replace(Config.from_dict(sizes), mtp_num_hidden_layers=0))
    described: dict[str, tuple[str, tuple[int, ...]]] = {
        f"model.language_model.{name}": ("BF16", tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if ".experts." not in name and not name.startswith("lm_head.")
    }
    described["lm_head.weight"] = "BF16", (sizes["vocab_size"], 2048)
    for layer in range(2):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        described[f"{experts}.gate_up_proj"] = "BF16", (80, 2048, 2048)
        described[f"{experts}.down_proj"] = "BF16", (80, 2048, 1024)
    assert write_hole(source / SINGLE, described) > 2e9
    try:
        command = [sys.executable, "-m", "tools.convert", str(source), str(target), "--to", "mxfp4"]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            peak = peak_anonymous_memory(process.pid, lambda: process.poll() is None)
            _, err = process.communicate()
        assert process.returncode == 0, err
        assert sum(file.stat().st_size for file in target.iterdir()) > 0.5e9
        assert 0 < peak < 0.6 * 2**30, peak
    finally:
        shutil.rmtree(target, ignore_errors=True)
