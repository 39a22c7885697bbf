"""What keeps a hostile tokenizer.json from growing texts without end, and from ending the program."""

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

MOST_GROWTH = 1000.0  # characters for one; NFKD makes 18 at most
MOST_STEPS = 256  # normalizers or decoders
LONGEST_TOKEN = 1000  # characters of an added token


def check_before_reading(text: str, path: Path) -> None:
    """InputError for a tokenizer.json that the library survives neither reading nor using.

    Its normalizers or decoders may multiply the length of every text, or be too many to be gone through
    for each. A merge without the prefix that it should have makes the library abort the process.
    """
    try:
        document = json.loads(text)
        parts = {name: document.get(name) for name in ("normalizer", "decoder")}
        unprefixed = without_prefix(document.get("model"))
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
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
    """The first merge whose second part has not the `continuing_subword_prefix` of its model."""
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not prefix or not isinstance(prefix, str):
        return None
    for merge in model.get("merges") or ():
        second = merge.partition(" ")[2] if isinstance(merge, str) else merge[-1]
        if not str(second).startswith(prefix):
            return f"{merge!r}; expected a second part that begins with {prefix!r}"
    return None


def check_lengths(backend: Tokenizer, folder: Path) -> None:
    """InputError for an added token as long as a page: what a message may not complete are its beginnings
    and ends, which have its length squared in all."""
    added = backend.get_added_tokens_decoder().values()
    longest = max((len(token.content) for token in added), default=0)
    if longest > LONGEST_TOKEN:
        raise InputError(
            f"{folder}: an added token has {longest} characters; expected at most {LONGEST_TOKEN}"
        )


def inner(part: Any) -> list[Any] | None:
    """The steps of a sequence of normalizers or decoders; None for a single one."""
    found = [part[n] for n in ("normalizers", "decoders") if isinstance(part, dict) and n in part]
    return found[0] if found and isinstance(found[0], list) else None


def steps(part: Any) -> int:
    """How many single normalizers or decoders a text goes through."""
    sequence = inner(part)
    return 1 if sequence is None else sum(map(steps, sequence))


def growth(part: Any) -> float:
    """The most characters that a normalizer or decoder makes of one. What is put once before a text, or
    taken away, does not count."""
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
    return 1.0 + len(content)  # a regular expression may match the nothing before each character


@contextmanager
def no_failure(
    path: Path, what: str = "the tokenizer fails", *, mute: bool = True
) -> Iterator[None]:
    """Raise InputError where the library fails, which raises plain Exception.

    It also panics, as where a regular expression backtracks for long: that is no Exception, and it prints
    a page to standard error. mute: show nothing of what is written there while the block runs.
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
    """Send what is written to file descriptor 2 to nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
