"""Conversations in the forms that clients send, and answers parted from their thoughts."""

import json
from typing import Any

import pytest

from qwen35.errors import InputError
from qwen35.load import TINY
from qwen35.messages import Answer, parse_messages, parse_tools, split_reasoning
from qwen35.tokenizer import Tokenizer, opens_thinking

USER = {"role": "user", "content": "Hello"}
ARGUMENTS = {"city": "Bern", "days": [1, 2]}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (USER, USER),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "ab"},
        ),
        ({"role": "user", "content": [{"text": "a"}, "b"]}, {"role": "user", "content": "ab"}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        (
            {"role": "tool", "content": "x", "tool_call_id": "c1", "name": None},
            {"role": "tool", "content": "x", "tool_call_id": "c1"},
        ),
        (
            {"role": "assistant", "content": "a", "reasoning": "r"},
            {"role": "assistant", "content": "a", "reasoning": "r", "thinking": "r",
             "reasoning_content": "r"},
        ),
        ({**USER, "weight": 0.5}, {**USER, "weight": 0.5}),
    ],
)  # fmt: skip
def test_a_message_becomes_what_templates_take(message: Any, expected: Any) -> None:
    """Nulls go, parts are joined, an assistant may say nothing; other keys pass on."""
    assert parse_messages([message]) == [expected]


@pytest.mark.parametrize("written", [json.dumps(ARGUMENTS), ARGUMENTS])
def test_arguments_of_calls_become_objects(written: Any) -> None:
    """OpenAI's clients send them as JSON text; templates walk over an object."""
    [message] = parse_messages(
        [{"role": "assistant", "content": None, "tool_calls": [call(written)]}]
    )
    assert message["tool_calls"] == [call(ARGUMENTS)]


@pytest.mark.parametrize("empty", ["", None, {}])
def test_a_call_without_arguments(empty: Any) -> None:
    [message] = parse_messages([{"role": "assistant", "tool_calls": [call(empty)]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_the_callers_messages_stay_as_they_are() -> None:
    """Calls are rewritten in a copy."""
    given = [{"role": "assistant", "tool_calls": [call('{"a": 1}')]}]
    before = json.dumps(given)
    parse_messages(given)
    assert json.dumps(given) == before


BAD: dict[str, tuple[Any, str]] = {
    "no list": ("hello", "a list of"),
    "none": ([], "a list of"),
    "no object": ([USER, 5], r"messages\[1\] is a number"),
    "no role": ([{"content": "x"}], r"messages\[0\]: role is None"),
    "role": ([{"role": 3, "content": "x"}], r"messages\[0\]: role is 3"),
    "no content": ([{"role": "user"}], r"messages\[0\]: no content"),
    "null content": ([USER, {"role": "user", "content": None}], r"messages\[1\]: no content"),
    "content": ([{"role": "user", "content": 5}], r"messages\[0\]: content is a number"),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        r"messages\[0\]: a part has type 'image_url'; this is a text model",
    ),
    "part": ([{"role": "user", "content": [5]}], r"messages\[0\]: a part has type 'int'"),
    "part's text": (
        [{"role": "user", "content": [{"type": "text"}]}],
        "text of a part is null",
    ),
    "calls": ([{"role": "assistant", "tool_calls": "x"}], r"messages\[0\]: tool_calls: a list"),
    "arguments": (
        [{"role": "assistant", "tool_calls": [call("{")]}],
        r"messages\[0\]: tool_calls\[0\]: arguments are not JSON",
    ),
    "arguments of a kind": (
        [{"role": "assistant", "tool_calls": [call({}), call("[1]")]}],
        r"tool_calls\[1\]: arguments are a list; expected an object",
    ),
    "name of a call": ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "name is None"),
    "reasoning": ([{"role": "assistant", "reasoning": 5}], "reasoning_content is a number"),
}


@pytest.mark.parametrize(("messages", "line"), BAD.values(), ids=BAD.keys())
def test_a_bad_message_is_named(messages: Any, line: str) -> None:
    """The line names its number and the key."""
    with pytest.raises(InputError, match=line):
        parse_messages(messages)


@pytest.mark.parametrize("tools", [{}, "x", [1], [[]]])
def test_bad_tools(tools: Any) -> None:
    with pytest.raises(InputError, match="tools: a list of objects"):
        parse_tools(tools)


def test_no_tools() -> None:
    """Templates ask whether there are any."""
    assert parse_tools(None) is parse_tools([]) is None
    assert parse_tools([{"a": 1}]) == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("yes", False, Answer("", "yes", True)),
        ("hm\n</think>\n\nyes", True, Answer("hm", "yes", True)),
        ("hm", True, Answer("hm", "", False)),  # the limit cut the thought
        ("", True, Answer("", "", False)),
        ("<think>\nhm\n</think>\n\nyes\n", False, Answer("hm", "yes\n", True)),
        ("a</think>b</think>c", True, Answer("a</think>b", "c", True)),
        ("<think> is a tag", False, Answer("", "<think> is a tag", True)),
    ],
)
def test_an_answer_is_parted_from_its_thought(text: str, opened: bool, expected: Answer) -> None:
    """Text before the end of a thought is never content."""
    assert split_reasoning(text, opened=opened) == expected


def test_whether_the_prompt_opens_a_thought() -> None:
    """The rendered prompt says it, and a user's words do not."""
    tokenizer = Tokenizer(TINY)
    said = [{"role": "user", "content": "<think>"}]
    assert tokenizer.chat(said, thinking=True).opens_thinking is True
    assert tokenizer.chat(said, thinking=False).opens_thinking is False
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<think>\n\n</think>\n\n")
