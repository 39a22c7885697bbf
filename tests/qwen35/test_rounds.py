"""Decode rounds over a model that is a table: the tokens, both caches and the counts after each
round are known beforehand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35.finite import NotFiniteError
from qwen35.sampling import Sampling, Seen
from qwen35.speculative import Decoder, DraftStats
from reference.linear import DECODE_ROWS
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

PROMPT = [3, 1, 4, 1, 5]
COUNT = 40
SAMPLINGS = {
    "greedy": Sampling(vocab=VOCABULARY),
    "drawn": Sampling(
        temperature=1.5, repetition_penalty=1.3, presence_penalty=0.5, seed=4, vocab=VOCABULARY
    ),
}
# Positions of wrong drafts: none, in a row, and one after the first pass of a deep round.
WRONG = {"right": [], "often wrong": [7, 8, 12, 17], "wrong late": [12, 13, 20, 32]}


class Begun:
    """A decoder after a prompt and its first token. sequence: the prompt and the whole text."""

    def __init__(
        self, depth: int, sampling: Sampling = SAMPLINGS["greedy"], *, wrong: Any = (),
        stop: frozenset[int] = frozenset(), broken: int | None = None,
    ) -> None:  # fmt: skip
        self.model: Any = Table()
        text, self.logits = plain_text(self.model, PROMPT, COUNT, sampling)
        self.sequence = [*PROMPT, *text]
        self.model.lm_head.guesses = wrong_at(self.sequence, wrong)
        self.model.lm_head.broken = broken
        self.cache: Any = Rows()
        ids = torch.tensor([PROMPT], device=CPU)
        hidden = self.model(ids, self.cache)
        self.model.draft(ids[:, 1:], hidden[:, :-1], self.cache)
        self.model.passes.clear()
        seen = Seen(PROMPT, ROWS) if sampling.has_penalties else None
        if seen is not None:
            seen.add(text[0])
        self.decoder = Decoder(
            self.model, self.cache, token=text[0], hidden=hidden[:, -1:], depth=depth,
            sampling=sampling, stop=stop, seen=seen,
        )  # fmt: skip

    def check(self, known: int, found: list[tuple[int, Tensor]]) -> None:
        """A round's tokens and their logits. known: the number of tokens before the round."""
        end = known + len(found)
        assert [token for token, _ in found] == self.sequence[known:end]
        rows = self.logits[known - len(PROMPT) : end - len(PROMPT)]
        assert torch.equal(torch.stack([row for _, row in found]), torch.stack(rows))
        assert self.cache.rows == self.sequence[: end - 1]  # the newest token is not in it


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("depth", [0, 1, 3, 4, 9])
def test_a_round_accepts_the_drafts_before_the_first_wrong_one(
    depth: int, sampling: str, wrong: str
) -> None:
    """It gives them and one token more. The MTP head's cache has the trunk's states and no draft's."""
    begun = Begun(depth, SAMPLINGS[sampling], wrong=WRONG[wrong])
    stats, known = begun.decoder.stats, len(PROMPT) + 1
    assert stats == DraftStats(proposed=[0] * depth, accepted=[0] * depth)
    while known < len(begun.sequence):
        limit = len(begun.sequence) - known
        drafts = min(depth, limit - 1)
        right = next((i for i in range(drafts) if known + i in WRONG[wrong]), drafts)
        before = stats.forwards, stats.tokens, [*stats.proposed], [*stats.accepted]
        mtp = [*begun.cache.mtp.rows]
        begun.model.passes.clear()
        found = begun.decoder.round(limit)
        assert len(found) == right + 1
        begun.check(known, found)
        assert begun.cache.mtp.rows == (pairs(begun.sequence, known) if drafts else mtp)
        rows = [min(DECODE_ROWS, drafts + 1 - i) for i in range(0, right + 1, DECODE_ROWS)]
        assert begun.model.passes == rows
        assert (stats.forwards, stats.tokens) == (before[0] + len(rows), before[1] + len(found))
        assert stats.proposed == [n + (i < drafts) for i, n in enumerate(before[2])]
        assert stats.accepted == [n + (i < right) for i, n in enumerate(before[3])]
        known += len(found)


@pytest.mark.parametrize("at", [0, 1, 3, 4, 6, 9])
def test_a_stop_token_ends_a_round(at: int) -> None:
    """Behind it no accepted draft is given, and none is left in a cache."""
    begun = Begun(9)
    known = len(PROMPT) + 1
    stop = begun.sequence[known + at]
    first = begun.sequence.index(stop, known)
    stopping = Begun(9, stop=frozenset([stop]))
    found = stopping.decoder.round(30)
    assert len(found) == first - known + 1
    stopping.check(known, found)
    assert stopping.decoder.stats.accepted == [int(i < first - known) for i in range(9)]


@pytest.mark.parametrize("at", [0, 2, 3, 5])
def test_nan_is_an_error_with_its_position_and_the_rows_before_it(at: int) -> None:
    """The position of the token that would be picked, and the tokens since the last round."""
    newest = len(PROMPT)
    begun = Begun(6, broken=newest + at)
    with pytest.raises(NotFiniteError) as raised:
        begun.decoder.round(30)
    assert raised.value.position == newest + at + 1
    assert raised.value.ids == begun.sequence[newest : newest + at + 1]


def test_ids_are_made_where_the_hidden_states_are() -> None:
    """Whatever torch's default device is."""
    begun = Begun(5)
    with torch.device("meta"):
        begun.check(len(PROMPT) + 1, begun.decoder.round(30))
