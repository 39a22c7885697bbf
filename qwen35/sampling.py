"""From logits to a token: greedy, temperature, top-k, top-p, with randomness keyed by (seed, position).

The draw at a position does not depend on what was drawn elsewhere or how often. So a sampled text is
the same at any drafting depth, and a draft that is accepted when it *is* the model's own draw leaves
the model's distribution as it was (rejection sampling with one-hot proposals).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen35.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 switch the filters off.

    vocab: ids at and above it are padding and never drawn (None: every row of the head is real).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    vocab: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature = {self.temperature}; expected a number >= 0")
        if self.top_k < 0:
            raise InputError(f"top_k = {self.top_k}; expected an integer >= 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p}; expected a number in (0, 1]")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed = {self.seed}; expected an integer in 0..2^63 - 1")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution drawn from. logits [V] -> [V] float64; needs temperature > 0.

    Filters in the usual order: temperature, top-k, then the smallest set of most likely tokens whose
    probabilities reach top_p (at least one). Ties at an edge go to the lower id.
    """
    real = logits[: sampling.vocab].double()
    scaled = (
        real - real.max()
    ) / sampling.temperature  # the largest is 0, whatever the temperature
    ranked, order = scaled.sort(descending=True, stable=True)
    if sampling.top_k:
        ranked[sampling.top_k :] = -torch.inf
    p = ranked.softmax(-1)
    if sampling.top_p < 1:
        reached_before = p.cumsum(-1) - p >= sampling.top_p
        p = p.masked_fill(reached_before, 0)
    filtered = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
    filtered[order] = p / p.sum()
    return filtered


def uniform(seed: int, position: int) -> float:
    """One number in [0, 1), a pure function of its arguments (the counter-based Philox generator)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=position)).random()


def pick(logits: Tensor, position: int, sampling: Sampling) -> int:
    """The token at `position` of the sequence from the logits [V] before it."""
    if sampling.temperature == 0:
        return int(logits[: sampling.vocab].argmax())
    cumulative = probabilities(logits, sampling).cumsum(-1)
    # Scaled by the total, so that rounding in the sum cannot leave the last token out.
    threshold = uniform(sampling.seed, position) * cumulative[-1]
    return int(torch.searchsorted(cumulative, threshold, right=True))
