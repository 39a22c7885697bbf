"""Gated attention for 1 to 8 rows over a cache of any length, in four launches."""

from typing import Any

import torch
from torch import Tensor, nn

from fast import configs
from fast.launch import Launch, Scratch, constants, options, run
from fast.linear import Norm, Stream, in_bf16, product, read_normed, stacked
from fast.prefill import attention as prefill
from fast.prefill.layer import prefilled
from fast.router import power_of_two
from fast.state import Keys, rope_table
from fast.target import MAX_ROWS, check_rows, target_of
from qwen35.cache import E4M3, KVCache
from qwen35.errors import InputError

SHORT = 128  # the number of short pieces; the long ones follow them, as in kernels/attention.py


def piece_sizes(shared: int) -> tuple[int, int]:
    """The positions of a short piece and of a long one, if `shared` query heads share a key head.

    Each piece costs partial sums, one for each of these heads, so more heads have longer pieces.
    """
    return (128, 512) if shared <= 8 else (256, 1024)


def pieces(length: int, near: int, far: int) -> int:
    """The number of pieces that cover `length` positions: SHORT of `near` positions, then of `far`."""
    short = -(-min(length, SHORT * near) // near)
    return short + -(-max(length - SHORT * near, 0) // far)


class GatedAttention(nn.Module):
    """x: [B, T, D] at positions cache.length .. cache.length + T - 1 -> [B, T, D].

    in_proj [M, D] bf16: rows of q with its gates, k and v; the reference's three matrices are parts of
    it. A pass of up to 8 rows is four launches: in-projection; each piece of the context by itself,
    with q and k norm, RoPE and the cache's new rows; the pieces' sum and the gate; out-projection. More
    rows go through prefill/attention.py. Several sequences go through `many`, the reference's node over
    the same weights. InputError when the head size is not a power of two from 16.
    """

    def __init__(self, module: Any, target: str) -> None:
        super().__init__()
        self.in_proj = stacked(module.q_proj, module.k_proj, module.v_proj)
        self.out_proj = in_bf16(module.o_proj)
        self.q_norm, self.k_norm = in_bf16(module.q_norm), in_bf16(module.k_norm)
        self.eps, self.K = module.q_norm.eps, module.head_dim
        self.H = module.q_proj.weight.shape[0] // (2 * self.K)
        self.G = module.k_proj.weight.shape[0] // self.K
        self.rotary, self.rope_theta = module.rotary_dim, module.rope_theta
        self.target, self.many = target, module
        if self.K & (self.K - 1) or self.K < 16:
            raise InputError(f"attention of head size {self.K}; expected a power of two from 16")

    @classmethod
    def from_reference(cls, module: Any, target: str | None = None) -> "GatedAttention":
        """Replaces a `reference.attention.GatedAttention`. target: default, that of the weights'
        device."""
        return cls(module, target or target_of(module.o_proj.weight.device))

    def launches(
        self,
        x: Tensor | Stream,
        state: Keys,
        start: Tensor,
        rope: tuple[Tensor, Tensor],
        scratch: Scratch,
        *,
        residual: Tensor | None = None,
        then: Norm | None = None,
        out: str = "mixed",
    ) -> tuple[list[Launch], Any]:
        """The launches of a pass, and its output [N, D] bf16, which they will write.

        x: [N, D] bf16, the rows of positions start[0] and later; a `Stream` is normalised first. start
        [1] int32, on the device. rope: cosine and sine of `fast.state.rope_table`. residual, then, out:
        as in `fast.linear.product`.
        """
        from fast.kernels import attention as kernels  # Triton is needed from here on

        rows = read_normed(x)["x"]
        check_rows("attention", rows, self.in_proj.shape[1])
        N, H, G, K = len(rows), self.H, self.G, self.K
        capacity = state.keys.shape[1]
        first, projected = product(x, self.in_proj, self.target, scratch, name="attention_in")
        near, far = piece_sizes(H // G)
        count = pieces(capacity, near, far)
        partial = scratch("attention partial", count, N, H, K, dtype=torch.float32)
        peaks, totals = (
            scratch(f"attention {name}", count, N, H, dtype=torch.float32)
            for name in ("peaks", "totals")
        )
        FP8 = state.keys.dtype == E4M3
        shape = configs.key(H=H, G=G, K=K)
        config = configs.lookup(self.target, "attend_fp8" if FP8 else "attend", shape)
        group = config["GROUP"]  # rows that share what is read of the cache
        sizes = {"H": H, "G": G, "K": K, "NEAR": near, "FAR": far}
        each = Launch(
            f"attend {shape}{' FP8' if FP8 else ''}",
            kernels.attend,
            (count, G, -(-N // group)),
            {
                "projected": projected, "q_gain": self.q_norm, "k_gain": self.k_norm,
                "cosine": rope[0], "sine": rope[1], "keys": state.keys, "values": state.values,
                "key_scales": state.key_scales, "value_scales": state.value_scales,
                "partial": partial, "peaks": peaks, "totals": totals, "start": start, "rows": N,
                "eps": self.eps, "FP8": FP8, "ROTARY": self.rotary, "CAPACITY": capacity,
                "BLOCK": max(16, power_of_two(group * H // G)), **sizes, **constants(config),
            },
            options(config),
        )  # fmt: skip
        read = scratch("attention read", N, H * K)
        config = configs.lookup(self.target, "combine", shape)
        width = min(K, config["WIDTH"])
        together = Launch(
            f"combine {shape}",
            kernels.combine,
            (N, H, K // width),
            {
                "projected": projected, "partial": partial, "peaks": peaks, "totals": totals,
                "out": read, "start": start, "rows": N, **sizes, **constants(config), "WIDTH": width,
            },
            options(config),
        )  # fmt: skip
        last, result = product(
            read, self.out_proj, self.target, scratch,
            name="attention_out", residual=residual, then=then, out=out,
        )  # fmt: skip
        return [first, each, together, last], result

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:
        B, T, _ = x.shape
        if B > 1:
            return self.many(x, cache)
        if T > MAX_ROWS:
            return prefilled(prefill.work, self, x, cache)
        own, start, rope = self.begin(x, cache)
        launches, out = self.launches(x[0], own, start, rope, Scratch(x.device))
        run(launches, x.device)
        self.end(own, cache, T)
        return out[None]

    def begin(self, x: Tensor, cache: KVCache) -> tuple[Keys, Tensor, tuple[Tensor, Tensor]]:
        """The reference's cache as this node reads it, the position at which a pass then begins, and
        RoPE's table."""
        cache.reserve(cache.length + x.shape[1])
        own = Keys.over(cache)
        rope = rope_table(self.rotary, self.rope_theta, own.keys.shape[1], x.device)
        return own, torch.full((1,), cache.length, dtype=torch.int32, device=x.device), rope

    def end(self, own: Keys, cache: KVCache, T: int) -> None:
        """Count T rows that were written into the cache's own memory."""
        cache.length += T

    def extra_repr(self) -> str:
        return f"{self.H} heads of {self.K}, {self.G} of keys, {self.target}"
