"""One parameter of a checkpoint: in which format its numbers are stored, where they lie, how to get them.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwen35.errors import InputError
from weights import fp8, mxfp4
from weights.storage import DTYPE_NAMES, Stored

Format = Literal["plain", "mxfp4", "fp8"]
View = Callable[[Tensor], Tensor]
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
E8M0 = (torch.uint8, torch.float8_e8m0fnu)
PACKED = ".weight_packed"  # what compressed-tensors calls a weight whose codes share bytes
SCALES = (".weight_scale", ".weight_scale_inv")
FUSED = ("gate_up_proj", "down_proj")  # all experts of a layer in one tensor
FUSED_SCALES = tuple(f"{name}_scale_inv" for name in FUSED)
ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")

# Scales of activations and of the KV cache: one number each, or one a KV head. The weights are exact
# without them.
RUN_TIME = re.compile(
    r"\.(input_scale|input_scale_inv|output_scale|activation_scale|input_global_scale|"
    r"(gate_up_proj|down_proj)_activation_scale|[kvq]_scale|kv_scale|prob_scale)$"
)
# Tensors that only other formats have, by the ends of their names.
FOREIGN = {
    ".qweight": "packed integers (GPTQ, AWQ)",
    ".qzeros": "packed integers (GPTQ, AWQ)",
    ".weight_global_scale": "NVFP4",
    ".weight_scale_2": "NVFP4",
    ".weight_zero_point": "integers with zero points",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}


@dataclass(frozen=True)
class Entry:
    """One parameter: what the header says of it, and how to get it.

    shape: of the parameter, whatever its numbers are packed in. view: decoded tensor -> parameter, a
    slice or a permutation of rows; None: all of it. slices: of a quantised tensor that holds several
    parameters, stored numbers -> the part's, and stored scales -> the part's, before decoding.
    """

    weight: Stored
    shape: tuple[int, ...]
    format: Format = "plain"
    scale: Stored | None = None
    block: tuple[int, int] = fp8.BLOCK
    view: View | None = None
    slices: tuple[View, View] | None = None

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
        return self.stored_as.endswith(tuple(f".experts.{name}" for name in FUSED))

    @property
    def scale_block(self) -> tuple[int, int] | None:
        """Rows and columns of the weight that share a scale; None where one has a row or all of it."""
        if self.format == "mxfp4":
            return (1, mxfp4.GROUP)
        if self.scale is None or len(self.shape) != 2:
            return None
        shape = self.scale.shape if self.slices is None else _shape_of(self.slices[1], self.scale)
        blocks = tuple(-(-size // per) for size, per in zip(self.shape, self.block, strict=True))
        return self.block if shape == blocks else None

    @property
    def nbytes(self) -> int:
        """Of the stored numbers and their scales; a part of a fused tensor has its share."""
        packed = 2 if self.format == "mxfp4" else 1
        whole = math.prod(self.weight.shape) * packed
        share = math.prod(self.shape) / whole if whole else 0
        scales = 0
        if self.scale is not None:
            part = (
                self.scale.shape if self.slices is None else _shape_of(self.slices[1], self.scale)
            )
            scales = math.prod(part) * self.scale.dtype.itemsize
            scales = round(scales * share) if self.slices is None else scales
        return round(self.weight.nbytes * share) + scales

    def numbers(self) -> tuple[Tensor, Tensor]:
        """The stored numbers and scales of a quantised parameter, a part's own where it is one."""
        assert self.scale is not None
        weight, scale = self.weight.read(), self.scale.read()
        if self.slices is None:
            return weight, scale
        of_weight, of_scale = self.slices
        return of_weight(weight), of_scale(scale)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter in `dtype`, decoded where it is quantised; mapped where nothing has to change.

        None: the stored dtype, and bfloat16 for what is quantised. InputError for a scale that is NaN.
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
    """A quantised weight [N, K] as stored, in `dtype`. InputError naming it for a scale that is NaN."""
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


def stem_of(name: str) -> str:
    """`layers.0.mlp.up_proj.weight` and `...weight_packed` -> `layers.0.mlp.up_proj`."""
    return name.removesuffix(PACKED).removesuffix(".weight")


def owner_of(scale: str, stored: Mapping[str, Stored]) -> str | None:
    """The tensor that a tensor of scales belongs to, by its name; None for what is no scale of weights.

    InputError where there is no such tensor.
    """
    if scale.endswith(SCALES):
        stem = scale.rpartition(".")[0]
        owners = [f"{stem}.weight", f"{stem}{PACKED}"]
    elif scale.endswith(tuple(f".experts.{name}" for name in FUSED_SCALES)):
        experts, _, leaf = scale.rpartition(".")
        first = "gate_proj" if leaf.startswith("gate_up") else "down_proj"
        owners = [scale.removesuffix("_scale_inv"), f"{experts}.0.{first}.weight"]
    else:
        return None
    owner = next((name for name in owners if name in stored), None)
    if owner is None:
        raise InputError(f"{scale} has no {owners[0]} beside it")
    return owner


def is_run_time_scale(tensor: Stored, heads: int) -> bool:
    """Whether a tensor is a scale of activations or of the KV cache. heads: KV heads, each of which may
    have one."""
    size = math.prod(tensor.shape)
    is_expert_list = tensor.name.endswith("proj_activation_scale")
    return RUN_TIME.search(tensor.name) is not None and (is_expert_list or size in (1, heads))


def entry_of(tensor: Stored, stored: Mapping[str, Stored], block: tuple[int, int]) -> Entry:
    """A stored tensor as an entry: its format follows from its dtype and the scales beside it.

    stored: all tensors by name. block: rows and columns of an FP8 block. InputError, naming the tensor,
    for what is in no format that is known.
    """
    kind = DTYPE_NAMES[tensor.dtype]
    if tensor.dtype in PLAIN:
        return Entry(tensor, tensor.shape)
    stem, module = stem_of(tensor.name), tensor.name.rpartition(".")[0]
    for end, foreign in FOREIGN.items():
        if f"{module}{end}" in stored or f"{tensor.name}{end}" in stored:
            raise InputError(f"{tensor.name} is in a format that is not read here: {foreign}")
    plain = ", ".join(DTYPE_NAMES[dtype] for dtype in PLAIN)
    if tensor.dtype not in (torch.uint8, fp8.E4M3):
        raise InputError(f"{tensor.name} has dtype {kind}; readable are {plain}, U8 and F8_E4M3")
    beside = [f"{stem}{suffix}" for suffix in SCALES if f"{stem}{suffix}" in stored]
    if (
        not beside
        and tensor.dtype == fp8.E4M3
        and (fused := _of_fused_scales(tensor, stored, block))
    ):
        return fused
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


def _fp8_block(tensor: Stored, scale: Stored, block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale of a matrix: as the config says, or 32 of a row (MXFP8)."""
    if scale.dtype not in (*PLAIN, *E8M0):
        plain = ", ".join(DTYPE_NAMES[dtype] for dtype in PLAIN)
        raise InputError(
            f"{scale.name} has dtype {DTYPE_NAMES[scale.dtype]}; scales of FP8 are {plain} or e8m0"
        )
    rows, columns = tensor.shape
    per_32 = (1, mxfp4.GROUP)
    if scale.dtype in E8M0 and scale.shape == (rows, -(-columns // per_32[1])):
        return per_32
    try:
        fp8.granularity((rows, columns), scale.shape, block)
    except InputError as error:
        raise InputError(f"{scale.name}: {error}") from None
    return block


def _of_fused_scales(
    tensor: Stored, stored: Mapping[str, Stored], block: tuple[int, int]
) -> Entry | None:
    """FP8 experts whose scales are in one tensor a layer, [E, blocks, blocks], themselves fused or one
    by one; None where there is none."""
    one = ONE_EXPERT.fullmatch(tensor.name)
    if one is None:
        scale = stored.get(f"{tensor.name}_scale_inv")
        if scale is None:
            return None
        if len(tensor.shape) != 3 or len(scale.shape) != 3 or tensor.shape[0] != scale.shape[0]:
            raise InputError(
                f"{tensor.name} has shape {list(tensor.shape)} and {scale.name} "
                f"{list(scale.shape)}; [experts, rows, columns] were expected of both"
            )
        return Entry(tensor, tensor.shape, "fp8", scale, block)
    experts, expert, projection = one[1], int(one[2]), one[3]
    name = "down_proj" if projection == "down" else "gate_up_proj"
    scale = stored.get(f"{experts}.{name}_scale_inv")
    if scale is None or len(scale.shape) != 3 or expert >= scale.shape[0]:
        return None
    half = {"gate": 0, "up": 1}.get(projection)
    rows, _ = tensor.shape
    total = rows if half is None else 2 * rows
    of_scale = scales_of_rows(scale, expert, 0 if not half else rows, rows, total, block)
    part = Entry(tensor, tensor.shape, "fp8", scale, of_scale[1], slices=(lambda t: t, of_scale[0]))
    fp8.granularity(tensor.shape, _shape_of(of_scale[0], scale), of_scale[1])
    return part


def scales_of_rows(
    scale: Stored, expert: int, first: int, rows: int, total: int, block: tuple[int, int]
) -> tuple[View, tuple[int, int]]:
    """The scales of some rows of one expert of a fused matrix, and the block that each of them serves.

    scale: [E, blocks of rows, blocks of columns]. first, rows: of the part. total: rows of the matrix.
    """
    halves = total // rows
    blocks = -(-rows // block[0])
    if scale.shape[1] in (halves * blocks, halves):  # each half has blocks of its own
        count = scale.shape[1] // halves
        start = first // rows * count
        return lambda t: t[expert, start : start + count], block
    # A block reaches from one half into the other: a scale for each row says the same.
    return (
        lambda t: t[expert].repeat_interleave(block[0], 0)[first : first + rows],
        (1, block[1]),
    )


def _shape_of(view: View, stored: Stored) -> tuple[int, ...]:
    return tuple(view(torch.empty(stored.shape, dtype=stored.dtype, device="meta")).shape)
