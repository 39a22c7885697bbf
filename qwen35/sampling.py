"""Chooses a token from logits: penalties, greedy, temperature, top-k, top-p, min-p.

Random numbers depend only on (seed, position). Therefore the draw at a position does not depend on
other draws, and a sampled text is the same at any drafting depth. A draft is accepted if it equals
the model's own draw, so drafting does not change the model's distribution (rejection sampling with
one-hot proposals).
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
    """How a token is chosen. Each default switches its part off.

    temperature: 0 is greedy.
    top_k: draw from this many of the likeliest tokens (0: all).
    top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least this.
    min_p: leave out tokens whose probability is below this fraction of the largest one.
    repetition_penalty: for tokens of the prompt or of the text so far, positive logits are divided
        by it, and negative ones multiplied (Keskar et al. 2019; as in transformers).
    presence_penalty: is subtracted from the logits of tokens of the text so far. The prompt does
        not count, as in OpenAI's and vLLM's interfaces. Both penalties also change greedy choices.
    seed: the key of the random numbers, together with the position.
    vocab: ids from there on are padding and never drawn (None: every row of the head is a token).
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
    """The tokens that penalties depend on, as masks over the head's rows.

    prompt: ids. Picked tokens are added one by one, in the order of the text. A rejected draft is
    never picked, so it is not added.
    """

    def __init__(
        self, prompt: Sequence[int], rows: int, device: torch.device | str = "cpu"
    ) -> None:
        self.anywhere = torch.zeros(rows, dtype=torch.bool, device=device)  # [V]
        self.anywhere[torch.tensor(prompt, dtype=torch.int64, device=device)] = True
        self.generated = torch.zeros_like(self.anywhere)  # [V]

    @classmethod
    def of(cls, anywhere: Tensor, generated: Tensor) -> "Seen":
        """Make an instance from existing masks [V]."""
        seen = cls.__new__(cls)
        seen.anywhere, seen.generated = anywhere, generated
        return seen

    def add(self, token: int) -> None:
        """Add a token of the text."""
        self.anywhere[token] = self.generated[token] = True


def penalized(logits: Tensor, seen: Seen, sampling: Sampling) -> Tensor:
    """Apply the penalties to logits [V]: repetition first, then presence. Returns [V] float64.

    Results beyond the range of float64 are its largest numbers, because a draw needs differences.
    """
    wide = logits.double()
    factor = sampling.repetition_penalty
    repeated = torch.where(wide < 0, wide * factor, wide / factor)
    scores = torch.where(seen.anywhere, repeated, wide)
    penalized_ = torch.where(seen.generated, scores - sampling.presence_penalty, scores)
    largest = torch.finfo(torch.float64).max
    return penalized_.clamp(-largest, largest)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that tokens are drawn from: logits [V] -> [V] float64. It needs temperature
    > 0.

    The filters come in the usual order: temperature, top-k, then the smallest set of likeliest
    tokens whose probabilities reach top_p (at least one token), then min-p. Ties at an edge go to
    the lower id.
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
    """A random number in [0, 1) that depends only on the arguments (counter-based Philox
    generator)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=position)).random()


def pick(logits: Tensor, position: int, sampling: Sampling, seen: Seen | None = None) -> int:
    """Choose the token at `position` of the sequence from the logits [V] before it.

    seen: the tokens before it, for penalties. The choice is added to them.
    """
    scores = logits if seen is None else penalized(logits, seen, sampling)
    drawn = uniform(sampling.seed, position) if sampling.temperature else 0.0
    token = int(choose(scores, drawn, sampling))
    if seen is not None:
        seen.add(token)
    return token


def choose(scores: Tensor, drawn: float | Tensor, sampling: Sampling) -> Tensor:
    """Choose a token from scores [V]. Returns a scalar on their device. drawn: random number in [0,
    1)."""
    if sampling.temperature == 0:
        return scores[: sampling.vocab].argmax()
    cumulative = probabilities(scores, sampling).cumsum(-1)
    # Scaling by the total prevents that rounding in the sum excludes the last token.
    threshold = drawn * cumulative[-1]
    return torch.searchsorted(cumulative, threshold, right=True)
