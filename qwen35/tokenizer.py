"""Text to ids and back, and the chat template, both as the checkpoint brings them."""

import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from qwen35.errors import InputError

Message = dict[str, str]


class Tokenizer:
    """`tokenizer.json` and, where there is one, the chat template of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise InputError(f"{path}: no such file, so text has no ids; give --prompt-ids instead")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: not readable as a tokenizer: {error}") from None
        self._template = _read_template(folder)
        self._folder = folder

    @property
    def size(self) -> int:
        """Number of ids with a meaning; rows of the head at and above it are padding."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the written form of a special token becomes that token."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not UTF-8: character {error.start} is {text[error.start]!r}"
            ) from None
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """A decoder to be fed one id at a time."""
        return TextStream(self._backend)

    def render(self, messages: list[Message], *, thinking: bool) -> str:
        """The prompt of a conversation, up to where the assistant's answer begins."""
        if self._template is None:
            raise InputError(
                f"{self._folder}: no chat template (chat_template.jinja, or tokenizer_config.json)"
            )
        try:
            return _environment().from_string(self._template).render(
                messages=messages, add_generation_prompt=True, enable_thinking=thinking
            )  # fmt: skip
        except Exception as error:  # a template is foreign code and may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{self._folder}: the chat template fails: {reason}") from None


class TextStream:
    """Ids in, text out as soon as it is whole characters."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        return self._stream.step(self._backend, token) or ""


def _read_template(folder: Path) -> str | None:
    own, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if own.exists():
            return own.read_text()
        if not path.exists():
            return None
        template = json.loads(path.read_text()).get("chat_template")
        if isinstance(template, list):  # several named ones
            template = {named["name"]: named["template"] for named in template}.get("default")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        file = own if own.exists() else path
        raise InputError(f"{file}: no readable chat template: {error!r}") from None
    if template is not None and not isinstance(template, str):
        raise InputError(f"{path}: chat_template is {template!r}; expected text")
    return template


def _environment() -> jinja2.Environment:
    """Templates come with a checkpoint, so they run in a sandbox; the helpers are those of the hub."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja's own escapes for HTML

    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    return env
