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
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from qwen35.errors import InputError

MOST_GROWTH = 1000.0  # output characters per input character; NFKD has at most 18
MOST_STEPS = 256  # normalizers or decoders
LONGEST_TOKEN = 1000  # characters of an added token
DECOMPOSED = 4  # the most characters that NFC joins to one: Unicode's longest decomposition


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


def bytes_of_an_id(backend: Tokenizer) -> int | None:
    """The most bytes of a normalised text that one id stands for, where every byte is in some id.

    So it is for byte-level BPE with nothing before it but NFC and splitting. None for all other
    tokenizers: steps may remove text, unknown characters may be left out or share an id, and added
    tokens may take white space with them.
    """
    if not isinstance(backend.model, BPE):
        return None
    document = json.loads(backend.to_str())
    model, normalizer = document["model"], document["normalizer"]
    vocab = backend.get_vocab(with_added_tokens=False)
    added = backend.get_added_tokens_decoder().values()
    keeps_all = (
        not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
        and vocab.keys() >= {*ByteLevel.alphabet()}
        and len({*vocab.values()}) == len(vocab)  # by an id of two entries, merges could grow
        and (normalizer is None or normalizer == {"type": "NFC"})
        and _splits_bytes(document["pre_tokenizer"])
        and not any(token.lstrip or token.rstrip for token in added)
        and not any(_changes(backend, token.content) for token in added)  # nor such a token
    )
    if not keeps_all:
        return None
    # In the vocabulary a character stands for a byte.
    return max(map(len, (*vocab, *(token.content for token in added))))


def _changes(backend: Tokenizer, text: str) -> bool:
    """Whether the normalizer changes a text."""
    return backend.normalizer is not None and backend.normalizer.normalize_str(text) != text


def _splits_bytes(part: Any) -> bool:
    """Whether a pre-tokenizer makes a character of each byte, and removes nothing."""
    if not isinstance(part, dict):
        return False
    steps = part["pretokenizers"] if part["type"] == "Sequence" else [part]
    splits = [step for step in steps if step["type"] == "Split" and step["behavior"] == "Isolated"]
    to_bytes = [step for step in steps if step["type"] == "ByteLevel"]
    return bool(to_bytes) and len(splits) + len(to_bytes) == len(steps)


def fewest_ids(text: str, most_bytes: int) -> int:
    """A lower bound of the number of ids of a text, of which each stands for at most `most_bytes`
    bytes."""
    characters = len(text) if text.isascii() else math.ceil(len(text) / DECOMPOSED)
    return math.ceil(characters / most_bytes)


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
