"""Faults planted in compiled assembly, as a slip in hand-written waits or registers would make them: the
emulator must refuse each. The results of some of them would be right in the emulator."""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.support.gfx950_kernels import SAMPLES
from tools.gfx950 import target
from tools.gfx950.assembly import EmulatorError
from tools.gfx950.emulator import Kernel


@dataclass(frozen=True)
class Fault:
    """An edit of a sample's assembly, and what the emulator says of it.

    kind: as in docs/trust.md. old: a regular expression, of which the match of number `which` is
    replaced by new.
    """

    kind: str
    sample: str
    old: str
    new: str
    said: str
    which: int = 0


UNWRITTEN = "registers and LDS not written"
FAULTS = {
    "a vector load is not waited for": Fault(
        "waits", "softmax", r"s_waitcnt vmcnt\(0\)\n", "s_nop 0\n", r"reads v9.*buffer_load.*vmcnt\(0\)"
    ),
    "a wait leaves one load too many": Fault(
        "waits", "matmul", r"vmcnt\(2\)", "vmcnt(3)", r"ds_write_b128.*reads v6.*vmcnt\(2\)"
    ),
    "the last load of four is left": Fault(
        "waits", "softmax", r"vmcnt\(0\)", "vmcnt(1)", r"reads v9.*buffer_load.*vmcnt\(0\)"
    ),
    "a wait for the other counter": Fault(
        "waits", "softmax", r"vmcnt\(1\)", "lgkmcnt(1)", r"reads v8.*buffer_load.*vmcnt\(1\)"
    ),
    "one of two scalar loads is left": Fault(
        "waits", "softmax", r"lgkmcnt\(0\)", "lgkmcnt(1)", r"s_load_dword.*lgkmcnt\(0\)"
    ),
    "one load of the LDS too many is left": Fault(
        "waits", "matmul", r"lgkmcnt\(7\)", "lgkmcnt(8)", r"v_mfma.*ds_read_b128.*lgkmcnt\(7\)"
    ),
    "a wait behind the instruction that needs it": Fault(
        "waits", "matmul", r"(\ts_waitcnt vmcnt\(2\)\n)(\tds_write_b128[^\n]*\n)", r"\2\1",
        r"ds_write_b128.*buffer_load.*vmcnt\(2\)",
    ),
    "a barrier does not wait for stores to the LDS": Fault(
        "waits", "softmax", r"\ts_waitcnt lgkmcnt\(0\)\n(?=\ts_barrier)", "",
        r"s_barrier.*end of 'ds_write_b32",
    ),
    "a barrier does not wait for loads from the LDS": Fault(
        "waits", "fp8_fp4_32", r"(\ts_waitcnt lgkmcnt\(0\)\n)(\ts_barrier\n)", r"\2\1",
        r"s_barrier.*end of 'ds_", which=1,
    ),
    "a register is used again while it is loaded": Fault(
        "waits", "softmax", r"(\tbuffer_load_dword v9[^\n]*\n)", "\\1\tv_mov_b32_e32 v9, 0\n",
        r"overwrites v9.*buffer_load_dword v9.*vmcnt\(0\)",
    ),
    "a counter is read before it has arrived": Fault(
        "waits", "in_turn", r"(global_load_dword[^\n]*\n)\ts_waitcnt vmcnt\(0\)\n", r"\1",
        r"global_load_dword.*vmcnt\(0\)",
    ),
    "a flag overtakes what it tells of": Fault(
        "waits", "in_turn", r"(buffer_wbl2 sc1\n)\ts_waitcnt vmcnt\(0\)\n", r"\1",
        r"atomic_add.*await 'buffer_wbl2",
    ),
    "a descriptor without its last word": Fault(
        UNWRITTEN, "softmax", r"\ts_mov_b32 s19, 0x27000\n", "",
        "s19, which nothing has written, at: buffer_load",
    ),
    "a mask that nothing has compared": Fault(
        UNWRITTEN, "softmax", r"\tv_cmp_eq_u32_e32 vcc, 0, v5\n", "",
        "vcc_lo, which nothing has written, at: s_and_saveexec",
    ),
    "an address in the wrong register": Fault(
        UNWRITTEN, "softmax", r"buffer_load_dword v7, v2,", "buffer_load_dword v7, v80,",
        "v80, which nothing has written in lane 0, at: buffer_load",
    ),
    "an accumulator in the wrong registers": Fault(
        UNWRITTEN, "bf16_fp4_16", r"(v_mfma_f32_16x16x32_bf16 [^\n]*), v\[2:5\]", r"\1, v[120:123]",
        "v120, which nothing has written in lane 0, at: v_mfma",
    ),
    "an accumulator among those that are not used": Fault(
        UNWRITTEN, "bf16_fp4_16", r"(v_mfma_f32_16x16x32_bf16 [^\n]*), v\[2:5\]", r"\1, a[0:3]",
        "a0, which nothing has written in lane 0, at: v_mfma",
    ),
    "a value of the one lane that computed it": Fault(
        UNWRITTEN, "softmax", r"\tv_mov_b32_e32 v5, s10\n(\tv_mov_b32_e32 v10, s2\n\tds_write_b32) v5,",
        "\tv_mov_b32_e32 v70, s10\n\tds_write_b32 v70, v70\n\ts_mov_b64 exec, -1\n\\1 v70,",
        "v70, which nothing has written in lane 1, at: ds_write",
    ),
    "the waves' sums are not stored": Fault(
        UNWRITTEN, "softmax", r"\tds_write_b32 v5, v10\n", "",
        "byte 0 of the LDS, which no wave has written, at: ds_read",
    ),
    "half of a tile is not stored": Fault(
        UNWRITTEN, "matmul", r"\tds_write_b128 v\d+, v\[\d+:\d+\] offset:4096\n", "",
        "of the LDS, which no wave has written, at: ds_read",
    ),
}  # fmt: skip


@cache
def compiled(sample: str) -> target.CompiledKernel:
    return target.compile_launch(SAMPLES[sample](np.random.default_rng(0)).launch, "gfx950")


def run(sample: str, text: str) -> None:
    """Load and run a sample's kernel with another text."""
    made, launch = compiled(sample), SAMPLES[sample](np.random.default_rng(0)).launch
    code = Kernel(text, made.name)
    arguments = [target._argument(n, kind, launch.arguments[n]) for n, kind in made.parameters]
    code.run(arguments, launch.grid, made.num_warps, made.shared)


def planted(what: Fault) -> str:
    text = compiled(what.sample).text
    match = list(re.finditer(what.old, text))[what.which]
    return text[: match.start()] + match.expand(what.new) + text[match.end() :]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_assembly_is_found(name: str) -> None:
    what = FAULTS[name]
    with pytest.raises(EmulatorError, match=what.said):
        run(what.sample, planted(what))


@pytest.mark.parametrize("sample", sorted({what.sample for what in FAULTS.values()}))
def test_without_a_fault_nothing_is_found(sample: str) -> None:
    run(sample, compiled(sample).text)


@pytest.mark.parametrize("sample", ["softmax", "sort"])
def test_every_wait_is_needed(sample: str) -> None:
    """Each one, removed or left one too many, is an error: the compiler puts in none for nothing."""
    made = compiled(sample)
    waits = list(re.finditer(r"(vmcnt|lgkmcnt)\((\d+)\)", made.text))
    assert len(waits) > 10
    for wait in waits:
        for instead in ("", f"{wait[1]}({int(wait[2]) + 1})"):
            text = made.text[: wait.start()] + instead + made.text[wait.end() :]
            with pytest.raises(
                EmulatorError, match=rf"no s_waitcnt {wait[1]}\({wait[2]}\) in between"
            ):
                Kernel(text, made.name)
