"""Renders chat templates, which are untrusted code, in a sandbox. Text of messages stays text."""

import atexit
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qwen35.errors import InputError

RENDERER = Path(__file__).with_name("template_process.py")
SECONDS = 3.0  # time limit of a template
START_SECONDS = 60.0  # time limit for the start of the process, on a busy machine
LONGEST = 1 << 26  # bytes of a rendered prompt
FIRST_MARK = 0xF0000  # the first private-use character that may be a mark
THOUGHT = ("<think>", "</think>")


class ChatTemplate:
    """The chat template of a folder. Several may have names: `default`, `tool_use`, ..."""

    def __init__(self, folder: Path, templates: dict[str, str]) -> None:
        self.folder, self.templates = folder, templates

    @classmethod
    def of_folder(cls, folder: Path, config: Mapping[str, Any]) -> "ChatTemplate | None":
        """Read the template from chat_template.jinja and additional_chat_templates/, or else from
        tokenizer_config.json (`config`), which has a text or named templates. None if there is no
        template."""
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
        """Render the prompt, up to the beginning of the assistant's turn. with_tools: use the
        template `tool_use` if there is one. InputError, one line, for any error inside the
        template."""
        name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise InputError(
                f"{self.folder}: no chat template named {name!r}, only {', '.join(self.templates)}"
            )
        defaults = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return RENDER.render(self.templates[name], {**defaults, **variables})
        except InputError as error:
            raise InputError(f"{self.folder}: the chat template fails: {error}") from None


class Marker:
    """Distinguishes the control tokens that a template writes from those in its input.

    `mark` puts a private-use character on both sides of each added token in the input. Templates
    pass these characters on. The text of a token stays whole, so that a template still finds
    `</think>` in an answer. `unmark` removes them from the rendered text. tokens: the written forms
    of added tokens.
    """

    def __init__(self, tokens: Iterable[str], given: Any, template: ChatTemplate) -> None:
        self.tokens = sorted(tokens, key=len, reverse=True)
        texts = [*_texts(given), *template.templates.values()]
        used = set[str]().union(*texts)
        free = (
            mark for mark in map(chr, range(FIRST_MARK, sys.maxunicode + 1))
            if mark not in used and not any(_escaped(mark) in text for text in texts)
        )  # fmt: skip
        marks = list(islice(free, 3))
        if len(marks) < 3:
            raise InputError(
                "the messages use all private-use characters; three of them must be free"
            )
        self.start, self.end, self.cut = marks
        either = "|".join(map(re.escape, self.tokens)) or "(?!)"
        self.token = re.compile(either)
        self.literal = re.compile(
            "|".join(re.escape(t) for t in self.tokens if t not in THOUGHT) or "(?!)"
        )
        self.marked = re.compile(
            f"{self.start}({either}){self.end}|[{self.start}{self.end}{self.cut}]|({either})"
        )

    def mark(self, given: Any, *, answer: bool = False) -> Any:
        """A copy of mappings and lists, with marks in their texts.

        answer: whether they are an assistant's answer. There `<think>` and `</think>` are the
        model's own tokens. A template may cut the text at them and trim the rest, so they get no
        marks.
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
        """Put a mark after a text that ends with the beginning of a token, and before a text that
        begins with the end of one. Otherwise the text that a template writes beside it could
        complete the token."""
        parts = [(token[:n], token[n:]) for token in self.tokens for n in range(1, len(token))]
        body = text.rstrip()
        if body.endswith(tuple(first for first, _ in parts)):
            text = body + self.cut + text[len(body) :]
        body = text.lstrip()
        if body.startswith(tuple(last for _, last in parts)):
            text = text[: len(text) - len(body)] + self.cut + body
        return text

    def unmark(self, rendered: str) -> tuple[str, list[tuple[str, bool]] | None]:
        """The text without marks. If there were marks, also its pieces: control tokens (True) and
        texts (False); otherwise None."""
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


class Renderer:
    """The process of `template_process.py`. It is started when it is first needed. If a template
    takes too long or writes too much, the process is ended, and started again later."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        atexit.register(self.end)
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Make a forked process start its own, because two processes would read each other's
        answers."""
        self.process, self.lock = None, threading.Lock()

    def end(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Render a template with the variables. InputError, with the reason, if it fails."""
        try:
            line = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"its variables are no JSON: {error}") from None
        with self.lock:
            try:
                answer = json.loads(self._answer(line))
            except BaseException:  # also Ctrl-C, or the next call would read this answer
                self.end()
                raise
        if "error" in answer:
            raise InputError(answer["error"])
        return answer["text"]

    def _answer(self, line: bytes) -> bytes:
        if self.process is None:
            # -P: modules beside that file do not shadow the standard library. A new session: Ctrl-C
            # in a conversation does not reach the process.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(RENDERER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._line(self.process, START_SECONDS)
        assert self.process.stdin
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise InputError("it takes too much memory") from None
        return self._line(self.process, SECONDS)

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The next line that the process writes."""
        assert process.stdout
        until, line = time.monotonic() + seconds, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(until - time.monotonic()):
                    raise InputError(f"it takes more than {seconds:g} s")
                piece = os.read(process.stdout.fileno(), 1 << 20)
                line += piece
                if not piece or len(line) > LONGEST:
                    raise InputError("it takes too much memory")
        return bytes(line)


RENDER = Renderer()


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
