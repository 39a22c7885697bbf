"""What all command lines share: exit statuses, each with one meaning, and devices."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen35 import cli
from qwen35.errors import InputError


def ended(error: Exception | None, *options: str, status: int = 0) -> int:
    """The exit status of a command that raises, or returns a status."""

    def main(args: argparse.Namespace) -> int:
        if error is not None:
            raise error
        return status

    with pytest.raises(SystemExit) as caught:
        cli.run(cli.Parser("python -m tools.x", "y"), main, list(options))
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("options", [(), ("--debug",)])
def test_a_crash_is_no_failed_check(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """1 is what main returns; an exception is 2, with its traceback."""
    assert ended(None, *options, status=1) == 1
    assert ended(RuntimeError("something else"), *options) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "RuntimeError: something else" in said


def test_bad_input_is_a_line_and_with_debug_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both 2."""
    assert ended(InputError("not this")) == 2
    assert capsys.readouterr().err == "python -m tools.x: not this\n"
    assert ended(InputError("not this"), "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_main_is_told_the_command() -> None:
    """`command_line` is quoted as a shell takes it."""

    def main(args: argparse.Namespace) -> int:
        assert args.command == "python -m tools.x 'a b' --debug"
        return 0

    parser = cli.Parser("python -m tools.x", "y")
    parser.add_argument("word")
    with pytest.raises(SystemExit) as caught:
        cli.run(parser, main, ["a b", "--debug"])
    assert caught.value.code == 0


def test_a_device_that_is_there() -> None:
    assert cli.device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "meta", "mps", "hpu", "privateuseone", ""])
def test_a_device_that_is_not(name: str) -> None:
    """Named in one short line with a reason, whatever page torch answers with."""
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is here")
    with pytest.raises(argparse.ArgumentTypeError, match=f"device '{name}'") as caught:
        cli.device(name)
    message = str(caught.value)
    assert len(message) < 120 and "\n" not in message
    assert not message.endswith(": ")


@pytest.mark.parametrize("module", ["qwen35.generate", "tools.diff"])
def test_ctrl_c_during_the_imports_prints_nothing(tmp_path: Path, module: str) -> None:
    """A module in torch's place interrupts the process, as somebody does who starts the wrong command."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
    )
    paths = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    done = subprocess.run(
        [sys.executable, "-m", module, "x"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
        # Else a job in the background, which ignores the signal, would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_python_has_its_handler_back_when_the_work_begins() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def main(args: argparse.Namespace) -> int:
        seen.append(signal.getsignal(signal.SIGINT))
        return 0

    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with pytest.raises(SystemExit):
            cli.run(cli.Parser("x", "y"), main, [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.default_int_handler]


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        ("qwen35.generate --prompt-file - <&-", 2, "", "the prompt is empty"),
        ("qwen35.generate --chat <&-", 0, "", ">"),
        ("qwen35.generate x --max-new-tokens 1 --break layers.0 <&-", 130, "(Pdb)", ""),
        ("tools.inspect tiny >&-", 0, "", ""),
        ("tools.diff tiny --layers 0 --random 4 --json >&-", 0, "", ""),
        ("qwen35.generate 'In the' --max-new-tokens 1 2>&-", 0, " ", ""),
        ("qwen35.generate --nothing <&- >&- 2>&-", 2, "", ""),
    ],
)
def test_a_closed_standard_stream_is_an_empty_one(
    words: str, status: int, out: str, err: str
) -> None:
    """cron and some supervisors start a process so; Python has None for the stream."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m {words}"], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert out in done.stdout and err in done.stderr and "Traceback" not in done.stderr
    assert bool(out) == bool(done.stdout)


def test_counts_have_their_plural() -> None:
    assert [cli.counted(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]


def test_the_package_by_itself_is_generate() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qwen35"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2 and "qwen35.generate: no prompt: give PROMPT" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "tools.inspect tiny",
        "tools.inspect tiny --json",
        "tools.inspect --help",
        "tools.diff --version",
    ],
)
def test_a_full_disk_behind_standard_output_is_named(words: str) -> None:
    """Whoever writes into a file by `>` looks for a name."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m {words} >/dev/full"], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    program = f"python -m {words.split()[0]}"
    assert done.stderr == f"{program}: standard output: No space left on device\n"
    assert done.returncode == 2


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_of_many_processes_with_the_same_arguments_one_gives_help(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            cli.Parser("x", "y").parse_args([option])
        assert ended.value.code == 0
        assert bool(capsys.readouterr().out) == (rank == "0")


@pytest.mark.parametrize("number", ["-1", "-0.5", "-.5", "-1e-3", "-1E308"])
def test_a_negative_number_is_no_option(number: str) -> None:
    parser = cli.Parser("x", "y")
    parser.add_argument("--penalty", type=float)
    assert parser.parse_args(["--penalty", number]).penalty == float(number)
