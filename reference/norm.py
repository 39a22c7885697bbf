"""The two RMS norms: the model's, which multiplies by 1 + w, and the delta net's, which has a gate."""

import torch
from torch import Tensor, nn

from reference.activation import sigmoid, silu, wide


class RMSNorm(nn.Module):
    """y = x / rms(x) * (1 + w) over the last axis, in float32, with one cast at the end.

    The checkpoint stores w, the factor minus 1.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x_wide = wide(x)
        inverse_rms = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + self.eps)
        return (x_wide * inverse_rms * (1 + wide(self.weight))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNormGated(nn.Module):
    """y = w * x / rms(x) * act(gate), x and gate [..., V]: the norm comes before the gate; w is around 1.

    gate_type: "swish" or "silu" (the same function), or "sigmoid".
    """

    def __init__(self, dim: int, eps: float, gate_type: str) -> None:
        super().__init__()
        self.eps = eps
        self.gate_type = gate_type
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x_wide = wide(x)
        inverse_rms = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + self.eps)
        normed = wide(self.weight) * (x_wide * inverse_rms)
        activation = sigmoid if self.gate_type == "sigmoid" else silu
        return (normed * activation(wide(gate))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, gate={self.gate_type}"
