"""s_waitcnt: what a kernel may do before a load has ended, and what the emulator says otherwise."""

import numpy as np
import pytest

from tools.gfx950.assembly import EmulatorError
from tools.gfx950.emulator import Kernel

BEGIN = "s_load_dwordx4 s[4:7], s[0:1], 0x0\ns_waitcnt lgkmcnt(0)\nv_lshlrev_b32_e32 v1, 2, v0\n"


def kernel(body: str) -> Kernel:
    """A kernel with two arrays, whose pointers are in s[4:5] and s[6:7]; v1 is 4 * the lane."""
    lines = "\n".join(
        line if line.endswith(":") else f"\t{line}" for line in (BEGIN + body).strip().splitlines()
    )
    return Kernel(f"k:\n{lines}\n\ts_endpgm\n", "k")


def run(body: str, *, num_warps: int = 1, lds: int = 0, workgroups: int = 1) -> list[int]:
    """The second array, of 64 numbers, after a run in which the first one holds 0, 1, 2, ..."""
    data, out = np.arange(128, dtype=np.int32), np.zeros(64, np.int32)
    kernel(body).run([data, out], (workgroups, 1, 1), num_warps, lds)
    return out.tolist()


TWO_LOADS = "global_load_dword v2, v1, s[4:5]\nglobal_load_dword v3, v1, s[4:5] offset:4\n"
STORE = "global_store_dword v1, v2, s[6:7]\n"
TOLD = "v_mov_b32_e32 v2, v0\n" + STORE + "s_waitcnt vmcnt(0)\nbuffer_wbl2 sc1\n"
BRANCH = "s_cmp_eq_u32 s4, 0\ns_cbranch_scc1 .L1\n"
FENCED = "s_waitcnt lgkmcnt(0)\ns_barrier\n"


REST = "s_add_u32 s9, s0, s0\nv_mov_b32_e32 v2, v0\n" + STORE


@pytest.mark.parametrize(
    ("body", "said"),
    [
        # Vector loads, which end in order.
        (TWO_LOADS + STORE, r"store_dword v1, v2.*reads v2.*v2, v1, s\[4:5\]' of line 5.*vmcnt\(1\)"),
        (TWO_LOADS + "s_waitcnt vmcnt(2)\n" + STORE, r"reads v2.*vmcnt\(1\)"),
        (TWO_LOADS + "s_waitcnt lgkmcnt(0)\n" + STORE, r"reads v2.*vmcnt\(1\)"),
        (TWO_LOADS + "s_waitcnt 0xcf7f\n" + STORE, r"reads v2.*vmcnt\(1\)"),
        (TWO_LOADS + "s_waitcnt vmcnt(1)\nv_mov_b32_e32 v2, v3", r"reads v3.*vmcnt\(0\)"),
        (TWO_LOADS + "v_mov_b32_e32 v3, 0", r"overwrites v3, .*vmcnt\(0\)"),
        (TWO_LOADS + "v_cmp_eq_u32_e32 vcc, v3, v2", r"reads v2"),
        # A store counts too.
        (TWO_LOADS + "global_store_dword v1, v0, s[6:7]\ns_waitcnt vmcnt(3)\n" + STORE, r"vmcnt\(2\)"),
        ("global_atomic_add v2, v1, v0, s[6:7] sc0\n" + STORE, r"reads v2.*atomic_add.*vmcnt\(0\)"),
        # The LDS, also in order; and scalar loads, in any order.
        ("ds_bpermute_b32 v2, v1, v0\n" + STORE, r"reads v2.*ds_bpermute_b32.*lgkmcnt\(0\)"),
        ("ds_swizzle_b32 v2, v0 offset:swizzle(SWAP,1)\nds_bpermute_b32 v3, v1, v0\n"
         "s_waitcnt lgkmcnt(2)\n" + STORE, r"reads v2.*ds_swizzle.*lgkmcnt\(1\)"),
        ("s_load_dword s8, s[4:5], 0x0\ns_load_dword s9, s[4:5], 0x4\ns_waitcnt lgkmcnt(1)\n"
         "s_add_i32 s8, s8, 1", r"reads s8.*s_load_dword s8.*lgkmcnt\(0\)"),
        ("s_load_dword s8, s[4:5], 0x0\ns_waitcnt vmcnt(0)\ns_add_i32 s8, s8, 1", "reads s8"),
        ("s_load_dword s8, s[4:5], 0x0\ns_load_dword s8, s[4:5], 0x4", "overwrites s8"),
        ("s_load_dword s8, s[4:5], 0x0\nv_mov_b32_e32 v2, s8", "reads s8"),
        ("s_load_dwordx2 vcc, s[4:5], 0x0\ns_cbranch_vccz .L1\n.L1:", "reads vcc_lo"),
        # Units that are not ordered among each other.
        ("ds_bpermute_b32 v2, v1, v0\nglobal_load_dword v2, v1, s[4:5]", "overwrites v2"),
        # Ways through the code.
        ("s_cmp_eq_u32 s4, 0\ns_cbranch_scc1 .L1\nglobal_load_dword v2, v1, s[4:5]\n.L1:\n" + STORE,
         "reads v2"),
        ("v_mov_b32_e32 v2, 0\n.L1:\nv_add_u32_e32 v4, v2, v1\nglobal_load_dword v2, v1, s[4:5]\n"
         "s_cbranch_scc1 .L1", r"reads v2.*global_load_dword"),
        (BRANCH + "global_load_dword v2, v1, s[4:5]\ns_branch .L2\n.L1:\ns_nop 0\n.L2:\n" + STORE,
         "reads v2"),
        (BRANCH + "s_nop 0\ns_branch .L2\n.L1:\nglobal_load_dword v2, v1, s[4:5]\n.L2:\n" + STORE,
         "reads v2"),
        (BRANCH + "s_load_dword s8, s[4:5], 0x0\n.L1:\ns_add_i32 s8, s8, 1", "reads s8"),
        (BRANCH + "s_branch .L2\n.L1:\ns_load_dword s8, s[4:5], 0x0\n.L2:\ns_add_i32 s8, s8, 1",
         "reads s8"),
        # Barriers do not wait.
        ("ds_write_b32 v1, v0\ns_barrier", r"before the end of 'ds_write_b32 v1, v0.*lgkmcnt\(0\)"),
        ("ds_write_b32 v1, v0\n" + FENCED + "ds_read_b32 v2, v1\ns_barrier", r"end of 'ds_read_b32"),
        # A flag is raised after what it tells of can be seen.
        (TOLD + "global_atomic_add v1, v0, s[6:7]", r"atomic_add.*await 'buffer_wbl2 sc1'.*vmcnt\(0\)"),
        (TOLD + "s_waitcnt vmcnt(1)\n" + STORE, r"store_dword.*await 'buffer_wbl2 sc1'.*vmcnt\(0\)"),
    ],
)  # fmt: skip
def test_what_comes_too_early_is_refused(body: str, said: str) -> None:
    with pytest.raises(EmulatorError, match=rf"^k, line \d+: .*{said}"):
        kernel(body)


@pytest.mark.parametrize(
    "body",
    [
        TWO_LOADS + "s_waitcnt vmcnt(1)\n" + STORE,
        TWO_LOADS + "s_waitcnt vmcnt(0) & lgkmcnt(0)\n" + STORE,
        TWO_LOADS + "s_waitcnt 0x0f71\n" + STORE,
        # A load may replace an earlier one of its unit; its address is read when it is issued.
        "global_load_dword v2, v1, s[4:5] offset:4\nglobal_load_dword v2, v1, s[4:5]\n"
        "s_waitcnt vmcnt(0)\n" + STORE,
        # A store has read its data when it is issued.
        "v_mov_b32_e32 v2, v0\n" + STORE + "v_mov_b32_e32 v2, 7\nv_mov_b32_e32 v1, 0",
        # In order, even behind a scalar load.
        "ds_bpermute_b32 v2, v1, v0\ns_load_dword s8, s[4:5], 0x0\nds_bpermute_b32 v3, v1, v0\n"
        "s_waitcnt lgkmcnt(1)\n" + STORE,
        # Permutations of lanes do not use the LDS's memory.
        "ds_bpermute_b32 v2, v1, v0\ns_barrier\ns_waitcnt lgkmcnt(0)\n" + STORE,
        # A flag; and a write-back of nothing.
        TOLD + "s_waitcnt vmcnt(0)\n" + STORE,
        "v_mov_b32_e32 v2, v0\nbuffer_wbl2 sc1\n" + STORE,
        # The wait covers both ways.
        "v_mov_b32_e32 v2, v0\ns_cmp_eq_u32 s4, 0\ns_cbranch_scc1 .L1\n"
        "global_load_dword v2, v1, s[4:5]\n.L1:\ns_waitcnt vmcnt(0)\n" + STORE,
        # What one way loads, and nothing else, is waited for.
        BRANCH + "global_load_dword v3, v1, s[4:5]\ns_branch .L2\n.L1:\ns_nop 0\n.L2:\n" + REST,
        BRANCH + "s_nop 0\ns_branch .L2\n.L1:\nglobal_load_dword v3, v1, s[4:5]\n.L2:\n" + REST,
    ],
)
def test_what_has_waited_runs(body: str) -> None:
    assert run(body) == list(range(64))


def test_of_two_errors_the_first_one_in_the_text_is_named() -> None:
    """Even if all ways through the code come to the other one first."""
    with pytest.raises(EmulatorError, match="reads v2"):
        kernel(
            "s_branch .L2\n.L1:\nv_mov_b32_e32 v4, v2\ns_endpgm\n"
            ".L2:\n" + TWO_LOADS + "v_mov_b32_e32 v5, v3\ns_branch .L1"
        )


def test_a_counter_goes_no_further_than_its_bits() -> None:
    """Of 70 loads, vmcnt(62) leaves the first eight ended, and vmcnt(63) does not wait."""
    loads = [f"global_load_dword v{i}, v1, s[4:5]\n" for i in range(2, 72)]
    many = "".join(loads)
    kernel(many + "s_waitcnt vmcnt(62)\nv_mov_b32_e32 v2, v9")
    for count, register in ((62, 10), (63, 2)):
        with pytest.raises(EmulatorError, match=f"reads v{register},"):
            kernel(many + f"s_waitcnt vmcnt({count})\nv_mov_b32_e32 v100, v{register}")


def test_a_wait_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(EmulatorError, match=r"s_waitcnt vscnt\(0\)'.*is none of vmcnt"):
        kernel("s_waitcnt vscnt(0)")


# ---- loads from global memory to the LDS

TO_LDS = "s_mov_b32 m0, 0\nglobal_load_lds_dword v1, s[4:5]\n"
FROM_LDS = "ds_read_b32 v2, v1\ns_waitcnt lgkmcnt(0)\n"


def test_a_load_to_the_lds_is_waited_for_by_vmcnt() -> None:
    assert run(TO_LDS + "s_waitcnt vmcnt(0)\n" + FROM_LDS + STORE, lds=256) == list(range(64))
    later = TO_LDS + "global_store_dword v1, v0, s[6:7]\ns_waitcnt vmcnt(1)\n" + FROM_LDS + STORE
    assert run(later, lds=256) == list(range(64))
    said = (
        r"LDS load of byte 0, which 'global_load_lds_dword v1, s\[4:5\]' of line 6 has yet to write"
    )
    for wait in ("", "s_waitcnt lgkmcnt(0)\n", "s_waitcnt vmcnt(1)\n"):
        with pytest.raises(EmulatorError, match=rf"{said}.*vmcnt.*at: ds_read_b32"):
            run(TO_LDS + wait + FROM_LDS, lds=256)
    with pytest.raises(EmulatorError, match=r"LDS store of byte 0.*at: ds_write_b32"):
        run(TO_LDS + "ds_write_b32 v1, v0", lds=256)


# The second wave reads what the first one loads.
FIRST_LOADS = "v_cmp_gt_u32_e32 vcc, 64, v0\ns_cbranch_vccz .L1\n" + TO_LDS
SECOND_READS = (
    "v_cmp_gt_u32_e32 vcc, 64, v0\ns_cbranch_vccnz .L2\nv_subrev_u32_e32 v1, 0x100, v1\n"
    + FROM_LDS
    + STORE
    + ".L2:"
)


def test_another_wave_needs_a_barrier_after_the_wait() -> None:
    waits = FIRST_LOADS + "s_waitcnt vmcnt(0)\n.L1:\ns_barrier\n" + SECOND_READS
    assert run(waits, num_warps=2, lds=256) == list(range(64))
    for order in ("s_waitcnt vmcnt(0)\n.L1:\n", ".L1:\ns_barrier\ns_waitcnt vmcnt(0)\n"):
        with pytest.raises(EmulatorError, match=r"LDS race.*at: ds_read_b32"):
            run(FIRST_LOADS + order + SECOND_READS, num_warps=2, lds=256)
    with pytest.raises(
        EmulatorError, match=r"LDS load of byte 0.*has yet to write.*at: ds_read_b32"
    ):
        run(FIRST_LOADS + ".L1:\ns_barrier\n" + SECOND_READS, num_warps=2, lds=256)


def test_a_wait_between_two_barriers() -> None:
    """The second barrier parts the accesses, the first one does not yet."""
    waits = ".L1:\ns_barrier\ns_waitcnt vmcnt(0)\ns_barrier\n"
    for workgroups in (1, 2):
        found = run(FIRST_LOADS + waits + SECOND_READS, num_warps=2, lds=256, workgroups=workgroups)
        assert found == list(range(64))


def test_a_wave_waits_for_its_own_loads() -> None:
    """A wait of the wave that loads nothing does not help."""
    waits = "s_branch .L3\n.L1:\ns_nop 0\ns_nop 0\ns_waitcnt vmcnt(0)\n.L3:\ns_barrier\n"
    with pytest.raises(EmulatorError, match=r"LDS load of byte 0.*has yet to write"):
        run(FIRST_LOADS + waits + SECOND_READS, num_warps=2, lds=256)


def test_loads_to_the_lds_end_one_after_the_other() -> None:
    """vmcnt(2) after three instructions: only the first load has ended."""
    second = "s_mov_b32 m0, 0x100\nglobal_load_lds_dword v1, s[4:5]\n"
    loads = TO_LDS + second + "global_store_dword v1, v0, s[6:7]\n"
    assert run(loads + "s_waitcnt vmcnt(2)\n" + FROM_LDS + STORE, lds=512) == list(range(64))
    later = FROM_LDS.replace("v1", "v1 offset:256")
    assert run(loads + "s_waitcnt vmcnt(1)\n" + later + STORE, lds=512) == list(range(64))
    with pytest.raises(EmulatorError, match=r"LDS load of byte 256.*of line 8 has yet to write"):
        run(loads + "s_waitcnt vmcnt(2)\n" + later, lds=512)
