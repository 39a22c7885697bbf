"""MXFP4: four-bit numbers (e2m1) in groups of 32 along K. Each group has one power of two (e8m0).

    code     bit 3 is the sign; bits 0 to 2 choose one of 0, 0.5, 1, 1.5, 2, 3, 4, 6
    byte     two codes: element 2j in the low nibble, 2j + 1 in the high one
    scale    byte s stands for 2^(s - 127); 255 is NaN

The format is OCP Microscaling Formats (MX) v1.0. The rounding is the "even" rule of AMD's Quark,
which made the published MXFP4 checkpoints of this family.
"""

import torch
from torch import Tensor

from qwen35.errors import InputError

GROUP = 32  # elements along K that share a scale
NAN_SCALE = 255
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CHUNK = 1 << 19  # elements quantised at a time: intermediate results stay in the CPU's cache

_VALUES = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float64)
_BYTES = torch.arange(256)
_PAIRS = torch.stack([_VALUES[_BYTES & 15], _VALUES[_BYTES >> 4]], dim=-1)  # [256, 2]
# A pair of numbers is one word, so that decoding is one look-up per byte.
_WORDS = {
    torch.bfloat16: _PAIRS.bfloat16().view(torch.int32).flatten(),
    torch.float32: _PAIRS.float().view(torch.int64).flatten(),
    torch.float64: _PAIRS.view(torch.complex128).flatten(),
}


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """packed [..., K/2] uint8, scale [..., K/32] uint8 -> [..., K] in dtype, row-major.

    The result is exact in bfloat16, float32 and float64, since it is a product with a power of two.
    Only magnitudes from 2^128 on are infinite in the first two. A scale of 255 makes its group NaN.
    InputError if the shapes do not fit together, or for other dtypes.
    """
    if dtype not in _WORDS:
        known = ", ".join(str(known) for known in _WORDS)
        raise InputError(f"MXFP4 is decoded to {known}; {dtype} was asked for")
    *rows, half = packed.shape
    typed = packed.dtype == torch.uint8 and scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    if scale.shape != (*rows, half * 2 // GROUP) or half * 2 % GROUP or not typed:
        raise InputError(
            f"MXFP4 bytes of shape {list(packed.shape)} and scales of shape {list(scale.shape)}, "
            f"{packed.dtype} and {scale.dtype}; expected [..., K/2] and [..., K/{GROUP}], torch.uint8"
        )
    words = _WORDS[dtype].to(packed.device)
    values = words.index_select(0, packed.flatten().int()).view(dtype)  # [... * K]
    powers = scale.contiguous().view(torch.float8_e8m0fnu).to(dtype)  # [..., K/32]
    groups = values.view(*scale.shape, GROUP).mul_(powers[..., None])
    return groups.view(*rows, half * 2)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., K], floating point -> packed [..., K/2] uint8, scale [..., K/32] uint8.

    The rule for each group of 32, in float32 (float64 is rounded to float32 first):
        exponent = floor(log2(amax after its mantissa is rounded to the two leading bits)) - 2,
        at least -127; scale = exponent + 127; code = x / 2^exponent, rounded to the nearest e2m1,
        ties to the even code, magnitudes above 6 to 6; the sign is kept, of zeros too.
    A group of zeros has scale 0. e2m1 has neither infinity nor NaN, so a group with one of them
    becomes NaN as a whole, with scale 255 and codes 0. InputError if 32 does not divide K.
    """
    *rows, K = weight.shape
    if K % GROUP or not weight.is_floating_point():
        raise InputError(
            f"a weight of shape {list(weight.shape)} and {weight.dtype} cannot be MXFP4: "
            f"its last axis must be a multiple of {GROUP}, its numbers floating point"
        )
    groups = weight.reshape(-1, GROUP)  # [n, 32]
    packed = torch.empty(len(groups), GROUP // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(len(groups), dtype=torch.uint8, device=weight.device)
    step = min(CHUNK // GROUP, len(groups))
    # The buffers are reused, because allocating memory costs more than a pass over it.
    buffers = torch.empty(2, step, GROUP, device=weight.device)
    for first in range(0, len(groups), step or 1):
        part = slice(first, first + step)
        packed[part], scale[part] = _quantize_groups(
            groups[part], *buffers[:, : len(groups) - first]
        )
    return packed.view(*rows, K // 2), scale.view(*rows, K // GROUP)


def _quantize_groups(groups: Tensor, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """groups [n, 32] -> packed [n, 16], scale [n]; x and size [n, 32] float32 are overwritten."""
    x.copy_(groups)
    amax = torch.abs(x, out=size).amax(-1, keepdim=True)  # [n, 1]; NaN when there is one
    finite = amax < torch.inf  # not for NaN either
    if not finite.all():
        x, size = x.where(finite, 0.0), size.where(finite, 0.0)
    # float32 has exponent + 127 from bit 23 up. Adding a quarter of a mantissa carries into these
    # bits.
    stored = ((amax.view(torch.int32) + 0x200000 >> 23) - 2).clamp_(min=0)  # [n, 1], at most 253
    inverse = (254 - stored << 23).view(torch.float32)  # 2^-exponent: a product with it is exact
    size *= inverse  # [n, 32], below 7
    sign = x.view(torch.int32).bitwise_right_shift_(28).to(torch.uint8) & 8
    # Codes are 0.5 apart up to 2, then 1, then 2; the smallest of the three roundings is the right one.
    # A sum from 2^22, 2^23, 2^24 has those steps: rounded, ties to even, it counts them in its low bits.
    # The small addends, even numbers of steps, turn the three counts into codes.
    halves, ones, twos = (
        torch.add(size, large, out=x).view(torch.int32).to(torch.uint8)
        for large in (2**22, 2**23 + 2, 2**24 + 8)
    )
    codes = halves.minimum(ones).minimum(twos) | sign  # [n, 32]; at most 7, since sizes are below 7
    pair = codes.view(torch.int16)  # little-endian: the even element in the low half
    packed = (pair | pair >> 4).to(torch.uint8)  # [n, 16]
    return packed, torch.where(finite, stored, NAN_SCALE).to(torch.uint8).flatten()
