"""A pytest plugin for `tools.mutate`, which makes each of its short runs shorter.

The tests that take the shortest come first, since a mutant dies at the first test that fails. What
torch imports at the first comparison is imported once, in the process from which those of the
mutants are forked.

The emulator makes its tables of instructions while its modules are imported, which is before a mutant is
chosen. So these are loaded again before each of its test functions.
"""

import gc
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch.distributed.tensor  # noqa: F401

DURATIONS = Path("mutmut-stats.json")  # mutmut's, of the unchanged code
EMULATOR = "tools.gfx950."
TABLES = ("vector", "vector_ops", "vector_converts", "scalar", "access")  # after what they import

remade: set[str] = set()  # test functions before which the tables have been made again


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DURATIONS.exists():
        seconds = json.loads(DURATIONS.read_text(encoding="utf-8"))["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))


def pytest_collection_finish() -> None:
    gc.freeze()  # nothing that is there before the tests is searched for garbage


def pytest_runtest_setup(item: pytest.Item) -> None:
    function = item.nodeid.partition("[")[0]
    if "gfx950" not in item.path.parts or function in remade:
        return
    remade.add(function)
    for name in TABLES:
        if module := sys.modules.get(f"{EMULATOR}{name}"):
            importlib.reload(module)
