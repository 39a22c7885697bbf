"""Puts vector instructions (VALU) together from sources, a function over lanes and a destination.

`define` and `define_packed` make instructions in a line each; `vector_ops` and `vector_converts` are the
lists of these lines. The encodings DPP (a permutation of the first source's lanes) and SDWA (bytes or
words of sources and result) are handled here, so that a definition does not know about them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import EmulatorError, Instruction
from tools.gfx950.nans import LAYOUTS, passing_on
from tools.gfx950.operands import (
    TYPES,
    Operand,
    Reader,
    bits_list,
    bits_of,
    number,
    only_modifiers,
    operands_of,
    register,
    source,
)
from tools.gfx950.registry import BUILDERS, SIGNATURES, Action, Builder, parse_signature
from tools.gfx950.waves import EXEC, LANES, Waves, mask_of

LANE = np.arange(LANES)
U32 = np.uint32

DPP = ("quad_perm", "row_shl", "row_shr", "row_ror", "row_bcast", "row_newbcast", "row_mirror")
DPP += ("row_half_mirror", "row_mask", "bank_mask", "bound_ctrl")
SDWA = ("dst_sel", "dst_unused", "src0_sel", "src1_sel")

Function = Callable[..., NDArray | tuple[NDArray, ...]]
# Writes bits to the destination of waves. The last argument: lanes that may write; None: all active ones.
Writer = Callable[[Waves, NDArray, NDArray | None], None]


def define(
    mnemonics: str,
    signature: str,
    function: Function,
    *,
    clamped: Function | None = None,
    own_nans: bool = False,
) -> None:
    """Make instructions from a function over lanes.

    signature: the types of results and sources in the order of the operands, as in "u32 = f32 i32". A
    source +f32 is the old value of the destination and has no operand of its own.
    function: takes sources as arrays that broadcast to [W, 64], and must not write into them.
    clamped: for integer results, the function that replaces this one if the modifier clamp is set. A
    float result is limited to 0 .. 1 without it.
    own_nans: the function gives the right NaN by itself; otherwise `nans.passing_on` does.
    """
    first = parse_signature(signature)[0][0]
    is_float = np.dtype(TYPES[first][0]) in LAYOUTS
    whole = function if own_nans or not is_float else passing_on(function)
    for mnemonic in mnemonics.split():
        SIGNATURES[mnemonic] = signature
        BUILDERS[mnemonic] = _builder(
            signature, whole, clamped, compares=mnemonic.startswith("v_cmp")
        )


def define_packed(
    mnemonics: str, signature: str, function: Function, *, own_nans: bool = False
) -> None:
    """Make instructions that apply a function to both halves: of a register for types of 16 bits, of a
    pair of registers for f32.

    op_sel and op_sel_hi choose the half of each source for the low and the high half of the result.
    """
    whole = function if own_nans else passing_on(function)
    for mnemonic in mnemonics.split():
        SIGNATURES[mnemonic] = signature
        BUILDERS[mnemonic] = _packed_builder(signature, whole)


def _builder(
    signature: str, function: Function, clamped: Function | None, *, compares: bool
) -> Builder:
    results, sources = parse_signature(signature)
    read_operands = [kind for kind in sources if not kind.startswith("+")]

    def build(instruction: Instruction) -> Action:
        operands = operands_of(instruction, len(results) + len(read_operands))
        dpp, sdwa = (instruction.mnemonic.endswith(suffix) for suffix in ("_dpp", "_sdwa"))
        known = ("clamp", "mul", "div", "op_sel")
        only_modifiers(instruction, *known, *(DPP if dpp else SDWA if sdwa else ()))
        destination, given = operands[0], operands[len(results) :]
        if dpp and not given[0].kind == "v":
            raise EmulatorError("DPP permutes a VGPR")
        if dpp and TYPES[read_operands[0]][1] == 64:
            raise EmulatorError("DPP of a pair of VGPRs is not emulated")
        permutation = dpp_permutation(instruction) if dpp else None
        words = bits_list(instruction, "op_sel", [0] * (len(sources) + 1))
        if any(words) and not any(TYPES[kind.lstrip("+")][1] == 16 for kind in sources + results):
            raise EmulatorError("op_sel on operands of 32 bits")
        readers: list[Reader] = []
        for i, kind in enumerate(sources):
            if kind.startswith("+"):
                readers.append(source(destination, kind[1:]))
                continue
            operand = given[i]
            base = None
            if permutation is not None and i == 0:
                base = _permuted(operand, permutation)
            elif sdwa and f"src{i}_sel" in instruction.modifiers:
                base = _selected(operand, str(instruction.modifiers[f"src{i}_sel"]))
            elif operand.sign_extend:
                raise EmulatorError("sext() without a selected byte or word")
            readers.append(source(operand, kind, base, words[i]))
        outputs = [
            _destination(instruction, operand, kind, words[-1] if i == 0 else 0)
            for i, (operand, kind) in enumerate(zip(operands, results, strict=False))
        ]
        saturates = clamped is not None and "clamp" in instruction.modifiers
        apply = clamped if saturates and clamped is not None else function
        finish = _output_modifiers(instruction, results[0], clamp=not saturates)
        also_exec = compares and instruction.mnemonic.startswith("v_cmpx")

        def run_plain(waves: Waves) -> None:
            value: Any = apply(*[read(waves) for read in readers])
            write_first(
                waves, bits_of(value if finish is None else finish(value), results[0]), None
            )

        def run(waves: Waves) -> None:
            values = apply(*[read(waves) for read in readers])
            if not isinstance(values, tuple):
                values = (values,)
            mask = None if permutation is None else permutation.writes(waves)
            for i, (write, kind, value) in enumerate(zip(outputs, results, values, strict=True)):
                finished = value if i or finish is None else finish(value)
                write(waves, bits_of(finished, kind), mask)
            if also_exec:
                waves.write_s64(EXEC, mask_of(values[0] & waves.active))

        write_first = outputs[0]
        simple = len(results) == 1 and permutation is None and not also_exec
        return run_plain if simple else run

    return build


def _packed_builder(signature: str, function: Function) -> Builder:
    (result,), kinds = parse_signature(signature)
    wide = TYPES[result][1] == 32  # halves are registers of their own

    def build(instruction: Instruction) -> Action:
        only_modifiers(instruction, "op_sel", "op_sel_hi", "neg_lo", "neg_hi", "clamp")
        destination, *given = operands_of(instruction, 1 + len(kinds))
        if "clamp" in instruction.modifiers:
            raise EmulatorError("clamp of a packed result is not emulated")
        halves: list[list[Reader]] = []
        for select, negate, default in (("op_sel", "neg_lo", 0), ("op_sel_hi", "neg_hi", 1)):
            chosen = bits_list(instruction, select, [default] * len(kinds))
            signs = bits_list(instruction, negate, [0] * len(kinds))
            halves.append(
                [
                    _half(operand, kind, word, bool(sign), wide)
                    for operand, kind, word, sign in zip(given, kinds, chosen, signs, strict=True)
                ]
            )

        def run(waves: Waves) -> None:
            low, high = (
                bits_of(np.asarray(function(*[read(waves) for read in half])), result)
                for half in halves
            )
            if wide:
                high = np.array(high)  # it may be a view of the register that the next line writes
                waves.write_v(destination.index, low)
                waves.write_v(destination.index + 1, high)
            else:
                waves.write_v(destination.index, low | (high << U32(16)))

        return run

    return build


def _half(operand: Operand, kind: str, word: int, negate: bool, wide: bool) -> Reader:
    """Reads one half of a packed source. wide: a half is a register of a pair; a constant has only
    one."""
    if wide:
        part = word if operand.kind != "constant" and operand.count > 1 else 0
        read = source(operand, kind, register(operand, part))
    else:
        read = source(operand, kind, word=word)
    if not negate:
        return read

    def negated(waves: Waves) -> NDArray:
        return -read(waves)

    return negated


def _output_modifiers(
    instruction: Instruction, kind: str, *, clamp: bool
) -> Callable[[NDArray], NDArray] | None:
    """Applies mul:2, mul:4, div:2 and, if `clamp`, the modifier clamp to a float result. None if the
    instruction has none of them."""
    factor = number(instruction, "mul", 1) / number(instruction, "div", 1)
    clamp = clamp and "clamp" in instruction.modifiers
    if (factor != 1 or clamp) and kind not in ("f16", "f32", "f64"):
        raise EmulatorError("an integer result with mul, div or clamp is not emulated")
    if factor == 1 and not clamp:
        return None

    def finish(value: NDArray) -> NDArray:
        if factor != 1:
            value = value * value.dtype.type(factor)
        if clamp:
            value = np.clip(np.where(np.isnan(value), 0, value), 0, 1)  # DX10_CLAMP: NaN becomes 0
        return value

    return finish


def _destination(instruction: Instruction, operand: Operand, kind: str, word: int) -> Writer:
    """Writes bits of a type to a destination. A mask gets 0 for lanes that are not active."""
    index = operand.index
    if kind == "mask":
        if operand.kind != "s":
            raise EmulatorError(f"operand {operand.text!r}: a mask must go to SGPRs")

        def write(waves: Waves, bits: NDArray, mask: NDArray | None) -> None:
            waves.write_s64(index, mask_of(bits & waves.active))

        return write
    if operand.kind == "a" and kind == "u32":

        def write(waves: Waves, bits: NDArray, mask: NDArray | None) -> None:
            np.copyto(waves.agpr[index], bits, where=waves.active)

        return write
    if operand.kind != "v":
        raise EmulatorError(f"operand {operand.text!r}: the result must go to VGPRs")
    if TYPES[kind][1] == 64:

        def write(waves: Waves, bits: NDArray, mask: NDArray | None) -> None:
            waves.write_v(index, (bits & np.uint64(0xFFFFFFFF)).astype(U32), mask)
            waves.write_v(index + 1, (bits >> np.uint64(32)).astype(U32), mask)

        return write
    place = str(instruction.modifiers.get("dst_sel", "WORD_1" if word else "DWORD"))
    if place == "DWORD":
        return lambda waves, bits, mask: waves.write_v(index, bits, mask)
    shift, width = _span(place)
    unused = str(instruction.modifiers.get("dst_unused", "UNUSED_PRESERVE" if word else ""))
    if unused not in ("UNUSED_PRESERVE", "UNUSED_PAD"):
        raise EmulatorError(f"dst_unused:{unused} is not emulated")
    kept = U32(0xFFFFFFFF ^ (width << shift)) if unused == "UNUSED_PRESERVE" else U32(0)

    def write(waves: Waves, bits: NDArray, mask: NDArray | None) -> None:
        inserted = (bits & U32(width)) << U32(shift)
        waves.write_v(index, inserted | (waves.vgpr[index] & kept), mask)

    return write


# ---- SDWA: sub-dword addressing


def _span(selection: str) -> tuple[int, int]:
    """BYTE_n, WORD_n, DWORD -> shift and mask."""
    kind, _, place = selection.partition("_")
    width = {"BYTE": 8, "WORD": 16, "DWORD": 32}[kind]
    return width * int(place or 0), (1 << width) - 1


def _selected(operand: Operand, selection: str) -> Reader:
    """Reads a byte or word of a register, extended to 32 bits with zeros or, in sext(), with its sign."""
    whole = register(operand)
    shift, width = _span(selection)
    sign = U32((width + 1) >> 1)

    def read(waves: Waves) -> NDArray:
        value = (whole(waves) >> U32(shift)) & U32(width)
        return (value ^ sign) - sign if operand.sign_extend else value

    return read


# ---- DPP: data parallel primitives


class Permutation:
    """The lane that each lane of a DPP source comes from, and the lanes that write.

    lanes int [64]: the source of each lane. inside bool [64]: False where it would lie outside of the
    row. writable bool [64]: row_mask and bank_mask. zero_outside: bound_ctrl.
    """

    def __init__(
        self, lanes: NDArray, inside: NDArray, writable: NDArray, *, zero_outside: bool
    ) -> None:
        self.lanes, self.inside = lanes, inside
        self.writable, self.zero_outside = writable, zero_outside

    def valid(self, waves: Waves) -> NDArray:
        """Lanes whose source exists and is active."""
        return self.inside & waves.active[:, self.lanes]

    def writes(self, waves: Waves) -> NDArray:
        """Lanes that get a result. Without bound_ctrl, a lane without a valid source keeps its value."""
        lanes = waves.active & self.writable
        return lanes if self.zero_outside else lanes & self.valid(waves)


def dpp_permutation(instruction: Instruction) -> Permutation:
    """The permutation that the modifiers of a DPP instruction describe. Rows have 16 lanes."""
    place, row = LANE % 16, LANE - LANE % 16
    inside = np.ones(LANES, bool)
    modifiers = instruction.modifiers
    chosen = [name for name in modifiers if name in DPP[:8]]
    if len(chosen) != 1:
        raise EmulatorError("DPP takes exactly one permutation")
    name = chosen[0]
    amount = (
        0 if name in ("quad_perm", "row_mirror", "row_half_mirror") else number(instruction, name)
    )
    if name == "quad_perm":
        lanes = LANE - LANE % 4 + np.array(bits_list(instruction, name, [0] * 4))[LANE % 4]
    elif name in ("row_shl", "row_shr"):
        moved = place + amount if name == "row_shl" else place - amount
        inside = (moved >= 0) & (moved < 16)
        lanes = row + np.clip(moved, 0, 15)
    elif name == "row_ror":
        lanes = row + (place - amount) % 16
    elif name == "row_newbcast":
        lanes = row + amount
    elif name == "row_bcast" and amount == 15:  # the last lane of each row, to the next row
        inside = row > 0
        lanes = np.maximum(row - 1, 0)
    elif name == "row_bcast" and amount == 31:  # lane 31, to the rows 2 and 3
        inside = row >= 32
        lanes = np.full(LANES, 31)
    elif name == "row_mirror":
        lanes = row + 15 - place
    elif name == "row_half_mirror":
        lanes = LANE - LANE % 8 + 7 - LANE % 8
    else:
        raise EmulatorError(f"DPP {name}:{amount} is not known")
    rows, banks = number(instruction, "row_mask", 15), number(instruction, "bank_mask", 15)
    writable = ((rows >> (LANE // 16)) & 1 & (banks >> (LANE // 4 % 4))).astype(bool)
    # LLVM prints bound_ctrl only where the bit is set, older versions of it as bound_ctrl:0.
    return Permutation(lanes, inside, writable, zero_outside="bound_ctrl" in modifiers)


def _permuted(operand: Operand, permutation: Permutation) -> Reader:
    whole = register(operand)

    def read(waves: Waves) -> NDArray:
        return np.where(permutation.valid(waves), whole(waves)[:, permutation.lanes], U32(0))

    return read
