"""Sigmoid, SiLU and softplus from exp alone, so that an element's bits do not depend on its neighbours.

The library's own kernels of these three use other instructions for the last few elements of a tensor
than for the others: one row in a pass of four may then differ from the same row alone. Its exp does not.
All compute in float32 (float64 in a float64 model) and return x's dtype.
"""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the accumulating dtype: float32, or float64 when x already is."""
    return x.float() if x.dtype.itemsize < 4 else x


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return (1 / (1 + torch.exp(-wide(x)))).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), also called swish."""
    x_wide = wide(x)
    return (x_wide / (1 + torch.exp(-x_wide))).to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), taken as x above 20, where the two agree to float32."""
    x_wide = wide(x)
    return torch.where(x_wide > 20, x_wide, torch.log1p(torch.exp(x_wide))).to(x.dtype)
