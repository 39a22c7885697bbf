"""Sampling against a plain computation over lists, and its draws against their distribution."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from qwen35.errors import InputError
from qwen35.sampling import Sampling, Seen, penalized, pick, probabilities, uniform

VOCAB = 40


def random_logits(seed: int, size: int = VOCAB) -> Tensor:
    """Logits with a few likely tokens and a long tail."""
    return 2.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def plainly(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The filtered distribution, one token at a time, with Python floats only."""
    likeliest = max(logits)
    weights = [math.exp((x - likeliest) / temperature) for x in logits]
    ranking = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = ranking[:top_k] if top_k else ranking
    total = math.fsum(weights[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        if top_p < 1 and reached >= top_p:
            break
        nucleus.append(i)
        reached += weights[i] / total
    total = math.fsum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


def chi_square_p(observed: list[int], expected: list[float]) -> float:
    """Chance of a chi-square statistic at least this large when `expected` is true.

    Cells of fewer than five expected counts are pooled; the tail is an incomplete gamma function.
    """
    cells = sorted(zip(expected, observed, strict=True), reverse=True)
    pooled: list[list[float]] = [[0.0, 0.0]]
    for wanted, seen in cells:
        if pooled[-1][0] >= 5:
            pooled.append([0.0, 0.0])
        pooled[-1][0] += wanted
        pooled[-1][1] += seen
    if len(pooled) > 1 and pooled[-1][0] < 5:
        wanted, seen = pooled.pop()
        pooled[-1][0] += wanted
        pooled[-1][1] += seen
    statistic = sum((seen - wanted) ** 2 / wanted for wanted, seen in pooled)
    half = torch.tensor([(len(pooled) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_the_chi_square_helper_knows_its_table() -> None:
    """11.07 is the 5% point of five degrees of freedom; the helper must not be blind."""
    offset = math.sqrt(11.07 / 6 * 100)
    observed = [100 + offset, 100 - offset] * 3
    assert abs(chi_square_p(observed, [100.0] * 6) - 0.05) < 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.6, 0, 1.0),
        (1.7, 0, 1.0),
        (1.0, 5, 1.0),
        (1.0, 1, 1.0),
        (1.0, VOCAB, 1.0),
        (1.0, 10 * VOCAB, 1.0),
        (1.0, 0, 0.8),
        (1.0, 0, 1e-9),
        (0.6, 20, 0.95),
        (2.0, 7, 0.5),
    ],
)
def test_probabilities_against_a_plain_computation(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    """Temperature, then top-k, then the smallest set that reaches top-p."""
    logits = random_logits(seed)
    found = probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    expected = torch.tensor(
        plainly(logits.tolist(), temperature, top_k, top_p), dtype=torch.float64
    )
    assert found.dtype == torch.float64
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_ties_go_to_the_lower_id() -> None:
    """The choice at an edge is defined, so that two machines keep the same tokens."""
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    kept = probabilities(logits, Sampling(temperature=1.0, top_k=2))
    assert kept.tolist() == [0.0, 0.5, 0.5, 0.0, 0.0]
    assert pick(logits, 0, Sampling()) == 1


def test_the_logits_are_left_as_they_were() -> None:
    """They are shown and hashed after the draw."""
    logits = random_logits(5).double()
    before = logits.clone()
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.9, vocab=30)
    probabilities(logits, sampling)
    pick(logits, 3, sampling)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_greedy_is_the_largest(dtype: torch.dtype) -> None:
    """Neither the position nor the seed matters."""
    for seed in range(20):
        logits = random_logits(seed).to(dtype)
        expected = max(range(VOCAB), key=lambda i: (float(logits[i]), -i))
        assert pick(logits, seed, Sampling(seed=seed)) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_padding_is_never_drawn(temperature: float) -> None:
    """Rows of the head beyond the tokenizer carry numbers, large ones here, but no text."""
    logits = random_logits(1)
    logits[30:] = 100.0
    sampling = Sampling(temperature=temperature, vocab=30)
    assert {pick(logits, position, sampling) for position in range(300)} <= set(range(30))
    if temperature:
        p = probabilities(logits, sampling)
        assert p.shape == logits.shape
        assert p[30:].eq(0).all()
        torch.testing.assert_close(p[:30], probabilities(logits[:30], sampling))


def test_what_is_filtered_out_is_never_drawn() -> None:
    """500 draws are the whole support, and nothing beyond its edges."""
    logits = random_logits(2)
    sampling = Sampling(temperature=1.5, top_k=4, seed=3)
    support = set(probabilities(logits, sampling).nonzero().flatten().tolist())
    assert len(support) == 4
    assert {pick(logits, position, sampling) for position in range(500)} == support


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53], ids=["lowest", "middle", "highest"])
def test_the_extreme_draws_are_tokens(monkeypatch: pytest.MonkeyPatch, draw: float) -> None:
    """The lowest and the highest number that `uniform` can give pick a token of the support."""
    monkeypatch.setattr("qwen35.sampling.uniform", lambda seed, position: draw)
    for seed in range(200):
        logits = random_logits(seed)
        sampling = Sampling(temperature=1.0, top_p=0.9, vocab=VOCAB - 3)
        token = pick(logits, 0, sampling)
        assert token < VOCAB - 3
        assert probabilities(logits, sampling)[token] > 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-308, 5e-324])
def test_a_very_low_temperature_is_greedy(temperature: float) -> None:
    """The limit, without an overflow on the way."""
    logits = 10 * random_logits(4)
    assert pick(logits, 0, Sampling(temperature=temperature)) == int(logits.argmax())


def test_a_very_high_temperature_is_even() -> None:
    """The other limit."""
    p = probabilities(random_logits(4), Sampling(temperature=1e300))
    torch.testing.assert_close(p, torch.full_like(p, 1 / VOCAB))


def test_uniform_is_a_pure_function() -> None:
    """Asked again, in another order, between other questions: the same number."""
    questions = [(seed, position) for seed in (0, 1, 2**63 - 1) for position in (0, 1, 2, 262143)]
    first = {question: uniform(*question) for question in questions}
    assert {question: uniform(*question) for question in reversed(questions)} == first
    assert len(set(first.values())) == len(questions)
    assert all(0 <= x < 1 for x in first.values())


def test_uniform_keeps_its_numbers() -> None:
    """A seed quoted in a report must give the same text next year: these bits are a promise.

    They are those of numpy's Philox, whose stream is frozen.
    """
    assert [uniform(0, 0), uniform(1, 0), uniform(0, 1)] == PROMISED


PROMISED = [0.011546754286331562, 0.3035680343067586, 0.5023796042735054]


@pytest.mark.parametrize("across", ["positions", "seeds"])
def test_uniform_is_uniform(across: str) -> None:
    """Over the positions of one seed, and over the seeds of one position."""
    count, cells = 20_000, 50
    if across == "positions":
        draws = [uniform(17, position) for position in range(count)]
    else:
        draws = [uniform(seed, 17) for seed in range(count)]
    hits = Counter(int(x * cells) for x in draws)
    p = chi_square_p([hits[i] for i in range(cells)], [count / cells] * cells)
    assert 1e-4 < p < 1 - 1e-4
    assert len(set(draws)) == count


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_neighbouring_positions_are_independent(lag: int) -> None:
    """A counter-based generator may show a pattern between counters: pairs must be even."""
    draws = [uniform(5, position) for position in range(10_000)]
    pairs = Counter(
        (int(a * 7), int(b * 7)) for a, b in zip(draws, draws[lag:], strict=False)
    )  # fmt: skip
    count = len(draws) - lag
    observed = [pairs[i, j] for i in range(7) for j in range(7)]
    assert chi_square_p(observed, [count / 49] * 49) > 1e-4


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0, seed=11), Sampling(temperature=0.9, top_k=12, top_p=0.9, seed=12)],
    ids=["plain", "filtered"],
)
def test_the_draws_follow_the_probabilities(sampling: Sampling) -> None:
    """20,000 positions with the same logits."""
    logits, count = random_logits(6), 20_000
    expected = probabilities(logits, sampling)
    drawn = Counter(pick(logits, position, sampling) for position in range(count))
    support = expected.nonzero().flatten().tolist()
    assert set(drawn) <= set(support)
    observed = [drawn[i] for i in support]
    assert chi_square_p(observed, [count * float(expected[i]) for i in support]) > 1e-4


def test_the_seed_changes_the_draws() -> None:
    """Nothing else changes them."""
    logits = random_logits(7)

    def draws(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return [pick(logits, position, sampling) for position in range(50)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(1) != draws(1 + 2**32) != draws(1 + 2**62)  # all of its bits count


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.inf),
        ("presence_penalty", -math.inf),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_bad_values_are_named(name: str, value: float) -> None:
    """One line with the name, the value, and what was expected."""
    with pytest.raises(InputError) as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert name in message
    assert str(value) in message
    assert "expected" in message


# --- edges


def test_values_at_the_edge_are_taken() -> None:
    Sampling(
        temperature=0.0, top_k=0, top_p=1.0, min_p=1.0, repetition_penalty=1e-9, seed=2**63 - 1
    )
    Sampling(min_p=0.0, presence_penalty=-1e300, seed=0)


def kept(logits: list[float], **settings: float) -> list[int]:
    """The ids that may be drawn."""
    found = probabilities(torch.tensor(logits), Sampling(temperature=1.0, **settings))  # pyright: ignore
    return found.nonzero().flatten().tolist()


def test_top_p_that_is_reached_exactly_takes_no_more() -> None:
    """Four of a quarter each: two of them are a half."""
    assert kept([0.0] * 4, top_p=0.5) == [0, 1]


def test_top_p_of_one_takes_even_what_the_sum_no_longer_shows() -> None:
    """exp(-40) added to 1 is 1."""
    assert kept([0.0, -40.0], top_p=1.0) == [0, 1]


def test_min_p_takes_what_is_exactly_as_likely() -> None:
    assert kept([0.0, 0.0, -1.0], min_p=1.0) == [0, 1]


def test_ties_among_many_go_to_the_lower_ids() -> None:
    """A sort that is not stable may exchange equals once there are more than a few."""
    assert kept([0.0] * 5000, top_k=3) == [0, 1, 2]


def test_masks_and_probabilities_are_where_the_logits_are() -> None:
    logits = torch.empty(5, device="meta")
    seen = Seen([1, 2], 5, logits.device)
    assert seen.anywhere.is_meta and seen.generated.is_meta
    assert penalized(logits, seen, Sampling(repetition_penalty=2.0)).is_meta
    assert probabilities(logits, Sampling(temperature=1.0)).is_meta


def test_nothing_is_seen_before_the_first_token() -> None:
    seen = Seen([], 4)
    assert not seen.anywhere.any() and not seen.generated.any()
    seen.add(2)
    assert seen.anywhere.tolist() == seen.generated.tolist() == [False, False, True, False]


def test_masks_that_exist_are_taken_as_they_are() -> None:
    anywhere, generated = torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    seen = Seen.of(anywhere, generated)
    seen.add(3)
    assert seen.anywhere is anywhere and seen.generated is generated
    assert anywhere.tolist() == generated.tolist() == [False, False, False, True]
