"""Gated attention for the rows of a prompt."""

import math
from typing import Any

import torch
from torch import Tensor

from fast.launch import Launch, Scratch, Work, constants, options
from fast.prefill.linear import product
from fast.prefill.tiles import Tiles, tiles
from fast.state import rope_table
from qwen35.cache import FP8KVCache, KVCache

PIECE = 8192  # positions of a piece; the bits of a row depend on it
ROOM = 1 << 28  # bytes for the results of pieces that are read at the same time
FEW = 256  # rows of a pass that has smaller blocks
TOKENS = 16  # rows for which one program rotates one head, or decodes keys and values


def work(
    node: Any, x: Tensor, cache: KVCache, scratch: Scratch, *, residual: Tensor | None = None
) -> tuple[list[Work], Tensor]:
    """The work of a `fast.attention.GatedAttention` for x [N, D] bf16, and its output [N, D] bf16.

    The output is filled when the work runs. The work also adds the rows' keys and values to
    `cache`. residual [N, D] bf16 is added to the output.
    """
    from fast.kernels.prefill import attention as kernels  # Triton is needed from here on

    N, start, target = len(x), cache.length, node.target
    H, G, K = node.H, node.G, node.K
    first, projected = product(x, node.in_proj, target, scratch, name="attention_in")
    q, k = scratch("attention q", N, H, K), scratch("attention k", N, G, K)
    read = scratch("attention read", N, H * K)
    cache.grow(start + N)  # before the launches use the addresses of its buffers
    keys, values = cache.k[0], cache.v[0]  # [G, capacity, K]
    decode: list[Work] = []
    if isinstance(cache, FP8KVCache):  # all cached tokens are decoded once per pass
        keys, values = (
            scratch(f"attention {name}", G, start + N, K) for name in ("keys", "values")
        )
        decode = [
            Launch(
                f"prefill decode G={G} K={K}",
                kernels.decode,
                (math.ceil((start + N) / TOKENS), G, 1),
                {
                    "k": cache.k[0], "v": cache.v[0], "k_scale": cache.k_scale[0],
                    "v_scale": cache.v_scale[0], "keys": keys, "values": values,
                    "tokens": start + N, "capacity": cache.capacity, "K": K, "TOKENS": TOKENS,
                },
                {"num_warps": 4},
            )
        ]  # fmt: skip
    cosine, sine = rope_table(node.rotary, node.rope_theta, N, x.device, first=start)
    sizes = {"H": H, "G": G, "K": K}
    shape = f"H={H} G={G} K={K}"

    def append() -> None:
        v = projected[:, (2 * H + G) * K :].view(N, G, K)
        cache.take(*cache.rounded(k.transpose(0, 1)[None], v.transpose(0, 1)[None]))

    turn = Launch(
        f"prefill turn {shape}",
        kernels.turn,
        (math.ceil(N / TOKENS), H + G, 1),
        {
            "projected": projected, "q_gain": node.q_norm, "k_gain": node.k_norm, "cosine": cosine,
            "sine": sine, "q": q, "k": k, "rows": N, "eps": node.eps, **sizes,
            "ROTARY": node.rotary, "TOKENS": TOKENS,
        },
        {"num_warps": 4},
    )  # fmt: skip
    config = tiles(target, "attend few" if N <= FEW else "attend")
    reading = reads(node, projected, q, keys, values, read, start, config, scratch)
    last, out = product(
        read, node.out_proj, target, scratch, name="attention_out", residual=residual
    )
    return [first, turn, append, *decode, *reading, last], out


def reads(
    node: Any, projected: Tensor, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, start: int,
    config: Tiles, scratch: Scratch,
) -> list[Work]:  # fmt: skip
    """The launches of `attend`, and of `join` if there are several pieces. They take turns where the
    results of all pieces would need more than ROOM bytes. The tensors are those of the kernel."""
    from fast.kernels.prefill import attention as kernels  # Triton is needed from here on

    (N, H, K), G = q.shape, node.G
    pieces = math.ceil((start + N) / PIECE)
    together = min(pieces, max(1, ROOM // (4 * q.numel())))  # pieces that are read at the same time
    held = (1 + together if pieces > 1 else 0, N, H)
    common = {
        "projected": projected, "out": out, "start": start, "rows": N, "H": H, "G": G, "K": K,
        "by_piece": scratch("attention by piece", *held, K, dtype=torch.float32),
        "peaks": scratch("attention peaks", *held, dtype=torch.float32),
        "totals": scratch("attention totals", *held, dtype=torch.float32), "PIECE": PIECE,
    }  # fmt: skip
    shape = f"H={H} G={G} K={K}"
    launches: list[Work] = []
    for first in range(0, pieces, together):
        count = min(together, pieces - first)
        attend = Launch(
            f"prefill attend {shape}{' split' if pieces > 1 else ''}",
            kernels.attend,
            (H, math.ceil(N / config["BLOCK_M"]), count),
            {
                **common, "q": q, "keys": keys, "values": values, "first": first,
                "capacity": keys.shape[1], "SPLIT": pieces > 1, **constants(config),
            },
            options(config),
        )  # fmt: skip
        is_last = first + count == pieces
        join = Launch(
            f"prefill join {shape}{' last' if is_last else ''}",
            kernels.join,
            (math.ceil(N / TOKENS), H, 1),
            {**common, "first": first, "pieces": count, "LAST": is_last, "BLOCK": TOKENS},
            {"num_warps": 4},
        )
        launches += [attend, join] if pieces > 1 else [attend]
    return launches
