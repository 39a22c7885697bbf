"""Set-up of the fast path's tests."""

from collections.abc import Iterator

import pytest
import torch

from fast import configs

# Blocks for the sizes of tests, on gfx950. With those for thousands of columns no loop would go round
# twice, and no sum would have two parts.
SMALL = {
    "linear": {"BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 1, "num_stages": 2},
    "route": {"BLOCK_N": 16, "BLOCK_K": 128, "SPLITS": 2, "num_warps": 4, "num_stages": 2},
    "attend": {"GROUP": 4, "TILE": 32, "num_warps": 4, "num_stages": 1},
    "attend_fp8": {"GROUP": 4, "TILE": 32, "num_warps": 4, "num_stages": 1},
    "combine": {"MANY": 16, "WIDTH": 64, "num_warps": 4},
}
SMALL_EXPERTS = {
    "gate_up": {"BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 2},
    "down": {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file whose tests need the blocks that are shipped has a fixture of this name of its own."""
    monkeypatch.setitem(configs.USUAL, "gfx950", configs.USUAL["gfx950"] | SMALL)
    for kernel, config in SMALL_EXPERTS.items():
        monkeypatch.setitem(configs.table()["gfx950"][kernel], "D=4096 I=128", config)
    lookup = configs.lookup  # a test may replace it
    lookup.cache_clear()
    yield
    lookup.cache_clear()
