"""Run a command line in the test's own process."""

from collections.abc import Callable

import pytest

from qwen35.cli import Parser, run

Cli = Callable[..., tuple[int, str, str]]


def outcome(
    build_parser: Callable[[], Parser],
    main: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    *arguments: object,
) -> tuple[int, str, str]:
    """Run the command with arguments. Returns exit status, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, [*map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def in_process(
    build_parser: Callable[[], Parser], main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> Cli:
    """A function that runs the command with arguments, as `outcome` does."""
    return lambda *arguments: outcome(build_parser, main, capsys, *arguments)
