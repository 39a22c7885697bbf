"""Speed of one stream: what is counted, and how the percentiles are taken."""

import argparse
import json

import pytest

from qwen35.cli import Parser
from qwen35.errors import InputError
from tools.bench import stream


def arguments(*words: str) -> argparse.Namespace:
    parser = Parser("x", "y")
    stream.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args([*words, "--json"])


def test_the_figures_fit_together(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--prompt-tokens", "70", "--new-tokens", "9", "--runs", "3", "--draft-tokens", "2")
    assert stream.main(arguments(*words)) == 0
    found = json.loads(capsys.readouterr().out)
    speed, wait = found["rows"]
    assert (
        found["config"]["path"] == "reference" and 1 <= found["config"]["tokens_per_forward"] <= 3
    )
    assert speed["least"] <= speed["p90"] <= speed["p50"] <= speed["most"]
    assert wait["least"] <= wait["p50"] <= wait["p90"] <= wait["most"]


@pytest.mark.parametrize("count, place", [(1, 0), (2, 1), (9, 8), (10, 8), (11, 9), (20, 17)])
def test_nine_tenths_of_the_runs_reach_the_90th_percentile(count: int, place: int) -> None:
    times = [float(i) for i in range(count)]
    assert stream.ninetieth_percentile(times[::-1], more_is_slower=True) == place
    assert stream.ninetieth_percentile(times, more_is_slower=False) == count - 1 - place


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--new-tokens", "32768"), "the prompt has 10000 tokens, the context 32768; 32768 are to"),
        (("--draft-tokens", "-1"), "draft_tokens = -1"),
        (("--draft-tokens", "99999"), "draft_tokens = 99999"),
        (("--prefill-chunk", "63"), "prefill_chunk = 63"),
    ],
)
def test_it_is_said_before_the_weights_are_read(
    words: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context that leaves room for one token alone would give no speed."""
    monkeypatch.setattr(stream, "load", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(InputError, match=line):
        stream.main(arguments(*words))


def test_a_prompt_longer_than_the_text_is_refused() -> None:
    with pytest.raises(InputError, match=r"--prompt-tokens 9999999; the held-out text has \d+"):
        stream.main(arguments("--prompt-tokens", "9999999"))
