"""One decode round as one list of launches: draft, verify, accept, without a decision on the host.

The list is a plain value. It can be captured as a graph on a GPU, run launch by launch to look inside,
compiled for a card that is not here, or executed by the emulator (tools/gfx950).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fast import configs
from fast.graph import Pass, captured
from fast.launch import Launch, Scratch, Work, constants, options, run
from fast.layer import DecoderLayer, embedded, embedded_part, through
from fast.linear import Norm, in_bf16
from fast.mtp import MTP
from fast.prompt import Prompt
from fast.router import power_of_two
from fast.state import State
from fast.target import MAX_ROWS, ROWS
from qwen35.cache import Cache
from qwen35.errors import InputError

FEW = 24  # tokens at the end of a prompt that are computed in passes of 8


class Step:
    """The decode rounds of one sequence, on a model whose layers and MTP head are fast.

    capacity: the number of positions that there is room for. drafts: how many tokens the MTP head drafts
    in every round, 0 to 7. vocab: token ids from this one on are never chosen (default: all can be).
    InputError when a part of the model is not fast, or drafts is out of range.

    Buffers on the device:
    rows_ids [1 + drafts] int32: the newest token, then the drafts; the trunk verifies them.
    picked [1 + drafts] int32: the model's own token after each of them; -1 if a logit is NaN or +inf.
    fresh [1] int32: how many of `picked` are new tokens of the text.
    hidden [1 + drafts, D] bf16: the trunk's hidden state of each row, after the final norm.
    logits [1 + drafts, V] bf16: the logits of each row.
    report [2 + drafts] int32: fresh, then picked.
    """

    def __init__(self, model: Any, capacity: int, drafts: int, *, vocab: int | None = None) -> None:
        if not is_fast(model, drafts):
            raise InputError("a step needs a model whose layers and MTP head are all fast")
        if not 0 <= drafts < MAX_ROWS:
            raise InputError(f"{drafts} drafts a round; the fast path verifies 0 to {MAX_ROWS - 1}")
        config = model.config
        self.model, self.drafts = model, drafts
        self.ranks = model.layers[0].ranks
        ranks = 1 if self.ranks is None else self.ranks.size
        # In a rank's part of a model these are its rows, for the ids from `first` on.
        self.table = model.embed_tokens.weight
        self.head = in_bf16(model.lm_head)
        self.vocab = vocab or ranks * len(self.head)
        self.first = 0 if self.ranks is None else self.ranks.rank * len(self.head)
        device, rows, D = self.table.device, 1 + drafts, config.hidden_size
        self.target = model.layers[0].mixer.target
        self.state = State.empty(config, capacity, drafts, device, model.kv_cache_dtype)

        def integers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self.rows_ids, self.picked = integers(rows), integers(rows)
        self.fresh, self.report = integers(1), integers(1 + rows)
        self.hidden = torch.zeros(rows, D, dtype=torch.bfloat16, device=device)
        self.logits = torch.zeros(rows, ranks * len(self.head), dtype=torch.bfloat16, device=device)
        self.scratch = Scratch(device)
        self.work: list[Work] = self.launches()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tail = Tail(self)
        self.prompt = Prompt(model, self.table, self.state) if self.ranks is None else None
        self.length = 0

    def take(self, cache: Cache) -> None:
        """Start from the cache of a prompt, or of its first part."""
        self.state.take(cache)
        self.length = cache.length

    def extend(self, ids: Sequence[int], before: Tensor | None) -> Tensor:
        """Compute the last tokens of the prompt, fewer than 64. Returns the trunk's hidden state of the
        last one, [D].

        More than FEW of them are a pass of `prompt`, where there is one; others are passes of 8 rows.
        before: the hidden state of the token before them, or None at the beginning of a prompt. The
        buffers need room for 7 positions after them, because a last pass that is not full writes there.
        """
        way = self.tail if self.prompt is None or len(ids) <= FEW else self.prompt
        hidden = way.extend(ids, before, self.length)
        self.length += len(ids)
        self.state.place(self.length)
        return hidden

    def begin(self, token: int, hidden: Tensor) -> None:
        """Begin the rounds with the first new token, and the trunk's hidden state [D] of the prompt's
        last token."""
        self.rows_ids[0] = self.picked[0] = token
        self.fresh.fill_(1)
        self.hidden[0] = hidden

    def take_over(self, other: "Step") -> None:
        """Continue where another step stopped, which has the same model and drafts and may have less
        room."""
        self.state.take_over(other.state)
        for name in ("rows_ids", "picked", "fresh", "hidden"):
            getattr(self, name).copy_(getattr(other, name))

    def launches(self, choose: Sequence[Work] = (), after: Sequence[Work] = ()) -> list[Work]:
        """The work of a whole round.

        choose: operations that make `picked` from `logits`, instead of taking the likeliest token.
        after: operations that follow the acceptance.
        """
        return [*self._draft(), *self._verify(pick=not choose), *choose, self._accept(), *after]

    def prepare(self) -> None:
        """Compile every launch and capture the round and the passes of a prompt's tail as graphs, on a
        GPU; elsewhere do nothing.

        It runs them once, which overwrites the state: call it before `take`.
        """
        if self.table.device.type == "cuda" and self.graph is None:
            run(self.work, self.table.device)
            self.graph = captured(self.work)
            self.tail.prepare()
            if self.prompt is not None:
                self.prompt.prepare()

    def round(self) -> list[int]:
        """Run one round, as the captured graph if there is one. Returns `report` as a list: the number of
        new tokens, then the model's own token after every row."""
        if self.graph is not None:
            self.graph.replay()
        else:
            run(self.work, self.table.device)
        return self.report.tolist()

    def _draft(self) -> list[Work]:
        """The MTP head drafts, one token after the other.

        Its first pass takes all rows of the last round, since only the device knows how many of them were
        accepted. What the other rows write into the cache is overwritten before it is read.
        """
        if not self.drafts:
            return []
        mtp: MTP = self.model.mtp
        state, rope = self.state, (self.state.cosine, self.state.sine)
        assert state.mtp is not None
        newest = self.scratch("draft hidden", 1, self.hidden.shape[1])
        work: list[Work] = []
        # The rows of the head for ids that can be chosen, at least one.
        head = self.head[: max(1, min(self.vocab - self.first, len(self.head)))]
        ids, hidden = self.picked, self.hidden
        for draft in range(self.drafts):
            start = state.starts[1 + draft : 2 + draft]
            launches, out = mtp.launches(
                ids, hidden, self.table, state.mtp, start, rope, self.scratch
            )
            last = self.fresh if draft == 0 else None
            work += [*launches, self._norm(mtp.norm, out, newest, last)]
            ids, hidden = self.rows_ids[1 + draft : 2 + draft], newest
            logits = self.scratch("draft logits", 1, len(head))
            work += self._choose(newest, head, logits, ids)
        return work

    def _verify(self, *, pick: bool) -> list[Work]:
        """The trunk over the newest token and the drafts. pick: also choose the likeliest tokens."""
        scratch, ranks = self.scratch, self.ranks
        trunk = self.trunk(self.rows_ids, self.state.starts[:1], self.hidden)
        own = self.logits
        if ranks is not None:
            own = scratch("own logits", len(own), len(self.head))
        head, *choice = self._choose(self.hidden, self.head, own, self.picked)
        joined = [] if ranks is None else ranks.gather(own, self.logits)
        return [*trunk, head, *joined, *(choice if pick else [])]

    def trunk(self, ids: Tensor, start: Tensor, hidden: Tensor) -> list[Work]:
        """The trunk over tokens ids [N] int32 of positions start[0] and later, which writes their hidden
        states [N, D] bf16."""
        layers, scratch, ranks = self.model.layers, self.scratch, self.ranks
        table, then = self.table, layers[0].input_layernorm
        if ranks is None:
            launch, x = embedded(table, ids, then, self.target, scratch)
            first: list[Work] = [launch]
        else:
            first, x = embedded_part(
                table, ids, ranks, self.target, scratch, then=then, out="residual"
            )
        rope = self.state.cosine, self.state.sine
        trunk, out = through(layers, self.state.layers, x, start, rope, scratch)
        norm = self._norm(Norm.from_reference(self.model.norm), out, hidden, None)
        return [*first, *trunk, norm]

    def _norm(self, norm: Norm, x: Tensor, out: Tensor, count: Tensor | None) -> Launch:
        """The norm of all rows of x; with a count [1] int32, of row count[0] - 1 alone."""
        from fast.kernels import norm as kernels

        D = x.shape[1]
        return Launch(
            f"norm D={D}",
            kernels.norm,
            (len(x) if count is None else 1, 1, 1),
            {
                "x": x, "weight": norm.weight, "out": out,
                "count": self.fresh if count is None else count, "eps": norm.eps, "D": D,
                "LAST": count is not None, "BLOCK": power_of_two(D),
            },
            {"num_warps": 4},
        )  # fmt: skip

    def _choose(self, x: Tensor, weight: Tensor, logits: Tensor, tokens: Tensor) -> list[Work]:
        """The product with the head's weight, and the choice of each row's likeliest token, of all ranks'
        where they have parts of the head."""
        from fast.kernels import head as kernels

        rows, K = x.shape
        N = len(weight)
        config = configs.lookup(self.target, "head", configs.key(N=N, K=K))
        blocks, width = -(-N // config["BLOCK_N"]), ROWS[self.target]
        best = self.scratch("head best", blocks, width, dtype=torch.float32)
        place = self.scratch("head place", blocks, width, dtype=torch.int32)
        product = Launch(
            f"head {configs.key(N=N, K=K)}",
            kernels.head,
            (blocks, 1, 1),
            {
                "x": x, "weight": weight, "logits": logits, "best": best, "place": place,
                "rows": rows, "N": N, "vocab": min(max(self.vocab - self.first, 0), N), "K": K,
                "ROWS": width, **constants(config),
            },
            options(config),
            config["BLOCK_N"] * config["BLOCK_K"] * 2,
        )  # fmt: skip
        if self.ranks is None:
            return [product, self._pick(f"N={N}", rows, best, place, tokens, best)]
        # A rank's own choices: the largest logits as bits, then their ids.
        own = self.scratch("own choice", 2, width, dtype=torch.int32)
        everyone = self.scratch("choices", 1, self.ranks.size * 2 * width, dtype=torch.int32)
        by_rank = everyone.view(self.ranks.size, 2 * width)
        return [
            product,
            self._pick(
                f"N={N}", rows, best, place, own[1], own[0].view(torch.float32), of_part=True
            ),
            *self.ranks.gather(own.view(1, -1), everyone),
            self._pick(
                f"RANKS={len(by_rank)}",
                rows,
                by_rank.view(torch.float32),
                by_rank[:, width:],
                tokens,
                best,
            ),
        ]

    def _pick(
        self, shape: str, rows: int, best: Tensor, place: Tensor, tokens: Tensor, largest: Tensor, *,
        of_part: bool = False,
    ) -> Launch:  # fmt: skip
        """The launch that chooses among blocks of the vocabulary, or among ranks: among the rows of best
        and place. of_part: see the kernel."""
        from fast.kernels import head as kernels

        return Launch(
            f"pick {shape}{' of a part' if of_part else ''}",
            kernels.pick,
            (rows, 1, 1),
            {
                "best": best, "place": place, "tokens": tokens, "largest": largest, "blocks": len(best),
                "first": self.first, "STRIDE": best.stride(0), "BLOCK": 1024, "OF_PART": of_part,
            },
            {"num_warps": 4},
        )  # fmt: skip

    def _accept(self) -> Launch:
        from fast.kernels import head as kernels

        return Launch(
            f"accept DRAFTS={self.drafts}",
            kernels.accept,
            (1, 1, 1),
            {
                "rows_ids": self.rows_ids, "picked": self.picked, "fresh": self.fresh,
                "starts": self.state.starts, "report": self.report, "DRAFTS": self.drafts,
                "BLOCK": 16,
            },
            {"num_warps": 1},
        )  # fmt: skip


class Tail:
    """The end of a prompt, behind its last whole block of 64 tokens, in passes of 8 rows. A pass has no
    decision on the host and is one graph, like a round.

    A last pass that is not full computes rows beyond the prompt, which are written again before they are
    read.
    """

    def __init__(self, step: Step) -> None:
        device, D = step.table.device, step.hidden.shape[1]
        self.ids, self.start = (
            torch.zeros(count, dtype=torch.int32, device=device) for count in (MAX_ROWS, 1)
        )
        self.hidden = torch.zeros(MAX_ROWS, D, dtype=torch.bfloat16, device=device)
        self.trunk = Pass(step.trunk(self.ids, self.start, self.hidden), device)
        self.mtp: Pass | None = None
        if step.state.mtp is not None:
            rope = step.state.cosine, step.state.sine
            work, _ = step.model.mtp.launches(
                self.ids, self.hidden, step.table, step.state.mtp, self.start, rope, step.scratch
            )
            self.mtp = Pass(work, device)

    def prepare(self) -> None:
        """Compile and capture the passes."""
        self.trunk.prepare()
        if self.mtp is not None:
            self.mtp.prepare()

    def extend(self, ids: Sequence[int], before: Tensor | None, first: int) -> Tensor:
        """`Step.extend` for tokens from position `first` on."""
        count = len(ids)
        padded = torch.tensor([*ids, *[0] * MAX_ROWS], dtype=torch.int32).to(self.ids.device)
        # The hidden states of the token before, and of all tokens.
        hidden = self.hidden.new_zeros(1 + count + MAX_ROWS, self.hidden.shape[1])
        if before is not None:
            hidden[0] = before
        for row in range(0, count, MAX_ROWS):
            self.ids.copy_(padded[row : row + MAX_ROWS])
            self.start.fill_(first + row)
            self.trunk.run()
            hidden[1 + row : 1 + row + MAX_ROWS] = self.hidden
        # The MTP head takes each token with the hidden state of the token before it.
        for row in range(before is None, count if self.mtp else 0, MAX_ROWS):
            assert self.mtp is not None
            self.ids.copy_(padded[row : row + MAX_ROWS])
            self.hidden.copy_(hidden[row : row + MAX_ROWS])
            self.start.fill_(first - 1 + row)
            self.mtp.run()
        return hidden[count]


def is_fast(model: Any, drafts: int) -> bool:
    """Whether all layers are fast, and the MTP head too where there are drafts."""
    layers = all(isinstance(layer, DecoderLayer) for layer in model.layers)
    return layers and (not drafts or isinstance(model.mtp, MTP))
