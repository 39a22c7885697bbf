"""`python -m qwen35.generate`: what it prints where, and one line for every kind of bad input.

Most runs are in this process; a few are real ones, for signals, pipes and tracebacks.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest
import torch

from qwen35.cli import parse_ids, run
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from tests.support.checkpoints import (
    QWEN3_5,
    TEXT_VOCAB,
    always,
    edit_json,
    edit_tensors,
    write,
    write_endless,
)

ROOT = Path(__file__).parents[2]
FIGURES = re.compile(
    r"(\d+) prompt tokens? \(\d+ cached\), first token after [\d.]+ s, "
    r"(\d+) tokens? at [\d.]+ tokens/s"
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


# --- what works -----------------------------------------------------------------------------------


def test_text_on_stdout_and_figures_on_stderr(cli: Cli, small: Path) -> None:
    """The stream can be piped on; the figures stay on the screen."""
    status, out, err = cli("Hi there", "--model", small, "--max-new-tokens", 9, "--ignore-eos")
    assert status == 0
    assert out.endswith("\n")
    figures = FIGURES.fullmatch(err.strip().rpartition(", ")[0])
    assert figures, err
    assert figures.groups() == ("8", "9")
    assert "tokens/forward" in err
    again = document(cli, "Hi there", "--model", small, "--max-new-tokens", 9, "--ignore-eos")
    assert out == again["text"] + "\n"


def test_the_json_document(cli: Cli, small: Path) -> None:
    """Exactly the keys that scripts rely on, with numbers that fit together."""
    found = document(cli, "Hi there", "--model", small, "--max-new-tokens", 7, "--ignore-eos")
    assert found.keys() == KEYS
    assert found["draft"].keys() == DRAFT_KEYS
    assert found["timing"].keys() == TIMING_KEYS
    assert found["prompt_tokens"] == 8
    assert found["cached_tokens"] == 0
    assert found["path"] == "reference" and found["swaps"] == []
    assert found["finish_reason"] == "length"
    assert len(found["token_ids"]) == 7
    assert len(found["draft"]["proposed"]) == len(found["draft"]["accepted"]) == 3
    assert all(isinstance(x, int | float) and x >= 0 for x in found["timing"].values())
    assert found["text"] == Tokenizer(small).decode(found["token_ids"]) or "\ufffd" in found["text"]


def test_the_embedded_model_is_the_default(cli: Cli) -> None:
    """No --model: the checkpoint of the repository, in its own dtype, with drafting."""
    found = document(cli, "Once upon a time", "--max-new-tokens", 12)
    assert found["text"] == Tokenizer(TINY).decode(found["token_ids"])
    assert len(found["draft"]["proposed"]) == 3


def test_a_prompt_comes_in_four_ways(cli: Cli, small: Path, tmp_path: Path) -> None:
    """Argument, file, standard input and ids give the same tokens."""
    text = "Grüße,\nWelt"
    (tmp_path / "prompt.txt").write_text(text)
    ids = ",".join(map(str, Tokenizer(small).encode(text)))
    common = ("--model", small, "--max-new-tokens", 5, "--ignore-eos")
    found = [
        document(cli, text, *common),
        document(cli, "--prompt-file", tmp_path / "prompt.txt", *common),
        document(cli, "--prompt-file", "-", *common, stdin=text),
        document(cli, "--prompt-ids", ids, *common),
    ]
    assert len({str(f["token_ids"]) for f in found}) == 1
    assert {f["prompt_tokens"] for f in found} == {13}


def test_options_reach_the_generation(cli: Cli, small: Path) -> None:
    """Sampling options, dtype, chunk and depth, against a direct call."""
    found = document(
        cli, "abc", "--model", small, "--max-new-tokens", 6, "--ignore-eos", "--temperature", 0.9,
        "--top-k", 12, "--top-p", 0.9, "--seed", 7, "--dtype", "float32", "--draft-tokens", 2,
        "--prefill-chunk", 64,
    )  # fmt: skip
    tokenizer = Tokenizer(small)
    sampling = Sampling(temperature=0.9, top_k=12, top_p=0.9, seed=7, vocab=tokenizer.size)
    model = load(small, dtype=torch.float32)
    direct = Generation(model, tokenizer.encode("abc"), 6, sampling, frozenset(), 0)
    assert found["token_ids"] == [token for token, _ in direct]
    assert len(found["draft"]["proposed"]) == 2


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_draft_tokens_change_no_token(cli: Cli, small: Path, depth: int) -> None:
    """They change none on the command line, either."""
    common = ("abc", "--model", small, "--max-new-tokens", 10, "--ignore-eos", "--temperature", 1)
    found = document(cli, *common, "--draft-tokens", depth)
    assert found["token_ids"] == document(cli, *common)["token_ids"]
    assert len(found["draft"]["proposed"]) == depth


def test_stop_ids_and_ignore_eos(cli: Cli, tmp_path: Path) -> None:
    """Ids that either config names end the text; --ignore-eos goes on."""
    write(tmp_path, "0.8B", tokenizer=True, eos_token_id=66)
    always(tmp_path, 65)
    common = ("abc", "--model", tmp_path, "--max-new-tokens", 6)
    assert document(cli, *common)["finish_reason"] == "length"  # both name other ids
    edit_json(tmp_path / "generation_config.json", eos_token_id=[3, 65])
    stopped = document(cli, *common)
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == [65]
    ignored = document(cli, *common, "--ignore-eos")
    assert ignored["finish_reason"] == "length"
    assert ignored["token_ids"] == [65] * 6
    edit_json(tmp_path / "generation_config.json", eos_token_id=65)
    assert document(cli, *common)["finish_reason"] == "stop"
    (tmp_path / "generation_config.json").unlink()
    assert document(cli, *common)["finish_reason"] == "length"
    edit_json(tmp_path / "config.json", eos_token_id=65)
    assert document(cli, *common)["finish_reason"] == "stop"


def test_padding_is_never_generated(cli: Cli, tmp_path: Path) -> None:
    """Rows of the head without text are masked, however large their logits are."""
    write(tmp_path, "0.8B", tokenizer=True)
    always(tmp_path, TEXT_VOCAB - 1)
    found = document(cli, "abc", "--model", tmp_path, "--max-new-tokens", 4, "--ignore-eos")
    assert max(found["token_ids"]) < Tokenizer(tmp_path).size


def test_the_context_ends_a_text(cli: Cli, small: Path) -> None:
    """However many tokens were asked for."""
    found = document(cli, "x" * 90, "--model", small, "--max-new-tokens", 50, "--ignore-eos")
    assert len(found["token_ids"]) == 10
    assert found["finish_reason"] == "length"


def test_a_conversation_of_two_turns(cli: Cli, small: Path) -> None:
    """Turns from standard input until an empty line; the second prompt holds the first answer."""
    edit = ("--model", small, "--max-new-tokens", 4, "--chat", "--temperature", 0)
    status, out, err = cli(*edit, stdin="Hi\nYo\n\nnot read\n")
    assert status == 0, err
    figures = FIGURES.findall(err)
    assert len(figures) == 2
    assert err.count("> ") == 3
    tokenizer = Tokenizer(small)
    first = tokenizer.chat([{"role": "user", "content": "Hi"}]).ids
    assert int(figures[0][0]) == len(first)
    assert int(figures[1][0]) > len(first)
    assert out.count("\n") >= 2
    assert "> " not in out


def test_a_conversation_without_thinking(cli: Cli, small: Path) -> None:
    """--no-thinking makes another prompt; the first message may be an argument."""
    tokenizer = Tokenizer(small)
    common = ("Hi", "--model", small, "--max-new-tokens", 1, "--chat")
    for options, thinking in (((), None), (("--thinking",), True), (("--no-thinking",), False)):
        status, _, err = cli(*common, *options)
        assert status == 0
        prompt = tokenizer.chat([{"role": "user", "content": "Hi"}], thinking=thinking).text
        assert int(FIGURES.findall(err)[0][0]) == len(tokenizer.encode(prompt))


def test_a_conversation_that_ends_at_once(cli: Cli, small: Path) -> None:
    """No input at all is a conversation of no turns."""
    status, out, _ = cli("--model", small, "--chat")
    assert (status, out) == (0, "")


def test_a_conversation_samples_as_the_checkpoint_advises(cli: Cli, small: Path) -> None:
    """The advice of generation_config holds for a conversation, greedy for a base prompt."""
    edit_json(small / "generation_config.json", do_sample=True, temperature=1.5, top_k=None)
    common = ("Hi", "--model", small, "--max-new-tokens", 12, "--ignore-eos")
    try:
        texts = {seed: cli(*common, "--chat", "--seed", seed)[1] for seed in (1, 2)}
        base = {seed: cli(*common, "--seed", seed)[1] for seed in (1, 2)}
        greedy = {
            seed: cli(*common, "--chat", "--temperature", 0, "--seed", seed)[1] for seed in (1, 2)
        }
    finally:
        edit_json(small / "generation_config.json", do_sample=None, temperature=None)
    assert texts[1] != texts[2]
    assert base[1] == base[2]
    assert greedy[1] == greedy[2]


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
def test_advice_may_be_null(cli: Cli, small: Path, tmp_path: Path, name: str) -> None:
    """transformers writes null for a value that is not set: it counts as not there."""
    for file in small.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, name: None}))
    status, _, err = cli("Hi", "--model", tmp_path, "--chat", "--max-new-tokens", 2)
    assert status == 0, err


def test_without_a_tokenizer_ids_still_work(cli: Cli, bare: Path) -> None:
    """Ids in, ids out; text is refused with the reason."""
    status, out, err = cli("--prompt-ids", "1,2,3", "--model", bare, "--max-new-tokens", 4)
    assert status == 0, err
    assert len(out.split()) == 4
    assert all(part.isdigit() for part in out.split())
    reason = (bare / "tokenizer.json", "no such file", "--prompt-ids")
    assert_bad(cli("text", "--model", bare, "--draft-tokens", 0), *reason)
    assert_bad(cli("--chat", "--model", bare, "--draft-tokens", 0), *reason)


def test_without_a_drafting_head(cli: Cli, bare: Path) -> None:
    """Drafting is off, and said to be; asking for it is an error."""
    status, _, err = cli("--prompt-ids", "1,2", "--model", bare, "--max-new-tokens", 2)
    assert status == 0
    assert re.search(r"no MTP head.*drafting is off", err)
    status, _, err = cli(
        "--prompt-ids", "1,2", "--model", bare, "--max-new-tokens", 2, "--draft-tokens", 0
    )
    assert status == 0
    assert "MTP" not in err
    assert_bad(
        cli("--prompt-ids", "1,2", "--model", bare, "--draft-tokens", 3), "draft_tokens", 3, "MTP"
    )


# --- bad input ------------------------------------------------------------------------------------

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
        ["a", "--draft-tokens", "9" * 30],
        ["draft_tokens", "9" * 30, "at most"],
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


# --- interruptions --------------------------------------------------------------------------------


class Interrupting(StringIO):
    """A standard output on which Ctrl-C is pressed after some pieces of text."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = after, error

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return super().write(text)


def test_an_interrupt_keeps_what_was_printed(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle: the text so far, its figures, status 130."""
    argv = ["generate", "a", "--model", str(small), "--ignore-eos", "--max-new-tokens", "50"]
    monkeypatch.setattr(sys, "argv", argv)
    out = Interrupting(20, KeyboardInterrupt())
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as left:
        run(build_parser(), main)
    assert left.value.code == 130
    assert out.getvalue().endswith("\n")
    assert len(out.getvalue()) > 1
    assert FIGURES.search(capsys.readouterr().err)


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `python -m qwen35.generate` and sees to its end.

    A shell that runs something in the background lets it, and all that it starts, ignore SIGINT.
    """
    started: list[subprocess.Popen] = []

    def start(*args: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "qwen35.generate", *map(str, args)]
        started.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says A for ever, with room for a long text."""
    return write_endless(tmp_path_factory.mktemp("endless"))


def test_the_real_command(process: Callable[..., subprocess.Popen], small: Path) -> None:
    """Text on stdout, figures on stderr, status 0."""
    running = process("Hi", "--model", small, "--max-new-tokens", 5, "--ignore-eos")
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0
    assert out.endswith(b"\n")
    assert FIGURES.search(err.decode())
    assert b"Traceback" not in err


def test_bad_input_of_the_real_command(
    process: Callable[..., subprocess.Popen], small: Path
) -> None:
    """One line and status 2; --debug shows where it comes from."""
    plain = process("--prompt-ids", "999", "--model", small)
    debug = process("--prompt-ids", "999", "--model", small, "--debug")
    out, err = (text.decode() for text in plain.communicate(timeout=60))
    assert_bad((plain.returncode, out, err), "999", "0..319")
    out, err = (text.decode() for text in debug.communicate(timeout=60))
    assert debug.returncode != 0
    assert out == ""
    assert "Traceback" in err
    assert "999" in err


def test_a_signal_ends_the_real_command(
    process: Callable[..., subprocess.Popen], endless: Path
) -> None:
    """SIGINT during the stream: 130, no traceback, the text so far is there with its figures."""
    running = process("Hi", "--model", endless, "--max-new-tokens", 100_000)
    assert running.stdout is not None
    seen = running.stdout.read(5)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert b"Traceback" not in err
    assert FIGURES.search(err.decode())
    assert re.fullmatch(rb"A+\n", seen + out)


def test_a_reader_that_goes_away(process: Callable[..., subprocess.Popen], endless: Path) -> None:
    """`| head` is one. The command ends by itself, without a traceback."""
    running = process("Hi", "--model", endless, "--max-new-tokens", 100_000)
    assert running.stdout is not None
    assert running.stdout.read(3) == b"AAA"
    running.stdout.close()
    assert running.stderr is not None
    err = running.stderr.read()
    assert running.wait(timeout=60) == 0
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err
