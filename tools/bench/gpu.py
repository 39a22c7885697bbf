"""Helpers of the GPU benchmarks: device, timing in a captured graph, and read bandwidth."""

import argparse
import ctypes
import statistics
from collections.abc import Callable, Sequence

import torch

from fast import hip, hip_compiler
from fast.target import target_of
from qwen35.paths import check_hip_card
from tools.bench import report
from tools.bench.report import Row

STREAMED = 8 << 30  # bytes that `read_gb_s` reads
WARMUP = 3  # calls before the first timed one


def find(moe_kernel: str = "triton") -> tuple[torch.device, str]:
    """The GPU and its target. InputError when there is none that the kernels run on.

    moe_kernel: "hip" also needs a compiler for HIP and ROCm's runtime, as in `qwen35.load.load`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if moe_kernel == "hip":
        check_hip_card(device)
        hip_compiler.find()
        hip.runtime()
    return device, target_of(device)


def cache_bytes(device: torch.device) -> int:
    """The size of the L2 cache, in bytes."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def read_gb_s(device: torch.device, repeats: int = 10) -> float:
    """The read bandwidth in GB/s: the median of `repeats` sums over 8 GiB."""
    data = torch.empty(STREAMED // 4, dtype=torch.float32, device=device).uniform_()
    seconds = [us * 1e-6 for us in events(lambda: data.sum(), repeats)]
    return data.nbytes / statistics.median(seconds) * 1e-9


class Graph:
    """A captured graph of `calls`, one after the other. launches: kernels, copies and fills per
    call (None if the driver does not tell)."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = list(calls)  # keeps the tensors that the graph reads and writes alive
        for call in self.calls:
            call()  # compiles the kernels and initialises libraries
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self.graph):
            for call in self.calls:
                call()
        nodes = _nodes(self.graph.raw_cuda_graph())
        self.launches = nodes and round(nodes / len(self.calls))

    def microseconds(self, repeats: int) -> list[float]:
        """The time of one call in microseconds, for each of `repeats` replays."""
        return [us / len(self.calls) for us in events(self.graph.replay, repeats)]


def _nodes(graph: int) -> int | None:
    """The number of nodes of a graph, or None if the driver does not tell."""
    library, name = "libcuda.so.1", "cuGraphGetNodes"
    if torch.version.hip:
        library, name = "libamdhip64.so", "hipGraphGetNodes"
    count = ctypes.c_size_t()
    try:
        status = getattr(ctypes.CDLL(library), name)(
            ctypes.c_void_p(graph), None, ctypes.byref(count)
        )
    except (OSError, AttributeError):
        return None
    return None if status else count.value


def events(call: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds between device events around each of `repeats` calls."""
    for _ in range(WARMUP):
        call()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken: list[float] = []
    for _ in range(repeats):
        started.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        taken.append(started.elapsed_time(ended) * 1e3)
    return taken


def figures(first: list[float], second: list[float], moved: float, read: float) -> Row:
    """The figures of one subject. first, second: microseconds in two passes. The lower bound
    `floor_us` is the time to read `moved` bytes at `read` GB/s."""
    us, floor = statistics.median(first), moved / read * 1e-3
    return {
        "us": us,
        "us_again": statistics.median(second),
        "min_us": min(first + second),
        "max_us": max(first + second),
        "floor_us": floor,
        "gb_s": moved / us * 1e-3,
        "share_of_read": floor / us,
    }


def emit(
    op: str,
    args: argparse.Namespace,
    target: str,
    device: torch.device,
    read: float,
    rows: list[Row],
    *options: str,
    **more: str,
) -> None:
    """Call `report.emit` with the GPU's name and its read bandwidth. options: names of arguments that
    are told besides the usual ones. more: of the configuration too."""
    names = ("tp", "rows", "experts", "top_k", "repeats", *options)
    config = {name: getattr(args, name) for name in names} | more
    name = torch.cuda.get_device_name(device)
    report.emit(
        op, {"target": target} | config, rows, only_json=args.json, device=name, read_gb_s=read
    )
