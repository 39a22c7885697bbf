"""Matrix instructions (MFMA): D = A @ B^T + C, one M x M tile a wave.

Lane l holds a part of row l % M of A, and of B: the elements along K of group l // M. There are four
groups with M = 16, two with M = 32. All sums are in float64 and are rounded once; the card may add in
another order and round partial sums. EXEC has no effect.
"""

import re

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import EmulatorError, Instruction
from tools.gfx950.formats import MINIFLOATS, bf16_to_f32, e8m0, f16_to_f32
from tools.gfx950.nans import no_value
from tools.gfx950.operands import (
    Operand,
    Reader,
    bits_list,
    number,
    only_modifiers,
    parse_operand,
    register,
)
from tools.gfx950.registry import Action, instruction
from tools.gfx950.waves import LANES, Waves

U32 = np.uint32

EIGHTS = ("fp8_fp8", "fp8_bf8", "bf8_fp8", "bf8_bf8")
HALVES = ("f16", "bf16")
# Rows (and columns) of the tile, K, and the operands' type as it ends the mnemonic.
PLAIN = [
    *[(rows, k, kind) for rows, k in ((16, 32), (32, 16)) for kind in (*EIGHTS, *HALVES)],
    *[(16, 16, "f16"), (32, 8, "f16"), (16, 16, "bf16_1k"), (32, 8, "bf16_1k")],
    *[(16, 16, "bf16"), (32, 8, "bf16")],  # the newer names of the last two
    *[(16, 4, "f32"), (32, 2, "f32")],
]
ANY_SMALL = [(16, 128, "f8f6f4"), (32, 64, "f8f6f4")]
INTEGER = [(16, 32, "i8"), (32, 16, "i8"), (16, 64, "i8"), (32, 32, "i8")]
SMALL_CODES = {0: "fp8", 1: "bf8", 4: "fp4"}  # the values of cbsz (for A) and blgp (for B)
BLOCK = 32  # elements along K that share a scale


@instruction(*[f"v_mfma_f32_{m}x{m}x{k}_{kind}" for m, k, kind in PLAIN])
@instruction(*[f"v_mfma_f32_{m}x{m}x{k}_{kind}" for m, k, kind in ANY_SMALL])
@instruction(*[f"v_mfma_scale_f32_{m}x{m}x{k}_{kind}" for m, k, kind in ANY_SMALL])
@instruction(*[f"v_mfma_i32_{m}x{m}x{k}_{kind}" for m, k, kind in INTEGER])
def mfma(ins: Instruction) -> Action:
    scaled = ins.mnemonic.startswith("v_mfma_scale_")
    any_small = ins.mnemonic.endswith("f8f6f4")
    only_modifiers(ins, *("cbsz", "blgp") * any_small, *("op_sel", "op_sel_hi") * scaled)
    rows, _, kind = _shape(ins.mnemonic)
    kinds = kind.split("_") * 2 if "1k" not in kind else ["bf16", "bf16"]
    if any_small:
        kinds = [_small(number(ins, "cbsz")), _small(number(ins, "blgp"))]
    operands = [parse_operand(text) for text in ins.operands]
    if len(operands) != (6 if scaled else 4):
        raise EmulatorError(f"{len(operands)} operands, expected {6 if scaled else 4}")
    destination, a, b, c = operands[:4]
    count = rows * rows // LANES
    scales = _scales(ins, operands[4:], rows) if scaled else None
    integers = ins.mnemonic.startswith("v_mfma_i32")

    def run(waves: Waves) -> None:
        left, right = _matrix(waves, a, kinds[0], rows), _matrix(waves, b, kinds[1], rows)
        if scales is not None:
            left = left * scales[0](waves)
            right = right * scales[1](waves)
        product = _to_lanes(left @ right.transpose(0, 2, 1), rows)
        if c.kind == "constant":
            start = np.full(1, c.constant(32), U32)
        else:
            start = _bank(waves, c)[c.index : c.index + count]
        start = start.view(np.int32 if integers else np.float32).astype(np.float64)
        result = (
            (product + start).astype(np.int64).astype(np.int32) if integers else product + start
        )
        if not integers and (wrong := np.isnan(result)).any():  # the card's NaN is not known
            result = np.where(wrong, no_value(result.dtype), result)
        bits = result.view(U32) if integers else result.astype(np.float32).view(U32)
        _bank(waves, destination)[destination.index : destination.index + count] = bits

    return run


def _shape(mnemonic: str) -> tuple[int, int, str]:
    match = re.search(r"_(\d+)x\d+x(\d+)_(\w+)$", mnemonic)
    assert match is not None  # those that are registered have it
    return int(match[1]), int(match[2]), match[3]


def _small(code: int) -> str:
    if code not in SMALL_CODES:
        raise EmulatorError(f"operand format {code} is not emulated")
    return SMALL_CODES[code]


def _bank(waves: Waves, operand: Operand) -> NDArray[np.uint32]:
    return waves.agpr if operand.kind == "a" else waves.vgpr


def _values(registers: NDArray[np.uint32], kind: str) -> NDArray[np.float64]:
    """Registers [n, W, 64] -> their elements, float64 [W, 64, count], those in low bits first."""
    words = np.ascontiguousarray(np.moveaxis(registers, 0, -1))
    if kind == "f32":
        return words.view(np.float32).astype(np.float64)
    bits = {"bf16": 16, "f16": 16, "i8": 8}.get(kind) or MINIFLOATS[kind].bits
    if bits in (8, 16):
        codes = words.view(f"<u{bits // 8}")
    else:
        shifts = np.arange(0, 32, bits, dtype=U32)
        codes = (words[..., None] >> shifts) & U32((1 << bits) - 1)
        codes = codes.reshape(*words.shape[:2], -1)
    if kind == "bf16":
        values = bf16_to_f32(codes)
    elif kind == "f16":
        values = f16_to_f32(codes)
    elif kind == "i8":
        values = codes.view(np.int8)
    else:
        values = MINIFLOATS[kind].decode(codes)
    return values.astype(np.float64)


def _matrix(waves: Waves, operand: Operand, kind: str, rows: int) -> NDArray[np.float64]:
    """An operand as matrices [W, rows, K].

    A lane's elements are consecutive in K, and one group of lanes follows the other. But 32 elements of 8
    bits are two runs of 16, and the first runs of all groups precede the second runs.
    """
    bank = _bank(waves, operand)
    elements = _values(bank[operand.index : operand.index + operand.count], kind)
    count, groups = elements.shape[2], LANES // rows
    run = 16 if kind in ("fp8", "bf8") and count == 32 else count
    split = elements.reshape(-1, groups, rows, count // run, run)
    return split.transpose(0, 2, 3, 1, 4).reshape(-1, rows, groups * count)


def _to_lanes(tiles: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """Tiles [W, rows, columns] -> registers [rows * columns / 64, W, 64].

    Lane l holds column l % rows. Four consecutive rows are in four registers of one group of lanes, the
    next four in the next group; after the last group come the first group's next registers.
    """
    groups = LANES // rows
    split = tiles.reshape(-1, rows // (4 * groups), groups, 4, rows)
    return split.transpose(1, 3, 0, 2, 4).reshape(-1, len(tiles), LANES)


def _scales(ins: Instruction, operands: list[Operand], rows: int) -> list[Reader]:
    """Readers of the scales of A and B as matrices [W, rows, K].

    Lane l's scale is one byte of its register, which op_sel and op_sel_hi choose. It belongs to row
    l % rows and to block l // rows of 32 elements.
    """
    low, high = bits_list(ins, "op_sel", [0, 0, 0]), bits_list(ins, "op_sel_hi", [1, 1, 1])
    return [
        _scale_reader(operand, 8 * (low[i] + 2 * high[i]), rows)
        for i, operand in enumerate(operands)
    ]


def _scale_reader(operand: Operand, shift: int, rows: int) -> Reader:
    whole = register(operand)

    def read(waves: Waves) -> NDArray[np.float64]:
        codes = (np.broadcast_to(whole(waves), (len(waves), LANES)) >> U32(shift)) & U32(0xFF)
        by_block = e8m0(codes).reshape(-1, LANES // rows, rows).transpose(0, 2, 1)
        return np.repeat(by_block, BLOCK, axis=2)

    return read
