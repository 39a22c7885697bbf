"""min_p and the penalties: transformers' definitions, and the same tokens at any depth of drafting."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen35.completion import Completer, Settings
from qwen35.defaults import Defaults
from qwen35.errors import InputError
from qwen35.generation import Generation
from qwen35.load import TINY, load
from qwen35.prefix.cache import PrefixCache
from qwen35.sampling import Sampling, Seen, penalized, pick, probabilities
from qwen35.tokenizer import Tokenizer
from reference.model import Model

V = 40
IDS = st.lists(st.integers(0, V - 1), max_size=30)


def logits(seed: int) -> Tensor:
    return torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), prompt=IDS.filter(bool), text=IDS, factor=st.floats(0.3, 3))
def test_repetition_penalty_is_transformers_own(
    seed: int, prompt: list[int], text: list[int], factor: float
) -> None:
    """Over the prompt and the text so far; the sign of a logit decides how."""
    seen = Seen(prompt, V)
    for token in text:
        seen.add(token)
    ours = penalized(logits(seed), seen, Sampling(repetition_penalty=factor))
    ids = torch.tensor([[*prompt, *text]])
    theirs = RepetitionPenaltyLogitsProcessor(factor)(ids, logits(seed)[None])[0]
    assert torch.equal(ours, theirs)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), prompt=IDS.filter(bool), text=IDS, penalty=st.floats(-2, 2))
def test_presence_penalty_counts_the_text_alone(
    seed: int, prompt: list[int], text: list[int], penalty: float
) -> None:
    """Once for each token of the text, however often it stands there; the prompt does not count."""
    seen = Seen(prompt, V)
    for token in text:
        seen.add(token)
    expected = logits(seed)
    for token in set(text):
        expected[token] -= penalty
    assert torch.equal(penalized(logits(seed), seen, Sampling(presence_penalty=penalty)), expected)


def test_repetition_comes_before_presence() -> None:
    """vLLM has the same order: the division does not see what is subtracted."""
    seen = Seen([1], V)
    seen.add(2)
    scores = torch.full((V,), 4.0)
    found = penalized(scores, seen, Sampling(repetition_penalty=2.0, presence_penalty=1.5))
    assert found[:4].tolist() == [4.0, 2.0, 0.5, 4.0]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, V),
    top_p=st.floats(0.05, 1),
)
def test_min_p_is_transformers_own(
    seed: int, min_p: float, temperature: float, top_k: int, top_p: float
) -> None:
    """It comes after temperature, top-k and top-p, in this order."""
    scores = logits(seed)[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    theirs = MinPLogitsWarper(min_p)(None, scores)[0].softmax(-1)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = probabilities(logits(seed), sampling)
    # Rounding decides whether a token whose probability is the threshold stays in: their sum is another.
    edge = (theirs > 0) != (ours > 0)
    assert int(edge.sum()) <= 1
    if not edge.any():
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=0)


def test_a_pick_is_counted() -> None:
    """Greedy with a penalty that forbids what was said: every token once."""
    seen = Seen([0], V)
    sampling = Sampling(presence_penalty=1000.0)
    said = [pick(logits(1), position, sampling, seen) for position in range(V)]
    assert sorted(said) == list(range(V))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", -1.0),
     ("repetition_penalty", float("nan")), ("presence_penalty", float("inf"))],
)  # fmt: skip
def test_values_out_of_range(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{setting} = "):
        Sampling(**{setting: value})  # type: ignore[arg-type]


# --- whole texts ----------------------------------------------------------------------------------

PENALISED = [
    Sampling(repetition_penalty=1.3),
    Sampling(presence_penalty=2.0),
    Sampling(
        temperature=0.9, top_k=50, min_p=0.02, repetition_penalty=1.1, presence_penalty=0.5, seed=3
    ),
    Sampling(repetition_penalty=0.7),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(TINY)


def tokens(
    model: Model, sampling: Sampling, depth: int, cache: PrefixCache | None = None
) -> list[int]:
    prompt = Tokenizer(TINY).encode("And God said, Let there be light: and there was light." * 5)
    generation = Generation(model, prompt, 40, sampling, frozenset(), depth, prefix_cache=cache)
    return [token for token, _ in generation]


@pytest.mark.parametrize("sampling", PENALISED)
def test_the_same_tokens_at_any_depth(model: Model, sampling: Sampling) -> None:
    """A rejected draft leaves no trace, and a hit of the prefix cache changes nothing."""
    alone = tokens(model, sampling, 0)
    assert all(tokens(model, sampling, depth) == alone for depth in (1, 2, 3, 5))
    assert alone != tokens(model, Sampling(), 0)
    cache = PrefixCache(model, budget=1 << 30)
    assert tokens(model, sampling, 3, cache) == tokens(model, sampling, 3, cache) == alone


def test_penalties_as_a_loop_without_drafts(model: Model) -> None:
    """Written out: one pass a token, the penalty over all that came before."""
    prompt = Tokenizer(TINY).encode("In the beginning")
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.7)
    said: list[int] = []
    cache = model.new_cache()
    with torch.inference_mode():
        fresh = prompt
        for _ in range(12):
            row = model.lm_head(model(torch.tensor([fresh]), cache)[:, -1:])[0, 0].double()
            for token in {*prompt, *said}:
                row[token] = row[token] * 1.3 if row[token] < 0 else row[token] / 1.3
            for token in set(said):
                row[token] -= 0.7
            said.append(int(row.argmax()))
            fresh = said[-1:]
    assert said == [t for t, _ in Generation(model, prompt, 12, sampling, frozenset(), 3)]


def test_the_files_advice_reaches_a_conversation(model: Model) -> None:
    """Settings win over advice; a prompt that is no conversation takes none."""
    advice = Defaults(
        advice={"repetition_penalty": 1.2, "presence_penalty": 0.5, "temperature": 0.6}
    )
    completer = Completer(model, Tokenizer(TINY), advice)
    talk = completer.prompt([{"role": "user", "content": "Hi"}], Settings())
    found = completer.complete(talk, Settings(temperature=0.0)).generation.sampling
    assert (found.repetition_penalty, found.presence_penalty, found.temperature) == (1.2, 0.5, 0.0)
    plain = completer.complete(completer.prompt("Hi", Settings()), Settings()).generation.sampling
    assert plain == Sampling(vocab=plain.vocab)


def test_the_logits_that_are_hashed_are_the_models_own(model: Model, tmp_path: Path) -> None:
    """`--digest` is taken before penalties: the first token's logits are the same with and without."""
    prompt = Tokenizer(TINY).encode("In the beginning")
    found = {
        penalty: Generation(
            model, prompt, 1, Sampling(presence_penalty=penalty), frozenset(), 0, digest=True
        )
        for penalty in (0.0, 3.0)
    }
    for generation in found.values():
        list(generation)
    assert found[0.0].logits_sha256 == found[3.0].logits_sha256


@pytest.mark.parametrize("factor", [1e-320, 1e-308, 1e308])
@pytest.mark.parametrize("presence", [0.0, -1.7e308, 1.7e308])
def test_penalties_beyond_the_range_of_floats(factor: float, presence: float) -> None:
    """Draws are tokens, as they are with any other number."""
    sampling = Sampling(temperature=1.0, repetition_penalty=factor, presence_penalty=presence)
    logits = torch.tensor([3.0, -2.0, 1e-3, 20.0])
    seen = Seen([0, 1, 2], 4)
    for position in range(20):
        assert 0 <= pick(logits, position, sampling, seen) < 4
    assert penalized(logits, seen, sampling).isfinite().all()
