"""A launch of a HIP kernel as a value, like those of Triton kernels. It runs on a ROCm card, or is
compiled or emulated without one."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fast import hip_compiler
from fast.hip_compiler import ARCHITECTURE, Kernel
from fast.launch import Launch
from fast.target import target_of
from qwen35.errors import InputError

LANES = 64
NO_BINARY, INVALID_IMAGE = 209, 200  # hipError_t: not for this card, not a code object
SCALARS = {int: ("i32", ctypes.c_int32), float: ("fp32", ctypes.c_float)}


@dataclass(frozen=True)
class HipLaunch(Launch):
    """A HIP kernel with everything that it is launched with.

    kernel: a `hip_compiler.Kernel`.
    arguments: the parameters in their order. Each is a tensor, None (a null pointer), an int (32 bits)
        or a float (32 bits).
    options: only num_warps.
    loading: the number of waves of a workgroup that load weights.
    kinds: the number of kinds of work, or 0 without a hot loop. A pass of that loop does one of them.
    together: whether all workgroups must run at the same time, because they wait for each other.
    """

    loading: int = 1
    kinds: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        """InputError for an argument of another type. Offsets are not checked, because HIP kernels
        address all tensors with 64 bits."""
        parameters(self.name, self.arguments)

    @property
    def threads(self) -> int:
        """The threads of a workgroup."""
        return LANES * self.options["num_warps"]

    @property
    def alternatives(self) -> int:
        return self.kinds

    def bytes_of_a_wave(self, num_warps: int) -> float:
        return self.weight_bytes / self.loading

    def __call__(self) -> None:
        where = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        if (target := target_of(where)) != ARCHITECTURE:
            raise InputError(f"{self.name}: a HIP kernel for {ARCHITECTURE}; this is {target}")
        with torch.cuda.device(where):
            index = torch.cuda.current_device()
            function = _function(self.kernel, index)
            if self.together and (function.value, self.grid) not in _checked:
                units = torch.cuda.get_device_properties(index).multi_processor_count
                runtime().check_together(self, function, units)
                _checked.add((function.value, self.grid))
            runtime().launch(self, function, torch.cuda.current_stream().cuda_stream)


# Functions with grids that the card runs at once.
_checked: set[tuple[int | None, tuple[int, int, int]]] = set()


def parameters(name: str, arguments: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(name, type) of each argument of a launch; "*" is a pointer. InputError for any other type."""
    found = []
    for parameter, value in arguments.items():
        if value is None or isinstance(value, Tensor):
            found.append((parameter, "*"))
        elif type(value) in SCALARS:
            found.append((parameter, SCALARS[type(value)][0]))
        else:
            kind = type(value).__name__
            raise InputError(
                f"{name}: argument {parameter} is a {kind}; expected a tensor or a number"
            )
    return tuple(found)


def packed(arguments: Mapping[str, Any]) -> list[Any]:
    """The arguments as C values, in their order."""
    values: list[Any] = []
    for value in arguments.values():
        if value is None or isinstance(value, Tensor):
            values.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        else:
            values.append(SCALARS[type(value)][1](value))
    return values


class Runtime:
    """HIP's module API. library: libamdhip64 as ctypes loads it.

    CUDA's driver has the same calls by other names (`tools.cuda_port`): architecture and the
    names of the calls are attributes.
    """

    architecture = ARCHITECTURE
    load_data, get_function = "hipModuleLoadData", "hipModuleGetFunction"
    occupancy = "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor"
    launch_kernel = "hipModuleLaunchKernel"

    def __init__(self, library: Any) -> None:
        self.library = library

    def load(self, kernel: Kernel, code: bytes) -> ctypes.c_void_p:
        """Load a kernel's function on the current device. InputError if the code object is for another
        card."""
        return self.function(kernel, self.module(kernel, code))

    def module(self, kernel: Kernel, code: bytes) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        load = getattr(self.library, self.load_data)
        status = load(ctypes.byref(module), ctypes.c_char_p(code))
        if status in (NO_BINARY, INVALID_IMAGE):
            raise InputError(
                f"{kernel.name}: the code object is for {self.architecture}, not for this card "
                f"({self.text(status)})"
            )
        self.check(kernel.name, self.load_data, status)
        return module

    def function(self, kernel: Kernel, module: ctypes.c_void_p) -> ctypes.c_void_p:
        function, name = ctypes.c_void_p(), ctypes.c_char_p(kernel.name.encode())
        self.call(kernel.name, self.get_function, ctypes.byref(function), module, name)
        return function

    def check_together(
        self, launch: HipLaunch, function: ctypes.c_void_p, units: int, lds: int = 0
    ) -> None:
        """InputError unless a card of `units` compute units runs the whole grid at once. lds: bytes of a
        workgroup besides the kernel's own."""
        fitting = ctypes.c_int()
        sizes = ctypes.c_int(launch.threads), ctypes.c_size_t(lds)
        self.call(launch.name, self.occupancy, ctypes.byref(fitting), function, *sizes)
        check_together(launch, fitting.value, units)

    def launch(
        self, launch: HipLaunch, function: ctypes.c_void_p, stream: int, lds: int = 0
    ) -> None:
        values = packed(launch.arguments)
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        sizes = map(ctypes.c_uint, (*launch.grid, launch.threads, 1, 1, lds))
        where = ctypes.c_void_p(stream)
        self.call(launch.name, self.launch_kernel, function, *sizes, where, pointers, None)

    def call(self, what: str, name: str, *arguments: Any) -> None:
        """Call a function of the library. InputError with its message if it fails."""
        self.check(what, name, getattr(self.library, name)(*arguments))

    def check(self, what: str, name: str, status: int) -> None:
        if status:
            raise InputError(f"{what}: {name} returned {status} ({self.text(status)})")

    def text(self, status: int) -> str:
        """The message of an error."""
        self.library.hipGetErrorString.restype = ctypes.c_char_p
        return self.library.hipGetErrorString(ctypes.c_int(status)).decode()


def check_together(launch: Launch, fitting: int, units: int) -> None:
    """InputError unless `units` compute units, each of which runs `fitting` workgroups, run the whole
    grid at once. Workgroups that wait for one that has no place would wait for ever."""
    x, y, z = launch.grid
    if x * y * z > fitting * units:
        raise InputError(
            f"{launch.name}: {x * y * z} workgroups wait for each other; this card runs "
            f"{fitting * units} of them at once"
        )


@cache
def runtime() -> Runtime:
    try:
        return Runtime(ctypes.CDLL("libamdhip64.so"))  # the one that torch has loaded
    except OSError as error:
        raise InputError(f"HIP kernels need ROCm's runtime: {error}") from None


@cache
def _function(kernel: Kernel, device: int) -> ctypes.c_void_p:
    """A kernel's function on a device, which must be the current one."""
    return runtime().load(kernel, hip_compiler.code_object(kernel))
