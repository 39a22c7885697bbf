"""Vector instructions that `vector.define` cannot express: they need other lanes, VCC or a table, or have
operands of mixed types."""

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import EmulatorError, Instruction
from tools.gfx950.formats import bf16_to_f32, f16_to_f32
from tools.gfx950.operands import (
    bits_list,
    number,
    only_modifiers,
    operands_of,
    register,
    source,
    with_signs,
)
from tools.gfx950.registry import Action, instruction
from tools.gfx950.vector_converts import dot2
from tools.gfx950.vector_ops import div_fmas, fma
from tools.gfx950.waves import LANES, VCC, Waves, lanes_of

U32 = np.uint32
LANE = np.arange(LANES)


@instruction("v_readfirstlane_b32")
def read_first_lane(ins: Instruction) -> Action:
    """Read the value of the lowest active lane, or of lane 0 if none is active."""
    only_modifiers(ins)
    destination, value = operands_of(ins, 2)
    read = register(value)

    def run(waves: Waves) -> None:
        first = np.argmax(waves.active, axis=1)
        waves.write_s32(destination.index, _lanes(read(waves), waves)[np.arange(len(waves)), first])

    return run


@instruction("v_readlane_b32")
def read_lane(ins: Instruction) -> Action:
    only_modifiers(ins)
    destination, value, lane = operands_of(ins, 3)
    read, read_lane = register(value), register(lane)

    def run(waves: Waves) -> None:
        chosen = np.broadcast_to(read_lane(waves)[:, 0] & U32(63), len(waves))
        waves.write_s32(
            destination.index, _lanes(read(waves), waves)[np.arange(len(waves)), chosen]
        )

    return run


@instruction("v_writelane_b32")
def write_lane(ins: Instruction) -> Action:
    """Write one lane, whether it is active or not."""
    only_modifiers(ins)
    destination, value, lane = operands_of(ins, 3)
    read, read_lane = register(value), register(lane)

    def run(waves: Waves) -> None:
        chosen = np.broadcast_to(read_lane(waves)[:, 0] & U32(63), len(waves))
        waves.vgpr[destination.index][np.arange(len(waves)), chosen] = read(waves)[:, 0]

    return run


@instruction("v_mbcnt_lo_u32_b32", "v_mbcnt_hi_u32_b32")
def count_lanes_below(ins: Instruction) -> Action:
    """Count the ones in the low (or high) half of a mask at lanes below this one, and add a number."""
    only_modifiers(ins)
    destination, mask, start = operands_of(ins, 3)
    first = 32 if ins.mnemonic.startswith("v_mbcnt_hi") else 0
    below = [(1 << int(np.clip(lane - first, 0, 32))) - 1 for lane in LANE]
    table = np.array(below, np.uint32)
    read_mask, read_start = register(mask), register(start)

    def run(waves: Waves) -> None:
        count = np.bitwise_count(read_mask(waves) & table).astype(U32)
        waves.write_v(destination.index, count + read_start(waves))

    return run


@instruction("v_permlane16_swap_b32", "v_permlane32_swap_b32")
def swap_lanes(ins: Instruction) -> Action:
    """Swap the upper half of the first register with the lower half of the second, in the whole wave (32)
    or in each half of it (16)."""
    only_modifiers(ins)
    first, second = operands_of(ins, 2)
    size = 16 if "16" in ins.mnemonic else 32
    lower = LANE[LANE % (2 * size) < size]

    def run(waves: Waves) -> None:
        if not waves.all_active:
            raise EmulatorError("a swap of lanes with inactive lanes is not emulated")
        a, b = waves.vgpr[first.index], waves.vgpr[second.index]
        moved = a[:, lower + size]  # a copy
        a[:, lower + size] = b[:, lower]
        b[:, lower] = moved

    return run


@instruction("v_swap_b32")
def swap(ins: Instruction) -> Action:
    only_modifiers(ins)
    first, second = operands_of(ins, 2)

    def run(waves: Waves) -> None:
        kept = waves.vgpr[first.index].copy()
        waves.write_v(first.index, waves.vgpr[second.index])
        waves.write_v(second.index, kept)

    return run


@instruction("v_div_fmas_f32")
def scaled_fma(ins: Instruction) -> Action:
    """The last step of a division: an fma, which is scaled back in the lanes that VCC names."""
    only_modifiers(ins)
    destination, *sources = operands_of(ins, 4)
    readers = [source(operand, "f32") for operand in sources]

    def run(waves: Waves) -> None:
        scale = lanes_of(waves.read_s64(VCC))
        value = div_fmas(*[read(waves) for read in readers], scale)
        waves.write_v(destination.index, value.view(U32))

    return run


@instruction("v_bitop3_b32", "v_bitop3_b16")
def any_bit_function(ins: Instruction) -> Action:
    """Apply any function of three bits a, b and c: its value is bit 4a + 2b + c of the number bitop3."""
    only_modifiers(ins, "bitop3")
    destination, *sources = operands_of(ins, 4)
    readers = [register(operand) for operand in sources]
    table = number(ins, "bitop3")
    width = U32(0xFFFF if ins.mnemonic.startswith("v_bitop3_b16") else 0xFFFFFFFF)

    def run(waves: Waves) -> None:
        a, b, c = (read(waves) for read in readers)
        result = np.zeros((1, 1), np.uint32)
        for row in range(8):
            if table >> row & 1:
                in_a, in_b, in_c = a if row & 4 else ~a, b if row & 2 else ~b, c if row & 1 else ~c
                result = result | (in_a & in_b & in_c)
        waves.write_v(destination.index, result & width)

    return run


@instruction("v_dot2_f32_bf16", "v_dot2_f32_f16")
def dot_of_pairs(ins: Instruction) -> Action:
    """Compute a.low * b.low + a.high * b.high + c. Modifiers of packed instructions are not emulated."""
    only_modifiers(ins, "op_sel_hi")
    if bits_list(ins, "op_sel_hi", [1, 1, 1])[:2] != [1, 1]:
        raise EmulatorError("op_sel_hi of a dot product is not emulated")
    destination, a, b, c = operands_of(ins, 4)
    read_a, read_b, read_c = source(a, "u32"), source(b, "u32"), source(c, "f32")
    dot = dot2(bf16_to_f32 if "bf16" in ins.mnemonic else f16_to_f32)

    def run(waves: Waves) -> None:
        value = dot(read_a(waves), read_b(waves), read_c(waves))
        waves.write_v(destination.index, value.view(U32))

    return run


@instruction("v_pk_mov_b32")
def move_pair(ins: Instruction) -> Action:
    """Copy a register of each source's pair: op_sel[i] chooses which one becomes register i."""
    only_modifiers(ins, "op_sel", "op_sel_hi")
    destination, *sources = operands_of(ins, 3)
    select = bits_list(ins, "op_sel", [0, 0])
    readers = [
        register(operand, part if operand.count > 1 else 0)
        for operand, part in zip(sources, select, strict=True)
    ]

    def run(waves: Waves) -> None:
        low, high = (np.array(read(waves)) for read in readers)  # copies: the pairs may overlap
        waves.write_v(destination.index, low)
        waves.write_v(destination.index + 1, high)

    return run


@instruction("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16")
def mixed_fma(ins: Instruction) -> Action:
    """An fma in f32. Each source is an f32 or, where op_sel_hi is set, an f16 in half a register."""
    only_modifiers(ins, "op_sel", "op_sel_hi")
    destination, *sources = operands_of(ins, 4)
    halves, is_f16 = bits_list(ins, "op_sel", [0] * 3), bits_list(ins, "op_sel_hi", [0] * 3)
    readers = [
        source(operand, "f16" if narrow else "f32", word=half if narrow else 0)
        for operand, half, narrow in zip(sources, halves, is_f16, strict=True)
    ]

    def run(waves: Waves) -> None:
        value = fma(*[read(waves).astype(np.float32) for read in readers])
        if ins.mnemonic.startswith("v_fma_mix_f32"):
            waves.write_v(destination.index, value.view(U32))
            return
        half = value.astype(np.float16).view(np.uint16).astype(U32)
        old = waves.vgpr[destination.index]
        if ins.mnemonic.startswith("v_fma_mixlo"):
            waves.write_v(destination.index, (old & U32(0xFFFF0000)) | half)
        else:
            waves.write_v(destination.index, (old & U32(0xFFFF)) | (half << U32(16)))

    return run


@instruction("ds_bpermute_b32")
def fetch_from_lane(ins: Instruction) -> Action:
    """Each lane takes the value of the lane at its address / 4; an inactive lane's value counts as 0."""
    only_modifiers(ins, "offset")
    destination, address, value = operands_of(ins, 3)
    offset = U32(number(ins, "offset"))
    read_address, read = register(address), register(value)

    def run(waves: Waves) -> None:
        lanes = (((_lanes(read_address(waves), waves) + offset) >> U32(2)) & U32(63)).astype(
            np.int64
        )
        taken = np.take_along_axis(_lanes(read(waves), waves), lanes, axis=1)
        valid = np.take_along_axis(waves.active, lanes, axis=1)
        waves.write_v(destination.index, np.where(valid, taken, U32(0)))

    return run


@instruction("ds_permute_b32")
def send_to_lane(ins: Instruction) -> Action:
    """Each active lane sends its value to the lane at its address / 4. If several send to one lane, the
    last one's value stays; a lane that gets none gets 0."""
    only_modifiers(ins, "offset")
    destination, address, value = operands_of(ins, 3)
    offset = U32(number(ins, "offset"))
    read_address, read = register(address), register(value)

    def run(waves: Waves) -> None:
        lanes = ((_lanes(read_address(waves), waves) + offset) >> U32(2)) & U32(63)
        values = _lanes(read(waves), waves)
        received = np.zeros((len(waves), LANES), np.uint32)
        wave, lane = np.nonzero(waves.active)
        received[wave, lanes[wave, lane]] = values[wave, lane]
        waves.write_v(destination.index, received)

    return run


@instruction("ds_swizzle_b32")
def swizzle(ins: Instruction) -> Action:
    """Permute lanes in a fixed way, the same in both halves of the wave; an inactive lane gives 0."""
    only_modifiers(ins, "offset")
    destination, value = operands_of(ins, 2)
    lanes = _swizzled(str(ins.modifiers["offset"]))
    read = with_signs(register(value), value, 32)

    def run(waves: Waves) -> None:
        taken = _lanes(read(waves), waves)[:, lanes]
        waves.write_v(destination.index, np.where(waves.active[:, lanes], taken, U32(0)))

    return run


def _swizzled(pattern: str) -> NDArray[np.int64]:
    """Each lane's source lane. pattern: the assembler's macro, or the number that the macro stands
    for."""
    if not pattern.startswith("swizzle("):
        code = int(pattern, 0)
        if code >> 15 and code >> 8 != 0x80:
            raise EmulatorError(
                f"offset:{pattern} is not known"
            )  # a rotation, or the order of an FFT
        if code >> 15:  # a permutation of four
            return LANE - LANE % 4 + ((code >> (2 * (LANE % 4))) & 3)
        and_mask, or_mask, xor_mask = code & 31, (code >> 5) & 31, (code >> 10) & 31
        return (LANE & 32) | ((((LANE & 31) & and_mask) | or_mask) ^ xor_mask)
    name, _, rest = pattern.removeprefix("swizzle(").removesuffix(")").partition(",")
    parts = [part.strip().strip('"') for part in rest.split(",")]
    if name == "SWAP":
        return LANE ^ int(parts[0])
    if name == "REVERSE":
        return LANE ^ (int(parts[0]) - 1)
    if name == "BROADCAST":
        return LANE - LANE % int(parts[0]) + int(parts[1])
    if name == "QUAD_PERM":
        return LANE - LANE % 4 + np.array([int(part) for part in parts])[LANE % 4]
    if name == "BITMASK_PERM":  # a letter a bit, the highest first: 0, 1, p (keep), i (invert)
        lanes = LANE.copy()
        for place, letter in zip(range(4, -1, -1), parts[0], strict=True):
            bit = 1 << place
            lanes = {"0": lanes & ~bit, "1": lanes | bit, "p": lanes, "i": lanes ^ bit}[letter]
        return lanes
    raise EmulatorError(f"offset:{pattern} is not known")


def _lanes(values: NDArray, waves: Waves) -> NDArray:
    return np.broadcast_to(values, (len(waves), LANES))
