"""Drafting changes the speed and nothing else: neither the tokens nor a bit of the logits behind
them.

Drafts are often right on the embedded model, and hardly ever on random small models. Some tests
force them right or wrong, so that both happen everywhere.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice

import pytest
import torch
from torch import Tensor

from qwen35.config import Config
from qwen35.generation import Generation, prefill
from qwen35.load import TINY, load
from qwen35.sampling import Sampling, probabilities
from qwen35.speculative import Decoder, DraftStats
from qwen35.tokenizer import Tokenizer
from reference.linear import DECODE_ROWS
from reference.model import Model
from tests.qwen35.test_sampling import chi_square_p
from tests.support.decoding import decoder
from tests.support.family import FAMILY, randomise, small_model

DEPTHS = [1, 2, 3, 5]
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.8, top_k=20, top_p=0.95, seed=5)
HOT = Sampling(temperature=1.5, seed=6)
TEXTS = ["The", "Once upon a time there was", "It was the best of times, " * 12]

Steps = list[tuple[int, Tensor]]


@cache
def embedded() -> Model:
    """The embedded model, loaded once."""
    return load(TINY)


@cache
def embedded_prompts() -> list[list[int]]:
    """A word, a clause, and a prompt of more than one chunk of the grid."""
    tokenizer = Tokenizer(TINY)
    return [tokenizer.encode(text) for text in TEXTS]


@cache
def random_model(member: str, dtype: torch.dtype) -> Model:
    """A random small model; a head of few rows, so that some drafts are right."""
    model = Model(Config.from_dict(FAMILY[member] | {"vocab_size": 24}))
    randomise(model, 1)
    return model.to(dtype).eval().requires_grad_(False)


def random_prompt(length: int, vocab: int = 24) -> list[int]:
    """Ids of a fixed random prompt."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(vocab, (length,), generator=generator).tolist()


def run(
    model: Model,
    prompt: list[int],
    depth: int,
    sampling: Sampling = GREEDY,
    *,
    tokens: int = 16,
    stop: frozenset[int] = frozenset(),
    chunk: int = 2048,
) -> tuple[Steps, Generation]:
    """One continuation: every token with its logits, and the figures."""
    generation = Generation(model, prompt, tokens, sampling, stop, depth, chunk)
    steps = [(token, logits.clone()) for token, logits in generation]
    check_stats(generation.draft, depth, len(steps))
    return steps, generation


def check_stats(stats: DraftStats, depth: int, tokens: int) -> None:
    """The counts add up: a draft is accepted only after those before it."""
    assert len(stats.proposed) == len(stats.accepted) == depth
    assert stats.tokens == tokens - 1  # prefill gives the first
    assert all(0 <= a <= p for a, p in zip(stats.accepted, stats.proposed, strict=True))
    for counts in (stats.proposed, stats.accepted):
        assert counts == sorted(counts, reverse=True)
    rounds = tokens - 1 - sum(stats.accepted)  # a round gives one token of the trunk's own
    assert all(count <= rounds for count in stats.proposed)
    passes_a_round = -(-(1 + depth) // DECODE_ROWS)
    assert rounds <= stats.forwards <= rounds * passes_a_round
    if stats.forwards:
        assert stats.tokens_per_forward == stats.tokens / stats.forwards <= 1 + depth
    else:
        assert stats.tokens_per_forward is None


def assert_same(found: Steps, expected: Steps) -> None:
    """The same tokens, and the same bits of logits."""
    assert [token for token, _ in found] == [token for token, _ in expected]
    for i, ((_, a), (_, b)) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"logits of token {i}: {(a - b).abs().max()} apart"


@cache
def embedded_text(which: int, sampling: Sampling) -> Steps:
    """What the embedded model says to a prompt without drafting."""
    return run(embedded(), embedded_prompts()[which], 0, sampling)[0]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, HOT], ids=["greedy", "sampled", "hot"])
@pytest.mark.parametrize("which", range(len(TEXTS)))
def test_depths_agree_on_the_embedded_model(which: int, sampling: Sampling) -> None:
    """A trained head, with long and short runs of accepted drafts."""
    prompt, expected = embedded_prompts()[which], embedded_text(which, sampling)
    for depth in DEPTHS:
        assert_same(run(embedded(), prompt, depth, sampling)[0], expected)


def test_the_embedded_head_drafts_well() -> None:
    """Greedy drafting on plain text is what the head was trained for: it must pay."""
    stats = DraftStats()
    for prompt in embedded_prompts():
        draft = run(embedded(), prompt, 3, tokens=48)[1].draft
        stats.tokens += draft.tokens
        stats.forwards += draft.forwards
    assert stats.tokens_per_forward > 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("member", ["397B-A17B", "27B"])
@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "hot"])
def test_depths_agree_on_a_random_model(
    member: str, dtype: torch.dtype, sampling: Sampling
) -> None:
    """Expert choices change with every row, and almost every draft is taken back."""
    model = random_model(member, dtype)
    for length in (1, 67):
        prompt = random_prompt(length)
        expected, _ = run(model, prompt, 0, sampling, tokens=10)
        for depth in DEPTHS:
            assert_same(run(model, prompt, depth, sampling, tokens=10)[0], expected)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_limits_cut_the_same_text(tokens: int) -> None:
    """A limit ends a round early; it never changes or adds a token."""
    prompt, whole = embedded_prompts()[1], embedded_text(1, SAMPLED)
    for depth in (0, *DEPTHS):
        found, generation = run(embedded(), prompt, depth, SAMPLED, tokens=tokens)
        assert_same(found, whole[:tokens])
        assert generation.finish_reason == "length"
        assert generation.token_ids == [token for token, _ in whole[:tokens]]


@pytest.mark.parametrize("at", [0, 1, 2, 4, 7])
def test_a_stop_token_ends_the_text_at_any_depth(at: int) -> None:
    """It may be in the middle of accepted drafts: it is the last token given."""
    prompt, whole = embedded_prompts()[2], embedded_text(2, HOT)
    ids = [token for token, _ in whole]
    stop = frozenset([ids[at]])
    for depth in (0, *DEPTHS):
        found, generation = run(embedded(), prompt, depth, HOT, tokens=16, stop=stop)
        assert_same(found, whole[: ids.index(ids[at]) + 1])
        assert generation.finish_reason == "stop"


def test_a_stop_token_among_right_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every draft right, the stop token is itself an accepted draft."""
    model, prompt = random_model("27B", torch.float32), random_prompt(9)
    whole, _ = run(model, prompt, 0, HOT, tokens=12)
    ids = [token for token, _ in whole]
    force_drafts(monkeypatch, len(prompt), ids, lambda right: right)
    for at in (1, 2, 3, 4, 5):
        stop = frozenset([ids[at]])
        found, generation = run(model, prompt, 3, HOT, tokens=12, stop=stop)
        assert_same(found, whole[: ids.index(ids[at]) + 1])
        assert generation.finish_reason == "stop"


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200])
def test_prefill_chunks_agree(length: int, depth: int) -> None:
    """However a prompt is cut, the bits behind each token are the same, drafting or not."""
    model = random_model("397B-A17B", torch.float32)
    prompt = random_prompt(length)
    expected, figures = run(model, prompt, depth, HOT, tokens=6, chunk=4096)
    for chunk in (64, 128):
        found, generation = run(model, prompt, depth, HOT, tokens=6, chunk=chunk)
        assert_same(found, expected)
        assert generation.draft == figures.draft  # the drafting head's own cache is the same, too


def test_prefill_chunks_agree_on_the_embedded_model() -> None:
    """The model has the checkpoint's own dtype."""
    prompt = (embedded_prompts()[2] * 8)[:300]
    expected, _ = run(embedded(), prompt, 3, tokens=8, chunk=4096)
    for chunk in (64, 128):
        assert_same(run(embedded(), prompt, 3, tokens=8, chunk=chunk)[0], expected)


def test_a_run_is_repeatable() -> None:
    """No state is left in the model between two generations."""
    prompt = embedded_prompts()[1]
    first, _ = run(embedded(), prompt, 3, SAMPLED)
    run(embedded(), embedded_prompts()[2], 2, HOT)
    assert_same(run(embedded(), prompt, 3, SAMPLED)[0], first)


def test_the_context_ends_the_text() -> None:
    """The last position of the context is used and no other, at any depth."""
    model = random_model("27B", torch.float32)
    model = copy.copy(model)
    model.config = replace(model.config, max_position_embeddings=20)
    expected, generation = run(model, random_prompt(15), 0, HOT, tokens=100)
    assert len(expected) == 5
    assert generation.finish_reason == "length"
    for depth in DEPTHS:
        assert_same(run(model, random_prompt(15), depth, HOT, tokens=100)[0], expected)


# --- forced drafts --------------------------------------------------------------------------------


def force_drafts(
    monkeypatch: pytest.MonkeyPatch,
    prompt_length: int,
    text: list[int],
    change: Callable[[int], int],
) -> None:
    """Let every draft be `change` of the token that the model will give."""

    def draft(self: Decoder, depth: int) -> list[int]:
        given = self.cache.length + 1 - prompt_length
        return [change(token) for token in text[given : given + max(depth, 0)]]

    monkeypatch.setattr(Decoder, "_draft", draft)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "hot"])
def test_right_drafts_give_the_same_text(
    monkeypatch: pytest.MonkeyPatch, sampling: Sampling, dtype: torch.dtype
) -> None:
    """Every draft accepted: whole rounds of verified rows, none of them taken back."""
    model, prompt = random_model("397B-A17B", dtype), random_prompt(70)
    expected, _ = run(model, prompt, 0, sampling, tokens=21)
    ids = [token for token, _ in expected]
    force_drafts(monkeypatch, len(prompt), ids, lambda right: right)
    for depth in DEPTHS:
        found, generation = run(model, prompt, depth, sampling, tokens=21)
        assert_same(found, expected)
        assert generation.draft.accepted == generation.draft.proposed
        assert generation.draft.proposed[0] > 0
        rounds = -(-20 // (depth + 1))
        assert generation.draft.forwards <= rounds * -(-(1 + depth) // DECODE_ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_wrong_drafts_give_the_same_text(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Every draft rejected: each pass is taken back to its first row."""
    model, prompt = random_model("397B-A17B", dtype), random_prompt(70)
    expected, _ = run(model, prompt, 0, HOT, tokens=16)
    ids = [token for token, _ in expected]
    force_drafts(monkeypatch, len(prompt), ids, lambda right: (right + 1) % 24)
    for depth in DEPTHS:
        found, generation = run(model, prompt, depth, HOT, tokens=16)
        assert_same(found, expected)
        assert generation.draft.accepted == [0] * depth
        assert generation.draft.forwards == 15


@pytest.mark.parametrize("wrong_at", [1, 2, 3, 4, 5])
def test_a_wrong_draft_after_right_ones(monkeypatch: pytest.MonkeyPatch, wrong_at: int) -> None:
    """Taken back to the middle of a pass, in the first and in the second pass of a deep round."""
    model, prompt = random_model("122B-A10B", torch.float32), random_prompt(70)
    expected, _ = run(model, prompt, 0, HOT, tokens=20)
    ids = [token for token, _ in expected]

    def draft(self: Decoder, depth: int) -> list[int]:
        given = self.cache.length + 1 - len(prompt)
        guesses = ids[given : given + max(depth, 0)]
        return [(g + (i + 1 == wrong_at)) % 24 for i, g in enumerate(guesses)]

    monkeypatch.setattr(Decoder, "_draft", draft)
    for depth in (3, 5):
        assert_same(run(model, prompt, depth, HOT, tokens=20)[0], expected)


def test_taken_back_drafts_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rejected round the cache holds, bit for bit, what plain decoding would hold."""
    model, prompt = random_model("397B-A17B", torch.float32), random_prompt(70)
    right = [token for token, _ in run(model, prompt, 0, GREEDY, tokens=12)[0]]

    def begun(depth: int) -> Decoder:
        state = model.new_cache()
        hidden = prefill(model, prompt, state, chunk=64, draft=False)
        return decoder(model, state, right[0], hidden, depth)

    with torch.inference_mode():
        plain, drafting = begun(0), begun(3)
        for _ in range(6):
            plain.round(1)
        force_drafts(monkeypatch, len(prompt), [*right[:2], 99, *right[3:]], lambda t: t % 24)
        while drafting.cache.length < plain.cache.length:
            drafting.round(plain.cache.length - drafting.cache.length)
    assert drafting.cache.length == plain.cache.length
    for a, b in zip(drafting.cache.layers, plain.cache.layers, strict=True):
        if hasattr(a, "recurrent"):
            assert torch.equal(a.recurrent, b.recurrent)
            assert torch.equal(a.conv, b.conv)
        else:
            assert a.length == b.length
            assert torch.equal(a.k[:, :, : a.length], b.k[:, :, : b.length])
            assert torch.equal(a.v[:, :, : a.length], b.v[:, :, : b.length])


# --- the distribution -----------------------------------------------------------------------------


@cache
def very_small_model() -> Model:
    """Two layers and eight tokens, so that a few thousand texts can be drawn."""
    sizes = FAMILY["0.8B"] | {
        "vocab_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "tie_word_embeddings": False,
    }
    model = Model(Config.from_dict(sizes))
    randomise(model, 3)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def next_distribution(ids: list[int], sampling: Sampling) -> list[float]:
    """The distribution that the model itself gives after `ids`, from one plain forward."""
    model = very_small_model()
    hidden = model(torch.tensor([ids]), model.new_cache())
    return probabilities(model.lm_head(hidden)[0, -1], sampling).tolist()


def test_two_sampled_tokens_follow_the_models_distribution() -> None:
    """Many seeds with drafting on: pairs of first and second token, against exact chances."""
    model, prompt, count = very_small_model(), [1, 5, 2], 500
    sampling = Sampling(temperature=1.3)
    pairs: Counter[tuple[int, int]] = Counter()
    for seed in range(count):
        seeded = replace(sampling, seed=seed)
        steps = Generation(model, prompt, 4, seeded, frozenset(), 3)
        first, second = (token for token, _ in islice(steps, 2))
        pairs[first, second] += 1
    chances = {
        (first, second): p * q
        for first, p in enumerate(next_distribution(prompt, sampling))
        for second, q in enumerate(next_distribution([*prompt, first], sampling))
    }
    observed = [pairs[pair] for pair in chances]
    assert chi_square_p(observed, [count * chance for chance in chances.values()]) > 1e-4


def test_tokens_behind_an_accepted_draft_follow_the_models_distribution() -> None:
    """Where a wrong acceptance rule would show: in the token drawn in a drafted row, and in the
    next one, which is only reached when the draft was accepted."""
    model, prompt, count = very_small_model(), [1, 5, 2], 1200
    sampling = Sampling(temperature=1.3)
    with torch.inference_mode():
        state = model.new_cache()
        hidden = prefill(model, prompt, state, chunk=64, draft=True)
        drawn: Counter[int] = Counter()
        behind: Counter[int] = Counter()
        for seed in range(count):
            seeded = replace(sampling, seed=seed)
            drafting = decoder(model, copy.deepcopy(state), 4, hidden, 1, seeded)
            tokens = [token for token, _ in drafting.round(2)]
            drawn[tokens[0]] += 1
            if len(tokens) == 2:
                draft = tokens[0]
                behind[tokens[1]] += 1
    expected = next_distribution([*prompt, 4], sampling)
    assert chi_square_p([drawn[i] for i in range(8)], [count * p for p in expected]) > 1e-4
    accepted = sum(behind.values())
    assert accepted == drawn[draft] > 100  # accepted exactly when the model drew it
    expected = next_distribution([*prompt, 4, draft], sampling)
    assert chi_square_p([behind[i] for i in range(8)], [accepted * p for p in expected]) > 1e-4


def test_drafts_are_never_padding() -> None:
    """An id without text is not even proposed: it could never be accepted."""
    model = small_model("27B")
    seen: list[int] = []
    original = Decoder._draft

    class Watched(Decoder):
        def _draft(self, depth: int) -> list[int]:
            drafts = original(self, depth)
            seen.extend(drafts)
            return drafts

    sampling = Sampling(vocab=11)
    with torch.inference_mode():
        state = model.new_cache()
        hidden = prefill(model, [1, 2, 3], state, chunk=64, draft=True)
        decoder = Watched(
            model, state, token=4, hidden=hidden, depth=3, sampling=sampling, stop=frozenset()
        )
        picked = [token for _ in range(6) for token, _ in decoder.round(4)]
    assert seen
    assert max(seen + picked) < 11
