"""`--break`: pdb stops inside of a node's forward, at the token asked for, and changes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen35.debugger import break_in
from qwen35.errors import InputError
from qwen35.load import load

ROOT = Path(__file__).parents[2]
COMMON = ("In the beginning", "--max-new-tokens", "6", "--draft-tokens", "0")


def generate(*options: str, commands: str = "") -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "qwen35.generate", *COMMON, *options]
    return subprocess.run(
        words, cwd=ROOT, input=commands, capture_output=True, text=True, timeout=120
    )


def test_it_stops_at_the_node_and_the_token() -> None:
    """Four tokens of prompt in one pass, then one a pass: position 5 is the second of those."""
    plain = generate("--digest")
    commands = "p tuple(x.shape), type(self).__name__\nn\nc\n"
    stopped = generate(
        "--break", "layers.1.linear_attn", "--break-at", "5", "--digest", commands=commands
    )
    assert stopped.returncode == 0, stopped.stderr
    assert "in layers.1.linear_attn, GatedDeltaNet.forward, positions 5 to 5" in stopped.stdout
    assert "((1, 1, 256), 'GatedDeltaNet')" in stopped.stdout
    assert "reference/deltanet.py" in stopped.stdout
    assert stopped.stdout.count("(Pdb)") == 3
    assert stopped.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]  # the digest


def test_every_node_of_a_pattern_stops_once() -> None:
    stopped = generate("--break", "layers.*.self_attn", commands="c\n" * 9)
    assert stopped.returncode == 0
    assert stopped.stdout.count("GatedAttention.forward, positions 0 to 3") == 2


def test_a_node_of_the_mtp_head() -> None:
    stopped = generate("--draft-tokens", "3", "--break", "mtp.layers.0.self_attn", commands="c\n")
    assert stopped.returncode == 0
    assert stopped.stdout.count("in mtp.layers.0.self_attn") == 1


@pytest.mark.parametrize("commands", ["q\n", "n\nq\n", "", "r\nq\n"], ids=repr)
def test_leaving_the_debugger_ends_the_program(commands: str) -> None:
    """One leaves with q or at the end of the input, also where the forward returns. The status is
    that of Ctrl-C."""
    left = generate("--break", "layers.3.mlp", commands=commands)
    assert (left.returncode, left.stderr.strip()) == (130, ""), left.stderr
    assert left.stdout.count("in layers.3.mlp") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("layers.0", "--break-at", "9999"), "stop in layers.0, which did not run in a pass over "
         "position 9999"),
        (("layers.*.mlp.experts.3",), "mlp.experts.3 and 7 more, which did not run"),
    ],
)  # fmt: skip
def test_where_it_never_stopped_is_said(options: tuple[str, ...], words: str) -> None:
    done = generate("--break", *options)
    assert done.returncode == 0 and words in done.stderr.splitlines()[-1]


def test_a_stop_begins_a_line() -> None:
    done = generate("--break", "layers.0", "--break-at", "5", commands="c\n")
    assert "\nin layers.0, " in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--break", "layers.99.mlp"), "pattern 'layers.99.mlp' matches no node; the nearest are"),
        (("--break", "layers.1.mlp", "--break-at", "-1"), "break at token -1"),
        (("--break-at", "5"), "--break-at 5 goes with --break NODE"),
    ],
)
def test_bad_breaks(options: tuple[str, ...], words: str) -> None:
    failed = generate(*options)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert words in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_the_names_come_back() -> None:
    model = load("tiny")
    names = break_in(model, "layers.3.*attn")
    assert names == ["layers.3.self_attn"]
    with pytest.raises(InputError):
        break_in(model, "nothing")
