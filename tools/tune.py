"""`python -m tools.tune`: measure launch configurations on this GPU, and store the fastest.

The table is fast/configs.json. Each candidate's output is checked before its time counts. The
products (gate_up, down, linear, route) may err at most twice as much as a bfloat16 reference,
against a float64 oracle. The other kernels run in a decode round whose logits may differ by at most
2% from those of the first configuration. Calls are timed inside a captured graph. Those of products
use routings or copies of the weights that together exceed the cache. `down` is timed together with
`gate_up`, because it overlaps with its end. Finally the fastest and the old configuration are timed
again, twice each, and the fastest replaces the old one if it is faster both times.

The table has no number of rows, because the bits must not depend on it. Entries of other GPUs and
shapes are kept.
"""

import argparse
import itertools
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast import configs
from fast.catalogue import PUBLISHED, sliced
from fast.configs import Config as LaunchConfig
from fast.launch import Launch, Scratch, run
from fast.linear import product
from fast.moe import Experts
from fast.step import Step
from qwen35 import cli
from qwen35.arguments import shown
from qwen35.cli import Parser
from qwen35.config import Config
from qwen35.config_json import read_object
from qwen35.errors import InputError
from qwen35.progress import steps
from tools.bench import gpu, mixture, report, router
from tools.bench.mixture import HIDDEN
from tools.bench.step import begun, random_model
from weights.storage import whole

OPS = ("gate_up", "down", "linear", "route", "delta", "attend", "attend_fp8", "combine", "head")
ROWS = 4  # one token and three drafts
E, TOP_K = 512, 10
OTHER_E, OTHER_TOP_K = 256, 8  # the other mixtures of the family, for route only

SHARED = {"gfx950": 160 * 1024, "sm_90": 227 * 1024}  # bytes of shared memory for a program
CODES_A_WARP = 16384  # weights that a warp decodes at once; with more, registers spill

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
# SPLITS, BLOCK_N, BLOCK_K, num_warps, num_stages. The router's product is split along K.
ROUTE = [
    (splits, *blocks)
    for splits in (1, 2, 4, 8)
    for blocks in (
        (16, 128, 4, 4), (16, 256, 4, 4), (16, 512, 4, 3), (16, 256, 2, 4), (32, 128, 4, 4),
        (32, 256, 4, 3),
    )
]  # fmt: skip
LINEAR = [
    (16, 128, 1, 4), (16, 128, 1, 6), (16, 256, 1, 3), (16, 256, 1, 4), (16, 256, 2, 4),
    (16, 128, 2, 6), (32, 128, 2, 4), (32, 256, 4, 3), (16, 512, 4, 3),
]  # fmt: skip
HEAD = [(32, 256, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3), (128, 128, 4, 3)]
DELTA = [
    {"BLOCK_V": block, "num_warps": warps}
    for block, warps in ((2, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4))
]
ATTEND = [
    {"GROUP": group, "TILE": tile, "num_warps": warps, "num_stages": stages}
    for group in (2, 4)
    for tile, warps, stages in (
        (32, 4, 2), (32, 4, 3), (32, 8, 3), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 1),
    )
]  # fmt: skip
COMBINE = [
    {"MANY": many, "WIDTH": width, "num_warps": warps}
    for width in (32, 64, 128, 256)
    for many, warps in ((16, 2), (32, 4), (64, 4), (64, 8), (128, 8))
]
CONTEXT = 10_000  # tokens that the rows attend to

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Subject:
    """One kernel at one shape. prepare: puts a configuration in force, and returns the calls to
    time and lines on errors in their output."""

    op: str
    shape: str
    candidates: list[LaunchConfig]
    prepare: Callable[[LaunchConfig], tuple[Calls, list[str]]]


def build_parser() -> Parser:
    parser = Parser("python -m tools.tune", __doc__ or "")
    add = parser.add_argument
    add("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP",
        help=f"tune these kernels, of {', '.join(OPS)} (default: all)")  # fmt: skip
    add("--tp", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N",
        help="measure the shapes of one of N ranks (default: 1 2 4 8)")  # fmt: skip
    add("--repeats", type=int, default=20, metavar="R",
        help="time R replays of each graph (default: 20)")  # fmt: skip
    add("--output", type=cli.output_file, default=configs.TABLE, metavar="FILE",
        help="write the fastest configurations into the table FILE; the old ones are always those of "
        "fast/configs.json (default: fast/configs.json)")  # fmt: skip
    add("--json", action="store_true", help="print only one JSON document")
    return parser


def blocked(rows: list[tuple[int, ...]]) -> list[LaunchConfig]:
    names = ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return [dict(zip(("SPLITS", *names)[-len(row) :], row, strict=True)) for row in rows]


def shared_bytes(config: LaunchConfig, weight_bits: int) -> int:
    """Bytes of shared memory for the weights, scales and activations of all pipeline stages. It
    counts 16 rows of activations, as on gfx950; an H200 needs only 8."""
    n, k = config["BLOCK_N"], config["BLOCK_K"]
    scales = n * k // 32 if weight_bits == 4 else 0
    return config["num_stages"] * (n * k * weight_bits // 8 + scales + 16 * k * 2)


def fits(config: LaunchConfig, N: int | None, K: int, weight_bits: int, target: str) -> bool:
    """Whether a configuration can launch a product with a weight [N, K]. N is None if the last
    block may be partial."""
    n, k, warps = config["BLOCK_N"], config["BLOCK_K"], config["num_warps"]
    return (
        K % (k * config.get("SPLITS", 1)) == 0
        and (N is None or N % n == 0)
        and (weight_bits == 16 or n >= 16 * warps)
        and n * k <= CODES_A_WARP * warps
        and shared_bytes(config, weight_bits) <= SHARED[target]
    )


def read(path: Path) -> dict[str, Any]:
    """Read the table, an empty one if there is no file. InputError if the file is not a table."""
    no_table = f"{path} is no table of launch configurations"
    try:
        table = read_object(path) if path.exists() else {}
    except InputError as error:
        raise InputError(f"{no_table}: {str(error).removeprefix(f'{path}: ')}") from None
    for target, ops in table.items():
        for name, level in ((target, ops), *(ops.items() if isinstance(ops, dict) else ())):
            if not isinstance(level, dict):
                raise InputError(f"{no_table}: {name} = {shown(level)}; expected an object")
    return table


def write(path: Path, target: str, op: str, shape: str, config: LaunchConfig) -> None:
    """Write one entry and keep the others. The file is replaced atomically."""
    table = read(path)
    table.setdefault(target, {}).setdefault(op, {})[shape] = config
    with whole(path) as part:
        part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def put_in_force(target: str, op: str, shape: str, config: LaunchConfig) -> None:
    """Set the configuration that this process uses from now on. No file is written."""
    configs.table().setdefault(target, {}).setdefault(op, {})[shape] = config
    configs.lookup.cache_clear()


def in_force(target: str, op: str, shape: str) -> LaunchConfig:
    """The shape's configuration, or the nearest shape's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return configs.lookup(target, op, shape)


def of_experts(ops: list[str], tp: int, target: str, device: torch.device) -> Iterator[Subject]:
    """The subjects gate_up and down, on the experts of one layer."""
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
        return experts.launches(inputs.x, inputs.experts, inputs.shares, Scratch(device))

    def prepare(op: str, config: LaunchConfig) -> tuple[Calls, list[str]]:
        if op == "gate_up":
            experts.gate_up_config = config
        else:
            experts.down_config = config
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


def of_product(N: int, K: int, target: str, device: torch.device) -> Subject:
    """The subject linear: a product with a residual."""
    generator = torch.Generator(device).manual_seed(N)
    shape = configs.key(N=N, K=K)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, generator=generator).bfloat16()

    number = router.copies(N * K * 2, gpu.cache_bytes(device))
    weights = [random(N, K) * 0.03 for _ in range(number)]
    x, residual, scratch = random(ROWS, K), random(ROWS, N), Scratch(device)

    def exact(dtype: torch.dtype) -> Tensor:
        return residual.to(dtype) + x.to(dtype) @ weights[0].to(dtype).T

    oracle, rough = exact(torch.float64), exact(torch.bfloat16)

    def prepare(config: LaunchConfig) -> tuple[Calls, list[str]]:
        put_in_force(target, "linear", shape, config)
        made = [product(x, weight, target, scratch, residual=residual) for weight in weights]
        launch, out = made[0]
        run([launch], device)
        _, wrong = mixture.judged("linear", out, oracle, rough)
        return [launch for launch, _ in made], wrong

    candidates = [c for c in blocked(LINEAR) if fits(c, None, K, 16, target)]
    return Subject("linear", shape, candidates, prepare)


def of_route(sizes: router.Sizes, target: str, device: torch.device) -> Subject:
    """The subject route: the router's product and the choice of experts."""
    generator = torch.Generator(device).manual_seed(sizes.E)
    first = router.random_weight(sizes, HIDDEN, generator)
    number = router.copies(first.nbytes, gpu.cache_bytes(device))
    weights = [first, *(router.random_weight(sizes, HIDDEN, generator) for _ in range(number - 1))]
    x = torch.randn(ROWS, HIDDEN, device=device, generator=generator).bfloat16()
    shape = configs.key(N=len(first), K=HIDDEN)

    def prepare(config: LaunchConfig) -> tuple[Calls, list[str]]:
        put_in_force(target, "route", shape, config)
        _, wrong = router.check(router.ours(first, sizes, target), first, x, sizes)
        return [router.launch(weight, x, sizes, target) for weight in weights], wrong

    candidates = [c for c in blocked(ROUTE) if fits(c, None, HIDDEN, 16, target)]
    return Subject("route", shape, candidates, prepare)


def of_step(ops: list[str], tp: int, target: str, device: torch.device) -> Iterator[Subject]:
    """The subjects delta, attend, attend_fp8, combine and head. They run in a decode round of 8
    layers. The model has only as many experts as a row chooses: with more, another order of
    summation may choose another expert, and then the logits differ by 4%."""
    config = sliced(Config.published(PUBLISHED), tp)
    config = replace(
        config,
        num_hidden_layers=8,
        layer_types=config.layer_types[:8],
        num_experts=config.num_experts_per_tok,
    )
    model = random_model(config, device)
    rows: dict[str, tuple[str, list[LaunchConfig]]] = {
        "delta": (configs.key(HV=config.linear_num_value_heads, K=128, V=128), DELTA),
        "attend": (_heads(config), ATTEND),
        "attend_fp8": (_heads(config), ATTEND),
        "combine": (_heads(config), COMBINE),
        "head": (configs.key(N=config.vocab_size, K=HIDDEN), blocked(HEAD)),
    }
    expected: dict[str, Tensor] = {}

    def prepare(op: str, shape: str, candidate: LaunchConfig) -> tuple[Calls, list[str]]:
        put_in_force(target, op, shape, candidate)
        model.kv_cache_dtype = "fp8" if op == "attend_fp8" else "auto"
        step = begun(Step(model, CONTEXT + 64, ROWS - 1), CONTEXT)
        run(step.work, device)
        logits = step.logits.float()
        first = expected.setdefault(model.kv_cache_dtype, logits)
        error = float((logits - first).norm() / first.norm())
        # Other block sizes sum in another order. The limit is the bf16 rounding error of a few
        # layers.
        wrong = [] if error < 0.02 else [f"the logits are {error:.2e} apart"]
        begun(step, CONTEXT)
        return [
            work
            for work in step.work
            if isinstance(work, Launch) and work.name.split()[0] == op.removesuffix("_fp8")
        ], wrong

    for op, (shape, candidates) in rows.items():
        if op in ops:
            yield Subject(
                op, shape, candidates, lambda c, op=op, shape=shape: prepare(op, shape, c)
            )


def _heads(config: Config) -> str:
    return configs.key(
        H=config.num_attention_heads, G=config.num_key_value_heads, K=config.head_dim
    )


def subjects(
    ops: list[str], tps: list[int], target: str, device: torch.device
) -> Iterator[Subject]:
    """All subjects. Each is made after the one before it is done."""
    sizes = [mixture.intermediate(tp) for tp in tps]
    for tp in tps if {"gate_up", "down"} & set(ops) else ():
        yield from of_experts(ops, tp, target, device)
        torch.cuda.empty_cache()
    if "linear" in ops:
        for N, K in dict.fromkeys(shape for tp in tps for shape in products(tp)):
            yield of_product(N, K, target, device)
    if "route" in ops:
        for I in sizes:
            yield of_route(router.Sizes(E, TOP_K, I), target, device)
        yield of_route(router.Sizes(OTHER_E, OTHER_TOP_K, 0), target, device)
    for tp in tps if {"delta", "attend", "attend_fp8", "combine", "head"} & set(ops) else ():
        yield from of_step(ops, tp, target, device)
        torch.cuda.empty_cache()


def products(tp: int) -> Iterator[tuple[int, int]]:
    """The shapes (N, K) of the dense weight matrices of one rank."""
    config = sliced(Config.published(PUBLISHED), tp)
    D, H, G, K = HIDDEN, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    yield config.conv_dim + values + 2 * config.linear_num_value_heads, D
    yield D, values
    yield (2 * H + 2 * G) * K, D
    yield D, H * K
    yield D, 2 * D  # of the MTP head


def tune(
    subject: Subject, target: str, repeats: int, debug: bool
) -> tuple[report.Row, LaunchConfig]:
    """Measure one subject. Returns its row of the report and the configuration to use. InputError
    if no configuration works."""
    from fast.kernels import triton  # InputError when it is not installed

    old = in_force(target, subject.op, subject.shape)
    times: list[tuple[float, LaunchConfig]] = []
    failed = 0
    candidates = [old, *(config for config in subject.candidates if config != old)]
    for config in candidates:
        name = f"{subject.op} {subject.shape}, {configs.key(**config)}"
        try:
            calls, wrong = subject.prepare(config)
            microseconds = gpu.Graph(calls).microseconds(repeats) if not wrong else []
        # A configuration may not compile, or lack memory.
        except (triton.errors.TritonError, RuntimeError, InputError) as error:
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
    subject.prepare(chosen)  # later subjects run with the chosen one
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
        for subject in steps(subjects(args.op, args.tp, target, device), "kernels tuned"):
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
