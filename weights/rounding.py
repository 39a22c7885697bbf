"""Measures the rounding error of a change of format."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weights import mxfp4

MEASURED = 1 << 18  # elements that are compared at a time, in float64


@dataclass
class Rounding:
    """The rounding error of all tensors of a kind: sums of squares, and the group with the largest
    relative error. A group has 32 elements along K, or a whole row if 32 does not divide K."""

    tensors: int = 0
    elements: int = 0
    squares: float = 0.0
    error_squares: float = 0.0
    worst: float = 0.0  # relative RMS of that group
    worst_at: str = ""

    def add(self, name: str, exact: Tensor, approximate: Callable[[slice], Tensor]) -> None:
        """Compare a matrix [N, K] with `approximate(rows)`, float32, a slice of rows at a time."""
        N, K = exact.shape
        group = mxfp4.GROUP if K % mxfp4.GROUP == 0 else K
        step = max(1, MEASURED // K)
        self.tensors += 1
        self.elements += N * K
        for first in range(0, N, step):
            rows = slice(first, first + step)
            x = exact[rows].double().view(-1, group)
            lost = (approximate(rows).view(-1, group) - x).square_().sum(-1)  # [groups]
            whole = x.square().sum(-1)
            self.squares += whole.sum().item()
            self.error_squares += lost.sum().item()
            relative = (lost / whole.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
            worst, at = relative.max(0)
            if worst.item() > self.worst:
                self.worst = worst.item()
                row, column = divmod(int(at), K // group)
                self.worst_at = f"{name}[{first + row}, {column * group}:{(column + 1) * group}]"

    def merge(self, other: "Rounding") -> None:
        self.tensors += other.tensors
        self.elements += other.elements
        self.squares += other.squares
        self.error_squares += other.error_squares
        if other.worst > self.worst:
            self.worst, self.worst_at = other.worst, other.worst_at

    def summary(self) -> dict[str, Any]:
        relative = math.sqrt(self.error_squares / self.squares) if self.squares else 0.0
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "relative_rms": relative,
            "worst_group": self.worst,
            "worst_at": self.worst_at,
        }
