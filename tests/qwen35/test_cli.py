"""What every command line shares: exit statuses that mean one thing each, and devices."""

import argparse

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
    """As a shell takes it."""

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
