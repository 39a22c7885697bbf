"""The HIP kernels built for an NVIDIA card: the build, and on a card the launch."""

import argparse
import copy
import ctypes
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fast import moe_hip, router_hip
from fast.hip import HipLaunch, packed
from fast.hip_compiler import Kernel, sources
from fast.launch import Scratch
from fast.moe import Experts
from qwen35.cli import Parser
from qwen35.errors import InputError
from tests.fast.test_router_hip import router
from tests.support.fast_cases import (
    CPU,
    Case,
    expected,
    launches_of,
    poison,
    random,
    routing,
    slow_experts,
    too_far,
)
from tests.support.hip_cases import hip_case
from tools import cuda_port
from tools.bench import gpu, hip_port, mixture, port_router
from tools.bench.port_faults import Fault, plant
from tools.bench.router import Sizes
from tools.cuda_port import Compiler, Driver, ported
from tools.gfx950.target import emulate

on_card = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="there is no sm_90 card",
)
KINDS = ("random", "same", "different", "overlapping", "twice", "ends", "returning")


def hip_launch(chosen: Case) -> HipLaunch:
    (launch,), _ = launches_of(chosen)
    assert isinstance(launch, HipLaunch)
    return launch


def experts_case() -> Case:
    return hip_case(routing("random", 2, 3, 24))


def router_launch(rows: int = 3, top_k: int = 5) -> HipLaunch:
    """Of 57 columns, two parts along 1,152 columns of x."""
    x = random(1, rows, 1152).bfloat16()
    launch, _ = router(top_k=top_k).launch(x, Scratch(CPU))
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


@pytest.mark.parametrize("name", ["moe", "router"])
def test_the_kernel_is_built_once(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, name: str):
    launch = router_launch() if name == "router" else hip_launch(experts_case())
    kernel = ported(launch).kernel
    made = cuda_port.cubin(kernel)
    assert made.startswith(b"\x7fELF") and f"{name}_lds".encode() in made and b"port_stuck" in made
    monkeypatch.setattr(cuda_port, "_by_nvcc", None)
    monkeypatch.setattr(cuda_port, "_by_nvrtc", None)
    assert cuda_port.cubin(kernel) == made


def test_an_error_of_the_compiler_is_one_line(compiler: Compiler, tmp_path: Path):
    launch = hip_launch(experts_case())
    fault = Fault("", (("wait_for(const u64*", "wait_fur(const u64*"),))
    source = plant(fault, moe_hip.SOURCE, tmp_path)
    message = refused(lambda: cuda_port.cubin(ported(launch, source).kernel))
    assert message.startswith(f"{compiler.name}: ") and '"wait_for" is undefined' in message


def test_without_a_compiler_it_is_told_which_were_looked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(cuda_port, "nvrtc_libraries", list)
    assert refused(cuda_port.find.__wrapped__) == (
        "no compiler for sm_90; looked for nvcc (in $CUDA_HOME/bin, PATH), libnvrtc (of torch's packages)"
    )


FAULTS = [(fault, moe_hip.SOURCE) for fault in hip_port.FAULTS]
FAULTS += [(fault, router_hip.SOURCE) for fault in port_router.FAULTS]


@pytest.mark.parametrize(("fault", "kernel"), FAULTS, ids=lambda one: one.name)
def test_a_fault_fits_in_the_source(fault: Fault, kernel: Path, tmp_path: Path):
    planted = sources(plant(fault, kernel, tmp_path))
    own = [kernel.with_name(file.name).read_text() for file in planted]
    assert (own == [file.read_text() for file in planted]) == (not fault.edits)


def test_more_pairs_than_a_wave_of_32_lanes_finds_are_refused():
    launch = hip_launch(hip_case(routing("same", 8, 10, 24)))
    assert refused(lambda: ported(launch)) == (
        "experts D=256 I=128: 80 pairs of a row and a slot; the port takes 64"
    )
    assert ported(router_launch(rows=8, top_k=10)).arguments["experts"].numel() == 80


def test_the_benchmark_refuses_more_pairs_before_it_looks_for_a_card():
    parser = Parser("hip_port", "")
    hip_port.add_arguments(parser)
    args = parser.parse_args(["--rows", "8", "--top-k", "10"])
    assert refused(lambda: hip_port.main(args)) == (
        "--rows 8 --top-k 10: 80 pairs of a row and a slot; the port takes 64"
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
    launch = ported(hip_launch(experts_case()))
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


def test_the_routers_launch():
    """A workgroup of 17 waves of 32 lanes has 8 of its 57 columns. The grid need not run at once."""
    given = router_launch()
    launch = ported(given)
    assert (given.grid, given.threads) == ((4, 2, 1), 576)
    assert (launch.grid, launch.threads, launch.together) == ((8, 2, 1), 544, False)
    x, squares, weight, sums, counter, experts, weights, rows, parts, eps = packed(launch.arguments)
    assert (squares.value, rows.value, parts.value, eps.value) == (None, 3, 0, 1.0)
    for pointer, name in (
        (x, "x"), (weight, "weight"), (sums, "sums"), (counter, "counter"), (experts, "experts"),
        (weights, "weights"),
    ):  # fmt: skip
        assert pointer.value == given.arguments[name].data_ptr()
    assert [given.arguments[name].shape for name in ("sums", "experts")] == [(2, 3, 57), (3, 5)]


# ---- the router's checks, with the emulator of gfx950 in place of a card


class Emulated(HipLaunch):
    def __call__(self) -> None:
        emulate([self])


@pytest.fixture
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    def instead(launch: HipLaunch, source: Path | None = None) -> Emulated:
        values = {field.name: getattr(launch, field.name) for field in fields(launch)}
        kernel = replace(launch.kernel, source=source or launch.kernel.source)
        return Emulated(**values | {"kernel": kernel})

    monkeypatch.setattr(port_router, "ported", instead)
    monkeypatch.setattr(port_router, "ended", lambda name: None)


@pytest.mark.usefixtures("on_the_emulator")
def test_the_routers_checks_pass_what_is_right_and_find_planted_faults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    args = argparse.Namespace(rows=2, launches=4, fault_launches=2)
    sizes, D = Sizes(11, 11, 3), 96
    assert not port_router.examine("router", sizes, D, args, generator)
    assert "times bfloat16's error, 19 launches, 0 findings" in capsys.readouterr().err
    names = "the count of the first launch alone", "a workgroup counted twice"
    some = tuple(fault for fault in port_router.FAULTS if fault.name in names)
    monkeypatch.setattr(port_router, "FAULTS", some)
    found = [lines for _, lines in port_router.faults(sizes, D, args, generator)]
    assert [lines[0].split(":")[0] for lines in found] == ["bits", "counter"]


class NoGraph:
    """As many microseconds as there are calls, which are not made."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def microseconds(self, repeats: int) -> list[float]:
        return [float(len(self.calls))] * repeats


def test_the_routers_times(monkeypatch: pytest.MonkeyPatch):
    """Sixteen copies of 8 + 1 + 2 * 128 rows of 128 columns."""
    monkeypatch.setattr(mixture, "HIDDEN", 128)
    monkeypatch.setattr(mixture, "INTERMEDIATE", 128)
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 1024)
    monkeypatch.setattr(gpu, "Graph", NoGraph)
    args = argparse.Namespace(rows=2, experts=8, top_k=2, repeats=3)
    rows = port_router.timed(1, args, CPU, 1000.0, torch.Generator().manual_seed(0))
    assert [row["name"] for row in rows] == [port_router.TRITON, port_router.PORT]
    assert all(row["us"] == 16 for row in rows)
    assert rows[0]["floor_us"] == pytest.approx(265 * 128 * 2 / 1000 * 1e-3)


@pytest.mark.parametrize("finding", [[], ["router: wrong"]])
def test_the_benchmarks_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finding: list[str]
):
    """All sizes of both kernels are examined. Faults are planted, and times taken, where nothing was
    found."""
    examined: list[str] = []

    def examine(name: str, *_: Any) -> list[str]:
        examined.append(name)
        return finding if name == "router, TP 8" else []

    none, some = Fault("no fault", ()), Fault("router, some fault", (("a", "b"),))
    subject = argparse.Namespace(packed=None, launched=1)
    for module, name, value in (
        (gpu, "find", (CPU, "sm_90")), (gpu, "read_gb_s", 1.0),
        (cuda_port, "find", Compiler("nvcc", "13")), (mixture, "random_weights", None),
        (hip_port, "Subject", subject), (hip_port, "various", []),
        (hip_port, "check", (0.5, [])), (hip_port, "endure", []), (hip_port, "captured", []),
        (hip_port, "faults", [(none, [])]), (port_router, "faults", [(some, ["bits: 7"])]),
        (hip_port, "timed", [{"name": "experts"}]), (port_router, "timed", [{"name": "router"}]),
        (torch.cuda, "get_device_name", "a card"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(port_router, "examine", examine)
    parser = Parser("hip_port", "")
    parser.add_argument("--json", action="store_true")
    hip_port.add_arguments(parser)
    status = hip_port.main(parser.parse_args(["--tp", "8", "4", "--json"]))
    out, err = capsys.readouterr()
    assert len(examined) == len(port_router.OTHERS) + 2 and status == len(finding)
    assert ("router: wrong\n" in err) == bool(finding)
    rows = [row["name"] for row in json.loads(out)["rows"]]
    timed = ["experts", "router"] * (2 - len(finding))
    assert rows == [*timed, "planted: no fault", "planted: router, some fault"]


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
@pytest.mark.parametrize(("sizes", "D"), port_router.OTHERS)
def test_the_router(sizes: Sizes, D: int):
    args = argparse.Namespace(rows=8, launches=300)
    generator = torch.Generator("cuda").manual_seed(0)
    assert not port_router.examine("router", sizes, D, args, generator)


@on_card
def test_a_grid_that_the_card_does_not_run_at_once_is_refused():
    message = refused(lambda: on_a_card(hip_case(routing("random", 2, 3, 24), workgroups=4096)))
    assert message.startswith("experts D=256 I=128: 4096 workgroups wait for each other; this card")
