"""The gfx950 emulator: instructions against AMD's pseudocode, kernels against numpy, planted faults."""

import re
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from tests.support.gfx950_pseudocode import UnsupportedError, evaluate, pseudocode
from tests.support.gfx950_runs import (
    U32,
    WAVES,
    check_vector,
    execute,
    fresh,
    samples,
    shape_of,
)
from tools.gfx950.formats import MINIFLOATS, e8m0
from tools.gfx950.registry import BUILDERS
from tools.gfx950.waves import EXEC, VCC

# ---- one instruction


# EXEC, memory and modes are tested by hand; so is what the emulator rounds in one step (dot products).
BY_HAND = re.compile(
    r"v_cmpx|v_cvt_f32_(fp8|bf8)|v_cvt_pk_f32|v_bitop|v_readfirst|s_load|s_buffer|saveexec|s_set|s_nop|s_sleep|s_wait|v_dot2|s_branch|buffer_"
)


# Published text that the emulator does not follow, and why.
DEVIATIONS = {
    "v_ldexp_f32": "S0 * 2.0 ** S1 is inf * 0 for an infinity and a very negative exponent",
    "v_ldexp_f16": "the same",
    "v_frexp_exp_i32_f32": "the formula gives -126 for 0; the compiler relies on 0",
    "v_frexp_mant_f32": "the same formula",
    "v_div_fmas_f32": "2**32 does not undo the 2**64 of v_div_scale_f32; see check_division",
}


def check_scalar(mnemonic: str) -> None:
    text = pseudocode()[mnemonic]
    sources, wide = shape_of(text)
    rng = np.random.default_rng(sum(map(ord, mnemonic)))
    count = 100
    inputs = [samples(rng, "int", count) for _ in sources]
    scc = rng.integers(0, 2, count).astype(bool)
    state = fresh(count)
    for i, bits in enumerate(inputs):
        state.write_s64(2 * i, bits)
    state.write_s64(10, np.zeros(1, np.uint64))
    state.scc = scc.copy()
    has_result = "D0" in text
    operands = [("s[10:11]" if wide else "s10")] * has_result
    operands += [
        f"s[{2 * i}:{2 * i + 1}]" if w else f"s{2 * i}" for i, (_, w) in enumerate(sources)
    ]
    execute(f"{mnemonic} {', '.join(operands)}", state)
    for i in range(count):
        registers = {
            f"S{j}": int(bits[i]) if w else int(bits[i]) & 0xFFFFFFFF
            for j, (bits, (_, w)) in enumerate(zip(inputs, sources, strict=True))
        }
        machine = evaluate(mnemonic, **registers, SCC=int(scc[i]))
        context = f"{mnemonic} of {[hex(r) for r in registers.values()]}"
        got = int(state.read_s64(10)[i]) if wide else int(state.sgpr[10][i])
        if has_result:
            assert got == machine.registers["D0"], (
                f"{context}: {got:#x}, AMD's is {machine.registers['D0']:#x}"
            )
        assert bool(state.scc[i]) == bool(machine.registers["SCC"]), f"{context}: SCC"


def evaluable() -> list[str]:
    """Instructions of the emulator whose pseudocode the evaluator understands."""
    found = []
    for mnemonic in BUILDERS:
        if (
            not mnemonic.startswith(("v_", "s_"))
            or BY_HAND.search(mnemonic)
            or mnemonic in DEVIATIONS
        ):
            continue
        try:
            evaluate(mnemonic, S0=0x3F800000, S1=0x40000000, S2=0x3F000000, OPSEL=0)
        except UnsupportedError:
            continue
        found.append(mnemonic)
    return found


EVALUABLE = evaluable()
VECTOR = [mnemonic for mnemonic in EVALUABLE if mnemonic.startswith("v_")]


PARTS = 7  # of the list, one a test


def test_many_instructions_have_pseudocode():
    assert len(EVALUABLE) >= 390


def test_scalar_instructions_do_what_amd_publishes():
    for mnemonic in EVALUABLE:
        if mnemonic not in VECTOR:
            check_scalar(mnemonic)


@pytest.mark.parametrize("part", range(PARTS))
def test_vector_instructions_do_what_amd_publishes(part: int):
    for mnemonic in VECTOR[part::PARTS]:
        check_vector(mnemonic)


@pytest.mark.parametrize("mnemonic", [m for m in EVALUABLE if "scalef32" in m or "cvt_pk_fp8" in m])
def test_small_formats_select_their_part_by_op_sel(mnemonic: str):
    for select in (1, 2, 3, 4, 8, 12):
        check_vector(mnemonic, select)


def check_perm() -> None:
    """v_perm_b32 against a loop over bytes; its pseudocode is a lambda."""
    rng = np.random.default_rng(0)
    state = fresh()
    state.vgpr[0:3] = rng.integers(0, 2**32, (3, WAVES, 64), np.uint32)
    state.vgpr[2] = rng.integers(0, 16, (4, WAVES, 64), np.uint32).T.dot(1 << np.arange(0, 32, 8)).T
    execute("v_perm_b32 v10, v0, v1, v2", state)
    a, b, selector, result = (state.vgpr[i].reshape(-1).tolist() for i in (0, 1, 2, 10))
    for i in range(WAVES * 64):
        data = (a[i] << 32 | b[i]).to_bytes(8, "little")
        want = []
        for choice in selector[i].to_bytes(4, "little"):
            sign = data[2 * (choice & 3) + 1] >> 7 * (8 <= choice < 12)
            want.append(
                255
                if choice > 12
                else 0
                if choice == 12
                else 255 * sign
                if choice > 7
                else data[choice]
            )
        assert result[i] == int.from_bytes(bytes(want), "little")


def check_dot() -> None:
    """v_dot2_f32_bf16: D = A.low * B.low + A.high * B.high + C."""
    state = fresh()
    for i, value in enumerate((0x40003F80, 0x40404040, 0x3F800000)):  # (1, 2), (3, 3), 1
        state.vgpr[i] = value
    execute("v_dot2_f32_bf16 v10, v0, v1, v2", state)
    assert (state.vgpr[10].view(np.float32) == 1 * 3 + 2 * 3 + 1).all()


def lanes_after(line: str, exec_mask: int = 2**64 - 1, old: int = 99) -> list[int]:
    """One wave with v0 = lane, v1 = 100 + lane, v10 = old, after a line: v10."""
    state = fresh(1)
    state.vgpr[0], state.vgpr[1], state.vgpr[10] = np.arange(64), 100 + np.arange(64), old
    state.write_s64(EXEC, np.array([exec_mask], np.uint64))
    return execute(line, state).vgpr[10][0].tolist()


def check_division() -> None:
    """div_scale, Newton's steps, div_fmas, div_fixup, as the compiler writes them: the float32 quotient,
    also where it, the numerator or the denominator is subnormal."""
    numerators = np.array([1, 3, 1e-38, 1e-40, 2.0**-149, 3e38, -7, 1e-20], np.float32)
    denominators = np.array([3, 7, 1.7, 3, 1, 1e-3, 2e38, 1e25], np.float32)
    state = fresh()
    state.vgpr[0] = np.resize(numerators, (WAVES, 64)).view(U32)
    state.vgpr[1] = np.resize(denominators, (WAVES, 64)).view(U32)
    for line in (
        "v_div_scale_f32 v2, s[20:21], v1, v1, v0",
        "v_div_scale_f32 v3, vcc, v0, v1, v0",
        "v_rcp_f32_e32 v4, v2",
        "v_fma_f32 v5, -v2, v4, 1.0",
        "v_fma_f32 v4, v5, v4, v4",
        "v_mul_f32_e32 v5, v3, v4",
        "v_fma_f32 v6, -v2, v5, v3",
        "v_fma_f32 v5, v6, v4, v5",
        "v_fma_f32 v6, -v2, v5, v3",
        "v_div_fmas_f32 v5, v6, v4, v5",
        "v_div_fixup_f32 v5, v5, v1, v0",
    ):
        execute(line, state)
    with np.errstate(all="ignore"):
        expected = np.resize(numerators / denominators, (WAVES, 64))
    np.testing.assert_array_equal(state.vgpr[5].view(np.float32), expected)


def check_lanes() -> None:
    """DPP, swaps and permutations give the lanes that were worked out by hand."""
    dpp = "row_mask:0xf bank_mask:0xf"
    quad = lanes_after(f"v_mov_b32_dpp v10, v0 quad_perm:[1,0,3,2] {dpp}")
    assert quad[:8] == [1, 0, 3, 2, 5, 4, 7, 6]
    assert lanes_after(f"v_mov_b32_dpp v10, v0 row_shr:1 {dpp}")[14:19] == [13, 14, 99, 16, 17]
    assert lanes_after(f"v_mov_b32_dpp v10, v0 row_shr:1 {dpp} bound_ctrl:0")[16] == 0
    assert lanes_after(f"v_mov_b32_dpp v10, v0 row_shl:2 {dpp}")[12:18] == [14, 15, 99, 99, 18, 19]
    assert lanes_after(f"v_mov_b32_dpp v10, v0 row_ror:8 {dpp}")[:2] == [8, 9]
    assert lanes_after(f"v_mov_b32_dpp v10, v0 row_half_mirror {dpp}")[:8] == [
        7,
        6,
        5,
        4,
        3,
        2,
        1,
        0,
    ]
    assert lanes_after(f"v_mov_b32_dpp v10, v0 row_newbcast:3 {dpp}")[15:17] == [3, 19]
    assert lanes_after("v_mov_b32_dpp v10, v0 row_bcast:15 row_mask:0xa bank_mask:0xf")[15:17] == [
        99,
        15,
    ]
    assert lanes_after("v_mov_b32_dpp v10, v0 row_bcast:15 row_mask:0xa bank_mask:0xf")[32] == 99
    assert lanes_after("v_mov_b32_dpp v10, v0 row_mirror row_mask:0xf bank_mask:0x1")[3:5] == [
        12,
        99,
    ]
    assert (
        lanes_after("v_add_u32_dpp v10, v0, v1 row_newbcast:5 row_mask:0xf bank_mask:0xf")[7] == 112
    )
    # An inactive lane keeps what it has, and is no source.
    half = lanes_after(f"v_mov_b32_dpp v10, v0 row_shr:1 {dpp}", exec_mask=0b1011)
    assert half[:5] == [99, 0, 99, 99, 99]
    assert lanes_after("v_mov_b32_e32 v10, v0", exec_mask=2)[:3] == [99, 1, 99]
    state = fresh(1)
    state.vgpr[0], state.vgpr[1] = np.arange(64), 100 + np.arange(64)
    execute("v_permlane32_swap_b32 v0, v1", state)
    assert state.vgpr[0][0].tolist() == [*range(32), *range(100, 132)]
    assert state.vgpr[1][0].tolist() == [*range(32, 64), *range(132, 164)]
    execute("v_permlane32_swap_b32 v0, v1", state)
    execute("v_permlane16_swap_b32 v0, v1", state)
    assert state.vgpr[0][0, 12:20].tolist() == [12, 13, 14, 15, 100, 101, 102, 103]
    assert state.vgpr[1][0, 30:34].tolist() == [130 - 100 + 100, 131, 48, 49]
    assert lanes_after("ds_swizzle_b32 v10, v0 offset:swizzle(SWAP,16)")[:2] == [16, 17]
    assert lanes_after('ds_swizzle_b32 v10, v0 offset:swizzle(BITMASK_PERM,"00p1i")')[:4] == [
        3,
        2,
        3,
        2,
    ]
    state.vgpr[2] = 4 * (63 - np.arange(64))
    assert execute("ds_bpermute_b32 v10, v2, v0", state).vgpr[10][0, 63] == state.vgpr[0][0, 0]
    execute("v_readlane_b32 s3, v2, 62", state)
    assert state.sgpr[3][0] == 4
    state.write_s64(EXEC, np.array([1 << 40], np.uint64))
    execute("v_readfirstlane_b32 s4, v2", state)
    assert state.sgpr[4][0] == 4 * 23
    execute("v_writelane_b32 v10, 7, 5", state)  # an inactive lane
    assert state.vgpr[10][0, 5] == 7


def check_sdwa() -> None:
    state = fresh(1)
    state.vgpr[0], state.vgpr[1], state.vgpr[10] = 0x11F23344, 0x00050607, 0xAAAAAAAA
    pad = "dst_sel:DWORD dst_unused:UNUSED_PAD"
    execute(f"v_add_u32_sdwa v10, v0, v1 {pad} src0_sel:BYTE_2 src1_sel:WORD_1", state)
    assert (state.vgpr[10] == 0xF2 + 5).all()
    execute(f"v_add_u32_sdwa v10, sext(v0), v1 {pad} src0_sel:BYTE_2 src1_sel:WORD_1", state)
    assert (state.vgpr[10].view(np.int32) == 0xF2 - 256 + 5).all()
    state.vgpr[10] = 0xAAAAAAAA
    preserve = "dst_sel:BYTE_1 dst_unused:UNUSED_PRESERVE"
    execute(f"v_or_b32_sdwa v10, v0, v1 {preserve} src0_sel:BYTE_0 src1_sel:BYTE_0", state)
    assert (state.vgpr[10] == 0xAAAA47AA).all()


def check_exec() -> None:
    """saveexec, comparisons and selection obey EXEC; its text: D0 = EXEC, EXEC = S0 & EXEC."""
    state = fresh(1)
    state.vgpr[0], state.vgpr[10] = np.arange(64), 5
    execute("v_cmp_gt_u32_e32 vcc, 8, v0", state)
    assert state.read_s64(VCC)[0] == 0xFF
    execute("s_and_saveexec_b64 s[4:5], vcc", state)
    assert state.read_s64(EXEC)[0] == 0xFF and state.read_s64(4)[0] == 2**64 - 1 and state.scc[0]
    execute("v_cmp_ne_u32_e64 s[6:7], 0, v0", state)
    assert state.read_s64(6)[0] == 0xFE  # 0 for inactive lanes
    execute("v_cndmask_b32_e64 v10, 1, 2, s[6:7]", state)
    assert state.vgpr[10][0, :9].tolist() == [1, 2, 2, 2, 2, 2, 2, 2, 5]
    execute("v_cmpx_lt_u32_e32 vcc, 3, v0", state)
    assert state.read_s64(EXEC)[0] == 0xF0


def check_scalar_sources() -> None:
    """Constants of 32 and of 64 bits; a sum that just fits."""
    state = fresh(1)
    state.write_s64(2, np.array([0xFFFFFFFF], np.uint64))
    execute("s_add_u32 s10, 5, s2", state)
    assert state.sgpr[10][0] == 4 and state.scc[0]
    execute("s_and_b64 s[10:11], -2, s[2:3]", state)
    assert state.read_s64(10)[0] == 0xFFFFFFFE
    execute("s_or_b64 s[10:11], s[2:3], -2", state)
    assert state.read_s64(10)[0] == 2**64 - 1
    state.sgpr[4], state.sgpr[5] = 0x7FFFFFFF, 1
    execute("s_lshl1_add_u32 s10, s4, s5", state)
    assert state.sgpr[10][0] == 0xFFFFFFFF and not state.scc[0]
    execute("s_lshl1_add_u32 s10, s4, 2", state)
    assert state.sgpr[10][0] == 0 and state.scc[0]


@pytest.mark.parametrize(
    "check",
    [
        check_perm,
        check_dot,
        check_division,
        check_lanes,
        check_sdwa,
        check_exec,
        check_scalar_sources,
    ],
)
def test_instructions_worked_out_by_hand(check: Callable[[], None]):
    check()


def test_small_formats_have_the_values_of_their_definitions():
    for name, small in MINIFLOATS.items():
        finite = np.isfinite(small.values)
        codes = np.flatnonzero(finite)
        assert (small.encode(small.values[finite]) == codes).all(), name  # -0 keeps its sign
    assert MINIFLOATS["fp4"].values[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert MINIFLOATS["fp8"].values[0x7E] == 448 and np.isnan(MINIFLOATS["fp8"].values[0x7F])
    assert MINIFLOATS["bf8"].values[0x7B] == 57344 and np.isinf(MINIFLOATS["bf8"].values[0x7C])
    assert MINIFLOATS["fp4"].encode(np.array([0.25, 0.75, 2.5, 5.0, 7.0])).tolist() == [
        0,
        2,
        4,
        6,
        7,
    ]
    assert e8m0(np.array([0, 127, 254])).tolist() == [2.0**-127, 1, 2.0**127]
    assert np.isnan(e8m0(np.array([255])))[0]
