"""The budget to the byte, in memory and in a folder: where it is met exactly, where a segment is larger
than all of it, and where one is replaced or continued."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pytest
import torch

from qwen35.generation import prefill
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import Folder
from qwen35.prefix.keys import identity
from qwen35.prefix.store import Memory, Store
from reference.linear import GRID
from tests.support.prefix_machine import block, small

A, B, C = ([*block(letter)] for letter in (0, 1, 2))
EMPTY: list[int] = []


class Size(NamedTuple):
    """The bytes that a segment counts once it is there, and before: of a file that is not yet written
    only a bound is known."""

    there: int
    coming: int


@dataclass
class Kept:
    """A prefix cache, whose budget a test sets, and the lines that it gave."""

    store: Store
    empty: Callable[[], Store]
    lines: list[str] = field(default_factory=list)
    budget: int = 1 << 30

    def keep(self, ids: list[int], *, draft: bool = False) -> None:
        """Run a prompt of whole blocks; its segments are used from now on, if they are kept."""
        cache = PrefixCache(
            small(0), budget=self.budget, interval=100, store=self.store, warn=self.lines.append
        )
        prompt = [*ids, 1]
        with torch.inference_mode():
            reuse, own = cache.begin(prompt, draft=draft), small(0).new_cache()
            hidden = cache.restore(reuse, own, room=len(prompt), draft=draft)
            prefill(
                small(0), prompt, own, chunk=4 * GRID, draft=draft, hidden=hidden, stops=reuse.stops,
                at_stop=lambda end, h: cache.keep(reuse, own, h, end, draft=draft),
            )  # fmt: skip
            cache.finish(reuse, prompt)
        counted = sum(map(self.store.size, self.store.segments().values()))
        assert self.used() == counted <= self.budget

    def used(self) -> int:
        """The bytes that are there, counted anew."""
        if isinstance(self.store, Folder):
            return sum(file.stat().st_size for file in self.store.folder.iterdir())
        assert isinstance(self.store, Memory)
        return sum(t.nbytes for _, tensors in self.store.held.values() for t in tensors.values())

    def size(self, ids: list[int], *, draft: bool = False, behind: list[int] = EMPTY) -> "Size":
        """The bytes of a prompt's segment behind another one, in an empty store that has room."""
        other = Kept(self.empty(), self.empty)
        if behind:
            other.keep(behind)
        other.keep(behind + ids, draft=draft)
        *_, segment = sorted(other.store.segments().values(), key=lambda found: found.end)
        tensors = other.store.read(segment)
        assert tensors is not None and segment.first == len(behind)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return Size(other.store.size(segment), other.store.size(replace(segment, nbytes=nbytes)))

    def holds(self, ids: list[int], *, draft: bool = False) -> bool:
        """Return whether the store has all of a prompt."""
        cache = PrefixCache(small(0), budget=self.budget, store=self.store)
        reuse = cache.begin(ids, draft=draft)
        cache.release(reuse)
        return reuse.length == len(ids)


@pytest.fixture(params=["memory", "folder"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    def empty() -> Store:
        if request.param == "memory":
            return Memory()
        return Folder(tmp_path_factory.mktemp("kept"), identity(small(0), ""))

    return Kept(empty(), empty)


@pytest.mark.parametrize("less", [0, 1])
def test_met_exactly(kept: Kept, less: int) -> None:
    """Two segments that fill it stay; with one byte less, the older one goes."""
    kept.budget = kept.size(A).there + kept.size(B).coming - less
    kept.keep(A)
    kept.keep(B)
    assert (kept.holds(A), kept.holds(B)) == (not less, True)


@pytest.mark.parametrize("less", [0, 1])
def test_a_single_segment(kept: Kept, less: int) -> None:
    """One that is larger than all of it is not kept, with a line, and drives nothing out."""
    size = kept.size(B + C).coming
    kept.budget = size - less
    kept.keep(A)
    kept.keep(B + C)
    assert (kept.holds(A), kept.holds(B + C)) == (bool(less), not less)
    said = f"2 blocks and their snapshot take {size:,}"
    assert [line.partition(" bytes")[0] for line in kept.lines] == [said] * less


@pytest.mark.parametrize("less", [0, 1])
def test_replaced_by_a_larger_one(kept: Kept, less: int) -> None:
    """The new segment has the drafting head's keys. The one that it replaces does not count,
    another one does."""
    assert kept.size(A).there < kept.size(A, draft=True).there
    kept.budget = kept.size(B).there + kept.size(A, draft=True).coming - less
    kept.keep(A)
    kept.keep(B)
    assert kept.holds(A) and not kept.holds(A, draft=True) and kept.holds(B)
    kept.keep(A, draft=True)
    assert (kept.holds(A, draft=True), kept.holds(B)) == (True, not less)
    assert kept.lines == []


def test_replaced_by_one_that_is_larger_than_all(kept: Kept) -> None:
    """The segment that was there stays."""
    kept.budget = kept.size(A, draft=True).coming - 1
    kept.keep(A)
    kept.keep(A, draft=True)
    assert kept.holds(A) and not kept.holds(A, draft=True)
    assert len(kept.lines) == 1


@pytest.mark.parametrize("less", [0, 1])
def test_continued(kept: Kept, less: int) -> None:
    """A prompt's second block, whose first is in use and cannot make room for it."""
    kept.budget = kept.size(A).there + kept.size(B, behind=A).coming - less
    kept.keep(A)
    kept.keep(A + B)
    assert kept.holds(A) and kept.holds(A + B) == (not less)
    assert kept.lines == ["not all is kept: what fills the budget is in use"] * less


@pytest.mark.parametrize("less", [0, 1])
def test_continued_beside_another(kept: Kept, less: int) -> None:
    """The other one goes, although it was kept later than the first block of the chain."""
    kept.budget = kept.size(A).there + kept.size(C).there + kept.size(B, behind=A).coming - less
    kept.keep(A)
    kept.keep(C)
    kept.keep(A + B)
    assert (kept.holds(A + B), kept.holds(C)) == (True, not less)


@pytest.mark.parametrize("less", [0, 1])
def test_a_budget_that_is_smaller_than_before(kept: Kept, less: int) -> None:
    """The next segment evicts as many as it has to, the oldest first, and not one more."""
    for ids in (A, B, C):
        kept.keep(ids)
    kept.budget = kept.size(C).there + kept.size(A, draft=True).coming - less
    kept.keep(A, draft=True)
    found = [kept.holds(A, draft=True), kept.holds(B), kept.holds(C)]
    assert found == [True, False, not less]
