"""The random lives of `support/prefix_machine.py`: whole code survives them, planted faults do not."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from qwen35.cache import Cache, DeltaState
from qwen35.generation import Generation
from qwen35.prefix import cache as prefix_cache
from qwen35.prefix import folder as prefix_files
from qwen35.prefix.cache import PrefixCache, Reuse
from qwen35.prefix.folder import Folder
from qwen35.prefix.store import Memory, Segment
from qwen35.speculative import Decoder
from tests.support.prefix_machine import InFolder, InMemory, Machine

STEPS, EXAMPLES = 50, 20


def life(machine: type[Machine], examples: int) -> None:
    """Raises what a step raises."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=STEPS, deadline=None, derandomize=True,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("machine", [InMemory, InFolder])
def test_a_long_life(machine: type[Machine]) -> None:
    """About 900 steps each."""
    life(machine, EXAMPLES)


# --- faults, each planted alone

Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, tuple[type[Machine], Plant]] = {}


def fault(machine: type[Machine]) -> Callable[[Plant], Plant]:
    """Register a fault, and the machine that has to find it."""

    def register(plant: Plant) -> Plant:
        FAULTS[plant.__name__] = machine, plant
        return plant

    return register


def changed_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Plant:
    """Change one of the tensors that `keep` notes."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        healthy = PrefixCache.keep

        def keep(self: PrefixCache, reuse: Reuse, *arguments: Any, **rest: Any) -> None:
            healthy(self, reuse, *arguments, **rest)
            _, tensors = reuse.kept[-1]
            if name in tensors:
                tensors[name] = change(tensors[name])

        patch.setattr(PrefixCache, "keep", keep)

    return plant


@fault(InMemory)
def conv_state_one_token_late(patch: pytest.MonkeyPatch) -> None:
    changed_tensor("layers.0.conv", lambda t: t.roll(1, 1))(patch)


@fault(InMemory)
def recurrent_state_of_another_head(patch: pytest.MonkeyPatch) -> None:
    changed_tensor("layers.0.recurrent", lambda t: t.roll(1, 1))(patch)


@fault(InMemory)
def hidden_state_forgotten(patch: pytest.MonkeyPatch) -> None:
    changed_tensor("hidden", torch.zeros_like)(patch)


@fault(InMemory)
def mtp_keys_one_row_off(patch: pytest.MonkeyPatch) -> None:
    changed_tensor("mtp.k", lambda t: t.roll(1, 2))(patch)


@fault(InMemory)
def conv_state_not_restored(patch: pytest.MonkeyPatch) -> None:
    healthy = PrefixCache.restore

    def restore(self: PrefixCache, reuse: Reuse, into: Cache, **rest: Any) -> Tensor | None:
        conv = into.layers[0].conv  # pyright: ignore
        hidden = healthy(self, reuse, into, **rest)
        into.layers[0].conv = conv  # pyright: ignore
        return hidden

    patch.setattr(PrefixCache, "restore", restore)


@fault(InMemory)
def snapshot_shared_with_a_run_that_writes_into_it(patch: pytest.MonkeyPatch) -> None:
    """Restored without a copy, into a run whose states change in place."""
    healthy = PrefixCache.restore

    def restore(self: PrefixCache, reuse: Reuse, into: Cache, **rest: Any) -> Tensor | None:
        hidden = healthy(self, reuse, into, **rest)
        if reuse.chain:
            into.layers[0].recurrent = reuse.chain[-1][1]["layers.0.recurrent"]  # pyright: ignore
        return hidden

    def advance(self: DeltaState, rows: Tensor, states: list[Tensor]) -> None:
        kept = self.conv.shape[1]
        self.rows, self.trail = (rows, [self.recurrent.clone(), *states])
        self.conv = rows[:, rows.shape[1] - kept :].clone()
        self.recurrent.copy_(states[-1])

    patch.setattr(PrefixCache, "restore", restore)
    patch.setattr(DeltaState, "advance", advance)


@fault(InMemory)
def an_answers_decode_state_published(patch: pytest.MonkeyPatch) -> None:
    """The state is kept at the end of a generation whose length is whole blocks."""
    healthy = Decoder.round

    def round(self: Decoder, limit: int) -> list[tuple[int, Tensor]]:
        picked = healthy(self, limit)
        published = LAST.get("cache")
        LAST["ids"] += [token for token, _ in picked]
        seen = LAST["ids"][: self.cache.length]
        if published is not None and len(seen) % 64 == 0:
            reuse = published.begin(seen, draft=False)
            if reuse.length < len(seen):
                published.keep(reuse, self.cache, self.fresh_hidden[:, -1:], len(seen), draft=False)
            published.finish(reuse, seen)
        return picked

    def begin(self: PrefixCache, *arguments: Any, **settings: Any) -> Reuse:
        LAST.update(cache=self)
        return real_begin(self, *arguments, **settings)

    def init(self: Decoder, model: Any, cache: Cache, *, token: int, **rest: Any) -> None:
        real_init(self, model, cache, token=token, **rest)
        LAST["ids"] = [*LAST["prompt"], token]

    def iterate(self: Generation) -> Any:
        LAST.update(prompt=self.prompt, cache=None)
        return real_iter(self)

    real_begin, real_init, real_iter = PrefixCache.begin, Decoder.__init__, Generation.__iter__
    LAST: dict[str, Any] = {"ids": []}
    patch.setattr(Decoder, "round", round)
    patch.setattr(Decoder, "__init__", init)
    patch.setattr(PrefixCache, "begin", begin)
    patch.setattr(Generation, "__iter__", iterate)


@fault(InMemory)
def mtp_keys_of_drafts_not_rolled_back(patch: pytest.MonkeyPatch) -> None:
    """Kept from a head that has gone on drafting: its last rows are guesses."""

    def plant(keys: Tensor) -> Tensor:
        return torch.cat((keys[:, :, :-1], keys[:, :, -2:-1]), 2) if keys.shape[2] > 1 else keys

    changed_tensor("mtp.k", plant)(patch)


@fault(InMemory)
def a_hash_without_its_parent(patch: pytest.MonkeyPatch) -> None:
    def chained(root: str, ids: list[int]) -> list[str]:
        whole = range(0, len(ids) // 64 * 64, 64)
        hashes = [hashlib.sha256(repr(ids[i : i + 64]).encode()).hexdigest() for i in whole]
        return [root, *hashes]

    patch.setattr(prefix_cache, "chained", chained)


@fault(InMemory)
def hashes_of_every_second_token(patch: pytest.MonkeyPatch) -> None:
    healthy = prefix_cache.chained
    patch.setattr(
        prefix_cache, "chained", lambda root, ids: healthy(root, [i - i % 2 for i in ids])
    )


@fault(InMemory)
def evicted_while_in_use(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Memory, "remove", lambda self, key: bool(self.held.pop(key, None)))


@fault(InFolder)
def evicted_while_another_process_uses_it(patch: pytest.MonkeyPatch) -> None:
    def remove(self: Folder, key: str) -> bool:
        self._path(key).unlink(missing_ok=True)
        return True

    patch.setattr(Folder, "remove", remove)


@fault(InMemory)
def parents_evicted_before_their_children(patch: pytest.MonkeyPatch) -> None:
    def make_room(self: PrefixCache, segment: Segment, there: Segment | None) -> bool:
        held = self.store.segments()
        total = sum(s.nbytes for s in held.values())
        for key in list(held):
            if total + segment.nbytes <= self.budget:
                return True
            if key != segment.key and self.store.remove(key):
                total -= held[key].nbytes
        return total + segment.nbytes <= self.budget

    patch.setattr(PrefixCache, "_make_room", make_room)


@fault(InMemory)
def snapshots_not_counted(patch: pytest.MonkeyPatch) -> None:
    healthy = Memory.size
    patch.setattr(Memory, "size", lambda self, segment: healthy(self, segment) - 20_000)


@fault(InMemory)
def never_let_go(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Memory, "unpin", lambda self, key: None)


@fault(InMemory)
def drafting_without_the_heads_keys(patch: pytest.MonkeyPatch) -> None:
    healthy = prefix_cache._way
    patch.setattr(
        prefix_cache, "_way", lambda held, key, hashes, draft: healthy(held, key, hashes, False)
    )


@fault(InFolder)
def another_checkpoints_entries_used(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefix_cache, "root_of", lambda identity: 64 * "0")


@fault(InFolder)
def bytes_not_checked(patch: pytest.MonkeyPatch) -> None:
    """The file says the right things about itself, and nobody computes its checksum."""
    patch.setattr(prefix_files, "checksum", lambda said, tensors: said.get("sha256", "written"))


@fault(InMemory)
def tail_taken_over_too(patch: pytest.MonkeyPatch) -> None:
    """A stop that is not on the grid: what follows starts in the middle of a chunk."""
    healthy = PrefixCache._begin

    def begin(self: PrefixCache, *arguments: Any) -> Reuse:
        reuse = healthy(self, *arguments)
        later = [stop - 7 for stop in reuse.stops if stop - 7 > reuse.length]
        reuse.stops = later or reuse.stops
        return reuse

    patch.setattr(PrefixCache, "_begin", begin)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, plant = FAULTS[name]
    plant(monkeypatch)
    try:
        life(machine, 5 * EXAMPLES)  # the first step that fails ends it
    except (AssertionError, KeyError, RuntimeError, IndexError):
        return
    pytest.fail(f"{name} lived through {5 * EXAMPLES * STEPS} steps")
