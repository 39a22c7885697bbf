"""A tokenizer.json that would grow texts without end or panics is one line of bad input."""

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.load import TINY
from qwen35.tokenizer import Tokenizer
from qwen35.tokenizer_limits import DECOMPOSED, fewest_ids, growth, no_failure
from tests.support.checkpoints import edit_json
from tests.support.command import in_process

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


def test_a_chain_may_make_a_thousand_of_one(folder: Path) -> None:
    chain = [replacing({"String": "a"}, "a" * 10)] * 3
    edit_json(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": chain})
    assert len(Tokenizer(folder).encode("a")) == 1000


def test_a_tokenizer_without_added_tokens(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", added_tokens=[])
    (folder / "tokenizer_config.json").write_text("{}")
    assert len(Tokenizer(folder).encode(TEXT)) == 40  # "ab" is one


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


# ---- texts that are longer than the context for certain


def bound(folder: Path, text: str) -> int:
    most = Tokenizer(folder)._bytes_of_an_id
    assert most is not None
    return fewest_ids(text, most)


# Of one, two, three and four bytes; marks that NFC joins with the letter before them, up to three.
ALPHABET = "a e\nsth.1é漢👍\u0301\u0304\u0308\u0327\u0323αὀ\u0345\u1100\u1161\u11a8\u0958\u0f73"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*ALPHABET, "the ", "<|im_end|>", "α\u0313\u0300\u0345"]), max_size=40)
)
def test_a_text_has_no_fewer_ids_than_its_bound(parts: list[str]) -> None:
    text = "".join(parts)
    tokenizer = Tokenizer(TINY)
    assert bound(TINY, text) <= len(tokenizer.encode(text))


def test_the_bound_is_reached(folder: Path) -> None:
    """By the longest token, and by a character that four characters are composed to."""
    longest = max(Tokenizer(TINY)._backend.get_vocab(), key=len)
    written = Tokenizer(TINY)
    text = written.decode([written.id_of(longest)])  # pyright: ignore
    assert len(text.encode()) == 15 and bound(TINY, text) == len(written.encode(text)) == 1
    composed = "\u1f82"
    assert len(unicodedata.normalize("NFD", composed)) == 4
    edit_json(folder / "tokenizer.json", added_tokens=[{
        "id": 1984, "content": composed, "normalized": True, "special": False,
        "single_word": False, "lstrip": False, "rstrip": False,
    }])  # fmt: skip
    many = unicodedata.normalize("NFD", composed) * 60
    assert len(many) == 240 and len(Tokenizer(folder).encode(many)) == 60
    assert bound(folder, many) == 240 / 4 / 15


def test_no_character_is_composed_of_more_than_four() -> None:
    longest = max(len(unicodedata.normalize("NFD", chr(c))) for c in range(0x110000))
    assert longest == DECOMPOSED


def added(content: str, **flags: bool) -> list[dict[str, Any]]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": 1984, "content": content, "special": False} | usual | flags]


SPLIT = {"type": "Split", "pattern": {"Regex": "[0-9]+"}, "invert": False}
TO_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps]}}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": None},
        {"pre_tokenizer": TO_BYTES},
        sequence(SPLIT | {"behavior": "Isolated"}, TO_BYTES),
        {"added_tokens": added("<x>", normalized=True, single_word=True)},
    ],
    ids=["no normalizer", "its own splitting", "isolated", "an added token"],
)
def test_other_tokenizers_whose_ids_stand_for_few_bytes(
    folder: Path, changes: dict[str, Any]
) -> None:
    edit_json(folder / "tokenizer.json", **changes)
    assert bound(folder, "x" * 150) == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": replacing({"Regex": "a+"}, "")},
        {"normalizer": {"type": "Sequence", "normalizers": [replacing({"Regex": "a+"}, "a")]}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        sequence(SPLIT | {"behavior": "Removed"}, TO_BYTES),
        sequence(SPLIT | {"behavior": "Isolated"}),
        sequence({"type": "WhitespaceSplit"}, TO_BYTES),
        {"added_tokens": added("<x>", lstrip=True)},
        {"added_tokens": added("<x>", rstrip=True)},
        {"added_tokens": added("\u0958", normalized=True)},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
    ],
)
def test_where_an_id_may_stand_for_any_text_nothing_is_known(
    folder: Path, changes: dict[str, Any]
) -> None:
    """White space that goes with a token, text that goes, characters that no entry has."""
    edit_json(folder / "tokenizer.json", **changes)
    tokenizer = Tokenizer(folder)
    assert tokenizer._bytes_of_an_id is None
    assert tokenizer.encode("a" * 50, context=1) == tokenizer.encode("a" * 50)


@pytest.mark.parametrize(
    "change",
    [{"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}, {"vocab": {"xy": 5}}],
    ids=["a prefix", "a suffix", "an id of two entries"],
)
def test_entries_that_do_not_stand_for_their_own_bytes(
    folder: Path, change: dict[str, Any]
) -> None:
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    vocab = model["vocab"] | change.pop("vocab", {})
    edit_json(path, model=model | {"vocab": vocab, "merges": []} | change)
    assert Tokenizer(folder)._bytes_of_an_id is None


def test_a_byte_that_only_an_added_token_is_written_as(folder: Path) -> None:
    """The model leaves it out of a text."""
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    model["vocab"]["another entry"] = model["vocab"].pop("Q")
    edit_json(path, model=model | {"merges": []}, added_tokens=added("Q", single_word=True))
    tokenizer = Tokenizer(folder)
    assert len(tokenizer.encode("QQQQx")) == 1 and tokenizer._bytes_of_an_id is None


def test_a_text_far_beyond_the_context_is_not_encoded() -> None:
    """A text that may fit is: one id stands for up to 15 bytes."""
    tokenizer = Tokenizer(TINY)
    said = r"^the prompt of 15\d\d characters has at least 10\d tokens, the context 101$"
    for call in (
        lambda: tokenizer.encode("x" * 1501, context=101),
        lambda: tokenizer.chat([{"role": "user", "content": "x" * 1501}], context=101),
    ):
        with pytest.raises(InputError, match=said):
            call()
    assert len(tokenizer.encode("x" * 1500, context=101)) == 1500


def test_a_prompt_of_millions_of_characters_is_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Backend, "encode", lambda *_, **__: pytest.fail("it was encoded"))
    cli = in_process(build_parser, main, capsys)
    said = "the prompt of 500000 characters has at least 33334 tokens, the context 32768"
    status, out, err = cli("x" * 500_000, "--path", "reference")
    assert (status, out, err) == (2, "", f"python -m qwen35.generate: {said}\n")
