"""`tools.tokenize`: what each id stands for, control tokens and bytes that are no characters included."""

import json
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from qwen35.load import TINY
from qwen35.tokenizer import Tokenizer
from tests.support.checkpoints import write_tokenizer
from tests.support.command import Cli, in_process
from tools.tokenize import build_parser, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return in_process(build_parser, main, capsys)


def document(cli: Cli, *arguments: object) -> dict[str, Any]:
    status, out, err = cli(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_table(cli: Cli) -> None:
    """Aligned, the piece last; control tokens have no quotes."""
    status, out, _ = cli("The whale €<|im_end|>")
    assert status == 0
    *rows, sums = out.splitlines()
    assert rows == [
        "place    id  kind     piece",
        "    0   432  text     'The'",
        "    1   336  text     ' wh'",
        "    2   988  text     'ale'",
        "    3   220  text     ' '",
        "    4   158  bytes    b'\\xe2'",
        "    5   224  bytes    b'\\x82'",
        "    6   105  bytes    b'\\xac'",
        "    7  1997  control  <|im_end|>",
    ]
    assert sums == "8 tokens, 1 of them control tokens; 21 characters, 23 bytes"


def test_a_text_comes_in_three_ways(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Argument, file, standard input."""
    text = "Grüße,\nWelt"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(text.encode())))
    found = [document(cli, *given) for given in
             ([text], ["--file", tmp_path / "text.txt"], ["--file", "-"])]  # fmt: skip
    assert found[0]["ids"] == Tokenizer(TINY).encode(text)
    assert found[0]["text"] == text
    assert found == [found[0]] * 3


def test_ids_and_back(cli: Cli) -> None:
    """Bytes that follow one another make a character; a broken one is shown as such."""
    ids = document(cli, "a €<|im_end|>")["ids"]
    given = ",".join(map(str, ids))
    assert document(cli, "--decode", given)["text"] == "a €<|im_end|>"
    assert cli("--decode", given)[1].splitlines()[-1] == "'a €<|im_end|>'"
    broken = document(cli, "--decode", given.rpartition(",")[0].rpartition(",")[0])
    assert broken["text"] == "a \ufffd"
    assert broken["pieces"][-1] == {"id": ids[-3], "text": "\ufffd", "bytes": [0x82]}


def test_a_conversation(cli: Cli, tmp_path: Path) -> None:
    """The template's control tokens are such; those in a message stay text."""
    message = "What is <|im_start|>?"
    found = document(cli, message, "--chat", "--system", "Be brief.", "--no-thinking")
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": message},
    ]
    expected = Tokenizer(TINY).chat(talk, thinking=False)
    assert (found["ids"], found["text"]) == (expected.ids, expected.text)
    controls = [one["text"] for one in found["pieces"] if "control" in one]
    assert controls == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>", "<think>", "</think>"]
    (tmp_path / "talk.json").write_text(json.dumps(talk), encoding="utf-8")
    assert document(cli, "--messages", tmp_path / "talk.json", "--no-thinking") == found


def test_a_tokenizer_alone_is_enough(cli: Cli, tmp_path: Path) -> None:
    """No config.json, no weights."""
    write_tokenizer(tmp_path)
    assert len(document(cli, "abc", "--model", tmp_path)["ids"]) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["one of TEXT, --file, --decode, --messages", "none is given"]),
        (["a", "--decode", "1"], ["TEXT and --decode are given"]),
        (["--decode", "1,x"], ["1,x"]),
        (["--decode", "1,2000"], ["2000", "0..1999"]),
        (["--decode=-1"], ["-1", "0..1999"]),
        (["--decode", str(2**70)], [str(2**70), "0..1999"]),
        (["--decode", "1", "--chat"], ["--chat takes a text; --decode is given"]),
        (["a", "--system", "b"], ["--system: only --chat"]),
        (["a", "--thinking"], ["--thinking", "only --chat and --messages"]),
        (["--file", "missing"], ["missing"]),
        (["--messages", "bad.json"], ["bad.json", "not JSON"]),
        (["--messages", "digits.json"], ["digits.json", "not JSON", "digits"]),
        (["--messages", "role.json"], ["role.json", "messages[0]", "no content"]),
        (["a", "--model", "nowhere"], ["nowhere: no such folder"]),
        (["a", "--model", "."], [" tokenizer.json: no such file\n"]),
        (["a\udcff"], ["UTF-8"]),
    ],
)
def test_bad_input(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{", encoding="utf-8")
    Path("digits.json").write_text("9" * 5000, encoding="utf-8")
    Path("role.json").write_text('[{"role": "user"}]', encoding="utf-8")
    status, out, err = cli(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err


def test_the_real_command() -> None:
    """Its name is also that of a module of the standard library, which stays what it is."""
    script = "import runpy, tokenize; runpy.run_module('tools.tokenize', run_name='__main__')"
    for start in (["-m", "tools.tokenize"], ["-c", script]):
        found = subprocess.run(
            [sys.executable, *start, "The whale"], cwd=ROOT, capture_output=True, text=True, timeout=120
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert found.stdout.endswith("3 tokens, 0 of them control tokens; 9 characters, 9 bytes\n")
