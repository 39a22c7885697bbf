"""What the cards have room for.

A compute unit of an MI355X has 4 SIMDs, each with 512 vector registers a lane, which are allocated in
units of 8, and 160 KiB of LDS, which is allocated in units of 1280 bytes. An SM of a Hopper GPU has 4
schedulers and 64 Ki registers, which a warp takes in units of 256. It has 228 KiB of shared memory, of
which each program takes 1 KiB more than it asks for. It holds at most 64 warps and 32 programs.
"""

import math

UNITS = 256  # compute units of an MI355X


def occupancy_gfx950(vgpr: int, lds: int, num_warps: int) -> float:
    """Waves per SIMD."""
    return min(_waves(vgpr), _workgroups(lds) * num_warps / 4)


def workgroups_of_a_unit(vgpr: int, lds: int, num_warps: int) -> int:
    """How many whole workgroups a compute unit of an MI355X runs at once."""
    return int(min(4 * _waves(vgpr) // num_warps, _workgroups(lds)))


def _waves(vgpr: int) -> int:
    """How many waves the registers of a SIMD suffice for."""
    return min(8, 512 // max(8, _round_up(vgpr, 8)))


def _workgroups(lds: int) -> float:
    """How many workgroups the LDS of a compute unit suffices for."""
    return 160 * 1024 // _round_up(lds, 1280) if lds else math.inf


def occupancy_sm90(registers: int, shared: int, num_warps: int) -> float:
    """Warps per scheduler."""
    by_registers = 65536 // _round_up(32 * registers, 256) // num_warps
    by_shared = 228 * 1024 // (_round_up(shared, 128) + 1024)
    return min(by_registers, by_shared, 64 // num_warps, 32) * num_warps / 4


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule
