"""Renders chat templates, untrusted code, in a sandbox, so that what a message says stays text."""

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen35.errors import InputError

FIRST_MARK = 0xF0000  # the first of the private-use characters of which marks are chosen
THOUGHT = ("<think>", "</think>")


class ChatTemplate:
    """The chat template of a folder. Several may have names: `default`, `tool_use`, ..."""

    def __init__(self, folder: Path, templates: dict[str, str]) -> None:
        self.folder, self.templates = folder, templates

    @classmethod
    def of_folder(cls, folder: Path, config: Mapping[str, Any]) -> "ChatTemplate | None":
        """Read it from chat_template.jinja and additional_chat_templates/, or else from
        tokenizer_config.json (`config`), where it is a text or holds named ones. None where there is
        no template."""
        files = {"default": folder / "chat_template.jinja"}
        files |= {
            file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")
        }
        templates = {name: _read(file) for name, file in sorted(files.items()) if file.exists()}
        if templates:
            return cls(folder, templates)
        stated = config.get("chat_template")
        try:
            if isinstance(stated, list):
                stated = {named["name"]: named["template"] for named in stated}
            elif stated is not None and not isinstance(stated, dict):
                stated = {"default": stated}
            wrong = [value for value in (stated or {}).values() if not isinstance(value, str)]
        except (TypeError, KeyError) as error:
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: no readable chat template: {error!r}"
            ) from None
        if wrong:
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: chat_template is {wrong[0]!r}; expected text"
            )
        return cls(folder, stated) if stated else None

    def render(self, variables: Mapping[str, Any], *, with_tools: bool) -> str:
        """The prompt that the template makes, with the assistant's turn begun. InputError, one line, for
        whatever goes wrong inside it. with_tools: take the template `tool_use` where there is one."""
        name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise InputError(
                f"{self.folder}: no chat template named {name!r}, only {', '.join(self.templates)}"
            )
        defaults = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return (
                _environment().from_string(self.templates[name]).render({**defaults, **variables})
            )
        except Exception as error:  # a template may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{self.folder}: the chat template fails: {reason}") from None


class Marker:
    """Tells the control tokens that a template writes from those that its input contains.

    `mark` puts a private-use character on either side of each added token inside the input, which
    templates pass on (a token's text stays whole, so that a template still finds `</think>` in an
    answer); `unmark` takes them out of what was rendered. tokens: the written forms of added tokens.
    """

    def __init__(self, tokens: Iterable[str], given: Any, template: ChatTemplate) -> None:
        self.tokens = sorted(tokens, key=len, reverse=True)
        texts = [*_texts(given), *template.templates.values()]
        free = (
            mark for mark in map(chr, count(FIRST_MARK))
            if not any(form in text for form in (mark, _escaped(mark)) for text in texts)
        )  # fmt: skip
        self.start, self.end, self.cut = next(free), next(free), next(free)
        either = "|".join(map(re.escape, self.tokens)) or "(?!)"
        self.token = re.compile(either)
        self.literal = re.compile(
            "|".join(re.escape(t) for t in self.tokens if t not in THOUGHT) or "(?!)"
        )
        self.marked = re.compile(
            f"{self.start}({either}){self.end}|[{self.start}{self.end}{self.cut}]|({either})"
        )

    def mark(self, given: Any, *, answer: bool = False) -> Any:
        """The same mappings and lists with marks in their texts.

        answer: whether they are what an assistant said, where `<think>` and `</think>` are the model's
        own tokens. A template may cut the text at them and trim what is left, so that no mark may stand
        beside them.
        """
        if isinstance(given, str):
            token = self.literal if answer else self.token
            return self._mark_ends(token.sub(rf"{self.start}\g<0>{self.end}", given))
        if isinstance(given, Mapping):
            said = given.get("role") == "assistant"
            return {
                self.mark(key): self.mark(value, answer=answer or (said and key == "content"))
                for key, value in given.items()
            }
        if isinstance(given, list | tuple):
            return [self.mark(value, answer=answer) for value in given]
        return given

    def _mark_ends(self, text: str) -> str:
        """Put a mark after a text that ends with the beginning of a token, and before one that begins
        with the end of a token: what a template writes beside it, also after trimming it, could complete
        the token."""
        parts = [(token[:n], token[n:]) for token in self.tokens for n in range(1, len(token))]
        body = text.rstrip()
        if body.endswith(tuple(first for first, _ in parts)):
            text = body + self.cut + text[len(body) :]
        body = text.lstrip()
        if body.startswith(tuple(last for _, last in parts)):
            text = text[: len(text) - len(body)] + self.cut + body
        return text

    def unmark(self, rendered: str) -> tuple[str, list[tuple[str, bool]] | None]:
        """The text without marks; and, where there were any, its pieces: control tokens (True) and the
        text between them."""
        marks = (self.start, self.end, self.cut)
        for mark in marks:  # as tojson(ensure_ascii=True) writes it
            rendered = rendered.replace(_escaped(mark), mark)
        if not any(mark in rendered for mark in marks):
            return rendered, None
        pieces: list[tuple[str, bool]] = []
        text, after = "", 0
        for found in self.marked.finditer(rendered):
            text += rendered[after : found.start()] + (found[1] or "")
            after = found.end()
            if found[2] is not None:
                pieces += [(text, False), (found[2], True)]
                text = ""
        pieces.append((text + rendered[after:], False))
        return "".join(piece for piece, _ in pieces), [piece for piece in pieces if piece[0]]


class Generation(Extension):
    """`{% generation %}`, which marks what an assistant says for training: here its body is rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    """The helpers that templates of the hub expect, in a sandbox."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(  # jinja's own filter escapes characters for HTML
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    return env


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: no readable chat template: {error!r}") from None


def _escaped(mark: str) -> str:
    return json.dumps(mark)[1:-1]


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
