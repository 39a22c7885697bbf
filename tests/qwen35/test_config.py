"""`config.json`: three generations of keys give one shape, and every bad value gives one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.config import Config
from qwen35.errors import InputError
from reference.model import Model
from tests.support.checkpoints import assert_names
from tests.support.family import FAMILY


def test_published_sizes_give_the_published_counts() -> None:
    """The shape of the 397B model, counted parameter by parameter on the meta device."""
    with torch.device("meta"):
        model = Model(Config.published("397B-A17B"))
    counts = {"trunk": 0, "experts": 0, "mtp": 0}
    for name, parameter in model.named_parameters():
        part = "mtp" if name.startswith("mtp.") else "trunk"
        counts[part] += parameter.numel()
        if part == "trunk" and ".experts." in name:
            counts["experts"] += parameter.numel()
    assert round(counts["trunk"] / 1e9, 2) == 396.35
    assert round(counts["experts"] / 1e9, 2) == 386.55
    assert round(counts["mtp"] / 1e9, 2) == 6.60


@pytest.mark.parametrize(
    ("name", "billions"), [("0.8B", 0.75), ("4B", 4.21), ("9B", 8.95), ("27B", 26.90)]
)
def test_published_dense_sizes(name: str, billions: float) -> None:
    """The dense members' trunks (a tied head counts once)."""
    with torch.device("meta"):
        model = Model(replace(Config.published(name), mtp_num_hidden_layers=0))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e9, 2) == billions


def test_an_unknown_published_size_is_named() -> None:
    """One line with the name asked for and those known."""
    with pytest.raises(InputError, match=r"13B.*397B-A17B"):
        Config.published("13B")


def test_flat_nested_and_old_rope_keys_agree() -> None:
    """Three generations of config.json say the same."""
    flat = dict(FAMILY["397B-A17B"])
    nested = {"model_type": "qwen3_5_moe", "text_config": flat}
    old = {k: v for k, v in flat.items() if k != "rope_parameters"}
    old |= {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
    assert Config.from_dict(flat) == Config.from_dict(nested) == Config.from_dict(old)


def test_layer_types_are_given_or_derived() -> None:
    """Every fourth layer is full attention, unless the config lists them."""
    derived = Config.from_dict(FAMILY["0.8B"]).layer_types
    assert derived == (("linear_attention",) * 3 + ("full_attention",)) * 2
    listed = ["full_attention"] + ["linear_attention"] * 7
    assert Config.from_dict(FAMILY["0.8B"] | {"layer_types": listed}).layer_types == tuple(listed)


@pytest.mark.parametrize(("value", "ids"), [(7, (7,)), ([7, 9], (7, 9)), (None, ()), ([], ())])
def test_eos_is_an_int_or_a_list(value: int | list[int] | None, ids: tuple[int, ...]) -> None:
    """Both forms are published."""
    assert Config.from_dict(FAMILY["0.8B"] | {"eos_token_id": value}).eos_token_id == ids


BAD_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown model type": ({"model_type": "llama"}, ["model_type", "llama", "qwen3_5_moe"]),
    "attention heads do not divide": (
        {"num_attention_heads": 7},
        ["num_attention_heads", "7", "num_key_value_heads", "2"],
    ),
    "value heads do not divide": (
        {"linear_num_value_heads": 5},
        ["linear_num_value_heads", "5", "linear_num_key_heads", "2"],
    ),
    "layer_types too short": (
        {"layer_types": ["full_attention"] * 3},
        ["layer_types", "3", "num_hidden_layers", "8"],
    ),
    "layer_types unknown": (
        {"layer_types": ["mamba"] * 5 + ["sliding_attention"] * 3},
        ["layer_types[5]", "'sliding_attention'", "full_attention"],
    ),
    "layer_types empty": ({"layer_types": []}, ["layer_types", "0", "num_hidden_layers", "8"]),
    "a number among layer_types": ({"layer_types": ["mamba"] * 7 + [1]}, ["layer_types", "1"]),
    "rope type": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7}},
        ["rope_type", "yarn", "default"],
    ),
    "rope type, beside new keys": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ["rope_type", "yarn", "default"],
    ),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    "no output gate": ({"attn_output_gate": False}, ["attn_output_gate", "False", "True"]),
    "gate type": ({"output_gate_type": "tanh"}, ["output_gate_type", "tanh", "sigmoid"]),
    "odd rotary size": ({"head_dim": 36}, ["head_dim", "36", "9"]),
    "zero": ({"hidden_size": 0}, ["hidden_size", "0", ">= 1"]),
    "negative": ({"num_hidden_layers": -4}, ["num_hidden_layers", "-4"]),
    "text for a number": ({"head_dim": "32"}, ["head_dim", "'32'"]),
    "fraction": ({"head_dim": 32.5}, ["head_dim", "32.5"]),
    "too many experts a token": (
        {"num_experts_per_tok": 99},
        ["num_experts_per_tok", "99", "num_experts", "16"],
    ),
    "two mtp layers": ({"mtp_num_hidden_layers": 2}, ["mtp_num_hidden_layers", "2"]),
    # values that no tool writes, but that a file may hold
    "text for the layer count": ({"num_hidden_layers": "8"}, ["num_hidden_layers", "'8'"]),
    "text for the expert count": ({"num_experts": "16"}, ["num_experts", "'16'"]),
    "zero interval": ({"full_attention_interval": 0}, ["full_attention_interval", "0"]),
    "number for layer_types": ({"layer_types": 5}, ["layer_types", "5"]),
    "text for rope_parameters": ({"rope_parameters": "default"}, ["rope_parameters", "default"]),
    "text for the rope base": (
        {"rope_parameters": {"rope_theta": "big", "partial_rotary_factor": 0.25}},
        ["rope_theta", "big"],
    ),
    "text for the rotary part": (
        {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": "half"}},
        ["partial_rotary_factor", "half"],
    ),
    "a rotary part that no float's multiple holds": (
        {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 1e308}},
        ["partial_rotary_factor", "1e+308", "at most 1"],
    ),
    "experts without number": ({"num_experts": 2**31}, ["num_experts", str(2**31), "10000"]),
    "text for eps": ({"rms_norm_eps": "tiny"}, ["rms_norm_eps", "tiny"]),
    "negative shared expert": (
        {"shared_expert_intermediate_size": -1},
        ["shared_expert_intermediate_size", "-1"],
    ),
    "no experts": ({"num_experts": 0}, ["num_experts", "0", ">= 1"]),
    "text for tied": (
        {"tie_word_embeddings": "false"},
        ["tie_word_embeddings", "'false'", "true or false"],
    ),
    "text for the norm of weights": (
        {"model_type": "qwen3_next", "norm_topk_prob": "no"},
        ["norm_topk_prob", "'no'", "true or false"],
    ),
    "number for dense layers": (
        {"model_type": "qwen3_next", "mlp_only_layers": 5},
        ["mlp_only_layers", "5", "list"],
    ),
    "text among dense layers": (
        {"model_type": "qwen3_next", "mlp_only_layers": ["0"]},
        ["mlp_only_layers", "'0'"],
    ),
    "a number that no float holds": (
        {"rope_parameters": {"rope_theta": 10**400}},
        ["rope_theta", "positive number"],
    ),
    "a size that no tensor has": ({"head_dim": 10**400}, ["head_dim", "integer"]),
    "a rope for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e7}}, "rope_theta": 1e7},
        ["full_attention", "rope_parameters", "one rope for all layers"],
    ),
    "layers with settings of their own": (
        {"per_layer_config": {"0": {"num_experts": 4}}},
        ["per_layer_config", "num_experts"],
    ),
    "text for eos": ({"eos_token_id": "<|end|>"}, ["eos_token_id", "<|end|>"]),
    "list for text_config": ({"text_config": [1]}, ["text_config"]),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_bad_config_is_one_line(changes: dict[str, Any], words: list[str]) -> None:
    """The key, its value, and what was expected."""
    with pytest.raises(InputError) as caught:
        Config.from_dict(FAMILY["35B-A3B"] | changes)
    assert_names(caught, words)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "head_dim", "num_attention_heads"])
def test_a_missing_config_key_is_named(key: str) -> None:
    """No size is guessed."""
    with pytest.raises(InputError, match=f"{key}.*missing"):
        Config.from_dict({k: v for k, v in FAMILY["0.8B"].items() if k != key})


@pytest.mark.parametrize(
    "key",
    [
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ],
)
@pytest.mark.parametrize("member", ["35B-A3B", "Qwen3-Next"])
def test_a_missing_size_of_the_experts_is_named(member: str, key: str) -> None:
    """A model does not turn dense because its number of experts is missing."""
    without = {k: v for k, v in FAMILY[member].items() if k != key}
    with pytest.raises(InputError, match=f"{key} missing"):
        Config.from_dict(without)
    with pytest.raises(InputError, match=f"{key} missing in text_config"):
        Config.from_dict({"model_type": "qwen3_5_moe", "text_config": without, key: 4})


def test_qwen3_next_may_have_no_experts() -> None:
    """Its class has dense layers then."""
    sizes = FAMILY["Qwen3-Next"] | {
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "intermediate_size": 9,
    }
    assert not Config.from_dict(sizes).is_sparse(0)


def test_missing_rope_base_is_named() -> None:
    """The base decides every angle: there is no default for it."""
    with pytest.raises(InputError, match=r"rope_theta.*missing"):
        Config.from_dict({k: v for k, v in FAMILY["0.8B"].items() if k != "rope_parameters"})


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"[1, 2]", b"\xff\xfe\x00", b"null", b'{"a":' * 600 + b"1" + b"}" * 600],
    ids=lambda b: repr(b[:9]),
)
def test_a_config_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    """The file is named."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        Config.from_file(tmp_path / "config.json")
    assert_names(caught, [str(tmp_path / "config.json")])


def test_an_integer_for_a_number_is_one() -> None:
    """However large: a tensor takes no integer beyond 2^63."""
    config = Config.from_dict(FAMILY["397B-A17B"] | {"rms_norm_eps": 2**64 + 1})
    assert config.rms_norm_eps == 2.0**64 and type(config.rms_norm_eps) is float
    assert type(config.rope_theta) is float


def test_more_layers_than_layer_types_are_refused_at_once() -> None:
    """However many: no loop over the number of layers comes before."""
    config = Config.published("397B-A17B")
    with pytest.raises(InputError, match=rf"layer_types has 60 entries, .* = {10**15}"):
        replace(config, num_hidden_layers=10**15)
