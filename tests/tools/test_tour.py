"""docs/tour.md says what the model computes; its pictures are what their script draws."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qwen35.cli import run
from qwen35.errors import InputError
from tools import tour, tour_pictures

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(tour.build_parser(), tour.main, [*map(str, arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_page_says_what_the_model_computes(cli: Cli):
    assert cli("--check") == (0, "", "")


def test_what_the_page_says_wrongly_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = tmp_path / "tour.md"
    text = tour.PAGE.read_text(encoding="utf-8")
    decay = tour.ANSWERS["decay"]()
    page.write_text(
        text.replace(f"\n{decay}\n", "\n0.999\n").replace("attention.py:", "attention.py:1")
    )
    monkeypatch.setattr(tour, "PAGE", page)
    status, _, err = cli("--check")
    assert status == 1
    assert "tour.md, answer_decay:" in err and "tour.md, attention:" in err
    assert "tour.md, delta_net:" not in err
    assert cli("--write")[0] == 0 and cli("--check")[0] == 0
    assert page.read_text(encoding="utf-8") == text


def test_a_page_without_a_block_is_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tour.md").write_text("nothing\n")
    monkeypatch.setattr(tour, "PAGE", tmp_path / "tour.md")
    status, out, err = cli("--write")
    assert (status, out) == (2, "") and "tour.md has blocks []; expected" in err


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("GatedDeltaNet.backward", "there is no GatedDeltaNet.backward"),
        ("Nothing.forward", "there is no Nothing.forward"),
        ("GatedDeltaNet.forward", "GatedDeltaNet.forward binds no 'nobody'"),
    ],
)
def test_a_line_that_is_not_there_is_named(function: str, message: str):
    with pytest.raises(InputError, match=message):
        tour.line_of("reference/deltanet.py", function, "nobody")


@pytest.mark.parametrize(
    ("said", "computed", "expected"),
    [
        ("a 1.00 b", "a 1.01 b", True),
        ("a 1.00 b", "a 1.03 b", False),
        ("0.001", "0.004", True),
        ("[1, 2] 1.0", "[1, 3] 1.0", False),
        ("x:12 `a`", "x:13 `a`", False),
    ],
)
def test_numbers_may_differ_by_two_hundredths_and_nothing_else(
    said: str, computed: str, expected: bool
):
    assert tour.same(said, computed) == expected


def test_the_pictures_are_what_their_script_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert tour_pictures.main(tour_pictures.build_parser().parse_args(["--check"])) == 0
    monkeypatch.setattr(tour_pictures, "DOCS", tmp_path)
    assert tour_pictures.main(tour_pictures.build_parser().parse_args(["--check"])) == 1
    assert "docs/tour-round.svg is not what" in capsys.readouterr().err
    assert tour_pictures.main(tour_pictures.build_parser().parse_args([])) == 0
    assert tour_pictures.main(tour_pictures.build_parser().parse_args(["--check"])) == 0
