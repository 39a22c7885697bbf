"""Linear layers whose weight stays in its file's format and is decoded at each use.

The loader uses them for routed experts that are quantised: an expert is hit seldom, and 512 decoded ones
would take two (FP8) or four (MXFP4) times the file's memory. Results are those of a model whose weights
were decoded before.
"""

from torch import Tensor, nn

from reference.linear import linear
from weights import fp8
from weights.entry import decode


class MXFP4Linear(nn.Module):
    """y = x W^T, x [..., K] -> [..., N]; weight [N, K/2] uint8, weight_scale [N, K/32] uint8.

    stored_as: the name in the file, for errors. InputError at use when a scale is NaN.
    """

    def __init__(self, weight: Tensor, weight_scale: Tensor, stored_as: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.stored_as = stored_as

    def forward(self, x: Tensor) -> Tensor:
        weight = decode("mxfp4", self.weight, self.weight_scale, x.dtype, self.stored_as)  # [N, K]
        return linear(x, weight)

    def extra_repr(self) -> str:
        out_features, half = self.weight.shape
        return f"{2 * half} -> {out_features}"


class FP8Linear(nn.Module):
    """y = x W^T, x [..., K] -> [..., N]; weight [N, K] e4m3, weight_scale as in `weights/fp8.py`.

    stored_as: the name in the file, for errors. InputError at use when a scale is not finite.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        stored_as: str,
        block: tuple[int, int] = fp8.BLOCK,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.stored_as = stored_as
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        weight = decode("fp8", self.weight, self.weight_scale, x.dtype, self.stored_as, self.block)
        return linear(x, weight)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        kind = fp8.granularity(
            (out_features, in_features), tuple(self.weight_scale.shape), self.block
        )
        return f"{in_features} -> {out_features}, a scale per {kind}"
