"""A line now and then where standard error is no terminal, a bar where it is one."""

import sys
import time

import pytest

from qwen35 import progress
from qwen35.progress import Progress, steps


def test_nothing_is_said_of_what_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(steps(range(5), "numbers")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_a_line_at_each_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines appear while one step takes longer than an interval, and none appears after the end."""
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with Progress("kernels", 121) as bar:
        bar.update(30)
        bar.note = "one is slow"
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert lines[-1] == "kernels: 30 of 121 after 00:00, about 00:01 left; one is slow"
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_the_thread_ends_with_an_error() -> None:
    bar = Progress("kernels")
    with pytest.raises(ValueError, match="broken"), bar:
        raise ValueError("broken")
    assert not bar._thread.is_alive()
    bar.close()


def test_a_total_that_comes_later_and_bytes() -> None:
    with Progress("converted", is_bytes=True) as bar:
        assert bar.line() == "converted: 0.00B after 00:00"
        bar.at(1_500_000, 3_000_000)
        assert bar.line() == "converted: 1.50MB of 3.00MB after 00:00, about 00:00 left"


def test_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in steps(iter("ab"), "letters", 2):
        pass
    err = capsys.readouterr().err
    assert "letters:   0%" in err and "\n" not in err
