"""Where the rows of a prompt's pass lie."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The positions of a pass's rows, start[0] to start[0] + filled[0] - 1.

    start, filled: [1] int32, on the device, so that a captured pass serves other positions and fewer
    rows. end: all positions are below it; the launches are sized by it.
    """

    start: Tensor
    filled: Tensor
    end: int

    @classmethod
    def of(cls, start: Tensor, x: Tensor, end: int) -> "Span":
        """All rows of x [N, D]."""
        return cls(start, number_of_rows(x), end)


def number_of_rows(x: Tensor) -> Tensor:
    """The number of rows of x [N, D], [1] int32 on x's device."""
    return torch.full((1,), len(x), dtype=torch.int32, device=x.device)
