"""`tools.hostile`: the same damage for the same number, a verdict on each kind of end, a few folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35.errors import InputError
from tools import hostile
from tools.hostile_text import TEMPLATES, TOKENIZERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    hostile.write_undamaged(folder)
    return folder


def copied(whole: Path, place: Path) -> Path:
    shutil.copytree(whole, place)
    return place


def test_what_is_damaged_is_a_checkpoint(whole: Path, tmp_path: Path) -> None:
    case = hostile.Case(0, "", "nothing", hostile.command(whole, hostile.random.Random(0)))
    folder = copied(whole, tmp_path / "one")
    assert hostile.outcome(case, folder) == "text"


def test_a_number_makes_the_same_damage_and_each_another_one(whole: Path, tmp_path: Path) -> None:
    """The damage is in one file, and in no more."""
    deeds: set[str] = set()
    for number in range(40):
        first, second = (copied(whole, tmp_path / f"{number} {i}") for i in range(2))
        case = hostile.damage(first, number, seed=3)
        again = hostile.damage(second, number, seed=3)
        assert (case.file, case.what) == (again.file, again.what)
        assert (first / case.file).read_bytes() == (second / case.file).read_bytes()
        others = [file.name for file in whole.iterdir() if file.name != case.file]
        assert all((first / n).read_bytes() == (whole / n).read_bytes() for n in others)
        deeds.add(f"{case.file} {case.what}")
    assert len(deeds) > 35


@pytest.mark.parametrize(
    ("program", "status", "said", "expected"),
    [
        ("generate", 0, "", "text"),
        ("generate", 0, "python -m x: warning: y\n", "text"),
        ("generate", 2, "python -m x: config: wrong\n", "error"),
        ("generate", 2, "python -m x: warning: a\nf: an id is left out\npython -m x: b\n", "error"),
        ("inspect", 1, "", "text"),
        ("generate", 1, "", "status 1"),
        ("generate", 2, "", "0 lines: ''"),
        ("generate", 2, "python -m x: a\npython -m x: b\n", "2 lines: "),
        (
            "generate",
            2,
            "Traceback (most recent call last):\nTypeError: no\n",
            "a traceback: TypeError",
        ),
        ("generate", 2, "python -m x: " + "y" * 3000, "a line of 3013 characters"),
        ("generate", -11, "", "ended by signal 11"),
    ],
)
def test_the_verdict(program: str, status: int, said: str, expected: str) -> None:
    assert hostile.verdict(program, status, said).startswith(expected)


def test_a_few_folders_end_as_they_should() -> None:
    command = [sys.executable, "-m", "tools.hostile", "--files", "40", "--processes", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert sum(row["text"] + row["error"] for row in found["files"]) == 40


def test_a_wrong_end_is_told_and_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hostile, "outcome", lambda case, folder: "takes more than 5 s")
    arguments = hostile.build_parser().parse_args(["--files", "2", "--processes", "1"])
    assert hostile.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[-2:]] == ["0", "1"]
    assert all(line.endswith("takes more than 5 s") for line in lines[-2:])


def test_a_text_is_repeated_by_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--first and --files count templates and tokenizers too; by default it is all of them."""
    monkeypatch.setattr(hostile, "outcome", lambda case, folder: "takes more than 5 s")
    words = ["--texts", "--first", "7", "--files", "2", "--processes", "1"]
    assert hostile.main(hostile.build_parser().parse_args(words)) == 1
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(": ")[:3:2] for line in lines] == [
        [str(n), list(TEMPLATES)[n]] for n in (7, 8)
    ]
    every = len(TEMPLATES) + len(TOKENIZERS)
    arguments = hostile.build_parser().parse_args(["--texts", "--first", "100"])
    assert hostile.chosen_numbers(arguments) == range(100, every)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--texts", "--seed", "1"], "--seed 1 is for damaged files"),
        (["--texts", "--first", "999"], "--first 999; expected at most "),
    ],
)
def test_what_texts_have_not_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hostile.main(hostile.build_parser().parse_args(words))


def test_there_are_fifty_of_each() -> None:
    assert len(TEMPLATES) >= 50 and len(TOKENIZERS) >= 50
