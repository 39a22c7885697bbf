"""FP8 weights: e4m3 numbers with a scale for each 128 x 128 block, each row, or the whole matrix.

Numbers are multiplied by their scale, also if a file names it `weight_scale_inv`: W[n, k] =
weight[n, k] * scale. The shape of the scales alone determines which of the three cases it is.

The format is OCP 8-bit Floating Point (e4m3: no infinities, largest magnitude 448). The FP8
repositories of the family have scales per block. AMD's Quark has scales per row ("per channel").
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen35.errors import InputError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = (128, 128)


def granularity(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], block: tuple[int, int] = BLOCK
) -> str:
    """Say what shares a scale in a weight [N, K]: "tensor", "channel" (a row) or "block".

    InputError, with both shapes, if scale_shape fits none of them.
    """
    N, K = shape
    blocks = (-(-N // block[0]), -(-K // block[1]))
    if scale_shape in ((), (1,), (1, 1)):
        return "tensor"
    if scale_shape in ((N,), (N, 1)):
        return "channel"
    if scale_shape == blocks:
        return "block"
    raise InputError(
        f"an FP8 weight of shape {[N, K]} has scales of shape {list(scale_shape)}; expected [] (one), "
        f"{[N, 1]} (a row) or {list(blocks)} (a block of {block[0]} x {block[1]})"
    )


def dequantize(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] = BLOCK
) -> Tensor:
    """weight [N, K] e4m3, scale [], [1], [N], [N, 1] or [ceil(N/128), ceil(K/128)] -> [N, K] in
    dtype.

    128 stands for the sizes of `block`; a scale [1, 1] counts as one number. A weight [E, N, K] with
    scales [E, ...] is decoded matrix by matrix.

    The product is computed in float32 (in float64 for dtype float64) and rounded to dtype once. A
    NaN in either gives NaN. InputError if the shapes do not fit together, or if weight is not e4m3.
    """
    if weight.dtype != E4M3:
        raise InputError(f"FP8 numbers have {weight.dtype}; expected {E4M3}")
    if weight.dim() == 3:
        if scale.shape[:1] != weight.shape[:1]:
            raise InputError(
                f"FP8 matrices of shape {list(weight.shape)} have scales of shape "
                f"{list(scale.shape)}; expected scales for each of {len(weight)}"
            )
        pairs = zip(weight, scale, strict=True)
        return torch.stack([dequantize(*pair, dtype, block) for pair in pairs])
    kind = granularity(tuple(weight.shape), tuple(scale.shape), block)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    wide, factor = weight.to(precise), scale.to(precise)  # [N, K]
    if kind == "tensor":
        wide *= factor
    elif kind == "channel":
        wide *= factor.view(-1, 1)
    else:
        columns = factor.repeat_interleave(block[1], dim=1)[:, : weight.shape[1]]  # [blocks, K]
        if block[0] == 1:
            wide *= columns
        else:
            for rows, factors in zip(wide.split(block[0]), columns, strict=True):
                rows *= factors
    return wide.to(dtype)


def quantize_blocks(
    weight: Tensor, block: tuple[int, int] = BLOCK, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """weight [N, K], floating point -> e4m3 [N, K], scale [ceil(N/128), ceil(K/128)] in scale_dtype.

    See `quantize_channels` for the rule; the last blocks of an axis may be smaller.
    """
    N, K = _matrix(weight)
    rows, columns = block
    blocks = (-(-N // rows), -(-K // columns))
    padded = F.pad(weight.float(), (0, -K % columns, 0, -N % rows))  # zeros do not change an amax
    tiles = padded.view(blocks[0], rows, blocks[1], columns)
    scale = _scale_of(tiles.abs().amax(dim=(1, 3)), scale_dtype)  # [blocks of N, blocks of K]
    values = _rounded(tiles, scale[:, None, :, None]).view_as(padded)
    return values[:N, :K].contiguous(), scale


def quantize_channels(
    weight: Tensor, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """weight [N, K], floating point -> e4m3 [N, K], scale [N, 1] in scale_dtype.

    The computation is in float32. The scale of a row is amax / 448, at least 2^-126, rounded to
    scale_dtype. The numbers are x / scale, rounded to the nearest e4m3 with ties to even, and
    saturated at 448. A row of zeros has scale 1. If a row has an infinity or a NaN, its scale and
    numbers are NaN. InputError unless weight is a matrix of floating-point numbers.
    """
    _matrix(weight)
    wide = weight.float()
    scale = _scale_of(wide.abs().amax(dim=1, keepdim=True), scale_dtype)  # [N, 1]
    return _rounded(wide, scale), scale


def _matrix(weight: Tensor) -> tuple[int, int]:
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise InputError(
            f"a weight of shape {list(weight.shape)} and {weight.dtype} cannot be FP8: "
            "two axes of floating-point numbers were expected"
        )
    return weight.shape[0], weight.shape[1]


def _scale_of(amax: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The scales for the largest magnitudes `amax`, in the same shape. NaN where amax is not
    finite."""
    least = torch.finfo(torch.float32).tiny
    scale = torch.where(amax == 0, 1.0, (amax / LARGEST).clamp(min=least)).to(scale_dtype)
    return torch.where(amax.isfinite(), scale, torch.nan)


def _rounded(wide: Tensor, scale: Tensor) -> Tensor:
    return (wide / scale.float()).clamp(-LARGEST, LARGEST).to(E4M3)
