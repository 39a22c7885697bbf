"""A batch of waves: how it is split and joined again, and what a write reaches."""

from typing import Any

import numpy as np

from tools.gfx950.waves import EXEC, GARBAGE, LANES, VCC, Waves, lanes_of, mask_of

PLACE: Any = object()  # stands for memory and LDS, which are only passed on
BY_REGISTER = ("vgpr", "agpr", "sgpr", "written")  # [registers, W, ...]
BY_WAVE = ("scc", "workgroup", "wave", "active")  # [W, ...]


def numbered() -> Waves:
    """Three waves, everything of which differs."""
    waves = Waves(3, 2, np.array([0, 1, 1]), np.array([0, 0, 1]), PLACE, PLACE, watched=2)
    for bank in (waves.vgpr, waves.agpr, waves.sgpr):
        bank[:] = np.arange(bank.size).reshape(bank.shape)
    waves.scc[:] = [True, False, True]
    waves.written[:] = np.arange(waves.written.size).reshape(waves.written.shape) % 7 < 3
    waves.write_s64(EXEC, np.array([2**64 - 1, 6, 2**63], np.uint64))
    return waves


def same(found: Waves, expected: Waves, chosen: list[int]) -> bool:
    """Whether the waves are those of `expected` with these indices, in this order."""
    by_register = (
        np.array_equal(getattr(found, n), getattr(expected, n)[:, chosen]) for n in BY_REGISTER
    )
    by_wave = (np.array_equal(getattr(found, n), getattr(expected, n)[chosen]) for n in BY_WAVE)
    places = found.memory is found.lds is PLACE
    return all(by_register) and all(by_wave) and places and len(found) == len(chosen)


def test_registers_are_garbage_at_the_start() -> None:
    waves = Waves(3, 2, np.arange(4), np.zeros(4, np.int64), PLACE, PLACE)
    shapes = [bank.shape for bank in (waves.vgpr, waves.agpr, waves.sgpr, waves.written)]
    assert shapes == [(3, 4, LANES), (2, 4, LANES), (128, 4), (0, 4, LANES)]
    assert all((bank == GARBAGE).all() for bank in (waves.vgpr, waves.agpr, waves.sgpr))
    assert (
        not waves.scc.any()
        and waves.active[3].tolist() == lanes_of(waves.read_s64(EXEC))[3].tolist()
    )


def test_waves_part_and_meet() -> None:
    waves = numbered()
    some, rest = waves.select(np.array([2, 0])), waves.select(np.array([False, True, False]))
    assert same(some, waves, [2, 0]) and same(rest, waves, [1])
    assert [part.all_active for part in (waves.select(np.array([0])), some, rest)] == [
        True,
        False,
        False,
    ]
    before = waves.vgpr.copy()
    some.write_v(1, np.array([[5]], np.uint32))
    assert np.array_equal(waves.vgpr, before)
    whole = Waves.join([waves.select(np.array([1])), waves.select(np.array([0, 2]))])
    assert same(whole, waves, [1, 0, 2]) and not whole.all_active
    assert Waves.join([rest]) is rest


def test_a_write_to_exec_changes_the_active_lanes() -> None:
    waves = numbered()
    for write in (
        lambda: waves.write_s32(EXEC, np.array([5], np.uint32)),
        lambda: waves.write_s32(EXEC + 1, np.array([1, 2, 2**31], np.uint32)),
        lambda: waves.write_s64(EXEC, np.array([2**64 - 1], np.uint64)),
    ):
        write()
        assert np.array_equal(mask_of(waves.active), waves.read_s64(EXEC))
        assert waves.all_active == bool(waves.active.all())
    assert waves.all_active
    waves.write_s64(VCC, np.array([3, 2**32, 2**63 + 1], np.uint64))
    assert waves.sgpr[VCC : VCC + 2].tolist() == [[3, 0, 1], [0, 1, 2**31]]
    assert waves.read_s64(VCC).tolist() == [3, 2**32, 2**63 + 1]


def test_a_write_reaches_the_lanes_that_it_may() -> None:
    """The active ones, or those of a mask, be they active or not."""
    waves = numbered()
    waves.vgpr[:] = 0
    waves.write_v(1, np.array([[7]], np.uint32))
    assert np.array_equal(waves.vgpr[1], 7 * waves.active)
    mask = np.zeros((3, LANES), bool)
    mask[1, [0, 63]] = True
    waves.write_v(1, np.arange(LANES, dtype=np.uint32), mask)
    assert waves.vgpr[1, 1].tolist() == [0, 7, 7, *[0] * 60, 63]
    assert np.array_equal(waves.vgpr[1, ::2], 7 * waves.active[::2]) and not waves.vgpr[::2].any()
    waves.write_s64(EXEC, np.array([2**64 - 1], np.uint64))
    waves.write_v(2, np.arange(LANES, dtype=np.uint32))
    assert waves.vgpr[2].tolist() == [[*range(LANES)]] * 3


def test_lane_i_is_bit_i() -> None:
    lanes = lanes_of(np.array([0b101, 2**63, 2**40], np.uint64))
    assert np.argwhere(lanes).tolist() == [[0, 0], [0, 2], [1, 63], [2, 40]]
    assert mask_of(lanes).tolist() == [0b101, 2**63, 2**40]
