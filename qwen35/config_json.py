"""Reads a `config.json` key by key, as transformers does, and notes where its places disagree.

The value that is taken is the one that transformers takes:

| key | taken from, first to last |
|---|---|
| all but the following | `text_config`; what stands beside it is not read |
| tie_word_embeddings, quantization_config | the top level, then `text_config` |
| model_type | the top level decides between dense and mixture of experts, where it nests a `text_config` |
| rope_theta, partial_rotary_factor | `rope_scaling` if it is there, else `rope_parameters` (never both); the key beside them |
| rope_type | the same mapping, as `rope_type` or `type` |
| layer_types | itself, then `full_attention_interval` |
| eos_token_id | the union of both levels, without ids that are not in the vocabulary |
| keys that the class of this model_type never reads (`NEVER_READ`) | nowhere |

Every differing value that is not taken gives one line.
"""  # noqa: E501

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen35.errors import InputError
from qwen35.reading import existing_file, expected_object, parse_json

DENSE, SPARSE, NEXT = "dense", "sparse", "next"
FAMILIES = {
    "qwen3_5_moe": SPARSE,
    "qwen3_5_moe_text": SPARSE,
    "qwen3_next": NEXT,
    "qwen3_5": DENSE,
    "qwen3_5_text": DENSE,
}
# For these model types, transformers itself chooses the class of text_config.
NESTING = ("qwen3_5", "qwen3_5_moe")

# By family, the keys that its class never reads, with the values that the model has in effect.
NEVER_READ: dict[str, dict[str, Any]] = {
    DENSE: {
        "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0,
        "shared_expert_intermediate_size": 0, "norm_topk_prob": True, "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    SPARSE: {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    NEXT: {},
}  # fmt: skip
ROUTED = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)

# Switches that change the arithmetic, each with the one value that the reference implements.
SWITCHES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attn_output_gate": True,
    "mtp_use_dedicated_embeddings": False,
    "per_layer_config": {},
}
RENAMED_TYPES = {"attention": "full_attention", "mamba": "linear_attention"}
LAYER_TYPES = ("linear_attention", "full_attention")
MOST_EXPERTS = 10_000  # each is a module
MOST_LAYERS = 10_000  # a list of this length is built before the number can be checked otherwise

EVERY = 4  # layers: the default of full_attention_interval

ROPE_MAPPINGS = ("rope_scaling", "rope_parameters")
ROPE_NUMBERS = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}

OUTER_FIRST = ("tie_word_embeddings", "quantization_config", "compression_config")
# Keys that may differ between the levels without a line. They are merged or compared elsewhere, or
# have no effect here.
APART = {
    "model_type", "eos_token_id", "rope_type", *ROPE_NUMBERS, *ROPE_MAPPINGS, "text_config",
    "vision_config", "architectures", "auto_map", "transformers_version", "_name_or_path",
    "name_or_path", "dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "initializer_range",
    "attention_dropout", "pad_token_id", "bos_token_id", "id2label", "label2id",
}  # fmt: skip

Places = Sequence[tuple[str, Mapping[str, Any]]]  # (place, its mapping)


class Reader:
    """Reads a parsed config.json. values: the model's fields. lines: a line for each differing
    value that is not taken. InputError for an invalid config."""

    def __init__(self, document: Any, fields: Mapping[str, Any]) -> None:
        """fields: all fields with their defaults, or None if a file has to have the key."""
        if not isinstance(document, dict):
            raise InputError(f"config: a JSON object was expected, not {type(document).__name__}")
        outer = without_nulls(document)
        text = outer.get("text_config", outer)
        expect("text_config", text, isinstance(text, dict), "an object")
        self.lines: list[str] = []
        self.is_nested = text is not outer
        self.place = "in text_config" if self.is_nested else "in the top level"
        self.outer, self.text = _renamed(outer), _renamed(text)
        self.values: dict[str, Any] = {"model_type": self._model_type()}
        self.family = FAMILIES[self.values["model_type"]]
        self.defaults = {name: value for name, value in fields.items() if value is not None}
        self._drop_never_read()
        self.values |= {n: self.text[n] for n in fields if n in self.text and n not in self.values}
        self._check_switches()
        self._read_rope()
        self._read_layer_types()
        self._read_outer()
        self._read_eos()

    @property
    def levels(self) -> Places:
        return [("in the top level", self.outer), (self.place, self.text)]

    def take(self, name: str, taken: Places, passed: Places = (), default: Any = None) -> Any:
        """The first value in `taken`, or the default. Adds a line for each other value that
        differs."""
        given = [(place, there[name]) for place, there in taken if name in there]
        place, value = given[0] if given else ("by default", default)
        others = [(where, there[name]) for where, there in passed if name in there]
        for where, other in [*given[1:], *others]:
            if other != value:
                self.lines.append(
                    f"{name} is {value!r} {place} and {other!r} {where}; the first is taken"
                )
        return value

    def missing(self) -> list[str]:
        """Names of required sizes that this file lacks."""
        needed = [*ROPE_NUMBERS, *(() if self.family == DENSE else ROUTED)]
        if self.values.get("num_experts") == 0:  # Qwen3-Next without experts
            needed = list(ROPE_NUMBERS)
        return [name for name in needed if self.values.get(name) is None]

    def _model_type(self) -> str:
        outer, inner = self.outer.get("model_type"), self.text.get("model_type")
        model_type = outer if inner is None else inner
        if self.is_nested and outer in NESTING and _family(inner) != _family(outer):
            model_type = self.take("model_type", self.levels)
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise InputError(f"config: model_type = {model_type!r}; known are {known}")
        return model_type

    def _drop_never_read(self) -> None:
        """Remove keys from `text` that transformers does not read for this model_type."""
        keys = NEVER_READ[self.family]
        # Without num_experts, the other keys about experts have no effect in a dense model.
        has_effect = self.family != DENSE or bool(self.text.get("num_experts"))
        for name in (name for name in keys if has_effect and name in self.text):
            if self.text[name] != keys[name]:
                self.lines.append(
                    f"{name} is {keys[name]!r} for every {self.values['model_type']} and "
                    f"{self.text[name]!r} {self.place}; the first is taken"
                )
        self.text = {name: value for name, value in self.text.items() if name not in keys}

    def _check_switches(self) -> None:
        """InputError for a switch that the reference does not implement."""
        for name, supported in SWITCHES.items():
            value = self.text.get(name, supported)
            if value != supported:
                raise InputError(f"config: {name} = {value!r}; supported is {supported!r}")

    def _read_rope(self) -> None:
        """Read the RoPE values. One mapping is used; keys that it lacks come from beside it, not
        from the other mapping."""
        mappings = {name: self.text[name] for name in ROPE_MAPPINGS if self.text.get(name)}
        for name, rope in mappings.items():
            expect(name, rope, isinstance(rope, dict), "an object")
        found = [_rope_places(f"in {name}", rope) for name, rope in mappings.items()]
        taken = found[0] if found else []
        passed = [place for places in found[1:] for place in places]
        beside = (self.place, self.text)
        if self.is_nested:
            passed.append(("in the top level", self.outer))
            for name in ROPE_MAPPINGS:
                if isinstance(self.outer.get(name), dict):
                    passed += _rope_places(f"in the top level's {name}", self.outer[name])
        for place, rope in taken:
            for name, value in rope.items():
                if isinstance(value, dict):
                    raise InputError(
                        f"config: {name} = {value!r} {place}; supported is one rope for all layers"
                    )
        rope_type = self.take("rope_type", taken, [*passed, beside], "default")
        if rope_type != "default":
            raise InputError(f"config: rope_type = {rope_type!r}; supported is 'default'")
        for name, default in ROPE_NUMBERS.items():
            # rope_theta has a default only if a place that transformers ignores has a value.
            is_known = name != "rope_theta" or any(name in there for _, there in passed)
            places = [*taken, beside]
            self.values[name] = self.take(name, places, passed, default if is_known else None)

    def _read_layer_types(self) -> None:
        interval = self.text.get("full_attention_interval", EVERY)
        types = self.text.get("layer_types")
        if types is None:
            self.values["layer_types"] = tuple(_derived(interval, self.text))
            return
        is_list = isinstance(types, list) and all(isinstance(kind, str) for kind in types)
        expect("layer_types", types, is_list, "a list of layer types")
        check_layer_types(types)
        self.values["layer_types"] = tuple(types)
        if "full_attention_interval" in self.text and (
            not is_integer(interval, 1) or types != _derived(interval, self.text)
        ):
            self.lines.append(
                f"layer_types is not what full_attention_interval = {interval!r} gives; "
                "the first is taken"
            )

    def _read_outer(self) -> None:
        """Compare the values beside a text_config with those that are taken."""
        tie = "tie_word_embeddings"
        self.values[tie] = self.take(tie, self.levels, default=self.defaults[tie])
        if not self.is_nested:
            return
        known = {**self.defaults, **SWITCHES, **self.values, **NEVER_READ[self.family]}
        if "layer_types" not in self.text:
            known["full_attention_interval"] = EVERY
        outer, inner = self.levels
        for name in sorted(self.outer.keys() - APART - {tie}):
            value = known.get(name)
            default = list(value) if isinstance(value, tuple) else value
            if name in OUTER_FIRST:
                self.take(name, self.levels)
            elif name in self.text or default is not None:
                self.take(name, [inner], [outer], default)

    def _read_eos(self) -> None:
        """Read eos_token_id as the union of both levels. Ids outside of the vocabulary are left
        out."""
        vocab, ids = self.text.get("vocab_size"), set()
        for place, there in dict(self.levels).items():  # once if both levels are the same
            kept, lines = in_vocabulary(as_ids(there.get("eos_token_id")), vocab, place)
            ids.update(kept)
            self.lines += lines
        self.values["eos_token_id"] = tuple(sorted(ids))


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. InputError, with the file's name, if there is none."""
    path = existing_file(file)
    try:
        # Python writes NaN and infinities, so files of published models may have them.
        return expected_object(parse_json(path.read_bytes(), constant=float))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def without_nulls(document: dict[str, Any]) -> dict[str, Any]:
    """Drop the keys of a JSON object, and of objects inside it, that are null: null means the default."""
    return {
        name: without_nulls(value) if isinstance(value, dict) else value
        for name, value in document.items()
        if value is not None
    }


def as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` as a tuple: files have an int, a list or nothing. InputError for other values."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    are_ids = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not are_ids:
        raise InputError(f"eos_token_id = {value!r}; expected a token id or a list of them")
    return tuple(ids)


def in_vocabulary(ids: Sequence[int], vocab: Any, place: str) -> tuple[tuple[int, ...], list[str]]:
    """The ids that a vocabulary of size `vocab` has, and a line for each of the others."""
    if not is_integer(vocab, 1):  # that error is reported elsewhere
        return tuple(i for i in ids if i >= 0), []
    lines = [
        f"eos_token_id {i} {place} is not in the vocabulary 0..{vocab - 1}; it is left out"
        for i in dict.fromkeys(ids)
        if not 0 <= i < vocab
    ]
    return tuple(i for i in ids if 0 <= i < vocab), lines


def check_layer_types(types: Sequence[str]) -> None:
    """Raise InputError naming the first layer of an unknown type."""
    for layer, kind in enumerate(types):
        if kind not in LAYER_TYPES:
            known = " and ".join(LAYER_TYPES)
            raise InputError(f"config: layer_types[{layer}] = {kind!r}; known are {known}")


def is_integer(value: Any, least: int) -> bool:
    """Whether a value is an integer from `least` to what a tensor's size may be."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def is_positive(value: Any) -> bool:
    """Whether a value is a number > 0 that a float can hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max


def expect(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"config: {name} = {value!r}; expected {expected}")


def _family(model_type: Any) -> str | None:
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def _renamed(document: dict[str, Any]) -> dict[str, Any]:
    """Replace old names of layer types as transformers does."""
    types = document.get("layer_types")
    if not isinstance(types, list):
        return document
    renamed = [RENAMED_TYPES.get(kind, kind) if isinstance(kind, str) else kind for kind in types]
    return document | {"layer_types": renamed}


def _rope_places(place: str, rope: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The places of a mapping: itself, and its `type`, which is the older name of `rope_type`."""
    older = [(f"as type {place}", {"rope_type": rope["type"]})] if "type" in rope else []
    return [(place, rope), *older]


def _derived(interval: Any, text: Mapping[str, Any]) -> list[str]:
    """The layer types: full attention in each layer whose number, from 1, is a multiple of
    `interval`."""
    count = text.get("num_hidden_layers", 0)
    expect("full_attention_interval", interval, is_integer(interval, 1), "an integer >= 1")
    in_reach = is_integer(count, 0) and count <= MOST_LAYERS
    expect("num_hidden_layers", count, in_reach, f"an integer from 1 to {MOST_LAYERS}")
    return [
        "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(count)
    ]
