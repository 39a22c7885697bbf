"""A fast model that computes nothing: what decode rounds do around its layers, exact to the bit.

A hidden state is a place in a row of D zeros where there is a one. The trunk's is the state of an
automaton that reads the text, `STATES` of them; the MTP head's is D / 2 further, and is the automaton's
next state. Logits are looked up by that place. Keys hold what a layer has read, so that a wrong row of
a cache is another state. All factors are powers of two, so that every number of a round is exact in bf16.
"""

from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference.mtp
from fast.allreduce import AllReduce
from fast.launch import Launch, Scratch, Work
from fast.layer import DecoderLayer
from fast.linear import Norm, Stream
from fast.mtp import MTP
from fast.prefill.span import Span
from fast.step import Step
from qwen35.cache import Cache
from qwen35.config import Config
from reference.norm import RMSNorm
from tests.support.family import FAMILY
from tests.support.fast_cases import poison
from tests.support.plain_launches import in_turn, plain

D, VOCABULARY = 256, 200
STATES = D // 2
HARD = 3  # the MTP head guesses wrongly in every state that this divides
# The mean square of a row with a single one is 1 / D, so 1 / sqrt(mean + EPS) is 8.
EPS = 3 / D
CONFIG = replace(
    Config.from_dict(FAMILY["27B"] | {"vocab_size": VOCABULARY, "hidden_size": D}),
    num_hidden_layers=1, layer_types=("full_attention",), rms_norm_eps=EPS,
)  # fmt: skip


def after(state: int, token: int) -> int:
    """The automaton's next state."""
    return (61 * state + 17 * token + 9) % STATES


def read(ids: list[int]) -> list[int]:
    """The state after each token of a text."""
    states = []
    for token in ids:
        states.append(after(states[-1] if states else 1, token))
    return states


def weight_of_head(vocabulary: int = VOCABULARY) -> Tensor:
    """[vocabulary, D] bf16: the logits after each state of the trunk, then those after the MTP head's,
    which are other ones where it guesses wrongly. No two ids of a state have the same logit."""
    generator = torch.Generator().manual_seed(7)
    order = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(STATES)])
    trunk = order.T.bfloat16()
    guesses = trunk.clone()
    guesses[:, ::HARD] = trunk[:, ::HARD].roll(1, 0)
    return torch.cat([trunk, guesses], 1)


@dataclass(frozen=True)
class Coded:
    """What a text and its rounds have to be. head: `weight_of_head`; ids from vocab on are not chosen."""

    head: Tensor
    vocab: int

    def token(self, state: int, *, of_mtp: bool = False) -> int:
        return int(self.head[: self.vocab, state + STATES * of_mtp].argmax())

    def text(self, prompt: list[int], length: int) -> list[int]:
        """`length` tokens that follow a prompt."""
        ids = list(prompt)
        while len(ids) < len(prompt) + length:
            ids.append(self.token(read(ids)[-1]))
        return ids[len(prompt) :]

    def drafts(self, ids: list[int], depth: int) -> list[int]:
        """What the MTP head drafts after a text, whose last token the trunk has not read."""
        found, state = [], read(ids)[-2]
        for _ in range(depth):
            state = after(state, [*ids, *found][-1])
            found.append(self.token(state, of_mtp=True))
        return found


class Reader(DecoderLayer):
    """In place of a decoder layer: reads one code a row, [token] in the trunk and [token, state] in the
    head, keeps it, and writes the automaton's next state, or NaN in a row that makes no sense. It asserts
    that its norm is prepared."""

    def __init__(self, norm: RMSNorm, target: str, *, of_mtp: bool = False) -> None:
        nn.Module.__init__(self)
        self.input_layernorm = Norm.from_reference(norm)
        self.ranks: AllReduce | None = None
        self.target, self.of_mtp = target, of_mtp
        self.node = SimpleNamespace(target=target)

    @property
    def mixer(self) -> Any:
        return self.node

    def launches(
        self, x: Stream, state: Any, start: Tensor, rope: Any, scratch: Scratch, then: Norm | None
    ) -> tuple[list[Work], Any]:
        assert then is None and start.shape == (1,) and start.dtype == torch.int32
        cosine, sine = rope
        assert bool((cosine[0] == 1).all()) and bool((sine[0] == 0).all())
        assert len(cosine) == state.keys.shape[1] and x.eps == EPS
        out = scratch(f"out of {'mtp' if self.of_mtp else 'the trunk'}", *x.x.shape)

        def work() -> None:
            factor = 1 + self.input_layernorm.weight.float()
            assert torch.equal(x.scaled, (x.x.float() * factor).bfloat16())
            squares = x.squares[:, : len(x.x)].sum(0)
            assert torch.equal(squares, x.x.float().square().sum(-1))
            out.zero_()
            for row, line in enumerate(x.x):
                position = int(start[0]) + row
                codes = self.codes(line)
                state.keys[0, position, : len(codes)] = torch.tensor(codes)
                held = state.keys[0, : position + 1, : len(codes)].int().tolist()
                place = self.following(held)
                if place is None:
                    out[row] = torch.nan
                else:
                    out[row, place] = 1

        return [work], out

    def codes(self, line: Tensor) -> list[int]:
        """The places of a row: of the one, and in the head of the two. -1 where there is none; a three is
        both."""
        ones, twos, threes = ((line == n).nonzero().flatten().tolist() for n in (1, 2, 3))
        assert len(ones + twos + threes) == int(line.count_nonzero())
        if not self.of_mtp:
            (token,) = ones
            return [token]
        return [(ones + threes + [-1])[0], (twos + threes + [-1])[0]]

    def following(self, held: list[list[int]]) -> int | None:
        """The place for the state after all that has been read; None if the rows that the head has read
        do not follow one another."""
        if not self.of_mtp:
            return read([token for (token,) in held])[-1]
        states = [after(state % STATES, token) for token, state in held]
        follow = all(
            state >= 0 and state % STATES == before
            for (_, state), before in zip(held[1:], states[:-1], strict=True)
        )
        return STATES + states[-1] if follow and held[0][1] >= 0 else None


def read_prompt(
    layer: Reader, x: Tensor, state: Any, span: Span, rope: Any, scratch: Scratch
) -> tuple[list[Work], Tensor]:
    """In place of `fast.prefill.layer.on_layer`: what a `Reader` does with the rows of a prompt's pass.
    Rows that the pass does not have become NaN."""
    cosine, sine = rope
    assert bool((cosine[0] == 1).all()) and bool((sine[0] == 0).all())
    assert len(cosine) == span.end <= state.keys.shape[1]
    out = scratch(f"prompt's out of {'mtp' if layer.of_mtp else 'the trunk'}", *x.shape)

    def work() -> None:
        for number in (span.start, span.filled):
            assert number.shape == (1,) and number.dtype == torch.int32
        first, rows = int(span.start), int(span.filled)
        assert 1 <= rows <= len(x) and 0 <= first <= span.end - rows
        codes = [layer.codes(line) for line in x[:rows]]
        width = len(codes[0])
        state.keys[0, first : first + rows, :width] = torch.tensor(codes)
        held = state.keys[0, : first + rows, :width].int().tolist()
        out.fill_(torch.nan)
        for row in range(rows):
            place = layer.following(held[: first + row + 1])
            if place is not None:
                out[row] = 0
                out[row, place] = 1

    return [work], out


def compute_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rounds and passes run on the CPU: their launches by `plain_launches`, a prompt's layers by
    `read_prompt`."""
    for module in ("step", "graph"):
        monkeypatch.setattr(f"fast.{module}.run", lambda work, device: in_turn(work))
    for module in ("prompt", "mtp"):
        monkeypatch.setattr(f"fast.{module}.on_layer", read_prompt)


def norm(*factors: float) -> RMSNorm:
    """A norm that multiplies by each of the factors in an equal part of the columns."""
    made = RMSNorm(D, EPS).bfloat16().requires_grad_(False)
    made.weight.copy_(torch.tensor(factors).repeat_interleave(D // len(factors)) - 1)
    return made


def coded_mtp(target: str) -> MTP:
    """An MTP head with a `Reader`. fc gives a one for the token and a two for the state."""
    slow = reference.mtp.MTP(CONFIG).bfloat16().requires_grad_(False)
    slow.pre_fc_norm_embedding, slow.pre_fc_norm_hidden = norm(2), norm(4)
    one = torch.eye(D, dtype=torch.bfloat16) / 16
    slow.fc.weight.copy_(torch.cat([one, one], 1))
    # The other way round than the trunk's: a state of the wrong half comes out larger than one.
    slow.norm = norm(1 / 2, 1 / 8)
    made = MTP.from_reference(slow, target)
    made.many.layers[0] = Reader(norm(8), target, of_mtp=True)
    return made


def coded_model(target: str, head: Tensor, ranks: AllReduce | None = None) -> Any:
    """The model, or a rank's part of it: its rows of the embedding and of the head."""
    share = len(head) // (ranks.size if ranks else 1)
    first = share * (ranks.rank if ranks else 0)
    table = torch.eye(D, dtype=torch.bfloat16)[:VOCABULARY]
    model = SimpleNamespace(
        config=CONFIG, kv_cache_dtype="auto", layers=[Reader(norm(2), target)],
        embed_tokens=SimpleNamespace(weight=table[first : first + share].clone()),
        lm_head=SimpleNamespace(weight=head[first : first + share].clone()),
        norm=norm(1 / 8, 1 / 2), mtp=coded_mtp(target),
    )  # fmt: skip
    for layer in (*model.layers, model.mtp.layer):
        layer.ranks = ranks
    return model


class CodedHead(nn.Module):
    """The product with `weight_of_head`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.float().T).bfloat16()


class CodedModule(nn.Module):
    """The same model as a module, for whole generations. It has no forward of its own."""

    def __init__(self, target: str, context: int) -> None:
        super().__init__()
        parts = coded_model(target, weight_of_head())
        self.config = replace(CONFIG, max_position_embeddings=context)
        self.kv_cache_dtype, self.dtype = parts.kv_cache_dtype, torch.bfloat16
        self.embed_tokens = nn.Embedding.from_pretrained(parts.embed_tokens.weight)
        self.layers, self.norm, self.mtp = nn.ModuleList(parts.layers), parts.norm, parts.mtp
        self.lm_head = CodedHead(parts.lm_head.weight)

    def new_cache(self) -> Cache:
        return Cache.empty(self.config, torch.bfloat16, torch.device("cpu"))


# ---- ranks of one process, which take turns


class Turns(AllReduce):
    """The exchange of one of several ranks, whose works run one after the other: `everyone` has what each
    rank gave to the exchange of each number."""

    kind = "turns"

    def __init__(self, rank: int, size: int, everyone: list[dict[int, Tensor]]) -> None:
        super().__init__(SimpleNamespace(rank=rank, size=size))  # pyright: ignore
        self.everyone, self.numbers = everyone, count()

    def _given(self, x: Tensor) -> int:
        number = next(self.numbers)
        self.everyone[self.rank][number] = x
        return number

    def _sum(self, part: Any, grid: Any, arguments: Any, scratch: Scratch) -> list[Work]:
        number = self._given(part)

        def work() -> None:
            total = torch.stack([given[number] for given in self.everyone]).float().sum(0)
            if arguments["HAS_RESIDUAL"]:
                total += arguments["residual"].float()
            arguments["out"].copy_(total)
            if arguments["HAS_NEXT"]:
                scaled = total * (1 + arguments["next_norm"].float())
                arguments["scaled"].copy_(scaled)
                blocks = total.square().unflatten(1, (grid[1], -1)).sum(-1)
                arguments["out_squares"][:, : len(part)] = blocks.T

        return [work]

    def gather(self, x: Tensor, out: Tensor) -> list[Work]:
        number = self._given(x)

        def work() -> None:
            out.copy_(torch.cat([given[number] for given in self.everyone], 1))

        return [work]


def coded_ranks(target: str, head: Tensor, size: int) -> list[Any]:
    everyone: list[dict[int, Tensor]] = [{} for _ in range(size)]
    return [coded_model(target, head, Turns(rank, size, everyone)) for rank in range(size)]


def begin(step: Step, ids: list[int]) -> None:
    """Let a step be where a text ends, whose last token the trunk has not read: with the caches that it
    would have, and nothing else in its buffers."""
    states = read(ids)
    length = len(ids) - 1
    step.state.layers[0].keys[0, :length, 0] = torch.tensor(ids[:-1])  # pyright: ignore
    if step.state.mtp is not None:
        pairs = torch.tensor([*zip(ids[1:length], states[: length - 1], strict=True)])
        step.state.mtp.keys[0, : length - 1, :2] = pairs
    step.state.place(length)
    step.begin(ids[-1], hidden(states[length - 1]))


def hidden(state: int) -> Tensor:
    """The trunk's hidden state [D]."""
    return torch.eye(D, dtype=torch.bfloat16)[state]


def rounds(steps: list[Step], number: int, run: Any = plain) -> list[list[int]]:
    """The reports of some rounds, the same on every rank. Ranks take turns; what a launch writes is
    poisoned before it."""
    found = []
    for _ in range(number):
        for at_once in zip(*(step.work for step in steps), strict=True):
            for one in at_once:
                if not isinstance(one, Launch):
                    one()
                    continue
                if one.name.split()[0] not in ("accept", "norm", "pick"):  # these write what stays
                    poison([one])
                run(one)
        reports = [step.report.tolist() for step in steps]
        assert all(report == reports[0] for report in reports)
        assert all(torch.equal(step.logits, steps[0].logits) for step in steps[1:])
        found.append(reports[0])
    return found
