"""One decoder layer for 1 to 8 rows: six launches with a delta net, seven with attention, and one
fewer where the feed-forward is a dense MLP.

No norm and no residual has a launch of its own: the products beside them include them
(kernels/linear.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fast.attention import GatedAttention
from fast.deltanet import GatedDeltaNet
from fast.launch import Launch, Scratch, run
from fast.linear import Norm, Stream, twin
from fast.moe import MLP, SparseMoeBlock
from fast.prefill.layer import prefilled, work
from fast.router import power_of_two
from fast.state import Delta, Keys
from fast.target import MAX_ROWS, ROWS, target_of
from qwen35.cache import DeltaState, KVCache

Rope = tuple[Tensor, Tensor]  # cosine and sine, as `fast.state.rope_table` gives them


class DecoderLayer(nn.Module):
    """x: [B, T, D] -> [B, T, D]. `state` is the mixer's: KVCache or DeltaState, updated in place.

    More than 8 rows go through prefill/layer.py. Several sequences go through `many`: the reference's
    layer, with the fast nodes in it.
    """

    def __init__(self, module: Any, target: str) -> None:
        super().__init__()
        module = twin(module)
        self.is_linear = module.is_linear
        if self.is_linear:
            module.linear_attn = GatedDeltaNet.from_reference(module.linear_attn, target)
        else:
            module.self_attn = GatedAttention.from_reference(module.self_attn, target)
        kind = MLP if hasattr(module.mlp, "gate_proj") else SparseMoeBlock
        module.mlp = kind.from_reference(module.mlp, target)
        self.input_layernorm = Norm.from_reference(module.input_layernorm)
        self.post_attention_layernorm = Norm.from_reference(module.post_attention_layernorm)
        self.target, self.many = target, module

    @classmethod
    def from_reference(cls, module: Any, target: str | None = None) -> "DecoderLayer":
        """Replaces a `reference.layer.DecoderLayer`. target: default, that of the weights' device."""
        return cls(module, target or target_of(module.input_layernorm.weight.device))

    @property
    def mixer(self) -> GatedDeltaNet | GatedAttention:
        """The delta net or the attention, whichever this layer has."""
        return self.many.linear_attn if self.is_linear else self.many.self_attn  # pyright: ignore

    @property
    def feed_forward(self) -> MLP | SparseMoeBlock:
        """The node behind the mixer."""
        return self.many.mlp  # pyright: ignore (a fast node)

    def launches(
        self,
        x: Stream,
        state: Delta | Keys,
        start: Tensor,
        rope: Rope | None,
        scratch: Scratch,
        then: Norm | None,
    ) -> tuple[list[Launch], Any]:
        """The launches of a pass, and its output, which they will write: a stream for the norm `then`, or
        [N, D] bf16 where no norm follows. The output may lie in x's own memory.

        x: the N rows of positions start[0] and later. start [1] int32, on the device. rope: needed by
        attention alone.
        """
        settings: dict[str, Any] = {
            "residual": x.x, "then": self.post_attention_layernorm, "out": "after mixer"
        }  # fmt: skip
        if isinstance(self.mixer, GatedDeltaNet):
            assert isinstance(state, Delta)
            mixer, after = self.mixer.launches(x, state, start, scratch, **settings)
        else:
            assert isinstance(state, Keys) and rope is not None
            mixer, after = self.mixer.launches(x, state, start, rope, scratch, **settings)
        feed_forward, out = self.feed_forward.launches(
            after, scratch, residual=after.x, then=then, out="residual"
        )
        return [*mixer, *feed_forward], out

    def forward(self, x: Tensor, state: KVCache | DeltaState) -> Tensor:
        B, T, _ = x.shape
        if B > 1:
            return self.many(x, state)
        if T > MAX_ROWS:
            return prefilled(work, self, x, state)
        own, start, rope = self.mixer.begin(x, state)  # pyright: ignore (of the same kind)
        scratch = Scratch(x.device)
        rows = torch.arange(T, dtype=torch.int32, device=x.device)
        first, stream = embedded(x[0], rows, self.input_layernorm, self.target, scratch)
        launches, out = self.launches(stream, own, start, rope, scratch, None)
        run([first, *launches], x.device)
        self.mixer.end(own, state, T)  # pyright: ignore (of the same kind)
        return out[None]


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
) -> tuple[list[Launch], Tensor]:
    """The launches of several layers, one after the other, and the last one's output [N, D] bf16."""
    launches: list[Launch] = []
    out: Any = x
    following = [layer.input_layernorm for layer in layers[1:]]
    for layer, state, then in zip(layers, states, [*following, None], strict=True):
        more, out = layer.launches(out, state, start, rope, scratch, then)
        launches += more
    return launches, out
