"""Where a prompt's snapshots lie."""

import pytest

from qwen35.load import load
from qwen35.prefix.cache import PrefixCache, interval_of


@pytest.mark.parametrize(
    ("chunk", "stops"),
    [
        (64, [2048, 4096, 6144, 8192, 8960]),
        (2048, [2048, 4096, 6144, 8192, 8960]),
        (4096, [4096, 8192, 8960]),
        (16384, [8960]),
    ],
)
def test_a_snapshot_does_not_cut_a_pass(chunk: int, stops: list[int]) -> None:
    """At least 2,048 tokens lie between two of them, and a chunk where that is longer."""
    kept = PrefixCache(load("tiny"), budget=1 << 40, interval=interval_of(chunk))
    assert kept.begin([7] * 9000, draft=True).stops == stops
