"""Reads of registers that nothing has written: which are errors, and which are not."""

import numpy as np
import pytest

from tools.gfx950.assembly import EmulatorError, parse
from tools.gfx950.effects import BANKS, effects, names_of
from tools.gfx950.emulator import Kernel
from tools.gfx950.unwritten import possible
from tools.gfx950.waves import EXEC

BEGIN = (
    "s_load_dwordx4 s[4:7], s[0:1], 0x0\ns_waitcnt lgkmcnt(0)\n"
    "v_lshlrev_b32_e32 v1, 2, v0\nv_and_b32_e32 v9, 63, v0\n"
)
STORE = "global_store_dword v1, v2, s[6:7]\n"
# The lanes below 10 write v2.
LOW = "v_cmp_gt_u32_e32 vcc, 10, v9\ns_and_saveexec_b64 s[8:9], vcc\nv_mov_b32_e32 v2, 5\n"
ALL = "s_or_b64 exec, exec, s[8:9]\n"
# The other lanes write v2 too.
REST = (
    "v_cmp_gt_u32_e32 vcc, 10, v9\ns_and_saveexec_b64 s[8:9], vcc\ns_xor_b64 s[8:9], exec, s[8:9]\n"
    "v_mov_b32_e32 v2, 5\ns_or_saveexec_b64 s[8:9], s[8:9]\ns_xor_b64 exec, exec, s[8:9]\n"
    "v_mov_b32_e32 v2, 6\n" + ALL
)


def run(body: str, flag: int = 0, warps: int = 2) -> list[int]:
    """The second array, of 64 numbers, after a run with two waves or so; the flag is the first array's
    only number."""
    lines = "\n".join(
        line if line.endswith(":") else f"\t{line}" for line in (BEGIN + body).strip().splitlines()
    )
    out = np.zeros(64 * warps, np.int32)
    code = Kernel(f"k:\n{lines}\n\ts_endpgm\n", "k")
    code.run([np.array([flag], np.int32), out], (1, 1, 1), warps, 1024)
    return out[:64].tolist()  # the first wave's


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("v_add_u32_e32 v2, v3, v0", "v3, which nothing has written in lane 0, at: v_add_u32_e32"),
        ("v_mov_b32_e32 v2, v3", "v3, .* in lane 0"),
        (STORE, "v2, .* in lane 0, at: global_store_dword"),
        ("global_load_dword v2, v3, s[4:5]", "v3, .* in lane 0, at: global_load"),
        ("v_add_u32_e32 v2, s9, v0", "s9, which nothing has written, at: v_add"),
        ("s_mov_b32 s8, s9", "s9, .*at: s_mov_b32"),
        ("s_cbranch_scc0 .L1\n.L1:", "scc, .*at: s_cbranch_scc0"),
        ("s_cbranch_vccz .L1\n.L1:", "vcc_lo, .*at: s_cbranch_vccz"),
        ("v_cndmask_b32_e32 v2, 0, v0, vcc", "vcc_lo, .*at: v_cndmask"),
        ("v_accvgpr_read_b32 v2, a3", "a3, .* in lane 0"),
        ("v_mfma_f32_16x16x16_f16 v[4:7], v[0:1], v[0:1], v[8:11]", "v8, .* in lane 0"),
        ("v_readlane_b32 s8, v2, 5", "v2, .* in lane 5"),
        ("v_fmac_f32_e32 v2, v0, v0", "v2, .*at: v_fmac"),
        ("ds_read_b32 v2, v1", "a load of byte 0 of the LDS, which no wave has written, at: ds_read"),
        ("ds_write_b32 v1, v0\ns_waitcnt lgkmcnt(0)\ns_barrier\nds_read_b32 v2, v1 offset:256",
         "byte 512 of the LDS, which no wave has written, at: ds_read"),
        # Lanes.
        (LOW + ALL + STORE, "v2, .* in lane 10, at: global_store"),
        (LOW + "s_mov_b64 exec, -1\n" + STORE, "v2, .* in lane 10"),
        (LOW + "s_not_b64 exec, exec\n" + STORE, "v2, .* in lane 10"),
        (LOW + ALL + "v_readlane_b32 s10, v2, 12", "v2, .* in lane 12"),
        (LOW + ALL + "s_mov_b32 s10, 0x4c\nv_readlane_b32 s11, v2, s10", "v2, .* in lane 12"),
        (LOW + ALL + "v_mfma_f32_16x16x16_f16 v[4:7], v[0:1], v[2:3], 0", "v2, .* in lane 10"),
        (LOW + "v_mfma_f32_16x16x16_f16 v[4:7], v[0:1], v[2:3], 0", "v2, .* in lane 10"),
        ("v_mov_b32_dpp v2, v0 row_shr:1 row_mask:0xf bank_mask:0xf\n" + STORE, "v2, .* in lane 0"),
        ("v_writelane_b32 v2, 7, 3\nv_readlane_b32 s8, v2, 4", "v2, .* in lane 4"),
        # Ways through the code.
        ("s_load_dword s8, s[4:5], 0x0\ns_waitcnt lgkmcnt(0)\ns_cmp_eq_u32 s8, 0\n"
         "s_cbranch_scc1 .L1\nv_mov_b32_e32 v2, 5\n.L1:\n" + STORE, "v2, .* in lane 0"),
        # Upper halves that are not used, and then are.
        ("v_mov_b32_e32 v2, v0\nv_mad_u64_u32 v[4:5], s[10:11], v0, 1, v[2:3]\n"
         "v_mov_b32_e32 v2, v5", "v5, .* in lane 0, at: v_mov_b32_e32 v2, v5"),
    ],
)  # fmt: skip
def test_a_read_of_what_nothing_has_written_is_found(body: str, said: str) -> None:
    with pytest.raises(EmulatorError, match=said):
        run(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("v_mov_b32_e32 v2, v0\n" + STORE, list(range(64))),
        (LOW + STORE, [5] * 10 + [0] * 54),
        (REST + STORE, [5] * 10 + [6] * 54),
        ("v_mov_b32_e32 v2, 1\n" + LOW + ALL + STORE, [5] * 10 + [1] * 54),
        # The first active lane has been written; so has the lane that is named.
        (LOW + ALL + "v_readfirstlane_b32 s10, v2\nv_mov_b32_e32 v2, s10\n" + STORE, [5] * 64),
        ("v_writelane_b32 v2, 7, 3\nv_readlane_b32 s8, v2, 3\nv_mov_b32_e32 v2, s8\n" + STORE, [7] * 64),
        (LOW + ALL + "s_mov_b32 s10, 9\nv_readlane_b32 s11, v2, s10\nv_mov_b32_e32 v2, s11\n" + STORE,
         [5] * 64),
        # The rest of a register that is written in part counts as written.
        ("global_load_short_d16 v2, v1, s[6:7]\ns_waitcnt vmcnt(0)\n"
         "v_and_b32_e32 v2, 0xffff, v2\n" + STORE, [0] * 64),
        ("v_mov_b32_e32 v2, v0\nv_mad_u64_u32 v[4:5], s[10:11], v0, 1, v[2:3]\n"
         "v_mov_b32_e32 v2, v4\n" + STORE, list(range(0, 128, 2))),
        # A register of the start, which a later pass of the loop would read as a carry without a value.
        (".L1:\ns_load_dword s12, s[0:1], 0x0\ns_waitcnt lgkmcnt(0)\nv_mov_b32_e32 v2, v0\n"
         "v_mad_u64_u32 v[4:5], s[0:1], v0, 1, v[2:3]\ns_cmp_eq_u32 s12, 7\ns_cbranch_scc1 .L1\n" + STORE,
         list(range(64))),
        # A loop that lanes leave one by one.
        ("s_mov_b64 s[8:9], 0\ns_mov_b32 s10, 0\n.L1:\nv_cmp_eq_u32_e32 vcc, s10, v0\n"
         "v_add_u32_e32 v3, s10, v0\ns_or_b64 s[8:9], vcc, s[8:9]\nv_mov_b32_e32 v2, v3\n"
         "s_add_u32 s10, s10, 1\ns_cmp_gt_u32 s10, 200\ns_cbranch_scc1 .L2\n"
         "s_andn2_b64 exec, exec, s[8:9]\ns_cbranch_execnz .L1\n.L2:\n" + ALL + STORE,
         list(range(0, 128, 2))),
    ],
)  # fmt: skip
def test_what_has_been_written_may_be_read(body: str, expected: list[int]) -> None:
    assert run(body) == expected


WRITTEN_IF_SET = (
    "s_load_dword s8, s[4:5], 0x0\ns_waitcnt lgkmcnt(0)\ns_cmp_eq_u32 s8, 0\ns_cbranch_scc1 .L1\n"
    "v_mov_b32_e32 v2, 5\n.L1:\ns_cmp_eq_u32 s8, 0\ns_cbranch_scc1 .L2\n" + STORE + ".L2:"
)


def test_two_branches_that_depend_on_one_number() -> None:
    """The text alone does not tell that v2 is only read where it has been written."""
    assert run(WRITTEN_IF_SET) == [0] * 64
    assert run(WRITTEN_IF_SET, flag=1) == [5] * 64


@pytest.mark.parametrize("warps", [1, 2, 4])
def test_a_scalar_that_is_written_on_one_way_alone(warps: int) -> None:
    body = WRITTEN_IF_SET.replace("v_mov_b32_e32 v2, 5", "s_mov_b32 s9, 5")
    body = body.replace(STORE, "v_mov_b32_e32 v2, s9\n" + STORE)
    assert run(body, 1, warps) == [5] * 64
    with pytest.raises(EmulatorError, match="s9, which nothing has written"):
        run(body.replace("s_cbranch_scc1 .L2", "s_cbranch_scc0 .L2"), 0, warps)


# ---- what the text alone tells, so that nothing has to be checked while the kernel runs

IF = "s_cmp_eq_u32 s4, 0\ns_cbranch_scc1 .L1\n"
FEW = "v_cmp_gt_u32_e32 vcc, 5, v9\n"
EXEC_ALL = "s_mov_b64 exec, -1\n"
SOME = "s_and_saveexec_b64 s[14:15], s[12:13]\n"


def open_reads(body: str) -> dict[str, list[str]]:
    """The reads that the text does not tell to be of something written: line -> registers."""
    lines = "\n".join(
        line if line.endswith(":") else f"\t{line}" for line in (BEGIN + body).strip().splitlines()
    )
    program = parse(f"k:\n{lines}\n\ts_endpgm\n", "k")
    every = [effects(instruction) for instruction in program.instructions]
    start = 1 | 3 << BANKS["s"] | 3 << (BANKS["s"] + EXEC)  # v0, s[0:1] and EXEC
    found = possible(program, every, start)
    return {program.instructions[i].line: names_of(registers) for i, registers in found.items()}


@pytest.mark.parametrize(
    "body",
    [
        REST + STORE,
        # On one way all lanes, on the other one those that are active.
        IF + "v_mov_b32_e32 v2, 5\ns_branch .L2\n.L1:\n" + LOW + ".L2:\n" + STORE,
        IF + LOW + "s_branch .L2\n.L1:\nv_mov_b32_e32 v2, 5\n.L2:\n" + STORE,
        # All lanes are active where two ways meet.
        IF + "s_nop 0\n.L1:\nv_mov_b32_e32 v2, 0\n" + LOW + EXEC_ALL + STORE,
        # A matrix instruction writes all lanes.
        FEW + "s_and_saveexec_b64 s[8:9], vcc\nv_mfma_f32_16x16x16_f16 v[2:5], v[0:1], v[0:1], 0\n"
        + EXEC_ALL + STORE,
        # Fewer lanes than have been written.
        LOW + FEW + "s_and_saveexec_b64 s[10:11], vcc\n" + STORE,
        LOW + FEW + "s_mov_b64 exec, vcc\n" + STORE,
        LOW + FEW + "s_and_b64 exec, exec, vcc\n" + STORE,
        LOW + "s_andn2_b64 exec, exec, vcc\n" + STORE,
        LOW + "v_cmpx_gt_u32_e32 vcc, 5, v9\n" + STORE,
        # One of two masks, or both together.
        LOW + FEW + "v_cmp_gt_u32_e64 s[10:11], 7, v9\ns_cmp_eq_u32 s4, 0\n"
        "s_cselect_b64 s[12:13], vcc, s[10:11]\n" + ALL + SOME + STORE,
        LOW + FEW + "v_cmp_gt_u32_e64 s[10:11], 7, v9\ns_or_b64 s[12:13], vcc, s[10:11]\n" + ALL
        + SOME + STORE,
        "v_mov_b32_e32 v2, 0\nv_readlane_b32 s10, v2, 3\ns_mov_b32 s11, s10\n" + STORE,
        # No lanes, and all of them by two masks that are full.
        "s_mov_b64 exec, 0\n" + STORE,
        FEW + "s_mov_b64 s[10:11], -1\ns_and_b64 exec, s[10:11], -1\nv_mov_b32_e32 v2, 0\n" + EXEC_ALL
        + STORE,
    ],
)  # fmt: skip
def test_reads_that_the_text_proves(body: str) -> None:
    assert open_reads(body) == {}


@pytest.mark.parametrize(
    ("body", "register"),
    [
        (STORE, "v2"),
        (LOW + ALL + STORE, "v2"),
        (LOW + EXEC_ALL + STORE, "v2"),
        # One way does not write it, or not in all lanes.
        (IF + "v_mov_b32_e32 v2, 5\n.L1:\n" + STORE, "v2"),
        (IF + "v_mov_b32_e32 v2, 5\ns_branch .L2\n.L1:\n" + LOW + ".L2:\n" + EXEC_ALL + STORE, "v2"),
        # Not all lanes are active on one of two ways.
        (IF + FEW + "s_and_saveexec_b64 s[8:9], vcc\n.L1:\nv_mov_b32_e32 v2, 0\n" + EXEC_ALL + STORE,
         "v2"),
        # A mask of one lane, and two masks one of which is not full.
        ("s_mov_b64 exec, 1\n" + STORE, "v2"),
        (FEW + "s_and_b64 exec, vcc, -1\nv_mov_b32_e32 v2, 0\n" + EXEC_ALL + STORE, "v2"),
        (FEW + "s_mov_b64 s[10:11], -1\ns_and_b64 exec, s[10:11], vcc\nv_mov_b32_e32 v2, 0\n"
         + EXEC_ALL + STORE, "v2"),
        # A mask that was overwritten, or that may have other lanes.
        (LOW + FEW + ALL + "s_mov_b32 vcc_hi, 3\ns_and_saveexec_b64 s[10:11], vcc\n" + STORE, "v2"),
        (LOW + FEW + ALL + "s_cmp_eq_u32 s4, 0\ns_cselect_b64 s[10:11], vcc, -1\n"
         "s_mov_b64 exec, s[10:11]\n" + STORE, "v2"),
        (LOW + FEW + ALL + "s_not_b64 exec, vcc\n" + STORE, "v2"),
        (LOW + FEW + ALL + "s_or_b64 exec, vcc, s[8:9]\n" + STORE, "v2"),
        (LOW + ALL + "s_cmp_eq_u32 s4, 0\ns_cselect_b64 exec, vcc, -1\nv_mov_b32_e32 v3, 0\n"
         + EXEC_ALL + STORE.replace("v2", "v3"), "v3"),
    ],
)  # fmt: skip
def test_reads_that_are_checked_while_the_kernel_runs(body: str, register: str) -> None:
    (found,) = open_reads(body).items()
    assert found == (STORE.strip().replace("v2", register), [register])
