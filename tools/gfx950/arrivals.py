"""Loads from global memory to the LDS: which bytes they have yet to write.

Such a load ends some time after it was issued, and vmcnt counts it among the vector instructions of
its wave, which end in order. Until the wave has waited for it nobody may touch its bytes. Then the wave
itself may; the others also need a barrier after the wait.
"""

import numpy as np
from numpy.typing import NDArray

from tools.gfx950.assembly import Instruction
from tools.gfx950.waves import Waves

MOST_WAVES = 32  # of a workgroup; the card takes 16


class Arrivals:
    """Of the workgroups of a batch, whose bytes are numbered as in `memory.Lds`."""

    def __init__(self, workgroups: int, size: int) -> None:
        self._size = size
        # By workgroup and wave: how many vector instructions it has issued, and how many have ended.
        self._issued = np.zeros((workgroups, MOST_WAVES), np.int64)
        self._ended = np.zeros_like(self._issued)
        # By byte: the wave that loads it, which of the wave's instructions does, and its text.
        self._wave = np.zeros(workgroups * size, np.uint8)
        self._number = np.zeros(workgroups * size, np.int64)
        self._load = np.zeros(workgroups * size, np.int32)
        self._loads: list[Instruction] = []

    def issue(self, waves: Waves) -> None:
        """Each wave issues one more vector instruction that accesses memory."""
        self._issued[waves.workgroup, waves.wave] += 1

    def wait(self, waves: Waves, left: int) -> None:
        """Each wave has waited until no more than `left` have not ended."""
        which = waves.workgroup, waves.wave
        self._ended[which] = np.maximum(self._ended[which], self._issued[which] - left)

    def load(
        self, instruction: Instruction, workgroups: NDArray, waves: NDArray, places: NDArray
    ) -> None:
        """The latest instruction of waves of workgroups, [n] each, loads the bytes at places,
        [n, size]."""
        if instruction not in self._loads:
            self._loads.append(instruction)
        self._wave[places] = waves[:, None]
        self._number[places] = self._issued[workgroups, waves][:, None]
        self._load[places] = self._loads.index(instruction)

    def pending(self, places: NDArray) -> NDArray[np.bool_]:
        """Which of the bytes are yet to be written."""
        return self._number[places] > self._ended[places // self._size, self._wave[places]]

    def of(self, place: int) -> str:
        """The load of a byte, for errors."""
        load = self._loads[self._load[place]]
        return f"{load.line!r} of line {load.number}"
