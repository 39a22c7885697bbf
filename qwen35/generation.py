"""Continues a prompt: prefill on the 64-token grid, then decoding with drafts.

`python -m qwen35.generate` is the command line (generate.py).
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qwen35.cache import Cache
from qwen35.chunk import chosen_chunk
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.finite import NotFiniteError, check_finite, not_finite
from qwen35.logprobs import TokenLogprobs, token_logprobs
from qwen35.node_error import blaming
from qwen35.prefix.cache import PrefixCache
from qwen35.sampling import Sampling, Seen, pick
from qwen35.speculative import Decoder, DraftStats
from qwen35.step_decoder import (
    Passes,
    Rounds,
    StepDecoder,
    check_depth,
    finish_prompt,
    prepared,
    runs_as_step,
)
from reference.linear import GRID
from reference.model import Model

# Memory is reserved for this many new tokens at the start, because max_new_tokens may be the whole
# context.
AT_ONCE = 2048


def prefill(
    model: Model,
    ids: list[int],
    cache: Cache,
    *,
    chunk: int,
    draft: bool,
    hidden: Tensor | None = None,
    stops: Sequence[int] = (),
    at_stop: Callable[[int, Tensor], object] = lambda end, hidden: None,
    progress: Callable[[int], object] = lambda tokens: None,
    passes: Passes | None = None,
) -> Tensor:
    """Compute the part of a prompt that `cache` lacks. Returns the trunk's hidden state of the last
    token, [1, 1, D].

    Passes of `chunk` tokens begin and end on the 64-token grid. The tail after the grid is a
    separate pass. The bits of a token are the same at any chunk size. draft: also run the MTP head
    over all rows of the prompt but the last, whose next token is not known yet. The MTP head stays
    one row behind, so its state at a stop does not depend on later tokens.

    hidden: the state of the last token that is in the cache, [1, 1, D]. stops: positions on the
    grid where a pass ends, whatever the chunk; `at_stop` gets each with the state of the token
    before it. progress: called after each pass with the number of its tokens. passes: how the passes run
    (default: by the model itself).
    """
    run = passes or Passes(model)
    start, whole = cache.length, len(ids) // GRID * GRID
    edges = sorted({start, *range(start, whole, chunk), *stops, max(start, whole), len(ids)})
    before = hidden
    for first, last in pairwise(edges):
        computed = run.trunk(ids[first:last], cache)  # [1, T, D]
        earlier = [] if before is None else [before]
        behind = torch.cat([*earlier, computed[:, :-1]], dim=1)
        if draft and behind.shape[1]:
            run.draft(ids[last - behind.shape[1] : last], behind, cache)
        before = computed[:, -1:].clone()  # a view would keep the whole pass alive
        if last in stops:
            at_stop(last, before)
        progress(last - first)
    assert before is not None, "a prompt has at least one token"
    return before


def check_counts(
    max_new_tokens: int | None, prefill_chunk: int | None, draft_tokens: int | None
) -> None:
    """InputError for a count that is wrong for every model. None is a default, and right."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens}; expected at least 1")
    if prefill_chunk is not None and (prefill_chunk < GRID or prefill_chunk % GRID):
        raise InputError(
            f"prefill_chunk = {prefill_chunk}; expected a multiple of {GRID}, the grid"
        )
    if draft_tokens is not None and draft_tokens < 0:
        raise InputError(f"draft_tokens = {draft_tokens}; expected an integer >= 0")


def check_limits(
    config: Config, draft_tokens: int | None, logprobs: int | None, vocab: int | None
) -> None:
    """InputError for a count that does not fit a model's context or vocabulary. vocab: the ids of the
    tokenizer (None: all rows of the head)."""
    context = config.max_position_embeddings
    if draft_tokens is not None and draft_tokens > context:  # memory is reserved for every draft
        raise InputError(f"draft_tokens = {draft_tokens}; expected at most {context}, the context")
    ids = min(vocab or config.vocab_size, config.vocab_size)
    if logprobs is not None and not 0 <= logprobs <= ids:
        raise InputError(f"logprobs = {logprobs}; expected 0 to {ids}, the vocabulary")


@dataclass(repr=False)
class Generation:
    """One continuation of a prompt. Iterate over it for (token, logits [V]), and then read the
    figures.

    prefill_chunk: prompt tokens per pass, a multiple of 64; None: as `qwen35.chunk` chooses.
    logprobs: how many of the likeliest tokens `token_logprobs` has beside each chosen one. With
    None it is not computed, and stays empty.
    """

    model: Model
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: frozenset[int]
    draft_tokens: int
    prefill_chunk: int | None = None
    prefix_cache: PrefixCache | None = None
    digest: bool = False
    logprobs: int | None = None
    progress: Callable[[int], object] = lambda tokens: None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    draft: DraftStats = field(default_factory=DraftStats)
    cached_tokens: int = 0
    cache_reason: str = ""
    logits_sha256: str = ""
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prepare_s: float = 0.0  # for compiling and capturing the fast path's round, not in the others
    ttft_s: float = 0.0
    decode_s: float = 0.0

    def __repr__(self) -> str:
        return (
            f"Generation({len(self.prompt)} prompt tokens, {len(self.token_ids)} of at most "
            f"{self.max_new_tokens} tokens, {self.finish_reason})"
        )

    def __post_init__(self) -> None:
        config = self.model.config
        config.check_prompt(self.prompt, new_tokens=1)
        check_counts(self.max_new_tokens, self.prefill_chunk, self.draft_tokens)
        check_limits(config, self.draft_tokens, self.logprobs, self.sampling.vocab)
        if self.draft_tokens and self.model.mtp is None:
            raise InputError(
                f"draft_tokens = {self.draft_tokens}, but the checkpoint has no MTP head"
            )
        check_depth(self.model, self.draft_tokens)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each token with its logits [V]. NotFiniteError, with the position and the node, if
        logits are NaN or infinite. NodeError if a swapped node fails."""
        try:
            with blaming(self.model):
                yield from self._tokens()
        except NotFiniteError as error:
            ids = self.prompt + self.token_ids[:-1] + error.ids
            raise NotFiniteError(error.position, error.ids, self._origin(ids)) from None

    @torch.inference_mode()
    def _tokens(self) -> Iterator[tuple[int, Tensor]]:
        self.token_ids, self.token_logprobs = [], []
        room = self.model.config.max_position_embeddings - len(self.prompt)
        limit = min(self.max_new_tokens, room)
        at_once = min(limit, AT_ONCE)
        started = time.perf_counter()
        rounds, turn = None, 0
        if self.path == "fast":  # kernels are compiled before the timing begins
            rounds = prepared(
                self.model, len(self.prompt), self.draft_tokens, self.sampling, at_once
            )
            turn = rounds.take_turn()
            self.prepare_s, started = time.perf_counter() - started, time.perf_counter()
        bits = hashlib.sha256()
        with self._computed(rounds, turn) as (cache, hidden):
            logits = self.model.lm_head(hidden)[0, 0]  # [V]
            check_finite(logits, len(self.prompt), ())
            seen = None
            if self.sampling.has_penalties:
                seen = Seen(self.prompt, logits.shape[-1], logits.device)
            token = pick(logits, len(self.prompt), self.sampling, seen)
            first = time.perf_counter()
            self.ttft_s = first - started
            settings: dict[str, Any] = {
                "token": token, "hidden": hidden, "depth": self.draft_tokens,
                "sampling": self.sampling, "stop": self.stop, "seen": seen,
            }  # fmt: skip
            if rounds is not None:
                decoder = StepDecoder(self.model, rounds, len(self.prompt), turn=turn, **settings)
            else:
                decoder = Decoder(self.model, cache, **settings)
            self.draft = decoder.stats
            fresh = [(token, logits)]
            # The first token is yielded before the prefix is stored.
            yield from self._given(fresh, first, bits)
        while True:
            if self.token_ids[-1] in self.stop:
                self.finish_reason = "stop"
                return
            if len(self.token_ids) == limit:
                self.finish_reason = "length"
                return
            yield from self._given(decoder.round(limit - len(self.token_ids)), first, bits)

    def _given(
        self, fresh: list[tuple[int, Tensor]], first: float, bits: "hashlib._Hash"
    ) -> Iterator[tuple[int, Tensor]]:
        for token, logits in fresh:
            self.token_ids.append(token)
            if self.logprobs is not None:
                found = token_logprobs(logits, token, self.logprobs, self.sampling.vocab)
                self.token_logprobs.append(found)
            if self.digest:
                bits.update(logits.float().cpu().numpy().astype("<f4").tobytes())
                self.logits_sha256 = bits.hexdigest()
            self.decode_s = time.perf_counter() - first
            yield token, logits

    @contextmanager
    def _computed(self, rounds: Rounds | None, turn: int) -> Iterator[tuple[Cache, Tensor]]:
        """Compute the prompt. Yield its cache and the hidden state of its last token, [1, 1, D].

        With rounds, the cache ends after the last whole block, and the rounds compute the rest of the
        prompt. At the end of the block, new segments are stored in the prefix cache.
        """
        length = len(self.prompt)
        whole = length if rounds is None else length // GRID * GRID
        with self._reused(self.prompt[:whole], rounds, turn) as (cache, hidden):
            if rounds is not None:
                hidden = finish_prompt(rounds, cache, self.prompt[whole:], hidden)
                self.progress(length - whole)
                rounds.check_turn(turn)
            assert hidden is not None, "a prompt has at least one token"
            yield cache, hidden

    @contextmanager
    def _reused(
        self, ids: list[int], rounds: Rounds | None, turn: int
    ) -> Iterator[tuple[Cache, Tensor | None]]:
        """Yield the cache of the first tokens of the prompt and the hidden state of the last of them,
        [1, 1, D], or None if there are none. At the end of the block, new segments are stored in the
        prefix cache."""
        draft, room = self.draft_tokens > 0, len(ids)
        if rounds is not None:
            cache, passes = rounds.cache(), rounds.passes()
        else:
            cache, passes = self.model.new_cache(), None
            room += min(self.max_new_tokens, AT_ONCE) + self.draft_tokens
        cache.reserve(room)  # at once, so that too little memory is an error before the start
        chunk = self.prefill_chunk or chosen_chunk(self.model, self.path)
        settings: dict[str, Any] = {
            "chunk": chunk, "draft": draft, "progress": self.progress, "passes": passes,
        }  # fmt: skip
        if self.prefix_cache is None:
            yield cache, prefill(self.model, ids, cache, **settings) if ids else None
            return
        kept = self.prefix_cache
        reuse = kept.begin(self.prompt, draft=draft, chunk=chunk)
        self.cached_tokens, self.cache_reason = reuse.length, reuse.reason
        try:
            hidden = kept.restore(reuse, cache, room=room, draft=draft)
            self.progress(reuse.length)
            if ids:
                hidden = prefill(
                    self.model, ids, cache, hidden=hidden, stops=reuse.stops,
                    at_stop=lambda end, h: kept.keep(reuse, cache, h, end, draft=draft), **settings,
                )  # fmt: skip
            yield cache, hidden
            if rounds is not None:
                rounds.check_turn(turn)  # what is kept are views of its memory
            kept.finish(reuse, self.prompt)
        finally:
            kept.release(reuse)

    @torch.inference_mode()
    def _origin(self, ids: list[int]) -> str:
        """Find the node in which NaN or infinity begins, by a prefill of all tokens. Returns a
        sentence."""
        cache = self.model.new_cache()
        with not_finite(self.model) as found:
            chunk = self.prefill_chunk or chosen_chunk(self.model, self.path)
            prefill(self.model, ids, cache, chunk=chunk, draft=False)
        if found:
            return f"the first node that returns such a number is {found[0]}"
        return "a prefill of the same tokens has only finite numbers"

    @property
    def path(self) -> str:
        """How decode rounds run: "fast" (as one graph) if all nodes that they need are fast, or
        "reference"."""
        return "fast" if runs_as_step(self.model, self.draft_tokens) else "reference"

    @property
    def tokens_per_s(self) -> float | None:
        """The decode speed, without the first token, which prefill gives. None if no other token was
        decoded."""
        decoded = len(self.token_ids) - 1
        return decoded / self.decode_s if decoded > 0 and self.decode_s > 0 else None
