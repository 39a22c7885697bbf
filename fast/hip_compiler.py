"""Builds HIP kernels for gfx950 on any machine, without a card, a driver or ROCm's headers.

The compiler is the first of these that is installed: ROCm's hipcc, Debian's clang-22 with lld-22, the
package ziglang (`pip install -e '.[hip]'`), which has the same clang. The results are kept in the user's
cache, under a hash of the source, the files that it includes, the sizes and the compiler's version.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qwen35.errors import InputError
from weights.storage import whole

ARCHITECTURE = "gfx950"
FLAGS = (
    "-x", "hip", f"--offload-arch={ARCHITECTURE}", "--cuda-device-only", "-O3", "-std=c++17",
    "-fuse-cuid=none",  # which would put a hash of the path into the text
)  # fmt: skip
WITHOUT_ROCM = ("-nogpuinc", "-nogpulib")
INCLUDED = re.compile(rb'^ *# *include *"(.+)"', re.MULTILINE)
LOOKED_FOR = "hipcc (in $ROCM_PATH/bin, /opt/rocm/bin, PATH), clang-22 with lld-22, package ziglang"


@dataclass(frozen=True)
class Kernel:
    """A kernel `name` of a HIP source file, with its sizes as preprocessor definitions."""

    source: Path
    name: str
    sizes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiler:
    """A compiler for HIP.

    name: the one in messages.
    clang: the command that compiles a HIP source.
    linker: the command that makes a code object of an object file, or () if clang does that itself.
    """

    name: str
    clang: tuple[str, ...]
    linker: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        return FLAGS if self.name == "hipcc" else (*FLAGS, *WITHOUT_ROCM)


@cache
def find() -> Compiler:
    """The compiler. InputError if none is installed."""
    root = Path(os.environ.get("ROCM_PATH", "/opt/rocm"))
    for hipcc in (root / "bin" / "hipcc", Path("/opt/rocm/bin/hipcc"), shutil.which("hipcc")):
        if hipcc and os.access(hipcc, os.X_OK):
            return Compiler("hipcc", (str(hipcc),), ())
    clang, linker = shutil.which("clang-22"), shutil.which("ld.lld-22")
    if clang and linker:
        return Compiler("clang-22", (clang,), (linker,))
    if importlib.util.find_spec("ziglang"):
        zig = sys.executable, "-m", "ziglang"
        return Compiler("ziglang", (*zig, "clang"), (*zig, "ld.lld"))
    raise InputError(f"no compiler for HIP; looked for {LOOKED_FOR} (pip install -e '.[hip]')")


@cache
def version(compiler: Compiler) -> str:
    """The first line that the compiler prints about its version."""
    return _run(compiler, (*compiler.clang, "--version")).splitlines()[0]


def assembly(kernel: Kernel) -> str:
    """The kernel's machine instructions as text. InputError if there is no compiler, or it fails."""
    return _built(find(), kernel, "s").read_text(encoding="utf-8")


def code_object(kernel: Kernel) -> bytes:
    """The kernel as HIP's module API loads it. InputError as in `assembly`."""
    return _built(find(), kernel, "hsaco").read_bytes()


def cached(compiler: Compiler, kernel: Kernel, suffix: str) -> Path:
    """The file of the cache for a kernel, which may not be there yet."""
    parts = [file.read_bytes() for file in sources(kernel.source)]
    parts += [
        repr(kernel.sizes).encode(),
        version(compiler).encode(),
        repr(compiler.flags).encode(),
    ]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "qwen35" / "hip" / f"{kernel.source.stem}-{digest[:32]}.{suffix}"


def sources(file: Path) -> list[Path]:
    """A source file and the files beside it that it includes, each once. InputError if one is missing."""
    found = [file]
    for one in found:  # which grows
        for name in INCLUDED.findall(one.read_bytes()):
            included = one.parent / name.decode()
            if not included.is_file():
                raise InputError(f"{one.name} includes {included.name}, and {included} is missing")
            if included not in found:
                found.append(included)
    return found


def _built(compiler: Compiler, kernel: Kernel, suffix: str) -> Path:
    """The file of the cache. The kernel is compiled if it is not there."""
    file = cached(compiler, kernel, suffix)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, whole(file) as part:
            part.write_bytes(_compile(compiler, kernel, suffix, Path(folder)))
    return file


def _compile(compiler: Compiler, kernel: Kernel, suffix: str, folder: Path) -> bytes:
    defines = tuple(f"-D{name}={size}" for name, size in kernel.sizes)
    compile_ = (*compiler.clang, *compiler.flags, *defines, str(kernel.source))
    text, linked = folder / "kernel.s", folder / "kernel.hsaco"
    if suffix == "s":
        _run(compiler, (*compile_, "-S", "-o", str(text)))
        return text.read_bytes()
    if not compiler.linker:
        _run(compiler, (*compile_, "--no-gpu-bundle-output", "-o", str(linked)))
        return linked.read_bytes()
    # The emulator executes this assembly, so the code object is made of it too.
    text, part = _built(compiler, kernel, "s"), folder / "kernel.o"
    target = "-target", "amdgcn-amd-amdhsa", f"-mcpu={ARCHITECTURE}"
    _run(compiler, (*compiler.clang, *target, "-x", "assembler", "-c", str(text), "-o", str(part)))
    _run(compiler, (*compiler.linker, "-shared", str(part), "-o", str(linked)))
    return linked.read_bytes()


def _run(compiler: Compiler, command: tuple[str, ...]) -> str:
    """Run a command of the compiler. Returns its standard output. InputError with its first error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines() or ["no message"]
        worst = next((line for line in lines if "error" in line), lines[0])
        raise InputError(f"{compiler.name}: {worst.strip()}")
    return done.stdout
