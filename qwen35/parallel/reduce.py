"""Combines the tensors of ranks. Only this module knows transports.

A transport is a class with `gather` and `sum` for tensors of the same shape and dtype on every
rank. Every transport has the bits of `ordered_sum`.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from reference.activation import wide


class Transport(Protocol):
    def gather(self, x: Tensor) -> Tensor:
        """x of every rank, in their order: [ranks, *x.shape]."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """`ordered_sum` of x of every rank."""
        ...


def ordered_sum(parts: Tensor) -> Tensor:
    """[ranks, ...] -> [...]. Adds from rank 0 upwards in float32 (float64 stays), and rounds once
    to the dtype of `parts`. The bits of an element depend only on its own terms."""
    first, *others = wide(parts).unbind(0)
    return sum(others, start=first).to(parts.dtype)


class AllGather:
    """A transport for gloo and NCCL: all-gather of the process group, then `ordered_sum` on each
    rank."""

    def __init__(self, size: int) -> None:
        self.size = size

    def gather(self, x: Tensor) -> Tensor:
        everyone = x.new_empty(self.size, *x.shape)
        bytes_of = everyone.view(self.size, -1).view(torch.uint8)  # for dtypes that gloo lacks
        dist.all_gather(list(bytes_of.unbind(0)), x.contiguous().view(-1).view(torch.uint8))
        return everyone

    def sum(self, x: Tensor) -> Tensor:
        return ordered_sum(self.gather(x))
