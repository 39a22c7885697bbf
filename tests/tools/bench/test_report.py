"""What a benchmark prints: a table, or with --json one document."""

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
