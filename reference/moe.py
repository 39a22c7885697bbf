"""Feed-forward: the gated MLP, and the mixture of experts made of it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen35.config import Config
from reference.activation import sigmoid, silu, wide
from reference.linear import Linear, linear, row_tile


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), [..., D] -> [..., D]: a dense layer's feed-forward, or an expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """x [N, D] -> the chosen experts [N, k] (int64), best first, and their weights [N, k] in float32.

    The softmax runs over all experts, in float32. Ties go to the lower index (a stable sort), so that the
    choice is defined.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = wide(linear(x, self.weight)).softmax(-1)  # [N, E]
        ranked, experts = probabilities.sort(dim=-1, descending=True, stable=True)
        chosen = ranked[:, : self.top_k]
        weights = chosen / chosen.sum(-1, keepdim=True) if self.norm_topk_prob else chosen
        return experts[:, : self.top_k], weights

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return f"{hidden} -> top {self.top_k} of {experts}"


class Experts(nn.ModuleList):
    """x [N, D], experts [N, k], weights [N, k] -> the weighted sum of each row's experts, [N, D].

    A row's sum runs over its own experts in the order of `experts`, whichever the other rows chose.
    """

    def __init__(self, config: Config) -> None:
        sizes = config.hidden_size, config.moe_intermediate_size
        super().__init__(MLP(*sizes) for _ in range(config.num_experts))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        # Every product has the row count of the whole pass, however few rows an expert has.
        tile = row_tile(len(x))
        outputs = x.new_empty(*experts.shape, x.shape[1])  # [N, k, D]
        for hit in experts.unique():
            rows, slots = torch.where(experts == hit)  # [n] each
            padded = F.pad(x[rows], (0, 0, 0, -len(rows) % tile))  # [n rounded up, D]
            outputs[rows, slots] = self[hit](padded)[: len(rows)]
        first, *others = (outputs * weights.to(x.dtype)[..., None]).unbind(1)  # [N, D] each
        return sum(others, start=first)


class GroupedExperts(Experts):
    """The same function as `Experts`, bit for bit, in fewer and larger steps: rows are sorted by expert,
    and one call of the activation serves all of them. The model runs this form."""

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        N, k = experts.shape
        tile = row_tile(N)  # each expert's rows are padded to a multiple of it
        chosen, pairs = experts.flatten().sort(stable=True)  # [N * k], grouped by expert
        counts = chosen.bincount(minlength=len(self))  # [E]
        padding = -counts % tile
        padding_before = padding.cumsum(0) - padding
        places = torch.arange(N * k, device=x.device) + padding_before[chosen]  # [N * k]
        sizes = (counts + padding).tolist()
        grouped = x.new_zeros(sum(sizes), x.shape[1])
        grouped.index_copy_(0, places, x.index_select(0, pairs // k))

        hit = [expert for expert, size in zip(self, sizes, strict=True) if size]
        sizes_hit = [size for size in sizes if size]
        per_expert = list(zip(hit, grouped.split(sizes_hit), strict=True))
        gate = torch.cat([expert.gate_proj(rows) for expert, rows in per_expert])
        up = torch.cat([expert.up_proj(rows) for expert, rows in per_expert])
        hidden = zip(hit, (silu(gate) * up).split(sizes_hit), strict=True)
        outputs = torch.cat([expert.down_proj(rows) for expert, rows in hidden])  # [sum, D]

        place_of_pair = torch.empty_like(pairs).index_copy_(0, pairs, places)
        by_pair = outputs.index_select(0, place_of_pair)  # [N * k, D], in the order of `experts`
        first, *others = (by_pair.view(N, k, -1) * weights.to(x.dtype)[..., None]).unbind(1)
        return sum(others, start=first)


class SparseMoeBlock(nn.Module):
    """Routed experts plus one shared expert behind a sigmoid gate, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = GroupedExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MLP(config.hidden_size, shared) if shared else None
        self.shared_expert_gate = Linear(config.hidden_size, 1) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # [N, D]
        experts, weights = self.gate(rows)
        routed = self.experts(rows, experts, weights)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return routed.view_as(x)
        shared_gate = sigmoid(self.shared_expert_gate(rows))  # [N, 1]
        return (routed + shared_gate * self.shared_expert(rows)).view_as(x)
