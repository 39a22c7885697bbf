"""The shape of a model: one frozen dataclass, read from a checkpoint's `config.json`.

Axis legend of the whole project (shape comments, first-line unpacking):
    B batch    T tokens    D hidden    P positions in a cache    E experts    I intermediate
    H query or key heads    G kv heads    HV value heads    K key head size    V value head size
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from qwen35.errors import InputError

LayerType = Literal["linear_attention", "full_attention"]

MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
DENSE_TYPES = ("qwen3_5", "qwen3_5_text")


@dataclass(frozen=True)
class Config:
    """Sizes and switches of one Qwen3.5 (3.6, 3-Next) text model. Names are `config.json`'s own."""

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
    max_position_embeddings: int = 32768  # what transformers takes where a file does not say
    tie_word_embeddings: bool = False
    mtp_num_hidden_layers: int = 1
    eos_token_id: tuple[int, ...] = ()
    model_type: str = "qwen3_5_moe"

    def __post_init__(self) -> None:
        for name in COUNTS:
            _expect(
                name, getattr(self, name), _is_integer(getattr(self, name), 0), "an integer >= 0"
            )
        routed = ("num_experts_per_tok", "moe_intermediate_size") if self.num_experts else ()
        for name in SIZES + routed:
            _expect(
                name, getattr(self, name), _is_integer(getattr(self, name), 1), "an integer >= 1"
            )
        for name in ("rope_theta", "partial_rotary_factor", "rms_norm_eps"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            _expect(name, value, is_number and 0 < value < float("inf"), "a positive number")
        for name in ("eos_token_id", "mlp_only_layers"):
            value = getattr(self, name)
            _expect(name, value, all(_is_integer(i, 0) for i in value), "integers >= 0")
        if not all(map(self.is_sparse, range(self.num_hidden_layers))):
            inter = self.intermediate_size
            _expect("intermediate_size", inter, inter > 0, "an integer >= 1 for the dense layers")
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
        unknown = set(self.layer_types) - {"linear_attention", "full_attention"}
        if unknown:
            raise InputError(
                f"config: layer_types holds {sorted(map(str, unknown))}; "
                "known are linear_attention and full_attention"
            )
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
        """Channels of a head that RoPE turns."""
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
        """Raise InputError unless `ids` are a prompt that leaves room for `new_tokens` more."""
        if not ids:
            raise InputError("the prompt is empty; at least one token is needed")
        if len(ids) + new_tokens > self.max_position_embeddings:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context {self.max_position_embeddings}"
            )
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise InputError(
                f"prompt id {wrong[0]} is not in the vocabulary 0..{self.vocab_size - 1}"
            )

    def check_same_shape(self, other: "Config") -> None:
        """Raise InputError unless both models' nodes are given and return tensors of the same shapes."""
        not_shapes = ("max_position_embeddings", "num_experts_per_tok", "decoder_sparse_step")
        for name in (n for n in (*SIZES, *COUNTS, "layer_types") if n not in not_shapes):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise InputError(f"{name} is {ours} in the reference, {theirs} in the candidate")

    @classmethod
    def from_file(cls, path: Path) -> "Config":
        """Read a `config.json`. Raises InputError naming the file."""
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: not readable as JSON: {error}") from None
        try:
            return cls.from_dict(document)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Config":
        """From a parsed `config.json`, nested (`text_config`) or flat, of any family member."""
        if not isinstance(document, dict):
            raise InputError(f"config: a JSON object was expected, not {type(document).__name__}")
        document = without_nulls(document)
        text = document.get("text_config", document)
        _expect("text_config", text, isinstance(text, dict), "an object")
        model_type = text.get("model_type", document.get("model_type"))
        if model_type not in MOE_TYPES + DENSE_TYPES:
            known = ", ".join(MOE_TYPES + DENSE_TYPES)
            raise InputError(f"config: model_type = {model_type!r}; known are {known}")
        _refuse_unsupported(text)
        # Qwen3-Next keeps the two rope numbers at the top level, Qwen3.5 in rope_parameters.
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        types = text.get("layer_types") or _layer_types(text)
        is_list = isinstance(types, list) and all(isinstance(kind, str) for kind in types)
        _expect("layer_types", types, is_list, "a list of layer types")
        given = {name: text[name] for name in cls.__dataclass_fields__ if name in text}
        given |= {
            "model_type": model_type,
            "layer_types": tuple(types),
            "rope_theta": rope.get("rope_theta", text.get("rope_theta")),
            "partial_rotary_factor": rope.get(
                "partial_rotary_factor", text.get("partial_rotary_factor", 0.25)
            ),
            "tie_word_embeddings": bool(
                document.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
            ),
            "mlp_only_layers": tuple(text.get("mlp_only_layers") or ()),
            "eos_token_id": tuple(
                sorted({*as_ids(text.get("eos_token_id")), *as_ids(document.get("eos_token_id"))})
            ),
            # Qwen3-Next does not say how many MTP layers it has: it has one.
            "mtp_num_hidden_layers": text.get("mtp_num_hidden_layers", 1),
        }
        missing = [
            name
            for name, field in cls.__dataclass_fields__.items()
            if given.get(name) is None and not _has_default(field)
        ]
        if missing:
            raise InputError(f"config: {', '.join(missing)} missing")
        return cls(**given)

    @classmethod
    def published(cls, name: str) -> "Config":
        """The config of a published model by its size, e.g. `Config.published("397B-A17B")`."""
        if name not in PUBLISHED:
            raise InputError(
                f"config: no published size {name!r}; known are {', '.join(PUBLISHED)}"
            )
        return cls.from_dict(FAMILY | PUBLISHED[name])


def without_nulls(document: dict[str, Any]) -> dict[str, Any]:
    """Drop the keys of a JSON object, and of objects inside it, that are null: null means the default."""
    return {
        name: without_nulls(value) if isinstance(value, dict) else value
        for name, value in document.items()
        if value is not None
    }


def disagreements(document: dict[str, Any]) -> list[str]:
    """One line for each key of a parsed `config.json` that two places give different values.

    The value that is taken is the one that transformers takes: text_config's, but tie_word_embeddings of
    the top level; rope_scaling before rope_parameters, and what these hold before the keys beside them;
    layer_types before full_attention_interval. eos_token_id never disagrees: its ids are united.
    """
    outer = without_nulls(document)
    text = outer.get("text_config", outer)
    lines: list[str] = []

    def compare(name: str, taken: str, value: Any, passed: str, other: Any) -> None:
        if value != other:
            lines.append(
                f"{name} is {value!r} in {taken} and {other!r} in {passed}; the first is taken"
            )

    known = {*Config.__dataclass_fields__, "rope_parameters", "rope_scaling", "rope_theta"}
    if text is not outer:
        for name in sorted(known & outer.keys() & text.keys() - {"eos_token_id", "model_type"}):
            places = ("text_config", text[name], "the top level", outer[name])
            if name == "tie_word_embeddings":
                places = (*places[2:], *places[:2])
            compare(name, *places)
    ropes = [(key, text[key]) for key in ("rope_scaling", "rope_parameters") if text.get(key)]
    for (key, rope), (other_key, other) in pairwise([*ropes, ("text_config", text)]):
        for name in ("rope_theta", "partial_rotary_factor", "rope_type"):
            if name in rope and name in other:
                compare(name, key, rope[name], other_key, other[name])
    if "layer_types" in text and "full_attention_interval" in text:
        derived = _layer_types(text)
        if list(text["layer_types"]) != derived:
            lines.append(
                f"layer_types is not what full_attention_interval = {text['full_attention_interval']} "
                "gives; the first is taken"
            )
    return lines


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` is an int in one file and a list in another."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    _expect(
        "eos_token_id", value, all(_is_integer(i, 0) for i in ids), "a token id or a list of them"
    )
    return tuple(ids)


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _expect(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"config: {name} = {value!r}; expected {expected}")


def _has_default(field: Any) -> bool:
    return field.default is not field.default_factory  # both are MISSING when there is no default


def _layer_types(text: dict[str, Any]) -> list[str]:
    interval, count = text.get("full_attention_interval", 4), text.get("num_hidden_layers", 0)
    _expect("full_attention_interval", interval, _is_integer(interval, 1), "an integer >= 1")
    in_reach = _is_integer(count, 0) and count <= MOST_LAYERS
    _expect("num_hidden_layers", count, in_reach, f"an integer from 1 to {MOST_LAYERS}")
    return [
        "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(count)
    ]


def _refuse_unsupported(text: dict[str, Any]) -> None:
    """A key that changes the arithmetic and that the reference does not implement is an error."""
    rope_types = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.get(key) or {}
        _expect(key, rope, isinstance(rope, dict), "an object")
        rope_types.append(
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
        )
    expected = (
        *rope_types,
        ("hidden_act", text.get("hidden_act", "silu"), "silu"),
        ("attention_bias", text.get("attention_bias") or False, False),
        ("attn_output_gate", text.get("attn_output_gate", True), True),
        ("mtp_use_dedicated_embeddings", text.get("mtp_use_dedicated_embeddings") or False, False),
    )
    for name, value, supported in expected:
        if value != supported:
            raise InputError(f"config: {name} = {value!r}; supported is {supported!r}")


MOST_LAYERS = 10_000  # a list is made of them before anything else can be compared with the number

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

# What the Qwen3.5 family shares, and each member's own sizes (sources: the published config.json files).
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
