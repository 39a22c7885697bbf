"""What is taken from tokenizer.json and tokenizer_config.json, and what is left alone."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qwen35.errors import InputError
from qwen35.load import TINY
from qwen35.tokenizer import Tokenizer
from tests.support.checkpoints import edit_json, write_tokenizer

TEXT = "The quick brown fox, <|im_start|>user and <|new|> <tool> tokens"
DESCRIBED = {
    "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True,
}  # fmt: skip
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "section",
    [
        {"truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "a",
            }
        },
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, SEQUENCE],
                "pair": [SEQUENCE, SEQUENCE],
                "special_tokens": {"a": {"id": "a", "ids": [68], "tokens": ["a"]}},
            }
        },
    ],
    ids=["truncation", "padding", "post_processor"],
)  # fmt: skip
def test_leftovers_of_training_are_ignored(folder: Path, section: dict[str, Any]) -> None:
    """A tokenizer that was saved in the middle of training cuts texts, fills them up, or adds tokens."""
    before = Tokenizer(folder).encode(TEXT)
    assert len(before) > 16
    edit_json(folder / "tokenizer.json", **section)
    assert Tokenizer(folder).encode(TEXT) == before
    assert Tokenizer(folder).encode("ab") == before[:0] + Tokenizer(folder).encode("a") + (
        Tokenizer(folder).encode("b")
    )


def test_the_size_is_the_highest_id_and_one(folder: Path) -> None:
    """A vocabulary may have holes; the ids above them are real."""
    document = json.loads((folder / "tokenizer.json").read_text())
    count = len(document["model"]["vocab"]) + len(document["added_tokens"])
    document["added_tokens"].append({"id": 500, "content": "<|far|>", **DESCRIBED})
    document["model"]["vocab"]["<|far|>"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("<|far|>") == [500]
    assert tokenizer.size == 501 > count


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"added_tokens_decoder": {"new": "<|new|>"}},
        {"added_tokens_decoder": {"new": "<|new|>", "next": "<tool>"}},
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken", **DESCRIBED}},
    ],
    ids=lambda config: " ".join(config) + str(len(str(config))),
)
def test_tokens_of_the_config_as_in_transformers(folder: Path, config: dict[str, Any]) -> None:
    """A token that stands only in `added_tokens_decoder` is one id there, and here."""
    size = Tokenizer(folder).size
    listed = config.get("added_tokens_decoder", {})
    numbered = {str(size + i): {"content": c, **DESCRIBED} for i, c in enumerate(listed.values())}
    edit_json(folder / "tokenizer_config.json", **{**config, "added_tokens_decoder": numbered})
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer(folder)
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.decode(ours.encode(TEXT)) == theirs.decode(
        ours.encode(TEXT), skip_special_tokens=True
    )
    assert ours.size == size + len(listed)
    for name in ("eos_token", "pad_token"):
        assert ours.special_tokens.get(name) == theirs.special_tokens_map.get(name)


def test_flags_of_the_config_win(folder: Path) -> None:
    """`special` there hides a token's text, as in transformers."""
    number = Tokenizer(folder).encode("<think>")[0]
    described = {"content": "<think>", **DESCRIBED}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={str(number): described})
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert (
        Tokenizer(folder).decode([number])
        == theirs.decode([number], skip_special_tokens=True)
        == ""
    )


def test_an_id_that_disagrees_is_named(folder: Path) -> None:
    size = Tokenizer(folder).size
    listed = {str(size + 7): {"content": "<|new|>", **DESCRIBED}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    with pytest.warns(UserWarning, match=rf"'<\|new\|>' has the id {size + 7} there and {size} in"):
        Tokenizer(folder)


@pytest.mark.parametrize("decoder", [5, {"x": {}}, {"1": 5}, {"1": {"contents": "a"}}])
def test_a_bad_added_tokens_decoder(folder: Path, decoder: Any) -> None:
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    with pytest.raises(
        InputError, match=r"tokenizer_config\.json: added_tokens_decoder cannot be read"
    ):
        Tokenizer(folder)


def test_named_tokens_of_the_older_file(folder: Path) -> None:
    """special_tokens_map.json fills in what tokenizer_config.json does not say."""
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|endoftext|>"})
    )
    edit_json(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    found = Tokenizer(folder).special_tokens
    assert found == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_nothing_is_said_of_a_clean_folder(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer(folder)


def test_dropout_of_training_is_off(folder: Path) -> None:
    """Merges left out at random, which some tokenizers are trained with, are none of a prompt's."""
    document = json.loads((TINY / "tokenizer.json").read_text())
    document["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(document))
    text = "The capital of France is Paris"
    assert all(Tokenizer(folder).encode(text) == Tokenizer(TINY).encode(text) for _ in range(5))


@pytest.mark.parametrize("special", [True, False])
def test_flags_that_are_not_stated_are_the_librarys(folder: Path, special: bool) -> None:
    """A token that is not special is sought in normalised text, unless its entry says otherwise."""
    number = Tokenizer(folder).size
    listed = {str(number): {"content": "<new>", "special": special}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=listed)
    other = PreTrainedTokenizerFast.from_pretrained(folder).added_tokens_decoder[number]
    found = Tokenizer(folder)._backend.get_added_tokens_decoder()[number]
    assert repr(found) == repr(other)
    assert found.normalized == other.normalized is not special


def test_the_older_file_yields_to_a_list_of_added_tokens(folder: Path) -> None:
    """transformers reads it only if the newer list is missing, too."""
    edit_json(folder / "special_tokens_map.json", bos_token="<|im_start|>")
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={}, eos_token="<|im_end|>")
    other = PreTrainedTokenizerFast.from_pretrained(folder).special_tokens_map
    assert Tokenizer(folder).special_tokens == other == {"eos_token": "<|im_end|>"}
