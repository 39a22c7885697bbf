"""Log probabilities: of the model's own distribution, the same at any drafting depth, and free if not
asked for."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen35
from qwen35 import generation as generations
from qwen35.completion import Completer, Settings
from qwen35.defaults import Defaults
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.logprobs import TokenLogprobs, table, token_logprobs
from qwen35.requests import parse_request, read_line
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from reference.model import Model
from tests.support.checkpoints import write, write_tokenizer

PROMPT = "In the beginning"
SAMPLED: dict[str, Any] = {
    "temperature": 1.3, "top_k": 50, "repetition_penalty": 1.4, "presence_penalty": 0.5, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return load(TINY)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.integers(-12, 12), min_size=1, max_size=40), token=st.integers(0, 99),
    count=st.integers(0, 40), padding=st.integers(0, 3),
)  # fmt: skip
def test_against_a_plain_loop(values: list[int], token: int, count: int, padding: int) -> None:
    """Logits with many ties, which go to the lower id; rows beyond the vocabulary do not count."""
    token, count = token % len(values), min(count, len(values))
    logits = torch.tensor([*values, *[99] * padding], dtype=torch.bfloat16)
    found = token_logprobs(logits, token, count, len(values))
    total = math.log(math.fsum(math.exp(value) for value in values))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert [i for i, _ in found.top] == order
    assert [p for _, p in found.top] == pytest.approx([values[i] - total for i in order], abs=1e-12)
    assert (found.id, found.logprob) == (token, pytest.approx(values[token] - total, abs=1e-12))


def test_they_are_of_the_logits_before_temperature_and_penalties(model: Model) -> None:
    """Each token's, from the logits that it was picked from."""
    sampling = Sampling(**SAMPLED, vocab=2000)
    ids = Tokenizer(TINY).encode(PROMPT)
    generation = Generation(model, ids, 20, sampling, frozenset(), 3, logprobs=2)
    for step, (token, logits) in enumerate(generation):
        expected = logits[:2000].double().softmax(-1).log()
        found = generation.token_logprobs[step]
        assert found.id == token
        assert found.logprob == pytest.approx(float(expected[token]), abs=1e-12)
        assert [p for _, p in found.top] == pytest.approx(
            expected.sort().values[-2:].flip(0).tolist()
        )
    assert any(row.id not in dict(row.top) for row in generation.token_logprobs)


@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_same_bits_at_any_drafting_depth(model: Model, sampled: dict[str, Any]) -> None:
    runs = [
        qwen35.generate(model, PROMPT, max_new_tokens=40, logprobs=4, draft_tokens=depth, **sampled)
        for depth in (0, 1, 3)
    ]
    first = runs[0].document()["logprobs"]
    assert len(first) == 40
    assert [run.document()["logprobs"] for run in runs[1:]] == [first, first]
    assert runs[2].generation.draft.forwards < 40
    if not sampled:
        assert all(row.top[0] == (row.id, row.logprob) for row in runs[0].logprobs)


def test_the_document(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """A row an id, with the texts; --json prints the same as Python has."""
    options = ["--max-new-tokens", "9", "--logprobs", "2", "--json"]
    assert main(build_parser().parse_args([PROMPT, *options])) == 0
    found = json.loads(capsys.readouterr().out)
    again = qwen35.generate(model, PROMPT, max_new_tokens=9, logprobs=2)
    assert found["logprobs"] == again.document()["logprobs"]
    assert [row["id"] for row in found["logprobs"]] == found["token_ids"]
    assert "".join(row["text"] for row in found["logprobs"]) == found["text"]
    assert all(row.keys() == {"id", "text", "logprob", "top"} for row in found["logprobs"])
    assert all(best.keys() == {"id", "text", "logprob"} for best in found["logprobs"][0]["top"])
    only = qwen35.generate(model, PROMPT, max_new_tokens=9, logprobs=0)
    assert [row.logprob for row in only.logprobs] == [row.logprob for row in again.logprobs]
    assert not any(row.top for row in only.logprobs)


def test_the_table_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The text is what it is without."""
    plain = [PROMPT, "--max-new-tokens", "4"]
    assert main(build_parser().parse_args(plain)) == 0
    text = capsys.readouterr().out
    assert main(build_parser().parse_args([*plain, "--logprobs", "2"])) == 0
    out, err = capsys.readouterr()
    assert out == text
    header, *rows = err.splitlines()[:5]
    assert header.split() == ["logprob", "token", "the", "2", "likeliest"]
    assert len(rows) == 4
    for row in rows:
        assert len(row.split("%")) == 3


def test_a_table_is_aligned_whatever_the_characters(tmp_path: Path) -> None:
    """A wide one takes two columns, a control token no quotes, bytes are shown as bytes."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    (end,), (byte, *_) = tokenizer.encode("<|im_end|>"), tokenizer.encode("日")
    lines = table(
        [TokenLogprobs(end, -0.5, [(end, -0.5)]), TokenLogprobs(byte, -12, [(end, -1e-9)])], tokenizer
    )  # fmt: skip
    assert lines.splitlines() == [
        " logprob  token        the likeliest",
        " -0.5000  <|im_end|>   <|im_end|> 60.7%",
        "-12.0000  b'\\xe6'      <|im_end|> 100.0%",
    ]


def test_ids_without_a_tokenizer(tmp_path: Path) -> None:
    """There is no text to show."""
    write(tmp_path, "0.8B")
    completion = qwen35.generate(load(tmp_path), [1, 2, 3], max_new_tokens=2, logprobs=1)
    first, _ = completion.document()["logprobs"]
    assert first.keys() == {"id", "logprob", "top"}
    assert table(completion.logprobs, None).splitlines()[1].split()[1] == str(first["id"])


def test_nothing_is_computed_that_was_not_asked_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(generations, "token_logprobs", never)
    completion = qwen35.generate(model, PROMPT, max_new_tokens=2)
    assert completion.logprobs == []
    assert "logprobs" not in completion.document()
    with pytest.raises(AssertionError):
        qwen35.generate(model, PROMPT, max_new_tokens=2, logprobs=0)


def test_a_request_has_its_own(model: Model) -> None:
    """A request without a number has that of the command line. A wrong number is one line."""
    tokenizer = Tokenizer(TINY)
    completer = Completer(model, tokenizer, Defaults())
    common = Settings(logprobs=1)
    for request, expected in (({}, 1), ({"logprobs": 3}, 3), ({"logprobs": None}, 1)):
        line = read_line(json.dumps({"prompt": "x"} | request), common)
        parsed, _ = parse_request(line, completer)
        assert parsed.settings.logprobs == expected
    for request, line in ((True, "logprobs = True; expected an integer"), ("2", "logprobs = '2'")):
        with pytest.raises(InputError, match=line):
            line = read_line(json.dumps({"prompt": "x", "logprobs": request}), common)
            parse_request(line, completer)
    for wrong in (-1, 2001):
        with pytest.raises(InputError, match=rf"logprobs = {wrong}; expected 0 to 2000"):
            qwen35.generate(model, PROMPT, logprobs=wrong)


def test_requests_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One result with, one without."""
    file = tmp_path / "requests.jsonl"
    lines = [{"prompt": PROMPT, "logprobs": 1}, {"prompt": PROMPT}]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert main(build_parser().parse_args(["--requests", str(file), "--max-new-tokens", "3"])) == 0
    asked, plain = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(asked["logprobs"]) == 3
    assert "logprobs" not in plain
