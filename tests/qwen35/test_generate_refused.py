"""`python -m qwen35.generate`: one line for every kind of bad input, before slow work begins."""

import os
import sys
from pathlib import Path

import pytest

from qwen35.cli import parse_ids
from qwen35.errors import InputError
from qwen35.generation import Generation
from qwen35.load import load
from qwen35.sampling import Sampling
from tests.support.checkpoints import TEXT_VOCAB, edit_json, edit_tensors, write
from tests.support.generating import Cli, assert_bad, cli, small  # noqa: F401

BAD_ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "empty prompt": ([""], ["prompt", "empty"]),
    "no prompt": ([], ["no prompt", "--prompt-ids"]),
    "two prompts": (["a", "--prompt-ids", "1"], ["PROMPT", "--prompt-ids"]),
    "two files": (["--prompt-file", "x", "--prompt-ids", "1"], ["--prompt-file", "--prompt-ids"]),
    "chat and json": (["--chat", "--json"], ["--chat", "--json"]),
    "chat and ids": (["--chat", "--prompt-ids", "1"], ["--chat", "--prompt-ids"]),
    "ids that are words": (["--prompt-ids", "one,2"], ["one,2", "1,2,3"]),
    "ids that are none": (["--prompt-ids", ""], ["''", "1,2,3"]),
    "ids with a hole": (["--prompt-ids", "1,,3"], ["1,,3", "1,2,3"]),
    "id too large": (["--prompt-ids", "1,320"], ["320", "0..319"]),
    "id far too large": (["--prompt-ids", str(2**70)], [str(2**70), "0..319"]),
    "id negative": (["--prompt-ids=-1,2"], ["-1", "0..319"]),
    "prompt too long": (["x" * 100], ["prompt", "100", "context"]),
    "prompt far too long": (["x" * 5000], ["prompt", "5000", "context", "100"]),
    "no such file": (["--prompt-file", "absent.txt"], ["absent.txt"]),
    "a folder": (["--prompt-file", "."], ["."]),
    "no new tokens": (["a", "--max-new-tokens", "0"], ["max_new_tokens", "0", "1"]),
    "new tokens in words": (["a", "--max-new-tokens", "few"], ["--max-new-tokens", "few"]),
    "dtype": (["a", "--dtype", "float8"], ["--dtype", "float8", "bfloat16"]),
    "device": (["a", "--device", "abacus"], ["device", "abacus"]),
    "device number": (["a", "--device", "cuda:99"], ["device", "cuda:99"]),
    "device without arithmetic": (["a", "--device", "meta"], ["device", "meta"]),
    "chunk off the grid": (["a", "--prefill-chunk", "100"], ["prefill_chunk", "100", "64"]),
    "chunk of none": (["a", "--prefill-chunk", "0"], ["prefill_chunk", "0", "64"]),
    "chunk negative": (["a", "--prefill-chunk", "-64"], ["prefill_chunk", "-64", "64"]),
    "drafts negative": (["a", "--draft-tokens", "-1"], ["draft_tokens", "-1"]),
    "more drafts than memory": (
        ["a", "--draft-tokens", str(10**12)],
        ["draft_tokens", 10**12, "at most"],
    ),
    "temperature": (["a", "--temperature", "-1"], ["temperature", "-1"]),
    "temperature not a number": (["a", "--temperature", "nan"], ["temperature", "nan"]),
    "top-p": (["a", "--top-p", "1.5"], ["top_p", "1.5"]),
    "top-k": (["a", "--top-k", "-2"], ["top_k", "-2"]),
    "seed": (["a", "--seed", "-1"], ["seed", "-1"]),
    "unknown option": (["a", "--nonsense"], ["--nonsense"]),
    "shortened option": (["a", "--max-new", "3"], ["--max-new"]),
    "bytes that are no text": (["a\udcff"], ["UTF-8"]),
}


@pytest.mark.parametrize(("args", "words"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments(
    cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: list[str]
) -> None:
    """One line that names the thing and both values."""
    monkeypatch.chdir(small.parent)
    assert_bad(cli(*args, "--model", small), *words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["a", "--temperature", "-1"], ["temperature = -1.0"]),
        (["a", "--top-p", "0.5"], ["--top-p has no effect", "temperature is 0"]),
        (["a", "--seed", "3"], ["--seed has no effect", "temperature is 0"]),
        (["a", "--draft-tokens", "101"], ["draft_tokens = 101", "100"]),
        (["a", "--logprobs", "999"], ["logprobs = 999"]),
        (["a", "--prefix-cache-bytes", "1G"], ["--prefix-cache-bytes", "--prefix-cache DIR"]),
        (["a", "--prefix-cache", ""], ["--prefix-cache", "''"]),
        (["a", "--prefix-cache", "file"], ["--prefix-cache", "'file' is a file"]),
        (["--prompt-file", ""], ["--prompt-file", "''"]),
        (["--requests", ""], ["--requests", "''"]),
        (["--requests", "absent"], ["absent: no such file"]),
        (["--requests", "."], [".: is a folder"]),
        (["--requests", "file"], ["file, line 1: not JSON"]),
        (["--chat", "--temperature", "nan"], ["temperature = nan"]),
        (["a", "--min-p", "0.1"], ["--min-p has no effect"]),
    ],
)
def test_it_is_said_before_the_weights_are_read(
    cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str],
    words: list[str],
) -> None:  # fmt: skip
    """Which takes minutes for a large checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no request")
    monkeypatch.setattr(
        sys.modules["qwen35.generate"], "load", lambda *_, **__: pytest.fail("weights were read")
    )
    assert_bad(cli(*args, "--model", small), *words)


def test_bytes_on_standard_input_that_are_no_text(cli: Cli, small: Path) -> None:
    """They may be a prompt or a conversation."""
    assert_bad(cli("--prompt-file", "-", "--model", small, stdin=b"\xff\xfe"), "-", "utf-8")
    status, _, err = cli("--chat", "--model", small, stdin=b"\xff\xfe\n")
    assert status == 2
    assert "utf-8" in err.lower()


def test_a_prompt_file_that_is_no_text(cli: Cli, small: Path, tmp_path: Path) -> None:
    """The file is named."""
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    assert_bad(cli("--prompt-file", tmp_path / "image.png", "--model", small), "image.png", "utf-8")


def test_bad_models(cli: Cli, tmp_path: Path) -> None:
    """The loader's lines reach the user as they are."""
    assert_bad(cli("a", "--model", tmp_path / "absent"), tmp_path / "absent", "no such folder")
    assert_bad(cli("a", "--model", tmp_path), tmp_path / "config.json", "no such file")
    write(tmp_path, "0.8B", tokenizer=True)
    os.truncate(tmp_path / "model.safetensors", 5000)
    assert_bad(cli("a", "--model", tmp_path), tmp_path / "model.safetensors")
    write(tmp_path, "0.8B", tokenizer=True)
    edit_tensors(tmp_path, lambda t: t.pop("mtp.fc.weight"))
    assert_bad(cli("a", "--model", tmp_path), tmp_path, "missing", "mtp.fc.weight")


def test_a_checkpoint_whose_template_fails(cli: Cli, tmp_path: Path) -> None:
    """A message of several lines becomes one."""
    write(tmp_path, "0.8B", tokenizer=True)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no\\nsuch\\nrole') }}")
    assert_bad(cli("Hi", "--chat", "--model", tmp_path), tmp_path, "no such role")
    (tmp_path / "chat_template.jinja").unlink()
    assert_bad(cli("Hi", "--chat", "--model", tmp_path), tmp_path, "no chat template")


@pytest.mark.parametrize(
    "content", ["{", "[]", '"x"', '{"eos_token_id": "end"}', '{"eos_token_id": [1, "end"]}']
)
def test_a_bad_generation_config(cli: Cli, tmp_path: Path, content: str) -> None:
    """The file is named; an id that is no number would never stop anything."""
    write(tmp_path, "0.8B", tokenizer=True)
    (tmp_path / "generation_config.json").write_text(content)
    assert_bad(cli("a", "--model", tmp_path, "--max-new-tokens", 1), "generation_config.json")


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
def test_bad_advice(cli: Cli, tmp_path: Path, name: str) -> None:
    """Words where a number belongs, in a file that a stranger wrote."""
    write(tmp_path, "0.8B", tokenizer=True)
    edit_json(tmp_path / "generation_config.json", do_sample=True, **{name: "hot"})
    assert_bad(cli("a", "--model", tmp_path, "--chat", "--max-new-tokens", 1), name, "hot")


@pytest.mark.parametrize("text", ["1,2,3", " 1, 2 ,3 "])
def test_ids_may_have_spaces(text: str) -> None:
    """People write lists with spaces."""
    assert parse_ids(text) == [1, 2, 3]


def test_a_generation_checks_itself(small: Path) -> None:
    """The same lines from Python, before anything is computed."""
    model = load(small)
    for changes, word in (
        ({"prompt": []}, "empty"),
        ({"prompt": [TEXT_VOCAB]}, str(TEXT_VOCAB)),
        ({"prompt": [1] * 100}, "100"),
        ({"max_new_tokens": -3}, "-3"),
        ({"prefill_chunk": 65}, "65"),
        ({"draft_tokens": -1}, "-1"),
    ):
        given = {
            "model": model, "prompt": [1], "max_new_tokens": 1, "sampling": Sampling(),
            "stop": frozenset(), "draft_tokens": 0,
        }  # fmt: skip
        with pytest.raises(InputError, match=word):
            Generation(**(given | changes))  # type: ignore[arg-type]
