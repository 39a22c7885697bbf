"""Permutations of lanes, worked out by hand."""

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from tests.support.gfx950_runs import execute, fresh
from tools.gfx950.assembly import EmulatorError
from tools.gfx950.waves import EXEC

ALL = 2**64 - 1


def after(line: str, active: int = ALL) -> list[int]:
    """v10 after a line, by lane. v0 is 100 + the lane, v1 4 * (63 - lane), v2 4 * (lane // 2), v10 99."""
    state = fresh(1)
    lane = np.arange(64)
    for i, value in enumerate((100 + lane, 4 * (63 - lane), 4 * (lane // 2))):
        state.vgpr[i] = value
    state.vgpr[10] = 99
    state.sgpr[5] = 65
    state.write_s64(EXEC, np.array([active], np.uint64))
    return execute(line, state).vgpr[10][0].tolist()


@pytest.mark.parametrize(
    ("offset", "first"),  # the source lanes of lanes 0 to 9
    [
        ("swizzle(SWAP,4)", [4, 5, 6, 7, 0, 1, 2, 3, 12, 13]),
        ("swizzle(REVERSE,8)", [7, 6, 5, 4, 3, 2, 1, 0, 15, 14]),
        ("swizzle(BROADCAST,4,1)", [1, 1, 1, 1, 5, 5, 5, 5, 9, 9]),
        ("swizzle(QUAD_PERM,3,1,2,0)", [3, 1, 2, 0, 7, 5, 6, 4, 11, 9]),
        ('swizzle(BITMASK_PERM,"p1pi0")', [10, 10, 8, 8, 14, 14, 12, 12, 10, 10]),
        # As numbers: lane & 26 | 4, with 17 inverted; a permutation of four.
        ("0x449a", [21, 21, 23, 23, 21, 21, 23, 23, 29, 29]),
        ("0x8039", [1, 2, 3, 0, 5, 6, 7, 4, 9, 10]),
        ("31", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_swizzles(offset: str, first: list[int]) -> None:
    """The same permutation in both halves of the wave."""
    found = after(f"ds_swizzle_b32 v10, v0 offset:{offset}")
    assert found[:10] == [100 + lane for lane in first]
    assert found[32:42] == [132 + lane for lane in first]


def test_upper_bits_of_a_swizzle() -> None:
    """Bits 3 and 4 of a lane are kept, set, removed or inverted, like the others."""
    for offset, lane, source in (
        ('swizzle(BITMASK_PERM,"ip010")', 8, 26),
        ('swizzle(BITMASK_PERM,"i0010")', 63, 34),
        ("0x449a", 16, 5),
        ("0x449a", 63, 47),
    ):
        assert after(f"ds_swizzle_b32 v10, v0 offset:{offset}")[lane] == 100 + source, offset


@pytest.mark.parametrize("offset", ["swizzle(FFT,1)", "0xc020", "0xe001", "0x8139"])
def test_other_swizzles_are_refused(offset: str) -> None:
    """The card can also rotate the lanes, and reorder them for an FFT."""
    with pytest.raises(EmulatorError, match=r"offset:.* is not known"):
        after(f"ds_swizzle_b32 v10, v0 offset:{offset}")


def test_inactive_lanes_give_0_and_keep_what_they_have() -> None:
    assert after("ds_swizzle_b32 v10, v0 offset:swizzle(SWAP,1)", 7)[:4] == [101, 100, 0, 99]
    assert after("ds_bpermute_b32 v10, v1, v0", 3 | 3 << 62)[:3] == [163, 162, 99]
    assert after("ds_bpermute_b32 v10, v1, v0", 3 | 1 << 62)[:3] == [0, 162, 99]


def test_lanes_that_are_fetched_and_sent() -> None:
    """An address is four times a lane; what is above 63 begins again at 0."""
    assert after("ds_bpermute_b32 v10, v1, v0 offset:8")[:4] == [101, 100, 163, 162]
    assert after("ds_permute_b32 v10, v2, v0 offset:4")[:4] == [0, 101, 103, 105]
    assert after("ds_permute_b32 v10, v2, v0 offset:4")[32:35] == [163, 0, 0]
    assert after("ds_permute_b32 v10, v2, v0 offset:4", ALL ^ 1 << 5)[2:5] == [103, 104, 107]
    assert after("ds_permute_b32 v10, v2, v0 offset:252")[:2] == [103, 105]
    assert after("ds_permute_b32 v10, v2, v0", 1)[:2] == [100, 99]


def test_a_lane_that_a_register_names() -> None:
    """Bits above the sixth do not count."""
    state = fresh(2)
    state.vgpr[0], state.sgpr[5] = np.arange(100, 164), np.array([65, 2])
    execute("v_readlane_b32 s6, v0, s5", state)
    assert state.sgpr[6].tolist() == [101, 102]
    execute("v_writelane_b32 v0, 7, s5", state)
    assert state.vgpr[0][:, :4].tolist() == [[100, 7, 102, 103], [100, 101, 7, 103]]


def test_ones_below_a_lane() -> None:
    for half, first in (("lo", 0), ("hi", 32)):
        found = after(f"v_mbcnt_{half}_u32_b32 v10, 5, 7")
        assert found == [7 + (lane > first) + (lane > first + 2) for lane in range(64)]


def test_a_function_of_three_bits() -> None:
    """With all eight cases in one byte, the result is the function's own number."""
    state = fresh(1)
    for i, bits in enumerate((0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA)):
        state.vgpr[i] = bits
    for table in (0x6D, 0xCA, 0):
        execute(f"v_bitop3_b32 v10, v0, v1, v2 bitop3:{table:#x}", state)
        assert (state.vgpr[10] == table * 0x01010101).all()
        execute(f"v_bitop3_b16 v10, v0, v1, v2 bitop3:{table:#x}", state)
        assert (state.vgpr[10] == table * 0x0101).all()


def test_swaps() -> None:
    """A swap of registers leaves inactive lanes as they are; one of lanes needs all of them."""
    state = fresh(1)
    state.vgpr[0], state.vgpr[1] = 3, 4
    execute("v_pk_mov_b32 v[0:1], v[0:1], v[0:1] op_sel:[1,0]", state)
    assert (state.vgpr[0] == 4).all() and (state.vgpr[1] == 3).all()
    state.write_s64(EXEC, np.array([2], np.uint64))
    execute("v_swap_b32 v0, v1", state)
    assert state.vgpr[0][0, :3].tolist() == [4, 3, 4] and state.vgpr[1][0, :3].tolist() == [3, 4, 3]
    with pytest.raises(EmulatorError, match="inactive lanes is not emulated"):
        execute("v_permlane32_swap_b32 v0, v1", state)


def test_dot_products() -> None:
    """(1, 2) and (3, 3), in float16 and in bfloat16; other parts of the registers are refused."""
    for kind, pairs in (("f16", (0x40003C00, 0x42004200)), ("bf16", (0x40003F80, 0x40404040))):
        state = fresh(1)
        state.vgpr[0], state.vgpr[1] = pairs
        execute(f"v_dot2_f32_{kind} v10, v0, v1, 0.5", state)
        assert (state.vgpr[10].view(np.float32) == 9.5).all()
        with pytest.raises(EmulatorError, match="op_sel_hi of a dot product"):
            execute(f"v_dot2_f32_{kind} v10, v0, v1, 0.5 op_sel_hi:[0,1,1]", state)
