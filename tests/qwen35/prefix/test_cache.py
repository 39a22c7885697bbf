"""Where the snapshots of a prompt are, and the passes that they end."""

from itertools import accumulate

import pytest

from qwen35.generation import Generation
from qwen35.prefix.cache import PrefixCache
from qwen35.sampling import Sampling
from tests.support.prefix_machine import small


@pytest.mark.parametrize(
    ("chunk", "ends"),
    [
        (1024, [1024, 2048, 3072, 4032, 4090]),
        (2048, [2048, 4032, 4090]),
        (3072, [3072, 4032, 4090]),
        (4096, [4032, 4090]),
    ],
)
def test_snapshots_do_not_cut_the_passes_of_a_long_chunk(chunk: int, ends: list[int]) -> None:
    """A prompt of 4,090 tokens has the passes that it has without a cache."""
    model, prompt, seen = small(0), [7] * 4090, dict[bool, list[int]]()
    for is_cached in (False, True):
        kept = PrefixCache(model, budget=1 << 40) if is_cached else None
        passes = list[int]()
        result = Generation(
            model, prompt, 1, Sampling(), frozenset(), 0, chunk, kept, progress=passes.append
        )
        assert len(list(result)) == 1
        seen[is_cached] = [*accumulate(passes)]
    assert seen == {False: ends, True: [0, *ends]}


def test_an_interval_that_is_given_holds_for_any_chunk() -> None:
    kept = PrefixCache(small(0), budget=1 << 40, interval=2)
    for chunk in (64, 8192):
        assert kept.begin([7] * 330, draft=False, chunk=chunk).stops == [128, 256, 320]


def test_why_a_hit_ends() -> None:
    model, prompt = small(0), [7] * 130
    kept = PrefixCache(model, budget=1 << 40)

    def reason(ids: list[int], *, draft: bool = False) -> str:
        return kept.begin(ids, draft=draft).reason

    assert reason(prompt) == "nothing is kept yet"
    assert reason(prompt[:63]) == "no whole block of 64 tokens"
    [*_] = Generation(model, prompt, 1, Sampling(), frozenset(), 0, 64, kept)
    assert reason(prompt) == "all whole blocks"
    line = "128 tokens are kept, but without what drafting needs, or damaged"
    assert reason(prompt, draft=True) == line
    line = "64 tokens are kept, but the last delta-net states among them are at 0"
    assert reason(prompt[:64] + [8] * 64) == line
    assert reason([8] * 64) == "block 0, tokens 0 to 63, is not kept"
