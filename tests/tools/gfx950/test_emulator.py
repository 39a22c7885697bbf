"""How a kernel starts, branches, meets barriers and ends, in a few lines of assembly each."""

import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from tools.gfx950.assembly import EmulatorError
from tools.gfx950.emulator import Kernel, Statistics
from tools.gfx950.waves import Waves

ARGUMENTS = "\ts_load_dwordx2 s[20:21], s[{0}:{1}], 0x0\n\ts_waitcnt lgkmcnt(0)\n"


def code(body: str, directives: str = "", arguments: str = "", pointer: int = 0) -> Kernel:
    """A kernel whose first argument, a pointer, is in s[20:21]."""
    lines = "\n".join(line if line.endswith(":") else f"\t{line}" for line in body.split("\n"))
    begin = ARGUMENTS.format(pointer, pointer + 1)
    text = f"k:\n{begin}{lines}\n\ts_endpgm\n.Lfunc_end0:\n"
    text += "".join(f"\t{line}\n" for line in (f".amdhsa_kernel k\n{directives}".split("\n")))
    text += "\t.end_amdhsa_kernel\n"
    if arguments:
        text += f"amdhsa.kernels:\n  - .args:\n{arguments}    .name: k\n"
    return Kernel(text, "k")


def argument(offset: int, size: int, kind: str = "by_value") -> str:
    return f"      - .offset: {offset}\n        .size: {size}\n        .value_kind: {kind}\n"


def whole(
    kernel: Kernel, *arguments: Any, grid: Any = (1, 1, 1), warps: int = 1, **how: Any
) -> Any:
    return kernel.run(arguments, grid, warps, how.pop("lds", 0), **how)


# Each lane stores v9 at its number's place of its workgroup, whose number is in s22.
STORED = """v_lshlrev_b32_e32 v1, 2, v0
s_lshl_b32 s23, s22, {0}
v_add_u32_e32 v1, s23, v1
global_store_dword v1, v9, s[20:21]"""


def number_of(warps: int) -> str:
    return STORED.format(8 + (warps - 1).bit_length())


@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 32])
@pytest.mark.parametrize("seed", [None, 3])
def test_lanes_and_workgroups_are_numbered(warps: int, batch: int, seed: int | None) -> None:
    out = np.zeros((3, 64 * warps), np.int32)
    kernel = code(
        f"s_mov_b32 s22, s2\ns_mul_i32 s24, s2, 1000\nv_add_u32_e32 v9, s24, v0\n{number_of(warps)}"
    )
    found = whole(kernel, out, grid=(3, 1, 1), warps=warps, batch=batch, seed=seed)
    assert out.tolist() == [[1000 * w + i for i in range(64 * warps)] for w in range(3)]
    assert found.instructions == 3 * warps * 10
    assert found.bytes_written == out.nbytes and found.bytes_read == 3 * warps * 8
    assert found.by_mnemonic["global_store_dword"] == 3 * warps
    assert found.by_mnemonic["v_add_u32"] == 6 * warps and "s_barrier" not in found.by_mnemonic


def test_three_axes_and_the_registers_that_come_before() -> None:
    """The numbers of a workgroup follow the registers that a user asks for; x runs fastest."""
    directives = "\n".join(
        f".amdhsa_{name} {value}"
        for name, value in {
            "user_sgpr_private_segment_buffer": 1, "user_sgpr_dispatch_ptr": 1,
            "user_sgpr_queue_ptr": 1, "user_sgpr_kernarg_segment_ptr": 1, "user_sgpr_count": 10,
            "system_sgpr_workgroup_id_x": 1, "system_sgpr_workgroup_id_y": 0,
            "system_sgpr_workgroup_id_z": 1,
        }.items()
    )  # fmt: skip
    body = "s_lshl_b32 s23, s11, 1\ns_add_u32 s22, s10, s23\ns_mul_i32 s24, s11, 10\n"
    body += f"s_add_u32 s24, s24, s10\nv_mov_b32_e32 v9, s24\n{number_of(1)}"
    out = np.zeros((3, 2, 64), np.int32)
    whole(code(body, directives, pointer=8), out, grid=(2, 1, 3))
    assert (out == (10 * np.arange(3)[:, None] + np.arange(2))[..., None]).all()


def test_a_kernel_that_does_not_ask_for_its_arguments_is_refused() -> None:
    with pytest.raises(EmulatorError, match="k does not ask for its arguments"):
        code("s_nop 0", ".amdhsa_user_sgpr_kernarg_segment_ptr 0")


@pytest.mark.parametrize("warps", [1, 4])
def test_arguments_lie_where_the_metadata_says(warps: int) -> None:
    """Also those that Triton and the runtime append: pointers that are not given are 0."""
    places = [argument(0, 8, "global_buffer"), argument(16, 4), argument(24, 8), argument(32, 8)]
    hidden = ["block_count_x", "block_count_y", "block_count_z"]
    places += [argument(40 + 4 * i, 4, f"hidden_{name}") for i, name in enumerate(hidden)]
    sizes = ["group_size_x", "group_size_y", "group_size_z"]
    places += [argument(52 + 2 * i, 2, f"hidden_{name}") for i, name in enumerate(sizes)]
    body = "\n".join(
        f"s_load_dword s30, s[0:1], {4 * i}\ns_waitcnt lgkmcnt(0)\nv_mov_b32_e32 v9, s30\n"
        f"v_mov_b32_e32 v1, {4 * i}\nglobal_store_dword v1, v9, s[20:21]"
        for i in range(15)
    )
    out = np.zeros(15, np.uint32)
    kernel = code(body, arguments="".join(places))
    whole(kernel, out, ("i32", -7), ("f64", 1.0), grid=(2, 3, 4), warps=warps)
    group = [64 * warps | 1 << 16, 1]
    assert out[2:].tolist() == [0, 0, 2**32 - 7, 0, 0, 0x3FF00000, 0, 0, 2, 3, 4, *group]
    with pytest.raises(EmulatorError, match=r"^argument 1 has 8 bytes, the kernel's has 4$"):
        whole(kernel, out, ("i64", 1))
    with pytest.raises(EmulatorError, match=r"^k: 5 arguments, the kernel has 4$"):
        whole(kernel, out, *[("i64", 1)] * 4)
    with pytest.raises(EmulatorError, match=r"^k: 1 arguments, the kernel has 4$"):
        whole(kernel, out)
    with pytest.raises(
        EmulatorError, match=r"^argument 1: type 'f16' is none of i8, i16, i32, i64, "
    ):
        whole(kernel, out, ("f16", 1))


def test_arguments_without_metadata_follow_one_another() -> None:
    """Each at a multiple of its size."""
    body = "s_load_dwordx4 s[24:27], s[0:1], 8\ns_load_dwordx2 s[28:29], s[0:1], 24\n"
    body += "s_waitcnt lgkmcnt(0)\n"
    body += "\n".join(
        f"v_mov_b32_e32 v9, s{24 + i}\nv_mov_b32_e32 v1, {4 * i}\nglobal_store_dword v1, v9, s[20:21]"
        for i in range(6)
    )
    out = np.zeros(6, np.uint32)
    numbers = ("u8", 1), ("i16", -2), ("i32", -3), ("u64", 5), ("f32", 1.0), ("u8", 9)
    whole(code(body), out, *numbers)
    assert out.tolist() == [1 | 0xFFFE << 16, 2**32 - 3, 5, 0, 0x3F800000, 9]


BRANCHES = {
    "s_branch": ("s_nop 0", [1, 1]),
    "s_cbranch_scc0": ("s_cmp_eq_u32 s2, 1", [1, 0]),
    "s_cbranch_scc1": ("s_cmp_eq_u32 s2, 1", [0, 1]),
    "s_cbranch_vccz": ("v_cmp_eq_u32_e32 vcc, 0, v0\ns_mul_i32 vcc_lo, vcc_lo, s2", [1, 0]),
    "s_cbranch_vccnz": ("v_cmp_eq_u32_e32 vcc, 0, v0\ns_mul_i32 vcc_lo, vcc_lo, s2", [0, 1]),
    "s_cbranch_execz": ("s_mov_b32 s30, s2\ns_mov_b32 s31, 0\ns_and_b64 exec, exec, s[30:31]", [1, 0]),
    "s_cbranch_execnz": ("s_mov_b32 s30, s2\ns_mov_b32 s31, 0\ns_and_b64 exec, exec, s[30:31]", [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_branch(branch: str, seed: int | None) -> None:
    """Two workgroups of one batch, of which one takes it."""
    before, taken = BRANCHES[branch]
    body = f"s_mov_b32 s22, s2\nv_mov_b32_e32 v9, 0\n{before}\n{branch} .L1\n"
    body += "s_mov_b32 s25, 0\ns_branch .L2\n.L1:\ns_mov_b32 s25, 1\n.L2:\n"
    body += f"s_mov_b64 exec, -1\nv_mov_b32_e32 v9, s25\n{number_of(1)}"
    out = np.full((2, 64), 9, np.int32)
    whole(code(body), out, grid=(2, 1, 1), seed=seed)
    assert out[:, 0].tolist() == taken and (out == out[:, :1]).all()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_loops_of_different_lengths(seed: int | None) -> None:
    """Each workgroup counts as often as its number says."""
    body = "s_mov_b32 s22, s2\ns_mov_b32 s25, 0\n.L1:\ns_add_u32 s25, s25, 3\ns_sub_u32 s2, s2, 1\n"
    body += f"s_cmp_lg_i32 s2, -1\ns_cbranch_scc1 .L1\nv_mov_b32_e32 v9, s25\n{number_of(1)}"
    out = np.zeros((5, 64), np.int32)
    found = whole(code(body), out, grid=(5, 1, 1), seed=seed)
    assert out[:, 0].tolist() == [3, 6, 9, 12, 15]
    assert found.by_mnemonic["s_sub_u32"] == 15


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("lds", [(0, 1024), (1024, 0), (512, 512)])
def test_waves_meet_at_a_barrier(seed: int | None, lds: tuple[int, int]) -> None:
    """Each wave reads what the next one has written, round after round, and the last one ends early.
    The LDS is what the kernel declares and what the launch adds."""
    body = """s_mov_b32 s22, s2
v_readfirstlane_b32 s24, v0
v_lshlrev_b32_e32 v2, 2, v0
v_xor_b32_e32 v3, 0x100, v2
s_mov_b32 s25, 0
.L1:
v_add_u32_e32 v4, s25, v0
ds_write_b32 v2, v4
s_waitcnt lgkmcnt(0)
s_barrier
ds_read_b32 v9, v3
s_waitcnt lgkmcnt(0)
s_barrier
s_add_u32 s25, s25, 1
s_cmp_lg_u32 s25, 3
s_cbranch_scc1 .L1
""" + number_of(4)
    out = np.zeros((2, 256), np.int32)
    declared, added = lds
    kernel = code(body, f".amdhsa_group_segment_fixed_size {declared}")
    whole(kernel, out, grid=(2, 1, 1), warps=4, lds=added, seed=seed)
    assert (out == (np.arange(256) ^ 64) + 2).all()
    with pytest.raises(EmulatorError, match="the workgroup has 1020 bytes"):
        whole(kernel, out, grid=(2, 1, 1), warps=4, lds=added - 4, seed=seed)


@pytest.mark.parametrize("seed", [None, 0])
def test_nobody_waits_for_waves_that_have_ended(seed: int | None) -> None:
    body = (
        """s_mov_b32 s22, s2
v_readfirstlane_b32 s24, v0
v_mov_b32_e32 v9, 7
s_cmp_eq_u32 s24, 64
s_cbranch_scc1 .L2
s_barrier
s_barrier
"""
        + number_of(4)
        + "\n.L2:"
    )
    out = np.zeros((2, 256), np.int32)
    whole(code(body), out, grid=(2, 1, 1), warps=4, seed=seed)
    assert (out == np.where(np.arange(256) // 64 == 1, 0, 7)).all()


def test_an_instruction_too_many_is_an_error() -> None:
    body = (
        "s_mov_b32 s25, 0\n.L1:\ns_add_u32 s25, s25, 1\ns_cmp_lg_u32 s25, 100\ns_cbranch_scc1 .L1"
    )
    out = np.zeros(1, np.int32)
    instructions = whole(code(body), out).instructions
    assert instructions == 3 + 300 + 1
    whole(code(body), out, limit=303)
    with pytest.raises(EmulatorError, match="more than 290 instructions: does this loop end"):
        whole(code(body), out, limit=290)


def test_code_has_to_end() -> None:
    with pytest.raises(EmulatorError, match=r"^the code ends without s_endpgm$"):
        Kernel("k:\n\ts_nop 0\n", "k").run([], (1, 1, 1), 1, 0)


def test_counts_add_up() -> None:
    one = Statistics(1, 2, 3)
    one.by_mnemonic["a"] += 1
    both = one + one
    assert (both.instructions, both.bytes_read, both.bytes_written) == (2, 4, 6)
    assert both.by_mnemonic == {"a": 2} and Statistics().by_mnemonic == {}


def test_registers_that_only_the_code_names() -> None:
    """As many as the highest operand says, of both kinds."""
    body = "s_mov_b32 s22, s2\nv_accvgpr_write_b32 a5, 3\n"
    body += "v_accvgpr_read_b32 v30, a5\nv_mov_b32_e32 v9, v30\n"
    out = np.zeros((1, 64), np.int32)
    whole(code(body + number_of(1)), out)
    assert (out == 3).all()


def test_a_trace_sees_each_instruction_of_each_wave() -> None:
    """Its place in the program, and the waves that are about to execute it."""
    seen: list[tuple[int, list[int]]] = []

    def trace(place: int, waves: Waves) -> None:
        seen.append((place, waves.wave.tolist()))

    found = whole(code("s_nop 0\ns_nop 1"), np.zeros(1, np.int32), warps=2, trace=trace)
    assert seen == [(place, [0, 1]) for place in range(5)]
    assert found.instructions == 10


def test_waves_may_sleep_for_a_while() -> None:
    """Each so many times as one alone."""
    text = "s_mov_b32 s7, 15\n.L1:\ns_sleep 1\ns_sub_u32 s7, s7, 1\ns_cmp_lg_u32 s7, 0\n"
    kernel = code(text + "s_cbranch_scc1 .L1")
    for seed in (None, 0):
        found = whole(kernel, np.zeros(1, np.int32), warps=2, seed=seed)
        assert found.by_mnemonic["s_sleep"] == 30


@pytest.mark.parametrize("branch", ["", "s_cbranch_vccnz .L2\n"], ids=["", "with a branch"])
def test_two_waves_that_sleep_for_ever_are_told(branch: str) -> None:
    """Each in a loop of its own, also where a branch that is not taken lies on the way back."""
    loop = ".L{0}:\ns_sleep 1\n" + branch + "s_branch .L{0}\n"
    body = "s_mov_b64 vcc, 0\nv_readfirstlane_b32 s24, v0\ns_cmp_eq_u32 s24, 64\n"
    kernel = code(f"{body}s_cbranch_scc1 .L3\n{loop.format(1)}{loop.format(3)}.L2:")
    with pytest.raises(EmulatorError, match="all waves that are left wait in their sleep"):
        whole(kernel, np.zeros(1, np.int32), warps=2, limit=500_000)


def test_numbers_that_are_no_numbers_give_no_warning() -> None:
    body = "v_mov_b32_e32 v2, 0x7f800000\nv_sub_f32_e32 v3, v2, v2\nv_rcp_f32_e32 v4, 0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole(code(body), np.zeros(1, np.int32))
