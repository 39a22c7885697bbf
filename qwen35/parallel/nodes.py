"""The nodes that combine the results of the ranks. Each wraps a node of a rank's model and has its
name. `weights/shard.py` says which nodes are wrapped.
"""

import torch
from torch import Tensor, nn

from qwen35.parallel.ranks import ALONE, Ranks
from reference.model import Model
from weights.shard import Plan


class Joined(nn.Module):
    """A node that wraps `part`, a node of a rank's model. It has the children and parameters of the
    part, with the same names, so checkpoints, node patterns and traces do not depend on the
    wrapper."""

    def __init__(self, part: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.__dict__["part"] = part  # as a child it would add "part." to all names below
        self._modules, self._parameters = (
            part._modules,
            part._parameters,
        )  # shared, so replacements are seen
        self.ranks = ranks

    def around(self, part: nn.Module) -> "Joined":
        """The same wrapper around a replacement of its part."""
        return type(self)(part, self.ranks)

    def extra_repr(self) -> str:
        return f"{type(self.part).__name__}, rank {self.ranks.rank} of {self.ranks.size}"


class Summed(Joined):
    """A mixer or a feed-forward, whose result is the sum of the ranks' results [..., D].

    They are added in the order of ranks, in float32 (float64 in a float64 model), and rounded once.
    The bits are the same on every rank, and those of a row do not depend on the other rows.
    """

    def forward(self, *arguments: object) -> Tensor:
        return self.ranks.sum(self.part(*arguments))


class VocabularyEmbedding(Joined):
    """ids [B, T] -> [B, T, D]. A rank has the rows of consecutive ids; other rows count as zero."""

    def forward(self, input: Tensor) -> Tensor:
        rows = len(self.part.get_parameter("weight"))
        own = input - self.ranks.rank * rows
        held = (own >= 0) & (own < rows)  # [B, T]
        embedded = self.part(own.where(held, 0))  # [B, T, D]
        return self.ranks.sum(embedded.where(held[..., None], 0))


class VocabularyHead(Joined):
    """Hidden states [..., D] -> logits [..., vocab]. Each rank computes the logits of consecutive
    ids, and gets those of all ranks, so that all ranks choose the same token."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.ranks.gather(self.part(x)).unbind(0), dim=-1)


def joined(stage: str, module: nn.Module, plan: Plan, ranks: Ranks) -> nn.Module:
    """Wrap the nodes of a stage of a rank's model whose results the ranks combine. Returns the stage.

    stage: the name of `module` in the model.
    """
    if stage == "embed_tokens":
        return VocabularyEmbedding(module, ranks)
    if stage == "lm_head":
        return VocabularyHead(module, ranks)
    for name in [name for name, _ in module.named_modules()]:
        if plan.is_summed(f"{stage}.{name}"):
            module.set_submodule(name, Summed(module.get_submodule(name), ranks))
    return module


def ranks_of(model: Model) -> Ranks:
    """The group of a model that is one rank's part, or ALONE."""
    head = model.lm_head
    return head.ranks if isinstance(head, VocabularyHead) else ALONE
