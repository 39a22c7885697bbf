"""Time an all-reduce of a few rows between GPUs, beside NCCL and torch's symmetric memory.

    torchrun --nproc-per-node 2 -m tools.bench allreduce

Each row of the table is one size: rows of --columns bfloat16 numbers. The first of --columns is
measured with 1, 2, 4 and 8 rows, the others with 8. `sum` is the launch of the
fast path alone, `sum_norm` also adds the residual and prepares the next norm, as in every decoder
layer. `gathered` is the fast path without shared memory: an all-gather by NCCL and a launch.
`nccl`, `one_shot` and `two_shot` are torch's all-reduces, of NCCL and of symmetric memory. They add
in an order of their own, and add no residual.

First the sums of the fast path are compared with additions in the order of ranks, bit by bit, and
between the ranks. Then 20 calls are captured in a graph, whose replays are timed in two passes.
Figures are microseconds per call on rank 0. `floor` is the time of a launch that does almost nothing.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fast.allreduce import AllReduce, Gathered, OneShot, of
from fast.launch import Scratch, Work
from fast.linear import Norm
from qwen35.cli import Parser, at_least_one
from qwen35.errors import InputError
from qwen35.parallel.ranks import Ranks, group, started_by_torchrun
from qwen35.parallel.reduce import ordered_sum
from tools.bench import gpu, report

ROWS = (1, 2, 4, 8)
CALLS = 20  # in a graph


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--tp", type=at_least_one, default=2, metavar="N",
        help="the number of ranks that torchrun has started (default: 2)")  # fmt: skip
    add("--columns", type=at_least_one, nargs="+", default=[4096, 16384], metavar="D",
        help="sum rows of D numbers (default: 4096 16384)")  # fmt: skip
    add("--repeats", type=at_least_one, default=50, metavar="R",
        help="time R replays of each graph, in each pass (default: 50)")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    size = started_by_torchrun()
    if size == 1:
        raise InputError(
            f"an all-reduce needs ranks: torchrun --nproc-per-node {args.tp} -m tools.bench allreduce"
        )
    _, target = gpu.find()
    args.device = torch.device("cuda")
    with group("python -m tools.bench allreduce", size, args) as ranks, torch.inference_mode():
        exchange = of(ranks, args.device)
        rows = [
            _row(exchange, ranks, target, rows, D, args)
            for D in args.columns
            for rows in (ROWS if args.columns[0] == D else ROWS[-1:])
        ]
        report.emit(
            "allreduce", {"target": target, "tp": size, "repeats": args.repeats}, rows,
            only_json=args.json, device=torch.cuda.get_device_name(args.device),
        )  # fmt: skip
    return 0


def _row(
    exchange: AllReduce, ranks: Ranks, target: str, rows: int, D: int, args: argparse.Namespace
) -> report.Row:
    """The figures of one size."""
    device = args.device
    generator = torch.Generator(device).manual_seed(rows * D)
    parts = torch.randn(ranks.size, rows, D, generator=generator, device=device).bfloat16()
    part, residual = parts[ranks.rank].clone(), parts.sum(0)
    norm = Norm(torch.randn(D, generator=generator, device=device).bfloat16(), 1e-6)
    scratch = Scratch(device)
    works: dict[str, Callable[[], object]] = {}
    subjects: dict[str, tuple[AllReduce, dict[str, Any]]] = {
        "sum": (exchange, {}),
        "sum_norm": (exchange, {"residual": residual, "then": norm}),
        "gathered": (Gathered(ranks), {}),
    }
    for name, (kind, settings) in subjects.items():
        if name != "gathered" and not isinstance(exchange, OneShot):
            continue
        work, out = kind.sum(part, target, scratch, out=name, **settings)
        _check(name, work, out, parts, settings.get("residual"), ranks)
        works[name] = lambda work=work: [one() for one in work]
    zeros = torch.zeros_like(part)  # repeated sums in place stay finite
    works["nccl"] = lambda: dist.all_reduce(zeros)
    works |= _of_torch(rows, D, device)
    works["floor"] = lambda: zeros[:1, :1].zero_()
    found: report.Row = {"rows": rows, "columns": D, "KiB": rows * D * 2 / 1024}
    for name, call in works.items():
        graph = gpu.Graph([call] * CALLS)
        first, second = (graph.microseconds(args.repeats) for _ in range(2))
        found |= {name: statistics.median(first), f"{name}_again": statistics.median(second)}
    return found


def _of_torch(rows: int, D: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The all-reduces of torch's symmetric memory."""
    from torch.distributed import _symmetric_memory as symmetric

    shared: Any = symmetric.empty(rows * D, dtype=torch.bfloat16, device=device)
    shared.zero_()
    world: Any = dist.group.WORLD
    symmetric.rendezvous(shared, world)
    name = world.group_name
    ops = torch.ops.symm_mem
    return {
        "one_shot": lambda: ops.one_shot_all_reduce(shared, "sum", name),
        "two_shot": lambda: ops.two_shot_all_reduce_(shared, "sum", name),
    }


def _check(
    name: str, work: list[Work], out: Any, parts: Tensor, residual: Tensor | None, ranks: Ranks
) -> None:
    """InputError unless a sum has the bits of additions in the order of ranks, on every rank and in
    every one of several launches."""
    truth = ordered_sum(parts if residual is None else torch.cat((parts, residual[None])))
    result: Tensor = out if residual is None else out.x
    for _ in range(5):
        result.fill_(torch.nan)
        for one in work:
            one()
        if not torch.equal(result, truth):
            raise InputError(f"{name}: the sum has other bits than additions in the order of ranks")
    shown = result if residual is None else out.scaled
    if not all(torch.equal(shown, other) for other in ranks.gather(shown)):
        raise InputError(f"{name}: the rows have other bits on another rank")
