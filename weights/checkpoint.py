"""A checkpoint folder: which parameters it holds, under the model's own names, in whatever dialect.

One name space: `Checkpoint.entries` is keyed by parameter names of `reference.model.Model`. An entry
knows the format of its numbers, where they lie, and how to get them.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qwen35.config import Config, disagreements
from qwen35.errors import InputError
from weights import fp8, mxfp4
from weights.quantization import PREFIX, Quantization, misclaimed
from weights.storage import DTYPE_NAMES, Stored, open_folder, some

Format = Literal["plain", "mxfp4", "fp8"]
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
UNFINISHED = ".conversion"  # in a folder that weights/convert.py is still writing
SCALES = (".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True)
class Entry:
    """One parameter: what the header says of it, and how to get it.

    shape: of the parameter, whatever its numbers are packed in. view: stored tensor -> parameter, a slice
    or a permutation of rows; None: all of it.
    """

    weight: Stored
    shape: tuple[int, ...]
    format: Format = "plain"
    scale: Stored | None = None
    block: tuple[int, int] = fp8.BLOCK
    view: Callable[[Tensor], Tensor] | None = None

    @property
    def stored_as(self) -> str:
        return self.weight.name

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return self.weight.dtype

    @property
    def is_fused_experts(self) -> bool:
        """Whether the stored tensor holds all experts of a layer."""
        return ".experts." in self.stored_as and not self.stored_as.endswith(".weight")

    @property
    def scale_block(self) -> tuple[int, int] | None:
        """Rows and columns of the weight that share a scale; None where one has a row or all of it."""
        if self.format == "mxfp4":
            return (1, mxfp4.GROUP)
        if self.scale is None or self.scale.shape != tuple(
            -(-size // block) for size, block in zip(self.shape, self.block, strict=False)
        ):
            return None
        return self.block

    @property
    def nbytes(self) -> int:
        """Of the stored numbers and their scales; a part of a fused tensor has its share."""
        packed = 2 if self.format == "mxfp4" else 1
        whole = math.prod(self.weight.shape) * packed
        stored = self.weight.nbytes + (self.scale.nbytes if self.scale else 0)
        return stored * math.prod(self.shape) // whole if whole else 0

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter in `dtype`, decoded where it is quantised; mapped where nothing has to change.

        None: the stored dtype, and bfloat16 for what is quantised. InputError for a scale that is NaN.
        """
        stored = self.weight.read()
        if self.scale is None:
            whole = stored if dtype is None else stored.to(dtype)
        else:
            whole = decode(
                self.format, stored, self.scale.read(), dtype or torch.bfloat16, self.stored_as,
                self.block,
            )  # fmt: skip
        return whole if self.view is None else self.view(whole)


def decode(
    format: Format,
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    name: str,
    block: tuple[int, int] = fp8.BLOCK,
) -> Tensor:
    """A quantised weight [N, K] as stored, in `dtype`. InputError naming it for a scale that is NaN."""
    if format == "mxfp4":
        powers = scale.view(torch.uint8)
        check_scale(powers, name)
        return mxfp4.dequantize(weight, powers, dtype)
    check_scale(scale, name)
    return fp8.dequantize(weight, scale, dtype, block)


def check_scale(scale: Tensor, name: str) -> None:
    """Raise InputError when a scale of the weight `name` is NaN (255 in e8m0) or infinite."""
    if scale.dtype == torch.uint8:
        if (scale == mxfp4.NAN_SCALE).any():
            raise InputError(
                f"{name}: a scale is 255, which is NaN in e8m0; at most 254 is expected"
            )
    elif not scale.isfinite().all():
        raise InputError(f"{name}: a scale is not a finite number")


class Checkpoint:
    """The dialects of Qwen3.5, 3.6 and 3-Next: BF16, FP8 and MXFP4, in one file or in shards.

    config: the shape that `config.json` states; document: that file as it is; quantization: its claim.
    stored: every tensor, by its name in the files. entries: by parameter name; parts: the parameters in a
    stored tensor. ignored: stored names that are no part of the text model (the vision tower). problems:
    lines on what is not as `quantization_config` claims.

    InputError, one line, for a folder that is not such a checkpoint, or not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder")
        if (self.folder / UNFINISHED).exists():
            raise InputError(
                f"{self.folder}: an unfinished conversion; the same command continues it"
            )
        config_file = self.folder / "config.json"
        self.config = Config.from_file(config_file)
        self.document = json.loads(config_file.read_bytes())
        if "tensor_parallel" in self.document:
            raise InputError(
                f"{config_file}: one rank's part, {self.document['tensor_parallel']}; "
                "whole checkpoints are read here"
            )
        try:
            self.quantization = Quantization.from_config(self.document)
        except InputError as error:
            raise InputError(f"{config_file}: {error}") from None
        self.entries: dict[str, Entry] = {}
        self.parts: dict[str, list[str]] = {}
        self.ignored: list[str] = []
        self.stored = {stored.name: stored for stored in open_folder(self.folder)}
        formats: dict[str, str] = {}
        for stored in self.stored.values():
            self._add(stored, formats)
        self.problems = [*disagreements(self.document), *misclaimed(self.quantization, formats)]

    def _add(self, stored: Stored, formats: dict[str, str]) -> None:
        name = PREFIX.sub("", stored.name)
        if name.startswith("visual."):
            self.ignored.append(stored.name)
            return
        module, _, leaf = stored.name.rpartition(".")
        if stored.name.endswith(SCALES):
            if f"{module}.weight" not in self.stored:
                raise InputError(f"{stored.file}: {stored.name} has no {module}.weight beside it")
            return
        try:
            whole = self.whole(stored)
            parts = dict(_split(name, whole, self.config))
        except InputError as error:
            raise InputError(f"{stored.file}: {error}") from None
        if whole.is_fused_experts:  # config.json speaks of each expert by itself
            prefix = stored.name.removesuffix(name)
            formats |= {prefix + n.removesuffix(".weight"): whole.format for n in parts}
        elif leaf == "weight" and len(whole.shape) == 2 and not name.startswith("embed_tokens."):
            formats[module] = whole.format
        self.parts[stored.name] = list(parts)
        for part_name, part in parts.items():
            if part_name in self.entries:
                other = self.entries[part_name].stored_as
                raise InputError(
                    f"{stored.file}: {part_name} is given twice, by {other} and by {stored.name}"
                )
            self.entries[part_name] = part

    def whole(self, stored: Stored) -> Entry:
        """A stored tensor as an entry: its format follows from its dtype and the scales beside it."""
        stem = stored.name.removesuffix(".weight")
        beside = [f"{stem}{s}" for s in SCALES if f"{stem}{s}" in self.stored]
        kind = DTYPE_NAMES[stored.dtype]
        if stored.dtype in PLAIN:
            if stored.name != stem and beside:
                raise InputError(f"{beside[0]} is a scale, but {stored.name} has dtype {kind}")
            return Entry(stored, stored.shape)
        plain = ", ".join(DTYPE_NAMES[dtype] for dtype in PLAIN)
        if stored.dtype not in (torch.uint8, fp8.E4M3):
            raise InputError(
                f"{stored.name} has dtype {kind}; readable are {plain}, U8 and F8_E4M3"
            )
        if stored.name == stem or len(beside) != 1:
            raise InputError(
                f"{stored.name} has dtype {kind} and {len(beside)} tensors of scales; one is expected, "
                f"{' or '.join(f'{stem}{suffix}' for suffix in SCALES)}, or a dtype of {plain}"
            )
        if len(stored.shape) != 2:
            raise InputError(
                f"{stored.name} has dtype {kind} and shape {list(stored.shape)}; two axes were expected"
            )
        scale = self.stored[beside[0]]
        rows, columns = stored.shape
        if stored.dtype == fp8.E4M3:
            if scale.dtype not in PLAIN:
                raise InputError(
                    f"{scale.name} has dtype {DTYPE_NAMES[scale.dtype]}; scales of FP8 are {plain}"
                )
            block = self.quantization.block if self.quantization else fp8.BLOCK
            try:
                fp8.granularity((rows, columns), scale.shape, block)
            except InputError as error:
                raise InputError(f"{scale.name}: {error}") from None
            return Entry(stored, stored.shape, "fp8", scale, block)
        groups = (rows, columns * 2 // mxfp4.GROUP)
        is_e8m0 = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
        if scale.shape != groups or columns * 2 % mxfp4.GROUP or not is_e8m0:
            raise InputError(
                f"{scale.name} has shape {list(scale.shape)} and dtype {DTYPE_NAMES[scale.dtype]}; "
                f"{stored.name} of shape {[rows, columns]} (MXFP4) needs {list(groups)} in U8"
            )
        return Entry(stored, (rows, columns * 2), "mxfp4", scale)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Compare the entries with the parameters that a model has: names, then shapes, both ways."""
        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise InputError(f"{self.folder}: missing {some(missing)}")
        unknown = [e.stored_as for name, e in self.entries.items() if name not in expected]
        if unknown:
            raise InputError(f"{self.folder}: not part of this model: {some(unknown)}")
        for name, shape in expected.items():
            if self.entries[name].shape != shape:
                raise InputError(
                    f"{self.folder}: {name} has shape {list(self.entries[name].shape)} in the file, "
                    f"the config needs {list(shape)}"
                )

    def ignore(self, prefix: str) -> None:
        """Put the entries under `prefix` aside, as no part of the model to be built."""
        for name in [name for name in self.entries if name.startswith(prefix)]:
            self.ignored.append(self.entries.pop(name).stored_as)


def _split(name: str, whole: Entry, config: Config) -> Iterable[tuple[str, Entry]]:
    """The parameters that one stored tensor carries: several where experts or projections are fused."""
    layer, _, leaf = name.rpartition(".experts.")
    if leaf in ("gate_up_proj", "down_proj") and _size(whole, 3)[0] != config.num_experts:
        raise InputError(
            f"{whole.stored_as} has shape {list(whole.shape)}; num_experts = {config.num_experts}"
        )
    if leaf == "gate_up_proj":  # [E, 2I, D]: of each expert the gate's rows, then the up's
        half = whole.shape[1] // 2
        for e in range(config.num_experts):
            expert = f"{layer}.experts.{e}"
            yield f"{expert}.gate_proj.weight", _part(whole, lambda t, e=e: t[e, :half])
            yield f"{expert}.up_proj.weight", _part(whole, lambda t, e=e: t[e, half:])
    elif leaf == "down_proj":  # [E, D, I]
        for e in range(config.num_experts):
            yield f"{layer}.experts.{e}.down_proj.weight", _part(whole, lambda t, e=e: t[e])
    elif name.endswith(".in_proj_qkvz.weight"):
        stem = name.removesuffix("_qkvz.weight")
        _size(whole, 2)
        yield f"{stem}_qkv.weight", _part(whole, lambda t: _ungroup(t, config, "qkv"))
        yield f"{stem}_z.weight", _part(whole, lambda t: _ungroup(t, config, "z"))
    elif name.endswith(".in_proj_ba.weight"):
        stem = name.removesuffix("_ba.weight")
        _size(whole, 2)
        yield f"{stem}_b.weight", _part(whole, lambda t: _ungroup(t, config, "b"))
        yield f"{stem}_a.weight", _part(whole, lambda t: _ungroup(t, config, "a"))
    else:
        yield name, whole


def _size(entry: Entry, dims: int) -> tuple[int, ...]:
    if len(entry.shape) != dims:
        raise InputError(
            f"{entry.stored_as} has shape {list(entry.shape)}; {dims} axes were expected"
        )
    return entry.shape


def _part(whole: Entry, view: Callable[[Tensor], Tensor]) -> Entry:
    """A view of a stored tensor as an entry of its own; the shape is found without reading."""
    try:
        shape = view(torch.empty(whole.shape, device="meta")).shape
    except RuntimeError:
        raise InputError(
            f"{whole.stored_as} has shape {list(whole.shape)}, which the config's heads do not divide"
        ) from None
    return replace(whole, shape=tuple(shape), view=view)


def _ungroup(packed: Tensor, config: Config, wanted: str) -> Tensor:
    """Qwen3-Next's rows, grouped by key head as [q | k | v r heads | z r heads] (or [b r | a r] with
    r = HV / H value heads a key head), in Qwen3.5's order: all of q, then k, then v; z; b; a."""
    H, D = config.linear_num_key_heads, packed.shape[-1]
    shared = config.linear_num_value_heads // H
    K, V = config.linear_key_head_dim, config.linear_value_head_dim * shared
    sizes = [K, K, V, V] if wanted in ("qkv", "z") else [shared, shared]
    parts = packed.view(H, sum(sizes), D).split(sizes, dim=1)
    chosen = {"qkv": parts[:3], "z": parts[3:], "b": parts[:1], "a": parts[1:]}[wanted]
    return torch.cat([part.reshape(-1, D) for part in chosen])
