"""Rounds of a step that continue a text, on a model whose numbers are exact
(tests/support/coded_model.py): the tokens, what they are drawn with, and what is used again."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fast.prompt import ROOMS
from fast.target import MAX_ROWS
from qwen35 import step_decoder
from qwen35.cache import Cache
from qwen35.errors import InputError
from qwen35.finite import NotFiniteError
from qwen35.sampling import Sampling, Seen, pick
from qwen35.step_decoder import (
    KEPT,
    GraphPasses,
    Passes,
    Rounds,
    StepDecoder,
    finish_prompt,
    prepared,
    runs_as_step,
)
from tests.support.coded_model import (
    CONFIG,
    VOCABULARY,
    begin,
    coded_model,
    coded_ranks,
    compute_by_torch,
    hidden,
    read,
    weight_of_head,
)

TARGET = "gfx950"
CPU = torch.device("cpu")
PROMPT = [5, 9, 77, 3, 120, 8]
SAMPLINGS = {
    "greedy": Sampling(),
    "few ids": Sampling(vocab=60),
    "drawn": Sampling(temperature=0.8, seed=5),
    "penalties": Sampling(repetition_penalty=1.1, presence_penalty=4.0),
    "penalties of three ids": Sampling(presence_penalty=60.0, vocab=3),
    "drawn with penalties": Sampling(
        temperature=0.8, top_k=3, repetition_penalty=1.1, presence_penalty=4.0, seed=6, vocab=150
    ),
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_by_torch(monkeypatch)
    monkeypatch.setattr(step_decoder, "CAPACITY", 16)


def coded() -> Any:
    return coded_model(TARGET, weight_of_head())


def begun(
    model: Any, ids: list[int], depth: int, sampling: Sampling, *, room: int = 40, stop: Any = ()
) -> StepDecoder:
    """A decoder behind a text, whose last token the trunk has not read."""
    rounds = prepared(model, len(ids) - 1, depth, sampling, room)
    turn = rounds.take_turn()
    begin(rounds.step, ids)
    before = hidden(read(ids)[-2])
    rounds.step.begin(0, hidden(0))  # the decoder begins itself
    seen = None
    if sampling.has_penalties:
        seen = Seen(ids[:-1], VOCABULARY)
        seen.add(ids[-1])
    return StepDecoder(
        model, rounds, len(ids) - 1, token=ids[-1], hidden=before[None, None], turn=turn, depth=depth,
        sampling=sampling, stop=frozenset(stop), seen=seen,
    )  # fmt: skip


def text(ids: list[int], count: int, sampling: Sampling) -> tuple[list[int], list[Tensor]]:
    """The tokens that follow, and the logits of each."""
    found, rows = list(ids), []
    seen = Seen(ids[:-1], VOCABULARY) if sampling.has_penalties else None
    if seen is not None:
        seen.add(ids[-1])
    for _ in range(count):
        rows.append(weight_of_head()[:, read(found)[-1]])
        found.append(pick(rows[-1], len(found), sampling, seen))
    return found[len(ids) :], rows


def check(decoder: StepDecoder, ids: list[int], sampling: Sampling, rounds: int) -> list[int]:
    """Run rounds, compare them with the text, and return how many tokens each gave."""
    found = [decoder.round(100) for _ in range(rounds)]
    flat = [one for part in found for one in part]
    tokens, rows = text(ids, len(flat), sampling)
    assert [token for token, _ in flat] == tokens
    assert torch.equal(torch.stack([row for _, row in flat]), torch.stack(rows))
    assert decoder.length == len(ids) - 1 + len(flat)
    return [len(part) for part in found]


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_rounds_give_the_text_and_its_logits(depth: int, name: str):
    """At every depth the same. The room grows on the way."""
    sampling = SAMPLINGS[name]
    decoder = begun(coded(), PROMPT, depth, sampling, room=1)
    first = decoder.rounds.step.state.capacity
    assert first == 16
    counts = check(decoder, PROMPT, sampling, 20)
    assert depth == 0 or {*counts} > {1}
    stats = decoder.stats
    assert (stats.forwards, stats.tokens) == (20, sum(counts))
    assert stats.proposed == [20] * depth
    assert stats.accepted == [sum(count > i + 1 for count in counts) for i in range(depth)]
    assert decoder.rounds.step.state.capacity > first


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_next_sequence_in_the_same_memory_is_not_disturbed(name: str):
    """By the counts and numbers of the one before, which had another seed."""
    model, sampling = coded(), SAMPLINGS[name]
    check(begun(model, PROMPT, 2, sampling), PROMPT, sampling, 6)
    other = Sampling(**vars(sampling) | {"seed": 99})
    decoder = begun(model, [7, 190, 33, 4], 2, other)
    assert decoder.rounds is model.__dict__[KEPT]
    check(decoder, [7, 190, 33, 4], other, 6)


@pytest.mark.parametrize("depth", [0, 3])
def test_the_room_doubles_when_a_round_does_not_fit(depth: int, monkeypatch: pytest.MonkeyPatch):
    """And not before."""
    monkeypatch.setattr(step_decoder, "CAPACITY", 1)
    model = coded()
    decoder = begun(model, PROMPT, depth, Sampling(), room=3)
    capacity = len(PROMPT) - 1 + max(3 + 1 + depth, 8)
    for _ in range(14):
        old = decoder.rounds
        assert old.step.state.capacity == capacity and model.__dict__[KEPT] is old
        full = decoder.length + 1 + depth > capacity
        decoder.round(100)
        assert (decoder.rounds is not old) is full
        if full:
            capacity *= 2
            decoder.rounds.check_turn(decoder.turn)
    assert capacity > 13


def test_a_round_gives_no_more_tokens_than_are_wanted():
    ids = list(PROMPT)
    decoder = begun(coded(), ids, 3, Sampling())
    lengths = [len(decoder.round(2)) for _ in range(4)]
    assert 1 <= min(lengths) <= max(lengths) <= 2
    assert decoder.stats.proposed == [4, 0, 0] and decoder.stats.tokens == sum(lengths)
    decoder = begun(coded(), ids, 3, Sampling())
    assert [token for token, _ in decoder.round(1)] == text(ids, 1, Sampling())[0]
    assert decoder.stats.proposed == [0, 0, 0]


def test_a_round_ends_with_a_stop_token():
    ids, whole = list(PROMPT), begun(coded(), PROMPT, 3, Sampling())
    while len(part := [token for token, _ in whole.round(100)]) < 3:
        ids += part
    decoder = begun(coded(), ids, 3, Sampling(), stop=[part[1]])
    assert [token for token, _ in decoder.round(100)] == part[:2]
    assert (decoder.stats.tokens, decoder.stats.accepted) == (2, [1, 0, 0])


@pytest.mark.parametrize(("report", "position", "ids"), [
    ([1, -1, 4, 5], 6, [8]), ([3, 7, -1, 9], 7, [8, 7]), ([3, 7, 9, -1], 8, [8, 7, 9]),
])  # fmt: skip
def test_a_token_that_is_none_ends_the_text(report: list[int], position: int, ids: list[int]):
    """The error has its position, and the tokens of the pass before it."""
    decoder = begun(coded(), PROMPT, 2, Sampling())
    decoder.rounds.step.round = lambda: report
    with pytest.raises(NotFiniteError) as caught:
        decoder.round(100)
    assert (caught.value.position, caught.value.ids) == (position, ids)


@pytest.mark.parametrize("name", ["drawn", "penalties"])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_nan_in_the_logits_is_no_token_in_draws_either(depth: int, name: str):
    model = coded()
    model.lm_head.weight[199] = torch.nan
    decoder = begun(model, PROMPT, depth, SAMPLINGS[name])
    with pytest.raises(NotFiniteError) as caught:
        decoder.round(100)
    assert (caught.value.position, caught.value.ids) == (len(PROMPT), PROMPT[-1:])


# ---- memory


def test_the_rounds_of_the_last_sequence_are_taken_again():
    """If they have room enough and the same settings but for the seed."""
    model, drawn = coded(), SAMPLINGS["drawn"]
    first = prepared(model, 10, 2, drawn, 19)
    assert first.step.state.capacity == 32 and first.step.drafts == 2
    assert first.sampling == Sampling(temperature=0.8) and first.step.vocab == VOCABULARY
    assert prepared(model, 10, 2, Sampling(temperature=0.8, seed=1), 19) is first
    assert prepared(model, 1, 2, drawn, 1) is first and first.turn == 0
    for length, depth, sampling in (
        (10, 1, drawn), (10, 1, Sampling(vocab=60)), (11, 1, Sampling(vocab=60)),
    ):  # fmt: skip
        last = model.__dict__[KEPT]
        turn = last.turn
        fresh = prepared(model, length, depth, sampling, 19 if length == 10 else 40)
        assert fresh is not last and last.turn == turn + 1 and model.__dict__[KEPT] is fresh
        assert fresh.step.vocab == (sampling.vocab or VOCABULARY)
    assert fresh.step.state.capacity == 64


@pytest.mark.parametrize(("length", "depth", "room", "capacity"), [
    (10, 0, 1, 18), (10, 0, 7, 18), (10, 0, 8, 19), (10, 3, 4, 18), (10, 3, 5, 19), (1, 7, 1, 10),
])  # fmt: skip
def test_there_is_room_for_the_text_and_a_round(
    length: int, depth: int, room: int, capacity: int, monkeypatch: pytest.MonkeyPatch
):
    """And for the eight rows of a tail's last pass."""
    monkeypatch.setattr(step_decoder, "CAPACITY", 1)
    assert prepared(coded(), length, depth, Sampling(), room).step.state.capacity == capacity
    monkeypatch.setattr(step_decoder, "CAPACITY", 9)
    found = prepared(coded(), length, depth, Sampling(), room).step.state.capacity
    assert found == (9 if capacity <= 9 else 18 if capacity <= 18 else 27)


def test_rounds_are_prepared_once(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    monkeypatch.setattr("fast.step.Step.prepare", lambda step: asked.append(step))
    model = coded()
    made = [prepared(model, 10, 1, Sampling(), 4) for _ in range(3)]
    assert asked == [made[0].step]


def test_the_old_memory_is_released_before_new_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    model = coded()
    prepared(model, 10, 1, Sampling(), 4)

    class Full(Rounds):
        def __init__(self, *given: Any) -> None:
            assert model.__dict__[KEPT] is None
            raise MemoryError

    monkeypatch.setattr(step_decoder, "Rounds", Full)
    with pytest.raises(MemoryError):
        prepared(model, 10, 2, Sampling(), 4)
    assert model.__dict__[KEPT] is None


def test_a_sequence_ends_when_another_one_begins():
    model = coded()
    first = begun(model, PROMPT, 1, Sampling())
    first.round(100)
    second = begun(model, PROMPT, 1, Sampling())
    said = "another generation has begun on this model; the fast path has one at a time in memory"
    with pytest.raises(InputError) as caught:
        first.round(100)
    assert str(caught.value) == said
    second.round(100)
    begun(model, PROMPT, 2, Sampling())  # other rounds
    with pytest.raises(InputError) as caught:
        second.round(100)
    assert str(caught.value) == said


# ---- the prompt


class Slow:
    """In place of a model's own passes."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1, device=device))
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, ids: Tensor, cache: Any) -> Tensor:
        self.asked.append((ids.tolist(), cache))
        assert ids.dtype == torch.int64 and ids.device == CPU
        return torch.ones(1, ids.shape[1], 2)

    def draft(self, ids: Tensor, hidden: Tensor, cache: Any) -> None:
        assert ids.dtype == torch.int64 and ids.device == CPU
        self.asked.append((ids.tolist(), hidden, cache))


def test_passes_by_the_model_itself():
    slow, cache, given = Slow(), object(), torch.zeros(1, 2, 2)
    passes = Passes(slow)  # pyright: ignore
    with torch.device("meta"):
        out = passes.trunk([4, 7, 1], cache)  # pyright: ignore
        passes.draft([4, 7], given, cache)  # pyright: ignore
    assert out.shape == (1, 3, 2)
    assert slow.asked == [([[4, 7, 1]], cache), ([[4, 7]], given, cache)]


def numbers(length: int) -> list[int]:
    return [(37 * i + 11) % VOCABULARY for i in range(length)]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompts_passes_and_its_end_in_the_memory_of_the_rounds(depth: int):
    """Two passes on the grid, then a tail of one pass of eight rows, of several, or of none."""
    for tail in (0, 5, 20, 40):
        ids = numbers(128 + tail)
        rounds = prepared(coded(), len(ids), depth, Sampling(), 8)
        cache, passes = rounds.cache(), rounds.passes()
        assert isinstance(passes, GraphPasses) and isinstance(cache, Cache) and cache.length == 0
        out = None
        for first in (0, 64):
            out = passes.trunk(ids[first : first + 64], cache)
            states = read(ids)[first : first + 64]
            assert torch.equal(out, torch.stack([hidden(state) for state in states])[None])
            assert cache.length == first + 64
            assert [state.length for state in cache.layers] == [first + 64]  # pyright: ignore
            if depth:
                skipped = first == 0
                behind = [hidden(state) for state in read(ids)[first - 1 + skipped : first + 63]]
                passes.draft(ids[first + skipped : first + 64], torch.stack(behind)[None], cache)
                assert cache.mtp is not None and cache.mtp.length == first + 63
        assert out is not None
        before = out[:, -1:].clone()
        last = finish_prompt(rounds, cache, ids[128:], before)
        assert torch.equal(last, hidden(read(ids)[-1])[None, None])
        assert rounds.step.length == len(ids) and rounds.step.state.starts[0] == len(ids)
        assert rounds.step.state.layers[0].keys[0, : len(ids), 0].tolist() == ids  # pyright: ignore
        if rounds.step.state.mtp is not None:
            pairs = [[i, s] for i, s in zip(ids[1:], read(ids)[:-1], strict=True)]
            assert rounds.step.state.mtp.keys[0, : len(ids) - 1, :2].tolist() == pairs


def test_a_prompt_without_a_whole_block():
    ids = numbers(6)
    rounds = prepared(coded(), 6, 1, Sampling(), 8)
    last = finish_prompt(rounds, rounds.cache(), ids, None)
    assert torch.equal(last, hidden(read(ids)[-1])[None, None])
    with pytest.raises(AssertionError, match=r"^a prompt has at least one token$"):
        finish_prompt(rounds, rounds.cache(), [], None)


def test_a_pass_of_more_rows_than_there_are_graphs_for_runs_by_the_model():
    rounds = prepared(coded(), 8, 1, Sampling(), 8)
    assert rounds.step.prompt is not None
    slow, cache, given = Slow(), rounds.cache(), torch.zeros(1, ROOMS[-1] + 1, 2)
    passes = GraphPasses(slow, rounds.step.prompt)  # pyright: ignore
    many = [1] * (ROOMS[-1] + 1)
    assert passes.trunk(many, cache).shape == (1, len(many), 2)
    passes.draft(many, given, cache)
    assert slow.asked == [([many], cache), ([many], given, cache)] and cache.length == 0
    asked: list[Any] = []
    fake: Any = SimpleNamespace(
        state=rounds.step.state,
        trunk=lambda ids, first: asked.append((len(ids), first)) or torch.zeros(len(ids), 2),
        draft=lambda ids, hidden, first: asked.append((len(ids), hidden.shape, first)),
    )
    passes = GraphPasses(slow, fake)  # pyright: ignore
    passes.trunk(many[:-1], cache)
    passes.draft(many[:-1], given[:, :-1], cache)
    assert asked == [(2048, 0), (2048, (2048, 2), 0)] and len(slow.asked) == 2
    assert cache.mtp is not None and cache.mtp.length == cache.length == 2048


def test_a_cache_of_another_memory_is_a_mistake():
    rounds, other = (prepared(coded(), 8, depth, Sampling(), 8) for depth in (1, 0))
    passes = rounds.passes()
    for cache in (other.cache(), Cache.empty(CONFIG, torch.bfloat16, CPU)):
        with pytest.raises(AssertionError):
            passes.trunk([1, 2], cache)
    with pytest.raises(AssertionError):
        other.passes().draft([1, 2], torch.zeros(1, 2, 256), other.cache())


def test_a_ranks_part_runs_its_prompt_by_the_model():
    part, _ = coded_ranks(TARGET, weight_of_head(), 2)
    passes = Rounds(part, 0, 64, Sampling()).passes()
    assert type(passes) is Passes and passes.model is part


# ---- which models


@pytest.mark.parametrize(("device", "depth", "fast", "expected"), [
    ("cuda", 0, True, True), ("cuda", MAX_ROWS - 1, True, True), ("cuda", MAX_ROWS, True, False),
    ("cpu", 0, True, False), ("cuda", 0, False, False), ("cuda", 3, False, False),
])  # fmt: skip
def test_a_model_on_a_gpu_whose_nodes_are_fast_runs_as_steps(
    device: str, depth: int, fast: bool, expected: bool
):
    model = coded()
    model.embed_tokens = SimpleNamespace(weight=SimpleNamespace(device=torch.device(device)))
    if not fast:
        model.layers = [torch.nn.Identity()]
    assert runs_as_step(model, depth) is expected


def test_the_number_of_a_turn_is_its_place():
    rounds = Rounds(coded(), 0, 16, Sampling())
    assert [rounds.take_turn() for _ in range(3)] == [1, 2, 3]
    rounds.check_turn(3)
    for turn in (0, 2, 4):
        with pytest.raises(InputError):
            rounds.check_turn(turn)
