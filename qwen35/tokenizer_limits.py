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


def check_growth(backend: Tokenizer, path: Path) -> None:
    """InputError where a chain of normalizers or decoders may multiply the length of every text."""
    for name, part in (("normalizer", backend.normalizer), ("decoder", backend.decoder)):
        times = 1.0 if part is None else growth(json.loads(part.__getstate__()))
        if times > MOST_GROWTH:
            raise InputError(
                f"{path}: the {name} may make {times:.3g} characters of one; expected at most "
                f"{MOST_GROWTH:g}"
            )


def growth(part: Any) -> float:
    """The most characters that a normalizer or decoder makes of one. What is put once before a text, or
    taken away, does not count."""
    if not isinstance(part, dict):
        return 1.0
    for inner in ("normalizers", "decoders"):
        if isinstance(part.get(inner), list):
            return math.prod(map(growth, part[inner]))
    content, pattern = part.get("content"), part.get("pattern")
    if part.get("type") != "Replace" or not isinstance(content, str):
        return 1.0
    text = pattern.get("String") if isinstance(pattern, dict) else pattern
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text))
    return 1.0 + len(content)  # a regular expression may match the nothing before each character


@contextmanager
def no_panic(path: Path, *, mute: bool = True) -> Iterator[None]:
    """Raise InputError where the library panics, as it does when a regular expression backtracks long.

    A panic is no Exception, and prints a page to standard error. mute: show nothing of what is written
    there while the block runs.
    """
    try:
        with muted() if mute else nullcontext():
            yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path}: the tokenizer fails: {error}") from None


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
