"""One line of `--requests`: a prompt, and settings of its own."""

import json
from dataclasses import dataclass
from typing import Any

from qwen35.errors import InputError
from qwen35.tokenizer import Message, Tokenizer

SETTINGS: dict[str, type] = {
    "max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int,
    "draft_tokens": int, "ignore_eos": bool,
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """id: whatever the request calls itself, or None. settings: options that it has of its own."""

    id: Any
    prompt: list[int]
    settings: dict[str, Any]


def parse_request(line: str, tokenizer: Tokenizer | None, *, thinking: bool) -> Request:
    """{"prompt": TEXT}, {"prompt_ids": [1, 2]} or {"messages": [...]}, with options under their names, as
    in "max_new_tokens". thinking: of messages. InputError for anything else."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(request, dict):
        raise InputError(f"a JSON object was expected, not {type(request).__name__}")
    unknown = sorted(request.keys() - {"id", "prompt", "prompt_ids", "messages", *SETTINGS})
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}; known are {', '.join(SETTINGS)}")
    given = [name for name in ("prompt", "prompt_ids", "messages") if name in request]
    if len(given) != 1:
        raise InputError("one of prompt, prompt_ids and messages was expected")
    settings = {name: request[name] for name in SETTINGS if name in request}
    for name, value in settings.items():
        kinds = (int, float) if SETTINGS[name] is float else SETTINGS[name]
        if not isinstance(value, kinds) or isinstance(value, bool) != (SETTINGS[name] is bool):
            raise InputError(f"{name} = {value!r}; expected {SETTINGS[name].__name__}")
    ids = request.get("prompt_ids")
    if ids is None:
        if tokenizer is None:
            raise InputError("the checkpoint has no tokenizer.json; give prompt_ids")
        text = request.get("prompt")
        if text is None:
            text = tokenizer.render(_messages(request["messages"]), thinking=thinking)
        if not isinstance(text, str):
            raise InputError(f"prompt is {type(text).__name__}; expected text")
        ids = tokenizer.encode(text)
    elif not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise InputError("prompt_ids: a list of integers was expected")
    return Request(request.get("id"), ids, settings)


def _messages(value: Any) -> list[Message]:
    is_list = isinstance(value, list) and all(
        isinstance(m, dict) and all(isinstance(m.get(n), str) for n in ("role", "content"))
        for m in value
    )
    if not is_list:
        raise InputError('messages: a list of {"role": ..., "content": ...} was expected')
    return value
