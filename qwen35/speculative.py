"""Speculative decoding: drafts of the MTP head, verification by the trunk, acceptance, rollback.

The tokens do not depend on the depth. Each row that the trunk verifies has the same bits as if it
were computed alone (reference/linear.py). The model chooses its own token at each position, and a
draft is accepted if it is that token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen35.cache import Cache
from qwen35.finite import check_finite
from qwen35.sampling import Sampling, Seen, pick
from reference.linear import DECODE_ROWS
from reference.model import Model


@dataclass
class DraftStats:
    """Counts of one generation's decode phase. proposed[i], accepted[i]: drafts of depth i + 1."""

    forwards: int = 0
    tokens: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_forward(self) -> float | None:
        """The mean number of tokens per trunk pass, at most 1 + depth. None if there was no pass."""
        return self.tokens / self.forwards if self.forwards else None


class Decoder:
    """Continues one sequence in rounds. A round gives 1 to 1 + depth tokens.

    token: the newest token, which the trunk has not seen yet.
    hidden: [1, 1, D], the trunk's hidden state of the token before it.
    depth: the most drafts in a round.
    sampling: how tokens are chosen.
    stop: tokens after which nothing is drafted.
    seen: the tokens so far, `token` included, if penalties need them.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        *,
        token: int,
        hidden: Tensor,
        depth: int,
        sampling: Sampling,
        stop: frozenset[int],
        seen: Seen | None = None,
    ) -> None:
        self.model, self.cache = model, cache
        self.depth, self.sampling, self.stop, self.seen = depth, sampling, stop, seen
        self.stats = DraftStats(proposed=[0] * depth, accepted=[0] * depth)
        # The MTP head has not seen these tokens yet; fresh_hidden holds the trunk's state before each.
        self.fresh_ids, self.fresh_hidden = [token], hidden

    def round(self, limit: int) -> list[tuple[int, Tensor]]:
        """Return up to `limit` next tokens, each with the logits [V] it was picked from.

        NotFiniteError if logits are NaN or infinite.
        """
        # The trunk adds its own token to the accepted drafts, so limit - 1 drafts are enough.
        drafts = self._draft(min(self.depth, limit - 1))
        rows = [self.fresh_ids[-1], *drafts]
        picked: list[tuple[int, Tensor]] = []
        hiddens: list[Tensor] = []
        for first in range(0, len(rows), DECODE_ROWS):
            part = rows[first : first + DECODE_ROWS]
            start = self.cache.length
            hidden = self.model(self._tensor(part), self.cache)  # [1, len(part), D]
            logits = self.model.lm_head(hidden)[0]  # [len(part), V]
            self.stats.forwards += 1
            for i, row in enumerate(logits):
                check_finite(row, start + i + 1, rows[: first + i + 1])
                token = pick(row, start + i + 1, self.sampling, self.seen)
                picked.append((token, row))
                hiddens.append(hidden[:, i : i + 1])
                guessed = drafts[first + i : first + i + 1] == [token]
                if not guessed or token in self.stop:
                    self.cache.rollback(len(part) - 1 - i)
                    self._count(len(drafts), len(picked))
                    self.fresh_ids = [token for token, _ in picked]
                    self.fresh_hidden = torch.cat(hiddens, dim=1)
                    return picked
        raise AssertionError("the last row has no draft after it, so it always ends the round")

    def _draft(self, depth: int) -> list[int]:
        """Draft the `depth` tokens after the fresh ones.

        The first pass runs the fresh tokens with the trunk's hidden states, and stays in the MTP
        cache. The later passes are chained on the head's own hidden states, and are rolled back.
        """
        if depth < 1:
            return []
        assert self.cache.mtp is not None
        drafts: list[int] = []
        ids, hidden = self.fresh_ids, self.fresh_hidden
        for _ in range(depth):
            hidden = self.model.draft(self._tensor(ids), hidden, self.cache)[:, -1:]
            logits = self.model.lm_head(hidden)[0, 0, : self.sampling.vocab]
            drafts.append(int(logits.argmax()))
            ids = drafts[-1:]
        self.cache.mtp.rollback(depth - 1)
        return drafts

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.fresh_hidden.device)

    def _count(self, proposed: int, picked: int) -> None:
        self.stats.tokens += picked
        for i in range(proposed):
            self.stats.proposed[i] += 1
            self.stats.accepted[i] += i < picked - 1
