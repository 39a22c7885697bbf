"""Conversions: every byte of the output follows from the source, and a kill at any step costs nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen35.config import Config
from tests.support.checkpoints import (
    INDEX,
    MXFP4_ATTENTION,
    QWEN3_5,
    QWEN3_5_FP8,
    QWEN3_6,
    TEXT_VOCAB,
    Dialect,
    logits_of,
    write,
    write_plain,
)
from tests.support.conversions import (
    ALL_LINEAR,
    BF16,
    CHOSEN,
    CONFIG,
    F32,
    LITTLE,
    MANY_SOURCES,
    MEMBER,
    SIZES,
    TO_MXFP4,
    U8,
    assert_same,
    contents,
    tensors_of,
    untouched,
    wanted_of,
)
from tests.support.dialects import Written, quiet_load, written  # noqa: F401
from tests.support.family import FAMILY
from weights import mxfp4
from weights.checkpoint import Checkpoint
from weights.convert import REPORT, convert
from weights.output import Options
from weights.quantization import PREFIX

# --- to MXFP4 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", CHOSEN)
@pytest.mark.parametrize("name", MANY_SOURCES)
def test_to_mxfp4(written: Written, tmp_path: Path, name: str, what: str) -> None:
    """Chosen matrices are the quantised values of the source's, MXFP4 stays as it is, the rest is its
    bytes or its BF16; the claim agrees with the tensors, and the source stays as it is."""
    dialect = MANY_SOURCES[name]
    source, values = written(dialect)
    with untouched(source):
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
        "symmetric": None, "mx_element_dtype": None, "is_scale_quant": False,
    }  # fmt: skip
    everywhere = claim["global_quant_config"]
    assert everywhere["weight"] == numbers
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
    """A model without experts has something to quantise too, the MTP layer included."""
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
