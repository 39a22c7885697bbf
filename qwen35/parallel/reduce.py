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


LARGE = 1 << 20  # bytes from which on a sum is worth a second collective


class AllGather:
    """A transport for gloo and NCCL, by collectives of the process group that only move bytes.

    A small sum is an all-gather, and then `ordered_sum` on each rank. For a large one each rank
    sums one part of the elements, and then gathers the other ranks' parts: that moves 2 tensors to
    each rank, not one for each rank.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def gather(self, x: Tensor) -> Tensor:
        everyone = x.new_empty(self.size, *x.shape)
        self._gather(x, everyone)
        return everyone

    def sum(self, x: Tensor) -> Tensor:
        if x.nbytes < LARGE or x.numel() % self.size:
            return ordered_sum(self.gather(x))
        parts = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(_bytes(parts), _bytes(x.contiguous()))
        own = ordered_sum(parts.view(self.size, -1))
        self._gather(own, parts)
        return parts

    def _gather(self, x: Tensor, everyone: Tensor) -> None:
        """Fill `everyone` with the elements of x of all ranks, one after the other."""
        dist.all_gather(
            list(_bytes(everyone).view(self.size, -1).unbind(0)), _bytes(x.contiguous())
        )


def _bytes(x: Tensor) -> Tensor:
    """The elements as bytes, for dtypes that a backend lacks."""
    return x.view(-1).view(torch.uint8)
