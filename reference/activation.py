"""Sigmoid, SiLU and softplus from exp alone, so that an element's bits do not depend on its neighbours.

torch's own sigmoid, SiLU and softplus use other instructions for the last few elements of a tensor than
for the rest, so a row in a pass of four may get other bits than the same row alone. Its exp does not do
this. All three compute in float32 (in float64 for a float64 model) and return x's dtype and shape.
"""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the accumulating dtype: float64 where x is float64, else float32."""
    return x.float() if x.dtype.itemsize < 4 else x


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return (1 / (1 + torch.exp(-wide(x)))).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), also called swish."""
    x_wide = wide(x)
    return (x_wide / (1 + torch.exp(-x_wide))).to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x). Above 20 it returns x, which is the same number in float32."""
    x_wide = wide(x)
    return torch.where(x_wide > 20, x_wide, torch.log1p(torch.exp(x_wide))).to(x.dtype)
