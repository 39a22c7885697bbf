"""Lines on standard error beside a text that streams to standard output."""

import io
import sys

import pytest

from qwen35.completion import Completer, Settings
from qwen35.defaults import Defaults
from qwen35.load import TINY, load
from qwen35.terminal import say, show
from qwen35.tokenizer import Tokenizer


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_line_begins_at_the_left_edge(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so in the middle of a text, too. If standard output is a file, the text is not
    changed."""
    model, tokenizer = load("tiny"), Tokenizer(TINY)
    completer = Completer(model, tokenizer, Defaults.of_folder(TINY, model.config, tokenizer))
    settings = Settings(max_new_tokens=4)
    completion = completer.complete(completer.prompt("In the", settings), settings)
    out, err = Screen() if is_terminal else io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    calls = iter(range(100))
    # The first call is behind the prompt, when nothing is on the screen.
    show(completion, quiet=False, check=lambda: say("a line") if next(calls) in (0, 2, 3) else None)
    say("the end")
    assert err.getvalue().count("a line\n") == 3 and err.getvalue().endswith("the end\n")
    shown, text = out.getvalue(), f"{completion.text}\n"
    if is_terminal:
        assert shown.count("\n") == text.count("\n") + 2
        shown, text = shown.replace("\n", ""), text.replace("\n", "")
    assert shown == text


def test_the_first_token_alone_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt's pass gives it, so there is no decode time, and no pass that drafts could shorten."""
    model, tokenizer = load("tiny"), Tokenizer(TINY)
    completer = Completer(model, tokenizer, Defaults.of_folder(TINY, model.config, tokenizer))
    for count, rates in ((1, 0), (2, 2)):
        settings = Settings(max_new_tokens=count)
        completion = completer.complete(completer.prompt("In the", settings), settings)
        show(completion, quiet=False)
        line = capsys.readouterr().err
        assert line.count("tokens/s") + line.count("tokens/forward") == rates
        document = completion.document()
        found = document["timing"]["tokens_per_s"], document["draft"]["tokens_per_forward"]
        assert all(rate > 0 for rate in found) if rates else found == (None, None)
    assert line.startswith("2 prompt tokens (0 cached), first token after ")
    completion.generation.decode_s = 0.0  # of a clock that has not moved
    assert completion.generation.tokens_per_s is None
