"""Gated attention for the rows of a prompt."""

import math
from typing import Any

import torch
from torch import Tensor

from fast.launch import Launch, Scratch, Work, constants, options
from fast.prefill.linear import product
from fast.prefill.span import Span
from fast.prefill.tiles import Tiles, tiles
from fast.state import Keys, Rope
from qwen35.cache import E4M3

PIECE = 8192  # positions of a piece; the bits of a row depend on it
ROOM = 1 << 28  # bytes for the results of pieces that are read at the same time
FEW = 256  # rows of a pass that has smaller blocks
TOKENS = 16  # rows for which one program rotates one head, or decodes keys and values


def work(
    node: Any, x: Tensor, state: Keys, span: Span, rope: Rope, scratch: Scratch, *,
    residual: Tensor | None = None,
) -> tuple[list[Work], Tensor]:  # fmt: skip
    """The work of a `fast.attention.GatedAttention` for x [N, D] bf16, and its output [N, D] bf16.

    The output is filled when the work runs. The work also writes the rows' keys and values to `state`.
    rope: cosine and sine of `fast.state.rope_table`. residual [N, D] bf16 is added to the output.
    """
    from fast.kernels.prefill import attention as kernels  # Triton is needed from here on

    N, target = len(x), node.target
    H, G, K = node.H, node.G, node.K
    where = {"start": span.start, "filled": span.filled}
    first, projected = product(x, node.in_proj, target, scratch, span.filled, name="attention_in")
    q, read = scratch("attention q", N, H, K), scratch("attention read", N, H * K)
    keys, values, capacity = state.keys, state.values, state.keys.shape[1]
    FP8 = keys.dtype == E4M3
    decode: list[Work] = []
    if FP8:  # all cached tokens are decoded once per pass
        keys, values = (scratch(f"attention {name}", G, span.end, K) for name in ("keys", "values"))
        decode = [
            Launch(
                f"prefill decode G={G} K={K}",
                kernels.decode,
                (math.ceil(span.end / TOKENS), G, 1),
                {
                    "k": state.keys, "v": state.values, "k_scale": state.key_scales,
                    "v_scale": state.value_scales, "keys": keys, "values": values, **where,
                    "capacity": capacity, "room": span.end, "K": K, "TOKENS": TOKENS,
                },
                {"num_warps": 4},
            )
        ]  # fmt: skip
    shape = f"H={H} G={G} K={K}"
    turn = Launch(
        f"prefill turn {shape}{' FP8' if FP8 else ''}",
        kernels.turn,
        (math.ceil(N / TOKENS), H + 2 * G, 1),
        {
            "projected": projected, "q_gain": node.q_norm, "k_gain": node.k_norm, "cosine": rope[0],
            "sine": rope[1], "q": q, "keys": state.keys, "values": state.values,
            "key_scales": state.key_scales, "value_scales": state.value_scales, **where,
            "eps": node.eps, "capacity": capacity, "H": H, "G": G, "K": K, "ROTARY": node.rotary,
            "FP8": FP8, "TOKENS": TOKENS,
        },
        {"num_warps": 4},
    )  # fmt: skip
    config = tiles(target, "attend few" if N <= FEW else "attend")
    reading = reads(node, projected, q, keys, values, read, span, config, scratch)
    last, out = product(
        read, node.out_proj, target, scratch, span.filled, name="attention_out", residual=residual
    )
    return [first, turn, *decode, *reading, last], out


def reads(
    node: Any, projected: Tensor, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, span: Span,
    config: Tiles, scratch: Scratch,
) -> list[Work]:  # fmt: skip
    """The launches of `attend`, and of `join` if there are several pieces. They take turns where the
    results of all pieces would need more than ROOM bytes. The tensors are those of the kernel."""
    from fast.kernels.prefill import attention as kernels  # Triton is needed from here on

    (N, H, K), G = q.shape, node.G
    pieces = math.ceil(span.end / PIECE)
    together = min(pieces, max(1, ROOM // (4 * q.numel())))  # pieces that are read at the same time
    held = (1 + together if pieces > 1 else 0, N, H)
    common = {
        "projected": projected, "out": out, "start": span.start, "filled": span.filled,
        "H": H, "G": G, "K": K,
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
        launches.append(attend)
        if pieces == 1:
            break
        is_last = first + count == pieces
        join = Launch(
            f"prefill join {shape}{' last' if is_last else ''}",
            kernels.join,
            (math.ceil(N / TOKENS), H, 1),
            {**common, "first": first, "pieces": count, "LAST": is_last, "BLOCK": TOKENS},
            {"num_warps": 4},
        )
        launches.append(join)
    return launches
