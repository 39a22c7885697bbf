"""The LDS's three races, each alone, and the integer atomics where signs decide."""

import numpy as np
import pytest

from tools.gfx950.access import INTEGER_ATOMICS
from tools.gfx950.assembly import EmulatorError
from tools.gfx950.memory import Lds


def read(lds: Lds, wave: int, address: int = 8, workgroup: int = 0) -> None:
    lds.read(np.array([workgroup]), np.array([wave]), np.array([address], np.uint32), 4)


def write(lds: Lds, wave: int, value: int, address: int = 8, workgroup: int = 0) -> None:
    data = np.array([[value] * 4], np.uint8)
    lds.write(np.array([workgroup]), np.array([wave]), np.array([address], np.uint32), data)


def filled(workgroups: int) -> Lds:
    """An LDS whose bytes have been written before the last barrier."""
    lds = Lds(workgroups, 64, races=True)
    for workgroup in range(workgroups):
        for address in range(0, 64, 4):
            write(lds, 0, 0, address, workgroup)
    lds.barrier(np.arange(workgroups))
    return lds


def test_read_after_write() -> None:
    lds = filled(2)
    write(lds, 0, 1)
    read(lds, 0)
    read(lds, 1, address=12)
    read(lds, 1, workgroup=1)
    with pytest.raises(EmulatorError, match="a load of a byte that another wave has stored"):
        read(lds, 1, address=8)


def test_write_after_read() -> None:
    """The kernels meet it where a buffer is filled again for the next block."""
    lds = filled(2)
    read(lds, 3)
    write(lds, 3, 1)
    write(lds, 1, 1, address=12)
    write(lds, 1, 1, workgroup=1)
    lds = filled(2)
    read(lds, 3)
    with pytest.raises(EmulatorError, match="a store to a byte that another wave has loaded"):
        write(lds, 1, 1, address=8)


def test_write_after_write() -> None:
    """The second write has another value; copies of one value may come from all waves."""
    lds = Lds(1, 64, races=True)
    write(lds, 0, 7)
    write(lds, 1, 7)
    with pytest.raises(EmulatorError, match="two waves store different values"):
        write(lds, 1, 8)


@pytest.mark.parametrize("wave", [1, 31])
def test_a_barrier_parts_them(wave: int) -> None:
    """A barrier parts the accesses of its own workgroup, and of no other."""
    lds = filled(2)
    for workgroup in (0, 1):
        read(lds, 0, workgroup=workgroup)
    lds.barrier(np.array([0]))
    write(lds, wave, 1)
    with pytest.raises(EmulatorError, match="has loaded"):
        write(lds, wave, 1, workgroup=1)


def test_a_byte_that_nobody_has_written() -> None:
    """Half of what is read has been written: the first half, the last one, that of another workgroup."""
    lds = Lds(2, 64, races=True)
    write(lds, 0, 1, 16)
    write(lds, 0, 1, 28)
    read(lds, 0, 16)
    for address, workgroup, first in ((16, 0, 20), (24, 0, 24), (16, 1, 16)):
        with pytest.raises(
            EmulatorError, match=f"byte {first} of the LDS, which no wave has written"
        ):
            one, zero = np.array([workgroup]), np.array([0])
            lds.read(one, zero, np.array([address], np.uint32), 8)


@pytest.mark.parametrize("size, address", [(2, 7), (4, 6), (8, 12), (12, 6), (16, 8), (16, 20)])
def test_an_access_that_is_not_aligned(size: int, address: int) -> None:
    lds, zero = Lds(1, 64, races=False), np.array([0])
    unit = 4 if size == 12 else size
    where = np.array([address], np.uint32)
    with pytest.raises(
        EmulatorError, match=f"{size} bytes at {address}, which is no multiple of {unit}"
    ):
        lds.read(zero, zero, where, size)
    with pytest.raises(
        EmulatorError, match=f"{size} bytes at {address}, which is no multiple of {unit}"
    ):
        lds.write(zero, zero, where, np.zeros((1, size), np.uint8))
    lds.read(zero, zero, where // unit * unit, size)


def test_nothing_is_watched_where_nobody_asks() -> None:
    lds = Lds(1, 64, races=False)
    read(lds, 0)
    write(lds, 1, 1)
    write(lds, 0, 2)
    read(lds, 1)


OLD, OPERAND = -5, 3
SIGNED = {"smin": -5, "smax": 3, "add": -2, "sub": -8, "swap": 3}
UNSIGNED = {"umin": 3, "umax": 2**32 - 5, "inc": 0, "dec": 3}


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
@pytest.mark.parametrize("bits", [32, 64])
def test_an_atomic_of_a_negative_number(name: str, bits: int) -> None:
    """Taken as unsigned, it is among the largest numbers."""
    operation, kind = INTEGER_ATOMICS[name]
    dtype = np.dtype(f"{kind}{bits // 8}")
    old, operand = (np.array([value]).astype(dtype) for value in (OLD, OPERAND))
    expected = SIGNED.get(name, UNSIGNED.get(name, 0))
    if name == "umax":
        expected = 2**bits - 5
    assert operation(old, operand).astype(f"u{bits // 8}")[0] == expected % 2**bits
