"""The prefix cache of ranks: all take over the same tokens, whatever each of them still has."""

from pathlib import Path

import pytest

from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.parallel.ranks import Ranks
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import Folder
from qwen35.prefix.keys import identity
from qwen35.prefix.store import Memory
from qwen35.sampling import Sampling
from reference.model import Model
from tests.support.ranks import on_threads
from tools.exact import prompt_of

PROMPT = prompt_of(200, 2000)
AMPLE = 1 << 40


def continued(model: Model, kept: PrefixCache | None) -> Generation:
    text = Generation(model, PROMPT, 5, Sampling(), frozenset(), 2, 64, kept, True)
    for _ in text:
        pass
    return text


@pytest.mark.parametrize(
    ("held", "expected"),
    [((192, 128), 128), ((64, 192), 64), ((192, 0), 0)],
)
def test_all_take_the_longest_that_all_have(held: tuple[int, int], expected: int) -> None:
    """One rank lacks the last segments; what is computed anew is kept on each."""

    def work(ranks: Ranks) -> list[tuple[int, str, str]]:
        model = load(TINY, ranks=ranks)
        store = Memory()
        kept = PrefixCache(model, budget=AMPLE, interval=1, store=store)
        first = continued(model, kept)
        segments = store.held.items()
        store.held = {key: own for key, own in segments if own[0].end <= held[ranks.rank]}
        texts = [first, continued(model, kept), continued(model, kept), continued(model, None)]
        return [(text.cached_tokens, text.cache_reason, text.logits_sha256) for text in texts]

    for rank, (first, second, third, alone) in enumerate(on_threads(2, work)):
        assert (first[0], second[0], third[0]) == (0, expected, 192)
        assert first[2] == second[2] == third[2] == alone[2]
        if held[rank] > expected:
            assert second[1] == f"{held[rank]} tokens are kept on rank {rank}, fewer on another"


def test_segments_of_other_lengths_on_a_rank() -> None:
    """A hit ends where a segment ends on every rank, not at the shorter of two longest hits."""

    def work(ranks: Ranks) -> tuple[int, str]:
        model = load(TINY, ranks=ranks)
        store = Memory()
        continued(model, PrefixCache(model, budget=AMPLE, interval=1, store=store))
        if ranks.rank:  # of 64, 128 and 192, as if it had been written in other steps
            middle = {key: own for key, own in store.held.items() if own[0].end != 128}
            store.held = {key: own for key, own in middle.items() if own[0].end == 64}
        else:
            store.held = {key: own for key, own in store.held.items() if own[0].end <= 128}
        text = continued(model, PrefixCache(model, budget=AMPLE, store=store))
        return text.cached_tokens, text.logits_sha256

    first, second = on_threads(2, work)
    assert first == second and first[0] == 64


def test_a_folder_is_of_one_rank(tmp_path: Path) -> None:
    """Its keys are those of one rank of one size: another's are not found in it."""

    def work(ranks: Ranks) -> tuple[int, list[str]]:
        model = load(TINY, ranks=ranks)
        store = Folder(tmp_path / str(ranks.rank), identity(model, "x"))
        continued(model, PrefixCache(model, budget=AMPLE, store=store, checkpoint="x"))
        other = Folder(tmp_path / str(1 - ranks.rank), identity(model, "x"))
        ranks.exchange(None)
        text = continued(model, PrefixCache(model, budget=AMPLE, store=other, checkpoint="x"))
        return text.cached_tokens, other.problems()

    for rank, (cached, problems) in enumerate(on_threads(2, work)):
        assert cached == 0
        named = f"part is 'rank {rank} of 2' here and 'rank {1 - rank} of 2' there"
        assert any(named in line for line in problems)
