"""One launch of a Triton kernel as a value: to be run, compiled for an absent card, or emulated."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fast.target import target_of

OPTIONS = (
    "num_warps",
    "num_stages",
    "waves_per_eu",
)  # what a configuration tells Triton, not the kernel


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it is launched with.

    name: kernel and shape, such as "gate_up D=4096 I=128". kernel: a `triton.jit` function.
    arguments: by parameter name, constexpr ones too; tensors may be on the device `meta`, for compiling.
    options: num_warps, num_stages, ... as Triton takes them.
    weight_bytes: that one program reads in one iteration of the hot loop; 0 when there is no such loop.
    """

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, int]
    weight_bytes: int = 0

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def constants(config: dict[str, int]) -> dict[str, int]:
    """The kernel's own part of a configuration."""
    return {name: value for name, value in config.items() if name not in OPTIONS}


def options(config: dict[str, int]) -> dict[str, int]:
    """Triton's part of a configuration."""
    return {name: value for name, value in config.items() if name in OPTIONS}


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """One after the other. InputError when the device is none that the kernels run on."""
    target_of(device)
    for launch in launches:
        launch()
