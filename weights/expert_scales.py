"""The scales of FP8 experts, if one tensor has those of all experts of a layer.

transformers writes them like this, as `experts.gate_up_proj_scale_inv` and
`experts.down_proj_scale_inv`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qwen35.errors import InputError
from weights import fp8, mxfp4
from weights.storage import Stored

View = Callable[[Tensor], Tensor]
E8M0 = (torch.uint8, torch.float8_e8m0fnu)  # dtypes of scales that are powers of two


def block_of(
    scale: Stored, shape: tuple[int, ...], matrix: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of a matrix that share a scale.

    They are `block`, or 32 elements of a row (MXFP8) if e8m0 scales have the shape for that and not
    the one for `block`. shape: that of the scales of this matrix.
    """
    counts = [
        tuple(-(-size // per) for size, per in zip(matrix, pair, strict=True))
        for pair in (block, (1, mxfp4.GROUP))
    ]
    is_mx = scale.dtype in E8M0 and shape == counts[1] != counts[0]
    return (1, mxfp4.GROUP) if is_mx else block


def expert_scales(
    scale: Stored,
    expert: int,
    experts: int,
    matrix: tuple[int, int],
    rows: range,
    block: tuple[int, int],
) -> tuple[View, tuple[int, int]]:
    """A view that cuts out the scales of some rows of one expert's matrix, and the block of each
    scale.

    scale: [E] or [E, 1, 1] (one per expert), [E, N] or [E, N, 1] (one per row), or
        [E, blocks of N, blocks of K].
    expert: the number of the expert. experts: how many there are.
    matrix: (N, K) of the fused matrix (gate rows, then up rows), or of down.
    rows: the wanted rows of that matrix.
    block: rows and columns of a block.

    The blocks of gate and up are counted in one of two ways: through both, as when transformers
    quantises a fused tensor, or from the start of each, as when it joins two tensors that were
    quantised separately. InputError if neither fits, or if both fit and differ, because transformers
    decodes in one way and multiplies in the other.
    """
    N, K = matrix
    shape = scale.shape[1:]
    is_whole = scale.shape[:1] == (experts,)
    if is_whole and math.prod(shape) == 1:
        return (lambda scales: scales[expert]), block
    if is_whole and shape in ((N,), (N, 1)):
        return (lambda scales: scales[expert, rows.start : rows.stop]), block
    tall, wide = block_of(scale, shape, matrix, block)
    columns = -(-K // wide)
    count = -(-len(rows) // tall)  # blocks of these rows alone
    through = shape == (-(-N // tall), columns)
    apart = shape == (N // max(len(rows), 1) * count, columns)
    if through and apart and len(rows) < N and len(rows) % tall:
        raise InputError(
            f"{scale.name} has shape {list(scale.shape)}: it cannot be told whether a block of {tall} "
            f"rows reaches from gate to up, which have {len(rows)} each"
        )
    if is_whole and apart and rows:
        start = rows.start // len(rows) * count
        return (lambda scales: scales[expert, start : start + count]), (tall, wide)
    if not is_whole or not through or not rows:
        raise InputError(
            f"{scale.name} has shape {list(scale.shape)}; experts of shape {[N, K]} need "
            f"{[experts, -(-N // tall), columns]} (a block of {tall} x {wide}), {[experts, N, 1]} "
            f"(a row) or {[experts, 1, 1]} (an expert)"
        )
    # A block may begin before these rows, so the scales are repeated for smaller blocks.
    fine = math.gcd(rows.start, tall)
    inner = slice(rows.start // fine, -(-rows.stop // fine))
    return (lambda scales: scales[expert].repeat_interleave(tall // fine, 0)[inner]), (fine, wide)


def is_unscaled(weight: Tensor) -> bool:
    """Whether a plain weight's first 4,096 numbers are e4m3, as if its scales had been forgotten."""
    first = weight.flatten()[:4096].float()
    return bool(first.any()) and torch.equal(first.to(fp8.E4M3).float(), first)
