"""The memory that a kernel sees: the caller's arrays, with wide gaps between them, and the LDS."""

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import EmulatorError, Instruction

if TYPE_CHECKING:
    from tools.gfx950.arrivals import Arrivals

# Device addresses: region i starts in the middle of the i-th slot of 64 GiB. Offsets of 32 bits, in
# either direction, cannot lead from one region to another, so an access beyond an array never hits a
# neighbour.
_BASE, _SLOT_BITS = 1 << 44, 36
_START = 1 << (_SLOT_BITS - 1)

_ONE = np.uint32(1)


class Memory:
    """Global memory. Arrays are not copied: a store of the kernel is a write into the caller's array.

    Arrays that overlap (views of one buffer) lie in one region, as they do on the card. Addresses are
    congruent to the host's modulo 256, since the compiler may rely on an alignment.

    Loads and stores also take addresses of these arrays on the host.

    bytes_read, bytes_written: accesses so far; a byte that two lanes read counts twice.
    names: of the first arrays, in their order, for errors.
    """

    def __init__(self, arrays: Sequence[NDArray], names: Sequence[str] = ()) -> None:
        spans = [np.lib.array_utils.byte_bounds(a) if a.size else (0, 0) for a in arrays]
        order = sorted(range(len(arrays)), key=lambda i: spans[i])
        self.bytes_read = self.bytes_written = 0
        self._arrays = arrays  # keeps them alive
        self._regions: list[NDArray[np.uint8]] = []
        self._starts: list[int] = []  # offset of each region in its slot
        self._writable: list[bool] = []
        # First and end of each region on the host, and its device address.
        self._spans: list[tuple[int, int, int]] = []
        self._names: list[str] = []  # of each region: those of its arrays
        self._addresses = [0] * len(arrays)  # an empty array is a null pointer
        groups: list[list[int]] = []
        end = -1
        for i in order:
            if not arrays[i].size:
                continue
            if spans[i][0] >= end:
                groups.append([])
            groups[-1].append(i)
            end = max(end, spans[i][1])
        for slot, group in enumerate(groups):
            low = min(spans[i][0] for i in group)
            size = max(spans[i][1] for i in group) - low
            start = _START + low % 256
            self._regions.append(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(low)))
            self._starts.append(start)
            self._writable.append(all(arrays[i].flags.writeable for i in group))
            self._names.append(", ".join(names[i] for i in group if i < len(names)))
            self._spans.append((low, low + size, _BASE + (slot << _SLOT_BITS) + start))
            for i in group:
                first = arrays[i].__array_interface__["data"][0]
                self._addresses[i] = _BASE + (slot << _SLOT_BITS) + start + first - low

    def address(self, index: int) -> int:
        """The device address of the first element of array number `index`."""
        return self._addresses[index]

    def read(self, addresses: NDArray[np.uint64], size: int) -> NDArray[np.uint8]:
        """[n] addresses -> [n, size] bytes. EmulatorError if a byte lies outside of every array."""
        self.bytes_read += size * addresses.size
        data = np.empty((addresses.size, size), np.uint8)
        for slot, lanes, offsets in self._locate(addresses, size, "load"):
            data[lanes] = _taken(self._regions[slot], offsets, size)
        return data

    def write(self, addresses: NDArray[np.uint64], data: NDArray[np.uint8]) -> None:
        """Write [n, size] bytes to [n] addresses. If two lanes write to one address, the later one's
        value stays. EmulatorError if a byte lies outside of every array, or in an array that is
        read-only."""
        size = data.shape[1]
        self.bytes_written += data.size
        for slot, lanes, offsets in self._locate(addresses, size, "store"):
            if not self._writable[slot]:
                raise EmulatorError("store into an array that is read-only")
            _put(self._regions[slot], offsets, data[lanes])

    def _locate(
        self, addresses: NDArray[np.uint64], size: int, what: str
    ) -> list[tuple[int, NDArray | slice, NDArray[np.int64]]]:
        """For every region that is accessed: its slot, the lanes that access it, and their offsets."""
        if not addresses.size:
            return []
        places = addresses.astype(np.int64) - _BASE
        slots = places >> _SLOT_BITS
        if ((slots < 0) | (slots >= len(self._regions))).any():
            places = self._of_host(addresses.astype(np.int64)) - _BASE
            slots = places >> _SLOT_BITS
        found: list[tuple[int, NDArray | slice, NDArray[np.int64]]] = []
        same = bool((slots == slots[0]).all())
        for slot in (int(slots[0]),) if same else np.unique(slots).tolist():
            lanes = slice(None) if same else slots == slot
            known = 0 <= slot < len(self._regions)
            offsets = places[lanes] - (slot << _SLOT_BITS) - (self._starts[slot] if known else 0)
            end = len(self._regions[slot]) - size if known else -1
            outside = (offsets < 0) | (offsets > end)
            if outside.any():
                first = int(addresses[lanes][outside][0])
                near = "nowhere"
                if known:
                    name = f"{self._names[slot]}, " if self._names[slot] else ""
                    near = f"byte {offsets[outside][0]} of {name}an array of {end + size}"
                raise EmulatorError(
                    f"{what} of {size} bytes outside of every array by {int(outside.sum())} lanes, "
                    f"the first at {first:#x}: {near}"
                )
            found.append((slot, lanes, offsets))
        return found

    def _of_host(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """The addresses, of which those on the host become device addresses."""
        found = addresses.copy()
        for first, end, device in self._spans:
            inside = (addresses >= first) & (addresses < end)
            found[inside] += device - first
        return found


class Lds:
    """The LDS of the workgroups of a batch: bytes [workgroups, size], which are 0xCC at the start.

    races: raise EmulatorError for a race. That is when, without a barrier of the workgroup in between,
    one wave reads a byte that another wave has written, or writes a byte that another wave has read or
    has written with another value. Whether such a kernel works depends on how its waves are scheduled.
    Raise it too for a read of a byte that no wave has written.
    arrivals: follows loads from global memory to the LDS, in a kernel that has them. Then an access of a
    byte that is yet to be written is an EmulatorError, whatever `races` is.
    """

    def __init__(
        self, workgroups: int, size: int, *, races: bool, arrivals: "Arrivals | None" = None
    ) -> None:
        self.size = size
        self.arrivals = arrivals
        self._bytes = np.full(workgroups * size, 0xCC, np.uint8)
        self._written = np.zeros(
            workgroups * size if races else 0, np.uint8
        )  # 1 for a written byte
        # For each byte, a bit for each wave that has read it, or written it, since the last barrier.
        self._races = races
        self._readers = np.zeros(workgroups * size if races else 0, np.uint32)
        self._writers = np.zeros_like(self._readers)
        self._touched = np.zeros(workgroups, bool)

    def read(
        self, workgroups: NDArray, waves: NDArray, addresses: NDArray[np.uint32], size: int
    ) -> NDArray[np.uint8]:
        """[n] workgroups, waves of these and byte addresses -> [n, size] bytes. EmulatorError outside of
        the LDS, for a race, and for bytes that are not there yet."""
        places = self._places(workgroups, addresses, size, "load")
        self._check_arrivals(places, size, "load")
        if self._races:
            self._touched[workgroups] = True
            if (_taken(self._writers, places, size) & ~_wave_bits(waves)).any():
                raise EmulatorError(
                    "LDS race: a load of a byte that another wave has stored, with no barrier in between"
                )
            for wave, chosen in _by_wave(waves):
                mine = places[chosen]
                _put(self._readers, mine, _taken(self._readers, mine, size) | _ONE << wave)
            written = _taken(self._written, places, size)
            if not written.all():
                first = int(self._spans(places, size).reshape(-1)[np.argmin(written)]) % self.size
                raise EmulatorError(f"a load of byte {first} of the LDS, which no wave has written")
        return _taken(self._bytes, places, size)

    def write(
        self,
        workgroups: NDArray,
        waves: NDArray,
        addresses: NDArray[np.uint32],
        data: NDArray[np.uint8],
        load: Instruction | None = None,
    ) -> None:
        """Write [n, size] bytes at [n] addresses, each by a wave of a workgroup. If two lanes write to
        one address, the later one's value stays. EmulatorError as in `read`.

        load: the instruction, where it loads from global memory and so has not ended yet.
        """
        size = data.shape[1]
        places = self._places(workgroups, addresses, size, "store")
        self._check_arrivals(places, size, "store")
        if self._races:
            self._touched[workgroups] = True
            self._check_write(places, waves, data)
            _put(self._written, places, np.ones((1, size), np.uint8))
        if load is not None and self.arrivals is not None:
            self.arrivals.load(load, workgroups, waves, self._spans(places, size))
        _put(self._bytes, places, data)

    def barrier(self, workgroups: NDArray) -> None:
        """All waves of these workgroups have met: accesses before this cannot race with later ones, but
        for loads that have not ended."""
        if self._races:
            for workgroup in np.unique(workgroups[self._touched[workgroups]]).tolist():
                span = slice(workgroup * self.size, (workgroup + 1) * self.size)
                self._readers[span] = 0
                if self.arrivals is None:
                    self._writers[span] = 0
                else:
                    ended = ~self.arrivals.pending(np.arange(span.start, span.stop))
                    self._writers[span][ended] = 0
                self._touched[workgroup] = bool(self._writers[span].any())

    def _check_arrivals(self, places: NDArray, size: int, what: str) -> None:
        if self.arrivals is None:
            return
        spans = self._spans(places, size)
        pending = self.arrivals.pending(spans)
        if pending.any():
            first = int(spans[pending][0])
            raise EmulatorError(
                f"an LDS {what} of byte {first % self.size}, which {self.arrivals.of(first)} has yet to "
                "write: no s_waitcnt vmcnt in between"
            )

    def _check_write(self, places: NDArray, waves: NDArray, data: NDArray[np.uint8]) -> None:
        size = data.shape[1]
        for wave, chosen in _by_wave(waves):
            mine, bit = places[chosen], _ONE << wave
            if (_taken(self._readers, mine, size) & ~bit).any():
                raise EmulatorError(
                    "LDS race: a store to a byte that another wave has loaded, with no barrier in between"
                )
            writers = _taken(self._writers, mine, size)
            # Waves that hold copies of one value may all store it.
            others = (writers & ~bit) != 0
            if others.any() and (others & (_taken(self._bytes, mine, size) != data[chosen])).any():
                raise EmulatorError(
                    "LDS race: two waves store different values, with no barrier in between"
                )
            _put(self._writers, mine, writers | bit)
            _put(self._bytes, mine, data[chosen])  # the next wave's value is compared with this one

    def _places(
        self, workgroups: NDArray, addresses: NDArray[np.uint32], size: int, what: str
    ) -> NDArray[np.int64]:
        offsets = addresses.astype(np.int64)
        outside = offsets + size > self.size
        if outside.any():
            raise EmulatorError(
                f"LDS {what} of {size} bytes at {int(offsets[outside][0])}, "
                f"the workgroup has {self.size} bytes"
            )
        # 12 bytes are three accesses of 4. The driver can allow others for a price, as ROCm's does.
        aligned = offsets % math.gcd(size, 16) == 0
        if not aligned.all():
            raise EmulatorError(
                f"LDS {what} of {size} bytes at {int(offsets[~aligned][0])}, "
                f"which is no multiple of {math.gcd(size, 16)}"
            )
        return workgroups * self.size + offsets

    @staticmethod
    def _spans(places: NDArray, size: int) -> NDArray[np.int64]:
        return places[:, None] + np.arange(size)


def _wave_bits(waves: NDArray) -> NDArray[np.uint32]:
    return (_ONE << waves.astype(np.uint32))[:, None]


def _by_wave(waves: NDArray) -> list[tuple[np.uint32, NDArray | slice]]:
    """The number of each wave in its workgroup, and the lanes that belong to it."""
    numbers = np.flatnonzero(np.bincount(waves))
    if numbers.size == 1:
        return [(np.uint32(numbers[0]), slice(None))]
    return [(np.uint32(number), waves == number) for number in numbers]


def _taken(source: NDArray, places: NDArray, size: int) -> NDArray:
    """[n, size]: the `size` elements from each of n places on."""
    return _window(source, size)[places].view(source.dtype).reshape(-1, size)


def _put(target: NDArray, places: NDArray, values: NDArray) -> None:
    """Write [n, size] elements from each of n places on, or [1, size] at each. Of two values for an
    element the later one stays."""
    size = values.shape[1]
    packed = np.ascontiguousarray(values, target.dtype).view(f"V{size * target.itemsize}")[:, 0]
    _window(target, size)[places] = packed


def _window(data: NDArray, size: int) -> NDArray:
    """A view whose element i is the `size` elements from element i on, so that one index takes all of
    them."""
    count = max(len(data) - size + 1, 0)
    return np.ndarray((count,), f"V{size * data.itemsize}", data, strides=(data.itemsize,))
