"""`tools.mutate`: the copy that mutmut works in, what counts as alive, and the table of docs/trust.md."""

import argparse
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen35.errors import InputError
from tools import mutate, mutate_order
from tools.mutate import MODULES, ROOT, TABLE

NAMES = [f"a.x_one__mutmut_{n}" for n in range(1, 8)]
RESULTS = """
    a.x_one__mutmut_1: killed
    a.x_one__mutmut_2: survived
    a.x_one__mutmut_3: no tests
    a.x_one__mutmut_4: timeout
    a.x_one__mutmut_5: survived
    a.x_one__mutmut_6: killed
    a.x_one__mutmut_7: not checked
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
    results = [RESULTS]

    def mutmut(folder: Path, *arguments: str) -> str:
        asked.append(arguments)
        if arguments[0] == "run":
            results.append(results[-1].replace("not checked", "killed"))
        return {"results": results[-1], "show": DIFFS.get(arguments[-1], ""), "run": ""}[
            arguments[0]
        ]

    table = tmp_path / "table.json"
    table.write_text("{}")
    monkeypatch.setattr(mutate, "mutmut", mutmut)
    monkeypatch.setattr(mutate, "TABLE", table)
    monkeypatch.setattr(mutate, "prepare", lambda module, folder: None)
    monkeypatch.setattr(mutate, "names", lambda module, folder: NAMES)
    return asked


def test_every_module_and_its_tests_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        named = [word for word in mutate.selection(module) if word.endswith(".py")]
        assert named and all((ROOT / name).exists() for name in (module, *named))
    monkeypatch.setitem(MODULES, "weights/a.py", "test_a fast/test_b -k 'test_a and not slow'")
    assert mutate.selection("weights/a.py") == [
        "tests/weights/test_a.py", "tests/fast/test_b.py", "-k", "test_a and not slow",
    ]  # fmt: skip


def test_a_copy_has_the_configuration_of_one_module(tmp_path: Path) -> None:
    mutate.prepare("qwen35/sampling.py", tmp_path / "copy")
    project = tomllib.loads((tmp_path / "copy/pyproject.toml").read_text())
    assert project["tool"]["mutmut"]["only_mutate"] == ["qwen35/sampling.py"]
    assert project["tool"]["mutmut"]["source_paths"] == ["qwen35"]
    assert not {"-n", "--dist"} & {*project["tool"]["pytest"]["ini_options"]["addopts"].split()}
    assert (tmp_path / "copy/qwen35/sampling.py").read_bytes() == (
        ROOT / "qwen35/sampling.py"
    ).read_bytes()
    (tmp_path / "copy/mark").touch()
    (tmp_path / "copy/README.md").write_text("before")
    mutate.prepare("qwen35/sampling.py", tmp_path / "copy")
    assert (tmp_path / "copy/mark").exists()  # a copy that is there is gone on with
    assert (tmp_path / "copy/README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    assert tomllib.loads((tmp_path / "copy/pyproject.toml").read_text()) == project


def parsed(folder: Path, *more: str) -> argparse.Namespace:
    arguments = ["--folder", str(folder), "--module", "qwen35/cache.py", *more]
    return mutate.build_parser().parse_args(arguments)


def test_what_lives_is_counted_and_shown(answered: list[tuple[str, ...]], tmp_path: Path) -> None:
    """A mutant that no test reaches lives; one that runs into a time limit is killed."""
    known = {"- f(x, y) + f(x)": "y has no effect"}
    found = mutate.examine("qwen35/cache.py", parsed(tmp_path, "--processes", "2"), known)
    assert found == {
        "mutants": 7, "run": 7, "killed": 4, "equivalent": 1,
        "alive": ["- return x < 1 + return x <= 1", "- return None + return 1"], "not_run": [],
    }  # fmt: skip
    # Those that an earlier run has done are not run again.
    assert [a for a in answered if a[0] == "run"] == [("run", "--max-children", "2", NAMES[6])]


@pytest.mark.parametrize("state", ["suspicious", "skipped", "another word of a later mutmut"])
def test_what_is_not_known_as_killed_lives(
    answered: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """mutmut says "suspicious" of tests that it cannot even start, for one."""
    results = RESULTS.replace("killed", state).replace("not checked", "killed")
    monkeypatch.setattr(mutate, "outcomes", lambda folder: dict(pairs(results)))
    found = mutate.examine("qwen35/cache.py", parsed(tmp_path), {})
    assert (found["run"], found["killed"], len(found["alive"])) == (7, 2, 5)


def test_a_mutant_that_cannot_be_run_is_named(
    answered: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And the exit status is 1, also where nothing lives."""
    results = RESULTS.replace("survived", "killed").replace("no tests", "killed")
    monkeypatch.setattr(mutate, "outcomes", lambda folder: dict(pairs(results)))
    assert mutate.main(parsed(tmp_path)) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"qwen35/cache.py: not run: {NAMES[6]}"


def pairs(results: str) -> list[list[str]]:
    return [line.strip().rsplit(": ", 1) for line in results.splitlines() if line]


def test_survivors_run_again(answered: list[tuple[str, ...]], tmp_path: Path) -> None:
    stats = tmp_path / "qwen35.cache.py/mutants/mutmut-stats.json"
    stats.parent.mkdir(parents=True)
    stats.touch()
    mutate.examine("qwen35/cache.py", parsed(tmp_path), {})
    assert stats.exists() and not any(NAMES[1] in asked for asked in answered if asked[0] == "run")
    answered.clear()
    mutate.examine("qwen35/cache.py", parsed(tmp_path, "--again"), {})
    assert not stats.exists()
    [again, *_] = [a for a in answered if a[0] == "run"]
    assert {NAMES[n] for n in (1, 2, 4)} <= {*again[3:]}


def test_a_sample_is_the_same_every_time(answered: list[tuple[str, ...]], tmp_path: Path) -> None:
    """A larger sample contains it, so that its results still count."""
    counts = []
    for size in ("3", "3", "5", "9"):
        found = mutate.examine("qwen35/cache.py", parsed(tmp_path, "--sample", size), {})
        counts.append((found["run"], found["killed"], tuple(found["alive"])))
    assert counts[0] == counts[1] and [run for run, *_ in counts] == [3, 3, 5, 7]
    assert found["mutants"] == 7
    assert {*counts[0][2]} <= {*counts[2][2]} <= {*counts[3][2]}


def test_another_seed_gives_another_sample(answered: list[tuple[str, ...]], tmp_path: Path) -> None:
    def alive(seed: str) -> tuple[str, ...]:
        args = parsed(tmp_path, "--sample", "3", "--seed", seed)
        return tuple(mutate.examine("qwen35/cache.py", args, {})["alive"])

    assert len({alive(seed) for seed in "01234"}) > 1
    assert alive("3") == alive("3")


def test_the_emulators_tables_are_made_anew_before_its_test_functions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In which a mutant is chosen. Other tests take the tables as they are."""
    from tools.gfx950 import scalar
    from tools.gfx950.registry import BUILDERS

    monkeypatch.setattr(mutate_order, "remade", set())

    def makes(name: str) -> bool:
        before = BUILDERS["s_mov_b32"]
        path = Path(__file__).parent / name
        item = SimpleNamespace(path=path, nodeid=f"{name}::test_x[{len(name)}]")
        mutate_order.pytest_runtest_setup(item)  # type: ignore[arg-type]
        return BUILDERS["s_mov_b32"] is not before

    assert not makes("test_mutate.py") and makes("gfx950/test_x.py")
    assert makes("gfx950/test_y.py") and not makes("gfx950/test_x.py")
    assert scalar.define.__globals__ is vars(scalar)


def test_the_shortest_tests_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = [SimpleNamespace(nodeid=name) for name in ("long", "short", "new")]
    mutate_order.pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [item.nodeid for item in items] == ["long", "short", "new"]
    mutate_order.DURATIONS.write_text('{"duration_by_test": {"long": 2.0, "short": 1.0}}')
    mutate_order.pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    assert [item.nodeid for item in items] == ["new", "short", "long"]


def test_the_command(
    answered: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mutate.main(parsed(tmp_path, "--update")) == 1
    out = capsys.readouterr().out
    assert "qwen35/cache.py: - f(x, y) + f(x)" in out
    table = json.loads(mutate.TABLE.read_text())
    assert table["qwen35/cache.py"] == {
        "mutants": 7, "run": 7, "killed": 4, "equivalent": 0, "equivalents": {},
    }  # fmt: skip
    reasons = {mutate.change(tmp_path, name): "no effect" for name in DIFFS}
    mutate.TABLE.write_text(json.dumps({"qwen35/cache.py": {"equivalents": reasons}}))
    assert mutate.main(parsed(tmp_path, "--update")) == 0
    table = json.loads(mutate.TABLE.read_text())["qwen35/cache.py"]
    assert (table["equivalent"], table["equivalents"]) == (3, reasons)


def test_without_mutmut_it_is_said_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^mutmut is not installed; pip install -e '\.\[test,mut"):
        mutate.names("qwen35/cache.py", tmp_path)


def test_a_folder_without_git_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an unpacked archive of the sources."""
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(InputError, match=f"^git ls-files in {re.escape(str(tmp_path))}: fatal: "):
        mutate.prepare("qwen35/cache.py", tmp_path / "copy")


def test_an_equivalent_mutant_is_one_place() -> None:
    """A change is known by its two lines, so the first of them stands once in its module: another
    mutant that changes an equal line would be excused by the same reason."""
    for module, row in json.loads(TABLE.read_text()).items():
        lines = [line.strip() for line in (ROOT / module).read_text().splitlines()]
        for text in row["equivalents"]:
            changed = [line for line in lines if line and text.startswith(f"- {line} + ")]
            assert len(changed) == 1, f"{module}: {text}: {len(changed)} such lines"


def test_without_mutmut_it_is_one_line(tmp_path: Path) -> None:
    """If mutmut fails for another reason, the line is the last one that it printed."""
    with pytest.raises(InputError, match=f"mutmut in {re.escape(str(tmp_path))}: .+"):
        mutate.mutmut(tmp_path, "run")


def test_the_page_has_the_table() -> None:
    """Every module that was run, with the counts of mutants.json."""
    page = (ROOT / "docs/trust.md").read_text()
    number = r" (\d+) \|"
    rows = re.findall(rf"^\| (\S+\.py) \|{number * 5}$", page, re.MULTILINE)
    table = json.loads(TABLE.read_text())
    assert {name for name, *_ in rows} == set(table) and set(table) <= set(MODULES)
    for name, *counts in rows:
        one = table[name]
        alive = one["run"] - one["killed"] - one["equivalent"]
        assert [*map(int, counts)] == [*(one[count] for count in mutate.COUNTS), alive]
        assert all(one["equivalents"].values())


def test_a_seed_without_a_sample_chooses_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--seed 3 chooses the mutants of a --sample; none is given"
    ):
        mutate.main(parsed(tmp_path, "--seed", "3"))
