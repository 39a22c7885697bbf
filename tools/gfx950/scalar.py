"""Scalar instructions (SALU, SMEM), which work on one value a wave, in SGPRs, and on SCC."""

import operator
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import EmulatorError, Instruction
from tools.gfx950.effects import LARGEST, counters_of
from tools.gfx950.operands import (
    TYPES,
    Operand,
    Reader,
    bits_of,
    number,
    only_modifiers,
    operands_of,
    register,
)
from tools.gfx950.registry import BUILDERS, SIGNATURES, Action, instruction, parse_signature
from tools.gfx950.vector_ops import (
    add_carry,
    leading_signs,
    leading_zeros,
    multiply_high,
    reverse_bits,
    subtract_borrow,
    trailing_zeros,
)
from tools.gfx950.waves import EXEC, Waves

U32, U64, I32, I64 = np.uint32, np.uint64, np.int32, np.int64


def define(mnemonics: str, signature: str, function: Callable) -> None:
    """Make instructions from a function over waves.

    signature: the types of results and sources in the order of the operands, as in "u32 scc = u32 i64".
    scc is a bool without an operand. A last result `nonzero` does not come from the function: it sets SCC
    to whether the result is not 0. A source +u32 is the old value of the destination.
    """
    results, sources = parse_signature(signature)

    def build(instruction: Instruction) -> Action:
        only_modifiers(instruction)
        written = [kind for kind in results if kind not in ("scc", "nonzero")]
        named = [kind for kind in sources if kind != "scc" and not kind.startswith("+")]
        operands = operands_of(instruction, len(written) + len(named))
        given = iter(operands[len(written) :])
        readers = [
            _read_scc
            if kind == "scc"
            else scalar_source(
                operands[0] if kind.startswith("+") else next(given), kind.lstrip("+")
            )
            for kind in sources
        ]

        def run(waves: Waves) -> None:
            values = function(*[read(waves) for read in readers])
            if not isinstance(values, tuple):
                values = (values,)
            if results[-1] == "nonzero":
                values = (*values, values[0] != 0)
            for kind, value in zip(results, values, strict=True):
                if kind in ("scc", "nonzero"):
                    waves.scc = np.array(np.broadcast_to(value, len(waves)))
                elif TYPES[kind][1] == 64:
                    waves.write_s64(operands[0].index, bits_of(value, kind))
                else:
                    waves.write_s32(operands[0].index, bits_of(value, kind))

        return run

    for mnemonic in mnemonics.split():
        SIGNATURES[mnemonic] = signature
        BUILDERS[mnemonic] = build


def scalar_source(operand: Operand, kind: str) -> Reader:
    """Reads a scalar source as values of a type, [W] or [1]."""
    dtype, bits = TYPES[kind]
    if operand.kind == "constant":
        fixed = np.full(1, operand.constant(bits), U64 if bits == 64 else U32).view(dtype)

        def read(waves: Waves) -> NDArray:
            return fixed

    elif bits == 64:

        def read(waves: Waves) -> NDArray:
            return waves.read_s64(operand.index).view(dtype)

    else:
        whole = register(operand)

        def read(waves: Waves) -> NDArray:
            return whole(waves)[:, 0].view(dtype)

    return read


def _read_scc(waves: Waves) -> NDArray:
    return waves.scc


def short(x: NDArray) -> NDArray:
    """A 16-bit immediate, sign-extended; the assembler may print it with or without a sign."""
    return x.astype(np.int16).astype(I32)


def overflowing(operation: Callable) -> Callable[[NDArray, NDArray], tuple[NDArray, NDArray]]:
    """A signed operation that also gives whether the exact result does not fit into 32 bits."""

    def compute(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
        exact = operation(a.astype(I64), b.astype(I64))
        wrapped = exact.astype(I32)
        return wrapped, wrapped != exact

    return compute


def shift_add(amount: int) -> Callable[[NDArray, NDArray], tuple[NDArray, NDArray]]:
    def compute(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
        exact = (a.astype(U64) << U64(amount)) + b.astype(U64)
        return exact.astype(U32), exact > U64(0xFFFFFFFF)

    return compute


def field(x: NDArray, place: NDArray) -> NDArray:
    """bfe: a field of place[22:16] bits, which begins at bit place[4:0]."""
    start, width = place & U32(31), ((place >> U32(16)) & U32(127)).astype(U64)
    mask = (U64(1) << np.minimum(width, U64(32))) - U64(1)
    return (x.astype(U64) >> start.astype(U64) & mask).astype(U32)


def signed_field(x: NDArray, place: NDArray) -> NDArray:
    start, width = place & U32(31), np.minimum((place >> U32(16)) & U32(127), 32).astype(I64)
    bits = (x >> start.astype(I32)).astype(I64)
    return np.where(width > 0, bits << (I64(64) - width) >> (I64(64) - width), 0).astype(I32)


def wide_signed_field(x: NDArray, place: NDArray) -> NDArray:
    """`signed_field` of 64 bits, whose beginning is place[5:0]."""
    start, width = place & U32(63), np.minimum((place >> U32(16)) & U32(127), 64).astype(I64)
    unused = np.minimum(I64(64) - width, 63)
    return np.where(width > 0, x >> start.astype(I64) << unused >> unused, 0)


def lowest_one(x: NDArray) -> NDArray:
    """The place of the lowest one in 64 bits, -1 if there is none."""
    lowest = x & (U64(0) - x)
    return np.where(x == 0, -1, np.bitwise_count(lowest - U64(1))).astype(I32)


BITWISE: dict[str, Callable] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
for bits in (32, 64):
    kind, shifted = f"u{bits}", U32 if bits == 32 else U64
    for name, function in BITWISE.items():
        define(f"s_{name}_b{bits}", f"{kind} nonzero = {kind} {kind}", function)
    define(f"s_mov_b{bits}", f"{kind} = {kind}", np.array)
    define(f"s_not_b{bits}", f"{kind} nonzero = {kind}", np.invert)
    define(
        f"s_cselect_b{bits}", f"{kind} = {kind} {kind} scc", lambda a, b, scc: np.where(scc, a, b)
    )
    define(f"s_cmov_b{bits}", f"{kind} = {kind} +{kind} scc", lambda a, b, scc: np.where(scc, a, b))
    define(f"s_bcnt1_i32_b{bits}", f"i32 nonzero = {kind}", np.bitwise_count)
    define(f"s_bcnt0_i32_b{bits}", f"i32 nonzero = {kind}", lambda x: np.bitwise_count(~x))
define("s_lshl_b32", "u32 nonzero = u32 u32", lambda x, amount: x << (amount & 31))
define("s_lshr_b32", "u32 nonzero = u32 u32", lambda x, amount: x >> (amount & 31))
define("s_ashr_i32", "i32 nonzero = i32 i32", lambda x, amount: x >> (amount & 31))
define("s_lshl_b64", "u64 nonzero = u64 u32", lambda x, amount: x << (amount & 63).astype(U64))
define("s_lshr_b64", "u64 nonzero = u64 u32", lambda x, amount: x >> (amount & 63).astype(U64))
define("s_ashr_i64", "i64 nonzero = i64 u32", lambda x, amount: x >> (amount & 63).astype(I64))
define("s_bfe_u32", "u32 nonzero = u32 u32", field)
define("s_bfe_i32", "i32 nonzero = i32 u32", signed_field)
define("s_bfe_i64", "i64 nonzero = i64 u32", wide_signed_field)
define("s_bfm_b32", "u32 = u32 u32", lambda a, b: ((U32(1) << (a & 31)) - U32(1)) << (b & 31))
define("s_brev_b32", "u32 = u32", reverse_bits)
define("s_ff1_i32_b32", "i32 = u32", trailing_zeros)
define("s_ff1_i32_b64", "i32 = u64", lowest_one)
define("s_flbit_i32_b32", "i32 = u32", leading_zeros)
define("s_flbit_i32", "i32 = i32", leading_signs)
define("s_sext_i32_i16", "i32 = i32", short)
define("s_sext_i32_i8", "i32 = i32", lambda x: x.astype(np.int8).astype(I32))
define("s_pack_ll_b32_b16", "u32 = u32 u32", lambda a, b: (a & 0xFFFF) | (b << U32(16)))
define("s_pack_lh_b32_b16", "u32 = u32 u32", lambda a, b: (a & 0xFFFF) | (b & U32(0xFFFF0000)))
define("s_pack_hh_b32_b16", "u32 = u32 u32", lambda a, b: (a >> U32(16)) | (b & U32(0xFFFF0000)))
define("s_bitset0_b32", "u32 = u32 +u32", lambda place, x: x & ~(U32(1) << (place & 31)))
define("s_bitset1_b32", "u32 = u32 +u32", lambda place, x: x | (U32(1) << (place & 31)))
define("s_bitcmp0_b32", "scc = u32 u32", lambda x, place: (x >> (place & 31)) & 1 == 0)
define("s_bitcmp1_b32", "scc = u32 u32", lambda x, place: (x >> (place & 31)) & 1 == 1)

define("s_add_u32", "u32 scc = u32 u32", add_carry)
define("s_addc_u32", "u32 scc = u32 u32 scc", add_carry)
define("s_sub_u32", "u32 scc = u32 u32", subtract_borrow)
define("s_subb_u32", "u32 scc = u32 u32 scc", subtract_borrow)
define("s_add_i32", "i32 scc = i32 i32", overflowing(operator.add))
define("s_sub_i32", "i32 scc = i32 i32", overflowing(operator.sub))
define("s_mul_i32", "i32 = i32 i32", operator.mul)
define("s_mul_hi_u32", "u32 = u32 u32", multiply_high)
define("s_mul_hi_i32", "i32 = i32 i32", multiply_high)
define("s_abs_i32", "i32 nonzero = i32", np.abs)
define("s_absdiff_i32", "i32 nonzero = i32 i32", lambda a, b: np.abs(a - b))
for kind in ("i32", "u32"):
    both = f"{kind} scc = {kind} {kind}"
    define(f"s_min_{kind}", both, lambda a, b: (np.minimum(a, b), a < b))
    define(f"s_max_{kind}", both, lambda a, b: (np.maximum(a, b), a >= b))
for amount in (1, 2, 3, 4):
    define(f"s_lshl{amount}_add_u32", "u32 scc = u32 u32", shift_add(amount))

define("s_movk_i32", "i32 = i32", short)
define("s_cmovk_i32", "i32 = i32 +i32 scc", lambda k, old, scc: np.where(scc, short(k), old))
define("s_addk_i32", "i32 scc = i32 +i32", lambda k, x: overflowing(operator.add)(x, short(k)))
define("s_mulk_i32", "i32 = i32 +i32", lambda k, x: x * short(k))

COMPARISONS: dict[str, Callable] = {
    "eq": operator.eq,
    "lg": operator.ne,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
}


def against_short(compare: Callable) -> Callable[[NDArray, NDArray], NDArray]:
    def compare_short(a: NDArray, k: NDArray) -> NDArray:
        return compare(a, short(k) if a.dtype == I32 else k & U32(0xFFFF))

    return compare_short


for name, compare in COMPARISONS.items():
    for kind in ("i32", "u32"):
        define(f"s_cmp_{name}_{kind}", f"scc = {kind} {kind}", compare)
        define(f"s_cmpk_{name}_{kind}", f"scc = {kind} {kind}", against_short(compare))
define("s_cmp_eq_u64", "scc = u64 u64", operator.eq)
define("s_cmp_lg_u64", "scc = u64 u64", operator.ne)


@instruction(*[f"s_{name}_saveexec_b64" for name in BITWISE])
def save_exec(ins: Instruction) -> Action:
    """Copy EXEC to the destination, then combine EXEC with the source."""
    only_modifiers(ins)
    destination, mask = operands_of(ins, 2)
    combine = BITWISE[ins.mnemonic.split("_")[1]]
    read = scalar_source(mask, "u64")

    def run(waves: Waves) -> None:
        old = waves.read_s64(EXEC)
        new = combine(read(waves), old)
        waves.write_s64(destination.index, old)
        waves.write_s64(EXEC, new)
        waves.scc = new != 0

    return run


WIDTHS = {"": 1, "x2": 2, "x4": 4, "x8": 8, "x16": 16}


@instruction(*[f"s_load_dword{width}" for width in WIDTHS])
@instruction(*[f"s_buffer_load_dword{width}" for width in WIDTHS])
def load(ins: Instruction) -> Action:
    """Load consecutive dwords to SGPRs. The base is a pointer, or a buffer's descriptor."""
    only_modifiers(ins, "offset", "glc")
    destination, base, offset = operands_of(ins, 3)
    count = WIDTHS[ins.mnemonic.partition("dword")[2]]
    immediate = U64(number(ins, "offset"))
    read_offset = scalar_source(offset, "u32")
    is_buffer = "buffer" in ins.mnemonic
    # In a descriptor, the stride follows after 48 bits of address, and then the number of bytes.
    address_bits = U64(0xFFFFFFFFFFFF if is_buffer else 0xFFFFFFFFFFFFFFFF)

    def run(waves: Waves) -> None:
        start = waves.read_s64(base.index) & address_bits
        place = read_offset(waves).astype(U64) + immediate
        if is_buffer and (place + U64(4 * count) > waves.sgpr[base.index + 2].astype(U64)).any():
            raise EmulatorError("a scalar load beyond the end of its buffer is not emulated")
        addresses = start + place
        dwords = waves.memory.read(addresses & ~U64(3), 4 * count).view(U32)
        for i in range(count):
            waves.write_s32(destination.index + i, dwords[:, i])

    return run


@instruction(
    *["s_nop", "s_sleep", "s_setprio", "s_waitcnt_depctr", "s_sched_barrier"],
    *["s_setreg_imm32_b32", "s_setreg_b32", "s_dcache_wb", "s_dcache_inv", "s_icache_inv"],
    *["buffer_wbl2", "buffer_inv"],
)
def nothing(ins: Instruction) -> Action:
    """Do nothing. Time, hazards, caches and modes are not emulated: every instruction completes before
    the next one."""

    def run(waves: Waves) -> None:
        pass

    return run


@instruction("s_waitcnt")
def wait(ins: Instruction) -> Action:
    """Wait for loads to the LDS. For registers, `waits` reads the text once."""
    left = counters_of(ins).get("vmcnt", LARGEST["vmcnt"])

    def run(waves: Waves) -> None:
        if waves.lds.arrivals is not None and left < LARGEST["vmcnt"]:
            waves.lds.arrivals.wait(waves, left)

    return run
