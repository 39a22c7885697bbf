"""`tools.compile --kernel FILE:NAME`: a user's own launches, and one line for each wrong use."""

import json
from pathlib import Path

import pytest

from qwen35.cli import run
from tools.compile import TABLE, build_parser, main

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "norm_kernel.py"
SPILLING = """
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fast.launch import Launch


@triton.jit
def greedy(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    value = tl.load(x + i)
    tl.store(out + i, value * tl.sum(value))


@dataclass
class Size:
    count: "int"


def launches(target):
    x = torch.empty(Size(8192).count, device="meta")
    yield Launch("greedy", greedy, (1, 1, 1), {"x": x, "out": x, "SIZE": 8192}, {"num_warps": 1})


def other(target):
    yield "a word"


def raises(target):
    yield {}[target]


def none(target):
    return ()
"""


def command(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        run(build_parser(), main, [str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return int(left.value.code or 0), out, err


@pytest.fixture
def spilling(tmp_path: Path) -> Path:
    """A file whose kernel needs more registers than a thread of sm_90 has."""
    file = tmp_path / "greedy.py"
    file.write_text(SPILLING, encoding="utf-8")
    return file


def test_the_table_is_that_of_the_projects_kernels(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(capfd, "--kernel", f"{EXAMPLE}:launches", "--check", "--json")
    document = json.loads(out)
    recorded = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    assert status == 0 and document["worse"] == []
    names = [(row["name"], row["target"]) for row in document["kernels"]]
    sizes = ("norm D=256", "norm D=4096")
    assert names == [(name, target) for target in ("gfx950", "sm_90") for name in sizes]
    for row in document["kernels"]:
        like = next(old for old in recorded if old["target"] == row["target"])
        assert row.keys() == like.keys()


def test_a_spill_is_told_with_check(capfd: pytest.CaptureFixture[str], spilling: Path) -> None:
    chosen = "--kernel", f"{spilling}:launches", "--target", "sm_90"
    assert command(capfd, *chosen)[0] == 0
    status, out, _ = command(capfd, *chosen, "--check")
    assert status == 1 and "WORSE   greedy sm_90: " in out and "registers spilled" in out
    assert TABLE.name not in out


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        (":other", (), ["gives str; expected fast.launch.Launch"]),
        (":raises", (), ["KeyError at line 33 of ", "greedy.py: 'gfx950'"]),
        (":none", (), ["gives no launch for gfx950 and sm_90"]),
        (":nothing", (), ["has no function nothing"]),
        (":Size.count", (), ["expected FILE.py:NAME"]),
        ("", (), ["expected FILE.py:NAME"]),
        (":launches", ("--update",), ["--update writes compile.json"]),
    ],
)
def test_wrong_use_is_one_line(
    capfd: pytest.CaptureFixture[str],
    spilling: Path,
    name: str,
    more: tuple[str, ...],
    words: list[str],
) -> None:
    before = TABLE.read_bytes()
    status, out, err = command(capfd, "--kernel", f"{spilling}{name}", *more)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err
    assert TABLE.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = 1\ndef x(:\n", ["SyntaxError at line 2 of "]),
        ("\n\nimport nowhere\n", ["line 3", "nowhere"]),
    ],
)
def test_a_file_that_does_not_load_is_told_with_the_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: list[str],
) -> None:  # fmt: skip
    file = tmp_path / "broken.py"
    file.write_text(text, encoding="utf-8")
    status, out, err = command(capfd, "--kernel", f"{file}:launches")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err
