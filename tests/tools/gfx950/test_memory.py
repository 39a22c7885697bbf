"""Races in the LDS, each alone and among random accesses; the host's addresses; integer atomics where
signs decide."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tools.gfx950.access import INTEGER_ATOMICS
from tools.gfx950.assembly import EmulatorError
from tools.gfx950.memory import Lds, Memory


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


class Plain:
    """The rules of `Lds` for each byte of one workgroup, lane by lane."""

    def __init__(self, size: int) -> None:
        self.bytes, self.written = [0xCC] * size, [False] * size
        self.barrier()

    def barrier(self) -> None:
        self.readers: list[set[int]] = [set() for _ in self.bytes]
        self.writers: list[set[int]] = [set() for _ in self.bytes]

    def read(self, lanes: list[tuple[int, range]]) -> list[list[int]]:
        for wave, span in lanes:
            assert not any(self.writers[i] - {wave} for i in span), "race"
        for wave, span in lanes:
            assert all(self.written[i] for i in span), "unwritten"
            for i in span:
                self.readers[i].add(wave)
        return [[self.bytes[i] for i in span] for _, span in lanes]

    def write(self, lanes: list[tuple[int, range]], values: list[int]) -> None:
        given = list(zip(lanes, values, strict=True))
        for wave in sorted({wave for wave, _ in lanes}):
            mine = [(i, value) for (other, span), value in given if other == wave for i in span]
            assert not any(self.readers[i] - {wave} for i, _ in mine), "race"
            before = self.bytes.copy()
            assert all(before[i] == v for i, v in mine if self.writers[i] - {wave}), "race"
            for i, value in mine:
                self.writers[i].add(wave)
                self.bytes[i], self.written[i] = value, True
        for (_, span), value in given:
            for i in span:
                self.bytes[i] = value


def outcome(access: Callable[..., Any], *arguments: Any) -> Any:
    """What an access returns, else the kind of its error."""
    try:
        return access(*arguments)
    except (AssertionError, EmulatorError) as error:
        return "race" if "race" in str(error) else "unwritten"


def test_random_accesses_keep_the_rules_of_each_byte() -> None:
    """Sizes that overlap each other in part, bytes that several waves store at once, two workgroups of a
    size that no access of 16 bytes divides."""
    random = np.random.default_rng(0)
    seen: Counter[str] = Counter()
    for _ in range(1000):
        lds, plain = Lds(2, 24, races=True), [Plain(24), Plain(24)]
        waves_of = int(random.integers(1, 4))
        for _ in range(12):
            size, count = int(random.choice([1, 2, 4, 8, 12, 16])), int(random.integers(1, 4))
            unit, owner = 4 if size == 12 else size, int(random.integers(2))
            first = (random.integers(0, (24 - size) // unit + 1, count) * unit).astype(np.uint32)
            waves, owners = random.integers(0, waves_of, count), np.full(count, owner)
            values = random.integers(0, 1 + int(random.random() < 0.3), count).astype(np.uint8)
            lanes = [(int(w), range(f, f + size)) for w, f in zip(waves, first, strict=True)]
            kind = random.choice(["load", "store", "barrier"], p=[0.3, 0.4, 0.3])
            if kind == "barrier":
                lds.barrier(owners)
                plain[owner].barrier()
                continue
            if kind == "load":
                found = outcome(lds.read, owners, waves, first, size)
                expected = outcome(plain[owner].read, lanes)
            else:
                data = np.repeat(values[:, None], size, axis=1)
                found = outcome(lds.write, owners, waves, first, data)
                expected = outcome(plain[owner].write, lanes, values.tolist())
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected
            seen[found if isinstance(found, str) else kind] += 1
            if isinstance(found, str):
                break
    assert min(seen[kind] for kind in ("load", "store", "race", "unwritten")) > 30, seen


def test_nothing_is_watched_where_nobody_asks() -> None:
    lds = Lds(1, 64, races=False)
    read(lds, 0)
    write(lds, 1, 1)
    write(lds, 0, 2)
    read(lds, 1)


def test_an_address_of_the_host() -> None:
    """Within an array, and together with addresses of the device."""
    arrays = [np.arange(16, dtype=np.uint8) + 16 * i for i in range(2)]
    memory = Memory(arrays)
    first, second = (array.__array_interface__["data"][0] for array in arrays)
    places = [first + 8, second + 4, memory.address(1) + 12, memory.address(0)]
    found = memory.read(np.array(places, np.uint64), 4)
    assert found[:, 0].tolist() == [8, 20, 28, 0]
    memory.write(np.array([second + 4], np.uint64), np.array([[9, 9]], np.uint8))
    assert arrays[1][3:7].tolist() == [19, 9, 9, 22]
    with pytest.raises(EmulatorError, match="load of 4 bytes outside of every array by 1 lanes"):
        memory.read(np.array([first + 13], np.uint64), 4)


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
