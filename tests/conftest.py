"""Set-up of every test process."""

import gc
from collections.abc import Iterator

import pytest
import torch

from qwen35 import progress

# pytest runs one process a core (pyproject.toml): more threads than that only wait for each other.
torch.set_num_threads(1)

# What a test reads from standard error does not depend on how busy the machine is.
progress.EVERY = 1e6


@pytest.fixture(autouse=True, scope="module")
def settled() -> Iterator[None]:
    """What the modules before have left in caches, millions of objects, is not searched for garbage again
    and again."""
    gc.collect()
    gc.freeze()
    yield
