"""Operands of instructions: from text to functions that read typed values from a batch of waves."""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import EmulatorError, Instruction
from tools.gfx950.waves import EXEC, M0, VCC, Waves, lanes_of

Reader = Callable[[Waves], NDArray]

_NAMED = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "m0": (M0, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
}
_INLINE_FLOATS = ("0.5", "1.0", "2.0", "4.0")
_INVERSE_2PI = re.compile(r"0\.1591549\d*")

# Types of values -> numpy dtype and number of bits. b32: bits whose operand may have a float's modifiers.
# mask: a lane mask in two SGPRs, read as bool.
TYPES: dict[str, tuple[type[np.generic], int]] = {
    "u16": (np.uint16, 16),
    "i16": (np.int16, 16),
    "f16": (np.float16, 16),
    "u32": (np.uint32, 32),
    "i32": (np.int32, 32),
    "f32": (np.float32, 32),
    "b32": (np.uint32, 32),
    "u64": (np.uint64, 64),
    "i64": (np.int64, 64),
    "f64": (np.float64, 64),
    "mask": (np.bool_, 64),
}
_TAKES_SIGNS = ("f16", "f32", "f64", "b32")  # types whose operands may be negated or made absolute


@dataclass(frozen=True)
class Operand:
    """One operand.

    kind: "v", "a", "s": registers index to index + count - 1; "constant": value; "scc"; "off".
    negate, absolute, sign_extend: the source modifiers -x, |x|, sext(x).
    """

    text: str
    kind: str
    index: int = 0
    count: int = 1
    value: int | float = 0
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False

    def constant(self, bits: int) -> int:
        """The constant's bits in a source of 16, 32 or 64 bits; a float is encoded in that width."""
        if isinstance(self.value, float):
            code = {16: "<e", 32: "<f", 64: "<d"}[bits]
            return int.from_bytes(struct.pack(code, self.value), "little")
        return self.value & ((1 << bits) - 1)


@cache
def parse_operand(text: str) -> Operand:
    """One operand as the assembler writes it. EmulatorError if the text is no operand."""
    inner, negate, absolute, sign_extend = text, False, False, False
    if match := re.fullmatch(r"sext\((.+)\)", inner):
        inner, sign_extend = match[1], True
    if match := re.fullmatch(r"neg\((.+)\)|-((?:\||[vsam]).*)", inner):
        inner, negate = match[1] or match[2], True
    if match := re.fullmatch(r"\|(.+)\||abs\((.+)\)", inner):
        inner, absolute = match[1] or match[2], True
    kind, index, count = "constant", 0, 1
    value: int | float = 0
    if match := re.fullmatch(r"([vsa])(?:(\d+)|\[(\d+)(?::(\d+))?\])", inner):
        kind, index = match[1], int(match[2] or match[3])
        count = int(match[4]) - index + 1 if match[4] else 1
    elif inner in _NAMED:
        kind = "s"
        index, count = _NAMED[inner]
    elif inner in ("scc", "src_scc"):
        kind = "scc"
    elif inner == "off":
        kind = "off"
    elif inner.lstrip("-") in _INLINE_FLOATS:
        value = float(inner)
    elif _INVERSE_2PI.fullmatch(inner):
        value = 0.15915494309189532
    elif match := re.fullmatch(r"(?:lit\()?(-?(?:0x[0-9a-fA-F]+|\d+))\)?", inner):
        value = int(match[1], 0)
    else:
        raise EmulatorError(f"operand {text!r} is not known")
    return Operand(text, kind, index, count, value, negate, absolute, sign_extend)


def operands_of(instruction: Instruction, count: int) -> list[Operand]:
    """The instruction's operands, parsed; EmulatorError unless there are `count` of them."""
    if len(instruction.operands) != count:
        raise EmulatorError(f"{len(instruction.operands)} operands, expected {count}")
    return [parse_operand(text) for text in instruction.operands]


def only_modifiers(instruction: Instruction, *known: str) -> None:
    """EmulatorError if the instruction has a modifier that is not `known`, so that none is ignored."""
    for name in instruction.modifiers:
        if name not in known:
            raise EmulatorError(f"modifier {name!r} is not known here")


def number(instruction: Instruction, name: str, default: int = 0) -> int:
    """A modifier's integer, as in offset:16."""
    value = instruction.modifiers.get(name)
    if value is None:
        return default
    try:
        return int(str(value), 0)
    except ValueError:
        raise EmulatorError(f"modifier {name}:{value} is not a number") from None


def bits_list(instruction: Instruction, name: str, default: list[int]) -> list[int]:
    """A modifier's list, as in op_sel:[1,0,0], with zeros appended up to the default's length."""
    value = instruction.modifiers.get(name)
    if value is None:
        return default
    bits = [int(bit) for bit in str(value).strip("[]").split(",")]
    return bits + [0] * (len(default) - len(bits))


def register(operand: Operand, part: int = 0) -> Reader:
    """Reads the 32 bits of one register of an operand (the first plus `part`), or of a constant.

    It returns uint32: [W, 64] from a VGPR, [W, 1] from an SGPR, [1, 1] from a constant. It does not copy.
    """
    index = operand.index + part
    if operand.kind == "v":

        def read(waves: Waves) -> NDArray:
            return waves.vgpr[index]

    elif operand.kind == "a":

        def read(waves: Waves) -> NDArray:
            return waves.agpr[index]

    elif operand.kind == "s":

        def read(waves: Waves) -> NDArray:
            return waves.sgpr[index][:, None]

    elif operand.kind == "scc":

        def read(waves: Waves) -> NDArray:
            return waves.scc[:, None].astype(np.uint32)

    elif operand.kind == "constant":
        value = operand.constant(32) if part == 0 else operand.constant(64) >> 32
        fixed = np.full((1, 1), value, np.uint32)

        def read(waves: Waves) -> NDArray:
            return fixed

    else:
        raise EmulatorError(f"operand {operand.text!r} cannot be read")
    return read


def with_signs(read: Reader, operand: Operand, bits: int) -> Reader:
    """Reads the same bits with the operand's |x| and -x, which change the sign bit alone, even a
    NaN's."""
    if not (operand.absolute or operand.negate):
        return read
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    sign = dtype(1 << (bits - 1))

    def read_with_signs(waves: Waves) -> NDArray:
        value = read(waves)
        if operand.absolute:
            value = value & ~sign
        return value ^ sign if operand.negate else value

    return read_with_signs


def source(operand: Operand, kind: str, base: Reader | None = None, word: int = 0) -> Reader:
    """Reads a vector source as values of a type, [W, 64], [W, 1] or [1, 1].

    kind: one of `TYPES`. base: reads the 32 bits, if they are not simply the operand's register (but a
    permutation of lanes, or a selected byte). word: the half of the register that holds 16 bits.
    """
    dtype, bits = TYPES[kind]
    if (operand.negate or operand.absolute) and kind not in _TAKES_SIGNS:
        raise EmulatorError(f"operand {operand.text!r}: an integer cannot have a float's modifier")
    if kind == "mask":
        if operand.kind != "s":
            raise EmulatorError(f"operand {operand.text!r}: a mask must be in SGPRs")

        def read_mask(waves: Waves) -> NDArray:
            return lanes_of(waves.read_s64(operand.index))

        return read_mask
    read_bits = _unsigned(operand, bits, base, word)
    signed = with_signs(read_bits, operand, bits)
    if kind in ("u16", "u32", "b32", "u64"):  # unsigned already
        return signed

    def read(waves: Waves) -> NDArray:
        return signed(waves).view(dtype)

    return read


def _unsigned(operand: Operand, bits: int, base: Reader | None, word: int) -> Reader:
    """Reads a source of 16, 32 or 64 bits as unsigned numbers. base, word: as in `source`."""
    if operand.kind == "constant":
        dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
        # The upper half of a constant of 16 bits is 0.
        value = 0 if bits == 16 and word else operand.constant(bits)
        fixed = np.full((1, 1), value, dtype)

        def read_constant(waves: Waves) -> NDArray:
            return fixed

        return read_constant
    if bits == 64:
        low, high = register(operand), register(operand, 1)

        def read_pair(waves: Waves) -> NDArray:
            return low(waves).astype(np.uint64) | (high(waves).astype(np.uint64) << np.uint64(32))

        return read_pair
    whole = base or register(operand)
    if bits == 32:
        return whole
    shift = np.uint32(16 * word)

    def read_half(waves: Waves) -> NDArray:
        return (whole(waves) >> shift).astype(np.uint16)

    return read_half


def bits_of(values: NDArray, kind: str) -> NDArray:
    """The bits of results of a type: uint64 for types of 64 bits, bool for a mask, otherwise uint32."""
    dtype, bits = TYPES[kind]
    exact = np.asarray(values).astype(dtype, copy=False)
    if kind in ("mask", "u32", "b32"):
        return exact
    if bits == 64:
        return exact.view(np.uint64)
    if bits == 16:
        return exact.view(np.uint16).astype(np.uint32)
    return exact.view(np.uint32)
