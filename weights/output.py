"""Plans from headers what a conversion writes: the new format of each tensor, and its file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from qwen35.config import Config
from qwen35.errors import InputError
from weights import fp8, mxfp4
from weights.checkpoint import Checkpoint
from weights.command import SHARD_BYTES
from weights.entry import (
    KEYS_AND_VALUES,
    PLAIN,
    RUN_TIME,
    Entry,
    check_scale,
    owner_of,
    weight_name,
)
from weights.quantization import PREFIX, name_pattern
from weights.rounding import Rounding
from weights.shard import Plan, Shard

Target = Literal["mxfp4", "fp8", "bf16"]
To = Literal["copy", "mxfp4", "fp8", "bf16"]
LARGEST_SCALE = 252  # with 253, the numbers 4 and 6 exceed float32 and bfloat16
SCALE_NAMES = {"mxfp4": "_scale", "fp8": "_scale_inv"}  # suffixes of the weight's name

# The linear layers that are quantised, by name without prefix. As in all published repositories,
# the router, the gate of the shared expert, in_proj_a and in_proj_b (in_proj_ba), the convolution,
# mtp.fc, embedding, head and the vision tower are never quantised.
WHAT = {
    "experts": ("layers.*.mlp.experts.*_proj",),
    "all-linear": tuple(
        f"{trunk}layers.*.{module}"
        for trunk in ("", "mtp.")
        for module in (
            "mlp.*_proj",  # dense, shared and routed
            "self_attn.*_proj",
            "linear_attn.in_proj_qkv*",  # Qwen3-Next: in_proj_qkvz
            "linear_attn.in_proj_z",
            "linear_attn.out_proj",
        )
    ),
}


@dataclass(frozen=True)
class Options:
    """The options of a conversion.

    to: the format.
    what: the matrices that are quantised to MXFP4 or FP8, a key of WHAT.
    activations: their format in the quantization_config of MXFP4: "mxfp4", as AMD writes it, or
        "bf16" (only weights are quantised).
    tp: the number of ranks.
    shard_bytes: the largest size of a file.
    """

    to: Target
    what: str = "experts"
    activations: Literal["mxfp4", "bf16"] = "mxfp4"
    tp: int = 1
    shard_bytes: int = SHARD_BYTES


# --- what becomes of each tensor --------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One tensor of the output. per: the rows and columns of the parameter that one value is for. 0
    stands for all of them; then ranks do not cut that axis."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    per: tuple[int, int] = (1, 1)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Item:
    """One parameter of the output. entry: its source. name, to: its name and format in the
    output."""

    name: str
    entry: Entry
    to: To

    @property
    def format(self) -> str:
        """The format in the output: "mxfp4", "fp8" or "plain"."""
        return {"copy": self.entry.format, "bf16": "plain"}.get(self.to, self.to)

    @property
    def files(self) -> list[str]:
        """The source files of the parameter: two if its scales are in another file."""
        parts = (self.entry.weight, self.entry.scale)
        return list(dict.fromkeys(part.file.name for part in parts if part is not None))

    def slots(self) -> tuple[Slot, ...]:
        """The tensors that are written for the parameter, before they are cut for ranks."""
        shape = self.entry.shape
        if self.format == "plain":
            dtype = torch.bfloat16 if self.to == "bf16" else self.entry.dtype
            return (Slot(self.name, dtype, shape),)
        scale = self.name + SCALE_NAMES[self.format]
        N, K = shape
        if self.format == "fp8":
            numbers = Slot(self.name, fp8.E4M3, shape)
            if self.to == "copy" and self.entry.scale is not None:
                served = self.entry.scale_shape, self._served()
                return (numbers, Slot(scale, self.entry.scale.dtype, *served))
            blocks = (-(-N // fp8.BLOCK[0]), -(-K // fp8.BLOCK[1]))
            return (numbers, Slot(scale, torch.bfloat16, blocks, fp8.BLOCK))
        if K % mxfp4.GROUP:
            raise InputError(
                f"{self.name} has shape {list(shape)}; MXFP4 needs a multiple of {mxfp4.GROUP} on its "
                "last axis"
            )
        return (
            Slot(self.name, torch.uint8, (N, K // 2), (1, 2)),
            Slot(scale, torch.uint8, (N, K // mxfp4.GROUP), (1, mxfp4.GROUP)),
        )

    def _served(self) -> tuple[int, int]:
        """Rows and columns that share a scale of the stored FP8 numbers; 0 means all."""
        if (block := self.entry.scale_block) is not None:
            return block
        return (1, 0) if self.entry.scale_shape[:1] == self.entry.shape[:1] else (0, 0)


def is_chosen(name: str, options: Options) -> bool:
    """Whether a parameter becomes the target's format. name: with or without its prefix."""
    module = PREFIX.sub("", name).removesuffix(".weight")
    patterns = WHAT[options.what] if options.to != "bf16" else ()
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def items_of(checkpoint: Checkpoint, options: Options) -> list[Item]:
    """The parameters of the output, in the order of the source's files.

    To MXFP4: chosen parameters are quantised (fused experts one by one). Parameters that are MXFP4
        already are copied. FP8 parameters that are not chosen become BF16.
    To FP8: the same with FP8 and MXFP4 exchanged. FP8 with other blocks than ours is quantised again.
    To BF16: all quantised parameters are decoded.

    All others are copied under their own names. InputError as in `check_choice`.
    """
    ignored = set(checkpoint.ignored)
    items: list[Item] = []
    for stored in checkpoint.stored.values():
        if owner_of(stored.name, checkpoint.stored) is not None:  # written with its weight
            continue
        if stored.name in ignored:
            # Scales of activations belong to the old format. Those of keys and values fit any
            # format.
            is_stale = RUN_TIME.match(stored.name) and not KEYS_AND_VALUES.match(stored.name)
            if stored.name not in checkpoint.unlisted and not is_stale:
                items.append(Item(stored.name, Entry(stored, stored.shape), "copy"))
            continue
        whole = checkpoint.whole(stored)
        own_name = weight_name(stored.name)
        bare = PREFIX.sub("", stored.name)
        prefix = stored.name.removesuffix(bare)
        parts = [
            (prefix + name, checkpoint.entries[name]) for name in checkpoint.parts[stored.name]
        ]
        named = parts if whole.is_fused_experts else [(own_name, whole)]
        is_decoded = whole.format not in ("plain", options.to)
        if is_chosen(named[0][0], options):
            assert options.to != "bf16"
            items += [
                Item(name, entry, "copy" if _is_already(entry, options.to) else options.to)
                for name, entry in named
            ]
        else:
            # Experts that are quantised in a fused tensor have separate scales, so they are written
            # separately.
            kept = named if is_decoded else [(own_name, whole)]
            to = "bf16" if is_decoded else "copy"
            if whole.format == "fp8" and not is_decoded and not _is_already(whole, "fp8"):
                kept, to = named, "fp8"
            items += [Item(name, entry, to) for name, entry in kept]
    check_choice(items, options, str(checkpoint.folder))
    return items


def check_choice(items: Sequence[Item], options: Options, source: str) -> None:
    """InputError if no parameter of the output has the target's format, because `options.what`
    chooses none. If all are in that format already, the conversion copies them."""
    if options.to != "bf16" and not any(item.format == options.to for item in items):
        others = " or ".join(f"--what {what}" for what in WHAT if what != options.what)
        raise InputError(
            f"{source}: nothing to convert to {options.to} ({options.what}): the model has no such "
            f"matrices; there is {others}"
        )


def _is_already(entry: Entry, target: Target) -> bool:
    """Whether a parameter can be copied: MXFP4, or FP8 with our block size, in its own tensor."""
    if entry.format != target or entry.slices is not None:
        return False
    if target == "mxfp4":
        return True
    is_plain = entry.scale is not None and entry.scale.dtype in PLAIN
    return is_plain and entry.block == fp8.BLOCK and entry.scale_block == fp8.BLOCK


# --- what a rank holds, and where it goes -----------------------------------------------------------

Held = tuple[Item, tuple[Slot, ...]]  # an item, and its slots on one rank


def fit(items: Sequence[Item], config: Config, size: int) -> list[Held]:
    """Every item with its slots on one of `size` ranks. They are the same for all ranks.

    `tools.inspect` and conversions both use this to decide what fits. InputError, with the reason:
    a count of the config that the size does not divide, a name that the plan lacks, a range of rows
    or columns that would split a scale block, or a K that 32 does not divide.
    """
    plan = Plan(config, size)
    if size == 1:
        return [(item, item.slots()) for item in items]
    shapes: dict[tuple[object, ...], list[tuple[int, ...]]] = {}  # by kind of parameter
    held: list[Held] = []
    for item in items:
        slots = item.slots()
        kind = (
            name_pattern(item.name),
            item.entry.shape,
            *((slot.dtype, slot.shape, slot.per) for slot in slots),
        )
        if kind not in shapes:
            shard = plan.shard(item.name, item.entry.shape, 0)
            shapes[kind] = [_cut_shape(item, slot, shard) for slot in slots]
        cut_slots = (
            Slot(slot.name, slot.dtype, shape, slot.per)
            for slot, shape in zip(slots, shapes[kind], strict=True)
        )
        held.append((item, tuple(cut_slots)))
    return held


def _cut_shape(item: Item, slot: Slot, shard: Shard) -> tuple[int, ...]:
    try:
        along, per = _along(shard, slot.per)
        return along.shape_of(slot.shape, per)
    except InputError as error:
        raise InputError(f"{slot.name} ({item.format}): {error}") from None


def _along(shard: Shard, per: tuple[int, int]) -> tuple[Shard, int]:
    """The shard for a tensor whose values are for `per` rows and columns each, and how many
    elements a value is for along the shard's axis."""
    if shard.axis is None or shard.axis >= len(per):
        return shard, 1
    return (shard, per[shard.axis]) if per[shard.axis] else (Shard(None), 1)


def cut(tensor: Tensor, shard: Shard, per: tuple[int, int]) -> Tensor:
    """A rank's part of a tensor whose values are for `per` rows and columns each (see `Slot`)."""
    along, count = _along(shard, per)
    return along.cut(tensor, count)


@dataclass(frozen=True)
class OutputFile:
    """Items of one source file that go into one output file per rank, with the slots of a rank.
    Names, sizes and offsets are the same for all ranks."""

    items: tuple[Held, ...]

    @property
    def slots(self) -> list[Slot]:
        return [slot for _, slots in self.items for slot in slots]

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(file for item, _ in self.items for file in item.files))


def arrange(held: Sequence[Held], limit: int) -> list[OutputFile]:
    """Distribute items over files of at most `limit` bytes (or one item), in order. A file has
    items of one source file only, except for scales."""
    files: list[OutputFile] = []
    current: list[Held] = []
    size = 0
    for item, slots in held:
        nbytes = sum(slot.nbytes for slot in slots)
        changes_source = current and current[0][0].files[0] != item.files[0]
        if current and (changes_source or size + nbytes > limit):
            files.append(OutputFile(tuple(current)))
            current, size = [], 0
        current.append((item, slots))
        size += nbytes
    return [*files, OutputFile(tuple(current))]


# --- the numbers ------------------------------------------------------------------------------------


def convert_tensor(entry: Entry, name: str, to: To, error: Rounding) -> list[Tensor]:
    """Convert a parameter. Returns one plain tensor, or numbers and scales: uint8 [N, K/2] and [N,
    K/32] for MXFP4; e4m3 [N, K] and a scale per block for FP8.

    error: the rounding error is added to it, under `name`. InputError if a number is not finite.
    """
    if to == "copy":
        if entry.scale is None:
            return [entry.read()]
        scale = entry.scale.read()
        check_scale(scale, entry.stored_as)
        return [entry.weight.read(), scale.view(torch.uint8) if entry.format == "mxfp4" else scale]
    exact = entry.read() if entry.scale is None else entry.read(torch.float32)
    if to == "bf16":
        rounded = exact.bfloat16()
        if not rounded.isfinite().all():
            raise InputError(f"{entry.stored_as}: {name} holds an infinity or a NaN")
        error.add(name, exact.flatten(0, -2), lambda rows: rounded.flatten(0, -2)[rows].float())
        return [rounded]
    if to == "fp8":
        numbers, scales = fp8.quantize_blocks(exact)
        if not scales.isfinite().all():
            raise InputError(f"{entry.stored_as}: {name} holds an infinity or a NaN")
        first_block = fp8.BLOCK[0]

        def decoded_blocks(rows: slice) -> Tensor:
            # Decoding starts at the block row that contains the first of these rows.
            top = rows.start // first_block
            end = min(rows.stop, len(numbers))
            part = slice(top * first_block, end)
            whole = fp8.dequantize(
                numbers[part], scales[top : -(-end // first_block)], torch.float32
            )
            return whole[rows.start - top * first_block :]

        error.add(name, exact, decoded_blocks)
        return [numbers, scales]
    packed, powers = mxfp4.quantize(exact)
    if (powers > LARGEST_SCALE).any():
        raise InputError(
            f"{entry.stored_as}: {name} holds an infinity, a NaN or a magnitude of 2^127 x 1.75 "
            "and more, which MXFP4 cannot hold"
        )

    def decoded(rows: slice) -> Tensor:
        return mxfp4.dequantize(packed[rows], powers[rows], torch.float32)

    error.add(name, exact, decoded)
    return [packed, powers]
