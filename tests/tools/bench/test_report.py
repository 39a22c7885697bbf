"""A benchmark prints a table, or one document with --json."""

import json

import pytest

from tools.bench import report

ROWS = [{"name": "ours", "us": 22.912345}, {"name": "theirs", "us": 123456.7, "note": "slow"}]


def test_the_table_has_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    report.emit("moe", {"tp": [1, 2]}, ROWS, only_json=False, device="a GPU", read_gb_s=4680.25)
    assert capsys.readouterr().out.splitlines() == [
        "tp: 1, 2", "device: a GPU", "read_gb_s: 4680", "",
        "name    us      note", "ours    22.91", "theirs  123457  slow",
    ]  # fmt: skip


def test_the_document_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    report.emit("moe", {"tp": [1, 2]}, ROWS, only_json=True, device="a GPU")
    found = json.loads(capsys.readouterr().out)
    assert found == {"op": "moe", "config": {"tp": [1, 2]}, "device": "a GPU", "rows": ROWS}


def test_numbers_of_a_table_have_the_same_digits(capsys: pytest.CaptureFixture[str]) -> None:
    """17.60 beside 17.62; the configuration's are as they were given."""
    rows = [{"x": 17.6}, {"x": 17.62}, {"x": 1000.0}, {"x": 0.0}, {"x": [1.5, 2]}]
    report.emit("x", {"temperature": 0.0}, rows, only_json=False, device="a CPU")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "temperature: 0",
        "device: a CPU",
        "",
        "x",
        "17.60",
        "17.62",
        "1000",
        "0.000",
        "1.500, 2",
    ]


def test_what_is_no_figure_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    """In the document it is null."""
    rows = [{"name": "decode", "tokens_per_s": None}]
    report.emit("x", {"chunk": None}, rows, only_json=False)
    assert "chunk: -\n" in (out := capsys.readouterr().out) and out.splitlines()[-1] == "decode  -"
    report.emit("x", {}, rows, only_json=True)
    assert json.loads(capsys.readouterr().out)["rows"] == rows
