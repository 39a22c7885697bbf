"""Log probabilities of tokens in the model's own distribution, before temperature, penalties and
filters."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any
from unicodedata import combining, east_asian_width

from torch import Tensor

from qwen35.pieces import piece
from qwen35.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprobs:
    """A chosen token with its natural log probability, and the likeliest ids with theirs, best
    first."""

    id: int
    logprob: float
    top: list[tuple[int, float]]

    def document(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """For JSON: {"id", "text", "logprob", "top": [{"id", "text", "logprob"}, ...]}."""
        top = [_described(token, p, tokenizer) for token, p in self.top]
        return _described(self.id, self.logprob, tokenizer) | {"top": top}


def token_logprobs(logits: Tensor, token: int, count: int, vocab: int | None) -> TokenLogprobs:
    """The log probabilities of `token` and of the `count` likeliest ids. Ties go to the lower id.

    logits: [V], as the model gives them. vocab: ids from there on are padding, and are left out. The
    computation is in float64 and uses these logits alone, so the same logits have the same log
    probabilities.
    """
    real = logits[:vocab].double()
    logprobs = real.log_softmax(-1)  # [vocab]
    top: list[tuple[int, float]] = []
    if count:
        edge = real.topk(count).values[-1]
        ids = (real >= edge).nonzero()[:, 0]  # ascending; more than `count` if there are ties
        order = real[ids].argsort(descending=True, stable=True)[:count]
        best = ids[order]
        top = list(zip(best.tolist(), logprobs[best].tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs[token]), top)


def table(rows: Sequence[TokenLogprobs], tokenizer: Tokenizer | None) -> str:
    """A table as text, with a line per token, and the likeliest ids in percent."""
    chosen = [_shown(row.id, tokenizer) for row in rows]
    width = max(map(_columns, ["token", *chosen]), default=0)
    count = max((len(row.top) for row in rows), default=0)
    likeliest = f"   the {count} likeliest" if count > 1 else "   the likeliest" if count else ""
    lines = [f" logprob  token{' ' * (width - 5)}{likeliest}"]
    for row, shown in zip(rows, chosen, strict=True):
        top = "  ".join(f"{_shown(token, tokenizer)} {exp(p):.1%}" for token, p in row.top)
        lines.append(
            f"{row.logprob:8.4f}  {shown}{' ' * (width - _columns(shown))}   {top}".rstrip()
        )
    return "\n".join(lines)


def _described(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    named = piece(tokenizer, token).document() if tokenizer else {"id": token}
    return named | {"logprob": logprob}


def _shown(token: int, tokenizer: Tokenizer | None) -> str:
    return str(piece(tokenizer, token) if tokenizer else token)


def _columns(text: str) -> int:
    """The number of columns of a text in a terminal."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)
