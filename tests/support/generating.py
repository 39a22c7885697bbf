"""Runs of `python -m qwen35.generate` in the test's own process, and two small checkpoints for them."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from qwen35.cli import run
from qwen35.generate import build_parser, main
from tests.support.checkpoints import (
    QWEN3_5,
    write,
)

FIGURES = re.compile(
    r"(\d+) prompt tokens? \(\d+ cached\), first token after [\d.]+ s, "
    r"(\d+) tokens?(?: at [\d.]+ tokens/s)?"
)
KEYS = {
    "text", "token_ids", "prompt_tokens", "cached_tokens", "finish_reason", "path", "swaps",
    "kv_cache_dtype", "threads", "draft", "timing",
}  # fmt: skip
DRAFT_KEYS = {"proposed", "accepted", "tokens_per_forward"}
TIMING_KEYS = {"load_s", "prepare_s", "ttft_s", "decode_s", "tokens_per_s"}

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, a drafting head, and a context of 100 tokens."""
    folder = tmp_path_factory.mktemp("small")
    write(folder, "0.8B", tokenizer=True, max_position_embeddings=100)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with neither a tokenizer nor a drafting head."""
    folder = tmp_path_factory.mktemp("bare")
    write(folder, "0.8B", replace(QWEN3_5, mtp=False))
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process: arguments and standard input -> status, stdout, stderr."""

    def call(*args: object, stdin: str | bytes = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, args)])
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(raw), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(build_parser(), main)
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def document(cli: Cli, *args: object, stdin: str = "") -> dict:
    """The document of a run with --json that is expected to work."""
    status, out, err = cli(*args, "--json", stdin=stdin)
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def assert_bad(result: tuple[int, str, str], *words: object) -> None:
    """Status 2, one line on stderr that holds the words, nothing on stdout."""
    status, out, err = result
    assert status == 2, (out, err)
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("python -m qwen35.generate: ")
    assert not [word for word in words if str(word) not in err], err
