"""The HIP kernel of the routed experts built for an NVIDIA card: the build, and on a card the launch."""

import copy
import ctypes
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fast import moe_hip
from fast.hip import HipLaunch
from fast.hip_compiler import Kernel, sources
from fast.launch import Scratch
from fast.moe import Experts
from qwen35.errors import InputError
from tests.support.fast_cases import (
    Case,
    expected,
    launches_of,
    poison,
    routing,
    slow_experts,
    too_far,
)
from tests.support.hip_cases import hip_case
from tools import cuda_port
from tools.bench import hip_port
from tools.cuda_port import Compiler, Driver, ported

on_card = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="there is no sm_90 card",
)
KINDS = ("random", "same", "different", "overlapping", "twice", "ends", "returning")


def hip_launch(chosen: Case) -> HipLaunch:
    (launch,), _ = launches_of(chosen)
    assert isinstance(launch, HipLaunch)
    return launch


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the build


def compilers() -> list[Compiler]:
    """All that this machine has."""
    found: list[Compiler] = []
    if nvcc := shutil.which("nvcc"):
        found.append(Compiler("nvcc", "", nvcc=nvcc))
    for library in cuda_port.nvrtc_libraries():
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return [*found, Compiler("NVRTC", "", library=library)]
    return found


@pytest.fixture(params=["nvcc", "NVRTC"])
def compiler(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Compiler:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = {one.name: one for one in compilers()}.get(request.param)
    if found is None:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setattr(cuda_port, "find", lambda: found)
    return found


def test_the_kernel_is_built_once(compiler: Compiler, monkeypatch: pytest.MonkeyPatch):
    kernel = ported(hip_launch(hip_case(routing("random", 2, 3, 24)))).kernel
    made = cuda_port.cubin(kernel)
    assert made.startswith(b"\x7fELF") and b"moe_lds" in made and b"port_stuck" in made
    monkeypatch.setattr(cuda_port, "_by_nvcc", None)
    monkeypatch.setattr(cuda_port, "_by_nvrtc", None)
    assert cuda_port.cubin(kernel) == made


def test_an_error_of_the_compiler_is_one_line(compiler: Compiler, tmp_path: Path):
    launch = hip_launch(hip_case(routing("random", 2, 3, 24)))
    source = hip_port.plant(
        hip_port.Fault("", (("wait_for(const u64*", "wait_fur(const u64*"),)), tmp_path
    )
    message = refused(lambda: cuda_port.cubin(ported(launch, source).kernel))
    assert message.startswith(f"{compiler.name}: ") and '"wait_for" is undefined' in message


def test_without_a_compiler_it_is_told_which_were_looked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(cuda_port, "nvrtc_libraries", list)
    assert refused(cuda_port.find.__wrapped__) == (
        "no compiler for sm_90; looked for nvcc (in $CUDA_HOME/bin, PATH), libnvrtc (of torch's packages)"
    )


@pytest.mark.parametrize("fault", hip_port.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_in_the_source(fault: hip_port.Fault, tmp_path: Path):
    planted = sources(hip_port.plant(fault, tmp_path))
    own = [moe_hip.SOURCE.with_name(file.name).read_text() for file in planted]
    assert (own == [file.read_text() for file in planted]) == (not fault.edits)


def test_more_pairs_than_a_wave_of_32_lanes_finds_are_refused():
    launch = hip_launch(hip_case(routing("same", 8, 10, 24)))
    assert refused(lambda: ported(launch)) == (
        "experts D=256 I=128: 80 pairs of a row and a slot; the port takes 64"
    )


# ---- the launch


class StandIn:
    """CUDA's driver as far as it is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def cuModuleLoadData(self, module: Any, image: Any) -> int:
        assert type(image) is ctypes.c_char_p
        module._obj.value = 0x1000
        return 209

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(
        self, count: Any, function: Any, threads: Any, lds: Any
    ) -> int:
        assert (function.value, threads.value, lds.value) == (0x2000, 544, 50_000)
        count._obj.value = 1
        return 0

    def cuLaunchKernel(self, function: Any, *arguments: Any) -> int:
        *sizes, stream, parameters, extra = arguments
        assert [size.value for size in sizes] == [6, 1, 1, 544, 1, 1, 50_000]
        assert function.value == 0x2000 and stream.value == 7 and extra is None
        assert len(parameters) == 24
        return 1

    def cuGetErrorString(self, status: Any, message: Any) -> int:
        message._obj.value = {209: b"no kernel image"}.get(status.value, b"some other error")
        return 0


def test_each_call_of_cudas_driver():
    launch = ported(hip_launch(hip_case(routing("random", 2, 3, 24))))
    driver, function = Driver(StandIn()), ctypes.c_void_p(0x2000)
    assert refused(lambda: driver.load(Kernel(Path(), "moe", ()), b"\x7fELF")) == (
        "moe: the code object is for sm_90, not for this card (no kernel image)"
    )
    driver.check_together(launch, function, 6, 50_000)
    assert refused(lambda: driver.check_together(launch, function, 5, 50_000)) == (
        "experts D=256 I=128: 6 workgroups wait for each other; this card runs 5 of them at once"
    )
    assert refused(lambda: driver.launch(launch, function, 7, 50_000)) == (
        "experts D=256 I=128: cuLaunchKernel returned 1 (some other error)"
    )


# ---- on a card


def on_a_card(chosen: Case, scratch: Scratch | None = None, **changed: Any) -> Tensor:
    """The output on a card. AssertionError if a wait was given up."""
    card = torch.device("cuda")
    slow = copy.deepcopy(slow_experts(chosen.E, chosen.D, chosen.I)).to(card)
    packed = Experts.from_reference(slow, "gfx950", "hip")
    moved = replace(
        chosen,
        **{
            field.name: getattr(chosen, field.name).to(card)
            for field in fields(chosen)
            if isinstance(getattr(chosen, field.name), Tensor)
        },
    )
    value, out = moe_hip.launch(
        packed, moved.x, moved.experts.int(), moved.weights, scratch or Scratch(card),
        workgroups=moved.workgroups, residual=moved.residual,
    )  # fmt: skip
    launch = ported(value, **changed)
    poison([launch])
    launch()
    assert not (stuck := launch.given_up()), stuck
    return out.cpu()


@on_card
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_whatever_the_rows_choose(kind: str):
    chosen = hip_case(routing(kind, 5, 3, 24), residual=True)
    assert not too_far(on_a_card(chosen), *expected(chosen))


@on_card
@pytest.mark.parametrize(
    ("D", "I"),
    [(256, 256), (256, 512), (256, 1024), (384, 128), (640, 384), (256, 96), (4096, 256)],
)
def test_sizes(D: int, I: int):
    chosen = hip_case(routing("overlapping", 2, 2, 3), E=3, D=D, I=I)
    assert not too_far(on_a_card(chosen), *expected(chosen))


@on_card
@pytest.mark.parametrize("workgroups", [1, 2, 7, 40, 132])
def test_a_grid_of_any_size_gives_equal_bits(workgroups: int):
    ids = routing("returning", 4, 3, 24)
    chosen = hip_case(ids, workgroups=workgroups, residual=True, cancelling=True)
    plain = hip_case(ids, residual=True, cancelling=True)
    assert torch.equal(on_a_card(chosen), on_a_card(plain))


@on_card
def test_a_grid_that_the_card_does_not_run_at_once_is_refused():
    message = refused(lambda: on_a_card(hip_case(routing("random", 2, 3, 24), workgroups=4096)))
    assert message.startswith("experts D=256 I=128: 4096 workgroups wait for each other; this card")
