"""The shape of a model, as a frozen dataclass that is read from a checkpoint's `config.json`.

Axis legend of the whole project (shape comments, first-line unpacking):
    B batch    T tokens    D hidden    P positions in a cache    E experts    I intermediate
    H query or key heads    G kv heads    HV value heads    K key head size    V value head size
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen35.config_json import (
    MOST_EXPERTS,
    SPARSE,
    Reader,
    check_layer_types,
    expect,
    is_integer,
    is_positive,
    read_object,
)
from qwen35.errors import InputError

LayerType = Literal["linear_attention", "full_attention"]


@dataclass(frozen=True)
class Config:
    """Sizes and switches of one Qwen3.5 (3.6, 3-Next) text model, with the names of
    `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[LayerType, ...]
    # gated full attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    partial_rotary_factor: float
    # gated delta net
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    output_gate_type: str = "swish"  # how z gates the delta net's output: swish (= silu) or sigmoid
    # feed-forward: dense where num_experts is 0
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    # the rest
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768  # the default of transformers
    tie_word_embeddings: bool = False
    mtp_num_hidden_layers: int = 1
    eos_token_id: tuple[int, ...] = ()
    model_type: str = "qwen3_5_moe"

    def __post_init__(self) -> None:
        for name in COUNTS:
            expect(name, getattr(self, name), is_integer(getattr(self, name), 0), "an integer >= 0")
        routed = ("num_experts_per_tok", "moe_intermediate_size") if self.num_experts else ()
        for name in SIZES + routed:
            expect(name, getattr(self, name), is_integer(getattr(self, name), 1), "an integer >= 1")
        few = is_integer(self.num_experts, 0) and self.num_experts <= MOST_EXPERTS
        expect("num_experts", self.num_experts, few, f"an integer from 0 to {MOST_EXPERTS}")
        for name in NUMBERS:
            value = getattr(self, name)
            expect(name, value, is_positive(value), "a positive number")
        share = self.partial_rotary_factor
        expect(
            "partial_rotary_factor", share, share <= 1, "a share of the head dimension, at most 1"
        )
        for name in ("eos_token_id", "mlp_only_layers"):
            value = getattr(self, name)
            expect(name, value, all(is_integer(i, 0) for i in value), "integers >= 0")
        for name in ("norm_topk_prob", "tie_word_embeddings"):
            expect(name, getattr(self, name), type(getattr(self, name)) is bool, "true or false")
        divides = (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        )
        for whole, part in divides:
            if getattr(self, whole) % getattr(self, part):
                raise InputError(
                    f"config: {whole} = {getattr(self, whole)} is not a multiple of "
                    f"{part} = {getattr(self, part)}"
                )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise InputError(
                f"config: head_dim = {self.head_dim} times partial_rotary_factor = "
                f"{self.partial_rotary_factor} gives {self.rotary_dim} rotary channels; "
                f"expected an even number in 2..{self.head_dim}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"config: layer_types has {len(self.layer_types)} entries, "
                f"num_hidden_layers = {self.num_hidden_layers}"
            )
        check_layer_types(self.layer_types)
        # After the length of layer_types, because the number of layers alone may be anything.
        if not all(map(self.is_sparse, range(self.num_hidden_layers))):
            inter = self.intermediate_size
            expect("intermediate_size", inter, inter > 0, "an integer >= 1 for the dense layers")
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"config: num_experts_per_tok = {self.num_experts_per_tok} is more than "
                f"num_experts = {self.num_experts}"
            )
        if self.output_gate_type not in ("swish", "silu", "sigmoid"):
            raise InputError(
                f"config: output_gate_type = {self.output_gate_type!r}; known are swish, silu, sigmoid"
            )
        if self.mtp_num_hidden_layers not in (0, 1):
            raise InputError(
                f"config: mtp_num_hidden_layers = {self.mtp_num_hidden_layers}; supported are 0 and 1"
            )

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def conv_dim(self) -> int:
        """Channels of the delta net's convolution: q, k and v side by side."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts (else a dense MLP)."""
        on_step = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and on_step and layer not in self.mlp_only_layers

    def check_prompt(self, ids: list[int], new_tokens: int) -> None:
        """InputError unless `ids` are valid and leave room for `new_tokens` in the context."""
        if not ids:
            raise InputError("the prompt is empty; at least one token is needed")
        if len(ids) + new_tokens > self.max_position_embeddings:
            follow = f"; {new_tokens} are to follow" if new_tokens > 1 else ""
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context {self.max_position_embeddings}{follow}"
            )
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise InputError(
                f"prompt id {wrong[0]} is not in the vocabulary 0..{self.vocab_size - 1}"
            )

    def check_same_shape(self, other: "Config") -> None:
        """Raise InputError unless the nodes of both models take and return tensors of the same shapes."""
        not_shapes = ("max_position_embeddings", "num_experts_per_tok", "decoder_sparse_step")
        for name in (n for n in (*SIZES, *COUNTS, "layer_types") if n not in not_shapes):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise InputError(f"{name} is {ours} in the reference, {theirs} in the candidate")

    @classmethod
    def from_file(cls, path: Path) -> "Config":
        """Read a `config.json`. Raises InputError naming the file."""
        document = read_object(path)
        try:
            return cls.from_dict(document)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except RecursionError:
            raise InputError(f"{path}: objects inside of objects, too many to be read") from None

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Config":
        """Build from a parsed `config.json`, nested (`text_config`) or flat, of any family member.

        Raises InputError naming the key.
        """
        reader = read(document)
        given = reader.values
        layers = given.get("mlp_only_layers", [])
        expect("mlp_only_layers", layers, isinstance(layers, list), "a list of layers")
        given["mlp_only_layers"] = tuple(layers)
        fields = cls.__dataclass_fields__.items()
        missing = [name for name, field in fields if name not in given and not _has_default(field)]
        missing += [name for name in reader.missing() if name not in missing]
        if missing:
            where = " in text_config" if reader.is_nested else ""
            raise InputError(f"config: {', '.join(missing)} missing{where}")
        if reader.family == SPARSE:
            count = given["num_experts"]
            expect("num_experts", count, is_integer(count, 1), "an integer >= 1")
        # A file may have an integer there, which may be too large for a tensor.
        given |= {name: float(given[name]) for name in NUMBERS if is_positive(given.get(name))}
        return cls(**given)

    @classmethod
    def published(cls, name: str) -> "Config":
        """The config of a published model by its size, e.g. `Config.published("397B-A17B")`. InputError
        for another name."""
        if name not in PUBLISHED:
            raise InputError(
                f"config: no published size {name!r}; known are {', '.join(PUBLISHED)}"
            )
        return cls.from_dict(FAMILY | PUBLISHED[name])


def read(document: Any) -> Reader:
    """Read a parsed `config.json`, and note its contradictions. InputError if it is invalid."""
    fields = Config.__dataclass_fields__.items()
    return Reader(document, {n: f.default if _has_default(f) else None for n, f in fields})


def disagreements(document: dict[str, Any]) -> list[str]:
    """One line for each value of a parsed `config.json` that is not used: if two places disagree,
    if transformers never reads the key, or if no token has the id."""
    return read(document).lines


def _has_default(field: Any) -> bool:
    return field.default is not field.default_factory  # both are MISSING when there is no default


NUMBERS = ("rope_theta", "partial_rotary_factor", "rms_norm_eps")
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "linear_conv_kernel_dim", "max_position_embeddings",
    "decoder_sparse_step",
)  # fmt: skip
COUNTS = (
    "intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "mtp_num_hidden_layers",
)  # fmt: skip

# Values that the Qwen3.5 family shares, and the sizes of each member, from the published
# config.json files.
FAMILY: dict[str, Any] = {
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "rope_parameters": {"rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 262144,
    "eos_token_id": 248044,
}


def _dense(layers: int, hidden: int, heads: int, kv: int, value_heads: int, inter: int, tied: bool):
    return {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "linear_num_value_heads": value_heads,
        "intermediate_size": inter,
        "tie_word_embeddings": tied,
    }


def _moe(
    layers: int, hidden: int, heads: int, value_heads: int, experts: int, top: int, inter: int
):
    return {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "linear_num_value_heads": value_heads,
        "num_experts": experts,
        "num_experts_per_tok": top,
        "moe_intermediate_size": inter,
        "shared_expert_intermediate_size": inter,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "0.8B": _dense(24, 1024, 8, 2, 16, 3584, True),
    "2B": _dense(24, 2048, 8, 2, 16, 6144, True),
    "4B": _dense(32, 2560, 16, 4, 32, 9216, True),
    "9B": _dense(32, 4096, 16, 4, 32, 12288, False),
    "27B": _dense(64, 5120, 24, 4, 48, 17408, False),
    "35B-A3B": _moe(40, 2048, 16, 32, 256, 8, 512),
    "122B-A10B": _moe(48, 3072, 32, 64, 256, 8, 1024),
    "397B-A17B": _moe(60, 4096, 32, 64, 512, 10, 1024),
    "Qwen3-Next-80B-A3B": _moe(48, 2048, 16, 32, 512, 10, 512)
    | {"model_type": "qwen3_next", "vocab_size": 151936, "eos_token_id": 151645},
}
