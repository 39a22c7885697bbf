"""What is kept from pass to pass, or from prompt to prompt, keeps no larger buffer alive.

A view of one row takes as much memory as the whole buffer that it is a row of.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen35.cache import Cache, DeltaState, KVCache
from qwen35.compare import diff as comparison
from qwen35.compare.diff import Side, diff
from qwen35.compare.trace import trace
from qwen35.generation import prefill
from qwen35.load import TINY, load
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import Folder
from qwen35.prefix.keys import identity
from qwen35.prefix.store import Memory, Store
from reference.linear import GRID, row_tile
from reference.model import Model
from reference.moe import Router
from tests.support.oracle import token_ids
from tests.support.prefix_machine import small


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each piece of memory that these tensors keep, by address."""
    memory = [tensor.untyped_storage() for tensor in tensors]
    return {piece.data_ptr(): piece.nbytes() for piece in memory if piece.nbytes()}


def larger(tensors: dict[str, Tensor]) -> list[str]:
    """The names of those that keep more memory than they have bytes."""
    return [name for name, t in tensors.items() if t.untyped_storage().nbytes() > t.nbytes]


def buffers(cache: Cache) -> list[Tensor]:
    """Everything that a cache's states hold."""
    found: list[Tensor] = []
    for state in (*cache.layers, cache.mtp):
        if isinstance(state, KVCache):
            found += state.buffers().values()
        elif isinstance(state, DeltaState):
            found += [state.conv, state.recurrent, *state.trail]
            found += [] if state.rows is None else [state.rows]
    return found


def prefilled(count: int, chunk: int = GRID) -> tuple[Model, Cache, Tensor]:
    model = small(0)
    cache = model.new_cache()
    ids = token_ids(count, model)[0].tolist()
    return model, cache, prefill(model, ids, cache, chunk=chunk, draft=True)


# --- states


@pytest.mark.parametrize("chunk", [GRID, 4 * GRID])
def test_the_states_after_a_prompt(chunk: int) -> None:
    """A pass of 4 blocks leaves no more behind than a pass of one."""
    _, cache, hidden = prefilled(4 * GRID + 9, chunk)
    assert larger({"hidden": hidden}) == []
    for state in cache.layers:
        if isinstance(state, DeltaState):
            assert state.rows is None and state.trail == []
            assert larger(state.tensors()) == []
        else:
            assert state.capacity < 2 * cache.length
            assert larger(state.buffers()) == []


@pytest.mark.parametrize("back", [0, 1, 3])
def test_the_states_after_a_decode_pass(back: int) -> None:
    """One row and one state a token are kept for going back, whatever was taken back."""
    model, cache, _ = prefilled(GRID + 9)
    for seed in range(2):
        model(token_ids(4, model, seed), cache)
        cache.rollback(back if seed else 0)
    (state,) = (layer for layer in cache.layers if isinstance(layer, DeltaState))
    _, taps, channels = state.conv.shape
    most = (taps + 4 + taps) * channels * state.conv.element_size() + 5 * state.recurrent.nbytes
    held = [state.conv, state.recurrent, *state.trail]
    assert sum(storages([*held, state.rows] if state.rows is not None else held).values()) <= most


def test_a_copy_has_memory_of_its_own_and_no_more() -> None:
    """The copied buffer has room to spare, and the copied states are parts of other tensors."""
    model, cache, _ = prefilled(GRID + 9)
    model(token_ids(4, model), cache)
    cache.rollback(2)
    cache.reserve(500)
    assert all(larger(state.tensors()) for state in cache.layers)
    theirs = storages(buffers(cache))
    for state in (*cache.layers, cache.mtp):
        assert state is not None
        copy = state.copy()
        assert larger(copy.tensors()) == []
        assert not storages(copy.tensors().values()).keys() & theirs.keys()


def test_a_snapshot_keeps_nothing_but_the_cache() -> None:
    """It is made of views of the cache's own buffers."""
    _, cache, _ = prefilled(GRID + 9)
    found = storages(cache.snapshot(first=GRID).values())
    assert found.items() <= storages(buffers(cache)).items()


# --- the prefix cache


@pytest.fixture(params=["memory", "folder"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> PrefixCache:
    model = small(0)
    store: Store = Memory()
    if request.param == "folder":
        store = Folder(tmp_path, identity(model, ""))
    return PrefixCache(model, budget=1 << 30, interval=1, store=store)


def warmed(kept: PrefixCache, ids: list[int]) -> tuple[Cache, Tensor, list[dict[str, Tensor]]]:
    """A prompt's prefill with the prefix cache; also what was noted to be kept, before it was."""
    cache, reuse = kept.model.new_cache(), kept.begin(ids, draft=True)
    before = kept.restore(reuse, cache, room=len(ids) + 1, draft=True)
    hidden = prefill(
        kept.model, ids, cache, chunk=2 * GRID, draft=True, hidden=before, stops=reuse.stops,
        at_stop=lambda end, h: kept.keep(reuse, cache, h, end, draft=True),
    )  # fmt: skip
    noted = [tensors for _, tensors in reuse.kept]
    kept.finish(reuse, ids)
    assert reuse.kept == reuse.chain == []
    return cache, hidden if before is None else before, noted


def test_what_is_kept_of_a_prompt_is_its_own(kept: PrefixCache) -> None:
    """Three segments, out of buffers with room for all of the prompt."""
    ids = token_ids(3 * GRID + 5, kept.model)[0].tolist()
    warmed(kept, ids)
    segments = kept.store.segments().values()
    assert len(segments) == 3
    for segment in segments:
        tensors = kept.store.read(segment)
        assert tensors is not None
        assert sum(t.nbytes for t in tensors.values()) <= kept.store.size(segment)
        if isinstance(kept.store, Memory):
            assert larger(tensors) == []
        else:  # one mapping of a file that holds nothing else
            (mapped,) = storages(tensors.values()).values()
            assert mapped <= kept.store.size(segment)


def test_what_is_noted_during_a_prefill_keeps_no_buffer_that_was_outgrown(
    kept: PrefixCache,
) -> None:
    ids = token_ids(3 * GRID + 5, kept.model)[0].tolist()
    cache, _, noted = warmed(kept, ids)
    theirs = storages(buffers(cache))
    for tensors in noted:
        views = {n: t for n, t in tensors.items() if t.untyped_storage().data_ptr() not in theirs}
        assert larger(views) == []
        assert views.keys() <= {"hidden", "layers.0.conv", "layers.0.recurrent"}


def test_what_is_taken_over_keeps_nothing_of_the_store(kept: PrefixCache) -> None:
    """Neither the segments in memory nor the mapped files."""
    ids = token_ids(3 * GRID + 5, kept.model)[0].tolist()
    warmed(kept, ids)
    cache, hidden, noted = warmed(kept, ids[: 2 * GRID + 3])
    assert noted == []
    assert larger({"hidden": hidden}) == []
    if isinstance(kept.store, Memory):
        held = [t for _, tensors in kept.store.held.values() for t in tensors.values()]
        assert not storages([*buffers(cache), hidden]).keys() & storages(held).keys()
    for state in cache.layers:
        own = state.buffers() if isinstance(state, KVCache) else state.tensors()
        assert larger(own) == []


# --- traces and comparisons


@pytest.mark.parametrize("count", [1, 3, 5, GRID + 6])
def test_a_trace_keeps_the_rows_of_a_product_and_no_more(count: int) -> None:
    """A product has 4 or a multiple of 64 rows, however many of them a pass needs; a router keeps the
    order of all its experts."""
    model = load(TINY)
    routers = {n: len(m.weight) for n, m in model.named_modules() if isinstance(m, Router)}
    assert routers
    ids = token_ids(count, model)[0].tolist()
    for name, tensor in trace(model, ids).items():
        rows = count - name.startswith("mtp")
        tile = row_tile(rows)
        most = tensor.nbytes // rows * -(-rows // tile) * tile
        if (node := name.rpartition(".")[0]) in routers:
            most = most // tensor.shape[-1] * routers[node]
        assert tensor.untyped_storage().nbytes() <= most, name


def test_a_comparison_keeps_the_outputs_of_its_passes_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are kept from stage to stage, with each node's state as it was before."""
    advance, call, seen = Side.advance, comparison.Call, set[str]()

    def advanced(self: Side, stage: str, outputs: list[Tensor]) -> None:
        advance(self, stage, outputs)
        held = {f"{name} {i}": t for name, of in self.outputs.items() for i, t in enumerate(of)}
        assert larger(held) == []
        seen.update(self.outputs)

    def called(given: tuple[object, ...], result: object = None) -> comparison.Call:
        for state in given:
            if isinstance(state, KVCache | DeltaState):
                assert larger(state.tensors()) == []
                seen.add(type(state).__name__)
        return call(given, result)

    monkeypatch.setattr(Side, "advance", advanced)
    monkeypatch.setattr(comparison, "Call", called)
    ids = list(range(GRID + 9))
    wanted = {"embed_tokens", "layers.0", "layers.3"}
    diff(TINY, ids, decode=2, stages=wanted.__contains__)
    assert seen == {"embed_tokens", "hidden", "KVCache", "DeltaState"}
