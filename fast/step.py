"""One decode round as one list of launches: draft, verify, accept, with nothing asked of the host inside.

The list is a plain value. It is captured as a graph where there is a device, run one launch after the
other to look inside, compiled for a card that is not here, or executed by the emulator (tools/gfx950).
"""

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fast import configs
from fast.launch import Launch, Scratch, Work, constants, options, run
from fast.layer import DecoderLayer, embedded, through
from fast.linear import Norm, in_bf16
from fast.mtp import MTP
from fast.router import power_of_two
from fast.state import State
from fast.target import MAX_ROWS, ROWS
from qwen35.cache import Cache
from qwen35.errors import InputError


class Step:
    """The rounds of one sequence on a model whose layers and MTP head are fast.

    capacity: positions that there is room for. drafts: of the MTP head in every round. vocab: ids at and
    above it are never chosen.

    Buffers, on the device: rows_ids [1 + drafts] int32, the newest token and the drafts that the trunk
    verifies; picked [1 + drafts] int32, the model's own choice after each (-1: a logit is NaN or
    infinite); fresh [1] int32, how many of `picked` are new; hidden [1 + drafts, D] bf16, the trunk's
    state behind each; logits [1 + drafts, V] bf16; report [2 + drafts] int32: fresh, then picked.
    """

    def __init__(self, model: Any, capacity: int, drafts: int, *, vocab: int | None = None) -> None:
        if not is_fast(model, drafts):
            raise InputError("a step needs a model whose layers and MTP head are all fast")
        if not 0 <= drafts < MAX_ROWS:
            raise InputError(f"{drafts} drafts a round; the fast path verifies 0 to {MAX_ROWS - 1}")
        config = model.config
        self.model, self.drafts = model, drafts
        self.table = model.embed_tokens.weight
        self.head = in_bf16(model.lm_head)
        self.vocab = vocab or len(self.head)
        device, rows, D = self.table.device, 1 + drafts, config.hidden_size
        self.target = model.layers[0].mixer.target
        self.state = State.empty(config, capacity, drafts, device, model.kv_cache_dtype)

        def integers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self.rows_ids, self.picked = integers(rows), integers(rows)
        self.fresh, self.report = integers(1), integers(1 + rows)
        self.hidden = torch.zeros(rows, D, dtype=torch.bfloat16, device=device)
        self.logits = torch.zeros(rows, len(self.head), dtype=torch.bfloat16, device=device)
        self.scratch = Scratch(device)
        self.work: list[Work] = self.launches()
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, cache: Cache, token: int, hidden: Tensor) -> None:
        """Take over a prompt's cache, its newest token, and the trunk's state [D] behind it."""
        self.state.take(cache)
        self.rows_ids[0] = self.picked[0] = token
        self.fresh.fill_(1)
        self.hidden[0] = hidden

    def take_over(self, other: "Step") -> None:
        """Go on where another step of the same model and drafts stopped; it may have less room."""
        self.state.take_over(other.state)
        for name in ("rows_ids", "picked", "fresh", "hidden"):
            getattr(self, name).copy_(getattr(other, name))

    def launches(self, choose: Sequence[Work] = (), after: Sequence[Work] = ()) -> list[Work]:
        """A whole round. choose: what makes `picked` of `logits`, in place of the likeliest token; after:
        what follows when the drafts are accepted."""
        return [*self._draft(), *self._verify(pick=not choose), *choose, self._accept(), *after]

    def prepare(self) -> None:
        """Compile every launch and capture the round, on a device; before `begin`, whose state it
        spoils."""
        if self.table.device.type == "cuda" and self.graph is None:
            run(self.work, self.table.device)
            self.graph = captured(self.work)

    def round(self) -> list[int]:
        """Run one round; returns its new tokens' number, then the choice after every row.

        The captured graph is replayed where `prepare` made one.
        """
        if self.graph is not None:
            self.graph.replay()
        else:
            run(self.work, self.table.device)
        return self.report.tolist()

    def _draft(self) -> list[Work]:
        """The MTP head guesses, one token after the other.

        Its first pass takes all rows of the last round: how many of them are new only the device knows.
        What rows beyond them write into the cache is written again before it is read.
        """
        if not self.drafts:
            return []
        mtp: MTP = self.model.mtp
        state, rope = self.state, (self.state.cosine, self.state.sine)
        assert state.mtp is not None
        newest = self.scratch("draft hidden", 1, self.hidden.shape[1])
        work: list[Work] = []
        ids, hidden = self.picked, self.hidden
        for draft in range(self.drafts):
            start = state.starts[1 + draft : 2 + draft]
            launches, out = mtp.launches(
                ids, hidden, self.table, state.mtp, start, rope, self.scratch
            )
            last = self.fresh if draft == 0 else None
            work += [*launches, self._norm(mtp.norm, out, newest, last)]
            ids, hidden = self.rows_ids[1 + draft : 2 + draft], newest
            logits = self.scratch("draft logits", 1, self.vocab)
            work += self._choose(newest, self.head[: self.vocab], logits, ids)
        return work

    def _verify(self, *, pick: bool) -> list[Work]:
        layers, scratch = self.model.layers, self.scratch
        first, x = embedded(
            self.table, self.rows_ids, layers[0].input_layernorm, self.target, scratch
        )
        rope, start = (self.state.cosine, self.state.sine), self.state.starts[:1]
        trunk, out = through(layers, self.state.layers, x, start, rope, scratch)
        norm = self._norm(Norm.from_reference(self.model.norm), out, self.hidden, None)
        head, choice = self._choose(self.hidden, self.head, self.logits, self.picked)
        return [first, *trunk, norm, head, *([choice] if pick else [])]

    def _norm(self, norm: Norm, x: Tensor, out: Tensor, count: Tensor | None) -> Launch:
        """The norm of all rows, or of row count[0] - 1 alone."""
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

    def _choose(self, x: Tensor, weight: Tensor, logits: Tensor, tokens: Tensor) -> list[Launch]:
        """The vocabulary's product, and the likeliest token of each row."""
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
                "rows": rows, "N": N, "vocab": self.vocab, "K": K, "ROWS": width,
                **constants(config),
            },
            options(config),
            config["BLOCK_N"] * config["BLOCK_K"] * 2,
        )  # fmt: skip
        pick = Launch(
            f"pick {configs.key(N=N)}",
            kernels.pick,
            (rows, 1, 1),
            {
                "best": best, "place": place, "tokens": tokens, "blocks": blocks, "ROWS": width,
                "BLOCK": 1024,
            },
            {"num_warps": 4},
        )  # fmt: skip
        return [product, pick]

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


def is_fast(model: Any, drafts: int) -> bool:
    """Whether all that a round with so many drafts needs of a model is fast."""
    layers = all(isinstance(layer, DecoderLayer) for layer in model.layers)
    return layers and (not drafts or isinstance(model.mtp, MTP))


def captured(work: Sequence[Work]) -> torch.cuda.CUDAGraph:
    """A graph of work that has run once before, so that everything is compiled.

    An older graph that is collected meanwhile would end the capture with an error.
    """
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph):
            for one in work:
                one()
    finally:
        if collects:
            gc.enable()
    return graph
