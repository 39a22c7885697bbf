"""A pytest plugin for `tools.mutate`, which makes each of its short runs shorter.

The tests that take the shortest come first, since a mutant dies at the first test that fails. What
torch imports at the first comparison is imported once, in the process from which those of the
mutants are forked.
"""

import gc
import json
from pathlib import Path

import pytest
import torch.distributed.tensor  # noqa: F401

DURATIONS = Path("mutmut-stats.json")  # mutmut's, of the unchanged code


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DURATIONS.exists():
        seconds = json.loads(DURATIONS.read_text(encoding="utf-8"))["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))


def pytest_collection_finish() -> None:
    gc.freeze()  # nothing that is there before the tests is searched for garbage
