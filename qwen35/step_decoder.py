"""Decoding on the fast path: rounds of `fast.step.Step`, with the interface of
`speculative.Decoder`."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fast.prompt import ROOMS, Prompt
from fast.state import Delta
from fast.step import Step, is_fast
from fast.target import MAX_ROWS
from qwen35.cache import Cache, KVCache
from qwen35.errors import InputError
from qwen35.finite import NotFiniteError
from qwen35.sampling import Sampling, Seen, choose, penalized, uniform
from qwen35.speculative import DraftStats
from reference.model import Model

CAPACITY = 1024  # the room of a step is a multiple of this many positions
KEPT = "_rounds"  # the attribute of a model with its last step


class StepDecoder:
    """Continues one sequence round by round on a device.

    rounds: those of `prepared`, which hold the prompt (`finish_prompt`). length: its number of tokens.
    turn: that of `Rounds.take_turn`. The others are as in `speculative.Decoder`. When the capacity is
    used up, it doubles.
    """

    def __init__(
        self,
        model: Model,
        rounds: "Rounds",
        length: int,
        *,
        token: int,
        hidden: Tensor,
        turn: int,
        depth: int,
        sampling: Sampling,
        stop: frozenset[int],
        seen: Seen | None = None,
    ) -> None:
        self.stats = DraftStats(proposed=[0] * depth, accepted=[0] * depth)
        self.model, self.sampling, self.stop = model, sampling, stop
        self.length = length  # positions that the trunk has computed
        self.newest = token
        self.rounds, self.turn = rounds, turn
        self.rounds.step.begin(token, hidden[0, 0])
        self.rounds.begin(self.length, sampling.seed, seen)

    def round(self, limit: int) -> list[tuple[int, Tensor]]:
        """Return up to `limit` next tokens, each with the logits [V] it was picked from.

        NotFiniteError if logits are NaN or infinite. InputError if another sequence has begun.
        """
        self.rounds.check_turn(self.turn)
        step = self.rounds.step
        if self.length + 1 + step.drafts > step.state.capacity:
            step = self._grown()
        count, *picked = step.round()
        logits = step.logits.clone()  # the next round overwrites them
        tokens: list[tuple[int, Tensor]] = []
        for token, row in zip(picked[: min(count, limit)], logits, strict=False):
            if token < 0:
                ids = [self.newest, *(before for before, _ in tokens)]
                raise NotFiniteError(self.length + len(ids), ids)
            tokens.append((token, row))
            if token in self.stop:
                break
        self.length += count
        self.newest = tokens[-1][0]
        self.stats.forwards += 1
        self.stats.tokens += len(tokens)
        for i in range(min(step.drafts, limit - 1)):  # as many as the reference's decoder proposes
            self.stats.proposed[i] += 1
            self.stats.accepted[i] += i < len(tokens) - 1
        return tokens

    def _grown(self) -> Step:
        """Replace the full step by one with twice the capacity, and return it."""
        old = self.rounds
        self.model.__dict__[KEPT] = None
        capacity = 2 * old.step.state.capacity
        self.rounds = _rounds(self.model, old.step.drafts, capacity, self.sampling)
        self.rounds.step.take_over(old.step)
        self.rounds.begin(self.length, self.sampling.seed, None)
        self.rounds.anywhere, self.rounds.generated = old.anywhere, old.generated
        self.turn = self.rounds.turn
        return self.rounds.step


def runs_as_step(model: Model, depth: int) -> bool:
    """Whether a model's rounds run as one graph: it is on a GPU, and all nodes that they need are
    fast."""
    on_gpu = model.embed_tokens.weight.device.type == "cuda"
    return on_gpu and depth < MAX_ROWS and is_fast(model, depth)


def check_depth(model: Model, depth: int) -> None:
    """InputError if only the depth keeps a model's rounds from running as one graph."""
    if depth >= MAX_ROWS and runs_as_step(model, MAX_ROWS - 1):
        raise InputError(
            f"draft_tokens = {depth}; expected at most {MAX_ROWS - 1}, which the fast path verifies in "
            "one pass"
        )


def prepared(model: Model, length: int, depth: int, sampling: Sampling, room: int) -> "Rounds":
    """Compiled and captured rounds for a prompt of `length` tokens, with memory for `room` new ones.
    The rounds of the last sequence are reused, with their graphs, if they have enough room and the
    same sampling settings."""
    return _rounds(model, depth, length + max(room + 1 + depth, MAX_ROWS), sampling)


def finish_prompt(
    rounds: "Rounds", cache: Cache, tail: Sequence[int], before: Tensor | None
) -> Tensor:
    """Compute the end of a prompt, `tail`, after its whole blocks. Returns the trunk's hidden state of
    the prompt's last token, [1, 1, D].

    cache: that of the whole blocks, from `Rounds.cache`. before: the hidden state of the last token in
    the cache, None if the cache is empty.
    """
    step = rounds.step
    step.take(cache)
    if not tail:
        assert before is not None, "a prompt has at least one token"
        return before
    return step.extend(tail, None if before is None else before[0, 0])[None, None]


class Passes:
    """How the passes of a prompt run: by the model itself."""

    def __init__(self, model: Model) -> None:
        self.model, self.device = model, model.embed_tokens.weight.device

    def trunk(self, ids: Sequence[int], cache: Cache) -> Tensor:
        """Run the trunk over T tokens. Returns their hidden states [1, T, D], which the next pass may
        overwrite."""
        return self.model(torch.tensor([ids], device=self.device), cache)

    def draft(self, ids: Sequence[int], hidden: Tensor, cache: Cache) -> None:
        """Run the MTP head over hidden [1, T, D]. ids: the token after each of the T rows."""
        self.model.draft(torch.tensor([ids], device=self.device), hidden, cache)


class GraphPasses(Passes):
    """Passes of few tokens are captured graphs, which compute on the memory of a step. The cache has to
    be that of its state."""

    def __init__(self, model: Model, prompt: Prompt) -> None:
        super().__init__(model)
        self.prompt = prompt

    def trunk(self, ids: Sequence[int], cache: Cache) -> Tensor:
        if len(ids) > ROOMS[-1]:
            return super().trunk(ids, cache)
        for own, state in zip(self.prompt.state.layers, cache.layers, strict=True):
            assert isinstance(own, Delta) or own.is_memory_of(state), "a cache of another memory"
        hidden = self.prompt.trunk(ids, cache.length)
        for state in cache.layers:
            if isinstance(state, KVCache):
                state.length += len(ids)
        cache.advance(len(ids))
        return hidden[None]

    def draft(self, ids: Sequence[int], hidden: Tensor, cache: Cache) -> None:
        if len(ids) > ROOMS[-1]:
            super().draft(ids, hidden, cache)
            return
        assert cache.mtp is not None, "the step was made without drafts"
        self.prompt.draft(ids, hidden[0], cache.mtp.length)
        cache.mtp.length += len(ids)


class Rounds:
    """A step with its sampling: the likeliest token, or a draw that depends on seed and
    position."""

    def __init__(self, model: Model, depth: int, capacity: int, sampling: Sampling) -> None:
        self.sampling = replace(sampling, seed=0)
        self.step = step = Step(model, capacity, depth, vocab=sampling.vocab)
        device, V = step.logits.device, step.logits.shape[1]
        # How often a token was seen. Counts of integers do not depend on the order of additions.
        self.anywhere, self.generated = (
            torch.zeros(V, dtype=torch.int32, device=device) for _ in range(2)
        )
        self.serves = depth, self.sampling
        self.turn = 0  # how many sequences have begun
        self.uniforms = torch.zeros(capacity + 1, dtype=torch.float64, device=device)
        self.row = torch.arange(1 + depth, device=device)
        if sampling.temperature or sampling.has_penalties:
            after = [self._count] if sampling.has_penalties else []
            step.work = step.launches([self._choose], after)

    def take_turn(self) -> int:
        """Begin a new sequence, which ends the one before. Returns its number."""
        self.turn += 1
        return self.turn

    def cache(self) -> Cache:
        """An empty cache for the whole blocks of a prompt, in the step's own memory."""
        return self.step.state.cache(self.step.model.config)

    def check_turn(self, turn: int) -> None:
        """Raise InputError if another sequence has begun since `turn` and overwritten the memory."""
        if turn != self.turn:
            raise InputError(
                "another generation has begun on this model; the fast path has one at a time in memory"
            )

    def passes(self) -> Passes:
        """How the prompt's passes run."""
        step = self.step
        if step.prompt is None:  # a rank's part; its all-reduces are not captured
            return Passes(step.model)
        return GraphPasses(step.model, step.prompt)

    def begin(self, length: int, seed: int, seen: Seen | None) -> None:
        """Prepare for a sequence whose newest token is at position `length`."""
        if self.sampling.temperature:
            numbers = [uniform(seed, position) for position in range(length, len(self.uniforms))]
            self.uniforms[length:] = torch.tensor(numbers, dtype=torch.float64)
        if seen is not None:
            self.anywhere.copy_(seen.anywhere)
            self.generated.copy_(seen.generated)

    def _choose(self) -> None:
        """Fill `step.picked` row by row, because the penalties of a row count the drafts before
        it."""
        step, sampling = self.step, self.sampling
        uniforms = self.uniforms[step.state.starts[0] + 1 + self.row]
        anywhere, generated = self.anywhere.bool(), self.generated.bool()
        for i, logits in enumerate(step.logits):
            scores: Tensor = logits
            if sampling.has_penalties:
                scores = penalized(logits, Seen.of(anywhere, generated), sampling)
            token = choose(scores, uniforms[i], sampling)
            step.picked[i] = torch.where(logits.max().isfinite(), token, -1)
            if i < step.drafts:
                draft = step.rows_ids[i + 1 : i + 2].clamp(min=0).long()
                anywhere, generated = (
                    mask.index_fill(0, draft, True) for mask in (anywhere, generated)
                )

    def _count(self) -> None:
        """Add the round's new tokens to those seen."""
        step = self.step
        is_new = (self.row < step.fresh).int()
        for counts in (self.anywhere, self.generated):
            counts.index_add_(0, step.picked.clamp(min=0).long(), is_new)


def _rounds(model: Model, depth: int, capacity: int, sampling: Sampling) -> Rounds:
    """The model's last rounds if they fit, or new ones that replace them."""
    kept: Rounds | None = model.__dict__.get(KEPT)
    wanted = depth, replace(sampling, seed=0)
    if kept is not None and kept.step.state.capacity >= capacity and kept.serves == wanted:
        return kept
    if kept is not None:
        kept.take_turn()  # an unfinished generation ends, and releases its memory
    kept = model.__dict__[KEPT] = None  # released before the new one is allocated
    rounded = -(-capacity // CAPACITY) * CAPACITY
    fresh = model.__dict__[KEPT] = Rounds(model, depth, rounded, sampling)
    fresh.step.prepare()
    return fresh
