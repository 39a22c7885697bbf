"""Reads `--requests`: many prompts for one process, one JSON object per line, each with its
settings."""

import json
from dataclasses import dataclass, replace
from typing import Any

from qwen35.completion import Completer, Completion, Settings
from qwen35.errors import InputError
from qwen35.messages import parse_messages
from qwen35.tokenizer import Prompt

PROMPTS = ("prompt", "prompt_ids", "messages")
SETTINGS = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "presence_penalty", "seed", "draft_tokens", "logprobs", "ignore_eos", "stop",
    "chat_template_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request. id: any JSON value, or None. settings: those of the request, and otherwise those of
    the command. completion: the answer, which is not computed yet."""

    id: Any
    prompt: Prompt
    settings: Settings
    completion: Completion


def parse_requests(text: str, where: str, completer: Completer, common: Settings) -> list[Request]:
    """All requests of a file. where: the file's name. InputError, with the line, for the first bad
    one."""
    requests: list[Request] = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may have other separators
        if line.strip():
            try:
                requests.append(parse_request(line, completer, common))
            except InputError as error:
                raise InputError(f"{where}, line {number}: {error}") from None
    if not requests:
        raise InputError(f"{where}: no request in it")
    return requests


def parse_request(line: str, completer: Completer, common: Settings) -> Request:
    """Read one line: {"prompt": TEXT}, {"prompt_ids": [1, 2]}, or {"messages": [...]} with or without
    `tools`; and settings under their names, as in "max_new_tokens". InputError for anything else."""
    try:
        request = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(request, dict):
        raise InputError(f"a JSON object was expected, not {type(request).__name__}")
    request = {name: value for name, value in request.items() if value is not None}
    unknown = sorted(request.keys() - {"id", "tools", *PROMPTS, *SETTINGS})
    if unknown:
        known = ", ".join(("id", *PROMPTS, "tools", *SETTINGS))
        raise InputError(f"unknown key {unknown[0]!r}; known are {known}")
    given = [name for name in PROMPTS if name in request]
    if len(given) != 1:
        raise InputError("expected exactly one of prompt, prompt_ids and messages")
    if "tools" in request and "messages" not in request:
        raise InputError("tools are offered, but there are no messages")
    _check_echo(request.get("id"))
    settings = replace(common, **{name: request[name] for name in SETTINGS if name in request})
    if "chat_template_kwargs" in request and "messages" not in request:
        raise InputError("chat_template_kwargs are given, but there are no messages")
    said = _said(given[0], request[given[0]])
    prompt = completer.prompt(said, settings, tools=request.get("tools"))
    # It is made here, so that its errors have the number of the line.
    completion = completer.complete(prompt, settings)
    return Request(request.get("id"), prompt, settings, completion)


def _said(name: str, value: Any) -> Any:
    if name == "messages":
        return parse_messages(value)
    if name == "prompt" and not isinstance(value, str):
        raise InputError(f"prompt is {type(value).__name__}; expected text")
    is_ids = isinstance(value, list) and all(type(i) is int for i in value)
    if name == "prompt_ids" and not is_ids:
        raise InputError("prompt_ids: a list of integers was expected")
    return value


def _check_echo(name: Any) -> None:
    """InputError for an id that cannot be printed with the result."""
    try:
        json.dumps(name, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"id cannot be printed: {error}") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
