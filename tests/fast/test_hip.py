"""HIP launches: how their compiler is found, and each call of the runtime, against a stand-in for it."""

import ctypes
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fast import hip, hip_compiler
from fast.hip import HipLaunch, Runtime
from fast.hip_compiler import Kernel
from qwen35.errors import InputError
from tools.gfx950.target import compile_launch, emulate

SOURCE = """
extern "C" __attribute__((global))
void scale(const float* x, const float* y, float* out, int n, float by) {
  int i = __builtin_amdgcn_workgroup_id_x() * 64 + __builtin_amdgcn_workitem_id_x();
  if (i < n) out[i] = by * x[i] + (y ? y[i] : TERM);
}
"""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A small kernel; the compiler's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "scale.hip"
    source.write_text(SOURCE)
    return Kernel(source, "scale", (("TERM", 3),))


def launch_of(kernel: Kernel, **more: Any) -> HipLaunch:
    n = 100
    arguments = {
        "x": torch.arange(n, dtype=torch.float32), "y": None, "out": torch.zeros(n), "n": n, "by": 0.5,
    }  # fmt: skip
    return HipLaunch("scale", kernel, (2, 1, 1), arguments, {"num_warps": 1}, **more)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the compiler


def test_a_launch_is_compiled_and_emulated(kernel: Kernel):
    """A null pointer is one for the kernel too."""
    launch = launch_of(kernel)
    done = emulate([launch])
    assert torch.equal(launch.arguments["out"], torch.arange(100) * 0.5 + 3)
    assert done.bytes_written == 400
    launch.arguments["y"] = torch.full((100,), 7.0)
    emulate([launch], seed=1)
    assert torch.equal(launch.arguments["out"], torch.arange(100) * 0.5 + 7)
    message = "scale: a HIP kernel for gfx950; this is sm_90"
    assert refused(lambda: compile_launch(launch, "sm_90")) == message


def test_the_code_object_is_one_for_gfx950(kernel: Kernel):
    code = hip_compiler.code_object(kernel)
    machine, flags = struct.unpack_from("<H", code, 18)[0], struct.unpack_from("<I", code, 48)[0]
    assert (
        code[:4] == b"\x7fELF" and machine == 224 and flags & 0xFF == 0x4F
    )  # EF_AMDGPU_MACH_GFX950
    assert b"scale.kd" in code


def test_what_was_compiled_is_kept(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    """The file's name depends on the source, the sizes and the compiler's version. A file that is
    there is not made again."""
    text, code = hip_compiler.assembly(kernel), hip_compiler.code_object(kernel)
    compiler = hip_compiler.find()
    kept = {suffix: hip_compiler.cached(compiler, kernel, suffix) for suffix in ("s", "hsaco")}
    assert kept["s"].read_text() == text and kept["hsaco"].read_bytes() == code
    assert sorted(kept["s"].parent.iterdir()) == sorted(kept.values())
    with monkeypatch.context() as patch:
        patch.setattr(hip_compiler, "_compile", lambda *_: pytest.fail("compiled again"))
        assert hip_compiler.assembly(kernel) == text
    others = [replace(kernel, sizes=(("TERM", 4),))]
    names = {hip_compiler.cached(compiler, one, "s") for one in (kernel, *others)}
    kernel.source.write_text(SOURCE.replace("by * x", "x"))
    names.add(hip_compiler.cached(compiler, kernel, "s"))
    with monkeypatch.context() as patch:
        patch.setattr(hip_compiler, "version", lambda _: "clang version 99")
        names.add(hip_compiler.cached(compiler, kernel, "s"))
    assert len(names) == 4
    assert hip_compiler.assembly(others[0]) != text


def test_what_a_source_includes_is_a_part_of_it(kernel: Kernel):
    """This holds for what its header includes, too. If a header changes, the kernel is compiled
    anew."""
    kernel.source.write_text(f'#include "by.h"\n{SOURCE}'.replace("by *", "BY *"))
    by, inner = (kernel.source.with_name(name) for name in ("by.h", "inner.h"))
    by.write_text('#pragma once\n#include "inner.h"\n#include "by.h"\n')
    compiler, texts, names = hip_compiler.find(), set(), set()
    for factor in ("by", "2 * by"):
        inner.write_text(f"#define BY {factor}\n")
        texts.add(hip_compiler.assembly(kernel))
        names.add(hip_compiler.cached(compiler, kernel, "s"))
    assert hip_compiler.sources(kernel.source) == [kernel.source, by, inner]
    assert len(texts) == len(names) == 2
    inner.unlink()
    message = f"by.h includes inner.h, and {inner} is missing"
    assert refused(lambda: hip_compiler.assembly(kernel)) == message


def test_an_error_of_the_compiler_is_one_line_with_the_files(kernel: Kernel):
    kernel.source.write_text(SOURCE.replace("by * x", "by * z"))
    message = refused(lambda: hip_compiler.assembly(kernel))
    assert re.search(r"scale\.hip:5:\d+: error: use of undeclared identifier 'z'", message)
    cached = hip_compiler.cached(hip_compiler.find(), kernel, "s")
    assert list(cached.parent.iterdir()) == []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The compiler that is found on a machine with these programs and packages."""

    def found(*programs: str, package: bool = False) -> str:
        root = tmp_path / "-".join(["machine", *programs])
        for program in programs:
            file = root / program
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("#!/bin/sh\n")
            file.chmod(0o755)
        monkeypatch.setenv("ROCM_PATH", str(root / "rocm"))
        monkeypatch.setenv("PATH", str(root / "bin"))
        spec = object() if package else None
        monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
        compiler = hip_compiler.find.__wrapped__()
        return " ".join((compiler.name, *compiler.clang)).replace(str(root), "")

    return found


@pytest.mark.skipif(Path("/opt/rocm/bin/hipcc").exists(), reason="ROCm is found first")
def test_which_compiler_is_taken(machine: Callable[..., str]):
    everything = "rocm/bin/hipcc", "bin/hipcc", "bin/clang-22", "bin/ld.lld-22"
    assert machine(*everything, package=True) == "hipcc /rocm/bin/hipcc"
    assert machine(*everything[1:], package=True) == "hipcc /bin/hipcc"
    assert machine(*everything[2:], package=True) == "clang-22 /bin/clang-22"
    assert machine("bin/clang-22", package=True) == f"ziglang {sys.executable} -m ziglang clang"
    assert refused(lambda: machine("bin/clang-22")) == (
        "no compiler for HIP; looked for hipcc (in $ROCM_PATH/bin, /opt/rocm/bin, PATH), clang-22 with "
        "lld-22, package ziglang (pip install -e '.[hip]')"
    )


def test_hipcc_gets_the_source_as_it_is(kernel: Kernel, tmp_path: Path):
    """hipcc gets ROCm's headers and libraries, and makes a code object that is no bundle of
    several."""
    calls = tmp_path / "calls"
    script = tmp_path / "hipcc"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\nwhile [ "$1" != -o ]; do shift; done; echo made > "$2"\n'
    )
    script.chmod(0o755)
    compiler = hip_compiler.Compiler("hipcc", (str(script),), ())
    for suffix in ("s", "hsaco"):
        made = hip_compiler._compile(compiler, kernel, suffix, tmp_path)
        assert made == b"made\n"
    text, linked = calls.read_text().splitlines()
    flags = "-x hip --offload-arch=gfx950 --cuda-device-only -O3 -std=c++17 -fuse-cuid=none"
    shared = f"{flags} -DTERM=3 {kernel.source} "
    assert text == f"{shared}-S -o {tmp_path}/kernel.s"
    assert linked == f"{shared}--no-gpu-bundle-output -o {tmp_path}/kernel.hsaco"


@pytest.mark.parametrize("name", ["moe", "router"])
def test_the_sources_compile_with_hips_headers(name: str, tmp_path: Path):
    """hipcc includes these headers. Those that Triton's package carries stand in for ROCm's."""
    triton = pytest.importorskip("triton")
    include = Path(triton.__file__).parent / "backends" / "amd" / "include"
    compiler = hip_compiler.find()
    if compiler.name != "clang-22" or not (include / "hip" / "hip_runtime.h").exists():
        pytest.skip("hipcc has its own headers, ziglang not those that clang puts before HIP's")
    version = tmp_path / "share" / "hip" / "version"
    version.parent.mkdir(parents=True)
    version.write_text("HIP_VERSION_MAJOR=7\nHIP_VERSION_MINOR=1\nHIP_VERSION_PATCH=0\n")
    (tmp_path / "include").symlink_to(include)
    source = Path(hip.__file__).parent / "kernels" / f"{name}.hip"
    command = (
        *compiler.clang,
        *hip_compiler.FLAGS,
        "-nogpulib",
        f"--rocm-path={tmp_path}",
        "-Wall",
    )
    done = subprocess.run(
        (*command, str(source), "-S", "-o", str(tmp_path / "k.s")), capture_output=True, text=True
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


# ---- the runtime


class StandIn:
    """HIP's module API as far as it is called, for a card on which one kernel is loaded."""

    def __init__(self, fitting: int = 1, status: int = 0) -> None:
        self.fitting, self.status = fitting, status
        self.calls: list[str] = []
        self.launched: list[Any] = []

    def hipModuleLoadData(self, module: Any, image: Any) -> int:
        self.calls.append("load")
        assert type(image) is ctypes.c_char_p
        assert ctypes.string_at(image, 4) == b"\x7fELF"
        module._obj.value = 0x1000
        return self.status

    def hipModuleGetFunction(self, function: Any, module: Any, name: Any) -> int:
        self.calls.append("function")
        assert module.value == 0x1000 and name.value == b"scale"
        function._obj.value = 0x2000
        return 0

    def hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(
        self, count: Any, function: Any, threads: Any, lds: Any
    ) -> int:
        self.calls.append("occupancy")
        assert function.value == 0x2000 and threads.value == 64 and lds.value == 0
        assert type(threads) is ctypes.c_int and type(lds) is ctypes.c_size_t
        count._obj.value = self.fitting
        return 0

    def hipModuleLaunchKernel(self, function: Any, *arguments: Any) -> int:
        self.calls.append("launch")
        *sizes, stream, parameters, extra = arguments
        assert function.value == 0x2000 and extra is None
        assert all(type(size) is ctypes.c_uint for size in sizes)
        assert type(stream) is ctypes.c_void_p
        self.launched = [[size.value for size in sizes], stream.value, self.read(parameters)]
        return self.status

    def read(self, parameters: Any) -> list[int | float | None]:
        """Read the arguments as the kernel does: three pointers, an int and a float, each at its
        pointer."""
        kinds = (ctypes.c_void_p,) * 3 + (ctypes.c_int32, ctypes.c_float)
        assert len(parameters) == len(kinds)
        return [
            ctypes.cast(place, ctypes.POINTER(kind))[0]
            for place, kind in zip(parameters, kinds, strict=True)
        ]

    class hipGetErrorString:  # noqa: N801
        restype: Any = None

        def __new__(cls, status: Any) -> Any:
            assert cls.restype is ctypes.c_char_p and type(status) is ctypes.c_int
            return {209: b"no kernel image"}.get(status.value, b"some other error")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A machine with torch for ROCm, a gfx950 of two compute units, and the stand-in as its runtime."""
    library = StandIn()
    monkeypatch.setattr(hip, "runtime", lambda: Runtime(library))
    monkeypatch.setattr(hip, "target_of", lambda device: "gfx950")
    hip._function.cache_clear()
    hip._checked.clear()

    class Device:
        def __init__(self, device: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    class Properties:
        multi_processor_count = 2

    class Stream:
        cuda_stream = 0x3000

    for name, value in (
        ("device", Device), ("current_device", lambda: 0),
        ("get_device_properties", lambda index: Properties), ("current_stream", Stream),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    yield library
    hip._function.cache_clear()
    hip._checked.clear()


def test_every_call_of_a_launch(kernel: Kernel, card: StandIn):
    """The code object is loaded once, and the grid checked once."""
    launch = launch_of(kernel, together=True)
    launch()
    x, out = (launch.arguments[name].data_ptr() for name in ("x", "out"))
    assert card.calls == ["load", "function", "occupancy", "launch"]
    assert card.launched == [[2, 1, 1, 64, 1, 1, 0], 0x3000, [x, None, out, 100, 0.5]]
    launch()
    assert card.calls[4:] == ["launch"]
    replace(launch, grid=(1, 1, 1))()
    assert card.calls[5:] == ["occupancy", "launch"]


def test_a_launch_whose_workgroups_are_independent_may_have_any_grid(kernel: Kernel, card: StandIn):
    card.fitting = 0
    replace(launch_of(kernel), grid=(1000, 1, 1))()
    assert card.calls == ["load", "function", "launch"]


def test_a_grid_that_does_not_run_at_once_is_refused(kernel: Kernel, card: StandIn):
    """Along any of its axes."""
    for grid in ((1, 3, 1), (1, 1, 3), (3, 1, 1)):
        launch = replace(launch_of(kernel, together=True), grid=grid)
        assert refused(launch) == (
            "scale: 3 workgroups wait for each other; this card runs 2 of them at once"
        )
    card.fitting = 2
    launch()
    assert card.calls[-1] == "launch"


def test_a_code_object_for_another_card_is_refused(kernel: Kernel, card: StandIn):
    card.status = 209
    assert refused(launch_of(kernel)) == (
        "scale: the code object is for gfx950, not for this card (no kernel image)"
    )


def test_another_error_of_the_runtime_is_named(kernel: Kernel, card: StandIn):
    card.status = 719
    message = "scale: hipModuleLoadData returned 719 (some other error)"
    assert refused(launch_of(kernel)) == message
    card.status = 0
    launch_of(kernel)()
    card.status = 719
    message = "scale: hipModuleLaunchKernel returned 719 (some other error)"
    assert refused(launch_of(kernel)) == message


def test_a_machine_without_the_card_is_refused(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    launch = launch_of(kernel)
    assert refused(launch) == "the fast path runs on gfx950 and sm_90; this is cpu"
    monkeypatch.setattr(hip, "target_of", lambda device: "sm_90")
    assert refused(launch) == "scale: a HIP kernel for gfx950; this is sm_90"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(f"{name}: no")))
    message = "HIP kernels need ROCm's runtime: libamdhip64.so: no"
    assert refused(hip.runtime.__wrapped__) == message


def test_an_argument_that_is_no_tensor_and_no_number_is_refused(kernel: Kernel):
    launch = launch_of(kernel)
    message = "scale: argument n is a bool; expected a tensor or a number"
    assert refused(lambda: replace(launch, arguments=launch.arguments | {"n": True})) == message
