"""Text around a continuation: stop strings, thoughts, settings and defaults, and requests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen35
from qwen35.completion import Completer, Completion, Settings, UntilStop
from qwen35.defaults import Defaults
from qwen35.errors import InputError
from qwen35.load import TINY, load
from qwen35.requests import parse_request, parse_requests, read_line, read_lines
from qwen35.tokenizer import Prompt, Tokenizer
from reference.model import Model
from tests.support.checkpoints import write

TALK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(TINY)


@pytest.fixture(scope="module")
def completer(model: Model) -> Completer:
    tokenizer = Tokenizer(TINY)
    return Completer(model, tokenizer, Defaults.of_folder(TINY, model.config, tokenizer))


# --- stop strings ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab ", max_size=4), max_size=12),
    stop=st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3),
)
def test_text_up_to_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    """However the text is cut into pieces; and nothing is held back that no stop string begins with."""
    shown, until = "", UntilStop(stop)
    whole = "".join(pieces)
    ended = [(place + len(s), place) for s in stop if (place := whole.find(s)) >= 0]
    _, first = min(ended, default=(None, None))
    for piece in pieces:
        shown += until.push(piece)
        if until.found:
            break
        assert until.held == "" or any(s.startswith(until.held) for s in stop)
    else:
        shown += until.flush()
    assert until.found == (first is not None)
    assert shown == whole[:first]


def test_a_stop_string_ends_a_text(model: Model) -> None:
    """It is no part of the text; the ids end with the one that completed it."""
    whole = qwen35.generate(model, "In the beginning", max_new_tokens=40)
    stop = whole.text[10:14]
    cut = qwen35.generate(model, "In the beginning", max_new_tokens=40, stop=[stop, "never"])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in Tokenizer(TINY).decode(cut.token_ids)
    assert stop not in Tokenizer(TINY).decode(cut.token_ids[:-1])
    for depth in (0, 1):
        again = qwen35.generate(model, "In the beginning", stop=[stop], draft_tokens=depth)
        assert again.token_ids == cut.token_ids


def test_a_stop_string_in_the_last_piece_ends_a_text() -> None:
    """A vocabulary of bytes, for example, holds a run back to the end."""

    class Late:
        def push(self, token: int) -> str:
            return ""

        def flush(self) -> str:
            return "a text. And more"

    generation, tokenizer = MagicMock(finish_reason="length"), MagicMock()
    generation.__iter__.return_value = iter([(1, None)])
    tokenizer.stream.return_value = Late()
    completion = Completion(generation, tokenizer, Prompt([1]), stop=["."])
    assert list(completion) == ["", "a text"]
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("stop", ["", [""], [5], 5, True])
def test_bad_stop_strings(stop: Any) -> None:
    with pytest.raises(InputError, match="stop = "):
        Settings(stop=stop)
    assert Settings(stop="END").stop == ("END",)


# --- limits and thoughts --------------------------------------------------------------------------


def test_a_conversation_has_no_limit_but_the_context(completer: Completer, model: Model) -> None:
    """Unless somebody gives one; a prompt has 128."""
    talk = completer.prompt(TALK, Settings())
    own = Defaults(max_new_tokens=77)
    cases = [
        (completer.complete(talk, Settings()), model.config.max_position_embeddings),
        (completer.complete(talk, Settings(max_new_tokens=9)), 9),
        (completer.complete(completer.prompt("Hello", Settings()), Settings()), 128),
        (Completer(model, completer.tokenizer, own).complete(talk, Settings()), 77),
    ]
    for completion, limit in cases:
        assert completion.generation.max_new_tokens == limit


def test_a_thought_that_the_limit_cut_is_no_answer(model: Model) -> None:
    """It is reasoning; the content is empty."""
    cut = qwen35.generate(model, TALK, max_new_tokens=6, thinking=True, temperature=0)
    assert cut.text
    found = cut.document()
    assert (found["content"], found["reasoning_content"]) == ("", cut.text.strip())
    assert found["finish_reason"] == "length"
    answered = qwen35.generate(model, TALK, max_new_tokens=6, thinking=False, temperature=0)
    assert answered.document()["content"] == answered.text
    assert "content" not in qwen35.generate(model, "Hello", max_new_tokens=2).document()


def test_streamed_pieces_are_the_text(model: Model) -> None:
    pieces: list[str] = []
    completion = qwen35.generate(
        model, "In the beginning", max_new_tokens=30, on_text=pieces.append
    )
    assert "".join(pieces) == completion.text == Tokenizer(TINY).decode(completion.token_ids)


def test_an_unknown_setting(model: Model) -> None:
    with pytest.raises(InputError, match="unknown setting 'max_tokens'; known are max_new_tokens"):
        qwen35.generate(model, "x", max_tokens=3)


def test_ids_without_a_tokenizer(tmp_path: Path) -> None:
    """Ids in, ids out; a text and a stop string need a tokenizer."""
    write(tmp_path, "0.8B")
    bare = load(tmp_path)
    completion = qwen35.generate(bare, [1, 2, 3], max_new_tokens=3)
    assert completion.text.split() == [str(token) for token in completion.token_ids]
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        qwen35.generate(bare, "text")
    with pytest.raises(InputError, match=r"stop = \['x'\].*no tokenizer\.json"):
        qwen35.generate(bare, [1], stop=["x"])


# --- requests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parse(completer: Completer) -> Callable[..., Any]:
    def call(common: Settings | None = None, **request: Any) -> Any:
        line = read_line(json.dumps(request), common or Settings())
        return parse_request(line, completer)[0]

    return call


def test_settings_of_a_request(parse: Callable[..., Any]) -> None:
    """Its own before those of the command line; null is not there."""
    common = Settings(seed=5, temperature=0.3, stop=("a",))
    found = parse(common, prompt="x", seed=None, temperature=0.9, stop="END", min_p=0.1).settings
    assert found == Settings(seed=5, temperature=0.9, stop=("END",), min_p=0.1)
    assert parse(common, prompt="x", stop=["b", "c"]).settings.stop == ("b", "c")


def test_tools_and_template_variables_of_a_request(parse: Callable[..., Any]) -> None:
    """enable_thinking of a request beats the command line's; without either the template decides."""
    open_thought = parse(messages=TALK).prompt.text
    assert (
        parse(messages=TALK, chat_template_kwargs={"enable_thinking": True}).prompt.text
        == open_thought
    )
    closed = parse(messages=TALK, chat_template_kwargs={"enable_thinking": False}).prompt.text
    assert closed != open_thought
    assert parse(Settings(thinking=False), messages=TALK).prompt.text == closed
    both = parse(
        Settings(thinking=False), messages=TALK, chat_template_kwargs={"enable_thinking": True}
    )
    assert both.prompt.text == open_thought
    assert parse(messages=TALK, tools=[{"type": "function"}]).prompt.text == open_thought


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"prompt": "x", "max_tokens": 3}, "unknown key 'max_tokens'; known are id, prompt"),
    "two prompts": ({"prompt": "x", "prompt_ids": [1]}, "one of prompt, prompt_ids and messages"),
    "tools alone": ({"prompt": "x", "tools": []}, "tools are offered, but there are no messages"),
    "kwargs alone": (
        {"prompt_ids": [1], "chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs = {'enable_thinking': False} has no effect: the prompt is no conversation",
    ),
    "bad tools": ({"messages": TALK, "tools": [3]}, "tools: a list of objects"),
    "bad message": ({"messages": [{"role": "user"}]}, r"messages\[0\]: no content"),
    "no messages": ({"messages": []}, "messages: a list of"),
    "messages of ids": ({"messages": [1, 2]}, r"messages\[0\] is a number"),
    "prompt of a kind": ({"prompt": [1]}, "prompt is a list; expected a text"),
    "ids of a kind": ({"prompt_ids": [True]}, r"prompt_ids = \[True\]; expected a list of integers"),
    "stop": ({"prompt": "x", "stop": [""]}, "stop = "),
    "stop of a kind": ({"prompt": "x", "stop": 5}, "stop = 5; expected a text or a list"),
    "kwargs": ({"prompt": "x", "chat_template_kwargs": []}, "chat_template_kwargs = .*an object"),
    "temperature": ({"prompt": "x", "temperature": "hot"}, "temperature = 'hot'; expected a number"),
    "a number beyond floats": (
        {"prompt": "x", "temperature": 10**400}, "temperature = 1000.*; expected a number"
    ),
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "seed": ({"prompt": "x", "seed": -1}, "seed = -1; expected an integer"),
    "limit": ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens = 0; expected at least 1"),
    "surrogate in the id": ({"prompt": "x", "id": "\ud83d"}, "id cannot be printed"),
    "surrogate in the prompt": ({"prompt": "\ud83d"}, "the text is not UTF-8: character 0"),
    "surrogate in a message": (
        {"messages": [{"role": "user", "content": "a\ud83d"}]}, "the text is not UTF-8"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("request_", "line"), BAD.values(), ids=BAD.keys())
def test_a_bad_request(parse: Callable[..., Any], request_: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        parse(**request_)


def test_lines_end_at_line_feeds_alone(completer: Completer) -> None:
    """JSON text may hold U+2028, U+0085 and others that str.splitlines takes for ends of lines."""
    text = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"
    lines = [
        json.dumps({"prompt": text, "id": text}, ensure_ascii=False).replace("\\u000b", "\u2028")
    ] * 2
    read = read_lines("\r\n".join(lines) + "\n\n", "requests.jsonl", Settings())
    found = parse_requests(read, "requests.jsonl", completer)
    assert [request.prompt for request in found] == [found[0].prompt] * 2
    assert isinstance(found[0].prompt, Prompt)
    with pytest.raises(InputError, match=r"requests\.jsonl, line 3: not JSON"):
        read_lines("\n".join([*lines, "{"]), "requests.jsonl", Settings())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_has_not(number: str) -> None:
    """Python reads them; what would be printed with the result would be no JSON."""
    with pytest.raises(InputError, match=f"{number} is no JSON number"):
        read_line(f'{{"prompt": "x", "id": {number}}}', Settings())


# --- settings without an effect -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "chosen", "line"),
    [
        ("x", {"thinking": True}, "thinking = True has no effect: the prompt is no conversation"),
        ("x", {"thinking": False}, "thinking = False has no effect"),
        ([1, 2], {"thinking": True}, "thinking = True has no effect"),
        (
            "x",
            {"chat_template_kwargs": {"a": 1}},
            r"chat_template_kwargs = \{'a': 1\} has no effect",
        ),
        ("x", {"allow_special_tokens": True}, "allow_special_tokens = True has no effect"),
        ("x", {"tools": [{"type": "function"}]}, "tools are offered, but there are no messages"),
        ([1], {"tools": []}, "tools are offered, but there are no messages"),
        ("x", {"top_p": 0.5}, "top_p = 0.5 has no effect: the temperature is 0 unless it is given"),
        ("x", {"top_k": 5}, "top_k = 5 has no effect"),
        ("x", {"min_p": 0.1}, "min_p = 0.1 has no effect"),
        ("x", {"seed": 3}, "seed = 3 has no effect"),
    ],
)
def test_a_setting_without_an_effect(model: Model, prompt: Any, chosen: dict, line: str) -> None:
    with pytest.raises(InputError, match=line):
        qwen35.generate(model, prompt, max_new_tokens=1, **chosen)


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [
        (TALK, {"thinking": False, "chat_template_kwargs": {"a": 1}, "allow_special_tokens": True}),
        (TALK, {"top_k": 5, "seed": 3}),  # the checkpoint advises a temperature
        (
            "x",
            {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0},
        ),  # which is what they are without
        ("x", {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 3}),
        ("x", {"temperature": 0, "top_k": 5, "seed": 3}),  # one of several temperatures, say
        ("x", {"repetition_penalty": 1.5, "presence_penalty": 0.5}),  # change greedy choices too
    ],
)
def test_settings_with_an_effect(model: Model, prompt: Any, chosen: dict) -> None:
    assert len(qwen35.generate(model, prompt, max_new_tokens=1, **chosen).token_ids) == 1


def test_a_setting_of_the_command_is_for_the_requests_that_have_a_use_for_it(
    completer: Completer,
) -> None:
    """A request of its own with one that it has no use for is an error, and so is one of the command
    without any use."""
    talk, text = json.dumps({"messages": TALK}), json.dumps({"prompt": "x"})
    hot = json.dumps({"prompt": "x", "temperature": 0.5})
    common = Settings(thinking=False, seed=3)

    def parsed(*lines: str) -> list[Settings]:
        found = parse_requests(
            read_lines("\n".join(lines), "r.jsonl", common), "r.jsonl", completer
        )
        return [request.settings for request in found]

    chat, plain, drawn = parsed(talk, text, hot)
    assert (chat.thinking, chat.seed) == (False, 3)
    assert (plain.thinking, plain.seed) == (None, 0)
    assert (drawn.thinking, drawn.seed) == (None, 3)
    with pytest.raises(
        InputError, match=r"^--thinking has no effect on any request of r\.jsonl: the"
    ):
        parsed(text, hot)
    with pytest.raises(
        InputError, match=r"^r\.jsonl, line 2: seed = 4 has no effect: the temperature"
    ):
        parsed(talk, json.dumps({"prompt": "x", "seed": 4}))


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        ({"temperature": -1}, "temperature = -1.0"),
        ({"top_p": 0}, "top_p = 0.0"),
        ({"seed": -1}, "seed = -1"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"prefill_chunk": 63}, "prefill_chunk = 63"),
        ({"draft_tokens": -1}, "draft_tokens = -1"),
    ],
)
def test_a_setting_is_checked_before_a_model_is_loaded(
    chosen: dict, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35.completion.load", lambda _: pytest.fail("the weights were read"))
    with pytest.raises(InputError, match=line):
        qwen35.generate("tiny", "x", **chosen)
