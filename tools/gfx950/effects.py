"""Finds which registers an instruction reads and writes, and which counter reports its end.

`waits` and `unwritten` use it to follow registers through a kernel. The order of operands is the
assembler's. Their types come from `registry.SIGNATURES`, if an instruction is listed there.
"""

import re
from dataclasses import dataclass

from tools.gfx950.assembly import EmulatorError, Instruction
from tools.gfx950.operands import TYPES, Operand, bits_list, parse_operand
from tools.gfx950.registry import SIGNATURES, parse_signature, plain
from tools.gfx950.waves import EXEC, M0, VCC

# A set of registers is an int with a bit for each: VGPRs from 0 on, then AGPRs, SGPRs and SCC.
BANKS = {"v": 0, "a": 512, "s": 1024}
SCC = 1 << (BANKS["s"] + 128)
SCALARS = SCC | ((1 << 128) - 1) << BANKS["s"]
NAMES = {VCC: "vcc_lo", VCC + 1: "vcc_hi", M0: "m0", EXEC: "exec_lo", EXEC + 1: "exec_hi"}

# Two more members of these sets: accesses of the LDS that have not ended, and a write-back of the caches.
LDS, WRITE_BACK = 1 << 2000, 1 << 2001

# The counter of the instructions of each unit. It counts them until they end.
COUNTERS = {"vector": "vmcnt", "lds": "lgkmcnt", "scalar": "lgkmcnt"}
# The largest values of the counters. A wait for such a value does not wait at all.
LARGEST = {"vmcnt": 63, "lgkmcnt": 15}

_RESULTLESS = re.compile(
    r"(global|buffer)_store|ds_write|s_(nop|sleep|setprio|waitcnt|sched_barrier|setreg|dcache|icache)"
    r"|s_(branch|cbranch|barrier|endpgm)|buffer_(wbl2|inv)|(global|buffer)_load_lds"
)
_SWAPS = ("v_swap_b32", "v_permlane16_swap_b32", "v_permlane32_swap_b32")
_HALF_WRITTEN = re.compile(r"v_fma_mix(lo|hi)|v_cvt_(scalef32_)?pk_(fp8|bf8|fp4)_")


@dataclass(frozen=True)
class Effects:
    """The effects of an instruction on registers and memory.

    reads, writes: sets of registers.
    kept: the registers of `writes` that keep a part of their bits, or all bits in some lanes. Keeping
        them does not count as a read.
    passed: registers of `reads` that only affect `onto`, a part of `writes`. The compiler leaves them
        unwritten if it does not use that part.
    unit: "vector", "lds" or "scalar" for an instruction that is counted until it ends, otherwise "".
    starts: LDS or WRITE_BACK, if the instruction starts such an operation.
    ended: LDS or WRITE_BACK, if such operations must have ended before the instruction.
    stores: whether it stores to global memory and is no atomic.
    lds: its access of the LDS: "read", "write", "load" (from global memory to the LDS) or "".
    lanes: the lanes of a vector instruction: "active", "all" (independent of EXEC), "first" (the first
        active one) or "one" (an operand has its number).
    """

    reads: int
    writes: int
    kept: int = 0
    passed: int = 0
    onto: int = 0
    unit: str = ""
    starts: int = 0
    ended: int = 0
    stores: bool = False
    lds: str = ""
    lanes: str = "active"


def effects(instruction: Instruction) -> Effects:
    """The effects of an instruction that the emulator knows."""
    mnemonic = plain(instruction.mnemonic)
    operands = _parsed(instruction)
    count = _results(mnemonic, instruction)
    results, sources = operands[:count], operands[count:]
    writes = _all(results)
    reads = _read_of_pairs(mnemonic, instruction, sources)
    if reads is None:
        reads = _all(sources)
    kept = 0
    if mnemonic in SIGNATURES:
        written, read = parse_signature(SIGNATURES[mnemonic])
        if any(kind.startswith("+") for kind in read):
            reads |= writes
        reads |= SCC * ("scc" in read)
        writes |= SCC * (written[-1] in ("scc", "nonzero"))
        upper_half = bits_list(instruction, "op_sel", [0] * (len(read) + 1))[len(read)]
        if TYPES.get(written[0], (None, 0))[1] == 16 and upper_half:
            kept = writes
    if mnemonic in _SWAPS:
        reads |= writes
    elif _HALF_WRITTEN.match(mnemonic) or "_d16" in mnemonic or _keeps_a_part(instruction):
        kept = _all(results)
    elif "_atomic_" in mnemonic and mnemonic.startswith("buffer_"):
        reads |= register_set(operands[0])
        writes = _returned(mnemonic, results)
    elif "_atomic_" in mnemonic:
        writes = _returned(mnemonic, results)
    elif mnemonic.startswith("v_cmpx"):
        writes |= _register(EXEC, 2)
    elif mnemonic == "v_div_fmas_f32":
        reads |= _register(VCC, 2)
    elif "_saveexec_" in mnemonic:
        reads |= _register(EXEC, 2)
        writes |= _register(EXEC, 2) | SCC
    elif mnemonic.startswith("s_cbranch_vcc"):
        reads |= _register(VCC, 2)
    elif mnemonic.startswith("s_cbranch_scc"):
        reads |= SCC
    lds = _lds(mnemonic, instruction)
    if lds == "load":
        reads |= _register(M0, 1)
    if mnemonic == "v_writelane_b32":
        kept = writes
    lanes = "active"
    if mnemonic in ("v_readlane_b32", "v_writelane_b32"):
        lanes = "one"
    elif mnemonic == "v_readfirstlane_b32":
        lanes = "first"
    elif mnemonic.startswith("v_mfma") or mnemonic in _SWAPS[1:]:
        lanes = "all"
    passed, onto = _upper_half(mnemonic, operands)
    starts = LDS * (lds in ("read", "write")) | WRITE_BACK * (mnemonic == "buffer_wbl2")
    stores = mnemonic.startswith(("global_store", "buffer_store"))
    ended = LDS * (mnemonic == "s_barrier") | WRITE_BACK * (stores or "_atomic_" in mnemonic)
    unit = _unit(mnemonic)
    return Effects(reads, writes, kept, passed, onto, unit, starts, ended, stores, lds, lanes)


def names_of(registers: int) -> list[str]:
    """The names of a set of registers, as the assembler writes them."""
    found = ["scc"] if registers & SCC else []
    for letter, first in BANKS.items():
        for index in range(512 if letter != "s" else 128):
            if registers >> (first + index) & 1:
                named = NAMES.get(index) if letter == "s" else None
                found.append(named or f"{letter}{index}")
    return found


def counters_of(instruction: Instruction) -> dict[str, int]:
    """The counters that an s_waitcnt waits for, and the value of each at which the wait ends.
    EmulatorError if the instruction cannot be read."""
    found: dict[str, int] = {}
    for text in instruction.operands:
        if named := re.fullmatch(r"(vmcnt|lgkmcnt|expcnt)\((\d+)\)", text):
            found[named[1]] = int(named[2])
        elif re.fullmatch(r"0x[0-9a-fA-F]+|\d+", text):
            bits = int(text, 0)
            found = {"vmcnt": bits & 15 | bits >> 10 & 48, "expcnt": bits >> 4 & 7}
            found["lgkmcnt"] = bits >> 8 & 15
        else:
            raise EmulatorError(f"{text!r} is none of vmcnt(n), lgkmcnt(n), expcnt(n) or a number")
    return found


def register_set(operand: Operand) -> int:
    """The registers of an operand as a set; constants have none."""
    if operand.kind == "scc":
        return SCC
    if operand.kind not in BANKS:
        return 0
    return ((1 << operand.count) - 1) << (BANKS[operand.kind] + operand.index)


def _all(operands: list[Operand]) -> int:
    found = 0
    for operand in operands:
        found |= register_set(operand)
    return found


def _register(index: int, count: int) -> int:
    """The set of `count` SGPRs from `index` on."""
    return ((1 << count) - 1) << (BANKS["s"] + index)


def _parsed(instruction: Instruction) -> list[Operand]:
    """The operands, without labels, counters and names of hardware registers."""
    found: list[Operand] = []
    for text in instruction.operands:
        try:
            found.append(parse_operand(text))
        except EmulatorError:
            continue
    return found


def _results(mnemonic: str, instruction: Instruction) -> int:
    """The number of operands that an instruction writes. They are the first ones."""
    if mnemonic in SIGNATURES:
        written, _ = parse_signature(SIGNATURES[mnemonic])
        return sum(kind not in ("scc", "nonzero") for kind in written)
    if _RESULTLESS.match(mnemonic) or "lds" in instruction.modifiers:
        return 0
    if mnemonic in _SWAPS:
        return 2
    if "_atomic_" in mnemonic:
        return int("sc0" in instruction.modifiers)
    return 1


def _returned(mnemonic: str, results: list[Operand]) -> int:
    """The registers that an atomic returns the old value in. In a buffer_atomic_cmpswap they are the
    first half of the operand, which also has the value to compare with."""
    if not results or not mnemonic.startswith("buffer_atomic_cmpswap"):
        return _all(results)
    (result,) = results
    first = BANKS[result.kind] + result.index
    return ((1 << result.count // 2) - 1) << first


def _read_of_pairs(mnemonic: str, instruction: Instruction, sources: list[Operand]) -> int | None:
    """The registers that a packed instruction on pairs of registers reads. None for other
    instructions."""
    if mnemonic == "v_pk_mov_b32":
        chosen = [[part] for part in bits_list(instruction, "op_sel", [0, 0])]
    elif re.fullmatch(r"v_pk_\w+_f32", mnemonic):
        low = bits_list(instruction, "op_sel", [0] * len(sources))
        high = bits_list(instruction, "op_sel_hi", [1] * len(sources))
        chosen = [list(both) for both in zip(low, high, strict=True)]
    else:
        return None
    found = 0
    for operand, parts in zip(sources, chosen, strict=True):
        for part in parts if operand.count > 1 else [0]:
            if operand.kind in BANKS:
                found |= 1 << (BANKS[operand.kind] + operand.index + part)
    return found


def _keeps_a_part(instruction: Instruction) -> bool:
    """Whether SDWA writes a part of its destination, or DPP only some lanes."""
    modifiers = instruction.modifiers
    if instruction.mnemonic.endswith("_sdwa"):
        whole = str(modifiers.get("dst_sel", "DWORD")) == "DWORD"
        return not whole and modifiers.get("dst_unused") == "UNUSED_PRESERVE"
    if instruction.mnemonic.endswith("_dpp"):
        masks = (str(modifiers.get(name, "0xf")) for name in ("row_mask", "bank_mask"))
        return "bound_ctrl" not in modifiers or any(int(mask, 0) != 15 for mask in masks)
    return False


def _upper_half(mnemonic: str, operands: list[Operand]) -> tuple[int, int]:
    """The upper half of the 64 bits that a multiplication adds, and the results that depend on it. No
    registers for other instructions."""
    if mnemonic not in ("v_mad_u64_u32", "v_mad_i64_i32") or operands[4].kind != "v":
        return 0, 0
    destination, carry, *factors, added = operands
    upper = register_set(added) & ~(1 << added.index)
    dependent = register_set(destination) & ~(1 << destination.index) | register_set(carry)
    return (0, 0) if upper & _all(factors) else (upper, dependent)


def _unit(mnemonic: str) -> str:
    if mnemonic.startswith("ds_"):
        return "lds"
    if mnemonic.startswith(("s_load_", "s_buffer_load_", "s_dcache_")):
        return "scalar"
    # An invalidation of caches is not counted, but a write-back is.
    if mnemonic.startswith(("global_", "buffer_")) and mnemonic != "buffer_inv":
        return "vector"
    return ""


def _lds(mnemonic: str, instruction: Instruction) -> str:
    if "_load_lds_" in mnemonic or "lds" in instruction.modifiers:
        return "load"
    # The permutations of lanes go through the LDS's unit, but not through its memory.
    return {"ds_read": "read", "ds_writ": "write"}.get(mnemonic[:7], "")
