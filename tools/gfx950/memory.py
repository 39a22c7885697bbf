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

_ALIGNMENT = 16  # the largest access of a lane, and the distance that workgroups' LDS is padded to
# Elements of a whole access: one index takes all of its bytes.
_ELEMENTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
# What `Lds` notes about a byte, else a wave's number plus one.
_NOBODY, _EARLIER, _SEVERAL = 0, 254, 255
# By size of an access and by mark: an element in which each byte is the mark.
_ROWS = {n: np.repeat(np.arange(256, dtype=np.uint8), n).view(t) for n, t in _ELEMENTS.items()}


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
        self._pitch = lds_pitch(size)
        self._bytes = np.full(workgroups * self._pitch, 0xCC, np.uint8)
        # For each byte, the wave that has read it, or written it, since the last barrier: its number plus
        # one, _SEVERAL or _NOBODY. A byte that was written before the barrier is _EARLIER.
        self._races = races
        self._readers = np.zeros(workgroups * self._pitch if races else 0, np.uint8)
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
            mine = _marks(waves, size)
            written = _taken(self._writers, places, size, aligned=True)
            if (written != _EARLIER).any():
                if _of_others(written, mine).any():
                    raise EmulatorError(
                        "LDS race: a load of a byte that another wave has stored, with no barrier in "
                        "between"
                    )
                if not written.all():
                    first = self._spans(places, size).reshape(-1)[np.argmin(written)]
                    raise EmulatorError(
                        f"a load of byte {int(first) % self._pitch} of the LDS, which no wave has written"
                    )
            readers = _taken(self._readers, places, size, aligned=True)
            self._mark(self._readers, places, mine, _of_others(readers, mine))
        return _taken(self._bytes, places, size, aligned=True)

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
        if load is not None and self.arrivals is not None:
            self.arrivals.load(load, workgroups, waves, self._spans(places, size))
        _put(self._bytes, places, data, aligned=True)

    def barrier(self, workgroups: NDArray) -> None:
        """All waves of these workgroups have met: accesses before this cannot race with later ones, but
        for loads that have not ended."""
        if not self._races:
            return
        for workgroup in np.unique(workgroups[self._touched[workgroups]]).tolist():
            span = slice(workgroup * self._pitch, (workgroup + 1) * self._pitch)
            self._readers[span] = _NOBODY
            writers = self._writers[span]
            before = writers.copy()
            np.multiply(writers != _NOBODY, np.uint8(_EARLIER), out=writers)
            self._touched[workgroup] = False
            if self.arrivals is not None:
                pending = self.arrivals.pending(np.arange(span.start, span.stop))
                writers[pending] = before[pending]
                self._touched[workgroup] = bool(pending.any())

    def _check_arrivals(self, places: NDArray, size: int, what: str) -> None:
        if self.arrivals is None:
            return
        spans = self._spans(places, size)
        pending = self.arrivals.pending(spans)
        if pending.any():
            first = int(spans[pending][0])
            raise EmulatorError(
                f"an LDS {what} of byte {first % self._pitch}, which {self.arrivals.of(first)} has yet "
                "to write: no s_waitcnt vmcnt in between"
            )

    def _check_write(self, places: NDArray, waves: NDArray, data: NDArray[np.uint8]) -> None:
        """Check a store for races, and note who stores. Waves that hold copies of one value may all store
        it."""
        size = data.shape[1]
        mine = _marks(waves, size)
        if _of_others(_taken(self._readers, places, size, aligned=True), mine).any():
            raise EmulatorError(
                "LDS race: a store to a byte that another wave has loaded, with no barrier in between"
            )
        writers = _taken(self._writers, places, size, aligned=True)
        others = _of_others(writers, mine)
        if self._mark(self._writers, places, mine, others):
            # Each wave in turn, so that its value is compared with that of the wave before.
            _put(self._writers, places, writers, aligned=True)
            for wave in np.unique(waves):
                chosen = waves == wave
                self._check_write(places[chosen], waves[chosen], data[chosen])
                _put(self._bytes, places[chosen], data[chosen], aligned=True)
        elif others.any():
            before = _taken(self._bytes, places, size, aligned=True)
            if (others & (before != data)).any():
                raise EmulatorError(
                    "LDS race: two waves store different values, with no barrier in between"
                )

    def _mark(
        self, marks: NDArray[np.uint8], places: NDArray, mine: NDArray, others: NDArray
    ) -> bool:
        """Note in `marks` that waves access [n, size] bytes. Returns whether two waves access one byte.

        mine: their marks. others: the bytes that other waves have accessed before.
        """
        size = mine.shape[1]
        new = np.where(others, np.uint8(_SEVERAL), mine) if others.any() else mine
        _put(marks, places, new, aligned=True)
        lost = _taken(marks, places, size, aligned=True) != new
        if not lost.any():
            return False
        marks[self._spans(places, size)[lost]] = _SEVERAL
        return True

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
        unit = math.gcd(size, 16)
        wrong = (offsets & (unit - 1)) != 0
        if wrong.any():
            raise EmulatorError(
                f"LDS {what} of {size} bytes at {int(offsets[wrong][0])}, "
                f"which is no multiple of {unit}"
            )
        return workgroups * self._pitch + offsets

    @staticmethod
    def _spans(places: NDArray, size: int) -> NDArray[np.int64]:
        return places[:, None] + np.arange(size)


def lds_pitch(size: int) -> int:
    """How many bytes lie between the first bytes of two workgroups' LDS of `size` bytes in `Lds`."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _marks(waves: NDArray, size: int) -> NDArray[np.uint8]:
    """[n] numbers of waves -> [n, size], their marks in `Lds`."""
    if size not in _ELEMENTS:
        return np.repeat((waves + 1).astype(np.uint8)[:, None], size, axis=1)
    return _ROWS[size][waves + 1].view(np.uint8).reshape(-1, size)


def _of_others(marks: NDArray[np.uint8], mine: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The bytes that a wave with another mark has accessed since the last barrier."""
    return (marks != mine) & (marks != _NOBODY) & (marks != _EARLIER)


def _taken(
    source: NDArray[np.uint8], places: NDArray, size: int, *, aligned: bool = False
) -> NDArray[np.uint8]:
    """[n, size]: the `size` bytes from each of n places on. aligned: as in `_access`."""
    elements, index = _access(source, places, size, aligned=aligned)
    return elements[index].view(np.uint8).reshape(-1, size)


def _put(
    target: NDArray[np.uint8], places: NDArray, values: NDArray, *, aligned: bool = False
) -> None:
    """Write [n, size] bytes from each of n places on. Of two values for a byte the later one stays."""
    elements, index = _access(target, places, values.shape[1], aligned=aligned)
    elements[index] = np.ascontiguousarray(values, np.uint8).view(elements.dtype)[:, 0]


def _access(
    data: NDArray[np.uint8], places: NDArray, size: int, *, aligned: bool
) -> tuple[NDArray, NDArray]:
    """A view of `data` and an index of it whose elements are the `size` bytes from each place on.

    aligned: places, and the bytes of `data` in memory, are at multiples of the size, or of 4 if the size
    is none of `_ELEMENTS`. numpy is five times as fast with the views that this allows.
    """
    if aligned and size in _ELEMENTS:
        return data.view(_ELEMENTS[size]), places >> (size.bit_length() - 1)
    count = max(len(data) - size + 1, 0)
    return np.ndarray((count,), f"V{size}", data, strides=(1,)), places
