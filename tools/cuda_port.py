"""Compiles and launches a HIP kernel of the project on an NVIDIA card, by `fast/kernels/port_sm90.h`.

It serves to check the kernel's synchronisation on other hardware, and is not made to be fast. The
compiler is nvcc if it is installed, or else NVRTC, a library that comes with torch's CUDA packages.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast.hip import HipLaunch, Runtime
from fast.hip_compiler import Kernel, sources
from fast.target import target_of
from qwen35.errors import InputError
from weights.storage import whole

TARGET = "sm_90"
# As in the header: a wave's lanes, the streamers and the messenger, rows of a weight in a product.
LANES, WAVES, TILE = 32, 17, 8
MAX_PAIRS = 2 * LANES  # of a row and a slot, which moe.hip lists; router.hip lists none
NVCC = ("-x", "cu", "-std=c++17", "-O3", f"-arch={TARGET}", "--expt-relaxed-constexpr", "-cubin")
NVRTC = ("-std=c++17", f"-arch={TARGET}", "-default-device")
LOOKED_FOR = "nvcc (in $CUDA_HOME/bin, PATH), libnvrtc (of torch's packages)"
MAX_DYNAMIC_SHARED = 8  # of CUfunction_attribute


@dataclass(frozen=True)
class Compiler:
    """A compiler for CUDA.

    name: nvcc or NVRTC.
    version: as it tells it itself.
    nvcc: the path of the program, if it is that.
    library: the path or name of NVRTC's library, if it is that.
    """

    name: str
    version: str
    nvcc: str = ""
    library: str = ""


@cache
def find() -> Compiler:
    """The compiler. InputError if there is none, with what was looked for."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    for nvcc in (home / "bin" / "nvcc", shutil.which("nvcc")):
        if nvcc and os.access(nvcc, os.X_OK):
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            lines = [line for line in text.splitlines() if "release" in line] or ["no version"]
            return Compiler("nvcc", lines[0].strip(), nvcc=str(nvcc))
    for library in nvrtc_libraries():
        try:
            nvrtc = ctypes.CDLL(library)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return Compiler("NVRTC", f"{major.value}.{minor.value}", library=library)
    raise InputError(f"no compiler for {TARGET}; looked for {LOOKED_FOR}")


def nvrtc_libraries() -> list[str]:
    """Where NVRTC may be, those of torch's packages first."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else None
    found = [file for root in roots or () for file in Path(root).rglob("libnvrtc.so.*")]
    return [*map(str, sorted(found)), "libnvrtc.so.13", "libnvrtc.so.12"]


def cubin(kernel: Kernel) -> bytes:
    """The kernel for sm_90, as CUDA's driver loads it. It is kept in the user's cache."""
    compiler = find()
    parts = [file.read_bytes() for file in sources(kernel.source)] + [repr(kernel.sizes).encode()]
    parts += [repr((compiler.name, compiler.version, NVCC, NVRTC)).encode()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = root / "qwen35" / "hip" / f"{kernel.source.stem}-{digest[:32]}.cubin"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        make = _by_nvcc if compiler.name == "nvcc" else _by_nvrtc
        with whole(file) as part:
            part.write_bytes(make(compiler, kernel))
    return file.read_bytes()


def _defines(kernel: Kernel) -> list[str]:
    return [f"-D{name}={size}" for name, size in kernel.sizes]


def _by_nvcc(compiler: Compiler, kernel: Kernel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.cubin"
        command = [compiler.nvcc, *NVCC, *_defines(kernel), str(kernel.source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"nvcc: {_worst(done.stderr or done.stdout)}")
        return out.read_bytes()


def _by_nvrtc(compiler: Compiler, kernel: Kernel) -> bytes:
    for builtins in Path(compiler.library).parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC opens it by its name alone
    nvrtc = ctypes.CDLL(compiler.library)

    def call(name: str, *arguments: Any) -> None:
        status = getattr(nvrtc, name)(*arguments)
        if status:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise InputError(f"NVRTC: {name}: {nvrtc.nvrtcGetErrorString(status).decode()}")

    def result(kind: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{kind}", program, content)
        return content.raw

    program = ctypes.c_void_p()
    source, *headers = sources(kernel.source)
    several = ctypes.c_char_p * len(headers)
    call(
        "nvrtcCreateProgram", ctypes.byref(program), ctypes.c_char_p(source.read_bytes()),
        ctypes.c_char_p(source.name.encode()), ctypes.c_int(len(headers)),
        several(*(header.read_bytes() for header in headers)),
        several(*(header.name.encode() for header in headers)),
    )  # fmt: skip
    options = [option.encode() for option in (*NVRTC, *_defines(kernel))]
    given = (ctypes.c_char_p * len(options))(*options)
    if nvrtc.nvrtcCompileProgram(program, ctypes.c_int(len(options)), given):
        log = result("ProgramLog").rstrip(b"\0").decode(errors="replace")
        raise InputError(f"NVRTC: {_worst(log)}")
    made = result("CUBIN")
    call("nvrtcDestroyProgram", ctypes.byref(program))
    return made


def _worst(log: str) -> str:
    lines = log.splitlines() or ["no message"]
    return next((line for line in lines if ": error" in line), lines[0]).strip()


class Driver(Runtime):
    """CUDA's driver API. library: libcuda as ctypes loads it."""

    architecture = TARGET
    load_data, get_function = "cuModuleLoadData", "cuModuleGetFunction"
    occupancy = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
    launch_kernel = "cuLaunchKernel"

    def text(self, status: int) -> str:
        message = ctypes.c_char_p()
        self.library.cuGetErrorString(ctypes.c_int(status), ctypes.byref(message))
        return (message.value or b"no message").decode()


@dataclass(frozen=True)
class Loaded:
    """A kernel on a card. lds: bytes of shared memory of a workgroup. stuck: the address of the
    header's `port_stuck` on the card."""

    function: ctypes.c_void_p
    lds: int
    stuck: int


@cache
def driver() -> Driver:
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise InputError(f"an NVIDIA card needs its driver: {error}") from None


@cache
def load(kernel: Kernel, device: int) -> Loaded:
    """A kernel on a device, which must be the current one."""
    api = driver()
    module = api.module(kernel, cubin(kernel))
    function = api.function(kernel, module)

    def address(of: str) -> int:
        where, name = ctypes.c_uint64(), ctypes.c_char_p(of.encode())
        api.call(kernel.name, "cuModuleGetGlobal_v2", ctypes.byref(where), None, module, name)
        return where.value

    lds = int.from_bytes(_read(kernel.name, address(f"{kernel.name}_lds"), 4), "little")
    attribute = ctypes.c_int(MAX_DYNAMIC_SHARED), ctypes.c_int(lds)
    api.call(kernel.name, "cuFuncSetAttribute", function, *attribute)
    return Loaded(function, lds, address("port_stuck"))


def _read(what: str, where: int, size: int) -> bytes:
    """Bytes of the card's memory, after all that has been launched."""
    data = ctypes.create_string_buffer(size)
    given = data, ctypes.c_uint64(where), ctypes.c_size_t(size)
    driver().call(what, "cuMemcpyDtoH_v2", *given)
    return data.raw


@dataclass(frozen=True)
class PortLaunch(HipLaunch):
    """A HIP kernel's launch on an NVIDIA card."""

    @property
    def threads(self) -> int:
        return LANES * WAVES

    @property
    def device(self) -> torch.device:
        return next(x.device for x in self.arguments.values() if isinstance(x, Tensor))

    def __call__(self) -> None:
        where = self.device
        if (target := target_of(where)) != TARGET:
            raise InputError(f"{self.name}: built for {TARGET}; this is {target}")
        with torch.cuda.device(where):
            loaded = self._loaded()
            if self.together:
                units = torch.cuda.get_device_properties(where).multi_processor_count
                driver().check_together(self, loaded.function, units, loaded.lds)
            stream = torch.cuda.current_stream().cuda_stream
            driver().launch(self, loaded.function, stream, loaded.lds)

    def given_up(self) -> str:
        """Wait for all launches. Returns "", or a line on the first wait of the experts' launches that a
        lane has given up since the last call, with the number of lanes that have given up."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            where = self._loaded().stuck
            words = [int.from_bytes(_read(self.name, where + 8 * i, 8), "little") for i in range(4)]
            zeros, size = ctypes.create_string_buffer(32), ctypes.c_size_t(32)
            driver().call(self.name, "cuMemcpyHtoD_v2", ctypes.c_uint64(where), zeros, size)
        lanes, counter, number, workgroup = words
        if not lanes:
            return ""
        line = (counter - self.arguments["counters"].data_ptr()) // 128
        kind = f"arrived {line}" if line < MAX_PAIRS else f"stored {line - MAX_PAIRS}"
        return f"{lanes} lanes gave up; one of workgroup {workgroup} at {kind}, which was {number}"

    def _loaded(self) -> Loaded:
        return load(self.kernel, torch.cuda.current_device())


def ported(launch: HipLaunch, source: Path | None = None, **sizes: int) -> PortLaunch:
    """The launch for an NVIDIA card. InputError for more pairs of a row and a slot than the port takes.

    source: a changed copy of the kernel's source, with copies of the headers beside it.
    sizes: more preprocessor definitions.
    """
    grid = launch.grid
    if launch.kernel.name == "router":  # of which a workgroup has one tile
        columns = dict(launch.kernel.sizes)["COLUMNS"]
        grid = -(-columns // TILE), *grid[1:]
    else:
        check_pairs(launch.name, launch.arguments["experts"].numel())
    kernel = replace(
        launch.kernel,
        source=source or launch.kernel.source,
        sizes=(*launch.kernel.sizes, *sizes.items()),
    )
    return PortLaunch(
        **{field.name: getattr(launch, field.name) for field in fields(launch)}
        | {"kernel": kernel, "grid": grid, "options": {"num_warps": WAVES}}
    )


def check_pairs(what: str, pairs: int) -> None:
    """InputError for more pairs of a row and a slot than the port of moe.hip takes."""
    if pairs > MAX_PAIRS:
        raise InputError(f"{what}: {pairs} pairs of a row and a slot; the port takes {MAX_PAIRS}")
