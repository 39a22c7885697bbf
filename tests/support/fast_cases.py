"""Run the fast path's launches in the gfx950 emulator, and compare them with the reference.

Before the first launch, every output is filled with NaN, or with ids that are outside of every
array. A finding is a line. Its first word is the kind:

    memory      an access outside of an array, or a race in the LDS
    unwritten   an output that is NaN
    arrived     a counter of arrivals is not zero again
    numbers     an error above twice the bf16 reference's plus the rounding of the output
    bits        the bits of a row depend on the order of the waves, or on the other rows
    choice      the router chose other experts than the reference, or gave them other weights
    work        a product was computed more than once
"""

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import reference.moe
from fast.launch import Launch, Scratch
from fast.moe import Experts, SparseMoeBlock
from fast.router import Router
from qwen35.config import Config
from reference.activation import sigmoid
from reference.quantized import MXFP4Linear
from tests.support.family import FAMILY, randomise
from tools.gfx950.emulator import EmulatorError, Statistics
from tools.gfx950.target import CompiledKernel, emulate

TARGET = "gfx950"
CPU = torch.device("cpu")
HALF_STEP = 2.0**-8  # relative rounding error of bf16
WRITTEN = {
    "route": ("parts", "experts", "weights"),
    "gate_up": ("first", "hidden", "shared"),
    "router": ("sums", "experts", "weights"),
    "experts": ("hidden", "partial", "out", "scaled", "out_squares"),
    "down": ("partial", "out", "scaled", "out_squares"),
    "delta": ("gated", "squares", "out"),
    "attend": ("partial", "peaks", "totals"),
    "combine": ("out",),
    "embed": ("out", "scaled", "squares"),
    "embed_part": ("out",),
    "mtp_input": ("out",),
    "allreduce": (),  # its output may be the residual
    "add": (),
    "gather": ("out",),
    "norm": ("out",),
    "head": ("logits", "best", "place"),
    "pick": ("tokens",),
    "accept": ("fresh", "report"),
}
PRODUCT = ("out", "scaled", "out_squares")  # outputs of every other launch
NOWHERE = -1000  # an id or a pair that is outside of every array


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    """Random integers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


# ---- running launches


def poison(launches: Iterable[Launch]) -> None:
    """Fill all outputs of the launches, except buffers that stay from pass to pass."""
    for launch in launches:
        arguments = launch.arguments
        for name in WRITTEN.get(launch.name.split()[0], PRODUCT):
            tensor = arguments[name]
            if tensor is None:
                continue
            if not arguments.get("RING"):
                tensor.fill_(torch.nan if tensor.is_floating_point() else NOWHERE)


def emulated(
    launches: list[Launch], *, seed: int | None = None, batch: int = 32
) -> list[Statistics]:
    """Run launches on poisoned memory. Raises EmulatorError."""
    poison(launches)
    return [emulate([launch], seed=seed, batch=batch) for launch in launches]


# ---- experts


def config(E: int, D: int, I: int, top_k: int = 4, shared: int = 0, norm: bool = True) -> Config:
    sizes = {
        "num_experts": E,
        "hidden_size": D,
        "moe_intermediate_size": I,
        "num_experts_per_tok": min(top_k, E),
        "shared_expert_intermediate_size": shared,
        "num_hidden_layers": 4,
    }
    return replace(Config.from_dict(FAMILY["397B-A17B"] | sizes), norm_topk_prob=norm)


def mxfp4_linear(seed: int, N: int, K: int) -> MXFP4Linear:
    """A random MXFP4 layer with all codes and different scales. Its weights are about K^-1/2."""
    exponent = 125 - (K.bit_length() - 1) // 2
    codes = integers(seed, 0, 255, N, K // 2).byte()
    scale = integers(seed + 1, exponent - 2, exponent + 2, N, K // 32).byte()
    return MXFP4Linear(codes, scale, "a test's")


def quantised(experts: reference.moe.Experts, seed: int) -> reference.moe.Experts:
    """The experts with random MXFP4 weights."""
    for e, expert in enumerate(experts):
        for p, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            N, K = getattr(expert, name).weight.shape
            setattr(expert, name, mxfp4_linear(seed + 100 * e + 2 * p, N, K))
    return experts.eval().requires_grad_(False)


@cache
def slow_experts(E: int, D: int, I: int) -> reference.moe.Experts:
    return quantised(reference.moe.Experts(config(E, D, I)), seed=10_000)


@cache
def fast_experts(E: int, D: int, I: int, kernel: str = "triton") -> Experts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Experts.from_reference(slow_experts(E, D, I), TARGET, kernel)


def routing(kind: str, rows: int, top_k: int, E: int) -> Tensor:
    """Expert ids [rows, top_k] of a kind of routing."""
    generator = torch.Generator().manual_seed(rows * 31 + top_k)
    some = torch.randperm(E, generator=generator)
    if kind == "random":
        return torch.stack([torch.randperm(E, generator=generator)[:top_k] for _ in range(rows)])
    if kind == "same":  # the same experts in every row, in another order
        return torch.stack([some[:top_k].roll(row) for row in range(rows)])
    if kind == "different":
        return some[: rows * top_k].view(rows, top_k)
    if kind == "overlapping":  # each row shares all but one with the row before it
        return (torch.arange(rows)[:, None] + torch.arange(top_k)) % E
    if kind == "returning":  # a row's own expert is first and last
        ids = some[:top_k].repeat(rows, 1)
        ids[:, 0] = ids[:, -1] = some[top_k : top_k + rows]
        return ids
    if kind == "twice":  # one expert in two slots of each row
        ids = routing("random", rows, top_k, E)
        return torch.cat([ids[:, :-1], ids[:, :1]], 1)
    assert kind == "ends", kind
    return torch.tensor([[0, E - 1] * top_k]).expand(rows, -1)[:, :top_k].contiguous()


@dataclass(frozen=True)
class Case:
    """Rows for experts. x [N, D] bf16, experts [N, k] int64, weights [N, k] fp32, residual [N, D].

    kernel: of `Experts`. workgroups: those of its persistent kernel.
    """

    E: int
    D: int
    I: int
    x: Tensor
    experts: Tensor
    weights: Tensor
    residual: Tensor | None = None
    kernel: str = "triton"
    workgroups: int = 6

    def rows(self, chosen: list[int]) -> "Case":
        residual = None if self.residual is None else self.residual[chosen]
        x, experts, weights = self.x[chosen], self.experts[chosen], self.weights[chosen]
        return replace(self, x=x, experts=experts, weights=weights, residual=residual)


def case(
    experts: Tensor,
    *,
    E: int = 24,
    D: int = 256,
    I: int = 128,
    scale: float = 1.0,
    residual: bool = False,
    cancelling: bool = False,
    seed: int = 0,
    **kernel: Any,
) -> Case:
    """A random case. cancelling: the first and the last slot have large weights of opposite signs.

    If both slots have the same expert, the rest of the sum shows the order of summation. Otherwise
    the rounding to bf16 hides the order nearly always. kernel: those fields of `Case`.
    """
    N, k = experts.shape
    x = (random(seed, N, D) * scale).bfloat16()
    weights = (random(seed + 1, N, k) * 2).softmax(-1)
    if cancelling:
        weights[:, 0], weights[:, -1] = 50_000, -50_000
    # About as large as the sum that it is added to. An expert's output is quadratic at small x.
    beside = (random(seed + 2, N, D) * 4 * scale**2).bfloat16() if residual else None
    return Case(E, D, I, x, experts, weights, beside, **kernel)


def launches_of(chosen: Case, scratch: Scratch | None = None) -> tuple[list[Launch], Tensor]:
    packed = fast_experts(chosen.E, chosen.D, chosen.I, chosen.kernel)
    packed.workgroups = chosen.workgroups
    return packed.launches(
        chosen.x,
        chosen.experts.int(),
        chosen.weights,
        scratch or Scratch(CPU),
        residual=chosen.residual,
    )


def counters(launches: Iterable[Launch]) -> list[str]:
    """A line for each counter of arrivals that is not zero after its launch."""
    return [
        f"arrived: {launch.name} {launch.arguments['arrived'].tolist()}"
        for launch in launches
        if "arrived" in launch.arguments and launch.arguments["arrived"].any()
    ]


def waits_for_stores(compiled: CompiledKernel) -> bool:
    """Return whether each wave of a kernel waits for its stores to global memory before the barrier
    that precedes the increment of the arrival counter. A single wave needs no barrier."""
    lines = compiled.text.splitlines()
    names = [line.split()[0] if line.split() else "" for line in lines]
    raised = names.index("global_atomic_add")
    kinds = "buffer_store", "global_store"
    stored = max(i for i in range(raised) if names[i].startswith(kinds))
    barriers = [i for i in range(raised) if names[i] == "s_barrier"]
    barrier = raised if compiled.num_warps == 1 else max(barriers)
    return any("vmcnt(0)" in line for line in lines[stored:barrier])


def output(chosen: Case, *, seed: int | None = None, batch: int = 32) -> Tensor:
    """The output of the fast path, [N, D]. It is NaN if a counter is not zero at the end."""
    launches, out = launches_of(chosen)
    emulated(launches, seed=seed, batch=batch)
    return out.fill_(torch.nan) if counters(launches) else out


def judged(name: str, got: Tensor, yardstick: Tensor, truth: Tensor) -> list[str]:
    """Findings of the two-times rule, row by row, on the largest errors of ours and of the bf16
    reference, which `yardstick` is. All have the rows first."""
    assert got.dtype == yardstick.dtype, f"{name}: {got.dtype} against {yardstick.dtype}"
    if got.isnan().any():
        return [f"unwritten: {name}, {int(got.isnan().sum())} of {got.numel()}"]
    ours, theirs = ((x.double() - truth).flatten(1).abs().amax(1) for x in (got, yardstick))
    most = 2 * theirs + torch.finfo(got.dtype).eps / 2 * truth.flatten(1).abs().amax(1)
    return [
        f"numbers: {name}, row {row} is off by {error:.2e}, allowed {limit:.2e}"
        for row, (error, limit) in enumerate(zip(ours.tolist(), most.tolist(), strict=True))
        if not error <= limit
    ]


def too_far(got: Tensor, yardstick: Tensor, truth: Tensor) -> list[str]:
    """The findings of `judged` on the rows of an output."""
    return judged("out", got, yardstick, truth)


def expected(chosen: Case) -> tuple[Tensor, Tensor]:
    """The outputs of the reference in bf16 and in float64."""
    slow = slow_experts(chosen.E, chosen.D, chosen.I)
    yardstick = slow(chosen.x, chosen.experts, chosen.weights)
    truth = slow(chosen.x.double(), chosen.experts, chosen.weights.double())
    if chosen.residual is not None:
        yardstick = yardstick + chosen.residual
        truth = truth + chosen.residual.double()
    return yardstick, truth


def findings(chosen: Case) -> list[str]:
    """The findings of one run."""
    launches, out = launches_of(chosen)
    try:
        emulated(launches)
    except EmulatorError as error:
        return [f"memory: {error}"]
    return counters(launches) + too_far(out, *expected(chosen))


def bits(
    chosen: Case, *, seeds: tuple[int, ...] = (), batches: tuple[int, ...] = (), rows: bool = True
) -> list[str]:
    """Findings on bits that change with the order of the waves (seeds), with the number of
    workgroups at a time (batches), or with the other rows."""

    def unlike(name: str, got: Tensor, wanted: Tensor) -> list[str]:
        if got.isnan().any():  # no workgroup saw that it was the last one
            return [f"arrived: {name}"]
        return [] if torch.equal(got, wanted) else [f"bits: {name}"]

    try:
        plain, found = output(chosen), []
        for seed in seeds:
            found += unlike(f"waves in order {seed}", output(chosen, seed=seed), plain)
        for batch in batches:
            found += unlike(f"workgroups by {batch}", output(chosen, batch=batch), plain)
        if rows:
            N = len(chosen.x)
            back = list(reversed(range(N)))
            found += unlike("rows in another order", output(chosen.rows(back)), plain[back])
            for row in (0, N - 1):
                alone = output(chosen.rows([row]))
                found += unlike(f"row {row} alone", alone, plain[[row]])
    except EmulatorError as error:
        return [f"memory: {error}"]
    return found


def repeated_work(rows: int, top_k: int, kernel: str = "triton") -> list[str]:
    """A finding if several rows with the same experts need more matrix instructions than one
    row."""
    counts = []
    for N in (1, rows):
        launches, _ = launches_of(case(routing("same", N, top_k, 24), kernel=kernel))
        counts.append(
            [
                sum(count for name, count in done.by_mnemonic.items() if "mfma" in name)
                for done in emulated(launches)
            ]
        )
    assert all(counts[0]), "no matrix instructions"
    return [] if counts[0] == counts[1] else [f"work: {counts[1]} products, expected {counts[0]}"]


# ---- the router and the whole block


def exact_router(
    logits: Tensor, top_k: int, norm: bool = True, D: int = 1024
) -> reference.moe.Router:
    """A router that gives row r of `picks(rows)` the logits[r]. logits is bf16 [rows, E].

    Each row has its own column of weights, so a sum along K has only one term that is not zero.
    """
    rows, E = logits.shape
    gate = reference.moe.Router(config(E, D, 128, top_k, norm=norm)).bfloat16()
    gate.weight.data.zero_()
    gate.weight.data[:, 7 : 7 + 100 * rows : 100] = logits.T
    return gate.requires_grad_(False)


def picks(rows: int, D: int = 1024) -> Tensor:
    """[rows, D] bf16 for `exact_router`. Row r is 1 at column 100 r + 7 and 0 elsewhere."""
    x = torch.zeros(rows, D, dtype=torch.bfloat16)
    x[range(rows), [100 * row + 7 for row in range(rows)]] = 1
    return x


def quiet_router(gate: reference.moe.Router, kernel: str = "triton") -> Router:
    return Router.from_reference(gate, TARGET, kernel=kernel)


def choice_findings(
    gate: reference.moe.Router,
    x: Tensor,
    *,
    seed: int | None = None,
    batch: int = 32,
    kernel: str = "triton",
) -> list[str]:
    """Findings on the fast router: ids have to be equal and in the same order, weights up to
    float32 rounding.

    The rounding error of exp grows with its argument, so weights may also differ by 1e-12.
    """
    ids, weights = gate(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launch, choice = quiet_router(gate, kernel).launch(x, Scratch(CPU))
    try:
        emulated([launch], seed=seed, batch=batch)
    except EmulatorError as error:
        return [f"memory: {error}"]
    if choice.weights.isnan().any():
        return ["unwritten: weights"]
    found = counters([launch])
    for row in range(len(x)):
        if not torch.equal(choice.experts[row].long(), ids[row]):
            found.append(f"choice: {choice.experts[row].tolist()}, expected {ids[row].tolist()}")
        elif not torch.allclose(choice.weights[row], weights[row], rtol=3e-6, atol=1e-12):
            found.append(f"choice: weights {choice.weights[row]}, expected {weights[row]}")
    return found


@cache
def slow_block(
    E: int,
    D: int,
    I: int,
    top_k: int,
    shared: int,
    norm: bool = True,
    fp4: bool = True,
) -> reference.moe.SparseMoeBlock:
    """A random block of the reference. The router's weights are small multiples of a power of two,
    so that the logits of `exact_rows` are exact."""
    block = reference.moe.SparseMoeBlock(config(E, D, I, top_k, shared, norm)).bfloat16()
    if fp4:
        quantised(block.experts, seed=20_000)
    else:
        randomise(block.experts, 4)
    block.gate.weight.data.copy_(integers(3, -8, 8, E, D) * 2.0 ** (4 - D.bit_length()))
    if block.shared_expert is not None and block.shared_expert_gate is not None:
        parts = block.shared_expert, block.shared_expert_gate
        for p, parameter in enumerate(p for part in parts for p in part.parameters()):
            parameter.data.copy_(random(30 + p, *parameter.shape) * parameter.shape[1] ** -0.5)
    return block.eval().requires_grad_(False)


def wide_block(block: reference.moe.SparseMoeBlock, x: Tensor, *, narrow: bool = True) -> Tensor:
    """The block in float64: x [N, D] -> [N, D]. narrow: use the experts that the bf16 block
    chooses."""
    experts, weights = block.gate(x.bfloat16() if narrow else x)
    total = block.experts(x, experts, weights.double())
    if block.shared_expert is not None and block.shared_expert_gate is not None:
        total = total + sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return total


@cache
def fast_block(block: nn.Module, kernel: str = "triton") -> SparseMoeBlock:
    """The fast block of a copy, because `from_reference` takes over its argument."""
    packed = SparseMoeBlock.from_reference(copy.deepcopy(block), TARGET, kernel)
    packed.experts.workgroups = 6
    return packed


def block_output(
    block: nn.Module,
    x: Tensor,
    *,
    seed: int | None = None,
    batch: int = 32,
    kernel: str = "triton",
) -> Tensor:
    """The output of the fast block for x [N, D] bf16. It is NaN if a counter is not zero at the
    end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launches, out = fast_block(block, kernel).launches(x, Scratch(CPU))
    emulated(launches, seed=seed, batch=batch)
    return out.fill_(torch.nan) if counters(launches) else out


def block_findings(
    block: reference.moe.SparseMoeBlock, x: Tensor, kernel: str = "triton"
) -> list[str]:
    try:
        out = block_output(block, x, kernel=kernel)
    except EmulatorError as error:
        return [f"memory: {error}"]
    return too_far(out, block(x[:, None])[:, 0], wide_block(block, x.double()))


def exact_rows(seed: int, N: int, D: int, scale: float = 1.0) -> Tensor:
    """Random rows [N, D] bf16 that are multiples of scale / 8."""
    return (integers(seed, -16, 16, N, D) / 8 * scale).bfloat16()
