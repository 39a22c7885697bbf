"""Where `config.json` says a thing twice, or what nobody reads: transformers' value, and one line."""

from copy import deepcopy
from typing import Any

import pytest
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from qwen35.config import Config, disagreements
from qwen35.config_json import NEVER_READ
from tests.support.family import FAMILY

CLASSES = {
    "0.8B": Qwen3_5TextConfig,
    "35B-A3B": Qwen3_5MoeTextConfig,
    "Qwen3-Next": Qwen3NextConfig,
}


def theirs(member: str, document: dict[str, Any]) -> Any:
    copied = deepcopy(document)  # since transformers writes into the mappings that it is given
    return CLASSES[member](**{k: v for k, v in copied.items() if k != "model_type"})


def nested(inner: dict[str, Any] | None = None, **outer: Any) -> dict[str, Any]:
    text = FAMILY["35B-A3B"] | (inner or {})
    return {"model_type": "qwen3_5_moe", "text_config": text} | outer


def check_line(document: dict[str, Any], *words: str) -> None:
    """There is one line, and it holds these words."""
    [line] = disagreements(document)
    assert "\n" not in line
    assert not [word for word in words if word not in line], line


# --- keys that the class never reads --------------------------------------------------------------

IGNORED = {
    "norm_topk_prob, moe": ("35B-A3B", {"norm_topk_prob": False}),
    "mlp_only_layers, moe": ("35B-A3B", {"mlp_only_layers": [0, 3]}),
    "decoder_sparse_step, moe": ("35B-A3B", {"decoder_sparse_step": 2}),
    "nonsense, moe": ("35B-A3B", {"decoder_sparse_step": "often"}),
    "num_experts, dense": ("0.8B", {"num_experts": 16}),
    "nonsense, dense": ("0.8B", {"num_experts": "many"}),
}  # fmt: skip


@pytest.mark.parametrize(("member", "changes"), IGNORED.values(), ids=IGNORED.keys())
def test_a_key_that_its_class_never_reads(member: str, changes: dict[str, Any]) -> None:
    """The same model as without it; the line has the key, what the model does, and the file's value."""
    document = FAMILY[member] | changes
    assert Config.from_dict(document) == Config.from_dict(FAMILY[member])
    [(name, value)] = changes.items()
    check_line(document, f"{name} is ", FAMILY[member]["model_type"], repr(value))
    outer = {"model_type": FAMILY[member]["model_type"].removesuffix("_text")}
    check_line(outer | {"text_config": document}, name, repr(value), "in text_config")


def test_all_keys_of_experts_in_a_dense_model_are_named() -> None:
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    document = FAMILY["0.8B"] | experts
    assert Config.from_dict(document) == Config.from_dict(FAMILY["0.8B"])
    assert sorted(line.split()[0] for line in disagreements(document)) == sorted(experts)


def test_what_would_change_nothing_is_not_named() -> None:
    """Values that say what the model does, and sizes of experts that a dense model has none of."""
    for member, family in (("0.8B", "dense"), ("35B-A3B", "sparse")):
        assert disagreements(FAMILY[member] | NEVER_READ[family]) == []
    assert disagreements(FAMILY["0.8B"] | {"num_experts_per_tok": 8, "norm_topk_prob": False}) == []


def test_the_class_reads_what_the_table_says() -> None:
    """A key that is never read is no field of transformers' class, and the other way round."""
    for member, family in (("0.8B", "dense"), ("35B-A3B", "sparse"), ("Qwen3-Next", "next")):
        fields = CLASSES[member].__dataclass_fields__
        unread = {name for name in NEVER_READ["dense"] if name not in fields}
        assert unread == set(NEVER_READ[family])


def test_qwen3_next_obeys_them() -> None:
    document = FAMILY["Qwen3-Next"] | {
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
        "intermediate_size": 96,
    }
    config = Config.from_dict(document)
    assert (config.norm_topk_prob, config.decoder_sparse_step) == (False, 2)
    assert config.mlp_only_layers == (1,)
    assert disagreements(document) == []


# --- rope -----------------------------------------------------------------------------------------

DEFAULT = {"rope_type": "default"}
ROPES: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "rope_scaling alone": ({"rope_scaling": DEFAULT | {"rope_theta": 1e5}}, []),
    "an empty rope_scaling": ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 1e6}}, []),
    "taken whole, not merged": (
        {
            "rope_scaling": DEFAULT | {"rope_theta": 1e5},
            "rope_parameters": DEFAULT | {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
        },
        [
            ["rope_theta is 100000.0 in rope_scaling and 1000000.0 in rope_parameters"],
            ["partial_rotary_factor is 0.25 by default and 0.5 in rope_parameters"],
        ],
    ),
    "a base in the mapping that is passed over": (
        {"rope_scaling": DEFAULT, "rope_parameters": DEFAULT | {"rope_theta": 1e6}},
        [["rope_theta is 10000.0 by default and 1000000.0 in rope_parameters"]],
    ),
    "a base beside both": (
        {"rope_scaling": DEFAULT, "rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e5},
        [["rope_theta is 100000.0 in the top level and 1000000.0 in rope_parameters"]],
    ),
    "rope_scaling against keys beside it": (
        {
            "rope_scaling": {"rope_theta": 1e5, "partial_rotary_factor": 0.5},
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
        [
            ["rope_theta is 100000.0 in rope_scaling and 1000000.0 in the top level"],
            ["partial_rotary_factor is 0.5 in rope_scaling and 0.25 in the top level"],
        ],
    ),
    "three places": (
        {
            "rope_scaling": {"rope_theta": 1e5},
            "rope_parameters": {"rope_theta": 1e6},
            "rope_theta": 1e7,
        },
        [
            ["100000.0 in rope_scaling and 10000000.0 in the top level"],
            ["100000.0 in rope_scaling and 1000000.0 in rope_parameters"],
        ],
    ),
    "a scaling that is passed over": (
        {
            "rope_scaling": {"type": "default", "rope_theta": 1e7},
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0},
        },
        [["rope_type is 'default' as type in rope_scaling and 'yarn' in rope_parameters"]],
    ),
    "rope_type and type": (
        {"rope_parameters": {"rope_type": "default", "type": "yarn", "rope_theta": 1e7}},
        [["rope_type is 'default' in rope_parameters and 'yarn' as type in rope_parameters"]],
    ),
    "all the same": (
        {
            "rope_scaling": {"rope_theta": 1e7, "partial_rotary_factor": 0.25},
            "rope_parameters": {"rope_theta": 10_000_000},
            "rope_theta": 1e7,
        },
        [],
    ),
}


@pytest.mark.parametrize(("rope", "lines"), ROPES.values(), ids=ROPES.keys())
def test_rope_as_in_transformers(rope: dict[str, Any], lines: list[list[str]]) -> None:
    """Its numbers, and a line for each place that is passed over and differs."""
    bare = {k: v for k, v in FAMILY["35B-A3B"].items() if k != "rope_parameters"}
    taken = theirs("35B-A3B", bare | rope).rope_parameters
    ours = Config.from_dict(bare | rope)
    assert ours.rope_theta == taken["rope_theta"]
    assert ours.partial_rotary_factor == taken["partial_rotary_factor"]
    found = disagreements(bare | rope)
    assert len(found) == len(lines), found
    for line, words in zip(found, lines, strict=True):
        assert not [word for word in words if word not in line], line


def test_rope_at_the_top_level_is_not_read() -> None:
    """It is named, in whichever form it stands there."""
    check_line(
        nested(rope_theta=1e5), "rope_theta is 10000000.0 in rope_parameters", "100000.0 in the top"
    )
    check_line(
        nested(rope_parameters={"rope_theta": 1e5}),
        "10000000.0 in rope_parameters and 100000.0 in the top level's rope_parameters",
    )
    check_line(
        nested(rope_scaling={"type": "yarn"}), "'yarn' as type in the top level's rope_scaling"
    )


# --- the top level of a nested file ----------------------------------------------------------------

OUTER: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "a switch": (
        {"hidden_act": "silu"},
        {"hidden_act": "gelu"},
        ["hidden_act", "'silu'", "'gelu'"],
    ),
    "a switch there alone": ({}, {"attention_bias": True}, ["attention_bias is False by default"]),
    "a field there alone": ({}, {"rms_norm_eps": 1e-5}, ["1e-06 by default and 1e-05 in the top"]),
    "an interval": (
        {"full_attention_interval": 4},
        {"full_attention_interval": 2},
        ["full_attention_interval is 4 in text_config and 2 in the top level"],
    ),
    "layer types": ({}, {"layer_types": ["attention"] * 8}, ["layer_types is", "'full_attention'"]),
    "a key that is unknown": (
        {"new_scale": 1},
        {"new_scale": 2},
        ["new_scale is 1 in text_config"],
    ),
    "a key that is never read": (
        {},
        {"norm_topk_prob": False},
        ["norm_topk_prob", "True", "False"],
    ),
    "a claim of formats": (
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "quark"}},
        ["quantization_config", "'quark'} in the top level and", "'fp8'} in text_config"],
    ),
}


@pytest.mark.parametrize(("inner", "outer", "words"), OUTER.values(), ids=OUTER.keys())
def test_the_top_level_against_text_config(
    inner: dict[str, Any], outer: dict[str, Any], words: list[str]
) -> None:
    """text_config is taken; only where the other one has a say it is named first."""
    document = nested(inner, **outer)
    assert Config.from_dict(document) == Config.from_dict(nested(inner))
    check_line(document, *words)


def test_what_may_differ_between_the_levels() -> None:
    """Records of the tool that saved the file, and settings of training."""
    inner = {"dtype": "bfloat16", "transformers_version": "5.0", "use_cache": True}
    outer = {"dtype": "float32", "transformers_version": "4.57", "use_cache": False}
    assert disagreements(nested(inner, **outer, vision_config={"hidden_size": 9})) == []
    assert disagreements(nested(layer_types=None, vision_start_token_id=7)) == []


def test_the_top_level_decides_the_kind_of_model() -> None:
    """transformers makes the text_config's class from the outer model_type."""
    document = nested({"model_type": "qwen3_5_text"})
    made = Qwen3_5MoeConfig(text_config=deepcopy(document["text_config"]))
    assert type(made.text_config) is Qwen3_5MoeTextConfig
    assert Config.from_dict(document).num_experts == FAMILY["35B-A3B"]["num_experts"]
    check_line(document, "model_type is 'qwen3_5_moe' in the top level and 'qwen3_5_text'")


# --- layer types ----------------------------------------------------------------------------------


def test_layer_types_by_their_older_names() -> None:
    """transformers renames them, and so an interval agrees with them."""
    document = FAMILY["35B-A3B"] | {"layer_types": (["mamba"] * 3 + ["attention"]) * 2}
    assert list(Config.from_dict(document).layer_types) == theirs("35B-A3B", document).layer_types
    assert disagreements(document) == []


def test_an_interval_that_nobody_reads() -> None:
    """If layer_types is there, the interval may be anything, and a line names it."""
    document = FAMILY["35B-A3B"] | {
        "layer_types": ["full_attention"] * 8,
        "full_attention_interval": 0,
    }
    assert Config.from_dict(document).layer_types == ("full_attention",) * 8
    check_line(document, "layer_types", "full_attention_interval = 0")


# --- ends of a text -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1, 160, 999_999])
def test_an_end_that_is_no_token_is_left_out(number: int) -> None:
    """transformers compares with it and never finds it."""
    document = FAMILY["35B-A3B"] | {"eos_token_id": [5, number]}
    assert Config.from_dict(document).eos_token_id == (5,)
    check_line(document, f"eos_token_id {number} in the top level", "0..159", "left out")
    document = nested({"eos_token_id": number}, eos_token_id=3)
    assert Config.from_dict(document).eos_token_id == (3,)
    check_line(document, f"eos_token_id {number} in text_config", "0..159")
