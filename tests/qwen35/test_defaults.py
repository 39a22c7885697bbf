"""What the files beside the weights say about stopping and drawing; nulls; and places that
disagree."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from qwen35.config import Config, disagreements
from qwen35.defaults import DRAWING, PENALTIES, Defaults
from qwen35.errors import InputError
from qwen35.tokenizer import Tokenizer
from tests.support.checkpoints import TEXT_VOCAB, edit_json, write, write_tokenizer
from tests.support.family import FAMILY

CONFIG = Config.from_dict(FAMILY["0.8B"] | {"vocab_size": TEXT_VOCAB})


# --- null is not there ----------------------------------------------------------------------------

OPTIONAL = [
    "norm_topk_prob",
    "partial_rotary_factor",
    "full_attention_interval",
    "layer_types",
    "mlp_only_layers",
    "decoder_sparse_step",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_scaling",
    "mtp_num_hidden_layers",
    "eos_token_id",
    "output_gate_type",
    "linear_conv_kernel_dim",
    "hidden_act",
    "attention_bias",
    "attn_output_gate",
    "mtp_use_dedicated_embeddings",
    "intermediate_size",
    "text_config",
    "dtype",
    "quantization_config",
]


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_means_the_default(name: str) -> None:
    """transformers writes null for what is not set: the same model as without the key."""
    document = FAMILY["397B-A17B"]
    without = {key: value for key, value in document.items() if key != name}
    null = without | {name: None}
    nested = {"model_type": "qwen3_5_moe", "text_config": null, name: None} | (
        {} if name != "text_config" else {"text_config": without}
    )
    assert Config.from_dict(null) == Config.from_dict(without) == Config.from_dict(nested)


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factor", "rope_type"])
def test_null_inside_rope_parameters(name: str) -> None:
    rope = {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_type": "default"}
    without = {key: value for key, value in rope.items() if key != name}
    outside = {} if name == "rope_type" else {name: rope[name]}
    found = [
        Config.from_dict(FAMILY["0.8B"] | outside | {"rope_parameters": given})
        for given in (without, without | {name: None})
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_attention_heads", "head_dim"])
def test_a_null_size_is_missing(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}.*missing"):
        Config.from_dict(FAMILY["0.8B"] | {name: None})


@pytest.mark.parametrize(
    ("theirs", "member"),
    [(Qwen3_5TextConfig, "0.8B"), (Qwen3_5MoeTextConfig, "35B-A3B"),
     (Qwen3NextConfig, "Qwen3-Next")],
)  # fmt: skip
def test_defaults_are_transformers_own(theirs: Any, member: str) -> None:
    """These keys may be missing in a file; the default is that of each class of the family. Only the
    class of Qwen3-Next has the two of its experts."""
    of_experts = ["norm_topk_prob", "decoder_sparse_step"]
    names = [
        "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "linear_conv_kernel_dim",
        *(of_experts if theirs is Qwen3NextConfig else ()),
    ]  # fmt: skip
    left_out = {*names, *of_experts, "partial_rotary_factor"}
    bare = {k: v for k, v in FAMILY[member].items() if k not in left_out}
    bare["rope_parameters"] = {"rope_theta": 1e7}
    ours, other = Config.from_dict(bare), theirs()
    for name in names:
        assert getattr(ours, name) == getattr(other, name), name
    with_rope = theirs(rope_parameters={"rope_theta": 1e7, "rope_type": "default"})
    assert ours.partial_rotary_factor == with_rope.rope_parameters["partial_rotary_factor"]


# --- several places -------------------------------------------------------------------------------


def nested(**outer: Any) -> dict[str, Any]:
    return {"model_type": "qwen3_5_moe", "text_config": dict(FAMILY["35B-A3B"])} | outer


def test_eos_of_both_levels_is_united() -> None:
    document = nested(eos_token_id=[3, 5])
    document["text_config"]["eos_token_id"] = 4
    assert Config.from_dict(document).eos_token_id == (3, 4, 5)
    assert disagreements(document) == []


def test_tied_at_the_top_level_as_in_transformers() -> None:
    """The outer one is taken; a line says so."""
    document = nested(tie_word_embeddings=True)
    document["text_config"]["tie_word_embeddings"] = False
    assert Config.from_dict(document).tie_word_embeddings is True
    [line] = disagreements(document)
    assert line.startswith("tie_word_embeddings is True in the top level and False in text_config")


def test_a_size_at_both_levels() -> None:
    document = nested(hidden_size=12)
    assert Config.from_dict(document).hidden_size == FAMILY["35B-A3B"]["hidden_size"]
    [line] = disagreements(document)
    assert line.startswith("hidden_size is") and "12 in the top level; the first is taken" in line


def test_rope_in_several_places_as_in_transformers() -> None:
    """rope_scaling before rope_parameters, and what they hold before the keys beside them."""
    bare = {k: v for k, v in FAMILY["35B-A3B"].items() if k != "rope_parameters"}
    document = bare | {
        "rope_scaling": {"rope_type": "default", "rope_theta": 1e5},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_theta": 1e7,
    }
    theirs = Qwen3_5MoeTextConfig(**{k: v for k, v in document.items() if k != "model_type"})
    assert Config.from_dict(document).rope_theta == theirs.rope_parameters["rope_theta"] == 1e5
    assert len(disagreements(document)) == 2


def test_layer_types_and_an_interval() -> None:
    document = FAMILY["35B-A3B"] | {
        "layer_types": ["full_attention"] * 8,
        "full_attention_interval": 4,
    }
    assert Config.from_dict(document).layer_types == ("full_attention",) * 8
    [line] = disagreements(document)
    assert line.startswith("layer_types is not what full_attention_interval = 4 gives")


@pytest.mark.parametrize("member", FAMILY)
def test_the_published_forms_agree_with_themselves(member: str) -> None:
    assert disagreements(FAMILY[member]) == []
    outer = FAMILY[member]["model_type"].removesuffix("_text")
    assert disagreements({"model_type": outer, "text_config": FAMILY[member]}) == []


def test_loading_warns_of_a_disagreement(tmp_path: Path) -> None:
    from qwen35.load import load

    write(tmp_path, "0.8B")
    document = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in document
    edit_json(tmp_path / "config.json", hidden_size=12)
    with pytest.warns(UserWarning, match="hidden_size is .* 12 in the top level"):
        load(tmp_path)


# --- generation_config.json -----------------------------------------------------------------------


def defaults(folder: Path, config: Config = CONFIG, **document: Any) -> Defaults:
    (folder / "generation_config.json").write_text(json.dumps(document))
    tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    return Defaults.of_folder(folder, config, tokenizer)


def test_stop_ids_are_the_union_of_all_files(tmp_path: Path) -> None:
    """<|im_end|> stands in tokenizer_config.json alone, and still ends a turn."""
    write_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    turn_end = Tokenizer(tmp_path).encode("<|im_end|>")[0]
    config = replace(CONFIG, eos_token_id=(7, 9))
    assert defaults(tmp_path, config, eos_token_id=[7, 8]).stop_ids == {
        7: ["generation_config.json", "config.json"],
        8: ["generation_config.json"],
        9: ["config.json"],
        turn_end: ["tokenizer_config.json"],
    }
    assert list(Defaults.of_folder(tmp_path, CONFIG, None).stop_ids) == [7, 8]


@pytest.mark.parametrize("number", [-1, TEXT_VOCAB, 999_999])
def test_an_end_that_is_no_token_is_left_out(tmp_path: Path, number: int) -> None:
    """One line names the id, its file and the vocabulary."""
    found = defaults(tmp_path, eos_token_id=[7, number])
    assert list(found.stop_ids) == [7]
    assert found.warning == (
        f"eos_token_id {number} in generation_config.json is not in the vocabulary 0..319; it is left out"
    )


def test_an_end_that_the_head_has_no_row_for(tmp_path: Path) -> None:
    """The tokenizer's own, in a model of a smaller vocabulary."""
    write_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", eos_token="<|im_end|>")
    found = defaults(tmp_path, replace(CONFIG, vocab_size=200))
    assert found.stop_ids == {}
    assert "258 ('<|im_end|>' in tokenizer_config.json) is not in the vocabulary" in found.warning


def test_the_end_without_tokenizer_json(tmp_path: Path) -> None:
    """Its id stands beside it, or else a line says that it is not known."""
    edit_json(tmp_path / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    found = defaults(tmp_path, eos_token_id=7)
    assert list(found.stop_ids) == [7]
    assert "'<|im_end|>' in tokenizer_config.json is left out: its id is not known" in found.warning
    added = {"5": {"content": "<|im_start|>"}, "6": {"content": "<|im_end|>"}}
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=added)
    found = defaults(tmp_path, eos_token_id=7)
    assert found.stop_ids == {6: ["tokenizer_config.json"], 7: ["generation_config.json"]}
    assert found.warning == ""
    added = {"9" * 5000: {"content": "<|im_end|>"}}  # more digits than Python converts
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=added)
    assert "its id is not known" in defaults(tmp_path, eos_token_id=7).warning


def test_advice_for_drawing(tmp_path: Path) -> None:
    """transformers' own defaults where it draws; nothing but penalties where it does not."""
    assert defaults(tmp_path, do_sample=True).advice == DRAWING | PENALTIES
    found = defaults(tmp_path, do_sample=True, temperature=0.6, top_k=20, min_p=0.1, top_p=None)
    assert found.advice == PENALTIES | {"temperature": 0.6, "top_k": 20, "min_p": 0.1, "top_p": 1.0}
    found = defaults(tmp_path, temperature=0.6, repetition_penalty=1.1, presence_penalty=1.5)
    assert found.advice == {"repetition_penalty": 1.1, "presence_penalty": 1.5}
    assert defaults(tmp_path).advice == PENALTIES
    theirs = GenerationConfig()._get_default_generation_params()
    shared = {name: theirs[name] for name in DRAWING if name in theirs}
    assert shared == {name: DRAWING[name] for name in shared}


def test_limits(tmp_path: Path) -> None:
    found = defaults(tmp_path, max_new_tokens=40, stop_strings=["END", "\n\n"])
    assert (found.max_new_tokens, found.stop) == (40, ("END", "\n\n"))
    assert defaults(tmp_path, stop_strings="END").stop == ("END",)


def test_what_is_not_followed_is_named(tmp_path: Path) -> None:
    """A key that would change the text; not one that is off, or of other engines' business."""
    found = defaults(
        tmp_path,
        no_repeat_ngram_size=3,
        typical_p=0.9,
        num_beams=1,
        transformers_version="5",
        max_length=20,
        pad_token_id=1,
        bos_token_id=2,
        use_cache=False,
        do_sample=True,
        temperature=1,
        suppress_tokens=None,
        min_length=0,
    )
    assert found.not_followed == {"no_repeat_ngram_size": 3, "typical_p": 0.9, "max_length": 20}
    assert found.warning == (
        "generation_config.json: not followed: no_repeat_ngram_size = 3, typical_p = 0.9, max_length = 20"
    )
    assert defaults(tmp_path, max_length=CONFIG.max_position_embeddings).warning == ""


def test_every_key_of_transformers_is_decided(tmp_path: Path) -> None:
    """A key with the value that turns it off is not mentioned."""
    off = {
        k: v
        for k, v in GenerationConfig()._get_default_generation_params().items()
        if v is not None
    }
    off.pop("max_length")
    assert defaults(tmp_path, **off).not_followed == {}
    assert defaults(tmp_path, **off | {"do_sample": True}).not_followed == {}


OFF: list[dict[str, Any]] = [
    {"repetition_penalty": 1.0}, {"no_repeat_ngram_size": 0}, {"no_repeat_ngram_size": -1},
    {"num_beams": 1}, {"num_beams": None}, {"min_length": 0}, {"min_new_tokens": 0},
    {"suppress_tokens": []}, {"begin_suppress_tokens": []}, {"bad_words_ids": []},
    {"sequence_bias": {}}, {"guidance_scale": 1}, {"remove_invalid_values": False},
    {"frequency_penalty": 0.0}, {"penalty_alpha": 0.0}, {"token_healing": False},
    {"stop_strings": []}, {"num_beam_groups": 4}, {"length_penalty": 2.0}, {"use_mtp": True},
    # only drawing reads these
    {"typical_p": 0.9}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1}, {"top_h": 0.5},
    {"do_sample": True, "typical_p": 1.0}, {"do_sample": True, "typical_p": 2},
    {"do_sample": True, "epsilon_cutoff": 0}, {"do_sample": True, "eta_cutoff": 1.0},
    # another key goes before these
    {"max_length": 20, "max_new_tokens": 40}, {"min_length": 9, "min_new_tokens": 0},
]  # fmt: skip
ON: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2}, {"num_beams": 4}, {"min_length": 1}, {"min_new_tokens": 5},
    {"suppress_tokens": [3]}, {"bad_words_ids": [[1]]}, {"guidance_scale": 1.5},
    {"remove_invalid_values": True}, {"frequency_penalty": -0.5}, {"penalty_alpha": 0.6},
    {"forced_eos_token_id": 3}, {"max_time": 1.0}, {"watermarking_config": {"bias": 2}},
    {"max_length": 20}, {"a_key_of_tomorrow": 0}, {"no_repeat_ngram_size": "2"},
]  # fmt: skip


@pytest.mark.parametrize("document", OFF, ids=str)
def test_what_is_off_is_not_named(tmp_path: Path, document: dict[str, Any]) -> None:
    """transformers makes the same tests before it uses the key."""
    assert defaults(tmp_path, **document).not_followed == {}


@pytest.mark.parametrize("document", ON, ids=str)
def test_what_is_on_is_named(tmp_path: Path, document: dict[str, Any]) -> None:
    assert defaults(tmp_path, **document).not_followed == document


@pytest.mark.parametrize("name", ["typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"])
def test_what_is_on_where_it_draws(tmp_path: Path, name: str) -> None:
    assert defaults(tmp_path, do_sample=True, **{name: 0.5}).not_followed == {name: 0.5}


BAD: dict[str, dict[str, Any]] = {
    "eos_token_id": {"eos_token_id": "x"},
    "temperature": {"do_sample": True, "temperature": "hot"},
    "top_k": {"do_sample": True, "top_k": True},
    "min_p": {"do_sample": True, "min_p": []},
    "repetition_penalty": {"repetition_penalty": "1.1"},
    "max_new_tokens": {"max_new_tokens": 0},
    "do_sample": {"do_sample": "false"},
    # numbers that nothing can be drawn with
    "temperature, negative": {"do_sample": True, "temperature": -1},
    "temperature, too large": {"do_sample": True, "temperature": 10**400},
    "temperature, no number": {"do_sample": True, "temperature": float("nan")},
    "top_p, too large": {"do_sample": True, "top_p": 5},
    "top_p, zero": {"do_sample": True, "top_p": 0.0},
    "top_k, negative": {"do_sample": True, "top_k": -1},
    "top_k, a fraction": {"do_sample": True, "top_k": 20.5},
    "min_p, too large": {"do_sample": True, "min_p": 1.5},
    "repetition_penalty, zero": {"repetition_penalty": 0},
    "presence_penalty, infinite": {"presence_penalty": float("inf")},
    "stop_strings": {"stop_strings": [""]},
}


@pytest.mark.parametrize(("name", "document"), BAD.items(), ids=BAD.keys())
def test_a_bad_value_is_named(tmp_path: Path, name: str, document: dict[str, Any]) -> None:
    key = name.split(",")[0]
    with pytest.raises(InputError, match=rf"generation_config\.json: {key} = .*; expected"):
        defaults(tmp_path, **document)


def test_what_nothing_reads_may_be_anything(tmp_path: Path) -> None:
    """Where nothing is drawn, nobody reads these keys, transformers included."""
    assert defaults(tmp_path, temperature=-1, top_p=5, top_k="all").advice == PENALTIES
