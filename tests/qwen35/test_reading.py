"""Files of a user: whatever is wrong with one is a line with its name, and none of Python's words."""

from pathlib import Path
from typing import Any

import pytest

from qwen35.config_json import read_object
from qwen35.errors import InputError
from qwen35.reading import expected_object, json_kind, parse_json, read_json, read_text

BAD: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no such file"),
    "empty": (b"", "not JSON: it is empty"),
    "spaces": (b" \n", "not JSON: it is empty"),
    "bytes": (bytes(range(256)), "UTF-8"),
    "cut": (b'{"a": 1', "not JSON: Expecting ',' delimiter: line 1 column 8 (char 7)"),
    "deep list": (b"[" * 100_000, "not JSON: objects or lists are nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "not JSON: objects or lists are nested too deeply"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: a number has too many digits"),
}


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("read", [read_json, read_object])
def test_it_is_one_line(read: Any, content: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and words in message and "\n" not in message
    assert len(message) < 300 and "recursion" not in message and "Errno" not in message


@pytest.mark.parametrize("read", [read_json, read_object, read_text])
def test_a_folder_and_a_name_that_is_empty(read: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder; expected a file$"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"x: no such file$"):
        read(tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"x: no such file$"):
        read(tmp_path / "file" / "x")
    with pytest.raises(InputError, match=r"^''; expected the name of a file$"):
        read("")
    with pytest.raises(InputError, match=r"File name too long$"):
        read(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}'])
def test_numbers_that_json_has_not(text: str, tmp_path: Path) -> None:
    """A user's file may not have them. Files of a checkpoint may, since Python writes them."""
    with pytest.raises(InputError, match=r"^not JSON: (NaN|-?Infinity) is no JSON number$"):
        parse_json(text)
    file = tmp_path / "config.json"
    file.write_text(f'{{"a": {text}}}')
    assert "a" in read_object(file)


def test_other_kinds_than_an_object() -> None:
    kinds = {"[1]": "a list", '"x"': "a text", "3": "a number", "1.5": "a number",
             "true": "true or false", "null": "null"}  # fmt: skip
    for text, kind in kinds.items():
        with pytest.raises(InputError, match=f"^a JSON object was expected, not {kind}$"):
            expected_object(parse_json(text))
    assert expected_object(parse_json('{"a": 1}')) == {"a": 1}
    assert json_kind((1,)) == "tuple"


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(file) == [1] and read_text(file) == "[1]"
