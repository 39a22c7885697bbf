"""From logits to a token: penalties, greedy, temperature, top-k, top-p, min-p, with randomness keyed by
(seed, position).

The draw at a position does not depend on what was drawn elsewhere or how often. So a sampled text is
the same at any drafting depth, and a draft that is accepted when it *is* the model's own draw leaves
the model's distribution as it was (rejection sampling with one-hot proposals).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen35.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; every default switches its part off.

    temperature: 0 is greedy.
    top_k: draw from that many likeliest tokens (0: all).
    top_p: draw from the likeliest tokens whose probabilities reach it.
    min_p: leave out tokens less likely than that part of the likeliest one's probability.
    repetition_penalty: divide the logits of tokens in the prompt or the text so far by it where they are
        positive, multiply where negative (Keskar et al. 2019; as transformers does).
    presence_penalty: subtract it from the logits of tokens in the text so far. The prompt does not count
        (as in OpenAI's and vLLM's interfaces). Both penalties change greedy choices too.
    seed: key of the random numbers, together with the position.
    vocab: ids at and above it are padding and never drawn (None: every row of the head is real).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int = 0
    vocab: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature = {self.temperature}; expected a number >= 0")
        if self.top_k < 0:
            raise InputError(f"top_k = {self.top_k}; expected an integer >= 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p}; expected a number in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p = {self.min_p}; expected a number in [0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(
                f"repetition_penalty = {self.repetition_penalty}; expected a number > 0 (1 is off)"
            )
        if not math.isfinite(self.presence_penalty):
            raise InputError(f"presence_penalty = {self.presence_penalty}; expected a number")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed = {self.seed}; expected an integer in 0..2^63 - 1")


class Seen:
    """The tokens of a continuation that penalties look at, as masks over the head's rows.

    prompt: ids. Tokens that are picked are added one by one, in the order of the text. A draft that is
    rejected was never picked, so it leaves no trace.
    """

    def __init__(
        self, prompt: Sequence[int], rows: int, device: torch.device | str = "cpu"
    ) -> None:
        self.anywhere = torch.zeros(rows, dtype=torch.bool, device=device)  # [V]
        self.anywhere[torch.tensor(prompt, dtype=torch.int64, device=device)] = True
        self.generated = torch.zeros_like(self.anywhere)  # [V]

    @classmethod
    def of(cls, anywhere: Tensor, generated: Tensor) -> "Seen":
        """Make one from existing masks [V]."""
        seen = cls.__new__(cls)
        seen.anywhere, seen.generated = anywhere, generated
        return seen

    def add(self, token: int) -> None:
        """Count a token of the text."""
        self.anywhere[token] = self.generated[token] = True


def penalized(logits: Tensor, seen: Seen, sampling: Sampling) -> Tensor:
    """Apply the penalties to logits [V]: repetition first, then presence. Returns [V] float64."""
    wide = logits.double()
    factor = sampling.repetition_penalty
    repeated = torch.where(wide < 0, wide * factor, wide / factor)
    scores = torch.where(seen.anywhere, repeated, wide)
    return torch.where(seen.generated, scores - sampling.presence_penalty, scores)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution drawn from. logits [V] -> [V] float64; needs temperature > 0.

    Filters in the usual order: temperature, top-k, then the smallest set of most likely tokens whose
    probabilities reach top_p (at least one), then min-p. Ties at an edge go to the lower id.
    """
    real = logits[: sampling.vocab].double()
    # The largest is 0, whatever the temperature.
    scaled = (real - real.max()) / sampling.temperature
    ranked, order = scaled.sort(descending=True, stable=True)
    if sampling.top_k:
        ranked[sampling.top_k :] = -torch.inf
    p = ranked.softmax(-1)
    if sampling.top_p < 1:
        reached_before = p.cumsum(-1) - p >= sampling.top_p
        p = p.masked_fill(reached_before, 0)
    p = p.masked_fill(p < sampling.min_p * p[0], 0)
    filtered = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
    filtered[order] = p / p.sum()
    return filtered


def uniform(seed: int, position: int) -> float:
    """One number in [0, 1), a pure function of its arguments (the counter-based Philox generator)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=position)).random()


def pick(logits: Tensor, position: int, sampling: Sampling, seen: Seen | None = None) -> int:
    """Choose the token at `position` of the sequence from the logits [V] before it.

    seen: the tokens before it, which penalties need; the choice is added to them.
    """
    scores = logits if seen is None else penalized(logits, seen, sampling)
    drawn = uniform(sampling.seed, position) if sampling.temperature else 0.0
    token = int(choose(scores, drawn, sampling))
    if seen is not None:
        seen.add(token)
    return token


def choose(scores: Tensor, drawn: float | Tensor, sampling: Sampling) -> Tensor:
    """The token of scores [V], a scalar on their device; `drawn` in [0, 1) decides where one is drawn."""
    if sampling.temperature == 0:
        return scores[: sampling.vocab].argmax()
    cumulative = probabilities(scores, sampling).cumsum(-1)
    # Scaled by the total, so that rounding in the sum cannot leave the last token out.
    threshold = drawn * cumulative[-1]
    return torch.searchsorted(cumulative, threshold, right=True)
