"""What a conversion writes, decided from headers: what becomes of each tensor, and in which file."""

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from qwen35.errors import InputError
from weights import fp8, mxfp4
from weights.checkpoint import Checkpoint
from weights.entry import (
    KEYS_AND_VALUES,
    PACKED,
    PLAIN,
    RUN_TIME,
    Entry,
    check_scale,
    owner_of,
    stem_of,
)
from weights.quantization import PREFIX
from weights.rounding import Rounding
from weights.shard import Plan, Shard

Target = Literal["mxfp4", "fp8", "bf16"]
To = Literal["copy", "mxfp4", "fp8", "bf16"]
SHARD_BYTES = 4_000_000_000
LARGEST_SCALE = 252  # with the next one 4 and 6 are beyond float32 and bfloat16
SCALE_NAMES = {"mxfp4": "_scale", "fp8": "_scale_inv"}  # after the weight's own name

# Which linear layers are quantised, by name less the prefix. Whatever is chosen, the router, the gate of
# the shared expert, in_proj_a and in_proj_b (in_proj_ba), the convolution, mtp.fc, embedding, head and
# the vision tower are not, as in all published repositories.
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
    """How to convert.

    to: the format. what: key of WHAT, for MXFP4 and FP8. activations: what MXFP4's claim says of them:
    "mxfp4", as AMD's does, or "bf16", weights only. tp: ranks. shard_bytes: of a file, at most.
    """

    to: Target
    what: str = "experts"
    activations: Literal["mxfp4", "bf16"] = "mxfp4"
    tp: int = 1
    shard_bytes: int = SHARD_BYTES


# --- what becomes of each tensor --------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One tensor of the output. per: rows and columns of the parameter that one of its values is for."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    per: tuple[int, int] = (1, 1)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Item:
    """One parameter of the output: `entry` is what it is made of, `name` and `to` what it becomes."""

    name: str
    entry: Entry
    to: To

    @property
    def format(self) -> str:
        """What it is in the output: "mxfp4", "fp8" or "plain"."""
        return {"copy": self.entry.format, "bf16": "plain"}.get(self.to, self.to)

    @property
    def files(self) -> list[str]:
        """The source files that hold it: two where its scales lie in the next one."""
        parts = (self.entry.weight, self.entry.scale)
        return list(dict.fromkeys(part.file.name for part in parts if part is not None))

    def slots(self) -> tuple[Slot, ...]:
        """What is written for it, whole."""
        shape = self.entry.shape
        if self.format == "plain":
            dtype = torch.bfloat16 if self.to == "bf16" else self.entry.dtype
            return (Slot(self.name, dtype, shape),)
        scale = self.name + SCALE_NAMES[self.format]
        N, K = shape
        if self.format == "fp8":
            copied = self.entry.scale.dtype if self.to == "copy" and self.entry.scale else None
            blocks = (-(-N // fp8.BLOCK[0]), -(-K // fp8.BLOCK[1]))
            return (
                Slot(self.name, fp8.E4M3, shape),
                Slot(scale, copied or torch.bfloat16, blocks, fp8.BLOCK),
            )
        return (
            Slot(self.name, torch.uint8, (N, K // 2), (1, 2)),
            Slot(scale, torch.uint8, (N, K // mxfp4.GROUP), (1, mxfp4.GROUP)),
        )


def items_of(checkpoint: Checkpoint, options: Options) -> list[Item]:
    """What the output consists of, in the order of the source's files.

    To MXFP4: what is chosen is quantised, fused experts one by one; what is MXFP4 already stays so; what
    is FP8 and not chosen becomes BF16. To FP8: the same with FP8 and MXFP4 exchanged, where FP8 that has
    other blocks than ours is quantised anew. To BF16: all that is quantised. The rest is copied as it is,
    under its own name. InputError where nothing is to be done, or where 32 does not divide the K of a
    matrix that becomes MXFP4.
    """
    chosen = WHAT[options.what] if options.to != "bf16" else ()
    ignored = set(checkpoint.ignored)
    items: list[Item] = []
    for stored in checkpoint.stored.values():
        if owner_of(stored.name, checkpoint.stored) is not None:  # written with its weight
            continue
        if stored.name in ignored:
            # Scales of activations belong to the old format; those of keys and values to any.
            is_stale = RUN_TIME.match(stored.name) and not KEYS_AND_VALUES.match(stored.name)
            if stored.name not in checkpoint.unlisted and not is_stale:
                items.append(Item(stored.name, Entry(stored, stored.shape), "copy"))
            continue
        whole = checkpoint.whole(stored)
        own_name = stem_of(stored.name) + ".weight" if stored.name.endswith(PACKED) else stored.name
        bare = PREFIX.sub("", stored.name)
        prefix = stored.name.removesuffix(bare)
        parts = [
            (prefix + name, checkpoint.entries[name]) for name in checkpoint.parts[stored.name]
        ]
        named = parts if whole.is_fused_experts else [(own_name, whole)]
        is_decoded = whole.format not in ("plain", options.to)
        module = PREFIX.sub("", named[0][0]).removesuffix(".weight")
        if any(fnmatchcase(module, pattern) for pattern in chosen):
            assert options.to != "bf16"
            items += [
                Item(name, entry, "copy" if _is_already(entry, options.to) else options.to)
                for name, entry in named
            ]
        else:
            # Experts that are quantised in one tensor have scales of their own: they go one by one.
            kept = named if is_decoded else [(own_name, whole)]
            to = "bf16" if is_decoded else "copy"
            if whole.format == "fp8" and not is_decoded and not _is_already(whole, "fp8"):
                kept, to = named, "fp8"
            items += [Item(name, entry, to) for name, entry in kept]
    target = f"{options.to} ({options.what})" if chosen else options.to
    is_change = any(item.to != "copy" for item in items) or options.tp > 1
    if not is_change or (chosen and not any(item.format == options.to for item in items)):
        raise InputError(f"{checkpoint.folder}: nothing to convert to {target}")
    for item in items:
        if item.to == "mxfp4" and item.entry.shape[-1] % mxfp4.GROUP:
            raise InputError(
                f"{item.name} has shape {list(item.entry.shape)}; MXFP4 needs a multiple of "
                f"{mxfp4.GROUP} on its last axis"
            )
    return items


def _is_already(entry: Entry, target: Target) -> bool:
    """Whether a parameter can be copied: FP8 in our own blocks, or MXFP4, by itself in its tensor."""
    if entry.format != target or entry.slices is not None:
        return False
    if target == "mxfp4":
        return True
    is_plain = entry.scale is not None and entry.scale.dtype in PLAIN
    return is_plain and entry.block == fp8.BLOCK and entry.scale_block == fp8.BLOCK


# --- where it goes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFile:
    """Items of one source file that go into one file (one for each rank), with a rank's slots: the same
    names, sizes and places for all ranks."""

    items: tuple[tuple[Item, tuple[Slot, ...]], ...]

    @property
    def slots(self) -> list[Slot]:
        return [slot for _, slots in self.items for slot in slots]

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(file for item, _ in self.items for file in item.files))


def arrange(items: list[Item], ranks: Plan, limit: int) -> list[OutputFile]:
    """Fill files of at most `limit` bytes (or one item) in order; no file takes from two source files
    but for scales. InputError where a rank's part would split what shares a scale."""
    files: list[OutputFile] = []
    current: list[tuple[Item, tuple[Slot, ...]]] = []
    size = 0
    for item in items:
        slots = item.slots()
        if ranks.size > 1:
            shard = ranks.shard(item.name, item.entry.shape, 0)
            slots = tuple(_cut_slot(slot, shard) for slot in slots)
        nbytes = sum(slot.nbytes for slot in slots)
        changes_source = current and current[0][0].files[0] != item.files[0]
        if current and (changes_source or size + nbytes > limit):
            files.append(OutputFile(tuple(current)))
            current, size = [], 0
        current.append((item, slots))
        size += nbytes
    return [*files, OutputFile(tuple(current))]


def _cut_slot(slot: Slot, shard: Shard) -> Slot:
    try:
        part = cut(torch.empty(slot.shape, device="meta"), shard, slot.per)
    except InputError as error:
        raise InputError(f"{slot.name}: {error}") from None
    return replace(slot, shape=tuple(part.shape))


def cut(tensor: Tensor, shard: Shard, per: tuple[int, int]) -> Tensor:
    """A rank's part of a tensor whose values are for `per` rows and columns each."""
    return shard.cut(tensor, per[shard.axis] if shard.axis is not None and shard.axis < 2 else 1)


# --- the numbers ------------------------------------------------------------------------------------


def convert_tensor(entry: Entry, name: str, to: To, error: Rounding) -> list[Tensor]:
    """A parameter in another format: one tensor, or numbers and scales: MXFP4's bytes [N, K/2] and
    [N, K/32], FP8's e4m3 [N, K] and a scale for each block.

    error: what is lost is added to it, under `name`. InputError for a number that is not finite.
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
            # From the block row that the first of them lies in; the measure asks for rows in order.
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
