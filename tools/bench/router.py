"""Time the router and the shared expert's gate-up product on a GPU, beside torch.

A call goes from activations to top-k ids, their weights, and the shared expert's gate and up. torch
also computes the activation, which ours leaves to the first launch of the experts.

First the outputs are checked. The ids have to be those of the float64 logits, rounded to bfloat16
and sorted stably; two ids may trade places if their logits are at most one bfloat16 ULP apart. The
weights, the shared hidden row and its sigmoid follow the rule of `tools.bench moe`. A repeated
launch and a launch of one row alone have to give the same bits. Then one call is timed inside a
captured graph, over copies of the weights that together exceed the cache, in two passes. `floor_us`
is the time to read the weights once at `read_gb_s`.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from fast.launch import Launch, Scratch, run
from fast.router import Choice, Router
from qwen35.cli import Parser
from qwen35.progress import steps
from tools.bench import gpu, mixture, report

OURS = "ours"


class Chosen(NamedTuple):
    """The outputs: experts [N, k] ids, weights [N, k], hidden [N, I] and shared_gate [N] (a
    sigmoid)."""

    experts: Tensor
    weights: Tensor
    hidden: Tensor
    shared_gate: Tensor


class Sizes(NamedTuple):
    """E experts, of which k are chosen, and the shared expert's intermediate size."""

    E: int
    k: int
    I: int


Choose = Callable[[Tensor], Chosen]  # of x [N, D] bf16


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--tp", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N",
        help="time the shapes of one of N ranks, which share the shared expert (default: 1 2 4 "
        "8)")  # fmt: skip
    mixture.add_sizes(parser)
    add("--repeats", type=int, default=50, metavar="R",
        help="time R replays of each graph, in each pass (default: 50)")  # fmt: skip
    add("--no-peers", action="store_true", help="time only ours")


def chosen(logits: Tensor, opening: Tensor, both: Tensor, sizes: Sizes) -> Chosen:
    """The outputs in plain torch: softmax in fp32 (fp64 for float64 logits), top-k, normalised to
    sum 1.

    logits [N, E]; opening [N, 1], the logit of the shared gate; both [N, 2 I], gate columns first.
    """
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    values, experts = wide.softmax(-1).topk(sizes.k)
    gate, up = both.chunk(2, -1)
    shares = values / values.sum(-1, keepdim=True)
    return Chosen(experts, shares, silu(gate) * up, opening.sigmoid().flatten())


def parts(product: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Split a product [N, E + 1 + 2 I] into E logits, the logit of the shared gate, and gate-up.
    Padding is dropped."""
    E, _, I = sizes
    return product[:, :E], product[:, E : E + 1], product[:, E + 1 : E + 1 + 2 * I]


def peers(weight: Tensor, sizes: Sizes) -> dict[str, Choose]:
    router, shared = weight[: sizes.E].clone(), weight[sizes.E :].clone()
    padded = pad(weight, (0, 0, 0, -len(weight) % 8))

    def two(x: Tensor) -> Chosen:
        of_shared = x @ shared.T
        return chosen(x @ router.T, of_shared[:, :1], of_shared[:, 1:], sizes)

    tail = "softmax, topk"
    return {
        f"torch, two products, {tail}": two,
        f"torch, one product, {tail}": lambda x: chosen(*parts(x @ weight.T, sizes), sizes),
        f"torch, one product padded to a multiple of 8 columns, {tail}": lambda x: chosen(
            *parts(x @ padded.T, sizes), sizes
        ),
    }


def launch(weight: Tensor, x: Tensor, sizes: Sizes, target: str) -> Launch:
    """Our launch, on buffers that are allocated before."""
    return Router(weight, sizes.E, sizes.k, True, target).launch(x, Scratch(x.device))[0]


def ours(weight: Tensor, sizes: Sizes, target: str) -> Choose:
    router = Router(weight, sizes.E, sizes.k, True, target)

    def choose(x: Tensor) -> Chosen:
        step, choice = router.launch(x, Scratch(x.device))
        run([step], x.device)
        return outputs(choice, sizes)

    return choose


def outputs(choice: Choice, sizes: Sizes) -> Chosen:
    """The outputs of our launch, of which torch computes the shared expert's activation."""
    _, opening, both = parts(choice.parts.sum(0), sizes)
    gate, up = both.chunk(2, -1)
    hidden = (silu(gate) * up).bfloat16()
    return Chosen(choice.experts, choice.weights, hidden, opening.sigmoid().flatten())


def last_place(x: Tensor) -> Tensor:
    """The bf16 ULP (unit in the last place) of each float64 number."""
    _, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - 8)


def wrong_ids(experts: Tensor, logits: Tensor) -> list[str]:
    """A line for each row whose ids cannot be explained by rounding. experts [N, k]; logits [N, E]
    float64."""
    rounded = logits.bfloat16().double()
    expected = rounded.sort(dim=-1, descending=True, stable=True).indices[:, : experts.shape[1]]
    found: list[str] = []
    for row, (got, want) in enumerate(zip(experts.long(), expected, strict=True)):
        if got.min() < 0 or got.max() >= logits.shape[1] or len(got.unique()) < len(got):
            found.append(f"row {row}: experts {got.tolist()}")
            continue
        a, b = rounded[row, got], rounded[row, want]
        apart = (a - b).abs() > torch.maximum(last_place(a), last_place(b))
        if apart.any():
            slot = int(apart.nonzero()[0])
            found.append(
                f"row {row}, slot {slot}: expert {int(got[slot])} with {float(a[slot]):.6g}, "
                f"not {int(want[slot])} with {float(b[slot]):.6g}"
            )
    return found


def check(
    choose: Choose, weight: Tensor, x: Tensor, sizes: Sizes, bits: bool = True
) -> tuple[float, list[str]]:
    """The largest error as a multiple of bfloat16's, and a line for each failed check. bits:
    whether a repeated launch and a launch of one row alone have to give the same bits."""
    worst, failed = 0.0, []
    exact, rough = (parts(x.to(d) @ weight.to(d).T, sizes) for d in (torch.float64, torch.bfloat16))
    alone = [Chosen(*(t.clone() for t in choose(x[m : m + 1]))) for m in range(len(x))]
    for n in range(1, len(x) + 1):
        name = f"{n} of {len(x)} rows"
        out = Chosen(*(t.clone() for t in choose(x[:n])))
        lines = wrong_ids(out.experts, exact[0][:n])
        failed += [f"{name}, {line}" for line in lines]
        if not lines:
            compared = {"weights": [_shares(side[0][:n], out.experts) for side in (exact, rough)]}
            if sizes.I:
                sides = [chosen(*side, sizes) for side in (exact, rough)]
                compared["hidden"] = [side.hidden[:n] for side in sides]
                compared["shared_gate"] = [side.shared_gate[:n] for side in sides]
            for what, (oracle, by_bf16) in compared.items():
                multiple, more = mixture.judged(
                    f"{name}, {what}", getattr(out, what), oracle, by_bf16
                )
                worst, failed = max(worst, multiple), failed + more
        if bits:
            again = choose(x[:n])
            together = Chosen(*(torch.cat(rows) for rows in zip(*alone[:n], strict=True)))
            for what in Chosen._fields if sizes.I else ("experts", "weights"):
                if not torch.equal(getattr(again, what), getattr(out, what)):
                    failed.append(f"{name}: other {what} when launched again")
                if not torch.equal(getattr(together, what), getattr(out, what)):
                    failed.append(f"{name}: a row alone has other {what}")
    return worst, failed


def _shares(logits: Tensor, experts: Tensor) -> Tensor:
    """The weights of given experts, [N, k]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    values = wide.softmax(-1).gather(-1, experts.long())
    return values / values.sum(-1, keepdim=True)


def random_weight(sizes: Sizes, D: int, generator: torch.Generator) -> Tensor:
    """A random weight [E + 1 + 2 I, D] in bf16, or [E, D] without a shared expert (I = 0)."""
    rows = sizes.E + (1 + 2 * sizes.I if sizes.I else 0)
    where = generator.device
    return (0.03 * torch.randn(rows, D, device=where, generator=generator)).bfloat16()


def copies(nbytes: int, cache: int) -> int:
    """How many copies of the weights are four times the cache together; at least 16."""
    return max(16, -(-4 * cache // nbytes))


def at_size(
    tp: int, args: argparse.Namespace, device: torch.device, target: str, read: float
) -> tuple[list[report.Row], list[str]]:
    """The rows of one TP size, or no rows and the lines of the failed checks."""
    sizes = Sizes(args.experts, args.top_k, mixture.intermediate(tp))
    generator = torch.Generator(device).manual_seed(tp)
    first = random_weight(sizes, mixture.HIDDEN, generator)
    number = copies(first.nbytes, gpu.cache_bytes(device))
    weights = [first] + [random_weight(sizes, mixture.HIDDEN, generator) for _ in range(number - 1)]
    x = torch.randn(args.rows, mixture.HIDDEN, device=device, generator=generator).bfloat16()
    worst, failed = check(ours(first, sizes, target), first, x, sizes)
    if failed:
        return [], [f"TP {tp}: {line}" for line in failed]
    found: dict[str, report.Row] = {OURS: {"err_x_bf16": worst}}
    made = [{OURS: ours(weight, sizes, target)} for weight in weights]
    if not args.no_peers:
        made = [one | peers(weight, sizes) for one, weight in zip(made, weights, strict=True)]
    timed: dict[str, gpu.Graph] = {}
    for name in made[0]:
        if name != OURS:
            multiple, wrong = check(made[0][name], first, x, sizes, bits=False)
            found[name] = {"err_x_bf16": multiple} | ({"error": wrong[0]} if wrong else {})
            if wrong:
                continue
        calls: list[Callable[[], object]] = [lambda choose=one[name]: choose(x) for one in made]
        if name == OURS:
            calls = [launch(weight, x, sizes, target) for weight in weights]
        timed[name] = gpu.Graph(calls)
        found[name]["launches"] = timed[name].launches
    passes = [
        {name: graph.microseconds(args.repeats) for name, graph in timed.items()} for _ in range(2)
    ]
    return [
        {"name": name, "tp": tp}
        | (gpu.figures(*(p[name] for p in passes), first.nbytes, read) if name in timed else {})
        | row
        for name, row in found.items()
    ], []


def main(args: argparse.Namespace) -> int:
    mixture.check_sizes(args.rows, args.experts, args.top_k, args.repeats)
    for tp in args.tp:
        mixture.intermediate(tp)
    device, target = gpu.find()
    read = gpu.read_gb_s(device)
    rows: list[report.Row] = []
    failed: list[str] = []
    for tp in steps(args.tp, "sizes"):
        with torch.inference_mode():
            more, wrong = at_size(tp, args, device, target, read)
        rows, failed = rows + more, failed + wrong
        torch.cuda.empty_cache()
    for line in failed:
        print(line, file=sys.stderr)
    if failed:
        return 1
    gpu.emit("router", args, target, device, read, rows)
    return 0
