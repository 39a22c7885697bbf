"""Vector instructions worked out by hand: modifiers, DPP, SDWA, packed values, and what AMD's text leaves
out. Each test function makes the tables of instructions anew under `tools.mutate`."""

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from tests.support.gfx950_runs import execute, fresh
from tools.gfx950.assembly import EmulatorError
from tools.gfx950.waves import EXEC, VCC, Waves

MASKS = "row_mask:0xf bank_mask:0xf"
OLD = 99


def bits(*values: float) -> list[int]:
    return np.array(values, np.float32).view(np.uint32).tolist()


def after(line: str, *sources: int, active: int = 2**64 - 1) -> Waves:
    """One wave after a line; v0, v1, ... hold the sources in all lanes, v10 and v11 are 99."""
    state = fresh(1)
    for i, value in enumerate(sources):
        state.vgpr[i] = value
    state.vgpr[10:12] = OLD
    state.write_s64(EXEC, np.array([active], np.uint64))
    return execute(line, state)


def result(line: str, *sources: int) -> int:
    found = np.unique(after(line, *sources).vgpr[10])
    assert len(found) == 1
    return int(found[0])


def pair(line: str, *sources: int) -> list[int]:
    return after(line, *sources).vgpr[10:12, 0, 5].tolist()


def refused(line: str, said: str) -> None:
    with pytest.raises(EmulatorError, match=said):
        after(line, 1, 2, 3)


def test_what_becomes_of_a_float_result() -> None:
    a, b = bits(1.5, 2.0)
    for modifier, value in (
        ("", 3.5),
        (" mul:2", 7),
        (" mul:4", 14),
        (" div:2", 1.75),
        (" clamp", 1),
    ):
        assert [result(f"v_add_f32_e64 v10, v0, v1{modifier}", a, b)] == bits(value)
    low, nan, part = bits(-3, np.nan, 0.25)
    assert result("v_mul_f32_e64 v10, v0, v1 clamp", low, a) == 0
    assert result("v_mul_f32_e64 v10, v0, v1 clamp", nan, a) == 0
    assert [result("v_mul_f32_e64 v10, v0, v1 mul:2 clamp", part, a)] == bits(0.75)


def test_what_becomes_of_an_integer_result() -> None:
    most = 2**32 - 1
    assert result("v_add_u32_e64 v10, v0, v1", most, 2) == 1
    assert result("v_add_u32_e64 v10, v0, v1 clamp", most, 2) == most
    assert result("v_add_u32_e64 v10, v0, v1 clamp", most - 2, 2) == most
    assert result("v_add_u32_e64 v10, v0, v1 clamp", 5, 2) == 7
    assert result("v_sub_u32_e64 v10, v0, v1", 1, 2) == most
    assert result("v_sub_u32_e64 v10, v0, v1 clamp", 1, 2) == 0
    assert result("v_sub_u32_e64 v10, v0, v1 clamp", 5, 2) == 3
    for line in ("v_add_u32_e64 v10, v0, v1 mul:2", "v_and_b32_e64 v10, v0, v1 clamp"):
        refused(line, "an integer result with mul, div or clamp is not emulated")


def test_operands_that_are_refused() -> None:
    refused("v_add_u32_e64 v10, v0, v1 op_sel:[0,1,0]", "^op_sel on operands of 32 bits$")
    refused("v_fmac_f32_e64 v10, v0, v1 op_sel:[0,1,0,0]", "^op_sel on operands of 32 bits$")
    refused("v_add_u32_e32 v10, sext(v0), v1", r"^sext\(\) without a selected byte or word$")
    refused("v_cmp_eq_u32_e64 v10, v0, v1", "operand 'v10': a mask must go to SGPRs")
    refused("v_add_u32_e32 s10, v0, v1", "operand 's10': the result must go to VGPRs")
    refused("v_pk_add_f16 v10, v0, v1 clamp", "^clamp of a packed result is not emulated$")
    refused(f"v_mov_b32_dpp v10, s0 row_shr:1 {MASKS}", "^DPP permutes a VGPR$")
    refused(f"v_mov_b32_dpp v10, v0 {MASKS}", "^DPP takes exactly one permutation$")
    refused(f"v_mov_b32_dpp v10, v0 row_bcast:7 {MASKS}", "^DPP row_bcast:7 is not known$")
    pad = "src0_sel:DWORD src1_sel:DWORD"
    refused(f"v_add_u32_sdwa v10, v0, v1 dst_sel:BYTE_0 dst_unused:UNUSED_SEXT {pad}",
            "dst_unused:UNUSED_SEXT is not emulated")  # fmt: skip


def lanes(line: str, active: int = 2**64 - 1) -> list[int]:
    """v10 by lane, where v0 is the lane."""
    state = fresh(1)
    state.vgpr[0], state.vgpr[1], state.vgpr[10:12] = np.arange(64), 100 + np.arange(64), OLD
    state.write_s64(EXEC, np.array([active], np.uint64))
    return execute(line, state).vgpr[10][0].tolist()


def test_dpp() -> None:
    assert lanes(f"v_mov_b32_dpp v10, v0 row_bcast:31 {MASKS}") == [OLD] * 32 + [31] * 32
    found = lanes(f"v_mov_b32_dpp v10, v0 row_bcast:15 {MASKS}")
    assert found == [OLD] * 16 + [15] * 16 + [31] * 16 + [47] * 16
    assert lanes(f"v_mov_b32_dpp v10, v0 row_shl:3 {MASKS}")[11:18] == [
        14,
        15,
        OLD,
        OLD,
        OLD,
        19,
        20,
    ]
    assert lanes(f"v_mov_b32_dpp v10, v0 row_shl:3 {MASKS} bound_ctrl:0")[12:15] == [15, 0, 0]
    assert lanes(f"v_mov_b32_dpp v10, v0 row_ror:3 {MASKS}")[15:20] == [12, 29, 30, 31, 16]
    assert lanes(f"v_mov_b32_dpp v10, v0 row_mirror {MASKS}")[14:18] == [1, 0, 31, 30]
    assert lanes(f"v_mov_b32_dpp v10, v0 row_half_mirror {MASKS}")[6:10] == [1, 0, 15, 14]
    assert (
        lanes("v_mov_b32_dpp v10, v0 row_newbcast:2 row_mask:0x5 bank_mask:0x6")[:8]
        == [OLD] * 4 + [2] * 4
    )
    assert (
        lanes("v_mov_b32_dpp v10, v0 row_newbcast:2 row_mask:0x5 bank_mask:0x6")[12:24]
        == [OLD] * 12
    )
    quad = f"v_add_u32_dpp v10, v0, v1 quad_perm:[3,2,2,0] {MASKS}"
    assert lanes(quad)[4:8] == [7 + 104, 6 + 105, 6 + 106, 4 + 107]
    # An inactive lane is no source, and keeps what it has.
    assert lanes(quad, 0b1011)[:4] == [103, OLD, OLD, 103]
    assert lanes(f"{quad} bound_ctrl:0", 0b1011)[:4] == [103, 101, OLD, 103]


def test_dpp_with_a_result_of_64_bits() -> None:
    """Only the lanes that may be written are, in both registers."""
    state = fresh(1)
    state.vgpr[0], state.vgpr[10:12] = 0x38C0, OLD
    execute("v_cvt_pk_f32_fp8_dpp v[10:11], v0 row_newbcast:1 row_mask:0x2 bank_mask:0xf", state)
    for part, value in enumerate(bits(-2, 1)):
        assert state.vgpr[10 + part, 0].tolist() == [OLD] * 16 + [value] * 16 + [OLD] * 32
    refused(
        f"v_mov_b64_dpp v[10:11], v[0:1] row_newbcast:1 {MASKS}", "^DPP of a pair of VGPRs is not"
    )


def test_sdwa() -> None:
    """Bytes and words of the sources and of the result."""
    for place, value in (
        ("BYTE_0", 0x44),
        ("BYTE_3", 0x81),
        ("WORD_0", 0x3344),
        ("WORD_1", 0x81F2),
    ):
        line = "v_add_u32_sdwa v10, {}, v1 dst_sel:DWORD dst_unused:UNUSED_PAD"
        line += f" src0_sel:{place} src1_sel:BYTE_1"
        assert result(line.format("v0"), 0x81F23344, 0x0305) == value + 3, place
        bound = 2 ** (8 if "BYTE" in place else 16)
        signed = value - bound if value >= bound // 2 else value
        assert result(line.format("sext(v0)"), 0x81F23344, 0x0305) == (signed + 3) % 2**32, place
    sources = "src0_sel:DWORD src1_sel:DWORD"
    for place, pad, kept in (
        ("BYTE_0", 0x78, 0x78), ("BYTE_2", 0x780000, 0x780063), ("WORD_1", 0x56780000, 0x56780063),
        ("WORD_0", 0x5678, 0x5678), ("DWORD", 0x12345678, 0x12345678),
    ):  # fmt: skip
        line = f"v_or_b32_sdwa v10, v0, v1 dst_sel:{place} dst_unused:UNUSED_{{}} {sources}"
        assert result(line.format("PAD"), 0x12345678, 0) == pad
        others = after(line.format("PAD"), 0x12345678, 0).vgpr
        assert (others[0] == 0x12345678).all() and not others[1].any()
        assert result(line.format("PRESERVE"), 0x12345678, 0) == kept


def test_halves_of_16_bits() -> None:
    """op_sel takes the upper half of a source, and writes that of the result; the other half stays."""
    line = "v_add_u16_e64 v10, v0, v1"
    assert result(line, 0x00020001, 0x00200010) == 0x11
    assert result(f"{line} op_sel:[1,0,0]", 0x00020001, 0x00200010) == 0x12
    assert result(f"{line} op_sel:[0,1,0]", 0x00020001, 0x00200010) == 0x21
    assert result(f"{line} op_sel:[0,1,1]", 0x00020001, 0x00200010) == 0x00210000 | OLD


def test_packed_halves() -> None:
    """op_sel and op_sel_hi choose the half of each source, neg_lo and neg_hi its sign."""
    a, b = 0x40003C00, 0x44004200  # (1, 2) and (3, 4) in float16
    for modifiers, low, high in (
        ("", 4, 6), (" op_sel:[1,0]", 5, 6), (" op_sel_hi:[0,1]", 4, 5),
        (" op_sel:[1,1] op_sel_hi:[0,0]", 6, 4), (" neg_lo:[1,0]", 2, 6), (" neg_hi:[0,1]", 4, -2),
    ):  # fmt: skip
        expected = np.array([low, high], np.float16).view(np.uint32)[0]
        assert result(f"v_pk_add_f16 v10, v0, v1{modifiers}", a, b) == expected, modifiers
    sources = bits(1, 2, 3, 4)
    for modifiers, low, high in (
        ("", 4, 6), (" op_sel:[1,0]", 5, 6), (" op_sel_hi:[1,0]", 4, 5),
        (" neg_lo:[0,1] neg_hi:[1,0]", -2, 2),
    ):  # fmt: skip
        line = f"v_pk_add_f32 v[10:11], v[0:1], v[2:3]{modifiers}"
        assert pair(line, *sources) == bits(low, high), modifiers
    assert pair("v_pk_mul_f32 v[10:11], v[0:1], 2.0", *sources) == bits(2, 4)
    swapped = after("v_pk_add_f32 v[0:1], v[0:1], v[2:3] op_sel:[1,0] op_sel_hi:[0,1]", *sources)
    assert swapped.vgpr[0:2, 0, 5].tolist() == bits(5, 5)


def test_masks_and_accumulators() -> None:
    """A comparison is 0 for inactive lanes; v_cmpx writes EXEC too."""
    state = after("v_cmp_t_u32_e64 s[6:7], 5, v0", active=0b1101)
    assert state.read_s64(6)[0] == 0b1101 == state.read_s64(EXEC)[0]
    assert after("v_cmpx_f_u32_e32 vcc, v0, v1", active=0b1101).read_s64(EXEC)[0] == 0
    state = fresh(1)
    state.vgpr[0], state.agpr[1] = np.arange(64), OLD
    state.write_s64(EXEC, np.array([6], np.uint64))
    execute("v_accvgpr_write_b32 a1, v0", state)
    assert state.agpr[1, 0, :4].tolist() == [OLD, 1, 2, OLD]


def test_bits() -> None:
    assert result("v_bfrev_b32_e32 v10, v0", 0x12345678) == 0x1E6A2C48
    assert result("v_bfe_i32 v10, v0, 4, 8", 0x00000F80) == 2**32 - 8
    assert result("v_bfe_i32 v10, v0, 4, 8", 0x000007F0) == 0x7F
    assert result("v_bfe_i32 v10, v0, 4, 0", 0x000007F0) == 0
    assert [
        result("v_ffbh_i32_e32 v10, v0", x) for x in (0xFFF00000, 0x0000FFFF, 0, 2**32 - 1)
    ] == ([12, 16, 2**32 - 1, 2**32 - 1])


def test_the_carry_of_a_signed_product() -> None:
    """It is the sum's 65th bit: its sign, also where 64 bits hold another one."""
    line = "v_mad_i64_i32 v[10:11], s[4:5], v0, v1, v[2:3]"
    top, most = 0x7FFFFFFF, 2**32 - 1
    for sources, total, negative in (
        ((2, 3, 0, 0), 6, False), ((2, most, 1, 0), -1, True), ((2, most, 2, 0), 0, False),
        ((1, 1, most, top), 2**63, False), ((1, most, 0, 2**31), -(2**63) - 1, True),
    ):  # fmt: skip
        state = after(line, *sources)
        found = int(state.vgpr[10, 0, 3]) | int(state.vgpr[11, 0, 3]) << 32
        assert found == total % 2**64
        assert state.read_s64(4)[0] == (2**64 - 1) * negative, sources


def test_the_parts_of_a_float() -> None:
    """0 has the exponent 0, and so have infinities and NaNs."""
    numbers = bits(1, -12, 2.0**-140, 0, np.inf, np.nan)
    exponents = [result("v_frexp_exp_i32_f32_e32 v10, v0", x) for x in numbers]
    assert exponents == [1, 4, 2**32 - 139, 0, 0, 0]
    mantissas = [result("v_frexp_mant_f32_e32 v10, v0", x) for x in numbers]
    assert mantissas == bits(0.5, -0.75, 0.5, 0, np.inf, np.nan)
    for exponent, value in ((3, 12), (-3, 0.1875), (500, np.inf), (-500, 0)):
        assert [result("v_ldexp_f32 v10, v0, v1", *bits(1.5), exponent % 2**32)] == bits(value)


def test_float16_toward_zero() -> None:
    """Down to 0 and to the largest finite number; what fits stays, with its sign."""
    line = "v_cvt_pkrtz_f16_f32 v10, v0, v1"
    cases = {1.0: 0x3C00, 1.0009: 0x3C00, 1.0014: 0x3C01, -1.0014: 0xBC01, 1e-9: 0, -1e-9: 0x8000}
    for a, low in (cases | {65535.0: 0x7BFF, -1e9: 0xFBFF, np.inf: 0x7C00}).items():
        assert result(line, *bits(a, 2.0)) == 0x40000000 | low, a
        assert result(line, *bits(2.0, a)) == 0x4000 | low << 16, a


def test_fp8_without_a_scale() -> None:
    codes = 0x3038_40C0  # in fp8 from the lowest byte on: -2, 2, 1, 0.5; in bf8 -2, 2, 0.5, 0.125
    assert pair("v_cvt_pk_f32_fp8_e32 v[10:11], v0", codes) == bits(-2, 2)
    assert pair("v_cvt_pk_f32_bf8_e32 v[10:11], v0", codes) == bits(-2, 2)
    assert pair("v_cvt_pk_f32_fp8_e64 v[10:11], v0 op_sel:[1,0]", codes) == bits(1, 0.5)
    assert [result("v_cvt_f32_fp8_e32 v10, v0", codes)] == bits(-2)
    assert [result("v_cvt_f32_bf8_e32 v10, v0", codes)] == bits(-2)


def test_integers_from_floats() -> None:
    """Toward zero, and no further than the type reaches; a NaN is 0."""
    most, least = 2**31 - 1, -(2**31)
    for x, signed, unsigned in (
        (-1.9, -1, 0), (2.9, 2, 2), (3e9, most, 3 * 10**9), (1e10, most, 2**32 - 1), (-1e10, least, 0),
        (np.nan, 0, 0), (np.inf, most, 2**32 - 1),
    ):  # fmt: skip
        assert result("v_cvt_i32_f32_e32 v10, v0", *bits(x)) == signed % 2**32, x
        assert result("v_cvt_u32_f32_e32 v10, v0", *bits(x)) == unsigned, x
    assert [result("v_cvt_f32_ubyte2_e32 v10, v0", 0x12F45678)] == bits(0xF4)


def test_sums_of_pairs() -> None:
    """The destination is what the products are added to."""
    (old,) = bits(0.5)
    for kind, a, b in (("f16", 0x40003C00, 0x44004200), ("bf16", 0x40003F80, 0x40804040)):
        state = fresh(1)
        state.vgpr[0], state.vgpr[1], state.vgpr[10] = a, b, old
        execute(f"v_dot2c_f32_{kind}_e32 v10, v0, v1", state)
        assert np.unique(state.vgpr[10]).tolist() == bits(1 * 3 + 2 * 4 + 0.5)


def test_the_last_step_of_a_division() -> None:
    """VCC names the lanes that are scaled back, up or down by the exponent of what is added."""
    state = fresh(1)
    small, big = bits(2.0**-60, 2.0**60)
    state.vgpr[0], state.vgpr[1], state.vgpr[2] = (
        bits(0)[0],
        bits(0)[0],
        np.where(np.arange(64) < 4, big, small),
    )
    state.write_s64(VCC, np.array([0b110011], np.uint64))
    execute("v_div_fmas_f32 v10, v0, v1, v2", state)
    expected = [2.0**124] * 2 + [2.0**60] * 2 + [2.0**-124] * 2 + [2.0**-60] * 2
    assert state.vgpr[10, 0, :8].tolist() == bits(*expected)
