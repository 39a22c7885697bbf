"""Converts text to ids and back, as the checkpoint's files define it.

| file | taken | left alone, and why |
|---|---|---|
| tokenizer.json | vocabulary, merges, normaliser, pre-tokeniser, decoder, added tokens | `truncation`, `padding` and the model's `dropout` are leftovers of training; `post_processor` adds tokens that a prompt states itself |
| tokenizer_config.json | `added_tokens_decoder`; `bos_token`, `eos_token` and the other named tokens; `chat_template` | lengths, sides, `clean_up_tokenization_spaces`, class names: they serve batches and other back ends |
| special_tokens_map.json | named tokens that tokenizer_config.json lacks | |
| chat_template.jinja, additional_chat_templates/ | the templates, before tokenizer_config.json's | |
"""  # noqa: E501

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from qwen35.config_json import read_object
from qwen35.errors import InputError
from qwen35.template import ChatTemplate, Marker
from qwen35.tokenizer_limits import (
    bytes_of_an_id,
    check_before_reading,
    check_lengths,
    fewest_ids,
    no_failure,
)

UNFINISHED = "\ufffd"  # the decoded form of an incomplete character
WINDOW = 32  # most ids that a stream decodes at once while a character is unfinished
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Prompt:
    """The ids of a prompt. text: None if the prompt was given as ids. opens_thinking: whether the
    prompt of a conversation ends inside a thought, so that the answer begins with it; None for
    other prompts."""

    ids: list[int]
    text: str | None = None
    opens_thinking: bool | None = None


class Tokenizer:
    """The tokenizer of a checkpoint folder, with its chat template where it has one."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise InputError(f"{path}: no such file, so text has no ids; give --prompt-ids instead")
        self._path = path
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not readable as a tokenizer: {error}") from None
        check_before_reading(text, path)
        with no_failure(path, "not readable as a tokenizer"):
            self._backend = Backend.from_str(text)
        self._backend.no_truncation()
        self._backend.no_padding()
        if getattr(self._backend.model, "dropout", None):
            self._backend.model.dropout = None
        config = read_config(folder / "tokenizer_config.json")
        # As in transformers, the older file counts only if the config lists no added tokens.
        listed = "added_tokens_decoder" in config
        older = {} if listed else read_config(folder / "special_tokens_map.json")
        self.special_tokens = {
            name: written
            for name in NAMED
            if (written := _written(config.get(name) or older.get(name))) is not None
        }
        _add_tokens(self._backend, config, self.special_tokens, folder / "tokenizer_config.json")
        check_lengths(self._backend, folder)
        self._template = ChatTemplate.of_folder(folder, config)
        self._folder = folder

    @cached_property
    def size(self) -> int:
        """The highest id + 1. The head's rows from there on are padding."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def id_of(self, token: str) -> int | None:
        """The id of a token in its written form, such as `<|im_end|>`."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, context: int | None = None) -> list[int]:
        """The ids of a text. The written form of a special token becomes that token.

        context: the most ids that a prompt and the first new token have together. InputError, before
        seconds go by, for a text that is so long that it has more ids for certain. Other texts are not
        checked.
        """
        self._check_length(text, context)
        _check_unicode(text)
        with no_failure(self._path):
            return self._backend.encode(text, add_special_tokens=False).ids

    def _check_length(self, text: str, context: int | None) -> None:
        if context is None or len(text) < context or self._bytes_of_an_id is None:
            return
        fewest = fewest_ids(text, self._bytes_of_an_id)
        if fewest >= context:
            raise InputError(
                f"the prompt of {len(text)} characters has at least {fewest} tokens, the context "
                f"{context}"
            )

    @cached_property
    def _bytes_of_an_id(self) -> int | None:
        return bytes_of_an_id(self._backend)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        with no_failure(self._path, mute=False):  # not muted, which saves microseconds per token
            return self._backend.decode(ids, skip_special_tokens=True)

    def shows(self, token: int) -> bool:
        """Whether an id shows in the text: it is known, and no special token."""
        known = self._backend.id_to_token(token) is not None
        return known and token not in self._special_ids

    def is_byte(self, token: int) -> bool:
        """Whether an id is one byte of a vocabulary that falls back to bytes, written `<0x41>`."""
        return bool(re.fullmatch(r"<0x[0-9A-F]{2}>", self._backend.id_to_token(token) or ""))

    @cached_property
    def _special_ids(self) -> set[int]:
        added = self._backend.get_added_tokens_decoder()
        return {number for number, token in added.items() if token.special}

    def written(self, token: int) -> str | None:
        """The entry of an id in the vocabulary, in its own alphabet. None if there is no such
        id."""
        return self._backend.id_to_token(token) if 0 <= token < self.size else None

    def is_control(self, token: int) -> bool:
        """Whether an id is an added token such as `<|im_end|>`. Added tokens of white space count
        as text."""
        return self.written(token) in self._added

    def stream(self) -> "TextStream":
        """A decoder that takes one id at a time."""
        return TextStream(self)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
        context: int | None = None,
    ) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer begins.

        messages, tools: as `messages.parse_messages` and `parse_tools` return them.
        thinking: the template's `enable_thinking`; None leaves that to the template.
        template_kwargs: further variables of the template.
        allow_special_tokens: whether the written form of a control token inside a message becomes that
            token. Otherwise a message stays text, and only the template writes control tokens.
        context: as in `encode`.

        InputError for a folder without a template, and for any error inside the template.
        """
        if self._template is None:
            raise InputError(
                f"{self._folder}: no chat template (chat_template.jinja, or tokenizer_config.json)"
            )
        switch = {} if thinking is None else {"enable_thinking": thinking}
        given = {"messages": messages, "tools": tools} | switch | dict(template_kwargs or {})
        marker = None if allow_special_tokens else Marker(self._added, given, self._template)
        marked = self._template.render(
            self.special_tokens | (given if marker is None else marker.mark(given)),
            with_tools=tools is not None,
        )
        text, pieces = (marked, None) if marker is None else marker.unmark(marked)
        self._check_length(text, context)
        _check_unicode(text)
        ids = self.encode(text) if pieces is None else self._encode_pieces(pieces)
        return Prompt(ids, text, opens_thinking(marked))  # in a message `<think>` opens nothing

    @cached_property
    def _added(self) -> dict[str, AddedToken]:
        """The added tokens by their written form, except those of white space, which is text."""
        added = self._backend.get_added_tokens_decoder().values()
        return {token.content: token for token in added if not token.content.isspace()}

    def _encode_pieces(self, pieces: list[tuple[str, bool]]) -> list[int]:
        """The ids of pieces: control tokens (True), and texts (False), in which no token is
        recognised."""
        ids: list[int] = []
        for i, (piece, is_control) in enumerate(pieces):
            if is_control:
                token = self._backend.token_to_id(piece)
                assert token is not None
                ids.append(token)
                continue
            before = self._added.get(pieces[i - 1][0]) if i else None
            after = self._added.get(pieces[i + 1][0]) if i + 1 < len(pieces) else None
            text = piece.lstrip() if before is not None and before.rstrip else piece
            ids += self._encode_plain(text.rstrip() if after is not None and after.lstrip else text)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        backend = self._backend
        with no_failure(self._path):
            normalised = backend.normalizer.normalize_str(text) if backend.normalizer else text
            words = [normalised]
            if backend.pre_tokenizer:
                words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalised)]
            return [token.id for word in words for token in backend.model.tokenize(word)]


class TextStream:
    """Converts ids to text as soon as characters are complete. The joined pieces, with `flush`, are
    the text that all ids decode to together."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # ids whose text was returned; decoders need them as context
        self._fresh: list[int] = []  # ids after them
        self._shown = 0  # returned characters of the fresh ids' text

    def push(self, token: int) -> str:
        """The text that this id completes, or "" while a character is unfinished."""
        if not self._tokenizer.shows(token):
            return ""
        self._fresh.append(token)
        if self._tokenizer.is_byte(token):
            return ""  # a run of byte ids is text only if the whole run is UTF-8
        text = self._text(self._fresh)
        # The bytes of an unfinished character decode to one replacement character, the last one.
        whole = text.removesuffix(UNFINISHED)
        piece, self._shown = whole[self._shown :], max(self._shown, len(whole))
        if whole == text and text:
            self._before, self._fresh, self._shown = self._fresh, [], 0
        elif len(self._fresh) > WINDOW:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """The remaining text after the last id. An unfinished character becomes U+FFFD."""
        piece = self._text(self._fresh)[self._shown :]
        self._before, self._fresh, self._shown = [*self._before, *self._fresh], [], 0
        return piece

    def _text(self, ids: list[int]) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *ids])[len(before) :]

    def _shorten(self, text: str) -> None:
        """Drop ids whose bytes can no longer become characters."""
        for cut in range(len(self._fresh) - 1, 0, -1):
            first, rest = self._fresh[:cut], self._fresh[cut:]
            done = self._text(first)
            if done + self._tokenizer.decode(rest) == text:
                self._before, self._fresh = first[-WINDOW:], rest
                self._shown -= len(done)
                return


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends with an open thought, as with thinking in the family's
    templates."""
    return prompt.rstrip().endswith("<think>")


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint folder, without its nulls. It is empty if there is no such
    file. InputError if it is not readable."""
    document = read_object(path) if path.exists() else {}
    return {name: value for name, value in document.items() if value is not None}


def end_of_text(folder: Path) -> tuple[str | None, int | None]:
    """The end-of-text token and its id, as far as they are known without tokenizer.json."""
    config = read_config(folder / "tokenizer_config.json")
    listed = config.get("added_tokens_decoder")
    older = {} if listed is not None else read_config(folder / "special_tokens_map.json")
    name = _written(config.get("eos_token") or older.get("eos_token"))
    listed = listed if isinstance(listed, dict) else {}
    ids = [number for number, token in listed.items() if name == _written(token)]
    is_known = name is not None and ids and ids[0].isdecimal() and len(ids[0]) < 20
    return name, int(ids[0]) if is_known else None


def _written(token: Any) -> str | None:
    """The written form of a named token, which is a string in some files and an object in
    others."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _add_tokens(
    backend: Backend, config: dict[str, Any], named: dict[str, str], path: Path
) -> None:
    """Add the tokens that only tokenizer_config.json has, with its flags, as transformers does."""
    listed = config.get("added_tokens_decoder", {})
    try:
        tokens = {
            int(number): AddedToken(
                described["content"],
                **{"normalized": not described.get("special")}
                | {flag: bool(described[flag]) for flag in FLAGS if flag in described},
            )
            for number, described in listed.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: added_tokens_decoder cannot be read: {error!r}") from None
    for number, token in sorted(tokens.items()):
        known = backend.get_added_tokens_decoder().get(number)
        if known is not None and repr(known) == repr(token):
            continue
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != number:
            warnings.warn(
                f"{path}: {token.content!r} has the id {number} there and {found} in tokenizer.json",
                stacklevel=2,
            )
    unmarked = {t.content for t in backend.get_added_tokens_decoder().values()}
    try:
        fresh = [AddedToken(text, special=True) for text in named.values() if text not in unmarked]
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: a named token is not UTF-8: {error.object!r}") from None
    backend.add_special_tokens(fresh)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not UTF-8: character {error.start} is {text[error.start]!r}"
        ) from None
