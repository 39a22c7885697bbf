"""The estimate of a launch's time, on kernels of a few lines whose time can be told by hand."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton")

from tools.gfx950.emulator import Kernel
from tools.gfx950.timeline import MI355X, Estimate, Executed, launch_time, spread

# One cycle a nanosecond, so that an instruction of a wave takes 4 ns and a load 1000.
CARD = replace(
    MI355X, ghz=1.0, load_ns=1000, scalar_ns=100, lds_cycles=50, vector_cycles=4, load_bytes=64
)
LOAD = "global_load_dword v1, v0, s[0:1]"
END = "s_endpgm"


def executed(
    lines: list[str], waves: list[list[int]], count: int = 1, of_a_unit: int = 1
) -> Executed:
    """A kernel of these lines, and the lines that the waves of its one workgroup executed."""
    text = "one:\n" + "".join(f"\t{line}\n" for line in lines)
    return Executed(Kernel(text, "one"), [waves], count, of_a_unit)


def latency(lines: list[str], waves: list[list[int]] | None = None) -> float:
    """The nanoseconds of a workgroup whose waves execute these instructions; one that executes all."""
    every = [list(range(len(lines)))]
    return round(launch_time(executed(lines, waves or every), 0, CARD).latency * 1e3, 6)


def test_loads_that_are_waited_for_together_take_the_time_of_one():
    together = latency([LOAD, LOAD.replace("v1", "v2"), "s_waitcnt vmcnt(0)", END])
    apart = latency(
        [LOAD, "s_waitcnt vmcnt(0)", LOAD.replace("v1", "v2"), "s_waitcnt vmcnt(0)", END]
    )
    # A load of 256 bytes takes 1 + 4 cycles to issue, and the others one each.
    assert together == 2 * 5 + 1000 + 1
    assert apart == 2 * (5 + 1000) + 1


def test_a_counter_says_which_loads_are_waited_for():
    """With vmcnt(1) the second load may still be under way, and ends while the others issue."""
    last = LOAD.replace("v1", "v2")
    first = latency([LOAD, last, "s_waitcnt vmcnt(1)", "v_mov_b32 v3, v1", END])
    both = latency([LOAD, last, "s_waitcnt vmcnt(0)", "v_mov_b32 v3, v1", END])
    assert first == 5 + 1000 + 4 + 1
    assert both == 10 + 1000 + 4 + 1


def test_a_barrier_waits_for_the_slowest_wave():
    lines = [LOAD, "s_waitcnt vmcnt(0)", "s_barrier", "v_mov_b32 v3, v0", END]
    slow, fast = [0, 1, 2, 3, 4], [2, 3, 4]
    alone = latency(lines, [fast])
    assert alone == 1 + 4 + 1
    assert latency(lines, [slow, fast]) == latency(lines, [fast, slow]) == 5 + 1000 + 1 + 4 + 1


def test_the_units_have_times_of_their_own():
    scalar = latency(["s_load_dword s4, s[0:1], 0x0", "s_waitcnt lgkmcnt(0)", END])
    assert scalar == 1 + 100 + 1
    lds = latency(["ds_read_b32 v1, v0", "s_waitcnt lgkmcnt(0)", END])
    assert lds == 1 + 50 + 1


@pytest.mark.parametrize(
    ("line", "cycles"),
    [
        ("v_add_f32 v1, v0, v0", 4),
        ("v_exp_f32 v1, v0", 16),
        ("s_add_u32 s4, s0, s1", 1),
        # 2 * 16 * 16 * 32 operations, 1024 of them in a cycle.
        ("v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]", 16),
    ],
)
def test_what_an_instruction_takes(line: str, cycles: int):
    assert latency([line, END], [[0]]) == cycles


def test_a_grid_that_does_not_fit_takes_several_rounds():
    """A card of 256 units with 2 workgroups each takes 2048 in four rounds, and 512 in one."""
    lines = [LOAD, "s_waitcnt vmcnt(0)", END]
    one, four = (
        launch_time(executed(lines, [[0, 1, 2]], count, 2), 0, CARD) for count in (512, 2048)
    )
    assert four.latency == pytest.approx(4 * one.latency)
    # 256 bytes of each, 64 in a cycle of a unit.
    assert four.loads == pytest.approx(2048 / 256 * 4 * 1e-3)


def test_all_instructions_share_the_simds():
    done = executed(["v_add_f32 v1, v0, v0", END], [[0] * 100] * 4, count=256 * 8)
    # 100 instructions of 4 cycles in each of 4 waves, 8 workgroups for each unit of 4 SIMDs.
    assert launch_time(done, 0, CARD).issue == pytest.approx(100 * 4 * 8 * 1e-3)


def test_the_slowest_limits():
    found = Estimate(latency=1.0, issue=2.0, loads=0.5, memory=3.0)
    assert (found.us, found.limit) == (3.0, "memory")
    done = executed([LOAD, END], [[0, 1]])
    assert launch_time(done, 6910e3, MI355X).memory == pytest.approx(1.0)


def test_samples_are_spread_from_the_first_to_the_last():
    assert spread(1, 6) == [0]
    assert spread(3, 6) == [0, 1, 2]
    assert spread(101, 3) == [0, 50, 100]
    assert np.diff(spread(1000, 6)).min() > 190


def test_the_work_of_the_last_workgroup_is_done_once():
    """Of the others there are as many as the grid has, in four rounds."""
    lines = [LOAD, "s_waitcnt vmcnt(0)", END]
    usual, longer = [[0, 1, 2]], [[0, 1, 0, 1, 2]]
    done = executed(lines, usual, 2048, 2)
    alone = launch_time(done, 0, CARD).latency
    assert launch_time(replace(done, waves=[usual, longer]), 0, CARD).latency == alone
    few = replace(done, count=2, waves=[usual, longer])
    assert launch_time(few, 0, CARD).latency == pytest.approx(latency(lines, longer) * 1e-3)
