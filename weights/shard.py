"""Which rank of a tensor-parallel group holds which rows or columns of each tensor.

TABLE has one line for each kind of tensor, also for those that each rank has whole. The modules of
a rank are those of the reference, built from `Plan.rank_config` and filled with its shards. The
ranks then add up the results of mixers, feed-forwards and the embedding (a row that a rank lacks
counts as zero), and concatenate the head's logits along the vocabulary.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from weights.quantization import PREFIX

SIZES = (1, 2, 4, 8)  # ranks of a group


@dataclass(frozen=True)
class Section:
    """A section of an axis: units of `width` elements. The config's field `count` is their number.

    Each rank gets the same number of units, in order (see `units`).
    """

    count: str
    width: Callable[[Config], int] = lambda c: 1


def _value_heads_per_key_head(c: Config) -> int:
    return c.linear_num_value_heads // c.linear_num_key_heads


VOCABULARY = Section("vocab_size")
# Delta net. Value heads go to the rank that has their key head.
KEYS = Section("linear_num_key_heads", lambda c: c.linear_key_head_dim)
VALUES = Section("linear_num_value_heads", lambda c: c.linear_value_head_dim)
VALUE_HEADS = Section("linear_num_value_heads")
QKVZ_GROUPS = Section(
    "linear_num_key_heads",
    lambda c: 2 * (c.linear_key_head_dim + _value_heads_per_key_head(c) * c.linear_value_head_dim),
)
BA_GROUPS = Section("linear_num_key_heads", lambda c: 2 * _value_heads_per_key_head(c))
# Full attention. A query head has the rows of its query, then those of its gate.
QUERIES_AND_GATES = Section("num_attention_heads", lambda c: 2 * c.head_dim)
ATTENDED = Section("num_attention_heads", lambda c: c.head_dim)
KV = Section("num_key_value_heads", lambda c: c.head_dim)
# Feed-forward.
ROUTED = Section("moe_intermediate_size")
SHARED = Section("shared_expert_intermediate_size")
DENSE = Section("intermediate_size")

# (names, axis that is cut, its sections in order). Axis None: whole on each rank. The first line
# that matches counts. N is a number, * is anything, (a|b) is either. layers.N is also mtp.layers.N.
TABLE: tuple[tuple[str, int | None, tuple[Section, ...]], ...] = (
    ("layers.N.mlp.experts.N.(gate|up)_proj.weight", 0, (ROUTED,)),
    ("layers.N.mlp.experts.N.down_proj.weight", 1, (ROUTED,)),
    ("layers.N.mlp.experts.gate_up_proj", 1, (ROUTED, ROUTED)),  # [E, 2I, D]: gate, then up
    ("layers.N.mlp.experts.down_proj", 2, (ROUTED,)),  # [E, D, I]
    ("layers.N.mlp.shared_expert.(gate|up)_proj.weight", 0, (SHARED,)),
    ("layers.N.mlp.shared_expert.down_proj.weight", 1, (SHARED,)),
    ("layers.N.mlp.(gate|up)_proj.weight", 0, (DENSE,)),
    ("layers.N.mlp.down_proj.weight", 1, (DENSE,)),
    ("layers.N.mlp.(gate|shared_expert_gate).weight", None, ()),
    ("layers.N.linear_attn.in_proj_qkv.weight", 0, (KEYS, KEYS, VALUES)),  # q, then k, then v
    ("layers.N.linear_attn.conv1d.weight", 0, (KEYS, KEYS, VALUES)),
    ("layers.N.linear_attn.in_proj_z.weight", 0, (VALUES,)),
    ("layers.N.linear_attn.(in_proj_a.weight|in_proj_b.weight|A_log|dt_bias)", 0, (VALUE_HEADS,)),
    ("layers.N.linear_attn.in_proj_qkvz.weight", 0, (QKVZ_GROUPS,)),  # Qwen3-Next
    ("layers.N.linear_attn.in_proj_ba.weight", 0, (BA_GROUPS,)),  # Qwen3-Next
    ("layers.N.linear_attn.out_proj.weight", 1, (VALUES,)),
    ("layers.N.linear_attn.norm.weight", None, ()),
    ("layers.N.self_attn.q_proj.weight", 0, (QUERIES_AND_GATES,)),
    ("layers.N.self_attn.(k|v)_proj.weight", 0, (KV,)),
    ("layers.N.self_attn.o_proj.weight", 1, (ATTENDED,)),
    ("layers.N.self_attn.(q|k)_norm.weight", None, ()),
    ("layers.N.self_attn.(k|v|kv)_scale", None, ()),  # of keys and values in FP8
    ("layers.N.self_attn.*.(k|v|kv|output)_scale", None, ()),  # the same
    ("layers.N.(input|post_attention)_layernorm.weight", None, ()),
    ("(embed_tokens|lm_head).weight", 0, (VOCABULARY,)),
    ("norm.weight", None, ()),
    ("(rotary_emb|*.rotary_emb).inv_freq", None, ()),  # what old versions of transformers stored
    ("mtp.(fc|norm|pre_fc_norm_embedding|pre_fc_norm_hidden).weight", None, ()),
    ("mtp.(|layers.N.)(embed_tokens|lm_head|shared_head.head).weight", 0, (VOCABULARY,)),  # copies
    ("visual.*", None, ()),
)

# Nodes whose results the ranks add up, because one of their matrices is cut along the axis that its
# product sums over. The names are written as in TABLE.
SUMMED = "layers.N.(linear_attn|self_attn|mlp)"

# Heads that neighbouring ranks share if there are fewer heads than ranks. Each rank then computes
# with the same keys.
SHARED_HEADS = (KV.count, KEYS.count)


def units(count: int, size: int, rank: int) -> tuple[int, int]:
    """The units of a rank as (first, end). Their number is count / size. If there are fewer units than
    ranks (SHARED_HEADS), it is one unit, which the rank shares with its neighbours."""
    first = rank * count // size
    return first, first - (-count // size)  # count / size, rounded up


@dataclass(frozen=True)
class Shard:
    """The part of a tensor on a rank.

    axis: the axis that is cut, or None for the whole tensor.
    ranges: (first, end) along this axis. They are joined in order.
    """

    axis: int | None
    ranges: tuple[tuple[int, int], ...] = ()

    def shape_of(self, shape: Sequence[int], per: int = 1) -> tuple[int, ...]:
        """The shape of the rank's part of a tensor of this shape.

        per: the elements along `axis` that one entry of the tensor stands for, if they are packed or
        grouped along this axis: 2 for MXFP4's bytes, 32 for its scales, 128 for FP8's block scales.
        InputError if a range would split such an entry, or does not lie in the tensor.
        """
        if self.axis is None:
            return tuple(shape)
        length = shape[self.axis] * per if self.axis < len(shape) else 0
        for first, end in self.ranges:
            if first % per or end % per:
                raise InputError(
                    f"the range {first}..{end} of axis {self.axis} is not a multiple of {per}, "
                    "the elements that one entry stands for"
                )
            if end > length:
                raise InputError(
                    f"the range {first}..{end} of axis {self.axis} is not in a tensor of shape "
                    f"{list(shape)} with {per} elements an entry"
                )
        held = sum(end - first for first, end in self.ranges) // per
        return (*shape[: self.axis], held, *shape[self.axis + 1 :])

    def cut(self, tensor: Tensor, per: int = 1) -> Tensor:
        """The rank's part of `tensor`: a view if it is one range, else a copy. per, errors: as in
        `shape_of`."""
        self.shape_of(tensor.shape, per)
        if self.axis is None:
            return tensor
        parts = [
            tensor.narrow(self.axis, first // per, (end - first) // per)
            for first, end in self.ranges
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)


def join(shards: Sequence[Shard], tensors: Sequence[Tensor], per: int = 1) -> Tensor:
    """Join the parts of all ranks to the whole tensor. It reverses `Shard.cut` with the same
    `per`."""
    axis = shards[0].axis
    if axis is None:
        return tensors[0]
    pieces: dict[tuple[int, int], Tensor] = {}  # parts that several ranks share count once
    for shard, tensor in zip(shards, tensors, strict=True):
        lengths = [(end - first) // per for first, end in shard.ranges]
        pieces |= zip(shard.ranges, tensor.split(lengths, axis), strict=True)
    return torch.cat([piece for _, piece in sorted(pieces.items(), key=lambda p: p[0])], axis)


class Plan:
    """The shards of one model over `size` ranks.

    InputError if `size` does not divide the config's sizes. A plan that exists can cut every
    tensor, except for packed groups (checked by `Shard.cut`) and Qwen3-Next's projections (checked
    by `shard`).
    """

    def __init__(self, config: Config, size: int) -> None:
        if size not in SIZES:
            known = ", ".join(map(str, SIZES))
            raise InputError(f"tensor-parallel size {size} is not supported; known are {known}")
        self.config = config
        self.size = size
        self._counts = {name: getattr(config, name) for name in _counted(config)}
        for name, count in self._counts.items():
            is_shared = name in SHARED_HEADS
            if is_shared and size % count == 0:
                continue
            if count % size:
                or_else = f", nor does it divide {size}" if is_shared else ""
                raise InputError(
                    f"{name} = {count} is not divisible by tensor-parallel size {size}{or_else}"
                )
        self._table = [(_compiled(names), axis, sections) for names, axis, sections in TABLE]

    def shard(self, name: str, shape: Sequence[int], rank: int) -> Shard:
        """The part of a checkpoint's tensor that `rank` holds.

        name: the checkpoint's, with or without its prefix. shape: that of the whole tensor in elements,
        independent of the packing. `X.weight_scale` and `X.weight_scale_inv` are cut as their weight,
        so they are given with its shape. InputError for a name that TABLE lacks.
        """
        if not 0 <= rank < self.size:
            raise InputError(f"rank {rank} is not in 0..{self.size - 1}")
        axis, sections = self._rule(name)
        if axis is None:
            return Shard(None)
        lengths = self._lengths(name, sections)
        if len(shape) <= axis or shape[axis] != sum(lengths):
            raise InputError(
                f"{name} has shape {list(shape)}; the config needs {sum(lengths)} on axis {axis}"
            )
        if self.size == 1:  # nothing is cut or copied
            return Shard(None)
        ranges, start = [], 0
        for section, length in zip(sections, lengths, strict=True):
            width, count = section.width(self.config), self._counts[section.count]
            if section in (QKVZ_GROUPS, BA_GROUPS) and count < self.size:
                raise InputError(
                    f"{name} holds each key head beside its value heads; {section.count} = {count} is "
                    f"not divisible by tensor-parallel size {self.size}"
                )
            first, end = units(count, self.size, rank)
            ranges.append((start + first * width, start + end * width))
            start += length
        return Shard(axis, tuple(ranges))

    def extent(self, name: str) -> tuple[int, int] | None:
        """The axis along which a tensor is cut, and its length. None for a tensor that is whole on
        each rank. InputError as in `shard`."""
        axis, sections = self._rule(name)
        return None if axis is None else (axis, sum(self._lengths(name, sections)))

    def rank_config(self) -> Config:
        """The sizes of one rank's modules. Ids and prompts are checked against the whole config."""
        held = {name: units(count, self.size, 0) for name, count in self._counts.items()}
        return replace(self.config, **{name: end - first for name, (first, end) in held.items()})

    def is_summed(self, node: str) -> bool:
        """Whether the ranks' results of a node of the model, each from its own part, add up."""
        return self.size > 1 and _compiled(SUMMED).fullmatch(node) is not None

    def is_whole(self, name: str) -> bool:
        """Whether each rank holds all of a tensor of the checkpoint."""
        return self._rule(name)[0] is None

    def _lengths(self, name: str, sections: tuple[Section, ...]) -> list[int]:
        """The elements of each section."""
        for section in sections:
            if section.count not in self._counts:
                raise InputError(
                    f"{name} is cut along {section.count}, which this config does not use"
                )
        return [self._counts[s.count] * s.width(self.config) for s in sections]

    def _rule(self, name: str) -> tuple[int | None, tuple[Section, ...]]:
        """The axis and its sections, from the first line of the table that matches."""
        bare = PREFIX.sub("", name)
        weight = re.sub(r"\.weight_scale(_inv)?$", ".weight", bare)
        for names, axis, sections in self._table:
            if names.fullmatch(weight):
                return axis, sections
        raise InputError(f"{name}: the tensor-parallel plan has no line for this name")


def _counted(config: Config) -> list[str]:
    """The fields of this config whose units are distributed over ranks. Others may have any
    value."""
    sparse = [config.is_sparse(i) for i in range(config.num_hidden_layers)]
    has_attention = "full_attention" in config.layer_types or config.mtp_num_hidden_layers > 0
    used = {
        "vocab_size": True,
        "num_attention_heads": has_attention,
        "num_key_value_heads": has_attention,
        "linear_num_key_heads": "linear_attention" in config.layer_types,
        "linear_num_value_heads": "linear_attention" in config.layer_types,
        "moe_intermediate_size": config.num_experts > 0,
        "shared_expert_intermediate_size": config.num_experts > 0,
        "intermediate_size": not all(sparse),
    }
    return [name for name, is_used in used.items() if is_used]


def _compiled(names: str) -> re.Pattern[str]:
    """A line's names as a regular expression."""
    pattern = names.replace(".", r"\.").replace("N", r"\d+").replace("*", ".+")
    return re.compile(rf"(mtp\.)?{pattern}" if names.startswith("layers.N") else pattern)
