"""`quantization_config` of a config.json: a claim about which modules are quantised.

What a tensor is, follows from its dtype and from the scales beside it (`weights/checkpoint.py`). The
claim is only compared with that: repositories exist whose lists are wrong.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from typing import Any

from qwen35.errors import InputError
from weights import fp8

METHODS = ("fp8", "quark")
LARGEST_BLOCK = 1 << 16  # rows or columns: a block is laid out once while it is decoded
PREFIX = re.compile(r"^model\.(language_model\.)?")


@dataclass(frozen=True)
class Quantization:
    """method: "fp8" (Qwen's repositories) or "quark" (AMD's). excluded: names or globs of modules.
    block: rows and columns of an FP8 block."""

    method: str
    excluded: tuple[str, ...] = ()
    block: tuple[int, int] = fp8.BLOCK

    @classmethod
    def from_config(cls, document: Mapping[str, Any]) -> "Quantization | None":
        """Of a parsed config.json; None where it claims nothing. InputError for an unknown method."""
        text = document.get("text_config")
        nested = text.get("quantization_config") if isinstance(text, dict) else None
        claim = document.get("quantization_config") or nested
        if not claim:
            return None
        if not isinstance(claim, dict) or claim.get("quant_method") not in METHODS:
            method = claim.get("quant_method") if isinstance(claim, dict) else claim
            raise InputError(
                f"quantization_config: quant_method = {method!r}; known are {', '.join(METHODS)}"
            )
        key = "exclude" if claim["quant_method"] == "quark" else "modules_to_not_convert"
        excluded = claim.get(key) or []
        if not isinstance(excluded, list) or not all(isinstance(e, str) for e in excluded):
            raise InputError(f"quantization_config: {key} = {excluded!r}; expected a list of names")
        block = claim.get("weight_block_size") or list(fp8.BLOCK)
        if not isinstance(block, list) or len(block) != 2 or not all(_is_size(b) for b in block):
            raise InputError(
                f"quantization_config: weight_block_size = {block!r}; expected [128, 128]"
            )
        return cls(claim["quant_method"], tuple(excluded), (block[0], block[1]))

    def excludes(self, module: str) -> bool:
        """Whether the list names this module of the file or a parent of it, with or without the prefix,
        or holds a glob (`*mlp.gate`) or an expression (`re:.*mlp.gate`) that fits."""
        names, globs, expressions = self._entries
        bare = PREFIX.sub("", module)
        parents = accumulate(bare.split("."), "{}.{}".format)
        return (
            any(parent in names for parent in parents)
            or any(fnmatchcase(bare, glob) for glob in globs)
            or any(expression.match(module) for expression in expressions)
        )

    @cached_property
    def _entries(self) -> tuple[frozenset[str], list[str], list[re.Pattern[str]]]:
        """The list as names, globs and expressions; names are looked up, since there may be thousands."""
        expressions = [e for e in self.excluded if e.startswith("re:")]
        others = [PREFIX.sub("", e) for e in self.excluded if not e.startswith("re:")]
        globs = [entry for entry in others if set("*?[") & set(entry)]
        try:
            compiled = [re.compile(expression[3:]) for expression in expressions]
        except re.error as error:
            raise InputError(
                f"quantization_config: {error.pattern!r} cannot be read: {error}"
            ) from None
        return frozenset(others).difference(globs), globs, compiled


def mxfp4_claim(excluded: list[str]) -> dict[str, Any]:
    """The quantization_config of AMD's MXFP4 repositories, with these modules left out.

    It says that activations are quantised too, as AMD's does: an engine may or may not follow.
    """
    weight = {
        "dtype": "fp4",
        "is_dynamic": False,
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": 32,
        "symmetric": None,
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": "e8m0",
        "scale_calculation_mode": "even",
        "mx_element_dtype": None,
        "observer_cls": "PerBlockMXObserver",
        "is_scale_quant": False,
    }
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": {
            "weight": weight,
            "input_tensors": weight | {"is_dynamic": True},
            "output_tensors": None,
            "bias": None,
            "target_device": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "exclude": excluded,
        "export": {
            "kv_cache_group": [],
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


def misclaimed(claim: Quantization | None, formats: Mapping[str, str]) -> list[str]:
    """One line for each kind of module that is not as claimed.

    formats: by name of a linear module of the file (a matrix `.weight` that is no embedding) its format,
    "mxfp4", "fp8" or "plain". Layer and expert numbers are left out of the lines.
    """
    wrong: Counter[tuple[str, str]] = Counter()
    for module, found in formats.items():
        claimed = claim is not None and not claim.excludes(module)
        if claimed == (found != "plain"):
            continue
        if claim is None:
            reason = f"{found}, but config.json has no quantization_config"
        elif claimed:
            reason = f"not quantised, but quantization_config ({claim.method}) does not exclude it"
        else:
            reason = f"{found}, but quantization_config ({claim.method}) excludes it"
        wrong[name_pattern(PREFIX.sub("", module)), reason] += 1
    return [f"{pattern} ({count} x): {reason}" for (pattern, reason), count in wrong.items()]


def name_pattern(name: str) -> str:
    """A name with its layer and expert numbers as `*`: what many tensors have in common."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _is_size(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and 0 < value <= LARGEST_BLOCK
