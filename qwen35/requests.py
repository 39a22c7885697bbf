"""Reads `--requests`: many prompts for one process, one JSON object per line, each with its
settings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from qwen35.arguments import shown
from qwen35.completion import Completer, Completion, Settings
from qwen35.errors import InputError
from qwen35.messages import parse_messages
from qwen35.reading import expected_object, json_kind, parse_json
from qwen35.tokenizer import Prompt

PROMPTS = ("prompt", "prompt_ids", "messages")
SETTINGS = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "presence_penalty", "seed", "draft_tokens", "logprobs", "ignore_eos", "stop",
    "chat_template_kwargs",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of the file, checked as far as that needs no model. number: from 1. id: any JSON value, or
    None. prompt: a text, ids or messages. own: the names of the settings that the line has. settings:
    those, and the command's for the others."""

    number: int
    id: Any
    prompt: Any
    tools: Any
    own: frozenset[str]
    settings: Settings


@dataclass(frozen=True)
class Request:
    """One request. id: any JSON value, or None. settings: those of the request, and otherwise those of
    the command that have an effect on it. completion: the answer, which is not computed yet."""

    id: Any
    prompt: Prompt
    settings: Settings
    completion: Completion


def read_lines(text: str, where: str, common: Settings) -> list[Line]:
    """The lines of a file, before a model is loaded. where: the file's name. common: the settings of the
    command. InputError, with the line's number, for the first bad one."""
    lines: list[Line] = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may have other separators
        if line.strip():
            with _at(where, number):
                lines.append(read_line(line, common, number))
    if not lines:
        raise InputError(f"{where}: no request in it")
    return lines


def read_line(text: str, common: Settings, number: int = 1) -> Line:
    """Read one line: {"prompt": TEXT}, {"prompt_ids": [1, 2]}, or {"messages": [...]} with or without
    `tools`; and settings under their names, as in "max_new_tokens". InputError for anything else."""
    request = expected_object(parse_json(text))
    request = {name: value for name, value in request.items() if value is not None}
    unknown = sorted(request.keys() - {"id", "tools", *PROMPTS, *SETTINGS})
    if unknown:
        known = ", ".join(("id", *PROMPTS, "tools", *SETTINGS))
        raise InputError(f"unknown key {unknown[0]!r}; known are {known}")
    given = [name for name in PROMPTS if name in request]
    if len(given) != 1:
        raise InputError("expected exactly one of prompt, prompt_ids and messages")
    _check_echo(request.get("id"))
    own = frozenset(name for name in SETTINGS if name in request)
    settings = replace(common, **{name: request[name] for name in own})
    said = _said(given[0], request[given[0]])
    return Line(number, request.get("id"), said, request.get("tools"), own, settings)


def parse_requests(lines: list[Line], where: str, completer: Completer) -> list[Request]:
    """The requests of a file, which do not run yet. InputError, with the line's number, for the first
    bad one; and for a setting of the command that has no effect on any."""
    requests: list[Request] = []
    without: list[dict[str, str]] = []
    for line in lines:
        with _at(where, line.number):
            request, idle = parse_request(line, completer)
        requests.append(request)
        without.append(idle)
    for name, reason in without[0].items():
        if all(name in idle for idle in without):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} has no effect on any request of {where}: {reason}")
    return requests


def parse_request(line: Line, completer: Completer) -> tuple[Request, dict[str, str]]:
    """A request, and the settings of the command that have no effect on it, each with the reason.
    InputError if a setting of its own has none."""
    prompt = completer.prompt(line.prompt, line.settings, tools=line.tools)
    every = completer.idle(prompt, line.settings)
    idle = {name: reason for name, reason in every.items() if name not in line.own}
    defaults = Settings()
    settings = replace(line.settings, **{name: getattr(defaults, name) for name in idle})
    # It is made here, so that its errors have the number of the line.
    completion = completer.complete(prompt, settings)
    return Request(line.id, prompt, settings, completion), idle


@contextmanager
def _at(where: str, number: int) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}, line {number}: {error}") from None


def _said(name: str, value: Any) -> Any:
    if name == "messages":
        return parse_messages(value)
    if name == "prompt" and not isinstance(value, str):
        raise InputError(f"prompt is {json_kind(value)}; expected a text")
    is_ids = isinstance(value, list) and all(type(i) is int for i in value)
    if name == "prompt_ids" and not is_ids:
        raise InputError(f"prompt_ids = {shown(value)}; expected a list of integers")
    return value


def _check_echo(name: Any) -> None:
    """InputError for an id that cannot be printed with the result."""
    try:
        json.dumps(name, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"id cannot be printed: {error}") from None
