"""A model whose logits are looked up: what decoding does around a model, without computing one.

A hidden state is three numbers, [of the MTP head, token, position]. The logits after a token depend
on the token and on its position alone, so a text is known from a plain loop, and an entry of a cache
says of itself whether it belongs there.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qwen35.config import Config
from qwen35.sampling import Sampling, Seen, pick
from tests.support.family import FAMILY

VOCABULARY = 12  # ids with a text; the head has padding after them, with the largest logits
ROWS = 16
CPU = torch.device("cpu")  # said everywhere, so that a test can make another one the default

Hidden = tuple[int, int, int]


@dataclass
class MtpRows:
    """In place of the MTP head's keys and values: the hidden state and the id of each row."""

    rows: list[tuple[Hidden, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.rows)

    def rollback(self, tokens: int) -> None:
        assert 0 <= tokens <= len(self.rows)
        del self.rows[len(self.rows) - tokens :]


@dataclass
class Rows:
    """In place of a cache: the ids that the trunk has seen. reserved: what was asked for."""

    rows: list[int] = field(default_factory=list)
    mtp: MtpRows = field(default_factory=MtpRows)
    reserved: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.rows)

    def reserve(self, capacity: int) -> None:
        self.reserved.append(capacity)

    def rollback(self, tokens: int) -> None:
        assert 0 <= tokens <= len(self.rows)
        del self.rows[len(self.rows) - tokens :]


class Head(nn.Module):
    """The logits after a hidden state. Those of the MTP head are largest for `guesses` [position]."""

    def __init__(self) -> None:
        super().__init__()
        self.guesses: Sequence[int] = ()
        self.broken: int | None = None  # the position of a token whose logits have a NaN

    def forward(self, hidden: Tensor) -> Tensor:
        rows = [self.row(*map(int, row)) for row in hidden[0].tolist()]
        return torch.stack(rows)[None]

    def row(self, of_mtp: int, token: int, position: int) -> Tensor:
        generator = torch.Generator(device=CPU).manual_seed(1000 * token + position)
        logits = 3 * torch.randn(ROWS, generator=generator, device=CPU)
        if of_mtp:
            guess = self.guesses[position + 1] if position + 1 < len(self.guesses) else 0
            logits[guess] = 50
        elif position == self.broken:
            logits[token] = math.nan
        logits[VOCABULARY:] = 99
        return logits


class Table(nn.Module):
    """passes: the number of rows of each pass of the trunk. new_caches: all that it has made."""

    def __init__(self, context: int = 4096) -> None:
        super().__init__()
        config = Config.from_dict(FAMILY["27B"] | {"vocab_size": ROWS})
        self.config = replace(config, max_position_embeddings=context)
        self.embed_tokens = nn.Embedding(ROWS, 1, device=CPU)
        self.norm, self.lm_head, self.mtp = nn.Identity(), Head(), nn.Identity()
        self.passes: list[int] = []
        self.new_caches: list[Rows] = []

    def new_cache(self) -> Rows:
        self.new_caches.append(Rows())
        return self.new_caches[-1]

    def forward(self, ids: Tensor, cache: Rows) -> Tensor:
        ids_ = self._ids(ids)
        states = [[0, token, cache.length + i] for i, token in enumerate(ids_)]
        cache.rows += ids_
        self.passes.append(len(ids_))
        return self.norm(torch.tensor([states], device=CPU, dtype=torch.float32))

    def draft(self, ids: Tensor, hidden: Tensor, cache: Rows) -> Tensor:
        states = [tuple(map(int, row)) for row in hidden[0].tolist()]
        pairs = [*zip(states, self._ids(ids), strict=True)]
        cache.mtp.rows += pairs
        after = [[1, token, position + 1] for (_, _, position), token in pairs]
        return torch.tensor([after], device=CPU, dtype=torch.float32)

    @staticmethod
    def _ids(ids: Tensor) -> list[int]:
        assert ids.dtype == torch.int64 and ids.shape[0] == 1
        return ids[0].tolist()


def plain_text(
    model: Any, prompt: list[int], count: int, sampling: Sampling
) -> tuple[list[int], list[Tensor]]:
    """A text, one token after the other, and the logits that each was picked from."""
    ids, rows = list(prompt), []
    seen = Seen(prompt, ROWS) if sampling.has_penalties else None
    for _ in range(count):
        rows.append(model.lm_head.row(0, ids[-1], len(ids) - 1))
        ids.append(pick(rows[-1], len(ids), sampling, seen))
    return ids[len(prompt) :], rows


def wrong_at(sequence: Sequence[int], positions: Iterable[int]) -> list[int]:
    """The sequence with other ids at some positions: drafts of which those are wrong."""
    wrong = set(positions)
    return [(t + 1) % VOCABULARY if i in wrong else t for i, t in enumerate(sequence)]


def pairs(sequence: Sequence[int], end: int) -> list[tuple[Hidden, int]]:
    """What the MTP head's cache holds of the first `end` tokens: the trunk's state of each, with the
    token after it."""
    return [((0, sequence[i], i), sequence[i + 1]) for i in range(end - 1)]
