"""Loads from global memory to the LDS: the bytes that they have not written yet.

Such a load ends some time after it was issued. vmcnt counts it with the other vector instructions of its
wave, which end in order. Until the wave has waited for the load, nobody may access its bytes. After the
wait the wave itself may. The other waves also need a barrier after the wait.
"""

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import Instruction
from tools.gfx950.waves import Waves

MOST_WAVES = 32  # of a workgroup; the card takes 16


class Arrivals:
    """The loads to the LDS of all workgroups of a batch. Bytes are numbered as in `memory.Lds`."""

    def __init__(self, workgroups: int, size: int) -> None:
        self._size = size
        # By workgroup and wave, the numbers of vector instructions that were issued, and that have ended.
        self._issued = np.zeros((workgroups, MOST_WAVES), np.int64)
        self._ended = np.zeros_like(self._issued)
        # By byte, the wave that loads it, the number of the load among the wave's vector instructions,
        # and the load's index in _loads.
        self._wave = np.zeros(workgroups * size, np.uint8)
        self._number = np.zeros(workgroups * size, np.int64)
        self._load = np.zeros(workgroups * size, np.int32)
        self._loads: list[Instruction] = []

    def issue(self, waves: Waves) -> None:
        """Each wave issues one more vector instruction that accesses memory."""
        self._issued[waves.workgroup, waves.wave] += 1

    def wait(self, waves: Waves, left: int) -> None:
        """Each wave has waited until at most `left` of its instructions have not ended."""
        which = waves.workgroup, waves.wave
        self._ended[which] = np.maximum(self._ended[which], self._issued[which] - left)

    def load(
        self, instruction: Instruction, workgroups: NDArray, waves: NDArray, places: NDArray
    ) -> None:
        """Note the bytes that the latest instruction of some waves loads. workgroups, waves: [n], which
        waves. places: [n, size], the bytes of each."""
        if instruction not in self._loads:
            self._loads.append(instruction)
        self._wave[places] = waves[:, None]
        self._number[places] = self._issued[workgroups, waves][:, None]
        self._load[places] = self._loads.index(instruction)

    def pending(self, places: NDArray) -> NDArray[np.bool_]:
        """Say for each of these bytes whether its load has not ended yet."""
        return self._number[places] > self._ended[places // self._size, self._wave[places]]

    def of(self, place: int) -> str:
        """Describe the load of a byte, for errors."""
        load = self._loads[self._load[place]]
        return f"{load.line!r} of line {load.number}"
