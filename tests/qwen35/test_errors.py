"""A message is what a person reads, however long what it quotes is."""

import pickle

from qwen35.errors import FIRST, LAST, LONGEST, InputError


def test_a_message_of_ordinary_length_is_whole() -> None:
    for text in ("", "config: x = 5; expected 6", "x" * LONGEST):
        assert str(InputError(text)) == text


def test_a_message_that_quotes_a_file_is_cut_in_the_middle() -> None:
    text = "config.json: x = " + "9" * 1_000_000 + "; expected a number"
    shown = str(InputError(text))
    assert shown.startswith("config.json: x = 999") and shown.endswith("999; expected a number")
    assert f" ... ({len(text) - FIRST - LAST} characters are left out) ... " in shown
    assert len(shown) <= LONGEST
    assert str(pickle.loads(pickle.dumps(InputError(text)))) == shown
