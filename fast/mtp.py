"""The multi-token-prediction head for 1 to 8 rows: a launch for its input, a product, and one layer."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fast.attention import GatedAttention
from fast.launch import Launch, Scratch, Work, run
from fast.layer import DecoderLayer, embedded_part, inside
from fast.linear import Norm, in_bf16, product, twin
from fast.moe import Experts
from fast.prefill.layer import on_layer
from fast.prefill.linear import normed
from fast.prefill.linear import product as prefill_product
from fast.prefill.span import Span
from fast.router import power_of_two
from fast.state import Keys, Rope
from fast.target import MAX_ROWS, target_of
from qwen35.cache import KVCache


class MTP(nn.Module):
    """embeds, hidden: [B, T, D] -> [B, T, D], as in `reference.mtp.MTP`, with a fast layer."""

    def __init__(self, module: Any, target: str, kernel: str = "triton") -> None:
        super().__init__()
        module = twin(module)
        module.layers = twin(module.layers)
        if kernel != "triton" and not _in_mxfp4(module.layers[0].mlp):
            kernel = "triton"
        module.layers[0] = DecoderLayer.from_reference(module.layers[0], target, kernel)
        self.fc = in_bf16(module.fc)
        self.embedding_norm = Norm.from_reference(module.pre_fc_norm_embedding)
        self.hidden_norm = Norm.from_reference(module.pre_fc_norm_hidden)
        self.norm = Norm.from_reference(module.norm)
        self.target, self.many = target, module

    @classmethod
    def from_reference(
        cls, module: Any, target: str | None = None, kernel: str = "triton"
    ) -> "MTP":
        """Replaces a `reference.mtp.MTP`; target and kernel as in `DecoderLayer`. kernel is that of MXFP4
        experts; bf16 ones, which published MXFP4 checkpoints have in this head, take Triton's."""
        return cls(module, target or target_of(module.fc.weight.device), kernel)

    @property
    def layer(self) -> DecoderLayer:
        """The head's only layer."""
        return self.many.layers[0]  # pyright: ignore (a fast layer)

    def launches(
        self,
        ids: Tensor,
        hidden: Tensor,
        table: Tensor,
        state: Keys,
        start: Tensor,
        rope: Rope,
        scratch: Scratch,
    ) -> tuple[list[Work], Tensor]:
        """The work of a pass, and its output before the last norm [N, D] bf16, which it will write.

        ids [N] int32: the token after each row of hidden [N, D] bf16. table: the embedding [vocab, D]
        bf16, or this rank's part of it. start [1] int32, on the device: the first row's position.
        """
        from fast.kernels import embedding as kernels  # Triton is needed from here on

        N, D = hidden.shape
        ranks = self.layer.ranks
        lookup: list[Work] = []
        if ranks is not None:  # the table is a part of it
            name = "mtp embeds"
            lookup, table = embedded_part(table, ids, ranks, self.target, scratch, out=name)
            ids = torch.arange(N, dtype=torch.int32, device=table.device)
        both = scratch("mtp input", N, 2 * D)
        first = Launch(
            f"mtp_input D={D}",
            kernels.mtp_input,
            (N, 2, 1),
            {
                "table": table, "ids": ids, "hidden": hidden,
                "embedding_norm": self.embedding_norm.weight,
                "hidden_norm": self.hidden_norm.weight, "out": both, "vocab": len(table),
                "eps": self.hidden_norm.eps, "D": D, "BLOCK": power_of_two(D),
            },
            {"num_warps": 4},
        )  # fmt: skip
        second, x = product(
            both, self.fc, self.target, scratch,
            name="mtp_fc", then=self.layer.input_layernorm, out="residual",
        )  # fmt: skip
        rest, out = self.layer.launches(x, state, start, rope, scratch, None)
        return [*lookup, first, second, *rest], out

    def prompt_work(
        self, embeds: Tensor, hidden: Tensor, state: Keys, span: Span, rope: Rope, scratch: Scratch
    ) -> tuple[list[Work], Tensor]:
        """The work of a pass over the rows of a prompt, embeds and hidden [N, D] bf16, and its output
        before the last norm, [N, D] bf16."""
        N, D = embeds.shape
        both = scratch("mtp both", N, 2 * D)
        first, e = normed(embeds, self.embedding_norm, scratch, name="mtp embeds")
        second, h = normed(hidden, self.hidden_norm, scratch, name="mtp hidden")

        def join() -> None:
            torch.cat((e, h), -1, out=both)

        third, x = prefill_product(both, self.fc, self.target, scratch, span.filled, name="mtp_fc")
        layer, out = on_layer(self.layer, x, state, span, rope, scratch)
        return [first, second, join, third, *layer], out

    def forward(self, embeds: Tensor, hidden: Tensor, cache: KVCache) -> Tensor:
        B, T, _ = embeds.shape
        if B > 1 or T <= MAX_ROWS:
            return self.many(embeds, hidden, cache)
        scratch, mixer = Scratch(embeds.device), cast(GatedAttention, self.layer.mixer)
        cache.grow(cache.length + T)
        own, start, rope = mixer.begin(embeds, cache)
        span = Span.of(start, embeds[0], cache.length + T)
        work, out = self.prompt_work(embeds[0], hidden[0], own, span, rope, scratch)
        last, out = normed(out, self.norm, scratch, name="mtp out")
        run([*work, last], embeds.device)
        mixer.end(own, cache, T)
        return out[None]


def _in_mxfp4(mlp: Any) -> bool:
    """Whether a feed-forward of the reference is a mixture of MXFP4 experts."""
    experts = getattr(inside(mlp), "experts", None)
    if isinstance(experts, Experts):  # packed before
        return experts.fp4
    return experts is not None and experts[0].gate_proj.weight.dtype == torch.uint8
