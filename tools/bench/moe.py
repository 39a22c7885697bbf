"""Time the routed experts on a GPU beside triton_kernels and plain torch.

Ours are two launches of Triton kernels or, with `--moe-kernel hip`, one of a HIP kernel. The time is
from top-k ids to the summed output. At each size the output is checked first: the
largest error against a float64 oracle is at most twice that of a bfloat16 reference, and a repeated
launch and a launch of one row alone have the same bits. Then one call is timed inside a captured
graph over several routings, whose experts together exceed the cache. There are two passes, to show
the noise. `floor_us` is the time to read each expert that is hit once, in MXFP4, at `read_gb_s`.
This is the bandwidth of a sum over 8 GiB in the same run. `err_x_bf16` is the largest error as a
multiple of bfloat16's.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fast.launch import Scratch, run
from fast.moe import Experts
from fast.target import KERNELS
from qwen35.cli import Parser
from qwen35.progress import steps
from tools.bench import gpu, mixture, report
from tools.bench.mixture import Case, Run, Weights

OURS = "ours"
IDS, MATRICES = (
    "triton_kernels, from the top-k ids",
    "triton_kernels, its two products and the sum alone",
)
PLAIN = "plain torch, bf16 weights"
INSTALL = "triton_kernels is not installed (pip install tokenspeed-triton-kernels): no such row"

Prepare = Callable[[Case], Callable[[], Tensor]]  # returns a call on fixed inputs, -> [N, D] bf16


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--tp", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N",
        help="time the shapes of one of N ranks, which share each expert (default: 1 2 4 "
        "8)")  # fmt: skip
    mixture.add_sizes(parser)
    add("--repeats", type=int, default=50, metavar="R",
        help="time R replays of each graph, in each pass (default: 50)")  # fmt: skip
    add("--moe-kernel", choices=KERNELS, default="triton",
        help="compute ours with Triton's kernels, or on an MI355X with HIP kernels (default: "
        "triton)")  # fmt: skip
    add("--no-peers", action="store_true", help="time only ours")


def ours(weights: Weights, kernel: str = "triton") -> Prepare:
    """Our launches, on buffers that are allocated before. kernel: of `Experts`."""
    experts = Experts.from_tensors(*weights.tensors, kernel=kernel)

    def prepare(case: Case) -> Callable[[], Tensor]:
        scratch = Scratch(case.x.device)
        launches, out = experts.launches(case.x, case.experts, case.shares, scratch)

        def call() -> Tensor:
            run(launches, case.x.device)
            return out

        return call

    return prepare


def peers(weights: Weights) -> dict[str, Prepare]:
    """The peers that can be built on this machine."""
    made: dict[str, Prepare] = {}

    def triton_kernels() -> None:
        from tools.bench.moe_peers import TritonKernels

        theirs = TritonKernels(weights)
        made[IDS], made[MATRICES] = theirs.from_ids, theirs.matrices_alone

    def plain() -> None:
        from tools.bench.moe_peers import Plain

        made[PLAIN] = Plain(weights).from_ids

    if _installed():
        guarded("triton_kernels", triton_kernels)
    guarded(PLAIN, plain)
    return made


def _installed() -> bool:
    return importlib.util.find_spec("triton_kernels") is not None


def guarded(name: str, step: Callable[[], None]) -> None:
    """Run a step of a peer. If it fails, print the error and go on without its rows."""
    try:
        step()
    except Exception as error:  # whatever another library raises
        print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)


def as_run(prepare: Prepare) -> Run:
    return lambda case: prepare(case)()


def at_size(
    tp: int, args: argparse.Namespace, device: torch.device, read: float
) -> tuple[list[report.Row], list[str]]:
    """The rows of one TP size, or no rows and the lines of the failed checks."""
    E, k, D, I = args.experts, args.top_k, mixture.HIDDEN, mixture.intermediate(tp)
    generator = torch.Generator(device).manual_seed(tp)
    each = mixture.expert_bytes(D, I)
    sets, rotation = mixture.rotation(args.rows, D, E, k, each, gpu.cache_bytes(device), generator)
    moved = mixture.distinct([case for _, case in rotation]) * each
    weights = [mixture.random_weights(E, D, I, generator) for _ in range(sets)]
    cases = mixture.check_cases(args.rows, D, E, k, generator)

    prepared: dict[str, list[Prepare]] = {OURS: [ours(one, args.moe_kernel) for one in weights]}
    worst, failed = mixture.check(as_run(prepared[OURS][0]), weights[0], cases)
    if failed:
        return [], [f"TP {tp}: {line}" for line in failed]
    found: dict[str, report.Row] = {OURS: {"err_x_bf16": worst}}
    if not args.no_peers:
        of_sets = [peers(one) for one in weights]
        for name in of_sets[0]:
            if all(name in made for made in of_sets):
                prepared[name] = [made[name] for made in of_sets]

    timed: dict[str, gpu.Graph] = {}
    passes: dict[str, list[list[float]]] = {name: [] for name in prepared}

    def add(name: str) -> None:
        calls = [prepared[name][at](case) for at, case in rotation]
        if name != OURS:
            multiple, wrong = mixture.check(
                as_run(prepared[name][0]), weights[0], cases, bits=False
            )
            found[name] = {"err_x_bf16": multiple}
            if wrong:
                found[name]["error"] = wrong[0]
                return
        timed[name] = gpu.Graph(calls)
        found[name]["launches"] = timed[name].launches

    add(OURS)
    for name in prepared:
        if name != OURS:
            guarded(name, lambda name=name: add(name))
    for _ in range(2):
        for name, graph in timed.items():
            passes[name].append(graph.microseconds(args.repeats))
    return [
        {"name": name, "tp": tp}
        | (gpu.figures(*passes[name], moved, read) if name in timed else {})
        | row
        for name, row in found.items()
        if name in timed or "error" in row
    ], []


def main(args: argparse.Namespace) -> int:
    mixture.check_sizes(args.rows, args.experts, args.top_k, args.repeats)
    for tp in args.tp:
        mixture.intermediate(tp)
    device, target = gpu.find(args.moe_kernel)
    if not args.no_peers and not _installed():
        print(INSTALL, file=sys.stderr)
    read = gpu.read_gb_s(device)
    rows: list[report.Row] = []
    failed: list[str] = []
    for tp in steps(args.tp, "sizes"):
        with torch.inference_mode():
            more, wrong = at_size(tp, args, device, read)
        rows, failed = rows + more, failed + wrong
        torch.cuda.empty_cache()
    for line in failed:
        print(line, file=sys.stderr)
    if failed:
        return 1
    gpu.emit("moe", args, target, device, read, rows, moe_kernel=args.moe_kernel)
    return 0
