"""`python -m qwen35.generate`: what it prints where, and how it ends when it is interrupted.

Most runs are in this process; a few are real ones, for signals, pipes and tracebacks.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch

from qwen35.cli import run
from qwen35.generate import build_parser, main
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from tests.support.checkpoints import TEXT_VOCAB, always, edit_json, write, write_endless
from tests.support.generating import (  # noqa: F401
    DRAFT_KEYS,
    FIGURES,
    KEYS,
    TIMING_KEYS,
    Cli,
    assert_bad,
    bare,
    cli,
    document,
    small,
)

ROOT = Path(__file__).parents[2]


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
