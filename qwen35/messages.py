"""Converts conversations from OpenAI's formats to those of chat templates, and splits answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen35.errors import InputError
from qwen35.reading import json_kind, parse_json

Message = dict[str, Any]

THOUGHT_ENDS = "</think>"
REASONING = ("reasoning_content", "thinking", "reasoning")  # the template's name is first


@dataclass(frozen=True)
class Answer:
    """An assistant's answer. finished: False if it ends inside a thought."""

    reasoning: str
    content: str
    finished: bool


def split_reasoning(text: str, *, opened: bool) -> Answer:
    """Split a generated text at its last `</think>`. The text before it is never content.

    opened: whether the prompt ended inside a thought; then a text without `</think>` has no content.
    """
    before, mark, after = text.rpartition(THOUGHT_ENDS)
    if not mark:
        return Answer(text.strip(), "", False) if opened else Answer("", text, True)
    thought = before.strip().removeprefix("<think>")
    return Answer(thought.strip(), after.lstrip("\n"), True)


def parse_messages(value: Any) -> list[Message]:
    """The messages of a request or of a notebook, as chat templates expect them.

    content is text. A list of text parts is joined. If it is null or missing, an assistant's
    content is "". tool_calls: arguments that are JSON text become an object. reasoning_content is
    also read under its other names. Other keys are passed on, and nulls are dropped. InputError,
    with the message and the key.
    """
    if not isinstance(value, list) or not value:
        raise InputError('messages: a list of {"role": ..., "content": ...} was expected')
    return [_message(given, f"messages[{i}]") for i, given in enumerate(value)]


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """The functions that a request offers, as a list of objects, or None if there are none."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError("tools: a list of objects was expected")
    return value or None


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is {json_kind(given)}; expected an object with role and content")
    message = {name: value for name, value in given.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str):
        raise InputError(f"{where}: role is {role!r}; expected text such as 'user'")
    if "content" not in message and role != "assistant":
        raise InputError(f"{where}: no content; only an assistant's message may have none")
    message["content"] = _content(message.get("content", ""), where)
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise InputError(f"{where}: reasoning_content is {json_kind(reasoning)}; expected text")
        # Both names: most templates read the first, some the second.
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return message


def _content(content: Any, where: str) -> str:
    """The content as text. Parts of {"type": "text"} are joined without a separator, as in the
    family's template."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(
            f"{where}: content is {json_kind(content)}; expected text or a list of parts"
        )
    texts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "str", "input_text", "output_text"):
            raise InputError(
                f"{where}: a part has type {kind!r}; this is a text model, it takes 'text'"
            )
        if not isinstance(text, str):
            raise InputError(f"{where}: the text of a part is {json_kind(text)}; expected text")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise InputError(f"{where}: tool_calls: a list of objects was expected")
    parsed: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        place = f"{where}: tool_calls[{i}]"
        is_nested = isinstance(call.get("function"), Mapping)
        function = dict(call["function"] if is_nested else call)
        if not isinstance(function.get("name"), str):
            raise InputError(f"{place}: name is {function.get('name')!r}; expected text")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except InputError as error:
                raise InputError(f"{place}: arguments are {error}") from None
        if not isinstance(arguments, Mapping):
            kind = json_kind(arguments)
            raise InputError(f"{place}: arguments are {kind}; expected an object")
        function["arguments"] = dict(arguments)
        parsed.append(dict(call) | {"function": function} if is_nested else function)
    return parsed
