"""Terminals, pipes and files in other encodings than UTF-8: nothing dies, nothing is misread."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from qwen35.cli import one_line
from tests.support.checkpoints import write

ROOT = Path(__file__).parents[2]
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "LANG": "C"}
LATIN = ASCII | {"PYTHONIOENCODING": "latin-1"}
ECHO = "import sys; from qwen35.cli import Parser, print_json, run; "


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose every id is a byte: its text is what no encoding but UTF-8 has."""
    folder = tmp_path_factory.mktemp("small")
    write(folder, "0.8B", tokenizer=True, max_position_embeddings=200)
    (folder / "chat_template.jinja").write_bytes(
        "\ufeff{% for m in messages %}ü{{ m.content }}{% endfor %}".encode()
    )
    return folder


def run(
    *words: object, environment: Mapping[str, str], stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *map(str, words)], input=stdin, capture_output=True, cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("environment", [ASCII, LATIN], ids=["ascii", "latin-1"])
def test_an_answer_that_the_terminal_cannot_show(environment: dict[str, str]) -> None:
    """€ is a question mark there, and the run goes on; JSON escapes it and loses nothing."""
    script = ECHO + (
        "run(Parser('p', ''), lambda args: print('a\\u20acb') or print_json({'text': 'a\\u20acb'}) or 0)"
    )
    found = run("-c", script, environment=environment)
    assert found.returncode == 0, found.stderr
    shown, document = found.stdout.decode("ascii").splitlines()
    assert shown == "a?b"
    assert json.loads(document) == {"text": "a€b"}


def test_a_utf_8_terminal_shows_everything() -> None:
    script = ECHO + "run(Parser('p', ''), lambda args: print_json({'text': 'a\\u20acb'}) or 0)"
    found = run("-c", script, environment={"PYTHONUTF8": "1"})
    assert found.stdout.decode() == '{"text": "a€b"}\n'


@pytest.mark.parametrize(
    "environment",
    [ASCII, *(pytest.param(one, marks=pytest.mark.slow) for one in (LATIN, {}))],
    ids=["ascii", "latin-1", "default"],
)
def test_files_are_utf_8_whatever_the_locale(
    small: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """Prompt, requests and template, each with a byte-order mark: the same ids as without."""
    common = ("-m", "qwen35.generate", "--model", small, "--max-new-tokens", 3, "--ignore-eos")
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes("\ufeffé€".encode())
    for source, stdin in ((prompt, b""), ("-", prompt.read_bytes())):
        found = run(
            *common, "--prompt-file", source, "--json", environment=environment, stdin=stdin
        )
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["prompt_tokens"] == 5
    requests = tmp_path / "requests.jsonl"
    lines = [{"prompt": "é\u2028€", "id": "€\u2028"},
             {"messages": [{"role": "user", "content": "€"}], "temperature": 0}]  # fmt: skip
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    requests.write_bytes(f"\ufeff{text}\n".encode())
    found = run(*common, "--requests", requests, environment=environment)
    assert found.returncode == 0, found.stderr
    first, second = map(json.loads, found.stdout.decode("utf-8", "strict").strip().split("\n"))
    assert (first["id"], first["prompt_tokens"], second["prompt_tokens"]) == ("€\u2028", 8, 5)


def test_a_file_in_another_encoding_is_named(small: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("é".encode("latin-1"))
    found = run(
        "-m", "qwen35.generate", "--model", small, "--prompt-file", tmp_path / "prompt.txt",
        environment={},
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.decode().count("\n") == 1
    assert "prompt.txt: not readable as UTF-8 text" in found.stderr.decode()


def test_a_request_that_cannot_be_echoed_stops_before_the_first_one(small: Path) -> None:
    """Its id is half a surrogate pair: nothing is computed and nothing printed."""
    stdin = b'{"prompt": "a"}\n{"prompt": "b", "id": "\\ud83d"}\n'
    found = run(
        "-m", "qwen35.generate", "--model", small, "--requests", "-", environment={}, stdin=stdin
    )
    assert found.returncode == 2
    assert found.stdout == b""
    assert b"line 2: id cannot be printed" in found.stderr


def test_a_line_shows_no_control_characters() -> None:
    """A file's name may hold what clears a terminal."""
    assert one_line("a\x1b[2J\n  b\u2028c\u202ed") == "a\\x1b[2J b c\\u202ed"
