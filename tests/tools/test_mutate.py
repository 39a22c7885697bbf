"""`tools.mutate`: the copy that mutmut works in, what counts as alive, and the table of docs/trust.md."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from qwen35.errors import InputError
from tools import mutate
from tools.mutate import MODULES, ROOT, TABLE

RESULTS = """
    a.x_one__mutmut_1: killed
    a.x_one__mutmut_2: survived
    a.x_one__mutmut_3: no tests
    a.x_one__mutmut_4: timeout
    a.x_one__mutmut_5: survived
"""
DIFFS = {
    "a.x_one__mutmut_2": "--- a.py\n+++ a.py\n@@ -1 +1 @@\n-    return x < 1\n+    return x <= 1\n y\n",
    "a.x_one__mutmut_3": "--- a.py\n+++ a.py\n-    return None\n+    return 1\n",
    "a.x_one__mutmut_5": "--- a.py\n+++ a.py\n-    f(x, y)\n+    f(x)\n",
}


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """mutmut's answers without mutmut, a table of the test's own; what was asked."""
    asked: list[tuple[str, ...]] = []

    def mutmut(folder: Path, *arguments: str) -> str:
        asked.append(arguments)
        return {"results": RESULTS, "show": DIFFS.get(arguments[-1], ""), "run": ""}[arguments[0]]

    table = tmp_path / "table.json"
    table.write_text("{}")
    monkeypatch.setattr(mutate, "mutmut", mutmut)
    monkeypatch.setattr(mutate, "TABLE", table)
    monkeypatch.setattr(mutate, "prepare", lambda module, folder: None)
    return asked


def test_every_module_and_its_tests_are_there() -> None:
    for module, tests in MODULES.items():
        assert all((ROOT / name).exists() for name in (module, *tests))


def test_a_copy_has_the_configuration_of_one_module(tmp_path: Path) -> None:
    mutate.prepare("qwen35/sampling.py", tmp_path / "copy")
    project = tomllib.loads((tmp_path / "copy/pyproject.toml").read_text())
    assert project["tool"]["mutmut"]["only_mutate"] == ["qwen35/sampling.py"]
    assert project["tool"]["mutmut"]["source_paths"] == ["qwen35"]
    assert "-n" not in project["tool"]["pytest"]["ini_options"]["addopts"].split()
    assert (tmp_path / "copy/qwen35/sampling.py").read_bytes() == (
        ROOT / "qwen35/sampling.py"
    ).read_bytes()
    (tmp_path / "copy/mark").touch()
    mutate.prepare("qwen35/sampling.py", tmp_path / "copy")
    assert (tmp_path / "copy/mark").exists()  # a copy that is there is gone on with


def test_what_lives_is_counted_and_shown(answered: list[tuple[str, ...]], tmp_path: Path) -> None:
    """A mutant that no test reaches lives; one that runs into a time limit is killed."""
    known = {"- f(x, y) + f(x)": "y has no effect"}
    found = mutate.examine("qwen35/cache.py", tmp_path, 2, known)
    assert found == {
        "mutants": 5, "killed": 2, "equivalent": 1,
        "alive": ["- return x < 1 + return x <= 1", "- return None + return 1"],
    }  # fmt: skip
    assert answered[0] == ("run", "--max-children", "2")


def test_the_command(
    answered: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--folder", str(tmp_path), "--module", "qwen35/cache.py", "--update"]
    assert mutate.main(mutate.build_parser().parse_args(arguments)) == 1
    out = capsys.readouterr().out
    assert "qwen35/cache.py: - f(x, y) + f(x)" in out
    table = json.loads(mutate.TABLE.read_text())
    assert table["qwen35/cache.py"] == {
        "mutants": 5, "killed": 2, "equivalent": 0, "equivalents": {},
    }  # fmt: skip
    reasons = {mutate.change(tmp_path, name): "no effect" for name in DIFFS}
    mutate.TABLE.write_text(json.dumps({"qwen35/cache.py": {"equivalents": reasons}}))
    assert mutate.main(mutate.build_parser().parse_args(arguments)) == 0
    table = json.loads(mutate.TABLE.read_text())["qwen35/cache.py"]
    assert (table["equivalent"], table["equivalents"]) == (3, reasons)


def test_without_mutmut_it_is_one_line(tmp_path: Path) -> None:
    """Or where it fails for another reason: the last line that it printed."""
    with pytest.raises(InputError, match=f"mutmut run in {re.escape(str(tmp_path))}: .+"):
        mutate.mutmut(tmp_path, "run")


def test_the_page_has_the_table() -> None:
    """Every module that was run, with the counts of mutants.json."""
    page = (ROOT / "docs/trust.md").read_text()
    rows = re.findall(r"^\| (\S+\.py) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    table = json.loads(TABLE.read_text())
    assert {name for name, *_ in rows} == set(table) and set(table) <= set(MODULES)
    for name, *counts in rows:
        one = table[name]
        alive = one["mutants"] - one["killed"] - one["equivalent"]
        assert [*map(int, counts)] == [one["mutants"], one["killed"], one["equivalent"], alive]
        assert all(one["equivalents"].values()) and len(one["equivalents"]) <= one["equivalent"]
