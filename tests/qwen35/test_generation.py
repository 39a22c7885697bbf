"""Prefill and generation by themselves, most of it over a model that is a table."""

import hashlib
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35.errors import InputError
from qwen35.generation import AT_ONCE, Generation, prefill
from qwen35.logprobs import token_logprobs
from qwen35.prefix.cache import PrefixCache
from qwen35.sampling import Sampling
from tests.support.family import small_model
from tests.support.prefix_machine import small
from tests.support.table_model import (
    CPU,
    ROWS,
    VOCABULARY,
    Rows,
    Table,
    pairs,
    plain_text,
    wrong_at,
)

GREEDY = Sampling(vocab=VOCABULARY)
DRAWN = Sampling(
    temperature=1.5, repetition_penalty=1.3, presence_penalty=0.5, seed=4, vocab=VOCABULARY
)
PROMPT = [(7 * i + i // 5) % VOCABULARY for i in range(150)]


@pytest.mark.parametrize(("draft", "rows"), [(False, 0), (True, 69)])
def test_the_drafting_head_runs_only_where_drafts_are_wanted(draft: bool, rows: int) -> None:
    """It stays one token behind."""
    model = small_model("27B")
    cache = model.new_cache()
    with torch.inference_mode():
        hidden = prefill(model, [1] * 70, cache, chunk=64, draft=draft)
    assert cache.mtp is not None
    assert (cache.length, cache.mtp.length) == (70, rows)
    assert hidden.shape == (1, 1, 64)


# --- prefill


@pytest.mark.parametrize(
    ("length", "chunk", "stops", "passes"),
    [
        (150, 64, [], [64, 64, 22]),
        (150, 128, [], [128, 22]),
        (150, 128, [64], [64, 64, 22]),
        (128, 64, [128], [64, 64]),
        (63, 64, [], [63]),
        (1, 64, [], [1]),
    ],
)
@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_a_prompts_passes(
    length: int, chunk: int, stops: list[int], passes: list[int], default: str
) -> None:
    """They end on the grid and at stops. The MTP head has each token with the state of the one before
    it, up to the last. Ids are made on the model's device, whatever torch's default is."""
    model: Any = Table()
    cache: Any = Rows()
    ids, told, stopped = PROMPT[:length], [], []

    def at_stop(end: int, hidden: Tensor) -> None:
        assert cache.mtp.rows == pairs(ids, end)
        stopped.append((end, hidden.tolist()))

    with torch.device(default):
        hidden = prefill(
            model, ids, cache, chunk=chunk, draft=True, stops=stops, at_stop=at_stop,
            progress=told.append,
        )  # fmt: skip
    assert hidden.tolist() == [[[0, ids[-1], length - 1]]]
    assert (cache.rows, cache.mtp.rows) == (ids, pairs(ids, length))
    assert model.passes == told == passes
    assert stopped == [(end, [[[0, ids[end - 1], end - 1]]]) for end in stops]


@pytest.mark.parametrize("reused", [64, 128])
def test_a_prompt_goes_on_behind_what_the_cache_holds(reused: int) -> None:
    """The MTP head's next row needs the state of the last token that is there."""
    model: Any = Table()
    cache: Any = Rows()
    before = prefill(model, PROMPT[:reused], cache, chunk=64, draft=True)
    model.passes.clear()
    prefill(model, PROMPT, cache, chunk=128, draft=True, hidden=before)
    assert (cache.rows, cache.mtp.rows) == (PROMPT, pairs(PROMPT, len(PROMPT)))
    assert model.passes == ([64, 22] if reused == 64 else [22])


def test_an_empty_prompt_has_no_last_token() -> None:
    """`Generation` refuses it with a line of its own."""
    cache: Any = Rows()
    with pytest.raises(AssertionError, match=r"^a prompt has at least one token$"):
        prefill(Table(), [], cache, chunk=64, draft=False)  # pyright: ignore


# --- generation


def generation(
    model: Any, prompt: list[int], limit: int, *, depth: int = 0, stop: Any = (),
    sampling: Sampling = GREEDY, **options: Any,
) -> Generation:  # fmt: skip
    """With drafts of which some are wrong."""
    text, _ = plain_text(model, prompt, 60, sampling)
    wrong = range(len(prompt) + 4, len(prompt) + 60, 5)
    model.lm_head.guesses = wrong_at([*prompt, *text], wrong)
    return Generation(model, prompt, limit, sampling, frozenset(stop), depth, **options)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("depth", [0, 3, 5])
@pytest.mark.parametrize("limit", [1, 2, 9, 30])
def test_a_text_and_its_figures(limit: int, depth: int, sampling: Sampling) -> None:
    model: Any = Table()
    text, rows = plain_text(model, PROMPT, limit, sampling)
    told: list[int] = []
    run = generation(
        model, PROMPT, limit, depth=depth, sampling=sampling, prefill_chunk=64, digest=True,
        logprobs=2, progress=told.append,
    )  # fmt: skip
    began = time.perf_counter()
    found = [(token, logits.clone()) for token, logits in run]
    took = time.perf_counter() - began
    assert run.token_ids == [token for token, _ in found] == text
    assert torch.equal(torch.stack([logits for _, logits in found]), torch.stack(rows))
    assert run.finish_reason == "length"
    expected = b"".join(row.numpy().astype("<f4").tobytes() for row in rows)
    assert run.logits_sha256 == hashlib.sha256(expected).hexdigest()
    assert run.token_logprobs == [
        token_logprobs(row, token, 2, VOCABULARY) for row, token in zip(rows, text, strict=True)
    ]
    assert told == [64, 64, 22] and model.passes[:3] == told
    assert run.draft.tokens == limit - 1
    assert 0 < run.ttft_s < took and 0 < run.decode_s < took
    assert (run.prepare_s, run.cached_tokens, run.cache_reason) == (0, 0, "")
    (cache,) = model.new_caches
    assert cache.reserved == [len(PROMPT) + limit + depth]
    assert cache.mtp.rows[: len(PROMPT) - 1] == (pairs(PROMPT, len(PROMPT)) if depth else [])


def test_nothing_is_kept_that_was_not_asked_for() -> None:
    """Neither hashes nor log probabilities; a second run of the same object begins anew."""
    model: Any = Table()
    run = generation(model, PROMPT, 4)
    assert run.finish_reason == "interrupted"
    assert [token for token, _ in run] == [token for token, _ in run] == run.token_ids
    assert (len(run.token_ids), run.logits_sha256, run.token_logprobs) == (4, "", [])


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_stop_token_is_the_last_one(at: int, depth: int) -> None:
    model: Any = Table()
    text, _ = plain_text(model, PROMPT, 20, GREEDY)
    run = generation(model, PROMPT, 20, depth=depth, stop=[text[at]])
    assert [token for token, _ in run] == text[: text.index(text[at]) + 1]
    assert run.finish_reason == "stop"


@pytest.mark.parametrize("depth", [0, 3])
def test_the_context_is_used_to_its_end(depth: int) -> None:
    model: Any = Table(context=len(PROMPT) + 7)
    run = generation(model, PROMPT, 20, depth=depth)
    assert len(list(run)) == 7 and run.finish_reason == "length"


@pytest.mark.parametrize(("depth", "rows"), [(0, 0), (1, len(PROMPT) - 1)])
def test_one_draft_a_round_needs_the_head_in_the_prompt(depth: int, rows: int) -> None:
    model: Any = Table()
    next(iter(generation(model, PROMPT, 3, depth=depth)))
    assert model.new_caches[0].mtp.length == rows


def test_memory_for_a_long_text_is_asked_for_in_parts() -> None:
    model: Any = Table(context=100_000)
    next(iter(generation(model, PROMPT, 50_000, depth=2)))
    assert model.new_caches[0].reserved == [len(PROMPT) + AT_ONCE + 2]


@pytest.mark.parametrize("depth", [0, 5])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_nan_in_the_head_alone(at: int, depth: int) -> None:
    """The tokens before it come out. A prefill does not run the head, so no node is named."""
    model: Any = Table()
    run = generation(model, PROMPT, 20, depth=depth)
    position = len(PROMPT) + at
    model.lm_head.broken = position - 1
    with pytest.raises(InputError) as raised:
        list(run)
    assert str(raised.value) == (
        f"position {position}: the logits are NaN or infinite; "
        "a prefill of the same tokens has only finite numbers"
    )
    again = model.new_caches[1].rows  # of the prefill that looked for it
    text, _ = plain_text(Table(), PROMPT, at, GREEDY)
    assert again == [*PROMPT, *text]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"limit": 0}, "max_new_tokens = 0; expected at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk = 0; expected a multiple of 64, the grid"),
        ({"prefill_chunk": 63}, "prefill_chunk = 63; expected a multiple of 64, the grid"),
        ({"prefill_chunk": 96}, "prefill_chunk = 96; expected a multiple of 64, the grid"),
        ({"depth": -1}, "draft_tokens = -1; expected an integer >= 0"),
        ({"depth": 201}, "draft_tokens = 201; expected at most 200, the context"),
        ({"logprobs": -1}, "logprobs = -1; expected 0 to 12, the vocabulary"),
        ({"logprobs": 13}, "logprobs = 13; expected 0 to 12, the vocabulary"),
        (
            {"logprobs": 17, "sampling": Sampling(vocab=20)},
            f"logprobs = 17; expected 0 to {ROWS}, the vocabulary",
        ),
        (
            {"logprobs": 17, "sampling": Sampling()},
            f"logprobs = 17; expected 0 to {ROWS}, the vocabulary",
        ),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as raised:
        generation(Table(context=200), PROMPT, **({"limit": 3} | options))
    assert str(raised.value) == line


def test_settings_at_the_limits_are_taken() -> None:
    model = Table(context=200)
    generation(model, PROMPT, 1, depth=200, prefill_chunk=64, logprobs=0)
    generation(model, PROMPT, 1, depth=0, prefill_chunk=128, logprobs=VOCABULARY)
    generation(model, [1] * 199, 1)
    with pytest.raises(InputError, match="the prompt has 200 tokens, the context 200"):
        generation(model, [1] * 200, 1)


def test_drafts_need_a_head() -> None:
    model: Any = Table()
    model.mtp = None
    with pytest.raises(InputError) as raised:
        generation(model, PROMPT, 3, depth=1)
    assert str(raised.value) == "draft_tokens = 1, but the checkpoint has no MTP head"
    generation(model, PROMPT, 3)


def test_ids_go_to_the_models_device() -> None:
    """Whatever torch's default is."""
    model: Any = Table()
    run = generation(model, PROMPT, 5, depth=2)
    with torch.device("meta"):
        found = [token for token, _ in run]
    assert found == plain_text(model, PROMPT, 5, GREEDY)[0]
    assert model.embed_tokens.weight.device == CPU


# --- with a prefix cache


def test_a_prefix_is_kept_and_taken_over() -> None:
    """With the bits of a run without the cache, and with nothing in use afterwards."""
    model, kept, told = small(0), PrefixCache(small(0), budget=1 << 30, interval=1), []
    runs = [
        Generation(
            model, PROMPT, 4, Sampling(), frozenset(), 2, 64, cache, digest=True,
            progress=told.append,
        )
        for cache in (None, kept, kept)
    ]  # fmt: skip
    texts = [[token for token, _ in run] for run in runs]
    assert texts[0] == texts[1] == texts[2]
    assert len({run.logits_sha256 for run in runs}) == 1
    assert [run.draft for run in runs] == [runs[0].draft] * 3
    assert [(run.cached_tokens, run.cache_reason) for run in runs] == [
        (0, ""), (0, "nothing is kept yet"), (128, "all whole blocks")
    ]  # fmt: skip
    assert told == [64, 64, 22, 0, 64, 64, 22, 128, 22]
    assert len(kept.store.segments()) == 2
    assert all(kept.store.is_free(key) for key in kept.store.segments())


def test_a_run_that_is_left_after_its_first_token_keeps_nothing() -> None:
    """And nothing that it took over stays in use."""
    model, kept = small(0), PrefixCache(small(0), budget=1 << 30, interval=1)
    [*_] = Generation(model, PROMPT[:64], 1, Sampling(), frozenset(), 0, 64, kept)
    tokens = iter(Generation(model, PROMPT, 4, Sampling(), frozenset(), 0, 64, kept))
    next(tokens)
    (key,) = kept.store.segments()
    assert not kept.store.is_free(key)
    tokens.close()  # pyright: ignore (a generator)
    assert [*kept.store.segments()] == [key] and kept.store.is_free(key)
