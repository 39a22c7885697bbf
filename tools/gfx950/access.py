"""Vector instructions that access memory: global and buffer loads, stores and atomics, and LDS."""

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import EmulatorError, Instruction
from tools.gfx950.formats import bf16_to_f32, f32_to_bf16
from tools.gfx950.operands import (
    Operand,
    number,
    only_modifiers,
    operands_of,
    parse_operand,
    register,
    source,
)
from tools.gfx950.registry import Action, instruction
from tools.gfx950.waves import LANES, M0, Waves, spread

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
# These have no effect here, except that sc0 makes an atomic return the old value.
CACHE_POLICY = ("sc0", "sc1", "nt")

# The last part of a mnemonic -> size in bytes, and whether a load extends the sign.
SIZES = {
    "ubyte": (1, False),
    "byte": (1, False),
    "sbyte": (1, True),
    "ushort": (2, False),
    "short": (2, False),
    "sshort": (2, True),
    "dword": (4, False),
    "dwordx2": (8, False),
    "dwordx3": (12, False),
    "dwordx4": (16, False),
}
LOADED = ("ubyte", "sbyte", "ushort", "sshort", "dword", "dwordx2", "dwordx3", "dwordx4")
STORED = ("byte", "short", "dword", "dwordx2", "dwordx3", "dwordx4")
# Addresses [W, 64], and which lanes lie within the buffer (the others load 0 and store nothing).
Addresses = Callable[[Waves], tuple[NDArray[np.uint64], NDArray[np.bool_]]]


# ---- registers <-> bytes of the active lanes


def chosen_lanes(values: NDArray, waves: Waves, lanes: NDArray) -> NDArray:
    """The values [n] of the n lanes that are True in lanes, both [W, 64]. It may be a view."""
    return values.reshape(-1) if lanes is waves.active and waves.all_active else values[lanes]


def to_registers(
    waves: Waves, destination: Operand, data: NDArray, lanes: NDArray, first: int = 0
) -> None:
    """Write data, uint8 [n, 4 * k], into k registers of the n lanes that are True in lanes [W, 64].

    first: the number of the operand's registers that are skipped.
    """
    bank = waves.agpr if destination.kind == "a" else waves.vgpr
    dwords = np.ascontiguousarray(data).view(U32)
    whole = waves.all_active and len(dwords) == lanes.size
    for i in range(dwords.shape[1]):
        target = bank[destination.index + first + i]
        if whole:
            target[...] = dwords[:, i].reshape(target.shape)
        else:
            target[lanes] = dwords[:, i]


def from_registers(waves: Waves, operand: Operand, size: int, lanes: NDArray) -> NDArray[np.uint8]:
    """The first `size` bytes of an operand's registers, uint8 [n, size]."""
    bank = waves.agpr if operand.kind == "a" else waves.vgpr
    count = (size + 3) // 4
    parts = [chosen_lanes(bank[operand.index + i], waves, lanes) for i in range(count)]
    dwords = np.stack(parts, axis=1)
    return dwords.view(U8)[:, :size]


def to_part(
    waves: Waves, destination: Operand, data: NDArray, lanes: NDArray, signed: bool, half: str
) -> None:
    """Write one or two bytes a lane, uint8 [n, size], into a register: extended to 32 bits, or into one
    half of it ("low" or "high"); the other half stays."""
    size = data.shape[1]
    value = np.ascontiguousarray(data).view(U8 if size == 1 else U16)[:, 0].astype(U32)
    if signed:
        sign = U32(1 << (8 * size - 1))
        value = (value ^ sign) - sign
    target = waves.vgpr[destination.index]
    if half == "low":
        value = (target[lanes] & U32(0xFFFF0000)) | (value & U32(0xFFFF))
    elif half == "high":
        value = (target[lanes] & U32(0xFFFF)) | (value << U32(16))
    target[lanes] = value


def _half(ins: Instruction) -> str:
    """The half of the register that a D16 instruction accesses; "" for other instructions."""
    if ins.mnemonic.endswith("_d16_hi"):
        return "high"
    return "low" if ins.mnemonic.endswith("_d16") else ""


# ---- addresses


def buffer_addresses(
    ins: Instruction, address: Operand, words: Operand, scalar: Operand
) -> Addresses:
    """The descriptor's base plus all offsets. A lane is outside of the buffer if the sum of its offsets
    is not below the descriptor's number of bytes."""
    if "idxen" in ins.modifiers:
        raise EmulatorError("idxen is not emulated")
    immediate = U64(number(ins, "offset"))
    by_lane = register(address) if "offen" in ins.modifiers else None
    read_scalar = register(scalar)

    def compute(waves: Waves) -> tuple[NDArray, NDArray]:
        first, second, size = (waves.sgpr[words.index + i] for i in range(3))
        if (second >> U32(16) & U32(0x3FFF)).any():
            raise EmulatorError("a buffer with a stride is not emulated")
        base = first.astype(U64) | (second & U32(0xFFFF)).astype(U64) << U64(32)
        offset = read_scalar(waves).astype(U64) + immediate  # of 33 bits at most
        if by_lane is not None:
            offset = offset + by_lane(waves)
        offset = spread(offset, waves)
        within = offset < size.astype(U64)[:, None]
        return base[:, None] + offset, within

    return compute


def global_addresses(ins: Instruction, address: Operand, base: Operand) -> Addresses:
    """A pointer in two VGPRs, or a base in two SGPRs plus an unsigned offset of 32 bits in a VGPR."""
    immediate = np.int64(number(ins, "offset")).astype(U64)  # may be negative: modulo 2**64
    wide = source(address, "u64") if base.kind == "off" else None
    narrow = register(address)

    def compute(waves: Waves) -> tuple[NDArray, NDArray]:
        if wide is not None:
            start = wide(waves)
        else:
            start = waves.read_s64(base.index)[:, None] + narrow(waves).astype(U64)
        addresses = spread(start + immediate, waves)
        return addresses, np.ones((len(waves), LANES), bool)

    return compute


def _operands(ins: Instruction, *, data: str) -> tuple[list[Operand], Addresses]:
    """The operands that are not the address, and the address.

    data: where the other operands of a global instruction stand: "first", before the address (loads);
    "second", after it (stores, and atomics that return nothing); "both" (atomics that return); "none"
    (loads to the LDS). In a buffer instruction they are always first.
    """
    operands = [parse_operand(text) for text in ins.operands]
    if ins.mnemonic.startswith("buffer_"):
        expected = 3 if data == "none" else 4
        if len(operands) != expected:
            raise EmulatorError(f"{len(operands)} operands, expected {expected}")
        address, words, scalar = operands[-3:]
        return operands[:-3], buffer_addresses(ins, address, words, scalar)
    expected = {"first": 3, "second": 3, "none": 2, "both": 4}[data]
    if len(operands) != expected:
        raise EmulatorError(f"{len(operands)} operands, expected {expected}")
    place = 1 if data in ("first", "both") else 0
    address, base = operands.pop(place), operands.pop()
    return operands, global_addresses(ins, address, base)


# ---- global memory


@instruction(
    *[f"{space}_load_{size}" for space in ("global", "buffer") for size in LOADED],
    *[
        f"{space}_load_{size}_d16{hi}"
        for space in ("global", "buffer")
        for size in ("ubyte", "sbyte", "short")
        for hi in ("", "_hi")
    ],
    *[f"global_load_lds_{size}" for size in ("dword", "dwordx3", "dwordx4")],
)
def load(ins: Instruction) -> Action:
    """Load to VGPRs, or to the LDS where the mnemonic or a modifier says lds."""
    only_modifiers(ins, "offset", "offen", "idxen", "lds", *CACHE_POLICY)
    size, signed = SIZES[ins.mnemonic.removesuffix("_hi").removesuffix("_d16").rpartition("_")[2]]
    if "lds" in ins.modifiers or "_lds_" in ins.mnemonic:
        return _load_to_lds(ins, size)
    (destination,), addresses = _operands(ins, data="first")
    half = _half(ins)

    def run(waves: Waves) -> None:
        data, lanes = _fetch(waves, addresses, size)
        if size < 4:
            to_part(waves, destination, data, lanes, signed, half)
        else:
            to_registers(waves, destination, data, lanes)

    return run


def _fetch(waves: Waves, addresses: Addresses, size: int) -> tuple[NDArray, NDArray]:
    """The bytes that the active lanes load, uint8 [n, size], and a mask of these lanes [W, 64]. A lane
    that is outside of its buffer loads 0."""
    where, within = addresses(waves)
    lanes = waves.active
    reads = chosen_lanes(within, waves, lanes)
    if reads.all():
        return waves.memory.read(chosen_lanes(where, waves, lanes), size), lanes
    data = np.zeros((len(reads), size), U8)
    data[reads] = waves.memory.read(where[lanes][reads], size)
    return data, lanes


def _load_to_lds(ins: Instruction, size: int) -> Action:
    """Load to the LDS: the lanes' data are stored one after another, beginning at M0 plus the
    instruction's offset."""
    if size < 4:
        raise EmulatorError("loads of less than a dword to the LDS are not emulated")
    _, addresses = _operands(ins, data="none")
    places = U32(number(ins, "offset")) + np.arange(LANES, dtype=U32) * U32(size)

    def run(waves: Waves) -> None:
        data, lanes = _fetch(waves, addresses, size)
        where = waves.sgpr[M0][:, None] + places
        waves.lds.write(*_owners(waves, lanes), where[lanes], data, load=ins)

    return run


@instruction(
    *[f"{space}_store_{size}" for space in ("global", "buffer") for size in STORED],
    *[
        f"{space}_store_{size}_d16_hi"
        for space in ("global", "buffer")
        for size in ("byte", "short")
    ],
)
def store(ins: Instruction) -> Action:
    only_modifiers(ins, "offset", "offen", "idxen", *CACHE_POLICY)
    size, _ = SIZES[ins.mnemonic.removesuffix("_d16_hi").rpartition("_")[2]]
    (value,), addresses = _operands(ins, data="second")
    skip = 2 if _half(ins) == "high" else 0

    def run(waves: Waves) -> None:
        where, within = addresses(waves)
        lanes = waves.active & within
        data = from_registers(waves, value, skip + size, lanes)[:, skip:]
        waves.memory.write(where[lanes], data)

    return run


# ---- atomics: lane by lane, in ascending order, each before the next


def _typed(operation: Callable, dtype: type) -> Callable[[NDArray, NDArray], NDArray]:
    """Make an operation on bytes from an operation on values of a type."""

    def apply(old: NDArray, operand: NDArray) -> NDArray:
        value = operation(old.view(dtype), operand.view(dtype)).astype(dtype)
        return value.view(U8)

    return apply


def _compare_and_swap(old: NDArray, operand: NDArray) -> NDArray:
    """The operand is the new value, then the value to compare with."""
    new, expected = np.split(operand, 2)
    return new if np.array_equal(old, expected) else old


def _add_bf16(old: NDArray, operand: NDArray) -> NDArray:
    return f32_to_bf16(bf16_to_f32(old) + bf16_to_f32(operand))


def _wrap_up(old: NDArray, limit: NDArray) -> NDArray:
    return np.where(old >= limit, 0, old + old.dtype.type(1))


def _wrap_down(old: NDArray, limit: NDArray) -> NDArray:
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


def _second(old: NDArray, operand: NDArray) -> NDArray:
    return operand


INTEGER_ATOMICS: dict[str, tuple[Callable, str]] = {
    "swap": (_second, "u"),
    "add": (np.add, "u"),
    "sub": (np.subtract, "u"),
    "smin": (np.minimum, "i"),
    "umin": (np.minimum, "u"),
    "smax": (np.maximum, "i"),
    "umax": (np.maximum, "u"),
    "and": (np.bitwise_and, "u"),
    "or": (np.bitwise_or, "u"),
    "xor": (np.bitwise_xor, "u"),
    "inc": (_wrap_up, "u"),
    "dec": (_wrap_down, "u"),
}
# Name -> size in memory, size of the operand, and the function that gives the new bytes. A sum of floats
# depends on the order of its lanes, which the card does not promise.
ATOMICS: dict[str, tuple[int, int, Callable[[NDArray, NDArray], NDArray]]] = {
    "cmpswap": (4, 8, _compare_and_swap),
    "cmpswap_x2": (8, 16, _compare_and_swap),
    "add_f32": (4, 4, _typed(np.add, np.float32)),
    "pk_add_f16": (4, 4, _typed(np.add, np.float16)),
    "pk_add_bf16": (4, 4, _typed(_add_bf16, U16)),
}
for _name, (_operation, _sign) in INTEGER_ATOMICS.items():
    ATOMICS[_name] = (4, 4, _typed(_operation, U32 if _sign == "u" else np.int32))
    ATOMICS[f"{_name}_x2"] = (8, 8, _typed(_operation, U64 if _sign == "u" else np.int64))


@instruction(*[f"{space}_atomic_{name}" for space in ("global", "buffer") for name in ATOMICS])
def atomic(ins: Instruction) -> Action:
    """Read, combine, write. With sc0 the old value goes to a VGPR: for a buffer, to that of the
    operand."""
    only_modifiers(ins, "offset", "offen", "idxen", *CACHE_POLICY)
    size, operand_size, combine = ATOMICS[ins.mnemonic.partition("_atomic_")[2]]
    returns = "sc0" in ins.modifiers
    is_global = ins.mnemonic.startswith("global_")
    operands, addresses = _operands(ins, data="both" if returns and is_global else "second")
    destination, value = operands[0], operands[-1]

    def run(waves: Waves) -> None:
        where, within = addresses(waves)
        lanes = waves.active & within
        data, places = from_registers(waves, value, operand_size, lanes), where[lanes]
        old = np.empty((len(places), size), U8)
        for i in range(len(places)):
            old[i] = waves.memory.read(places[i : i + 1], size)[0]
            new = combine(old[i].copy(), data[i].copy())
            waves.memory.write(places[i : i + 1], new[None])
        if returns:
            to_registers(waves, destination, old, lanes)

    return run


# ---- LDS

LDS_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "96": 12, "128": 16}
WHOLE = ("b32", "b64", "b96", "b128")
PARTS = ("u8", "i8", "u16", "i16")


def _owners(waves: Waves, lanes: NDArray) -> tuple[NDArray, NDArray]:
    """Workgroup and wave of each of the lanes that are True in lanes [W, 64]."""
    if lanes is waves.active and waves.all_active:
        return np.repeat(waves.workgroup, LANES), np.repeat(waves.wave, LANES)
    rows = np.nonzero(lanes)[0]
    return waves.workgroup[rows], waves.wave[rows]


def _lds_offsets(ins: Instruction, size: int) -> list[U32]:
    """The instruction's offsets in bytes: one, or two, which the text gives in units of an element or of
    64 elements."""
    only_modifiers(ins, "offset", "offset0", "offset1")
    if not re.match(r"ds_(read|write)2", ins.mnemonic):
        return [U32(number(ins, "offset"))]
    unit = size * (64 if "st64" in ins.mnemonic else 1)
    return [U32(number(ins, name) * unit) for name in ("offset0", "offset1")]


@instruction(
    *[f"ds_read_{kind}" for kind in WHOLE + PARTS],
    *[f"ds_read_{kind}_d16{hi}" for kind in ("u8", "i8", "u16") for hi in ("", "_hi")],
    *[f"ds_read2{stride}_{kind}" for stride in ("", "st64") for kind in ("b32", "b64")],
)
def lds_read(ins: Instruction) -> Action:
    kind = ins.mnemonic.removesuffix("_hi").removesuffix("_d16").rpartition("_")[2]
    size, signed, half = LDS_SIZES[kind[1:]], kind[0] == "i", _half(ins)
    offsets = _lds_offsets(ins, size)
    destination, address = operands_of(ins, 2)
    read_address = register(address)

    def run(waves: Waves) -> None:
        lanes = waves.active
        where = chosen_lanes(spread(read_address(waves), waves), waves, lanes)
        owners = _owners(waves, lanes)
        found = [waves.lds.read(*owners, where + offset, size) for offset in offsets]
        if size < 4:
            to_part(waves, destination, found[0], lanes, signed, half)
            return
        for i, data in enumerate(found):
            to_registers(waves, destination, data, lanes, first=i * size // 4)

    return run


@instruction(
    *[f"ds_write_{kind}" for kind in (*WHOLE, "b8", "b16", "b8_d16_hi", "b16_d16_hi")],
    *[f"ds_write2{stride}_{kind}" for stride in ("", "st64") for kind in ("b32", "b64")],
)
def lds_write(ins: Instruction) -> Action:
    kind = ins.mnemonic.removesuffix("_d16_hi").rpartition("_")[2]
    size, skip = LDS_SIZES[kind[1:]], 2 if _half(ins) == "high" else 0
    offsets = _lds_offsets(ins, size)
    address, *values = operands_of(ins, 1 + len(offsets))
    read_address = register(address)

    def run(waves: Waves) -> None:
        lanes = waves.active
        where = chosen_lanes(spread(read_address(waves), waves), waves, lanes)
        owners = _owners(waves, lanes)
        for value, offset in zip(values, offsets, strict=True):
            data = from_registers(waves, value, skip + size, lanes)[:, skip:]
            waves.lds.write(*owners, where + offset, data)

    return run


@instruction("ds_read_b64_tr_b16", "ds_read_b64_tr_b8")
def lds_read_transposed(ins: Instruction) -> Action:
    """Every 16 lanes read a matrix of 16 columns row by row, 8 bytes a lane; then lane i gets column i.

    The matrix has 4 rows of 16-bit values, which 4 lanes a row read, or 8 rows of 8-bit values, which 2
    lanes a row read.
    """
    only_modifiers(ins, "offset")
    destination, address = operands_of(ins, 2)
    offset = U32(number(ins, "offset"))
    read_address = register(address)
    dtype, count = (U16, 4) if ins.mnemonic.endswith("b16") else (U8, 8)

    def run(waves: Waves) -> None:
        if not waves.all_active:
            raise EmulatorError("a transposing load with inactive lanes is not emulated")
        where = spread(read_address(waves), waves).reshape(-1)
        data = waves.lds.read(*_owners(waves, waves.active), where + offset, 8)
        rows = data.view(dtype).reshape(-1, count, 16)  # (16 lanes of a wave), row, column
        columns = np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(-1, count)
        to_registers(waves, destination, columns.view(U8), waves.active)

    return run
