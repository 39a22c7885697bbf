"""Time a replacement of a node on a GPU beside the node itself, in microseconds per call.

The reference runs once over random ids, so that every node that fits the pattern gets real
activations. First the output is checked: the error of the replacement may be at most twice that of
the node in bfloat16, both against the node in float64. Then the graphs of the node and of the
replacement are timed in turn, in two passes. A graph calls the nodes one after the other, each with
its own inputs. It also calls copies of them, until their bytes exceed the cache four times or there
are 1024 calls. The routed experts of the reference wait for the host, so a node that contains them
is not timed itself.

read_bytes: bytes of weights and inputs of one call. It is left out for nodes that read only some of
their weights (an embedding, routed experts). floor_us, gb_s and share_of_read follow from
read_bytes. They are left out if the bytes fit into the cache. Nodes with a state or several output
tensors are refused; `tools.bench step` and `tools.bench router` time those. This benchmark needs a
GPU. Without one, `tools.compile --kernel` reports what can be known from compiling.
"""

import argparse
import copy
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from qwen35.cli import Parser, at_least_one
from qwen35.errors import InputError
from qwen35.load import load, locate
from qwen35.swap import Replacement, matching, outermost, parse_swap
from reference.model import Model
from reference.moe import Experts
from tools.bench import gpu, mixture, report

MOST = 1024  # maximum number of calls in a graph
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A node, its replacement, and the inputs of both."""

    name: str
    node: nn.Module
    replacement: nn.Module
    inputs: Inputs


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--swap", required=True, metavar="PATTERN=MODULE:CLASS",
        help="time CLASS of MODULE or of FILE.py, which has from_reference(node), in place of the nodes "
        "whose names fit PATTERN")  # fmt: skip
    add("--model", metavar="DIR|HUB_ID",
        help="take the nodes of this checkpoint (default: tiny, the embedded model)")  # fmt: skip
    add("--rows", type=at_least_one, default=4, metavar="N",
        help="time a pass of N rows (tokens) (default: 4)")  # fmt: skip
    add("--repeats", type=at_least_one, default=50, metavar="R",
        help="time R replays of each graph, in each pass (default: 50)")  # fmt: skip


@torch.inference_mode()
def recorded(model: Model, pattern: str, ids: list[int]) -> dict[str, tuple[nn.Module, Inputs]]:
    """The outermost nodes that fit the pattern, with their inputs in a pass over ids. InputError if
    an input is not a tensor, or if a node does not run."""
    found = outermost(matching(model, pattern))
    names = {id(module): name for name, module in found.items()}
    given: dict[str, tuple[Any, ...]] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if id(module) in names:
            given[names[id(module)]] = arguments

    cache = model.new_cache()
    tokens = torch.tensor([ids], device=model.embed_tokens.weight.device)
    handle = register_module_forward_pre_hook(keep)
    try:
        hidden = model(tokens, cache)
        model.lm_head(hidden)
        if model.mtp is not None and len(ids) > 1:
            model.draft(tokens[:, 1:], hidden[:, :-1], cache)
    finally:
        handle.remove()
    for name in found:
        if name not in given:
            raise InputError(f"{name} does not run in a pass over {len(ids)} tokens")
        if strange := [a for a in given[name] if not isinstance(a, Tensor)]:
            kind = type(strange[0]).__name__
            raise InputError(f"{name} takes a {kind}; only nodes that take tensors are timed")
    return {name: (module, given[name]) for name, module in found.items()}


def cases(
    nodes: dict[str, tuple[nn.Module, Inputs]], replacement: Replacement, count: int
) -> list[Case]:
    """`count` copies of each node, each with a replacement. InputError, with the node's name, if
    the replacement cannot be built."""
    made: list[Case] = []
    for copied in range(count):
        for name, (node, inputs) in nodes.items():
            own = copy.deepcopy(node) if copied else node
            fresh = with_name(name, replacement.from_reference, copy.deepcopy(node))
            made.append(Case(name, own, fresh, tuple(one.clone() for one in inputs)))
    return made


def with_name(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call the user's code and return its result. Its exceptions become an InputError with the
    node's name."""
    try:
        return call(*arguments)
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{name}: {kind}{error}") from error


def check(case: Case) -> tuple[float, list[str]]:
    """The largest error of the replacement as a multiple of bfloat16's, and a line if it is too
    large. InputError if either side does not return one tensor, or if the replacement fails."""
    wide = [x.double() if x.is_floating_point() else x for x in case.inputs]
    oracle = copy.deepcopy(case.node).double()(*wide)
    if not isinstance(oracle, Tensor):
        raise InputError(
            f"{case.name} gives {len(oracle)} tensors; only nodes that give one are timed"
        )
    rough = case.node(*case.inputs)
    out = with_name(case.name, case.replacement, *case.inputs)
    if not isinstance(out, Tensor) or out.shape != oracle.shape:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"{case.name}: the replacement gives {got}, the node {list(oracle.shape)}")
    return mixture.judged(case.name, out, oracle, rough)


def has(node: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a node is of one of these classes, or contains such a node."""
    return any(isinstance(part, kinds) for part in node.modules())


def nbytes(node: nn.Module, inputs: Inputs) -> int:
    """Bytes of the weights, buffers and inputs of a node."""
    return sum(x.nbytes for x in (*node.parameters(), *node.buffers(), *inputs))


def copies(total: int, calls: int, cache: int) -> int:
    """How many copies of `calls` calls, which read `total` bytes together, exceed the cache four
    times. At most MOST calls are made."""
    return max(1, min(-(-4 * cache // total), MOST // calls))


def timed(
    graphs: dict[str, gpu.Graph], moved: int | None, read: float, repeats: int
) -> dict[str, report.Row]:
    """The figures of each graph, from two passes. moved: bytes per call; None leaves the bandwidth
    out."""
    passes = [
        {name: graph.microseconds(repeats) for name, graph in graphs.items()} for _ in range(2)
    ]
    rows: dict[str, report.Row] = {}
    for name, graph in graphs.items():
        row = gpu.figures(*(one[name] for one in passes), moved or 0, read)
        if moved is None:
            row = {key: row[key] for key in ("us", "us_again", "min_us", "max_us")}
        rows[name] = row | {"launches": graph.launches}
    return rows


@torch.inference_mode()
def measure(
    nodes: dict[str, tuple[nn.Module, Inputs]],
    replacement: Replacement,
    kind: str,
    device: torch.device,
    read: float,
    repeats: int,
) -> tuple[list[report.Row], list[str]]:
    """The rows of the replacement (named `kind`) and of the node, or no rows and the failed
    checks."""
    sizes = [nbytes(node, inputs) for node, inputs in nodes.values()]
    cache = gpu.cache_bytes(device)
    count = copies(sum(sizes), len(nodes), cache)
    made = cases(nodes, replacement, count)
    worst, failed = 0.0, []
    for case in made[: len(nodes)]:
        multiple, lines = check(case)
        worst, failed = max(worst, multiple), failed + lines
    if failed:
        return [], failed
    partial = any(has(node, nn.Embedding, Experts) for node, _ in nodes.values())
    each = None if partial else round(statistics.mean(sizes))
    in_cache = count * sum(sizes) < 4 * cache
    sides: dict[str, list[Callable[[], object]]] = {
        kind: [lambda case=case: case.replacement(*case.inputs) for case in made]
    }
    if not any(has(node, Experts) for node, _ in nodes.values()):
        sides["reference"] = [lambda case=case: case.node(*case.inputs) for case in made]
    graphs = {name: with_name(name, gpu.Graph, calls) for name, calls in sides.items()}
    figures = timed(graphs, None if in_cache else each, read, repeats)
    shared = {"calls": len(made), "read_bytes": each, "in_cache": in_cache}
    rows: list[report.Row] = [{"name": name} | shared | own for name, own in figures.items()]
    if "reference" not in sides:
        rows.append({"name": "reference", "error": "routed experts wait for the host: no graph"})
    else:
        rows[0]["times_faster"] = rows[1]["us"] / rows[0]["us"]
    rows[0]["err_x_bf16"] = worst
    return rows, []


def main(args: argparse.Namespace) -> int:
    pattern, replacement = parse_swap(args.swap)
    folder = locate(args.model)
    device, target = gpu.find()
    model = load(folder, dtype=torch.bfloat16, device=device)
    ids = random.Random(0).choices(range(model.config.vocab_size), k=args.rows)
    nodes = recorded(model, pattern, ids)
    read = gpu.read_gb_s(device)
    kind = args.swap.partition("=")[2]
    rows, failed = measure(nodes, replacement, kind, device, read, args.repeats)
    for line in failed:
        print(line, file=sys.stderr)
    if failed:
        return 1
    config = {
        "target": target, "model": str(args.model or "embedded"), "swap": args.swap,
        "nodes": len(nodes), "rows": args.rows, "repeats": args.repeats,
    }  # fmt: skip
    name = torch.cuda.get_device_name(device)
    report.emit("node", config, rows, only_json=args.json, device=name, read_gb_s=read)
    return 0
