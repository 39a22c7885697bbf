"""Protects against a hostile tokenizer.json that grows texts without end or ends the program."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qwen35.errors import InputError

MOST_GROWTH = 1000.0  # output characters per input character; NFKD has at most 18
MOST_STEPS = 256  # normalizers or decoders
LONGEST_TOKEN = 1000  # characters of an added token


def check_before_reading(text: str, path: Path) -> None:
    """InputError for a tokenizer.json that would make the library fail or abort the process.

    Normalizers or decoders may multiply the length of every text, or there may be too many of them.
    A merge without its required prefix makes the library abort the process.
    """
    try:
        document = json.loads(text)
        parts = {name: document.get(name) for name in ("normalizer", "decoder")}
        unprefixed = without_prefix(document.get("model"))
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise InputError(f"{path}: not readable as a tokenizer: {error!r}") from None
    if unprefixed is not None:
        raise InputError(f"{path}: a merge is {unprefixed}")
    for name, part in parts.items():
        if steps(part) > MOST_STEPS:
            raise InputError(
                f"{path}: the {name} has {steps(part)} steps; expected at most {MOST_STEPS}"
            )
        if growth(part) > MOST_GROWTH:
            raise InputError(
                f"{path}: the {name} may make {growth(part):.3g} characters of one; expected at most "
                f"{MOST_GROWTH:g}"
            )


def without_prefix(model: Any) -> str | None:
    """The first merge whose second part lacks the model's `continuing_subword_prefix`, as a
    message."""
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not prefix or not isinstance(prefix, str):
        return None
    for merge in model.get("merges") or ():
        second = merge.partition(" ")[2] if isinstance(merge, str) else merge[-1]
        if not str(second).startswith(prefix):
            return f"{merge!r}; expected a second part that begins with {prefix!r}"
    return None


def check_lengths(backend: Tokenizer, folder: Path) -> None:
    """InputError for a very long added token. `template.Marker` compares messages with all
    beginnings and ends of tokens, whose total length is quadratic."""
    added = backend.get_added_tokens_decoder().values()
    longest = max((len(token.content) for token in added), default=0)
    if longest > LONGEST_TOKEN:
        raise InputError(
            f"{folder}: an added token has {longest} characters; expected at most {LONGEST_TOKEN}"
        )


def inner(part: Any) -> list[Any] | None:
    """The steps of a sequence of normalizers or decoders, or None for a single one."""
    found = [part[n] for n in ("normalizers", "decoders") if isinstance(part, dict) and n in part]
    return found[0] if found and isinstance(found[0], list) else None


def steps(part: Any) -> int:
    """The number of normalizers or decoders that are applied to a text."""
    sequence = inner(part)
    return 1 if sequence is None else sum(map(steps, sequence))


def growth(part: Any) -> float:
    """The most characters that a normalizer or decoder makes of one. Characters that it puts once before
    a text, or removes, do not count."""
    if not isinstance(part, dict):
        return 1.0
    if (sequence := inner(part)) is not None:
        return math.prod(map(growth, sequence))
    content, pattern = part.get("content"), part.get("pattern")
    if part.get("type") != "Replace" or not isinstance(content, str):
        return 1.0
    text = pattern.get("String") if isinstance(pattern, dict) else pattern
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text))
    return 1.0 + len(content)  # a regular expression may match the empty text before each character


@contextmanager
def no_failure(
    path: Path, what: str = "the tokenizer fails", *, mute: bool = True
) -> Iterator[None]:
    """Turn failures of the tokenizers library, which raises plain Exception, into InputError.

    The library may also panic, for example if a regular expression backtracks too long. A panic is
    not an Exception, and prints a page to standard error. mute: discard standard error while the
    block runs.
    """
    try:
        with muted() if mute else nullcontext():
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path}: {what}: {error}") from None


@contextmanager
def muted() -> Iterator[None]:
    """Discard all output to file descriptor 2 while the block runs."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
