"""A tokenizer.json that would grow texts without end or panics is one line of bad input."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen35.errors import InputError
from qwen35.load import TINY
from qwen35.tokenizer import Tokenizer
from qwen35.tokenizer_limits import growth, no_failure
from tests.support.checkpoints import edit_json

TEXT = "a" * 40 + "b"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


def replacing(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


DOUBLED = replacing({"String": "a"}, "aa")


@pytest.mark.parametrize(
    ("chain", "times"),
    [
        ([DOUBLED] * 22, "4.19e+06"),
        ([replacing({"Regex": ""}, "a" * 10)] * 6, "1.77e+06"),
        ([{"type": "Sequence", "normalizers": [DOUBLED] * 6}] * 2, "4.1e+03"),
    ],
    ids=["doubled", "before each character", "nested"],
)
def test_a_chain_that_grows_is_refused(folder: Path, chain: list[Any], times: str) -> None:
    edit_json(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": chain})
    with pytest.raises(InputError) as raised:
        Tokenizer(folder)
    assert str(raised.value) == (
        f"{folder / 'tokenizer.json'}: the normalizer may make {times} characters of one; expected at "
        "most 1000"
    )


def test_a_decoder_that_grows_is_refused(folder: Path) -> None:
    chain = [replacing({"String": "a"}, "a" * 20)] * 3
    edit_json(folder / "tokenizer.json", decoder={"type": "Sequence", "decoders": chain})
    with pytest.raises(InputError, match=r"the decoder may make 8e\+03 characters"):
        Tokenizer(folder)


def test_what_models_have_is_taken(folder: Path) -> None:
    """A sentencepiece model's normalizer, and steps of which each is a constant."""
    sentencepiece = [{"type": "Prepend", "prepend": "▁"}, replacing({"String": " "}, "▁")]
    chain = [*sentencepiece, {"type": "NFKC"}, replacing({"Regex": " {2,}"}, " ")]
    edit_json(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": chain})
    assert Tokenizer(folder).encode("a")
    assert growth({"type": "Sequence", "normalizers": chain}) == 2.0
    assert growth({"type": "Replace", "pattern": "ab", "content": "x"}) == 1.0
    assert growth(None) == growth({"type": "NFC"}) == 1.0


def test_a_pattern_that_backtracks_is_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library panics, which is no Exception in Python, and prints a page."""
    split = {
        "type": "Split",
        "pattern": {"Regex": r"(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    edit_json(folder / "tokenizer.json", pre_tokenizer=split)
    tokenizer = Tokenizer(folder)
    for encode in (
        tokenizer.encode,
        lambda text: tokenizer.chat([{"role": "user", "content": text}]),
    ):
        with pytest.raises(
            InputError, match=r"tokenizer\.json: the tokenizer fails: .*retry-limit"
        ):
            encode(TEXT)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mute", [True, False])
def test_ctrl_c_passes(mute: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Standard error is restored."""
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), no_failure(Path("x"), mute=mute):
            os.write(2, b"unseen")
            raise error
        os.write(2, b"seen")
    assert capfd.readouterr().err == ("seenseen" if mute else "unseenseenunseenseen")


def test_an_exception_of_the_library_is_one_line(folder: Path) -> None:
    """It raises plain Exception, here for a letter that the vocabulary has no word for."""
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
    edit_json(folder / "tokenizer.json", model=words, pre_tokenizer=None, added_tokens=[])
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer fails: WordLevel error"):
        Tokenizer(folder).encode("b")


def test_more_steps_than_any_model_has_are_refused(folder: Path) -> None:
    chain = [{"type": "Prepend", "prepend": "x"}] * 300
    edit_json(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": chain})
    with pytest.raises(InputError, match="the normalizer has 300 steps; expected at most 256"):
        Tokenizer(folder)


def test_an_added_token_as_long_as_a_page_is_refused(folder: Path) -> None:
    """Its beginnings and ends, which no message may complete, would take its length squared."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {
        "special": True
    }
    edit_json(
        folder / "tokenizer.json", added_tokens=[{"id": 1990, "content": "x" * 1001, **flags}]
    )
    with pytest.raises(
        InputError, match="an added token has 1001 characters; expected at most 1000"
    ):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("x" * 100_000, "an added token has 100000 characters"),
        ("\ud800", r"tokenizer_config\.json: a named token is not UTF-8: '\\ud800'"),
    ],
    ids=["long", "half a pair"],
)
def test_a_named_token_that_is_none(folder: Path, token: str, message: str) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=token)
    with pytest.raises(InputError, match=message):
        Tokenizer(folder)


@pytest.mark.parametrize("as_text", [True, False])
def test_merges_without_their_prefix_are_refused(folder: Path, as_text: bool) -> None:
    """The library aborts the whole process there: two of 20,000 damaged folders found it."""
    pair: Any = "a b" if as_text else ["a", "b"]
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "##b": 2, "ab": 3}, "merges": [pair]}
    edit_json(folder / "tokenizer.json", model=model | {"continuing_subword_prefix": "##"})
    with pytest.raises(
        InputError, match=r"a merge is .*; expected a second part that begins with '##'"
    ):
        Tokenizer(folder)
    whole: Any = "a ##b" if as_text else ["a", "##b"]
    model |= {"merges": [whole], "continuing_subword_prefix": "##"}
    edit_json(folder / "tokenizer.json", model=model, added_tokens=[])
    assert Tokenizer(folder).encode("ab")


@pytest.mark.parametrize("merges", [[[]], [{}], [5], {"a": 1}, ["a"]])
def test_merges_that_are_no_pairs_are_refused(folder: Path, merges: Any) -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": merges, "continuing_subword_prefix": "##"}
    edit_json(folder / "tokenizer.json", model=model)
    with pytest.raises(InputError, match=r"tokenizer\.json: "):
        Tokenizer(folder)
