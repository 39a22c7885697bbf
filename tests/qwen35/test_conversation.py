"""`--chat`: the system message, and Ctrl-C in a real terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from qwen35.cache import Cache
from qwen35.completion import Completer, Settings
from qwen35.conversation import Stopped, converse, first_interrupt_stops
from qwen35.defaults import Defaults
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.load import load
from qwen35.messages import Message
from qwen35.parallel.ranks import Ranks
from qwen35.tokenizer import Prompt, Tokenizer
from tests.support.checkpoints import write_endless

ROOT = Path(__file__).parents[2]
CTRL_C = b"\x03"
PATIENCE = 240  # seconds, on a busy machine
MESSAGE = "a message of more than one block of the prefix cache, which has 64 tokens"


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says A for ever, with room for a long text."""
    return write_endless(tmp_path_factory.mktemp("endless"))


class Terminal:
    """`python -m qwen35.generate` in a terminal of its own, where a key may be pressed."""

    def __init__(self, *args: object) -> None:
        self.master, terminal = pty.openpty()

        def take_terminal() -> None:
            os.login_tty(terminal)
            # A shell that runs something in the background lets it, and all it starts, ignore SIGINT.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        command = [sys.executable, "-m", "qwen35.generate", *map(str, args)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, preexec_fn=take_terminal
        )
        os.close(terminal)
        self.shown = ""

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern is shown; returns what was shown up to its end, and forgets it."""
        until = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < until, (pattern, self.shown)
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.shown += os.read(self.master, 65536).decode()
                except OSError:  # the other side is closed
                    pytest.fail(f"{pattern} was not shown: {self.shown}")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def close(self) -> int:
        """Wait for the process, and return its status. Its output is read, since otherwise it could
        not end."""
        until = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < until:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.master, 65536).decode()
                except OSError:
                    break
        return self.process.wait(timeout=10)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*args: object) -> Terminal:
        started.append(Terminal(*args))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.master)


def test_an_interrupt_ends_the_answer_and_not_the_conversation(
    terminal: Callable[..., Terminal], endless: Path
) -> None:
    """The text that was printed stays and is in the next prompt, whose beginning the prefix cache
    has. At the prompt, Ctrl-C ends the program."""
    running = terminal("--model", endless, "--chat", "--no-thinking", "--temperature", 0)
    running.wait_for("> ")
    running.press(f"{MESSAGE}\n".encode())
    running.wait_for("A{20}")
    running.press(CTRL_C)
    figures = running.wait_for(r"(\d+) prompt tokens \(0 cached\).* (\d+) tokens at")
    stopped = running.wait_for(r"Ctrl-C after (\d+) tokens: the answer so far is part[^\n]*\n.*> ")
    running.press(b"go on\n")
    running.wait_for("A{20}")
    running.press(CTRL_C)
    second = running.wait_for(r"(\d+) prompt tokens \((\d+) cached\)")
    running.wait_for("Ctrl-C here ends it\r\n> ")
    running.press(CTRL_C)
    assert running.close() == 130
    assert "Traceback" not in running.shown
    prompt, said = map(int, re.search(r"(\d+) prompt tokens.* (\d+) tokens at", figures).groups())  # type: ignore
    assert f"after {said} tokens" in stopped
    longer, cached = map(int, re.search(r"(\d+) prompt tokens \((\d+)", second).groups())  # type: ignore
    assert longer > prompt + said
    assert cached == prompt // 64 * 64 > 0


def test_two_interrupts_in_a_row_end_the_program(
    terminal: Callable[..., Terminal], endless: Path
) -> None:
    """The second one comes in the same pass, or at the prompt."""
    running = terminal("--model", endless, "--chat", "--no-thinking", MESSAGE)
    running.wait_for("A{20}")
    running.press(CTRL_C)
    time.sleep(0.05)
    running.press(CTRL_C)
    assert running.close() == 130
    assert "Traceback" not in running.shown


# --- in this process ------------------------------------------------------------------------------


@pytest.fixture
def default_handler() -> Iterator[None]:
    """Python's own, whatever this process was started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    with first_interrupt_stops() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped):
            check()
        with pytest.raises(KeyboardInterrupt) as at_once:
            signal.raise_signal(signal.SIGINT)
        assert at_once.type is KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("default_handler")
def test_a_process_that_ignores_interrupts_goes_on_doing_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with first_interrupt_stops() as check:
        signal.raise_signal(signal.SIGINT)
        check()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


class Recording(Completer):
    """Keeps the conversations that it is asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: list[list[Message]] = []

    def prompt(self, given: list[Message], settings: Settings, *, tools: Any = None) -> Prompt:
        self.asked.append(list(given))
        return super().prompt(given, settings, tools=tools)


@pytest.mark.usefixtures("default_handler")
@pytest.mark.parametrize(
    ("thinking", "decoded", "content", "line"),
    [
        (False, 2, "AAA", "Ctrl-C after 3 tokens: the answer so far is part of the conversation"),
        (False, 0, "", "no answer: Ctrl-C came before it; the message is part of the conversation"),
        (True, 2, "", "no answer: Ctrl-C after 3 tokens cut the thought, which is not part of the"),
    ],
    ids=["answer", "prefill", "thought"],
)  # fmt: skip
def test_what_of_a_stopped_answer_is_kept(
    endless: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    thinking: bool,
    decoded: int,
    content: str,
    line: str,
) -> None:
    """The message in any case, and what was printed of the answer; a thought is not. decoded: the pass
    after the prefill in which Ctrl-C is pressed."""
    tokenizer, model = Tokenizer(endless), load(endless)
    completer = Recording(model, tokenizer, Defaults.of_folder(endless, model.config, tokenizer))
    widths: list[int] = []
    presses: list[int] = []
    forward = model.forward

    def pressed(ids: Tensor, cache: Cache) -> Tensor:
        widths.append(ids.shape[1])
        if widths.count(1) == decoded and not presses:
            presses.append(len(widths))
            signal.raise_signal(signal.SIGINT)
        return forward(ids, cache)

    monkeypatch.setattr(model, "forward", pressed)
    monkeypatch.setattr(sys, "stdin", StringIO("again\n"))
    settings = Settings(max_new_tokens=5, draft_tokens=0, thinking=thinking)
    converse(completer, settings, [{"role": "system", "content": "Be A."}], "Hi")
    first, second = completer.asked
    assert [(m["role"], m["content"]) for m in first] == [("system", "Be A."), ("user", "Hi")]
    answer, again = second[2:]
    assert second[:2] == first
    assert (answer["role"], answer["content"]) == ("assistant", content)
    assert again == {"role": "user", "content": "again"}
    out, err = capsys.readouterr()
    assert line in err
    assert out.splitlines()[-1] == "AAAAA"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"max_new_tokens": 3}, "no answer: the limit of 3 tokens cut the thought"),
        ({"stop": ["AAA"]}, "no answer: the text ended inside the thought"),
    ],
    ids=["limit", "end"],
)
def test_why_a_thought_is_no_answer(
    endless: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    line: str,
) -> None:
    """A limit is named only where it cut something."""
    tokenizer, model = Tokenizer(endless), load(endless)
    completer = Completer(model, tokenizer, Defaults.of_folder(endless, model.config, tokenizer))
    monkeypatch.setattr(sys, "stdin", StringIO("\n"))
    converse(completer, Settings(thinking=True, draft_tokens=0, **settings), [], "Hi")
    err = capsys.readouterr().err
    assert line in err and err.count("no answer") == 1


@pytest.mark.usefixtures("default_handler")
def test_over_several_ranks_an_interrupt_ends_the_program(
    endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends at once. Ranks that finished their pass first would not all stop in the same one."""
    tokenizer, model = Tokenizer(endless), load(endless)
    completer = Completer(model, tokenizer, Defaults.of_folder(endless, model.config, tokenizer))
    forward = model.forward

    def pressed(ids: Tensor, cache: Cache) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return forward(ids, cache)

    monkeypatch.setattr(model, "forward", pressed)
    settings = Settings(max_new_tokens=5, draft_tokens=0)
    with pytest.raises(KeyboardInterrupt) as at_once:
        converse(completer, settings, [], "Hi", Ranks(0, 2))
    assert at_once.type is KeyboardInterrupt


def test_a_system_message(
    endless: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes first in the prompt, also of one turn; without --chat it is refused in one line."""
    common = ["Hi", "--model", str(endless), "--max-new-tokens", "1", "--no-thinking", "--json"]
    counts: list[int] = []
    for options in ([], ["--system", "Be A."]):
        assert main(build_parser().parse_args([*common, "--chat", *options])) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    said = [{"role": "system", "content": "Be A."}, {"role": "user", "content": "Hi"}]
    tokenizer = Tokenizer(endless)
    expected = [len(tokenizer.chat(talk, thinking=False).ids) for talk in (said[1:], said)]
    assert counts == expected
    assert expected[0] < expected[1]
    for given in (["Hi"], ["--requests", "-"]):
        with pytest.raises(InputError, match="--system: only --chat has it"):
            main(build_parser().parse_args([*given, "--system", "Be A."]))
