"""Where a kernel's code ends, and which of it is the loop that does the work."""

from tools.gfx950.assembly import hot_cycle, hot_loop, parse

DECODE = "\tv_cvt_scalef32_pk_bf16_fp4 v4, v5, v6\n"
PRODUCT = "\tv_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]\n"


def lines(code: object) -> list[str]:
    return [one.mnemonic for one in code]  # pyright: ignore


def test_the_code_ends_at_its_label() -> None:
    program = parse("k:\n\ts_nop 0\n.Lfunc_end0:\n\ts_nop 1\n", "k")
    assert lines(program.instructions) == ["s_nop"]


def test_a_loop_may_end_with_a_branch_without_a_condition() -> None:
    text = f"k:\n.L1:\n\ts_cbranch_scc1 .L2\n{PRODUCT}\ts_branch .L1\n.L2:\n\ts_endpgm\n"
    mnemonics = ["s_cbranch_scc1", "v_mfma_f32_16x16x32_bf16", "s_branch"]
    assert lines(hot_loop(parse(text, "k"))) == mnemonics


def test_the_blocks_of_the_cycle_with_most_decodes() -> None:
    """Wherever the compiler has put them; what comes before and after it is not in it."""
    text = f"""k:
	s_nop 0
.L1:
	s_mov_b32 s0, 0
	s_cbranch_scc1 .L1
.L2:
{DECODE}	s_cbranch_scc1 .L4
	s_add_u32 s1, s1, 1
	s_branch .L5
.L3:
	s_sub_u32 s1, s1, 1
.L6:
	s_nop 1
	s_branch .L2
.L4:
	s_mul_i32 s1, s1, s1
	s_cbranch_scc0 .L3
.L5:
	s_endpgm
"""
    assert [lines(block) for block in hot_cycle(parse(text, "k"))] == [
        ["v_cvt_scalef32_pk_bf16_fp4", "s_cbranch_scc1"],
        ["s_sub_u32"],
        ["s_nop", "s_branch"],
        ["s_mul_i32", "s_cbranch_scc0"],
    ]
    assert hot_cycle(parse("k:\n\ts_nop 0\n\ts_endpgm\n", "k")) == ()
