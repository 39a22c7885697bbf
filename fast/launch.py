"""One launch of a kernel as a value: to be run, compiled for an absent card, or emulated. `Launch` is for
Triton's kernels, `hip.HipLaunch` for HIP's."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fast.target import target_of
from qwen35.errors import InputError

# The part of a configuration that is for Triton, not for the kernel.
OPTIONS = ("num_warps", "num_stages", "waves_per_eu", "maxnreg")
# Tensors that kernels address with 64 bits wherever they may have more elements than NARROW, by the names
# of parameters. Offsets into all others have 32 bits, which no kernel checks.
WIDE = frozenset((
    "weight", "scale", "table", "x", "out", "projected", "q", "qk", "v", "wanted",
    "erased", "memories", "corrections", "by_pair", "by_piece", "shared", "residual",
))  # fmt: skip
NARROW = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it is launched with.

    name: kernel and shape, such as "gate_up D=4096 I=128". kernel: a `triton.jit` function.
    arguments: by parameter name, constexpr ones too; tensors may be on the device `meta`, for compiling.
    options: num_warps, num_stages, ... as Triton takes them.
    weight_bytes: the bytes of weights that a program reads in one iteration of its hot loop; 0 when it
        has no such loop.
    reaches: tensors whose addresses are among the arguments.
    """

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, int]
    weight_bytes: int = 0
    reaches: tuple[torch.Tensor, ...] = ()

    def __post_init__(self) -> None:
        """InputError for a tensor with more elements than its offsets can count."""
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor) and value.numel() > NARROW and name not in WIDE:
                raise InputError(
                    f"{self.name}: {name} has {value.numel()} elements; its offsets have 32 bits and "
                    f"reach {NARROW}"
                )

    @property
    def alternatives(self) -> int:
        """The bodies of the hot loop in the code, of which a pass executes one; 0 without a loop."""
        return 1

    def bytes_of_a_wave(self, num_warps: int) -> float:
        """The part of `weight_bytes` that a wave reads."""
        return self.weight_bytes / num_warps

    def specialisation(self) -> tuple[tuple[Any, ...], list[Any]]:
        """What the compiled code depends on, and the arguments in the order of the parameters."""
        parameters = _parameters(self.kernel)
        values = [self.arguments[name] for name, _ in parameters]
        kinds = (is_constexpr for _, is_constexpr in parameters)
        device = next(value.device for value in values if isinstance(value, torch.Tensor))
        return (
            self.kernel,
            device,
            *self.options.items(),
            *map(_specialised, values, kinds),
        ), values

    def __call__(self) -> None:
        key, values = self.specialisation()
        if key in _compiled:  # quicker for the host than Triton's own search
            _compiled[key][self.grid](*values)
            return
        compiled = self.kernel[self.grid](**self.arguments, **self.options)
        check_packing(self.name, compiled.asm["ttgir"])
        _compiled[key] = compiled


Work = Launch | Callable[[], None]  # a kernel's launch, or operations of torch on fixed buffers

_compiled: dict[tuple[Any, ...], Any] = {}  # compiled kernels by all that their code depends on


@cache
def _parameters(kernel: Any) -> tuple[tuple[str, bool], ...]:
    """The name of each parameter of a Triton kernel, and whether it is a constexpr."""
    return tuple((one.name, one.is_constexpr) for one in kernel.params)


def _specialised(value: Any, is_constexpr: bool) -> Any:
    """Return all that the compiled code depends on in an argument, and perhaps more. Triton specialises
    pointers and integers that are a multiple of 16, integers that are 1 or need 64 bits, and (AMD)
    tensors below 2 GiB."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0, value.numel() * value.itemsize < 2**31
    if isinstance(value, tuple):
        return tuple(_specialised(one, is_constexpr) for one in value)
    if is_constexpr or value is None:
        return value
    if isinstance(value, int):
        return type(value), value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    return type(value)


# How many elements inline assembly takes at once, and the layout of its first operand.
_PACKED = re.compile(r"packed_element = (\d+) : .*? : tensor<\w+, (#ttg\.\w+<\{.*?\}>|#\w+)>")


def check_packing(name: str, ir: str) -> None:
    """InputError when inline assembly that takes n elements at once is not given n neighbours of a row.

    ir: Triton's own, with layouts ("ttgir"). Triton does not promise which elements go together: they are
    those that lie one after the other in a thread's registers, which depends on the layout. Decoding
    MXFP4 (`kernels/mxfp4.py`) needs the four bytes of one word; any other four give garbage.
    """
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ir, re.MULTILINE))
    for number, layout in _PACKED.findall(ir):
        n, text = int(number), aliases.get(layout, layout)
        if n > 1 and not _are_neighbours(n, text):
            raise InputError(
                f"{name}: Triton gives an instruction {n} elements that are not neighbours (its layout "
                f"is {text}); another BLOCK_N, BLOCK_K or num_warps is needed"
            )


def _are_neighbours(n: int, layout: str) -> bool:
    """Whether a thread's registers hold runs of n elements along the last dimension; n a power of two."""
    if run := re.search(r"kWidth = (\d+)", layout):
        return int(run[1]) % n == 0
    if bases := re.search(r"register = \[(\[.*?\])\]", layout):
        steps = [[int(x) for x in one.split(",")] for one in re.findall(r"\[(.*?)\]", bases[1])]
        bits = n.bit_length() - 1
        return [step[-1] for step in steps[:bits] if not any(step[:-1])] == [
            1 << bit for bit in range(bits)
        ]
    if sizes := re.search(r"sizePerThread = \[([\d, ]+)\].*order = \[(\d+)", layout):
        per_thread = [int(size) for size in sizes[1].split(",")]
        return per_thread[-1] % n == 0 and int(sizes[2]) == len(per_thread) - 1
    return False


class Scratch:
    """Buffers that launches write and later ones read, by name.

    The same name, shape and dtype give the same memory again, so that the layers of a model, which run
    one after the other, share it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A buffer. One of integers holds zeros at first; one of floats is uninitialised."""
        key = (name, shape, dtype)
        if key not in self._held:
            make = torch.empty if dtype.is_floating_point else torch.zeros
            self._held[key] = make(shape, dtype=dtype, device=self.device)
        return self._held[key]


def constants(config: dict[str, int]) -> dict[str, int]:
    """The kernel's own part of a configuration."""
    return {name: value for name, value in config.items() if name not in OPTIONS}


def options(config: dict[str, int]) -> dict[str, int]:
    """Triton's part of a configuration."""
    return {name: value for name, value in config.items() if name in OPTIONS}


def run(work: Iterable[Work], device: torch.device) -> None:
    """Run all work, one after the other. InputError when the kernels do not run on the device.

    On the CPU `tools.gfx950.target.emulate` takes the same arguments: it executes gfx950 machine code.
    """
    target_of(device)
    for one in work:
        one()
