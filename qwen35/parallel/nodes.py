"""The nodes that join what the ranks computed. Each stands around a node of a rank's own model, under
that node's name; `weights/shard.py` says where.
"""

import torch
from torch import Tensor, nn

from qwen35.parallel.ranks import ALONE, Ranks
from reference.model import Model


class Joined(nn.Module):
    """A node around `part`, the node of a rank's own model. Its children and parameters are the part's,
    under unchanged names, so checkpoints, patterns of nodes and traces need not know of it."""

    def __init__(self, part: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.__dict__["part"] = part  # not a child, which would prefix all names below it
        self._modules, self._parameters = part._modules, part._parameters  # also what replaces them
        self.ranks = ranks

    def extra_repr(self) -> str:
        return f"{type(self.part).__name__}, rank {self.ranks.rank} of {self.ranks.size}"


class Summed(Joined):
    """A mixer or a feed-forward: each rank's part gives a contribution [..., D], and they are added.

    They are added in the order of ranks, in float32 (float64 in a float64 model), and rounded once: the
    bits are the same on every rank, and those of a row do not depend on the rows beside it.
    """

    def forward(self, *arguments: object) -> Tensor:
        return self.ranks.sum(self.part(*arguments))


class VocabularyEmbedding(Joined):
    """ids [B, T] -> [B, T, D]. A rank has the rows of consecutive ids; what it lacks counts as zero."""

    def forward(self, input: Tensor) -> Tensor:
        rows = len(self.part.get_parameter("weight"))
        own = input - self.ranks.rank * rows
        held = (own >= 0) & (own < rows)  # [B, T]
        embedded = self.part(own.where(held, 0))  # [B, T, D]
        return self.ranks.sum(embedded.where(held[..., None], 0))


class VocabularyHead(Joined):
    """Hidden states [..., D] -> logits [..., vocab]: each rank computes those of consecutive ids, and
    every rank gets all of them, so that all draw the same token."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.ranks.gather(self.part(x)).unbind(0), dim=-1)


def ranks_of(model: Model) -> Ranks:
    """The group that a model is one rank's part of."""
    head = model.lm_head
    return head.ranks if isinstance(head, VocabularyHead) else ALONE
