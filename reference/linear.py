"""The matrix product, with bits per row that do not depend on the rows beside it.

A library's product of M rows may pick another kernel, hence another order of summation, for another M.
A pass therefore feeds it one of two row counts only, and pads to it: DECODE_ROWS when the pass has at
most that many rows (decode, and the verification of drafts), GRID otherwise (prefill). So the logits
behind a token cannot depend on how many drafts were verified beside it, nor on how a prompt was cut.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DECODE_ROWS = 4  # most rows of a decode pass: one token and three drafts
GRID = 64  # prompts are computed on an absolute grid of this many tokens; also the delta rule's chunk


def row_tile(rows: int) -> int:
    """Rows of each product in a pass over `rows` rows."""
    return DECODE_ROWS if rows <= DECODE_ROWS else GRID


class Linear(nn.Module):
    """y = x W^T without bias. weight [N, K], uninitialised; x [..., K] -> [..., N] in x's dtype.

    The weight may be kept in another dtype (a mapped checkpoint's own): it is cast at use.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight = self.weight.to(x.dtype)
        N, tile = len(rows), row_tile(len(rows))
        if N == tile:
            return F.linear(rows, weight).view(*x.shape[:-1], -1)
        padded = F.pad(rows, (0, 0, 0, -N % tile))
        product = torch.cat([F.linear(part, weight) for part in padded.split(tile)])
        return product[:N].view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return "{1} -> {0}".format(*self.weight.shape)
