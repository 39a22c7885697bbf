"""Conversions from and to fp8, bf8 and fp4: with a scale, or into a part of the destination.

A scale is the exponent of an f32 source, read as e8m0. A conversion from a small format multiplies by it,
a conversion to one divides by it. Conversions to fp8 and bf8 saturate, as on the card in the mode that
Triton sets (FP16_OVFL); in the other mode the card gives NaN or infinity.
"""

import re

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import EmulatorError, Instruction
from tools.gfx950.formats import (
    MINIFLOATS,
    bf16_to_f32,
    e8m0,
    f16_to_f32,
    f32_exponent,
    f32_to_bf16,
    f32_to_f16,
)
from tools.gfx950.operands import Reader, bits_list, only_modifiers, operands_of, register, source
from tools.gfx950.registry import Action, instruction
from tools.gfx950.waves import Waves

U32 = np.uint32
SMALL = ("fp8", "bf8", "fp4")
PAIRS_TO_F16 = {"bf16": (bf16_to_f32, f32_to_bf16), "f16": (f16_to_f32, f32_to_f16)}


@instruction(
    *[f"v_cvt_scalef32_pk_{wide}_{small}" for wide in ("f32", "f16", "bf16") for small in SMALL]
)
def widen_pair(ins: Instruction) -> Action:
    """Convert two small values of the first source, which op_sel chooses; the second is their scale."""
    only_modifiers(ins, "op_sel")
    destination, packed, scale = operands_of(ins, 3)
    wide, small = _formats(ins)
    select = bits_list(ins, "op_sel", [0, 0, 0])
    bits = MINIFLOATS[small].bits
    # A pair of fp4 is one of four bytes, which two bits choose; a pair of fp8 is one of two words.
    shift = 8 * (select[0] + 2 * select[1]) if bits == 4 else 16 * select[0]
    mask = U32((1 << bits) - 1)
    shifts = np.array([shift, shift + bits], U32)[:, None, None]
    read_packed, read_scale = register(packed), source(scale, "b32")

    def run(waves: Waves) -> None:
        codes = (read_packed(waves) >> shifts) & mask  # [2, W, 64]
        factor = e8m0(f32_exponent(read_scale(waves)))
        pair = (MINIFLOATS[small].decode(codes) * factor).astype(np.float32)
        if wide == "f32":
            for i, value in enumerate(pair):
                waves.write_v(destination.index + i, value.view(U32))
            return
        low, high = PAIRS_TO_F16[wide][1](pair)
        waves.write_v(destination.index, low | (high << U32(16)))

    return run


@instruction(*[f"v_cvt_scalef32_pk_{small}_f32" for small in SMALL])
def narrow_pair(ins: Instruction) -> Action:
    """Convert two f32 into a part of the destination; the third source is their scale."""
    destination, low, high, scale = operands_of(ins, 4)
    readers = source(low, "f32"), source(high, "f32")
    small, _ = _formats(ins)
    return _narrow(ins, small, destination.index, readers, source(scale, "b32"))


@instruction(*[f"v_cvt_scalef32_pk_{small}_{wide}" for wide in ("f16", "bf16") for small in SMALL])
def narrow_packed(ins: Instruction) -> Action:
    """Convert the two f16 or bf16 of the first source into a part of the destination, with a scale."""
    destination, pair, scale = operands_of(ins, 3)
    small, wide = _formats(ins)
    widen, _ = PAIRS_TO_F16[wide]
    whole = register(pair)

    def low(waves: Waves) -> NDArray:
        return widen(whole(waves) & U32(0xFFFF))

    def high(waves: Waves) -> NDArray:
        return widen(whole(waves) >> U32(16))

    return _narrow(ins, small, destination.index, (low, high), source(scale, "b32"))


@instruction("v_cvt_pk_fp8_f32", "v_cvt_pk_bf8_f32")
def narrow_unscaled(ins: Instruction) -> Action:
    """Convert two f32, without a scale, into one half of the destination; the other half stays."""
    destination, low, high = operands_of(ins, 3)
    small = ins.mnemonic.split("_")[3]
    return _narrow(ins, small, destination.index, (source(low, "f32"), source(high, "f32")), None)


def _narrow(
    ins: Instruction,
    small: str,
    index: int,
    readers: tuple[Reader, Reader],
    read_scale: Reader | None,
) -> Action:
    """Convert two values, divided by the scale, into the part of a VGPR that op_sel chooses; the rest
    stays."""
    only_modifiers(ins, "op_sel")
    # The last two of the four bits choose a byte of the destination (fp4), or the last one a word (fp8).
    select = bits_list(ins, "op_sel", [0] * 4)
    bits = MINIFLOATS[small].bits
    # With two sources the assembler writes only three bits.
    if str(ins.modifiers.get("op_sel", "")).count(",") == 2:
        if bits == 4:
            raise EmulatorError("op_sel has three bits; expected four, of which two choose a byte")
        select = [*select[:2], 0, select[2]]
    shift = 8 * (select[2] + 2 * select[3]) if bits == 4 else 16 * select[3]
    kept = U32(0xFFFFFFFF ^ (((1 << 2 * bits) - 1) << shift))
    encode = MINIFLOATS[small].encode

    def run(waves: Waves) -> None:
        factor = 1.0 if read_scale is None else e8m0(f32_exponent(read_scale(waves)))
        low, high = (encode(read(waves) / factor) for read in readers)
        pair = (low | (high << U32(bits))) << U32(shift)
        waves.write_v(index, (waves.vgpr[index] & kept) | pair)

    return run


def _formats(ins: Instruction) -> tuple[str, str]:
    """The formats that an instruction converts to and from."""
    match = re.match(r"v_cvt_scalef32_pk_(\w+?)_([a-z0-9]+)", ins.mnemonic)
    if match is None:
        raise EmulatorError("the formats of this conversion are not known")
    return match[1], match[2]
