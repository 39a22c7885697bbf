"""RMS norm, and the product with a bf16 matrix, for the rows of a prompt."""

import math

import torch
from torch import Tensor

from fast.launch import Launch, Scratch, constants, options
from fast.linear import Norm
from fast.prefill.tiles import product_tiles
from fast.router import power_of_two
from fast.target import check_width

GROUP = 8  # blocks of rows that reuse the weights in the last-level cache


def product(
    x: Tensor,
    weight: Tensor,
    target: str,
    scratch: Scratch,
    filled: Tensor,
    *,
    name: str,
    residual: Tensor | None = None,
    activated: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Launch, Tensor]:
    """The launch of x W^T (+ residual), and its output [N, M] in `dtype`. x [N, K], weight [M, K]
    bf16.

    filled [1] int32, on the device: how many of the N rows there are; the others are not computed.
    residual [N, M] bf16. activated: rows 2 i and 2 i + 1 of weight are a gate and an up. The output
    is then silu(gate) * up, [N, M / 2], and there can be no residual.
    """
    assert not (activated and residual is not None)
    from fast.kernels.prefill import linear as kernels  # Triton is needed from here on

    M, K = weight.shape
    check_width(name, x, K)
    config = product_tiles(target, len(x), M)
    out = scratch(name, len(x), M // 2 if activated else M, dtype=dtype)
    blocks = math.ceil(len(x) / config["BLOCK_M"]) * math.ceil(M / config["BLOCK_N"])
    launch = Launch(
        f"prefill {name} N={M} K={K}",
        kernels.linear,
        (blocks, 1, 1),
        {
            "x": x, "weight": weight, "residual": x if residual is None else residual, "out": out,
            "filled": filled, "N": M, "K": K, "HAS_RESIDUAL": residual is not None,
            "ACTIVATED": activated, "GROUP": GROUP, **constants(config),
        },
        options(config),
    )  # fmt: skip
    return launch, out


def normed(x: Tensor, norm: Norm, scratch: Scratch, *, name: str) -> tuple[Launch, Tensor]:
    """The launch of a norm for x [N, D] bf16, and its output [N, D] bf16."""
    from fast.kernels import norm as kernels  # Triton is needed from here on

    D = x.shape[1]
    check_width(name, x, len(norm.weight))
    out = scratch(name, len(x), D)
    launch = Launch(
        f"prefill norm D={D}",
        kernels.norm,
        (len(x), 1, 1),
        {
            "x": x, "weight": norm.weight, "out": out, "count": norm.weight, "eps": norm.eps,
            "D": D, "LAST": False, "BLOCK": power_of_two(D),
        },
        {"num_warps": 4},
    )  # fmt: skip
    return launch, out
