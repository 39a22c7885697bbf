"""Cuts a layer's state by heads into the parts of the ranks, and joins them again."""

from collections.abc import Callable

from torch import Tensor

from qwen35.cache import DeltaState, KVCache, State
from qwen35.parallel.ranks import Ranks
from weights.shard import Plan, Shard, join, units


class Parts:
    """The distribution of a model's states over its ranks."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.plan, self.ranks = plan, ranks

    def cut(self, state: State) -> State:
        """Cut this rank's part out of a whole state, as a copy."""
        rank = self.ranks.rank
        return _each(state, lambda name, tensor: self._shards(name)[rank].cut(tensor).clone())

    def join(self, state: State) -> State:
        """Join the whole state from every rank's part."""

        def joined(name: str, tensor: Tensor) -> Tensor:
            return join(self._shards(name), self.ranks.gather(tensor.contiguous()).unbind(0))

        return _each(state, joined)

    def _shards(self, name: str) -> list[Shard]:
        """The shards of one tensor of a state, for every rank. name: the tensor's name in the state."""
        config, size = self.plan.config, self.ranks.size
        if name == "conv":  # [B, taps - 1, C], channels as in_proj_qkv has rows
            weight, shape = "layers.0.linear_attn.in_proj_qkv.weight", (config.conv_dim, 1)
            held = [self.plan.shard(weight, shape, rank).ranges for rank in range(size)]
            return [Shard(2, ranges) for ranges in held]
        is_delta = name == "recurrent"  # [B, HV, K, V], else keys and values [B, G, P, K]
        heads = config.linear_num_value_heads if is_delta else config.num_key_value_heads
        return [Shard(1, (units(heads, size, rank),)) for rank in range(size)]


def _each(state: State, change: Callable[[str, Tensor], Tensor]) -> State:
    """A state of the same kind with changed tensors. It cannot be rolled back."""
    changed = {name: change(name, tensor) for name, tensor in state.tensors().items()}
    if isinstance(state, KVCache):
        return type(state)(*changed.values(), length=state.length)
    return DeltaState(changed["conv"], changed["recurrent"])
