"""How many threads a command takes and how they wait: what the user has chosen wins."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen35.cli import Parser, run
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.store import Memory
from qwen35.sampling import Sampling
from qwen35.threads import ASKED, is_small
from tests.support.checkpoints import QWEN3_6, write

SCRIPT = "import os, {package}; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that torch is asked for, in an environment that asks for nothing."""
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    for name in ASKED:
        monkeypatch.delenv(name, raising=False)
    return found


def command(*words: object) -> None:
    parser = Parser("x", "y")
    parser.add_model()
    with pytest.raises(SystemExit):
        run(parser, lambda args: 0, [*map(str, words)])


def test_a_small_checkpoint_gets_one_thread(tmp_path: Path, asked: list[int]) -> None:
    write(tmp_path, "0.8B", QWEN3_6)
    command()
    command(tmp_path)
    assert asked == [1, 1]


@pytest.mark.parametrize("name", ASKED)
def test_the_environment_wins(name: str, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    command()
    assert asked == []


def test_the_option_wins_over_both(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASKED[0], "2")
    command("--threads", 3)
    assert asked == [3]


@pytest.mark.parametrize(
    ("config", "small"),
    [
        ({"hidden_size": 1023}, True), ({"hidden_size": 1024}, False),
        ({"text_config": {"hidden_size": 64}, "hidden_size": 4096}, True),
        ({"hidden_size": "many"}, False), ({"hidden_size": None}, False), ({}, False),
        ([], False), ({"text_config": 3}, False), ({"hidden_size": float("inf")}, False),
    ],
)  # fmt: skip
def test_the_hidden_size_decides(
    tmp_path: Path, config: object, small: bool, asked: list[int]
) -> None:
    """A config that cannot be read is left to the loader, which says what is wrong with it."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_small(str(tmp_path)) == small
    command(tmp_path)
    assert asked == ([1] if small else [])


def test_what_is_no_folder_counts_as_large(asked: list[int]) -> None:
    command("owner/name")
    command("a\0b")
    assert asked == []


@pytest.mark.parametrize("package", ["qwen35", "tools", "tools.diff"])
@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_go_to_sleep_soon_unless_the_user_has_chosen(
    package: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(package=package)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == [expected]


@pytest.mark.parametrize("module", ["qwen35.generate", "tools.diff", "tools.bench.__main__"])
def test_it_is_set_before_torch_is_imported(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """libgomp reads its variables once."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    script = (
        "import importlib, os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            sys.exit(0 if os.environ.get('GOMP_SPINCOUNT') == '1000' else 3)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"importlib.import_module({module!r})\n"
        "sys.exit(4)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_prefix_cache_keeps_numbers_of_threads_apart() -> None:
    """Two threads do not take over what one thread computed, because their bits may differ."""
    model, store = load(TINY), Memory()
    ids, found = list(range(70)), list[int]()
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        try:
            kept = PrefixCache(model, budget=1 << 30, store=store)
            result = Generation(model, ids, 2, Sampling(), frozenset(), 0, prefix_cache=kept)
            assert len(list(result)) == 2
        finally:
            torch.set_num_threads(1)
        found.append(result.cached_tokens)
    assert found == [0, 0, 64, 64]


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("number", ["1025", "100000,2", "9" * 5000])
def test_an_environment_that_asks_for_too_many_is_refused(
    name: str, number: str, asked: list[int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """torch's thread pool would end the process, as with `--threads`, which wins."""
    monkeypatch.setenv(name, number)
    command()
    first = number.partition(",")[0]
    assert f"{name} = {first[:900]}" in (err := capsys.readouterr().err)
    assert "at most 1,024" in err and err.count("\n") == 1
    command("--threads", 2)
    assert asked == [2]
