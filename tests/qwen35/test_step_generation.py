"""Generations on the fast path, over a model whose numbers are exact (tests/support/coded_model.py): the
prompt's passes and the rounds in one memory, and what is told and kept of them."""

import time
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fast.step import Step, is_fast
from qwen35 import generation, step_decoder
from qwen35.errors import InputError
from qwen35.generation import AT_ONCE, Generation
from qwen35.prefix.cache import PrefixCache
from qwen35.sampling import Sampling
from qwen35.step_decoder import KEPT
from tests.qwen35.test_step_rounds import SAMPLINGS, numbers, text
from tests.support.coded_model import CodedModule, compute_by_torch

TARGET = "gfx950"


@pytest.fixture(autouse=True)
def on_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_by_torch(monkeypatch)
    monkeypatch.setattr(step_decoder, "CAPACITY", 16)
    for module in (generation, step_decoder):
        monkeypatch.setattr(module, "runs_as_step", is_fast)


def coded(context: int = 4096) -> Any:
    return CodedModule(TARGET, context)


def generated(
    model: Any, ids: list[int], count: int, depth: int, sampling: Sampling, **settings: Any
) -> Generation:
    return Generation(model, ids, count, sampling, frozenset(), depth, **settings)


@pytest.mark.parametrize("name", ["greedy", "few ids", "drawn"])
@pytest.mark.parametrize("length", [1, 30, 64, 150])
@pytest.mark.parametrize("depth", [0, 3])
def test_a_text_and_its_figures(
    depth: int, length: int, name: str, monkeypatch: pytest.MonkeyPatch
):
    """The whole blocks of a prompt, then its tail, and rounds."""
    sampling, ids, told = SAMPLINGS[name], numbers(length), list[int]()
    prepare = Step.prepare

    def slow(step: Step) -> None:
        time.sleep(0.05)
        prepare(step)

    monkeypatch.setattr(Step, "prepare", slow)
    run = generated(
        coded(), ids, 12, depth, sampling, prefill_chunk=64, progress=told.append, digest=True
    )
    began = time.perf_counter()
    found = [*run]
    took = time.perf_counter() - began
    tokens, rows = text(ids, 12, sampling)
    assert run.token_ids == [token for token, _ in found] == tokens
    assert torch.equal(torch.stack([row for _, row in found]), torch.stack(rows))
    assert (run.path, run.finish_reason, run.cached_tokens) == ("fast", "length", 0)
    assert told == [64] * (length // 64) + [length % 64]
    assert 0.05 <= run.prepare_s < took and 0 < run.ttft_s < took - 0.05
    assert 0 < run.decode_s < took - run.prepare_s
    assert run.draft.tokens == 11 and len(run.draft.proposed) == depth


def test_penalties_count_the_prompt_and_the_text():
    """As on the reference's path, whose rounds penalize one token after the other."""
    sampling, ids = SAMPLINGS["drawn with penalties"], numbers(70)
    runs = [generated(coded(), ids, 20, depth, sampling) for depth in (0, 2)]
    texts = [[token for token, _ in run] for run in runs]
    assert texts[0] == texts[1] != text(ids, 20, Sampling(temperature=0.8, seed=6))[0]
    assert text([*ids, texts[0][0]], 19, sampling)[0] == texts[0][1:]


@pytest.mark.parametrize(("length", "limit", "depth", "room"), [
    (10, 5, 0, 5), (10, 5, 3, 5), (70, 9000, 1, AT_ONCE), (4090, 9000, 0, 6),
])  # fmt: skip
def test_memory_is_asked_for_the_text_or_its_beginning(
    length: int, limit: int, depth: int, room: int, monkeypatch: pytest.MonkeyPatch
):
    """Of the rest of the context."""
    asked: list[tuple[Any, ...]] = []

    def prepared(*given: Any) -> Any:
        asked.append(given)
        raise MemoryError

    monkeypatch.setattr(generation, "prepared", prepared)
    model = coded()
    with pytest.raises(MemoryError):
        next(iter(generated(model, numbers(length), limit, depth, SAMPLINGS["drawn"])))
    assert asked == [(model, length, depth, SAMPLINGS["drawn"], room)]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_prefix_is_kept_and_taken_over_in_the_memory_of_the_rounds(depth: int):
    model, ids = coded(), numbers(150)
    kept, told = PrefixCache(model, budget=1 << 30, interval=1), list[int]()
    runs = [
        generated(
            model, ids, 8, depth, Sampling(), prefill_chunk=64, prefix_cache=kept,
            progress=told.append,
        )
        for _ in range(2)
    ]  # fmt: skip
    texts = [[token for token, _ in run] for run in runs]
    assert texts == [text(ids, 8, Sampling())[0]] * 2
    assert [(run.cached_tokens, run.cache_reason) for run in runs] == [
        (0, "nothing is kept yet"), (128, "all whole blocks"),
    ]  # fmt: skip
    assert told == [0, 64, 64, 22, 128, 22]
    assert all(kept.store.is_free(key) for key in kept.store.segments())
    # A text that goes on behind the kept part.
    more = generated(model, [*ids[:140], 3, 4], 8, depth, Sampling(), prefix_cache=kept)
    assert [token for token, _ in more] == text([*ids[:140], 3, 4], 8, Sampling())[0]
    assert more.cached_tokens == 128


def test_a_generation_whose_memory_another_one_took_keeps_nothing():
    """It ends with a line: before its first token, behind it, and in its rounds."""
    model, ids = coded(), numbers(70)
    kept = PrefixCache(model, budget=1 << 30, interval=1)
    said = "another generation has begun on this model"

    def other() -> None:
        next(iter(generated(model, numbers(3), 8, 0, Sampling())))

    def interrupted(tokens: int) -> None:
        if tokens == 6:  # the tail
            other()

    during = generated(
        model, ids, 8, 0, Sampling(), prefill_chunk=64, prefix_cache=kept, progress=interrupted
    )
    with pytest.raises(InputError, match=said):
        next(iter(during))
    assert not kept.store.segments()
    behind = iter(generated(model, ids, 8, 0, Sampling(), prefix_cache=kept))
    next(behind)
    other()
    with pytest.raises(InputError, match=said):
        next(behind)
    assert not kept.store.segments()
    later = iter(generated(model, ids, 8, 0, Sampling()))
    next(later), next(later)
    other()
    with pytest.raises(InputError, match=said):
        next(later)


def test_a_generation_begins_anew_in_the_same_memory():
    model = coded()
    first = generated(model, numbers(64), 6, 1, Sampling())
    assert [token for token, _ in first] == text(numbers(64), 6, Sampling())[0]
    rounds = model.__dict__[KEPT]
    again = generated(model, numbers(20), 6, 1, Sampling())
    assert [token for token, _ in again] == text(numbers(20), 6, Sampling())[0]
    assert model.__dict__[KEPT] is rounds and rounds.turn == 2


def test_a_stop_token_and_the_end_of_the_context_end_a_text():
    ids = numbers(70)
    tokens = text(ids, 12, Sampling())[0]
    for depth in (0, 3):
        stop = frozenset([tokens[5]])
        run = Generation(coded(), ids, 12, Sampling(), stop, depth)
        assert [token for token, _ in run] == tokens[: tokens.index(tokens[5]) + 1]
        assert run.finish_reason == "stop"
        run = generated(coded(context=75), ids, 12, depth, Sampling())
        assert [token for token, _ in run] == tokens[:5] and run.finish_reason == "length"


def test_the_logits_of_a_prompt_are_checked():
    model = coded()
    model.lm_head.weight[3] = torch.nan
    found: list[list[int]] = []

    def origin(ids: list[int]) -> str:
        found.append(ids)
        return "found"

    run: Any = generated(model, numbers(70), 6, 0, Sampling())
    run._origin = origin
    with pytest.raises(InputError) as caught:
        list(run)
    assert str(caught.value) == "position 70: the logits are NaN or infinite; found"
    assert found == [numbers(70)]


def test_the_chunk_of_the_path_is_taken(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, str]] = []

    def chosen(model: Any, path: str) -> int:
        asked.append((model, path))
        return 128

    monkeypatch.setattr(generation, "chosen_chunk", chosen)
    model, told = coded(), list[int]()
    next(iter(generated(model, numbers(200), 2, 0, Sampling(), progress=told.append)))
    assert asked == [(model, "fast")] and told == [128, 64, 8]
