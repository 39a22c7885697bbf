"""Text to ids and back, the stream of text, and chat templates, which strangers wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35.errors import InputError
from qwen35.load import TINY
from qwen35.tokenizer import Tokenizer
from tests.checkpoints import SPECIAL, edit_json, write_tokenizer

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer and no template."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    return tmp_path


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids fed one at a time."""
    stream = tokenizer.stream()
    return "".join(stream.push(token) for token in ids)


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
    """A model may say anything: broken bytes, padding. The stream loses no later text."""
    tokenizer = Tokenizer(TINY)
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 10), max_size=20))
    tail = tokenizer.encode(" the end. the end")
    assert streamed(tokenizer, [*ids, *tail]).endswith(" the end")


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
    """As published: fewer ids than rows of the head, so that masking is exercised."""
    config = json.loads((TINY / "config.json").read_text())
    assert 0 < Tokenizer(TINY).size < config["text_config"]["vocab_size"]


# --- templates ------------------------------------------------------------------------------------


def test_the_embedded_template_with_and_without_thinking() -> None:
    """The published form of a prompt: an open thought, or an empty one."""
    tokenizer = Tokenizer(TINY)
    turn = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert tokenizer.chat(USER, thinking=True).text == turn
    assert tokenizer.chat(USER, thinking=False).text == turn + "\n</think>\n\n"


def test_earlier_thoughts_are_dropped() -> None:
    """Only the answers of earlier turns come back."""
    answer = {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nHi."}
    text = Tokenizer(TINY).chat([*USER, answer, *USER], thinking=True).text
    assert "secret" not in text
    assert "Hi." in text


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "assistant", "content": "x"}], [*USER, {"role": "system", "content": "late"}]],
    ids=["none", "no user", "late system"],
)
def test_the_embedded_template_refuses(messages: list[dict[str, str]]) -> None:
    """raise_exception of a template is bad input, in one line."""
    with pytest.raises(InputError, match="chat template fails"):
        Tokenizer(TINY).chat(messages, thinking=True).text


FORMS: dict[str, Any] = {
    "string": "{{ messages[0].content }}!",
    "list": [
        {"name": "tools", "template": "wrong"},
        {"name": "default", "template": "{{ messages[0].content }}!"},
    ],
}


@pytest.mark.parametrize("template", FORMS.values(), ids=FORMS.keys())
def test_a_template_in_the_tokenizers_config(folder: Path, template: Any) -> None:
    """The older place, in both of its forms."""
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    assert Tokenizer(folder).chat(USER, thinking=True).text == "Hello!"


def test_the_templates_own_file_wins(folder: Path) -> None:
    """Where both are there, the newer place counts."""
    edit_json(folder / "tokenizer_config.json", chat_template="old")
    (folder / "chat_template.jinja").write_text("new")
    assert Tokenizer(folder).chat(USER, thinking=True).text == "new"


def test_the_hubs_helpers(folder: Path) -> None:
    """What published templates use: loop controls, plain tojson, a date, trimming."""
    (folder / "chat_template.jinja").write_text(
        "{% for i in range(5) %}\n  {% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n{% endfor %}\n"
        "{{ {'a': '<é>'} | tojson }} {{ strftime_now('%Y') | length }}"
    )
    assert Tokenizer(folder).chat(USER, thinking=True).text == '0\n1\n{"a": "<é>"} 4'


@pytest.mark.parametrize("template", [None, [], [{"name": "other", "template": "x"}]], ids=repr)
def test_no_template(folder: Path, template: Any) -> None:
    """A base model has none: said when a conversation is asked for, and not before."""
    edit_json(folder / "tokenizer_config.json", tokenizer_class="x", chat_template=template)
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("fine")) == "fine"
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.chat(USER, thinking=True).text


HOSTILE: dict[str, str] = {
    "class called": "{{ ''.__class__() }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ (messages | attr('__class__')).__name__ }}",
    "class by item": "{{ messages['__class__']['__mro__'] }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "change of the messages": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include 'config.json' %}",
    "extends": "{% extends 'config.json' %}",
    "import function": "{{ __import__('os') }}",
    "huge range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "huge power": "{{ undefined_name ** 2 }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_templates_run_in_a_sandbox(folder: Path, template: str) -> None:
    """A checkpoint's template can neither reach Python nor files; trying is bad input, one line."""
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError) as caught:
        Tokenizer(folder).chat(USER, thinking=True).text
    assert str(folder) in str(caught.value)


def test_a_look_at_python_sees_nothing(folder: Path) -> None:
    """The sandbox gives an undefined value for such a name, which prints as nothing."""
    (folder / "chat_template.jinja").write_text(
        "[{{ ''.__class__ }}{{ raise_exception.__code__ }}]"
    )
    assert Tokenizer(folder).chat(USER, thinking=True).text == "[]"


FAULTY: dict[str, str] = {
    "raises": "{{ raise_exception('no system\nmessage') }}",
    "syntax": "{% if %}",
    "unclosed": "{% for m in messages %}",
    "unknown filter": "{{ messages | nonsense }}",
    "unknown method": "{{ messages[0].content.nonsense() }}",
    "division by zero": "{{ 1 / 0 }}",
    "type": "{{ messages[0].content + 1 }}",
    "wrong argument": "{{ strftime_now(5) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "not json": "{{ raise_exception | tojson }}",
}


@pytest.mark.parametrize("template", FAULTY.values(), ids=FAULTY.keys())
def test_a_failing_template_is_bad_input(folder: Path, template: str) -> None:
    """Whatever goes wrong inside a template, the folder is named and no traceback escapes."""
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError) as caught:
        Tokenizer(folder).chat(USER, thinking=True).text
    assert str(folder) in str(caught.value)


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


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"chat_template": 5}',
        '{"chat_template": [5]}',
        '{"chat_template": [{"name": "default"}]}',
        '{"chat_template": {"default": "x"}}',
    ],
)
def test_a_tokenizer_config_that_cannot_be_read(folder: Path, content: str) -> None:
    """The file is named, at the latest when the template is asked for."""
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        Tokenizer(folder).chat(USER, thinking=True).text
    assert str(folder) in str(caught.value)


def test_a_template_file_that_is_no_text(folder: Path) -> None:
    """The file is named."""
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"chat_template\.jinja"):
        Tokenizer(folder)


def test_a_text_with_half_a_surrogate_is_bad_input(folder: Path) -> None:
    """Bytes of a command line that are no UTF-8 arrive like this; they have no ids."""
    with pytest.raises(InputError):
        Tokenizer(folder).encode("a\udcffb")
