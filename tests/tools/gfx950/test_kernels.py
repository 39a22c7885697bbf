"""Whole kernels in the emulator, and what it refuses or finds."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tinygrad")

from fast.launch import Scratch
from qwen35.errors import InputError
from tests.support.fast_cases import CPU, exact_rows, fast_block, slow_block
from tests.support.gfx950_kernels import SAMPLES, Sample
from tools.gfx950 import target
from tools.gfx950.assembly import EmulatorError, hot_loop, parse
from tools.gfx950.emulator import Kernel
from tools.gfx950.memory import Memory

# ---- kernels


def run_sample(name: str, seed: int | None = None, data: int = 0) -> None:
    sample = SAMPLES[name](np.random.default_rng(data))
    target.emulate([sample.launch], seed=seed)
    got = sample.output.double().numpy()
    error = np.abs(got - sample.expected).max() / np.abs(sample.expected).max()
    assert error <= sample.tolerance, f"{name}: {error}"


@pytest.mark.parametrize("name", SAMPLES)
def test_a_compiled_kernel_computes_what_numpy_does(name: str):
    run_sample(name)
    run_sample(name, seed=1, data=1)


@pytest.mark.parametrize("name", ["bf16_fp4_16", "softmax"])
def test_compiling_needs_no_data_and_leaves_the_driver(name: str):
    from triton.runtime import driver

    sample = SAMPLES[name](np.random.default_rng(0))
    on_meta = {
        k: v.to("meta") if isinstance(v, torch.Tensor) else v
        for k, v in sample.launch.arguments.items()
    }
    launch = replace(sample.launch, arguments=on_meta, options={"num_warps": 4})
    before = driver._active
    amd, nvidia = target.compile_launch(launch, "gfx950"), target.compile_launch(launch, "sm_90")
    assert driver._active is before
    assert amd.binary.startswith(b"\x7fELF") and nvidia.binary.startswith(b"\x7fELF")
    assert ".target sm_90" in nvidia.text and "gfx950" in amd.text
    assert parse(amd.text, amd.name).resources["vgpr_spills"] == 0
    with pytest.raises(InputError, match="expected a tensor on the CPU"):
        target.emulate([launch])
    with pytest.raises(InputError, match="'gfx1' is none of gfx950, sm_90"):
        target.compile_launch(launch, "gfx1")


def test_launches_run_one_after_the_other_and_count_together():
    """`fast.launch.run` runs them so, too: the second one reads what the first one wrote."""
    sample = SAMPLES["softmax"](np.random.default_rng(0))
    first, between = sample.launch, sample.output
    out = torch.empty_like(between)
    second = replace(first, arguments=first.arguments | {"x": between, "o": out})
    both = target.emulate([first, second], CPU)
    torch.testing.assert_close(out, between.softmax(-1))
    alone = [target.emulate([launch]) for launch in (first, second)]
    assert both.instructions == sum(one.instructions for one in alone)
    assert both.bytes_read == sum(one.bytes_read for one in alone) > 0
    assert both.bytes_written == sum(one.bytes_written for one in alone) > 0
    assert both.by_mnemonic == alone[0].by_mnemonic + alone[1].by_mnemonic
    with pytest.raises(InputError, match="the emulator runs on the CPU; this is meta"):
        target.emulate([first], torch.device("meta"))


def test_an_error_names_the_launch_and_the_array():
    launch = SAMPLES["softmax"](np.random.default_rng(0)).launch
    beyond = replace(launch, name="one too many", grid=(launch.grid[0] + 1, 1, 1))
    source = next(iter(launch.arguments))
    nbytes = launch.arguments[source].nbytes
    said = rf"^one too many: load .* of {source}, an array of {nbytes}, at: buffer_load"
    with pytest.raises(EmulatorError, match=said):
        target.emulate([launch, beyond])
    absent = replace(
        launch, arguments=launch.arguments | {source: launch.arguments[source].to("meta")}
    )
    with pytest.raises(
        InputError, match=f": argument {source}: meta, expected a tensor on the CPU"
    ):
        target.emulate([absent])


def test_the_hot_loop_is_the_longest_of_the_innermost_where_none_has_products():
    text = """k:
\ts_mov_b32 s0, 0
.L1:
.L2:
\ts_nop 0
\ts_cbranch_scc1 .L2
.L3:
\ts_nop 1
\tv_mov_b32 v0, 1 ; a comment: .L9
\ts_cbranch_scc1 .L3
\ts_branch .L1
\ts_endpgm
"""
    program = parse(text, "k")
    assert [i.line for i in hot_loop(program)] == [
        "s_nop 1",
        "v_mov_b32 v0, 1",
        "s_cbranch_scc1 .L3",
    ]
    assert hot_loop(parse("k:\n\ts_endpgm\n", "k")) == ()


NOP = "\ts_nop 0\n"


PRODUCT = "\tv_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]\n"


DECODE = "\tv_cvt_scalef32_pk_bf16_fp4 v4, v5, v6\n"


@pytest.mark.parametrize(
    ("bodies", "hot"),
    [
        ((NOP * 9, PRODUCT), 1),
        ((PRODUCT * 2, NOP * 9 + PRODUCT), 0),
        ((PRODUCT, NOP + PRODUCT), 1),
        ((NOP * 9 + PRODUCT * 3, DECODE + PRODUCT), 1),
        ((DECODE * 2, DECODE + PRODUCT * 3 + NOP * 9), 0),
        ((DECODE + PRODUCT * 2, DECODE + PRODUCT + NOP * 9), 0),
    ],
)  # fmt: skip
def test_the_hot_loop_has_most_decodes_then_most_products_then_most_instructions(
    bodies: tuple[str, ...], hot: int
):
    """In a kernel with several loops, the hot loop is the one over the weights."""
    for order in (1, -1):
        loops = [f".L{i}:\n{body}\ts_cbranch_scc1 .L{i}\n" for i, body in enumerate(bodies)][
            ::order
        ]
        found = hot_loop(parse("k:\n" + "".join(loops) + "\ts_endpgm\n", "k"))
        lines = [line.strip() for line in bodies[hot].splitlines()]
        assert [i.line for i in found] == [*lines, f"s_cbranch_scc1 .L{hot}"]


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
def test_the_hot_loop_of_a_kernel_of_the_experts_is_the_one_over_the_weights():
    """`gate_up` and `down` have a loop for the shared expert beside it."""
    block = fast_block(slow_block(4, 1024, 1024, 2, 256))
    launches, _ = block.launches(exact_rows(1, 3, 1024), Scratch(CPU))
    for launch in launches[1:]:
        compiled = target.compile_launch(launch, "gfx950")
        loop = [i.mnemonic for i in hot_loop(parse(compiled.text, compiled.name))]
        assert "v_cvt_scalef32_pk_bf16_fp4" in loop and any("mfma" in name for name in loop)


def test_parsing_keeps_operands_and_modifiers_apart():
    text = """k:
\tbuffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen offset:16 // x
\ts_waitcnt vmcnt(0) & lgkmcnt(1)
"""
    load, wait = parse(text, "k").instructions
    assert load.operands == ("v[0:3]", "v4", "s[4:7]", "0")
    assert load.modifiers == {"offen": True, "offset": "16"}
    assert wait.operands == ("vmcnt(0)", "lgkmcnt(1)")
    with pytest.raises(EmulatorError, match="no such label"):
        parse(text, "other")


# ---- what must be refused or found


def kernel(body: str) -> Kernel:
    """A kernel with one argument, a pointer, which is in s[4:5]."""
    lines = "\n".join(f"\t{line}" for line in body.strip().splitlines())
    begin = "\ts_load_dwordx2 s[4:5], s[0:1], 0x0\n\ts_waitcnt lgkmcnt(0)\n"
    return Kernel(f"k:\n{begin}{lines}\n\ts_endpgm\n", "k")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("v_frobnicate_b32 v0, v1", "instruction is not known"),
        ("scratch_load_dword v0, off, s0", "instruction is not known"),
        ("v_add3_u32 v0, v1, v2, v3 clamp", "an integer result with mul, div or clamp"),
        ("v_add_u32_e32 v0, v1", "2 operands, expected 3"),
        ("v_add_u32_e32 v0, w1, v2", "operand 'w1' is not known"),
        ("v_mov_b32_dpp v0, v1 row_xmask:1 row_mask:0xf bank_mask:0xf", "'row_xmask' is not known"),
        ("s_cbranch_scc1 .L9", "the branch's label is not in the kernel"),
        ("v_and_b32_e64 v0, -v1, v2", "cannot have a float's modifier"),
        ("v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[4:9], v[4:9], 0 cbsz:2", "operand format 2"),
    ],
)
def test_what_is_not_known_is_refused_by_its_line(line: str, problem: str):
    with pytest.raises(EmulatorError, match=re.escape(f"{line!r}: ") + ".*" + re.escape(problem)):
        kernel(line)


def test_an_access_outside_of_an_array_quotes_its_line():
    code = kernel(
        "v_lshlrev_b32_e32 v1, 2, v0\n"
        "global_load_dword v2, v1, s[4:5]\n"
        "global_store_dword v1, v0, s[4:5] offset:4"
    )
    data = np.zeros(65, np.int32)
    stats = code.run([data], (1, 1, 1), 1, 0)
    assert data.tolist() == [0, *range(64)]
    assert (stats.instructions, stats.bytes_read, stats.bytes_written) == (6, 256 + 8, 256)
    assert stats.by_mnemonic["global_load_dword"] == 1
    with pytest.raises(
        EmulatorError, match=r"by 1 lanes.*byte 256 of an array of 256, at: global_store_dword"
    ):
        code.run([data[:64]], (1, 1, 1), 1, 0)
    frozen = np.zeros(65, np.int32)
    frozen.flags.writeable = False
    with pytest.raises(
        EmulatorError, match=r"^store into an array that is read-only, at: global_store_dword"
    ):
        code.run([frozen], (1, 1, 1), 1, 0)


@pytest.mark.parametrize("size", [8, 12])
def test_a_scalar_load_beyond_its_buffer_quotes_its_line(size: int):
    """It would give zeros on a card; no kernel here means to do that."""
    code = kernel(
        f"s_and_b32 s5, s5, 0xffff\ns_mov_b32 s6, {size}\ns_mov_b32 s7, 0\n"
        "s_buffer_load_dwordx2 s[8:9], s[4:7], 0x4"
    )
    if size == 12:
        code.run([np.zeros(4, np.int32)], (1, 1, 1), 1, 0)
        return
    with pytest.raises(EmulatorError, match=r"beyond the end of its buffer.*s_buffer_load_dwordx2"):
        code.run([np.zeros(4, np.int32)], (1, 1, 1), 1, 0)


def test_an_access_outside_of_the_lds_quotes_its_line():
    code = kernel("v_lshlrev_b32_e32 v1, 2, v0\nds_write_b32 v1, v0")
    code.run([np.zeros(1)], (1, 1, 1), 1, 256)
    with pytest.raises(
        EmulatorError, match=r"LDS store of 4 bytes at 252, the workgroup has 252.*ds_write_b32"
    ):
        code.run([np.zeros(1)], (1, 1, 1), 1, 252)


def test_a_loop_without_end_is_noticed():
    code = Kernel("k:\n.L1:\n\ts_branch .L1\n\ts_endpgm\n", "k")
    with pytest.raises(EmulatorError, match="does this loop end"):
        code.run([], (1, 1, 1), 1, 0, limit=10_000)


# The first workgroup waits in its sleep until a word is not 0; the others add 1 to it.
WAITING = """
	s_load_dwordx2 s[4:5], s[0:1], 0x0
	v_mov_b32_e32 v1, 0
	v_mov_b32_e32 v2, 1
	s_waitcnt lgkmcnt(0)
	s_cmp_eq_u32 s2, 0
	s_cbranch_scc1 .L1
	global_atomic_add v1, v2, s[4:5]
	s_endpgm
.L1:
	s_sleep 1
	global_load_dword v3, v1, s[4:5]
	s_waitcnt vmcnt(0)
	v_readfirstlane_b32 s6, v3
	s_cmp_eq_u32 s6, 0
	s_cbranch_scc1 .L1
	s_endpgm
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_waves_that_sleep_give_way_and_none_sleeps_for_ever(seed: int | None):
    code = Kernel(f"k:{WAITING}", "k")
    word = np.zeros(1, np.int32)
    code.run([word], (3, 1, 1), 2, 0, seed=seed)
    assert word[0] == 2 * 2 * 64
    with pytest.raises(
        EmulatorError, match=r"all waves that are left wait in their sleep.*s_sleep"
    ):
        code.run([np.zeros(1, np.int32)], (1, 1, 1), 2, 0, seed=seed)


def test_a_wave_that_works_long_while_others_sleep_is_waited_for():
    busy = "\ts_mov_b32 s7, 3000\n.L2:\n\ts_sub_u32 s7, s7, 1\n"
    busy += "\ts_cmp_lg_u32 s7, 0\n\ts_cbranch_scc1 .L2\n"
    text = WAITING.replace("\tglobal_atomic_add", f"{busy}\tglobal_atomic_add")
    for seed in (None, 0):
        word = np.zeros(1, np.int32)
        Kernel(f"k:{text}", "k").run([word], (2, 1, 1), 1, 0, seed=seed)
        assert word[0] == 64


def without_barriers(name: str) -> tuple[target.CompiledKernel, Sample]:
    sample = SAMPLES[name](np.random.default_rng(0))
    compiled = target.compile_launch(sample.launch, "gfx950")
    assert "s_barrier" in compiled.text
    return replace(compiled, text=compiled.text.replace("\ts_barrier", "\ts_nop 0")), sample


def run_compiled(compiled: target.CompiledKernel, sample: Sample, **options) -> None:
    arguments = [
        target._argument(n, kind, sample.launch.arguments[n]) for n, kind in compiled.parameters
    ]
    code = Kernel(compiled.text, compiled.name)
    code.run(arguments, sample.launch.grid, compiled.num_warps, compiled.shared, **options)


@pytest.mark.parametrize("name", ["softmax", "matmul", "sort"])
def test_a_missing_barrier_is_found(name: str):
    compiled, sample = without_barriers(name)
    with pytest.raises(EmulatorError, match=r"LDS race.*at: ds_"):
        run_compiled(compiled, sample)


def test_a_missing_barrier_gives_wrong_results_in_random_order():
    compiled, sample = without_barriers("softmax")
    run_compiled(compiled, sample, races=False)
    assert np.allclose(
        sample.output.double().numpy(), sample.expected, rtol=1e-5
    )  # lockstep hides it
    run_compiled(compiled, sample, races=False, seed=0)
    assert not np.allclose(sample.output.double().numpy(), sample.expected, rtol=1e-5)


def test_overlapping_arrays_are_one_memory():
    data = np.arange(64, dtype=np.int32)
    memory = Memory([data[:32], data[16:], np.zeros(4, np.int8), np.empty(0, np.int8)])
    assert memory.address(1) - memory.address(0) == 64
    assert memory.address(0) % 256 == data.__array_interface__["data"][0] % 256
    memory.write(np.array([memory.address(1)], np.uint64), np.full((1, 4), 255, np.uint8))
    assert data[16] == -1
    with pytest.raises(EmulatorError, match="nowhere"):
        memory.read(np.array([memory.address(3)], np.uint64), 1)
