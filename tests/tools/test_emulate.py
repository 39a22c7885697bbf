"""`python -m tools.emulate`: text from gfx950 machine code, and one line for bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from qwen35.config import Config
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from tests.support.command import Cli, in_process
from tools.convert import Options, convert
from tools.emulate import build_parser, ended, main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return in_process(build_parser, main, capsys)


def test_a_text_of_the_references_tokens(cli: Cli):
    status, out, err = cli("In the beginning", "--max-new-tokens", 5, "--check", "--json")
    found = json.loads(out)
    assert "configs.json" not in err and "Triton" not in err
    assert status == 0 and found["same_as_reference"] and len(found["token_ids"]) == 5
    assert found["instructions"] > 1_000_000 and found["launches_a_round"] == 91
    assert found["rounds"] < 5  # a draft was accepted


def test_a_text_ends_at_an_end_of_text_token(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    """As the reference's does, also if the token is an accepted draft in the middle of a round."""
    ids = Tokenizer(TINY).encode("In the beginning")
    tokens = [t for t, _ in Generation(load(TINY), ids, 5, Sampling(), frozenset(), 0)]
    place = next(i for i in range(1, 5) if tokens[i] not in tokens[:i])
    from_file = Config.from_file
    monkeypatch.setattr(
        Config, "from_file", lambda file: replace(from_file(file), eos_token_id=(tokens[place],))
    )
    status, out, _ = cli("In the beginning", "--max-new-tokens", 5, "--check", "--json")
    found = json.loads(out)
    assert (status, found["token_ids"]) == (0, tokens[: place + 1]) and found["same_as_reference"]


def test_tokens_after_the_end_are_dropped():
    assert ended([5, 6, 7, 6], frozenset({6, 7})) == [5, 6]
    assert ended([5, 6], frozenset()) == [5, 6]


def test_a_text_of_hip_kernels_is_the_references_too(cli: Cli, tmp_path: Path):
    """The layers' experts and routers; each experts' launch takes the place of two."""
    convert(TINY, tmp_path / "mxfp4", Options("mxfp4"))
    model = "--model", tmp_path / "mxfp4", "--moe-kernel", "hip"
    status, out, _ = cli("In the beginning", "--max-new-tokens", 3, "--check", "--json", *model)
    found = json.loads(out)
    assert status == 0 and found["same_as_reference"] and found["launches_a_round"] == 91 - 8


def test_one_token_is_the_references_alone(cli: Cli):
    """No machine code runs, so there is no speed to tell, and nothing that a check could compare."""
    status, out, err = cli("In the", "--max-new-tokens", 1, "--check")
    assert (
        status == 0
        and out
        and err.splitlines()[-1]
        == ("1 token, by the reference; nothing ran on gfx950, as no second one was needed")
    )
    found = json.loads(cli("In the", "--max-new-tokens", 1, "--check", "--json")[1])
    assert found["rounds"] == found["instructions"] == 0 and found["same_as_reference"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "--max-new-tokens", 1), "the prompt is empty"),
        (
            ("In the", "--max-new-tokens", 32767),
            "the prompt has 2 tokens, the context 32768; 32767 are to follow",
        ),
        (("In", "--max-new-tokens", 0), "max_new_tokens = 0; expected at least 1"),
        (("In", "--max-new-tokens", 10**9), "the context 32768; 1000000000 are to follow"),
        (("In", "--draft-tokens", 9), "9 drafts a round; the fast path verifies 0 to 7"),
        (("In", "--moe-kernel", "hip"), "experts with kernel hip in bf16; it takes MXFP4"),
        (("In", "--model", "no/such/folder/here"), "no such folder"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, arguments: tuple[object, ...], message: str):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err


def test_another_triton_is_named_in_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("triton.__version__", "3.9.0")
    status, _, err = cli("In", "--max-new-tokens", 1)
    assert status == 0 and "Triton 3.9.0 is installed" in err.splitlines()[0]
