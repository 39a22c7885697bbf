"""A prompt's passes over a step's own state as gfx950 code in the emulator, beside the reference."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fast import graph, prompt
from fast.launch import Work
from fast.prefill import layer as prefill_layer
from fast.state import State
from fast.step import FEW, Step, is_fast
from qwen35 import generation, step_decoder
from qwen35.cache import Cache
from qwen35.errors import InputError
from qwen35.generation import Generation, prefill
from qwen35.load import load
from qwen35.prefix.cache import PrefixCache
from qwen35.sampling import Sampling
from qwen35.step_decoder import GraphPasses, Passes
from qwen35.tokenizer import Tokenizer
from reference.linear import GRID
from reference.model import Model
from tests.fast.test_step import rounds, with_fast_layers
from tests.support.prefill_nodes import Poisoned
from tools.gfx950.target import emulate

TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; "
    "and darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters."
)
WHOLE, TAIL = 64, FEW + 1


def cut(model: Model) -> Model:
    """The embedded model with one layer of each kind."""
    model.layers = model.layers[2:4]
    kinds = model.config.layer_types[2:4]
    model.config = replace(model.config, num_hidden_layers=2, layer_types=kinds)
    return model


@pytest.fixture(scope="module")
def slow() -> Model:
    return cut(load("tiny"))


@pytest.fixture(scope="module")
def quick(slow: Model) -> Model:
    return with_fast_layers(slow)


@pytest.fixture(scope="module")
def ids(slow: Model) -> list[int]:
    assert slow.folder is not None
    found = Tokenizer(slow.folder).encode(TEXT + " " + TEXT)[: WHOLE + TAIL]
    assert len(found) == WHOLE + TAIL
    return found


def emulated_run(work: Iterable[Work], device: torch.device) -> None:
    emulate(work)


@pytest.fixture(autouse=True)
def in_the_emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every pass, with buffers that hold NaN and invalid indices at first, and one room for all."""
    for module in (graph, prefill_layer):
        monkeypatch.setattr(module, "run", emulated_run)
    monkeypatch.setattr("fast.mtp.run", emulated_run)
    monkeypatch.setattr(prompt, "Scratch", Poisoned)
    monkeypatch.setattr(prompt, "ROOMS", (128,))
    with torch.inference_mode():
        yield


def passes(step: Step) -> GraphPasses:
    assert step.prompt is not None
    return GraphPasses(step.model, step.prompt)


def content(state: State, slow: Model) -> dict[str, Tensor]:
    cache = slow.new_cache()
    state.give(cache)
    return cache.snapshot(mtp=state.mtp is not None)


def test_a_prompt_in_the_steps_memory_and_the_rounds_behind_it(
    slow: Model, quick: Model, ids: list[int]
):
    """A whole block, then a tail, each in a pass with room for twice as many rows."""
    step = Step(quick, 128, 3)
    cache = step.state.cache(slow.config)
    hidden = prefill(quick, ids[:WHOLE], cache, chunk=64, draft=True, passes=passes(step))
    step.take(cache)
    found = step.extend(ids[WHOLE:], hidden[0, 0])
    assert step.length == len(ids)
    exact = cut(load("tiny", dtype=torch.float64))
    truth = prefill(exact, ids, exact.new_cache(), chunk=64, draft=False)[0, 0]
    own = slow.new_cache()
    yardstick = prefill(slow, ids, own, chunk=64, draft=True)
    assert (found.double() - truth).norm() <= 2 * (yardstick[0, 0].double() - truth).norm()
    held = content(step.state, slow)
    for name, tensor in own.snapshot().items():
        assert held[name].shape == tensor.shape
        assert (held[name].float() - tensor.float()).norm() <= 0.05 * tensor.float().norm(), name
    token = int(slow.lm_head(found[None, None])[0, 0].argmax())
    step.begin(token, found)
    text = [t for part in rounds(step, 2) for t in part]
    result = Generation(slow, ids, 1 + len(text), Sampling(), frozenset(), 0)
    assert [token, *text] == [t for t, _ in result]


def test_a_prompt_without_a_whole_block(slow: Model, quick: Model, ids: list[int]):
    """The MTP head has no row for its first token, which no hidden state precedes."""
    step, own = Step(quick, 64, 1), slow.new_cache()
    step.take(step.state.cache(slow.config))
    found = step.extend(ids[: FEW + 1], None)
    by_reference = prefill(slow, ids[: FEW + 1], own, chunk=64, draft=True)[0, 0]
    assert (found - by_reference).norm() <= 0.05 * by_reference.norm()
    held = content(step.state, slow)
    for name, tensor in own.snapshot().items():
        assert held[name].shape == tensor.shape
        assert (held[name].float() - tensor.float()).norm() <= 0.05 * tensor.float().norm(), name


def test_a_pass_with_more_room_than_rows_has_the_bits_of_a_pass_by_the_model(
    slow: Model, quick: Model, ids: list[int]
):
    """Also in the memory that a longer prompt used before."""
    step = Step(quick, 192, 1)
    prefill(
        quick, ids[::-1] + ids[:39], step.state.cache(slow.config), chunk=64, draft=True,
        passes=passes(step),
    )  # fmt: skip
    cache = step.state.cache(slow.config)
    hidden = prefill(quick, ids[:WHOLE], cache, chunk=64, draft=True, passes=passes(step))
    plain = slow.new_cache()
    by_model = prefill(quick, ids[:WHOLE], plain, chunk=64, draft=True, passes=Passes(quick))
    assert torch.equal(hidden, by_model)
    assert cache.length == plain.length == WHOLE
    mine = cache.snapshot()
    for name, tensor in plain.snapshot().items():
        assert torch.equal(mine[name], tensor), name


def test_a_pass_of_more_rows_than_all_rooms_runs_by_the_model_in_the_same_memory(
    slow: Model, quick: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Then a captured pass continues it."""
    for module in (prompt, step_decoder):
        monkeypatch.setattr(module, "ROOMS", (64,))
    step, text = Step(quick, 192, 0), ids + ids
    cache, plain = step.state.cache(slow.config), slow.new_cache()
    asked: list[int] = []
    by_model = Model.forward

    def noted(model: Model, ids: Tensor, cache: Cache) -> Tensor:
        asked.append(ids.shape[1])
        return by_model(model, ids, cache)

    monkeypatch.setattr(Model, "forward", noted)
    settings: Any = {"chunk": 128, "draft": False}
    hidden = prefill(quick, text[:128], cache, **settings, passes=passes(step))
    hidden = prefill(quick, text[:160], cache, **settings, hidden=hidden, passes=passes(step))
    assert asked == [128]
    by_itself = prefill(quick, text[:160], plain, **settings, passes=Passes(quick))
    assert torch.equal(hidden, by_itself)
    step.take(cache)
    mine = content(step.state, slow)
    for name, tensor in plain.snapshot(mtp=False).items():
        assert torch.equal(mine[name], tensor), name


def test_a_generation_whose_prompt_and_rounds_share_their_memory(
    slow: Model, quick: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Without a prefix cache, with an empty one, and with a hit: the same tokens and logits."""
    for module in (generation, step_decoder):
        monkeypatch.setattr(module, "runs_as_step", is_fast)
    monkeypatch.setattr("fast.step.run", emulated_run)
    kept = PrefixCache(quick, budget=1 << 40)
    found: list[Generation] = []
    for cache in (None, kept, kept):
        one = Generation(
            quick, ids, 3, Sampling(), frozenset(), 0, GRID, prefix_cache=cache, digest=True
        )
        assert len([*one]) == 3 and one.path == "fast"
        found.append(one)
    assert [one.cached_tokens for one in found] == [0, 0, WHOLE]
    assert len({(*one.token_ids, one.logits_sha256) for one in found}) == 1
    result = Generation(slow, ids, 3, Sampling(), frozenset(), 0)
    assert [token for token, _ in result] == found[0].token_ids


def test_a_generation_that_another_one_has_overwritten_ends(
    slow: Model, quick: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch
):
    """With a line, in its rounds as well as before its prompt would be kept."""
    for module in (generation, step_decoder):
        monkeypatch.setattr(module, "runs_as_step", is_fast)
    monkeypatch.setattr("fast.step.run", emulated_run)
    kept = PrefixCache(quick, budget=1 << 40)
    # The third one's rounds have other settings, and so another memory.
    first, second, third = (
        iter(Generation(quick, ids[:count], 9, one, frozenset(), 0, prefix_cache=cache))
        for count, cache, one in (
            (WHOLE, kept, Sampling()),
            (3, None, Sampling()),
            (4, None, Sampling(temperature=1.0)),
        )
    )
    next(first), next(second)
    said = "another generation has begun on this model"
    with pytest.raises(InputError, match=said):
        next(first)
    assert not kept.store.segments()
    next(second), next(third)
    with pytest.raises(InputError, match=said):
        next(second)
    next(third)


def test_a_snapshot_stays_as_it_is_when_the_next_pass_runs(
    slow: Model, quick: Model, ids: list[int]
):
    step = Step(quick, 192, 0)
    cache = step.state.cache(slow.config)
    kept: list[dict[str, Tensor]] = []
    run = passes(step)
    run.trunk(ids[:WHOLE], cache)
    kept = [cache.snapshot(mtp=False), _copied(cache)]
    run.trunk(ids[:WHOLE], cache)
    for name, tensor in kept[1].items():
        assert torch.equal(kept[0][name], tensor), name
        if name.endswith("recurrent"):
            assert not torch.equal(cache.snapshot(mtp=False)[name], tensor)


def _copied(cache: Cache) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in cache.snapshot(mtp=False).items()}


def test_a_prompt_that_continues_a_kept_one_in_the_steps_memory(
    slow: Model, quick: Model, ids: list[int]
):
    """As after a hit of the prefix cache: the kept tensors are copied into the memory."""
    step = Step(quick, 192, 0)
    run = passes(step)
    cache = step.state.cache(slow.config)
    run.trunk(ids[:WHOLE], cache)
    kept = _copied(cache)
    whole = run.trunk(ids[:WHOLE], cache).clone()
    again = step.state.cache(slow.config)
    again.restore([kept], WHOLE, mtp=False)
    assert again.length == WHOLE
    assert torch.equal(run.trunk(ids[:WHOLE], again), whole)
