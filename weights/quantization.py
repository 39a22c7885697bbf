"""The `quantization_config` of a config.json: a claim about which modules are quantised.

The format of a tensor follows from its dtype and from the scales beside it (`weights/entry.py`).
The claim is only compared with these formats, because some repositories have wrong lists.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from typing import Any

from qwen35.config_json import without_nulls
from qwen35.errors import InputError
from weights import fp8

# The keys under which clients list unquantised modules. All of them are read.
EXCLUDED = (
    "exclude",
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "exclude_modules",
    "ignored_modules",
)
# The methods whose lists are understood. The claims of others are not compared with the tensors.
METHODS = ("fp8", "quark", "compressed-tensors", "modelopt", "fbgemm_fp8", "mxfp4")
LARGEST_BLOCK = 1 << 16  # rows or columns; the memory of decoding is proportional to them
PREFIX = re.compile(r"^model\.(language_model\.)?")


class Modules:
    """A list of modules of the file. Its entries are names of modules or of parents (with or
    without prefix), globs (`*mlp.gate`) and regular expressions (`re:.*mlp.gate`). InputError for
    an invalid expression."""

    def __init__(self, entries: Iterable[str]) -> None:
        expressions = [e[3:] for e in entries if e.startswith("re:")]
        others = [PREFIX.sub("", e) for e in entries if not e.startswith("re:")]
        self.globs = [entry for entry in others if set("*?[") & set(entry)]
        self.names = frozenset(others).difference(self.globs)  # a set, as there may be thousands
        try:
            self.expressions = [re.compile(expression) for expression in expressions]
        except re.error as error:
            raise InputError(
                f"quantization_config: {error.pattern!r} cannot be read: {error}"
            ) from None

    def __contains__(self, module: str) -> bool:
        bare = PREFIX.sub("", module)
        parents = accumulate(bare.split("."), "{}.{}".format)
        return (
            any(parent in self.names for parent in parents)
            or any(fnmatchcase(bare, glob) for glob in self.globs)
            or any(e.match(form) for e in self.expressions for form in (module, f"model.{bare}"))
        )


@dataclass(frozen=True)
class Quantization:
    """The claims of a `quantization_config`.

    method: the quant_method, such as "fp8" (Qwen) or "quark" (AMD).
    excluded: the modules that are not quantised, as entries of `Modules`.
    block: rows and columns of an FP8 block.
    targets: the modules that are quantised: "Linear", or entries of `Modules` (compressed-tensors).
    """

    method: str
    excluded: tuple[str, ...] = ()
    block: tuple[int, int] = fp8.BLOCK
    targets: tuple[str, ...] = ("Linear",)

    @classmethod
    def from_config(cls, document: Mapping[str, Any]) -> "Quantization | None":
        """The claim of a parsed config.json, or None if it has none. InputError for an invalid list
        of names or an invalid block."""
        text = document.get("text_config")
        inner = text if isinstance(text, dict) else {}
        keys = ("quantization_config", "compression_config")
        claim = next(
            (found for place in (document, inner) for k in keys if (found := place.get(k))), None
        )
        if not claim:
            return None
        if not isinstance(claim, dict):
            raise InputError(f"quantization_config = {claim!r}; expected an object")
        claim = without_nulls(claim)
        excluded = [entry for key in EXCLUDED for entry in _names(claim, key)]
        groups = claim.get("config_groups")
        groups = list(groups.values()) if isinstance(groups, dict) else []
        groups = [group for group in groups if isinstance(group, dict)]
        targets = [target for group in groups for target in _names(group, "targets")]
        block = claim.get("weight_block_size") or _block_structure(groups) or list(fp8.BLOCK)
        if not isinstance(block, list) or len(block) != 2 or not all(_is_size(b) for b in block):
            raise InputError(
                f"quantization_config: weight_block_size = {block!r}; expected [128, 128]"
            )
        return cls(
            str(claim.get("quant_method")),
            tuple(dict.fromkeys(excluded)),
            (block[0], block[1]),
            tuple(dict.fromkeys(targets)) or ("Linear",),
        )

    @property
    def is_compared(self) -> bool:
        """Whether the lists of its method are understood."""
        return self.method in METHODS

    def claims(self, module: str) -> bool:
        """Whether it claims that this linear layer of the file is quantised."""
        is_target = "Linear" in self.targets or module in self._targets
        return is_target and module not in self._excluded

    @cached_property
    def _excluded(self) -> Modules:
        return Modules(self.excluded)

    @cached_property
    def _targets(self) -> Modules:
        return Modules(self.targets)


def fp8_claim(excluded: list[str]) -> dict[str, Any]:
    """The quantization_config of Qwen's FP8 repositories, with these modules left out."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(fp8.BLOCK),
        "modules_to_not_convert": excluded,
    }


def mxfp4_claim(excluded: list[str], activations: str = "mxfp4") -> dict[str, Any]:
    """The quantization_config of AMD's MXFP4 repositories, with these modules left out.

    activations: "mxfp4" claims that they are quantised too, as AMD's repositories do (engines may
    ignore it); "bf16" claims that only weights are.
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
            "input_tensors": weight | {"is_dynamic": True} if activations == "mxfp4" else None,
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


def compare(claim: Quantization | None, formats: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Problems and notes: a line for each kind of module that differs from the claim.

    formats: the format, "mxfp4", "fp8" or "plain", of each linear module of the file (a matrix `.weight`
    that is no embedding), by its name. Layer and expert numbers are left out of the lines.

    A tensor that is quantised although the claim excludes it is a problem, because an engine that
    believes the claim would read it wrong. A tensor that is not quantised although the claim does not
    exclude it is a note, because clients forget to list such tensors, and the dtype is unambiguous.
    """
    if claim is not None and not claim.is_compared:
        return [
            f"quantization_config: quant_method = {claim.method!r} is not compared with the tensors; "
            "they are read as what they are"
        ], []
    if claim is not None and formats and set(formats.values()) == {"plain"}:
        return [f"quantization_config ({claim.method}) is there, but no tensor is quantised"], []
    wrong: Counter[tuple[str, str]] = Counter()
    unlisted: Counter[tuple[str, str]] = Counter()
    for module, found in formats.items():
        claimed = claim is not None and claim.claims(module)
        if claimed == (found != "plain"):
            continue
        pattern = name_pattern(PREFIX.sub("", module))
        if claim is None:
            wrong[pattern, f"{found}, but config.json has no quantization_config"] += 1
        elif claimed:
            reason = f"not quantised, but quantization_config ({claim.method}) does not exclude it"
            unlisted[pattern, reason] += 1
        else:
            wrong[pattern, f"{found}, but quantization_config ({claim.method}) excludes it"] += 1

    def lines(counted: Counter[tuple[str, str]]) -> list[str]:
        return [f"{pattern} ({count} x): {reason}" for (pattern, reason), count in counted.items()]

    return lines(wrong), lines(unlisted)


def name_pattern(name: str) -> str:
    """A name with `*` for its layer and expert numbers, so that tensors of one kind have the
    same."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _names(claim: Mapping[str, Any], key: str) -> list[str]:
    names = claim.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"quantization_config: {key} = {names!r}; expected a list of names")
    return names


def _block_structure(groups: Iterable[Mapping[str, Any]]) -> Any:
    """The FP8 block in the claim of compressed-tensors, or None."""
    weights = [group.get("weights") for group in groups]
    blocks = [w.get("block_structure") for w in weights if isinstance(w, dict)]
    return next((block for block in blocks if block), None)


def _is_size(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and 0 < value <= LARGEST_BLOCK
