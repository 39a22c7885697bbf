"""One parameter of a checkpoint: the format of its numbers, their location, and how to read them.

A tensor's format follows from its dtype and from the scales beside it, whatever config.json claims:

| stored | scales beside it | format |
|---|---|---|
| BF16, F16, F32, F64 | | plain |
| F8_E4M3 `.weight` | `.weight_scale_inv` or `.weight_scale` | fp8 |
| F8_E4M3 `experts.gate_up_proj`, `experts.down_proj`, or such experts one by one | `experts.gate_up_proj_scale_inv`, `experts.down_proj_scale_inv` | fp8 |
| U8 `.weight` or `.weight_packed` | `.weight_scale`, e8m0 per 32 | mxfp4 |
"""  # noqa: E501

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from weights import fp8, mxfp4
from weights.expert_scales import E8M0, View, block_of, expert_scales
from weights.storage import DTYPE_NAMES, Stored

Format = Literal["plain", "mxfp4", "fp8"]
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PACKED = ".weight_packed"  # the name of compressed-tensors for a weight with two codes per byte
SCALES = (".weight_scale", ".weight_scale_inv")
FUSED = ("gate_up_proj", "down_proj")  # all experts of a layer in one tensor
FUSED_SCALES = tuple(f"{name}{suffix}" for name in FUSED for suffix in ("_scale", "_scale_inv"))
ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,9})\.(gate|up|down)_proj\.weight")

# Scales of activations, of attention and of the KV cache. The weights do not need them.
RUN_TIME = re.compile(
    r".*(\.(k|v|kv|q|prob)_scale|[._](input|output|activation|act)(_global)?_scale(_inv)?)$"
)
KEYS_AND_VALUES = re.compile(r".*\.((k|v|kv)_scale|[kv]_proj\.output_scale)$")
# Endings of names that only these formats have.
FOREIGN = {
    "NVFP4": (".weight_global_scale", ".weight_scale_2"),
    "packed integers (GPTQ, AWQ)": (".qweight", ".qzeros", ".g_idx"),
    "bitsandbytes": (".absmax", ".quant_map", ".nested_absmax", ".SCB", "__nf4", "__fp4"),
    "packed integers of compressed-tensors": (".weight_shape", ".weight_zero_point"),
    "MXFP4 of gpt-oss": ("_proj_blocks", "_proj_scales"),
}


@dataclass(frozen=True)
class Entry:
    """One parameter: its description from the file's header, and how to read it.

    weight: the stored numbers.
    shape: that of the parameter, independent of the packing.
    format: that of the numbers.
    scale: the stored scales of a quantised parameter.
    block: rows and columns that share a scale of FP8 blocks.
    view: maps the decoded tensor to the parameter (a slice, or a permutation of rows). None: the
        parameter is the whole tensor.
    slices: two functions that cut the numbers and the scales of this parameter out of the stored
        tensors, if a quantised tensor has several parameters.
    scale_share: the fraction of the stored scales that is for this parameter.
    """

    weight: Stored
    shape: tuple[int, ...]
    format: Format = "plain"
    scale: Stored | None = None
    block: tuple[int, int] = fp8.BLOCK
    view: View | None = None
    slices: tuple[View, View] | None = None
    scale_share: float = 1.0

    @property
    def stored_as(self) -> str:
        return self.weight.name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored numbers."""
        return self.weight.dtype

    @property
    def is_fused_experts(self) -> bool:
        """Whether the stored tensor holds all experts of a layer."""
        return self.stored_as.endswith(tuple(f".experts.{name}" for name in FUSED))

    @property
    def scale_block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale. None if a scale is for a row or for the whole
        weight."""
        if self.format == "mxfp4":
            return (1, mxfp4.GROUP)
        if self.scale is None or len(self.shape) != 2:
            return None
        blocks = tuple(-(-size // per) for size, per in zip(self.shape, self.block, strict=True))
        return self.block if self.scale_shape == blocks else None

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the scales of this quantised parameter alone."""
        assert self.scale is not None
        return self.scale.shape if self.slices is None else _shape_of(self.slices[1], self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored numbers and scales. A part of a fused tensor has its share of
        them."""
        packed = 2 if self.format == "mxfp4" else 1
        whole = math.prod(self.weight.shape) * packed
        share = math.prod(self.shape) / whole if whole else 0
        of_scales = self.scale_share if self.slices else share
        scales = self.scale.nbytes * of_scales if self.scale else 0
        return int(self.weight.nbytes * share + scales)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """The stored numbers and scales of this quantised parameter alone."""
        assert self.scale is not None
        weight, scale = self.weight.read(), self.scale.read()
        if self.slices is None:
            return weight, scale
        of_weight, of_scale = self.slices
        return of_weight(weight), of_scale(scale)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter in `dtype`, decoded if it is quantised. If no number changes, it is a view of
        the mapped file.

        dtype: None is the stored dtype, or bfloat16 for a quantised parameter. InputError if a scale
        is NaN.
        """
        if self.scale is None:
            stored = self.weight.read()
            whole = stored if dtype is None else stored.to(dtype)
        else:
            weight, scale = self.numbers()
            whole = decode(
                self.format, weight, scale, dtype or torch.bfloat16, self.stored_as, self.block
            )
        return whole if self.view is None else self.view(whole)


def decode(
    format: Format,
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    name: str,
    block: tuple[int, int] = fp8.BLOCK,
) -> Tensor:
    """Decode a stored quantised weight to [N, K] in `dtype`. InputError, with `name`, if a scale is
    NaN."""
    if format == "mxfp4":
        powers = scale.view(torch.uint8)
        check_scale(powers, name)
        return mxfp4.dequantize(weight, powers, dtype)
    factors = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
    check_scale(factors, name)
    return fp8.dequantize(weight, factors, dtype, block)


def check_scale(scale: Tensor, name: str) -> None:
    """Raise InputError when a scale of the weight `name` is NaN (255 in e8m0) or infinite."""
    if scale.dtype in E8M0:
        if (scale.view(torch.uint8) == mxfp4.NAN_SCALE).any():
            raise InputError(
                f"{name}: a scale is 255, which is NaN in e8m0; at most 254 is expected"
            )
    elif not scale.isfinite().all():
        raise InputError(f"{name}: a scale is not a finite number")


def weight_name(name: str) -> str:
    """`layers.0.mlp.up_proj.weight_packed` -> `layers.0.mlp.up_proj.weight`; other names stay."""
    return f"{name.removesuffix(PACKED)}.weight" if name.endswith(PACKED) else name


def stem_of(name: str) -> str:
    """`layers.0.mlp.up_proj.weight` and `...weight_packed` -> `layers.0.mlp.up_proj`."""
    return name.removesuffix(PACKED).removesuffix(".weight")


def owner_of(scale: str, stored: Mapping[str, Stored]) -> str | None:
    """The name of the tensor that a tensor of scales belongs to. None if the name is not that of scales.

    InputError if there is no such tensor.
    """
    if scale.endswith(SCALES):
        stem = scale.rpartition(".")[0]
        owners = [f"{stem}.weight", f"{stem}{PACKED}"]
    elif scale.endswith(tuple(f".experts.{name}" for name in FUSED_SCALES)):
        experts, _, leaf = scale.rpartition(".")
        first = "gate_proj" if leaf.startswith("gate_up") else "down_proj"
        owners = [f"{experts}.{leaf.partition('_scale')[0]}", f"{experts}.0.{first}.weight"]
    else:
        return None
    owner = next((name for name in owners if name in stored), None)
    if owner is None:
        raise InputError(f"{scale} has no {owners[0]} beside it")
    return owner


def is_run_time_scale(tensor: Stored, config: Config) -> bool:
    """Whether a tensor only scales something at run time: it has such a name and one floating-point
    number, or one for each head or expert."""
    if RUN_TIME.match(tensor.name) is None or tensor.dtype not in PLAIN:
        return False
    count = math.prod(tensor.shape)
    several = (config.num_attention_heads, config.num_key_value_heads)
    if ".experts." in tensor.name:
        several = (config.num_experts,)
    return count == 1 or (count == max(tensor.shape, default=1) and count in several)


def check_readable(tensor: Stored) -> None:
    """InputError for a tensor of an unsupported format."""
    for name, endings in FOREIGN.items():
        if tensor.name.endswith(endings):
            raise InputError(
                f"{tensor.file}: {tensor.name} is in a format that is not read here: {name}"
            )


def entry_of(
    tensor: Stored, stored: Mapping[str, Stored], block: tuple[int, int], experts: int
) -> Entry:
    """A stored tensor as an entry. Its format follows from its dtype and from the scales beside it.

    stored: all tensors by name. block: rows and columns of an FP8 block. experts: of the model.
    InputError, with the name of the tensor, for an unknown format.
    """
    kind = DTYPE_NAMES[tensor.dtype]
    if tensor.dtype in PLAIN:
        return Entry(tensor, tensor.shape)
    stem = stem_of(tensor.name)
    plain = ", ".join(DTYPE_NAMES[dtype] for dtype in PLAIN)
    if tensor.dtype not in (torch.uint8, fp8.E4M3):
        raise InputError(f"{tensor.name} has dtype {kind}; readable are {plain}, U8 and F8_E4M3")
    own = [name for suffix in SCALES if (name := f"{stem}{suffix}") in stored]
    beside = own + _fused_scale_names(tensor.name, stored)
    is_fused = len(beside) == 1 and not own and tensor.dtype == fp8.E4M3
    if is_fused and (entry := _of_fused_scales(tensor, stored[beside[0]], block, experts)):
        return entry
    if tensor.name == stem or len(beside) != 1:
        raise InputError(
            f"{tensor.name} has dtype {kind} and {len(beside)} tensors of scales; one is expected, "
            f"{' or '.join(f'{stem}{suffix}' for suffix in SCALES)}, or a dtype of {plain}"
        )
    if len(tensor.shape) != 2:
        raise InputError(
            f"{tensor.name} has dtype {kind} and shape {list(tensor.shape)}; two axes were expected"
        )
    scale = stored[beside[0]]
    rows, columns = tensor.shape
    if tensor.dtype == fp8.E4M3:
        return Entry(tensor, tensor.shape, "fp8", scale, _fp8_block(tensor, scale, block))
    groups = (rows, columns * 2 // mxfp4.GROUP)
    if scale.shape != groups or columns * 2 % mxfp4.GROUP or scale.dtype not in E8M0:
        raise InputError(
            f"{scale.name} has shape {list(scale.shape)} and dtype {DTYPE_NAMES[scale.dtype]}; "
            f"{tensor.name} of shape {[rows, columns]} (MXFP4) needs {list(groups)} in U8"
        )
    return Entry(tensor, (rows, columns * 2), "mxfp4", scale)


def _fused_scale_names(weight: str, stored: Mapping[str, Stored]) -> list[str]:
    """The tensors with the scales of all experts of a layer, for a weight of these experts."""
    one = ONE_EXPERT.fullmatch(weight)
    fused = weight if one is None else f"{one[1]}.{'down' if one[3] == 'down' else 'gate_up'}_proj"
    if not fused.endswith(tuple(f".experts.{name}" for name in FUSED)):
        return []
    return [name for suffix in ("_scale_inv", "_scale") if (name := f"{fused}{suffix}") in stored]


def _check_scale_dtype(scale: Stored) -> None:
    if scale.dtype not in (*PLAIN, *E8M0):
        plain = ", ".join(DTYPE_NAMES[dtype] for dtype in PLAIN)
        raise InputError(
            f"{scale.name} has dtype {DTYPE_NAMES[scale.dtype]}; scales of FP8 are {plain} or F8_E8M0, U8"
        )


def _fp8_block(tensor: Stored, scale: Stored, block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale of a matrix."""
    _check_scale_dtype(scale)
    own = block_of(scale, scale.shape, tensor.shape, block)
    try:
        fp8.granularity(tensor.shape, scale.shape, own)
    except InputError as error:
        raise InputError(f"{scale.name}: {error}") from None
    return own


def _of_fused_scales(
    tensor: Stored, scale: Stored, block: tuple[int, int], experts: int
) -> Entry | None:
    """The entry of FP8 experts (fused or separate) whose scales are in one tensor per layer.

    None for a fused tensor without three axes.
    """
    one = ONE_EXPERT.fullmatch(tensor.name)
    if one is None and len(tensor.shape) != 3:
        return None
    _check_scale_dtype(scale)
    if one is None:
        return Entry(tensor, tensor.shape, "fp8", scale, block)  # its parts are checked one by one
    expert, projection = int(one[2]), one[3]
    N, K = tensor.shape[0], tensor.shape[1]
    first = N if projection == "up" else 0
    matrix = (N if projection == "down" else 2 * N, K)
    of_scale, own = expert_scales(scale, expert, experts, matrix, range(first, first + N), block)
    return Entry(
        tensor,
        tensor.shape,
        "fp8",
        scale,
        own,
        slices=(lambda t: t, of_scale),
        scale_share=N / (experts * matrix[0]),
    )


def _shape_of(view: View, stored: Stored) -> tuple[int, ...]:
    return tuple(view(torch.empty(stored.shape, dtype=stored.dtype, device="meta")).shape)
