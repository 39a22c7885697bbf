"""The registers of a batch of waves that are at the same instruction.

Everything that a wave has is an array with an axis of W waves, so that one numpy call executes an
instruction for all of them. A branch that only some of them take splits the batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tools.gfx950.memory import Lds, Memory

LANES = 64
GARBAGE = 0xDEADBEEF  # the content of registers before they are written
VCC, M0, EXEC = 106, 124, 126  # the numbers of these registers among the SGPRs


class Waves:
    """W waves of 64 lanes.

    vgpr, agpr: uint32 [registers, W, 64].
    sgpr: uint32 [128, W], with VCC, M0 and EXEC at their numbers. scc: bool [W].
    active: bool [W, 64], EXEC by lanes; only `write_s32` and `write_s64` write it. all_active: whether
    all of it is True.
    workgroup, wave: int64 [W], the number of the workgroup in the batch and of the wave in the workgroup.
    memory, lds: those of all waves that run at the time.
    written: bool [watched registers, W, 64], the lanes in which each of them has been written.
    """

    def __init__(
        self,
        vgprs: int,
        agprs: int,
        workgroup: NDArray[np.int64],
        wave: NDArray[np.int64],
        memory: "Memory",
        lds: "Lds",
        watched: int = 0,
    ) -> None:
        count = len(workgroup)
        self.written = np.zeros((watched, count, LANES), bool)
        self.vgpr = np.full((vgprs, count, LANES), GARBAGE, np.uint32)
        self.agpr = np.full((agprs, count, LANES), GARBAGE, np.uint32)
        self.sgpr = np.full((128, count), GARBAGE, np.uint32)
        self.scc = np.zeros(count, bool)
        self.workgroup, self.wave = workgroup, wave
        self.memory, self.lds = memory, lds
        self._update_active()

    def __len__(self) -> int:
        return len(self.wave)

    def select(self, chosen: NDArray) -> "Waves":
        """A copy of some of the waves. chosen: bool [W], or indices."""
        part = object.__new__(Waves)
        part.vgpr, part.agpr = self.vgpr[:, chosen], self.agpr[:, chosen]
        part.sgpr, part.scc = self.sgpr[:, chosen], self.scc[chosen]
        part.written = self.written[:, chosen]
        part.workgroup, part.wave = self.workgroup[chosen], self.wave[chosen]
        part.memory, part.lds = self.memory, self.lds
        part._update_active()
        return part

    @staticmethod
    def join(parts: "Sequence[Waves]") -> "Waves":
        """The waves of all parts, which share memory and LDS, as one batch."""
        if len(parts) == 1:
            return parts[0]
        whole = object.__new__(Waves)
        whole.vgpr = np.concatenate([p.vgpr for p in parts], axis=1)
        whole.agpr = np.concatenate([p.agpr for p in parts], axis=1)
        whole.sgpr = np.concatenate([p.sgpr for p in parts], axis=1)
        whole.scc = np.concatenate([p.scc for p in parts])
        whole.written = np.concatenate([p.written for p in parts], axis=1)
        whole.workgroup = np.concatenate([p.workgroup for p in parts])
        whole.wave = np.concatenate([p.wave for p in parts])
        whole.memory, whole.lds = parts[0].memory, parts[0].lds
        whole._update_active()
        return whole

    def read_s64(self, index: int) -> NDArray[np.uint64]:
        """Two SGPRs as one number, uint64 [W]."""
        high = self.sgpr[index + 1].astype(np.uint64)
        return self.sgpr[index].astype(np.uint64) | (high << np.uint64(32))

    def write_s32(self, index: int, bits: NDArray) -> None:
        """Write an SGPR. bits: uint32 [W] or [1]."""
        self.sgpr[index] = bits
        if index in (EXEC, EXEC + 1):
            self._update_active()

    def write_s64(self, index: int, bits: NDArray) -> None:
        """Write two SGPRs. bits: uint64 [W] or [1]."""
        self.sgpr[index] = (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        self.sgpr[index + 1] = (bits >> np.uint64(32)).astype(np.uint32)
        if index == EXEC:
            self._update_active()

    def write_v(self, index: int, bits: NDArray, mask: NDArray | None = None) -> None:
        """Write a VGPR in the active lanes, or in those of mask, bool [W, 64]. bits: uint32, may
        broadcast."""
        if mask is not None:
            np.copyto(self.vgpr[index], bits, where=mask)
        elif self.all_active:
            self.vgpr[index] = bits
        else:
            np.copyto(self.vgpr[index], bits, where=self.active)

    def _update_active(self) -> None:
        self.active = lanes_of(self.read_s64(EXEC))
        self.all_active = bool(self.active.all())


def spread(values: NDArray, waves: Waves) -> NDArray:
    """Values that broadcast to [W, 64], as such an array, which is not to be written."""
    shape = len(waves), LANES
    return values if values.shape == shape else np.broadcast_to(values, shape)


def lanes_of(mask: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """[W] masks -> [W, 64] lanes; lane i is bit i."""
    octets = np.ascontiguousarray(mask).astype("<u8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(bool)


def mask_of(lanes: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """[W, 64] lanes -> [W] masks."""
    return np.packbits(lanes, axis=1, bitorder="little").view("<u8")[:, 0]
