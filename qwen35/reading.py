"""Reads the files that a user gives: text and JSON. What is wrong with one is a line with its name."""

import json
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from qwen35.errors import InputError


def existing_file(file: str | Path) -> Path:
    """The path of a file. InputError if nothing is there, or a folder."""
    if not str(file):
        raise InputError("''; expected the name of a file")
    path = Path(file)
    try:
        if path.is_dir():
            raise InputError(f"{file}: is a folder; expected a file")
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{file}: no such file") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None
    return path


def read_text(file: str | Path) -> str:
    """Read a whole text file, or standard input for `-`, as UTF-8 in any locale. A byte-order mark
    is dropped. InputError if it is not readable."""
    try:
        if str(file) == "-":
            return TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig").read()
        return existing_file(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not readable as UTF-8 text: {error}") from None


def read_json(file: str | Path) -> Any:
    """The JSON document in a text file, or in standard input for `-`. InputError, with the file's name,
    if there is none, or one with NaN or an infinity, which JSON does not have."""
    text = read_text(file)
    try:
        return parse_json(text)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def parse_json(text: str | bytes, constant: Callable[[str], Any] | None = None) -> Any:
    """The JSON document in a text. constant: what NaN and infinities become (default: an error).
    InputError, which says what is wrong, for a text that is no JSON."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if not text.strip():
            raise InputError("not JSON: it is empty")
        return json.loads(text, parse_constant=constant or _refuse)
    except InputError:
        raise
    except RecursionError:
        raise InputError("not JSON: objects or lists are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"not JSON: not readable as UTF-8 text: {error}") from None
    except ValueError:  # Python reads no integer of more than 4,300 digits
        raise InputError("not JSON: a number has too many digits") from None


def json_kind(value: Any) -> str:
    """What a value of a JSON document is, in words; of another value, the name of its type."""
    kinds = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number",
             bool: "true or false", type(None): "null"}  # fmt: skip
    return kinds.get(type(value), type(value).__name__)


def expected_object(value: Any) -> dict[str, Any]:
    """The value, if it is an object of JSON. InputError for another one."""
    if not isinstance(value, dict):
        raise InputError(f"a JSON object was expected, not {json_kind(value)}")
    return value


def _refuse(name: str) -> Any:
    raise InputError(f"not JSON: {name} is no JSON number")
