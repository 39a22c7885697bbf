"""docs/write-a-kernel.md, followed word by word: its listing, commands, what they print, its faults."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support.printed import missing, says

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-kernel.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "docs" / "examples" / "norm_kernel.py"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


class Step(NamedTuple):
    """A command of the page with the files that it needs, a change to the kernel, and what it prints."""

    command: str
    files: dict[str, str]
    change: str
    printed: str


def steps() -> Iterator[Step]:
    """The steps in the page's order. The first block is the listing."""
    files: dict[str, str] = {}
    change = ""
    kinds = BLOCK.findall(PAGE)[1:]
    for number, (kind, text) in enumerate(kinds):
        if kind == "python":
            files = {text.split("\n", 1)[0].removeprefix("# "): text}
        elif kind == "diff":
            change = text
        elif kind == "sh":
            after = dict(kinds[number + 1 : number + 2])
            yield Step(text.strip(), files, change, after.get("text", ""))
            files, change = {}, ""


def changed(source: str, change: str) -> str:
    """The listing with one line in another's place, as the page shows it."""
    lines = change.splitlines()
    if not lines:
        return source
    (old,), (new,) = ([line[1:] for line in lines if line[0] == sign] for sign in "-+")
    assert source.count(old) == 1, old
    return source.replace(old, new)


def test_the_listing_is_the_example() -> None:
    kind, text = BLOCK.findall(PAGE)[0]
    assert (kind, text) == ("python", EXAMPLE.read_text(encoding="utf-8"))


def test_every_block_is_part_of_a_step() -> None:
    """Therefore no block of the page goes unchecked."""
    kinds = [kind for kind, _ in BLOCK.findall(PAGE)]
    assert set(kinds) == {"python", "sh", "text", "diff"}
    found = list(steps())
    assert len(found) == kinds.count("sh") == 8
    assert sum(len(step.files) for step in found) == kinds.count("python") - 1
    assert sum(bool(step.change) for step in found) == kinds.count("diff")
    assert sum(bool(step.printed) for step in found) == kinds.count("text")


@pytest.mark.parametrize(
    "step", steps(), ids=lambda step: f"{step.command[:40]} {step.change[:20]}"
)
def test_a_command_prints_what_the_page_says(step: Step, tmp_path: Path) -> None:
    """The commands that the page breaks fail, and no other; the one for a GPU says that there is none."""
    is_bench = "tools.bench" in step.command
    if is_bench and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    source = changed(EXAMPLE.read_text(encoding="utf-8"), step.change)
    for name, text in {"norm_kernel.py": source, **step.files}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    python, *arguments = shlex.split(step.command)
    assert python == "python"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert bool(done.returncode) == (bool(step.change) or is_bench), output
    assert "Traceback" not in output and not missing(step.printed, output), output


@pytest.mark.parametrize(
    ("expected", "line", "same"),
    [
        ("a 100 ...", "a   103 rest", True),
        ("a 100 ...", "a 106 rest", False),
        ("a 1 b", "a 1 b c", False),
        ("... b", "a b", True),
        ("a ... b", "a b", True),
        ("1.0e+02 x.", "1.0e+02 xy", False),
    ],
)
def test_how_lines_are_compared(expected: str, line: str, same: bool) -> None:
    assert says(expected, line) == same
    assert missing(f"{expected}\n", f"other\n{line}\n") == ([] if same else [expected])
