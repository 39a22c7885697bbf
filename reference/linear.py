"""The matrix product, with bits per row that do not depend on the rows beside it.

A library may choose another kernel, and so another order of summation, for another number of rows. A pass
therefore gives it one of two row counts and pads to it: DECODE_ROWS when the pass has at most that many
rows (decode, and the verification of drafts), else GRID (prefill). So the logits behind a token do not
depend on how many drafts were verified beside it, nor on how a prompt was cut into passes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DECODE_ROWS = 4  # the most rows of a decode pass: one token and three drafts
GRID = 64  # tokens: prompts are cut at multiples of it, and the delta rule's chunk is as long


def row_tile(rows: int) -> int:
    """The number of rows that each product has in a pass over `rows` rows."""
    return DECODE_ROWS if rows <= DECODE_ROWS else GRID


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = x W^T in x's dtype. x [..., K], weight [N, K] (cast at use) -> [..., N]."""
    weight_cast = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    rows = x.shape[:-1].numel()
    tile = row_tile(rows)
    if rows == tile:
        return F.linear(x, weight_cast)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, -rows % tile))
    parts = [F.linear(part, weight_cast) for part in padded.split(tile)]
    product = parts[0] if len(parts) == 1 else torch.cat(parts)
    return product[:rows].view(*x.shape[:-1], -1)


class Linear(nn.Module):
    """y = x W^T, x [..., K] -> [..., N], with a weight [N, K] that a checkpoint fills, and no bias.

    The weight may have another dtype than the activations: a mapped checkpoint keeps its own.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features} -> {out_features}"
