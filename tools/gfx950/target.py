"""Compiles a Triton launch for a card that is not here, and runs what the compiler made in the emulator.

Both work without a GPU and without a driver. The kernel goes through Triton's own JIT with the launch's
own arguments, so that it is specialised as it would be on the card: an int that is 1 becomes a constant,
a pointer or an int that 16 divides is known to be so, a tensor below 2 GiB is read by buffer loads.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast import hip, hip_compiler
from fast.hip import HipLaunch
from fast.launch import Launch, Work, check_packing
from qwen35.errors import InputError
from tools import cards
from tools.gfx950.emulator import LIMIT, Argument, Kernel, Statistics, Trace

CPU = torch.device("cpu")

# Name -> Triton's names of the backend and the architecture, lanes of a warp, and Triton's names of the
# text and of the binary.
TARGETS: dict[str, tuple[str, str | int, int, str, str]] = {
    "gfx950": ("hip", "gfx950", 64, "amdgcn", "hsaco"),
    "sm_90": ("cuda", 90, 32, "ptx", "cubin"),
}
# Triton's name of a scalar's type -> the emulator's.
SCALARS = {"fp32": "f32", "fp64": "f64", "i1": "u8"}
SCALARS |= {f"{sign}{bits}": f"{sign}{bits}" for sign in "iu" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as the compiler made it for one launch.

    name: the function's name in the text.
    text: assembly (amdgcn), or ptx. binary: the code object (hsaco), or cubin.
    shared: bytes of LDS (shared memory) that the launch adds.
    parameters: (name, Triton's type) of each argument that is left at run time, in order. Arguments that
    are constexpr, or that Triton made constants, are not among them. Each element of a tuple is one, such
    as `addresses[0]`.
    """

    name: str
    target: str
    text: str
    binary: bytes
    shared: int
    num_warps: int
    parameters: tuple[tuple[str, str], ...]


def compile_launch(launch: Launch, target: str) -> CompiledKernel:
    """Compile for "gfx950" or "sm_90"; tensors of the launch may be on the CPU or on `meta`.

    Triton's active driver is the same afterwards. InputError for an unknown target and where
    `check_packing` raises it; Triton's own errors are passed on.
    """
    if target not in TARGETS:
        raise InputError(f"target {target!r} is none of {', '.join(TARGETS)}")
    if isinstance(launch, HipLaunch):
        return _compile_hip(launch, target)
    *_, text, binary = TARGETS[target]
    with stand_in_driver(target):
        kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    check_packing(launch.name, kernel.asm["ttgir"])
    return CompiledKernel(
        name=kernel.metadata.name,
        target=target,
        text=kernel.asm[text],
        binary=kernel.asm[binary],
        shared=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        parameters=tuple(
            (n, kind) for n, kind in _flat(kernel.src.signature) if kind != "constexpr"
        ),
    )


def _compile_hip(launch: HipLaunch, target: str) -> CompiledKernel:
    if target != hip_compiler.ARCHITECTURE:
        raise InputError(
            f"{launch.name}: a HIP kernel for {hip_compiler.ARCHITECTURE}; this is {target}"
        )
    kernel = launch.kernel
    text = hip_compiler.assembly(kernel)
    return CompiledKernel(
        name=kernel.name,
        target=target,
        text=text,
        binary=hip_compiler.code_object(kernel),
        shared=0,
        num_warps=launch.options["num_warps"],
        parameters=hip.parameters(launch.name, launch.arguments),
    )


def emulate(
    work: Iterable[Work],
    device: torch.device = CPU,
    *,
    seed: int | None = None,
    batch: int = 32,
    races: bool = True,
    limit: int = LIMIT,
    only: Sequence[tuple[int, int, int]] | None = None,
    trace: Trace | None = None,
) -> Statistics:
    """Do on the CPU what `fast.launch.run` does on a card: run all launches, one after the other.

    Each is compiled for gfx950, and the emulator executes that machine code on the launch's own tensors,
    in place; operations of torch between them are done as they are. Returns the counts of all launches
    together. seed, batch, races, limit, only, trace: as in `Kernel.run`.

    InputError for a device or a tensor that is not on the CPU, and EmulatorError, which is an InputError,
    for what a kernel does wrong or the emulator does not know, with the launch's name. Triton's own
    errors are passed on.
    """
    if device.type != "cpu":
        raise InputError(f"the emulator runs on the CPU; this is {device}")
    total = Statistics()
    for launch in work:
        if not isinstance(launch, Launch):
            launch()
            continue
        compiled, at_once = compile_launch(launch, "gfx950"), batch
        try:
            kernel = loaded(compiled)
            values = dict(_flat(launch.arguments))

            if isinstance(launch, HipLaunch) and launch.together:
                at_once = _all_at_once(launch, kernel)
            arguments = {
                name: _argument(name, kind, values[name]) for name, kind in compiled.parameters
            }
            total += kernel.run(
                list(arguments.values()),
                launch.grid,
                compiled.num_warps,
                compiled.shared,
                names=list(arguments),
                seed=seed,
                batch=at_once,
                races=races,
                limit=limit,
                reaches=[_bytes(tensor) for tensor in launch.reaches],
                only=only,
                trace=trace,
            )
        except InputError as error:
            told = str(error).removeprefix(f"{launch.name}: ")
            raise type(error)(f"{launch.name}: {told}") from None
    return total


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All names and values, with a name for each element of a tuple."""
    for name, value in values.items():
        if isinstance(value, tuple):
            yield from ((f"{name}[{i}]", element) for i, element in enumerate(value))
        else:
            yield name, value


def _all_at_once(launch: HipLaunch, kernel: Kernel) -> int:
    """How many workgroups a launch has whose workgroups wait for each other. InputError if a card does
    not run them all at once."""
    program = kernel.program
    lds = program.directives.get("group_segment_fixed_size", 0)
    fitting = cards.workgroups_of_a_unit(
        program.resources["vgpr"], lds, launch.options["num_warps"]
    )
    hip.check_together(launch, fitting, cards.UNITS)
    return math.prod(launch.grid)


def loaded(compiled: CompiledKernel) -> Kernel:
    """The emulator's kernel, made once for each text. Errors as in `Kernel`."""
    return _kernel(compiled.text, compiled.name)


_kernel = cache(Kernel)  # the same kernel often runs on several inputs


def _argument(name: str, kind: str, value: Any) -> Argument:
    """One argument of a launch as the emulator takes it."""
    if kind.startswith("*"):
        if value is None:
            return np.empty(0, np.uint8)  # a null pointer
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            where = value.device if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"argument {name}: {where}, expected a tensor on the CPU")
        return _bytes(value)
    if kind not in SCALARS:
        raise InputError(f"argument {name}: type {kind!r} is none of *, {', '.join(SCALARS)}")
    return SCALARS[kind], value


def _bytes(x: Tensor) -> np.ndarray:
    """The memory from a tensor's first element to its last one as uint8, shared with the tensor."""
    if not x.numel():
        return np.empty(0, np.uint8)
    storage = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    start = x.storage_offset() * x.element_size()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return storage[start : start + (last + 1) * x.element_size()].numpy()


@contextmanager
def stand_in_driver(target: str) -> Iterator[None]:
    """While the block runs, Triton takes a card of this kind to be the current one."""
    from triton.runtime import driver

    # `driver.active` would look for a real one, and raise where there is none.
    before = driver._active
    driver.set_active(_stand_in(target))
    try:
        yield
    finally:
        driver._active = before


@cache
def _stand_in(target: str) -> Any:
    """A driver that answers the JIT's questions before a launch. Triton is imported only when needed."""
    from triton.backends.compiler import GPUTarget

    backend, architecture, lanes, *_ = TARGETS[target]

    class StandIn:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget(backend, architecture, lanes)

        def get_current_device(self) -> str:
            return target  # the JIT caches kernels by device: a real one's must not mix with ours

        def get_current_stream(self, device: str | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

        def get_benchmarker(self) -> None:
            return None

    return StandIn()
