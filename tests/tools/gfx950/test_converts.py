"""Conversions to small formats into a part of a register, by hand."""

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from tests.support.gfx950_runs import execute, fresh
from tools.gfx950.assembly import EmulatorError

OLD = 0xAAAAAAAA


@pytest.mark.parametrize(
    ("line", "result"),
    [
        # 1 and 2 are 0x38 and 0x40 in fp8, 0x3c and 0x40 in bf8; halved they are codes 1 and 2 of fp4.
        ("v_cvt_pk_fp8_f32 v10, v0, v1", 0xAAAA4038),
        ("v_cvt_pk_fp8_f32 v10, v0, v1 op_sel:[0,0,1]", 0x4038AAAA),
        ("v_cvt_pk_bf8_f32 v10, v0, v1 op_sel:[0,0,0]", 0xAAAA403C),
        ("v_cvt_scalef32_pk_fp8_f32 v10, v0, v1, v2", 0xAAAA3830),
        ("v_cvt_scalef32_pk_fp8_f32 v10, v0, v1, v2 op_sel:[0,0,0,1]", 0x3830AAAA),
        ("v_cvt_scalef32_pk_fp4_f32 v10, v0, v1, v2", 0xAAAAAA21),
        ("v_cvt_scalef32_pk_fp4_f32 v10, v0, v1, v2 op_sel:[0,0,1,0]", 0xAAAA21AA),
        ("v_cvt_scalef32_pk_fp4_f32 v10, v0, v1, v2 op_sel:[0,0,1,1]", 0x21AAAAAA),
        ("v_cvt_scalef32_pk_fp4_f16 v10, v3, v2 op_sel:[0,0,0,1]", 0xAA21AAAA),
        ("v_cvt_scalef32_pk_bf8_bf16 v10, v4, v2", 0xAAAA3C38),
    ],
)
def test_the_rest_of_the_register_stays(line: str, result: int) -> None:
    """And so do all other registers."""
    state = fresh()
    sources = (0x3F800000, 0x40000000, 0x40000000, 0x40003C00, 0x40003F80)  # 1, 2, 2, (1, 2) twice
    for i, bits in enumerate(sources):
        state.vgpr[i] = bits
    state.vgpr[10] = OLD
    before = state.vgpr.copy()
    execute(line, state)
    before[10] = result
    np.testing.assert_array_equal(state.vgpr, before)


@pytest.mark.parametrize(
    ("line", "results"),
    [
        ("v_cvt_scalef32_pk_f32_fp4 v[10:11], v0, v1 op_sel:[0,1,0]", (0x3F800000, 0x40000000)),
        ("v_cvt_scalef32_pk_f32_fp4 v[10:11], v0, v1", (0x40400000, 0x40800000)),
        ("v_cvt_scalef32_pk_f16_fp4 v10, v0, v1 op_sel:[1,1,0]", (0x44004200, OLD)),
        ("v_cvt_scalef32_pk_f32_fp8 v[10:11], v2, v1 op_sel:[1,0,0]", (0x40000000, 0x40800000)),
        ("v_cvt_scalef32_pk_bf16_bf8 v10, v3, v1", (0x40804000, OLD)),
    ],
)
def test_small_numbers_times_their_scale(line: str, results: tuple[int, int]) -> None:
    """The scale is 2, or rather its exponent: its sign and mantissa do not count."""
    state = fresh()
    for i, bits in enumerate((0x43214343, 0xC0123456, 0x40380000, 0x0000403C)):
        state.vgpr[i] = bits
    state.vgpr[10], state.vgpr[11] = OLD, OLD
    before = state.vgpr.copy()
    execute(line, state)
    before[10], before[11] = results
    np.testing.assert_array_equal(state.vgpr, before)


def test_a_byte_needs_two_bits() -> None:
    said = "op_sel has three bits; expected four, of which two choose a byte"
    with pytest.raises(EmulatorError, match=f"^{said}$"):
        execute("v_cvt_scalef32_pk_fp4_f32 v10, v0, v1, v2 op_sel:[0,0,1]", fresh())
