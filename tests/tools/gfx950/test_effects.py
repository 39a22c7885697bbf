"""The registers that an instruction reads and writes: the emulator's action touches no others."""

import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("triton")

from tests.support.gfx950_kernels import SAMPLES
from tools.gfx950 import target
from tools.gfx950.assembly import EmulatorError, Instruction, parse
from tools.gfx950.effects import (
    LDS,
    SCC,
    WRITE_BACK,
    Effects,
    counters_of,
    effects,
    names_of,
)
from tools.gfx950.emulator import CONTROL
from tools.gfx950.registry import BUILDERS, plain
from tools.gfx950.waves import EXEC, Waves

BY_HAND = """
v_cmpx_gt_u32_e32 vcc, v1, v2
v_addc_co_u32_e32 v1, vcc, v2, v3, vcc
v_div_scale_f32 v2, vcc, v3, v4, v3
v_div_fmas_f32 v5, v6, v4, v5
v_mad_u64_u32 v[2:3], s[4:5], v6, v7, v[8:9]
v_pk_mul_f32 v[0:1], v[2:3], v[4:5] op_sel_hi:[1,0]
v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7] op_sel:[1,0,0] op_sel_hi:[1,1,0]
v_pk_mov_b32 v[0:1], v[2:3], v[4:5] op_sel:[1,0]
v_pk_add_f16 v0, v2, v3
v_add_f16_e64 v0, v1, v2 op_sel:[0,1,1]
v_fma_mixhi_f16 v0, v1, v2, v3 op_sel_hi:[1,0,0]
v_cvt_scalef32_pk_fp4_f32 v0, v1, v2, v3 op_sel:[0,0,1,0]
v_cvt_pk_fp8_f32 v0, v1, v2 op_sel:[0,0,1]
v_add_u16_sdwa v0, v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_1 src1_sel:DWORD
v_mov_b32_dpp v0, v1 row_shr:1 row_mask:0xf bank_mask:0xf
v_mov_b32_dpp v0, v1 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf bound_ctrl:0
v_swap_b32 v0, v1
v_permlane32_swap_b32 v0, v1
v_readfirstlane_b32 s4, v1
v_readlane_b32 s4, v1, s5
v_writelane_b32 v1, s4, s5
v_accvgpr_write_b32 a1, v2
v_accvgpr_read_b32 v2, a1
v_fmac_f32_e32 v0, v1, v2
v_dot2c_f32_bf16 v0, v1, v2
v_cndmask_b32_e32 v0, v1, v2, vcc
v_mfma_f32_16x16x32_bf16 a[0:3], v[4:7], v[8:11], a[0:3]
v_mfma_scale_f32_16x16x128_f8f6f4 v[0:3], v[4:11], v[12:15], v[0:3], v20, v21 op_sel_hi:[0,0,0] blgp:4
s_and_saveexec_b64 s[2:3], vcc
s_or_saveexec_b64 s[2:3], s[2:3]
s_addc_u32 s0, s1, s2
s_cselect_b64 s[0:1], s[2:3], -1
s_cmov_b32 s0, s1
s_cmp_lt_u32 s0, s1
s_bitset1_b32 s0, s1
s_mulk_i32 s0, 0x10
s_load_dwordx4 s[8:11], s[2:3], 0x10
s_buffer_load_dwordx2 s[8:9], s[4:7], 0x4
global_load_dword v2, v1, s[4:5]
global_load_dwordx4 v[4:7], v[2:3], off
global_load_short_d16_hi v4, v[2:3], off
buffer_load_dwordx4 v[8:11], v1, s[8:11], 0 offen
buffer_load_dword v8, off, s[8:11], s2
buffer_load_dwordx4 v1, s[8:11], 0 offen lds
global_load_lds_dwordx4 v[2:3], off
global_store_dwordx2 v1, v[2:3], s[4:5]
buffer_store_short_d16_hi v3, v1, s[8:11], 0 offen
global_atomic_add v0, v1, v2, s[4:5] sc0
global_atomic_add v1, v2, s[4:5]
global_atomic_cmpswap v5, v1, v[2:3], s[4:5] sc0
buffer_atomic_cmpswap v[2:3], v1, s[8:11], 0 offen sc0
buffer_atomic_add_f32 v2, v1, s[8:11], 0 offen
ds_read2_b64 v[4:7], v1 offset1:1
ds_read_u16_d16 v4, v1
ds_read_b64_tr_b16 v[4:5], v1
ds_write2st64_b32 v1, v2, v3 offset1:4
ds_write_b8_d16_hi v1, v2
ds_bpermute_b32 v0, v1, v2
ds_swizzle_b32 v0, v1 offset:swizzle(SWAP,16)
"""


class Anywhere:
    """Stands in for memory and LDS: any address may be read, and gives bytes that depend on it."""

    arrivals = None

    def __init__(self) -> None:
        self.written: list[NDArray] = []

    def read(self, *where: NDArray | int) -> NDArray[np.uint8]:
        *_, addresses, size = where
        steps = np.asarray(addresses).astype(np.int64)[:, None] + np.arange(int(size))
        return (steps * 37 >> 3).astype(np.uint8)

    def write(self, *what: NDArray, load: Instruction | None = None) -> None:
        self.written += what


@cache
def lines() -> tuple[str, ...]:
    """The lines that are written by hand, and one of each form in the compiled samples."""
    found = {line: line for line in BY_HAND.strip().splitlines()}
    for make in SAMPLES.values():
        compiled = target.compile_launch(make(np.random.default_rng(0)).launch, "gfx950")
        for instruction in parse(compiled.text, compiled.name).instructions:
            if instruction.mnemonic not in CONTROL:
                form = re.sub(r"\d+", "", instruction.line) + instruction.mnemonic
                found.setdefault(form, instruction.line)
    return tuple(found.values())


def some_waves(rng: np.random.Generator, *, full: bool) -> Waves:
    waves = Waves(256, 64, np.zeros(2, np.int64), np.arange(2), Anywhere(), Anywhere())  # type: ignore
    fill(waves, rng, ~0)
    waves.write_s64(EXEC, np.array([2**64 - 1 if full else 0xF0F0F0F0FF0FF00F], np.uint64))
    return waves


def fill(waves: Waves, rng: np.random.Generator, registers: int) -> None:
    """Random bits for a set of registers, but EXEC. SGPRs are small, so that descriptors make sense."""
    for bank, first, most in (
        (waves.vgpr, 0, 2**32),
        (waves.agpr, 512, 2**32),
        (waves.sgpr, 1024, 0),
    ):
        for i in range(len(bank)):
            if registers >> (first + i) & 1 and not (most == 0 and i in (EXEC, EXEC + 1)):
                low, high = (2**15, 2**16) if most == 0 else (0, most)
                bank[i] = rng.integers(low, high, bank[i].shape, np.uint32)
    if registers & SCC:
        waves.scc = rng.integers(0, 2, len(waves)).astype(bool)


def changed(before: Waves, after: Waves) -> int:
    """The registers that differ, as a set."""
    found = SCC * bool((before.scc != after.scc).any())
    for first, name in ((0, "vgpr"), (512, "agpr"), (1024, "sgpr")):
        old, new = getattr(before, name), getattr(after, name)
        for i in np.flatnonzero((old != new).reshape(len(old), -1).any(1)):
            found |= 1 << (first + int(i))
    return found


def run(instruction: Instruction, waves: Waves) -> Waves:
    with np.errstate(all="ignore"):
        BUILDERS[plain(instruction.mnemonic)](instruction)(waves)
    return waves


@pytest.mark.parametrize("full", [True, False])
def test_an_instruction_touches_only_its_registers(full: bool) -> None:
    checked = 0
    for line in lines():
        (instruction,) = parse(f"k:\n\t{line}\n", "k").instructions
        what = effects(instruction)
        if not full and (what.lanes == "all" or "_tr_" in line):
            continue
        rng = np.random.default_rng(checked)
        start = some_waves(rng, full=full)
        one, other = (start.select(np.array([0, 1])) for _ in range(2))
        one.memory, other.memory = Anywhere(), Anywhere()  # type: ignore
        one.lds, other.lds = Anywhere(), Anywhere()  # type: ignore
        fill(other, rng, ~(what.reads | what.kept | what.writes * (not full)))
        try:
            run(instruction, one)
        except EmulatorError:  # of numbers that are not sizes or addresses
            continue
        before = other.select(np.array([0, 1]))
        run(instruction, other)
        assert not changed(start, one) & ~what.writes, (line, names_of(changed(start, one)))
        assert not changed(before, other) & ~what.writes, line
        assert not changed(one, other) & what.writes, f"{line}: reads more than it says"
        for a, b in ((one.memory, other.memory), (one.lds, other.lds)):
            for x, y in zip(a.written, b.written, strict=True):  # type: ignore
                np.testing.assert_array_equal(x, y, err_msg=line)
        checked += 1
    assert checked > 150


def registers(names: str) -> int:
    """The set of registers with these names: v0, a0, s0, scc, or s8-11 for four of them."""
    fixed = {"scc": SCC, "vcc": 3 << 1130, "m0": 1 << 1148, "exec": 3 << 1150}
    banks = {"v": 0, "a": 512, "s": 1024}
    found = 0
    for name in names.split():
        if name in fixed:
            found |= fixed[name]
            continue
        first, _, last = name[1:].partition("-")
        for number in range(int(first), int(last or first) + 1):
            found |= 1 << (banks[name[0]] + number)
    return found


DPP = "v_mov_b32_dpp v0, v1 row_shr:1 row_mask:0xf bank_mask:0xf"
SDWA = "v_add_u16_sdwa v0, v1, v2"
VECTOR = {"unit": "vector"}
SCALAR = {"unit": "scalar"}
ATOMIC = {**VECTOR, "ended": WRITE_BACK}
STORES = {**ATOMIC, "stores": True}
PERMUTED = {"unit": "lds"}


@pytest.mark.parametrize(
    ("line", "reads", "writes", "rest"),
    [
        # A half of a pair, which op_sel and op_sel_hi choose.
        ("v_pk_mul_f32 v[0:1], v[2:3], v[4:5] op_sel_hi:[1,0]", "v2-4", "v0-1", {}),
        ("v_pk_add_f32 v[0:1], v[2:3], v[4:5]", "v2-5", "v0-1", {}),
        ("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7] op_sel:[1,0,0] op_sel_hi:[1,1,0]", "v3-6", "v0-1",
         {}),
        ("v_pk_mul_f32 v[0:1], s[2:3], 1.0", "s2-3", "v0-1", {}),
        ("v_pk_mov_b32 v[0:1], v[2:3], v[4:5] op_sel:[1,0]", "v3-4", "v0-1", {}),
        ("v_pk_mov_b32 v[0:1], v[2:3], v[4:5]", "v2 v4", "v0-1", {}),
        # SCC, VCC and EXEC, named or not.
        ("v_cmp_gt_u32_e32 vcc, v1, v2", "v1-2", "vcc", {}),
        ("v_cmpx_gt_u32_e32 vcc, v1, v2", "v1-2", "vcc exec", {}),
        ("v_addc_co_u32_e32 v1, vcc, v2, v3, vcc", "v2-3 vcc", "v1 vcc", {}),
        ("v_div_fmas_f32 v5, v6, v4, v5", "v4-6 vcc", "v5", {}),
        ("s_and_saveexec_b64 s[2:3], s[4:5]", "s4-5 exec", "s2-3 exec scc", {}),
        ("s_addc_u32 s0, s1, s2", "scc s1-2", "scc s0", {}),
        ("s_cmov_b32 s0, s1", "scc s0-1", "s0", {}),
        ("s_cmp_lt_u32 s0, s1", "s0-1", "scc", {}),
        ("s_cbranch_vccz .L1", "vcc", "", {}),
        ("s_cbranch_scc1 .L1", "scc", "", {}),
        ("v_fmac_f32_e32 v0, v1, v2", "v0-2", "v0", {}),
        ("v_mad_u64_u32 v[2:3], s[4:5], v6, v7, v[8:9]", "v6-9", "v2-3 s4-5",
         {"passed": "v9", "onto": "v3 s4-5"}),
        ("v_mad_i64_i32 v[2:3], s[4:5], v9, v7, v[8:9]", "v7-9", "v2-3 s4-5", {}),
        ("v_mad_u64_u32 v[2:3], s[4:5], v6, v7, 0", "v6-7", "v2-3 s4-5", {}),
        # What keeps a part.
        ("v_add_f16_e64 v0, v1, v2 op_sel:[0,1,1]", "v1-2", "v0", {"kept": "v0"}),
        ("v_add_f16_e64 v0, v1, v2 op_sel:[1,1,0]", "v1-2", "v0", {}),
        ("v_fma_mixhi_f16 v0, v1, v2, v3", "v1-3", "v0", {"kept": "v0"}),
        ("v_cvt_pk_fp8_f32 v0, v1, v2", "v1-2", "v0", {"kept": "v0"}),
        (SDWA + " dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE", "v1-2", "v0", {"kept": "v0"}),
        (SDWA + " dst_sel:WORD_1 dst_unused:UNUSED_PAD", "v1-2", "v0", {}),
        (SDWA + " dst_sel:DWORD dst_unused:UNUSED_PRESERVE", "v1-2", "v0", {}),
        (SDWA + " dst_unused:UNUSED_PRESERVE", "v1-2", "v0", {}),
        (DPP, "v1", "v0", {"kept": "v0"}),
        (DPP + " bound_ctrl:0", "v1", "v0", {}),
        (DPP.replace("row_mask:0xf", "row_mask:0xa") + " bound_ctrl:0", "v1", "v0", {"kept": "v0"}),
        # Lanes.
        ("v_swap_b32 v0, v1", "v0-1", "v0-1", {}),
        ("v_permlane32_swap_b32 v0, v1", "v0-1", "v0-1", {"lanes": "all"}),
        ("v_readfirstlane_b32 s4, v1", "v1", "s4", {"lanes": "first"}),
        ("v_readlane_b32 s4, v1, s5", "v1 s5", "s4", {"lanes": "one"}),
        ("v_writelane_b32 v1, s4, s5", "s4-5", "v1", {"lanes": "one", "kept": "v1"}),
        ("v_accvgpr_write_b32 a1, v2", "v2", "a1", {}),
        ("v_mfma_f32_16x16x32_bf16 a[0:3], v[4:7], v[8:11], a[4:7]", "v4-11 a4-7", "a0-3",
         {"lanes": "all"}),
        # Memory.
        ("s_load_dwordx2 s[4:5], s[0:1], 0x0", "s0-1", "s4-5", SCALAR),
        ("s_buffer_load_dwordx2 s[8:9], s[4:7], 0x4", "s4-7", "s8-9", SCALAR),
        ("s_dcache_inv", "", "", SCALAR),
        ("global_load_dword v2, v1, s[4:5]", "v1 s4-5", "v2", VECTOR),
        ("global_load_short_d16 v4, v[2:3], off", "v2-3", "v4", {**VECTOR, "kept": "v4"}),
        ("global_load_lds_dwordx4 v[2:3], off", "v2-3 m0", "", {**VECTOR, "lds": "load"}),
        ("buffer_load_dword v1, s[8:11], 0 offen lds", "v1 s8-11 m0", "", {**VECTOR, "lds": "load"}),
        ("buffer_inv sc1", "", "", {}),
        ("buffer_wbl2 sc1", "", "", {**VECTOR, "starts": WRITE_BACK}),
        ("global_store_dwordx2 v1, v[2:3], s[4:5]", "v1-3 s4-5", "", STORES),
        ("buffer_store_short_d16_hi v3, v1, s[8:11], 0 offen", "v1 v3 s8-11", "", STORES),
        ("global_atomic_add v0, v1, v2, s[4:5] sc0", "v1-2 s4-5", "v0", ATOMIC),
        ("global_atomic_add v1, v2, s[4:5]", "v1-2 s4-5", "", ATOMIC),
        ("buffer_atomic_add_f32 v2, v1, s[8:11], 0 offen", "v1-2 s8-11", "", ATOMIC),
        ("buffer_atomic_add_f32 v2, v1, s[8:11], 0 offen sc0", "v1-2 s8-11", "v2", ATOMIC),
        ("buffer_atomic_cmpswap v[2:3], v1, s[8:11], 0 offen sc0", "v1-3 s8-11", "v2", ATOMIC),
        ("buffer_atomic_cmpswap_x2 a[2:5], v1, s[8:11], 0 offen sc0", "v1 a2-5 s8-11", "a2-3", ATOMIC),
        ("ds_write_b32 v1, v2", "v1-2", "", {**PERMUTED, "starts": LDS, "lds": "write"}),
        ("ds_read_u16_d16 v4, v1", "v1", "v4",
         {**PERMUTED, "starts": LDS, "lds": "read", "kept": "v4"}),
        ("ds_bpermute_b32 v0, v1, v2", "v1-2", "v0", PERMUTED),
        ("s_barrier", "", "", {"ended": LDS}),
    ],
)  # fmt: skip
def test_what_an_instruction_does(line: str, reads: str, writes: str, rest: dict[str, Any]) -> None:
    (instruction,) = parse(f"k:\n\t{line}\n", "k").instructions
    sets = {name: registers(rest.get(name, "")) for name in ("kept", "passed", "onto")}
    expected = Effects(registers(reads), registers(writes), **{**rest, **sets})
    assert effects(instruction) == expected


def test_registers_are_named_as_the_assembler_names_them() -> None:
    every = registers("v0 v511 a0 a511 s0-105 vcc m0 exec scc")
    names = ["vcc_lo", "vcc_hi", "m0", "exec_lo", "exec_hi"]
    assert names_of(every) == (
        ["scc", "v0", "v511", "a0", "a511", *(f"s{i}" for i in range(106)), *names]
    )


def test_counters_are_read_as_names_or_as_a_number() -> None:
    def read(*operands: str) -> dict[str, int]:
        return counters_of(SimpleNamespace(operands=operands))  # type: ignore

    assert read("vmcnt(3)", "lgkmcnt(0)") == {"vmcnt": 3, "lgkmcnt": 0}
    assert read("0x4172") == {"vmcnt": 18, "expcnt": 7, "lgkmcnt": 1}
    assert read("0xc07f") == {"vmcnt": 63, "expcnt": 7, "lgkmcnt": 0}
    with pytest.raises(EmulatorError, match=r"'vscnt\(0\)' is none of"):
        read("vscnt(0)")
