"""Text to ids and back, the stream of text, and chat templates, which strangers wrote."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from qwen35.errors import InputError
from qwen35.load import TINY
from qwen35.tokenizer import Tokenizer
from tests.support.checkpoints import SPECIAL, write_tokenizer

# NFC normalisation is part of the tokenizer, so these are in NFC already.
TEXTS = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "line\nline\r\n\n\ttab",
    "1234567890 3.14",
    "naïve café, Größe, Ελληνικά, русский",
    "日本語と中文、한국어",
    "עברית العربية हिन्दी ไทย",
    "👍🏽 👩‍👩‍👧 🇳🇴",
    "I'll say 'it's' won't",
    "a\u0000b\u200bc\ufeffd",
    "def f(x):\n    return x ** 2  # ok",
]
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module", params=["embedded", "bytes"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """The embedded one, and one whose every id is a byte, where no character is whole."""
    if request.param == "embedded":
        return Tokenizer(TINY)
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose every id is a byte."""
    folder = tmp_path_factory.mktemp("bytewise")
    write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer and no template."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    return tmp_path


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids fed one at a time."""
    stream = tokenizer.stream()
    return "".join(stream.push(token) for token in ids) + stream.flush()


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    """Every text has ids, all of them known, and comes back as it was."""
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.size for token in ids)
    assert tokenizer.decode(ids) == text
    assert streamed(tokenizer, ids) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_any_text_streams_as_it_decodes(text: str) -> None:
    """One id at a time or all at once: the same characters."""
    tokenizer = Tokenizer(TINY)
    ids = tokenizer.encode(text)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_a_character_comes_when_it_is_whole(tmp_path: Path) -> None:
    """Four bytes of an emoji: nothing, nothing, nothing, the emoji."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    stream = tokenizer.stream()
    ids = tokenizer.encode("a👍é")
    assert len(ids) == 7
    assert [stream.push(token) for token in ids] == ["a", "", "", "", "👍", "", "é"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_can_be_streamed(data: st.DataObject) -> None:
    """A model may say anything: broken bytes, padding. All pieces make the text of all ids."""
    tokenizer = Tokenizer(TINY)
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 10), max_size=80))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_can_be_streamed(data: st.DataObject, bytewise: Tokenizer) -> None:
    """Every id a byte: characters cut anywhere, bytes that form none, and the mark of such as a text."""
    some = st.sampled_from(
        [*bytewise.encode("é👍\ufffda<|im_end|>"), *bytewise.encode("👍")[:3] * 3]
    )
    ids = data.draw(st.lists(st.one_of(some, st.integers(0, bytewise.size - 1)), max_size=90))
    assert streamed(bytewise, ids) == bytewise.decode(ids)


@pytest.fixture(scope="module")
def falling_back(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary in SentencePiece's form: unknown characters as bytes, a leading space dropped."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁d"]
    vocab = {word: number for number, word in enumerate(words)}
    backend = Backend(BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.add_special_tokens(["<s>"])
    folder = tmp_path_factory.mktemp("falling_back")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_runs_of_bytes_stream_as_they_decode(data: st.DataObject, falling_back: Tokenizer) -> None:
    """One broken byte makes its whole run of bytes unreadable, those before it too."""
    # A, the two bytes of e acute, bytes that continue and begin other characters, words, a special token.
    ids = [1 + byte for byte in (0x41, 0xC3, 0xA9, 0x80, 0xE2)] + [257, 258, 259, 260, 261, 999]
    drawn = data.draw(st.lists(st.sampled_from(ids), max_size=60))
    assert streamed(falling_back, drawn) == falling_back.decode(drawn)


def test_a_character_that_the_limit_cut_is_shown(bytewise: Tokenizer) -> None:
    """Three bytes of an emoji are no text until the end, and then what they decode to."""
    ids = bytewise.encode("a👍")[:4]
    stream = bytewise.stream()
    assert [stream.push(token) for token in ids] == ["a", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert bytewise.decode(ids) == "a\ufffd"


def test_streaming_takes_linear_time(bytewise: Tokenizer) -> None:
    """Bytes that never form a character are not decoded again and again."""
    lead = bytewise.encode("é")[0]
    stream = bytewise.stream()
    pieces = [stream.push(lead) for _ in range(300)]
    assert len(stream._fresh) <= 33
    assert "".join(pieces) + stream.flush() == "\ufffd" * 300


def test_broken_bytes_do_not_stop_the_stream(tmp_path: Path) -> None:
    """Bytes that form no character, then plain text: the text still comes."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    lead = tokenizer.encode("é")[0]
    for broken in ([lead], [lead] * 2, [lead] * 9, tokenizer.encode("👍")[:3]):
        assert streamed(tokenizer, [*broken, *tokenizer.encode("plain text")]).endswith(
            "plain text"
        )


def test_special_tokens(tokenizer: Tokenizer) -> None:
    """The written form of a special token is that token, and none of them shows in the text."""
    for written in SPECIAL:
        assert len(tokenizer.encode(written)) == 1, written
    assert tokenizer.encode("<|im_end|")[-1] != tokenizer.encode("<|im_end|>")[-1]
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n")
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == "user\nhi\n"
    assert len(tokenizer.encode("".join(SPECIAL))) == len(SPECIAL)


def test_thinking_tokens_are_text(tokenizer: Tokenizer) -> None:
    """<think> is one id, yet part of what a reader sees (as in Qwen's own tokenizer)."""
    ids = tokenizer.encode("<think>\nhm\n</think>\n\nyes")
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == "<think>\nhm\n</think>\n\nyes"


def test_the_embedded_head_has_rows_of_padding() -> None:
    """The published heads have it too. There are fewer ids than rows, so that masking is exercised."""
    config = json.loads((TINY / "config.json").read_text())
    assert 0 < Tokenizer(TINY).size < config["text_config"]["vocab_size"]


# --- bad files ------------------------------------------------------------------------------------


def test_no_tokenizer(tmp_path: Path) -> None:
    """The line says what still works."""
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file.*--prompt-ids"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": 3}'], ids=repr)
def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    """The file is named."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: not readable as a tokenizer"):
        Tokenizer(tmp_path)


def test_a_text_with_half_a_surrogate_is_bad_input(folder: Path) -> None:
    """Bytes of a command line that are no UTF-8 arrive like this; they have no ids."""
    with pytest.raises(InputError):
        Tokenizer(folder).encode("a\udcffb")
