"""What an MI355X has room for. A compute unit has 4 SIMDs, each with 512 vector registers a lane, which are
allocated in units of 8, and 160 KiB of LDS, which is allocated in units of 1280 bytes."""

import math

UNITS = 256  # compute units


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def waves_by_registers(vgpr: int) -> int:
    """How many waves a SIMD holds at most."""
    return min(8, 512 // max(8, _round_up(vgpr, 8)))


def workgroups_by_lds(lds: int) -> float:
    """How many workgroups' LDS, in bytes each, a compute unit has room for."""
    return 160 * 1024 // _round_up(lds, 1280) if lds else math.inf


def occupancy(vgpr: int, lds: int, num_warps: int) -> float:
    """Waves per SIMD."""
    return min(waves_by_registers(vgpr), workgroups_by_lds(lds) * num_warps / 4)


def workgroups_of_a_unit(vgpr: int, lds: int, num_warps: int) -> int:
    """How many whole workgroups a compute unit runs at once."""
    return int(min(4 * waves_by_registers(vgpr) // num_warps, workgroups_by_lds(lds)))
