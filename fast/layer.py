"""One decoder layer for 1 to 8 rows: six launches with a delta net, seven with attention, and one
fewer where the feed-forward is a dense MLP.

No norm and no residual has a launch of its own: the products beside them include them
(kernels/linear.py). In a rank's part of a model, the results of the mixer and of the feed-forward are
summed over the ranks, and the launches of the sums include them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fast.allreduce import AllReduce, exchange_of
from fast.attention import GatedAttention
from fast.deltanet import GatedDeltaNet
from fast.launch import Launch, Scratch, Work, run
from fast.linear import Norm, Stream, twin
from fast.moe import MLP, SparseMoeBlock
from fast.prefill.layer import on_layer, prefilled
from fast.router import power_of_two
from fast.state import Delta, Keys, Rope
from fast.target import MAX_ROWS, ROWS, target_of
from qwen35.cache import DeltaState, KVCache


class DecoderLayer(nn.Module):
    """x: [B, T, D] -> [B, T, D]. `state` is the mixer's: KVCache or DeltaState, updated in place.

    More than 8 rows go through prefill/layer.py. Several sequences go through `many`: the reference's
    layer, with the fast nodes in it. ranks: the exchange with other ranks, which have the other parts of
    this layer, or None for a whole layer.
    """

    def __init__(self, module: Any, target: str, kernel: str = "triton") -> None:
        super().__init__()
        module = twin(module)
        self.is_linear = module.is_linear
        self.ranks: AllReduce | None = exchange_of(module.mlp)
        if self.is_linear:
            module.linear_attn = _replaced(module.linear_attn, GatedDeltaNet, target)
        else:
            module.self_attn = _replaced(module.self_attn, GatedAttention, target)
        if hasattr(module.mlp, "gate_proj"):
            module.mlp = _replaced(module.mlp, MLP, target)
        else:
            module.mlp = _replaced(module.mlp, SparseMoeBlock, target, kernel=kernel)
        self.input_layernorm = Norm.from_reference(module.input_layernorm)
        self.post_attention_layernorm = Norm.from_reference(module.post_attention_layernorm)
        self.target, self.many = target, module

    @classmethod
    def from_reference(
        cls, module: Any, target: str | None = None, kernel: str = "triton"
    ) -> "DecoderLayer":
        """Replaces a `reference.layer.DecoderLayer`. target: default, that of the weights' device.
        kernel: of a mixture of experts, as in `SparseMoeBlock`."""
        return cls(module, target or target_of(module.input_layernorm.weight.device), kernel)

    @property
    def mixer(self) -> GatedDeltaNet | GatedAttention:
        """The delta net or the attention, whichever this layer has."""
        return inside(self.many.linear_attn if self.is_linear else self.many.self_attn)

    @property
    def feed_forward(self) -> MLP | SparseMoeBlock:
        """The node behind the mixer."""
        return inside(self.many.mlp)

    def launches(
        self,
        x: Stream,
        state: Delta | Keys,
        start: Tensor,
        rope: Rope | None,
        scratch: Scratch,
        then: Norm | None,
    ) -> tuple[list[Work], Any]:
        """The work of a pass, and its output, which it will write: a stream for the norm `then`, or
        [N, D] bf16 where no norm follows. The output may lie in x's own memory.

        x: the N rows of positions start[0] and later. start [1] int32, on the device. rope: needed by
        attention alone.
        """

        def mix(**settings: Any) -> tuple[list[Launch], Any]:
            if isinstance(self.mixer, GatedDeltaNet):
                assert isinstance(state, Delta)
                return self.mixer.launches(x, state, start, scratch, **settings)
            assert isinstance(state, Keys) and rope is not None
            return self.mixer.launches(x, state, start, rope, scratch, **settings)

        mixer, after = self._added(
            mix, scratch, residual=x.x, then=self.post_attention_layernorm, out="after mixer"
        )
        feed = partial(self.feed_forward.launches, after, scratch)
        feed_forward, out = self._added(feed, scratch, residual=after.x, then=then, out="residual")
        return [*mixer, *feed_forward], out

    def _added(
        self, launches: Callable[..., tuple[list[Launch], Any]], scratch: Scratch, **settings: Any
    ) -> tuple[list[Work], Any]:
        """The work of a mixer or a feed-forward with the sum over all ranks, and its output. settings:
        residual, then and out, as in `fast.linear.product`."""
        if self.ranks is None:
            own, result = launches(**settings)
            return [*own], result
        own, part = launches(out="part")
        total, result = self.ranks.sum(part, self.target, scratch, **settings)
        return [*own, *total], result

    def forward(self, x: Tensor, state: KVCache | DeltaState) -> Tensor:
        B, T, _ = x.shape
        if B > 1:
            return self.many(x, state)
        if T > MAX_ROWS:
            return prefilled(on_layer, self, x, state)
        own, start, rope = self.mixer.begin(x, state)  # pyright: ignore (of the same kind)
        scratch = Scratch(x.device)
        rows = torch.arange(T, dtype=torch.int32, device=x.device)
        first, stream = embedded(x[0], rows, self.input_layernorm, self.target, scratch)
        launches, out = self.launches(stream, own, start, rope, scratch, None)
        run([first, *launches], x.device)
        self.mixer.end(own, state, T)  # pyright: ignore (of the same kind)
        return out[None]

    def extra_repr(self) -> str:
        ranks = self.ranks
        if ranks is None:
            return ""
        return f"rank {ranks.rank} of {ranks.size}, {ranks.kind} all-reduce"


def inside(node: Any) -> Any:
    """A node without the wrapper that sums its results over the ranks, if it has one."""
    return getattr(node, "part", node)


def _replaced(node: Any, kind: Any, target: str, **settings: Any) -> Any:
    """A node's fast replacement, in the same wrapper if the node has one."""
    made = kind.from_reference(inside(node), target, **settings)
    return made if inside(node) is node else node.around(made)


def embedded(
    table: Tensor, ids: Tensor, then: Norm, target: str, scratch: Scratch
) -> tuple[Launch, Stream]:
    """The launch that looks up rows `ids` [N] int32 of a table [vocab, D] bf16, and the stream that it
    writes for the norm `then`."""
    from fast.kernels import embedding as kernels  # Triton is needed from here on

    D = table.shape[1]
    stream = Stream.empty("residual", len(ids), D, 1, target, then.eps, scratch)
    launch = Launch(
        f"embed D={D}",
        kernels.embed,
        (len(ids), 1, 1),
        {
            "table": table, "ids": ids, "out": stream.x, "next_norm": then.weight,
            "scaled": stream.scaled, "squares": stream.squares, "vocab": len(table), "D": D,
            "BLOCK": power_of_two(D), "ROWS": ROWS[target],
        },
        {"num_warps": 4},
    )  # fmt: skip
    return launch, stream


def through(
    layers: Any, states: Any, x: Stream, start: Tensor, rope: Rope, scratch: Scratch
) -> tuple[list[Work], Tensor]:
    """The work of several layers, one after the other, and the last one's output [N, D] bf16."""
    work: list[Work] = []
    out: Any = x
    following = [layer.input_layernorm for layer in layers[1:]]
    for layer, state, then in zip(layers, states, [*following, None], strict=True):
        more, out = layer.launches(out, state, start, rope, scratch, then)
        work += more
    return work, out


def embedded_part(
    table: Tensor, ids: Tensor, ranks: AllReduce, target: str, scratch: Scratch, **settings: Any
) -> tuple[list[Work], Any]:
    """The work that looks up rows `ids` [N] int32 of a table whose ranks have equal parts [vocab / size,
    D] bf16 of it, and the result. settings: then and out, as in `fast.linear.product`."""
    from fast.kernels import embedding as kernels  # Triton is needed from here on

    count, D = table.shape
    part = scratch("part", len(ids), D)
    launch = Launch(
        f"embed_part D={D}",
        kernels.embed_part,
        (len(ids), 1, 1),
        {
            "table": table, "ids": ids, "out": part, "first": ranks.rank * count, "count": count, "D": D,
            "BLOCK": power_of_two(D),
        },
        {"num_warps": 4},
    )  # fmt: skip
    total, result = ranks.sum(part, target, scratch, **settings)
    return [launch, *total], result
