"""`python -m tools.tune`: launch configurations measured on this GPU, and the fastest written to
fast/configs.json.

Each candidate's output is checked before it may win: its largest error against a float64 oracle is at
most twice that of a bfloat16 reference. Times are of calls inside a captured graph, over routings or
copies of the weights that together exceed the cache. `down` runs behind `gate_up`, with whose end it
overlaps; its times are of both. The fastest is timed against the old configuration once more, twice
each, and replaces it if it won both times.

Rows are no part of the table: bits may not depend on them. Entries of other GPUs and shapes stay as
they are.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast import configs
from fast.configs import Config
from fast.launch import Launch, run
from fast.moe import Experts
from fast.router import Router, product
from qwen35 import cli
from qwen35.cli import Parser
from qwen35.errors import InputError
from tools.bench import gpu, mixture, report, router
from tools.bench.mixture import HIDDEN
from weights.storage import whole

OPS = ("gate_up", "down", "linear", "choose")
ROWS = 4  # one token and three drafts
E, TOP_K = 512, 10
OTHER_E, OTHER_TOP_K = 256, 8  # the family's other mixtures: their router alone

SHARED = {"gfx950": 160 * 1024, "sm_90": 227 * 1024}  # bytes a program may have
CODES_A_WARP = 16384  # that it holds and decodes at once; with more, registers spill

# BLOCK_N, BLOCK_K, num_warps, num_stages.
GATE_UP = [
    (32, 256, 2, 3), (32, 256, 2, 4), (32, 256, 2, 5), (32, 512, 1, 3), (32, 512, 2, 2),
    (32, 512, 2, 3), (32, 512, 2, 4), (64, 256, 2, 3), (64, 256, 2, 4), (64, 256, 4, 3),
    (64, 256, 4, 4), (64, 256, 4, 5), (64, 512, 4, 2), (64, 512, 4, 3), (64, 512, 4, 4),
    (128, 256, 4, 3), (128, 256, 8, 3), (128, 512, 8, 3),
]  # fmt: skip
DOWN = [
    (32, 128, 1, 2), (32, 256, 2, 3), (64, 128, 2, 2), (64, 128, 4, 2), (64, 256, 4, 2),
    (64, 256, 4, 3), (64, 256, 4, 4), (64, 512, 4, 2), (128, 128, 4, 2), (128, 128, 8, 2),
    (128, 256, 4, 2), (128, 256, 4, 3), (128, 256, 4, 4), (128, 256, 8, 2), (128, 256, 8, 3),
]  # fmt: skip
# The same with SPLITS in front. The router's product is cut along K, the shared expert's down is not.
WIDE = [
    (splits, *blocks)
    for splits in (4, 8)
    for blocks in (
        (16, 128, 1, 3), (16, 128, 1, 4), (16, 256, 1, 3), (16, 256, 1, 4),
        (32, 128, 2, 3), (32, 128, 2, 4), (32, 256, 2, 3), (64, 128, 4, 3),
    )
]  # fmt: skip
NARROW = [
    (1, 16, 128, 1, 2), (1, 16, 128, 1, 3), (1, 32, 128, 1, 2), (1, 32, 128, 2, 2),
    (1, 32, 128, 2, 3), (1, 64, 128, 4, 2), (1, 32, 256, 2, 2),
]  # fmt: skip
CHOOSE = [{"num_warps": warps} for warps in (1, 2, 4, 8)]

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Subject:
    """One kernel at one shape. prepare: with the configuration now in force, the calls to time, and
    lines on what is wrong with their output."""

    op: str
    shape: str
    candidates: list[Config]
    prepare: Callable[[Config], tuple[Calls, list[str]]]


def build_parser() -> Parser:
    parser = Parser("python -m tools.tune", __doc__ or "")
    add = parser.add_argument
    add("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP",
        help=f"{', '.join(OPS)}; default: all")  # fmt: skip
    add("--tp", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    add("--repeats", type=int, default=20)
    add("--output", type=Path, default=configs.TABLE, metavar="FILE")
    add("--json", action="store_true", help="print the JSON document alone")
    return parser


def blocked(rows: list[tuple[int, ...]]) -> list[Config]:
    names = ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return [dict(zip(("SPLITS", *names)[-len(row) :], row, strict=True)) for row in rows]


def shared_bytes(config: Config, weight_bits: int) -> int:
    """Of the weights, scales and activations that are under way; 8 rows are all that an H200 needs,
    gfx950 takes 16."""
    n, k = config["BLOCK_N"], config["BLOCK_K"]
    scales = n * k // 32 if weight_bits == 4 else 0
    return config["num_stages"] * (n * k * weight_bits // 8 + scales + 16 * k * 2)


def fits(config: Config, N: int | None, K: int, weight_bits: int, target: str) -> bool:
    """Whether a product with a weight [N, K] can be launched so. N is None when a last block may be
    short."""
    n, k, warps = config["BLOCK_N"], config["BLOCK_K"], config["num_warps"]
    return (
        K % (k * config.get("SPLITS", 1)) == 0
        and (N is None or N % n == 0)
        and n >= 16 * warps
        and n * k <= CODES_A_WARP * warps
        and shared_bytes(config, weight_bits) <= SHARED[target]
    )


def read(path: Path) -> dict[str, Any]:
    """The table. InputError when it is none, or cannot be written in the end."""
    try:
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        levels = [table, *table.values(), *(ops for t in table.values() for ops in t.values())]
        assert all(isinstance(level, dict) for level in levels)
    except (ValueError, AttributeError, AssertionError):
        raise InputError(f"{path} is no table of launch configurations") from None
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: {path.parent} is no folder that can be written")
    return table


def write(path: Path, target: str, op: str, shape: str, config: Config) -> None:
    """One entry; the others stay. Whole or not at all."""
    table = read(path)
    table.setdefault(target, {}).setdefault(op, {})[shape] = config
    with whole(path) as part:
        part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def put_in_force(target: str, op: str, shape: str, config: Config) -> None:
    """What this process launches from now on; no file is written."""
    configs.table().setdefault(target, {}).setdefault(op, {})[shape] = config
    configs.lookup.cache_clear()


def in_force(target: str, op: str, shape: str) -> Config:
    """The shape's configuration, or the nearest shape's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return configs.lookup(target, op, shape)


def of_experts(ops: list[str], tp: int, target: str, device: torch.device) -> Iterator[Subject]:
    """gate_up and then down, on one layer's experts."""
    D, I = HIDDEN, mixture.intermediate(tp)
    generator = torch.Generator(device).manual_seed(tp)
    weights = mixture.random_weights(E, D, I, generator)
    experts = Experts.from_tensors(*weights.tensors)
    case, *_ = mixture.check_cases(ROWS, D, E, TOP_K, generator)
    oracle, rough = (mixture.mixture(weights, case, d) for d in (torch.float64, torch.bfloat16))
    each, cache = mixture.expert_bytes(D, I), gpu.cache_bytes(device)
    sets, rotation = mixture.rotation(ROWS, D, E, TOP_K, each, cache, generator)
    assert sets == 1, f"{E} experts of {each} bytes fit into the cache"
    del weights

    def launches(inputs: mixture.Case) -> tuple[list[Launch], Tensor]:
        return experts.launches(inputs.x, inputs.experts, inputs.shares)

    def prepare(op: str, config: Config) -> tuple[Calls, list[str]]:
        if op == "gate_up":
            experts.gate_up_config = config
        else:
            experts.down_config = config
            blocks = D // config["BLOCK_N"]
            experts.arrived = torch.zeros(blocks, dtype=torch.int32, device=device)
        steps, out = launches(case)
        run(steps, device)
        _, wrong = mixture.judged(op, out, oracle, rough)
        of_calls = [launches(inputs)[0] for _, inputs in rotation]
        if op == "gate_up":
            return [steps[0] for steps in of_calls], wrong
        return [lambda steps=steps: run(steps, device) for steps in of_calls], wrong

    for op, rows, N, K in (("gate_up", GATE_UP, 2 * I, D), ("down", DOWN, D, I)):
        candidates = [c for c in blocked(rows) if fits(c, N, K, 4, target)]
        if op in ops:
            shape = configs.key(D=D, I=I)
            yield Subject(op, shape, candidates, lambda c, op=op: prepare(op, c))


def of_product(N: int, K: int, gained: bool, target: str, device: torch.device) -> Subject:
    """linear. gained: each row has a factor, and K is not cut."""
    generator = torch.Generator(device).manual_seed(N)
    shape = configs.key(N=N, K=K)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, generator=generator).bfloat16()

    number = router.copies(N * K * 2, gpu.cache_bytes(device))
    weights = [random(N, K) * 0.03 for _ in range(number)]
    x, gain = random(ROWS, K), random(ROWS).float() if gained else None

    def exact(dtype: torch.dtype) -> Tensor:
        y = x.to(dtype) @ weights[0].to(dtype).T
        return y if gain is None else y * gain.to(dtype)[:, None]

    oracle, rough = exact(torch.float64), exact(torch.bfloat16)

    def prepare(config: Config) -> tuple[Calls, list[str]]:
        put_in_force(target, "linear", shape, config)
        made = [product(x, weight, target, gain=gain) for weight in weights]
        launch, out = made[0]
        run([launch], device)
        _, wrong = mixture.judged("linear", out.sum(0), oracle, rough)
        return [launch for launch, _ in made], wrong

    rows = NARROW if gained else WIDE
    candidates = [c for c in blocked(rows) if fits(c, None, K, 16, target)]
    return Subject("linear", shape, candidates, prepare)


def of_choice(sizes: router.Sizes, target: str, device: torch.device) -> Subject:
    """choose, on what the product left."""
    generator = torch.Generator(device).manual_seed(sizes.E)
    weight = router.random_weight(sizes, HIDDEN, generator)
    x = torch.randn(ROWS, HIDDEN, device=device, generator=generator).bfloat16()
    shape = configs.key(E=sizes.E)

    def prepare(config: Config) -> tuple[Calls, list[str]]:
        put_in_force(target, "choose", shape, config)
        _, wrong = router.check(router.ours(weight, sizes, target), weight, x, sizes)
        steps, _ = Router(weight, sizes.E, sizes.k, True, target).launches(x)
        run(steps, device)
        return [steps[1]] * mixture.CALLS, wrong

    return Subject("choose", shape, CHOOSE, prepare)


def subjects(
    ops: list[str], tps: list[int], target: str, device: torch.device
) -> Iterator[Subject]:
    """One after the other: each is made when the one before is done."""
    sizes = [mixture.intermediate(tp) for tp in tps]
    for tp in tps if {"gate_up", "down"} & set(ops) else ():
        yield from of_experts(ops, tp, target, device)
        torch.cuda.empty_cache()
    if "linear" in ops:
        for N in (E, OTHER_E, *(E + 1 + 2 * I for I in sizes)):
            yield of_product(N, HIDDEN, False, target, device)
        for I in sizes:
            yield of_product(HIDDEN, I, True, target, device)
    if "choose" in ops:
        yield of_choice(router.Sizes(E, TOP_K, min(sizes)), target, device)
        yield of_choice(router.Sizes(OTHER_E, OTHER_TOP_K, 0), target, device)


def tune(subject: Subject, target: str, repeats: int, debug: bool) -> tuple[report.Row, Config]:
    """The row of one shape, and the configuration that it is to have."""
    from fast.kernels import triton  # InputError when it is not installed

    old = in_force(target, subject.op, subject.shape)
    times: list[tuple[float, Config]] = []
    failed = 0
    candidates = [old, *(config for config in subject.candidates if config != old)]
    for config in candidates:
        name = f"{subject.op} {subject.shape}, {configs.key(**config)}"
        try:
            calls, wrong = subject.prepare(config)
            microseconds = gpu.Graph(calls).microseconds(repeats) if not wrong else []
        except (
            triton.errors.TritonError,
            RuntimeError,
            InputError,
        ) as error:  # does not compile, or has no room
            wrong, microseconds = [f"{type(error).__name__}: {error}"], []
        if wrong:
            failed += 1
            if debug:
                print(f"{name}: {' '.join(wrong[0].split())[-200:]}", file=sys.stderr)
        else:
            times.append((statistics.median(microseconds), config))
    if not times:
        raise InputError(
            f"{subject.op} {subject.shape}: none of {len(candidates)} configurations works "
            "(--debug says why)"
        )
    _, best = min(times, key=lambda found: found[0])
    rivals = [config for config in (old, best) if any(config == c for _, c in times)]
    again: list[list[float]] = [[] for _ in rivals]
    for _, (place, config) in itertools.product(range(2), enumerate(rivals)):
        calls, _ = subject.prepare(config)
        again[place].append(statistics.median(gpu.Graph(calls).microseconds(repeats)))
    of_old, of_best = again[0], again[-1]
    kept = old in rivals and not all(b < o for b, o in zip(of_best, of_old, strict=True))
    chosen = old if kept else best
    subject.prepare(chosen)  # in force for what comes after
    put_in_force(target, subject.op, subject.shape, chosen)
    us = dict(zip(("old_us", "old_us_again"), of_old, strict=True)) if old in rivals else {}
    us |= dict(zip(("us", "us_again"), of_old if kept else of_best, strict=True))
    row: report.Row = {"name": f"{subject.op} {subject.shape}", "old": configs.key(**old)}
    row |= {"new": configs.key(**chosen)} | us | {"tried": len(candidates), "failed": failed}
    return row, chosen


def main(args: argparse.Namespace) -> int:
    mixture.check_sizes(ROWS, E, TOP_K, args.repeats)
    for tp in args.tp:
        mixture.intermediate(tp)
    read(args.output)
    device, target = gpu.find()
    rows: list[report.Row] = []
    with torch.inference_mode():
        for subject in subjects(args.op, args.tp, target, device):
            row, config = tune(subject, target, args.repeats, args.debug)
            write(args.output, target, subject.op, subject.shape, config)
            rows.append(row)
            if not args.json:
                print(f"{row['name']}: {row['us']:.2f} us with {row['new']}", file=sys.stderr)
    settings = {"target": target, "op": args.op, "tp": args.tp, "repeats": args.repeats}
    name = torch.cuda.get_device_name(device)
    report.emit("tune", settings, rows, only_json=args.json, device=name)
    return 0


if __name__ == "__main__":
    cli.run(build_parser(), main)
