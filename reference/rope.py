"""Rotary positions on the first `rotary_dim` channels of a head; the others pass through.

Text positions are one integer a token, so the three mrope axes coincide and plain 1-D RoPE is exact.
"""

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, rotary_dim / 2] each, for integer positions [T].

    The angle of position p and channel i is p * theta^(-2i / rotary_dim). It is computed in float32, as
    in other implementations; its cosine and sine are then cast to `dtype`.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (exponents / rotary_dim)
    angles = positions.float()[:, None] * frequencies  # [T, rotary_dim / 2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, K] rotated by the angles of `rope_table`. Channel j is paired with channel
    j + rotary_dim / 2 (half-split, not interleaved)."""
    half = cos.shape[-1]
    first, second, passed = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, passed), dim=-1)
