"""Random experts and routings, and their mixture of experts (MoE) in any precision.

`tools.bench moe`, `tools.bench router` and `tools.tune` use them. The mixture in float64 is the
oracle. The rule is that the largest error of a kernel is at most twice that of the mixture in
bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fast.moe import MAX_PAIRS
from fast.target import MAX_ROWS
from qwen35.cli import Parser
from qwen35.compare import judge
from qwen35.errors import InputError
from reference.activation import silu
from weights import mxfp4, words

HIDDEN, INTERMEDIATE = 4096, 1024  # of the 397B model; ranks share the intermediate size
SCALES = (116, 122)  # random e8m0 codes: 2^-11 to 2^-6
CALLS = 8  # minimum number of routings in one captured graph


def add_sizes(parser: Parser) -> None:
    """Add the options with the sizes of a pass through a layer: --rows, --experts and --top-k."""
    add = parser.add_argument
    add("--rows", type=int, default=4, metavar="N",
        help="let a pass have N rows (tokens), 1 to 8 (default: 4)")  # fmt: skip
    add("--experts", type=int, default=512, metavar="E",
        help="let a layer have E experts (default: 512)")  # fmt: skip
    add("--top-k", type=int, default=10, metavar="K",
        help="let each row choose K experts (default: 10)")  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """E experts in MXFP4, as a checkpoint has them. All tensors are uint8.

    gate_up [E, 2 I, D/2] (gate rows first), gate_up_scale [E, 2 I, D/32], down [E, D, I/2],
    down_scale [E, D, I/32].
    """

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.gate_up, self.gate_up_scale, self.down, self.down_scale

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, D, I."""
        E, D, half = self.down.shape
        return E, D, half * 2


@dataclass(frozen=True)
class Case:
    """The inputs of one call: x [N, D] bf16, experts [N, k] int32, shares (their weights) [N, k]
    fp32."""

    x: Tensor
    experts: Tensor
    shares: Tensor

    def rows(self, part: slice) -> "Case":
        return Case(self.x[part], self.experts[part], self.shares[part])


Run = Callable[[Case], Tensor]  # -> [N, D] bf16


def intermediate(tp: int) -> int:
    """The intermediate size of an expert on each of `tp` ranks. InputError if it cannot be
    divided."""
    if tp < 1 or INTERMEDIATE % (tp * words.SPAN):
        sizes = [n for n in range(1, INTERMEDIATE + 1) if INTERMEDIATE % (n * words.SPAN) == 0]
        raise InputError(f"--tp {tp}; expected some of {', '.join(map(str, sizes))}")
    return INTERMEDIATE // tp


def check_sizes(rows: int, experts: int, top_k: int, repeats: int) -> None:
    """InputError for sizes that the kernels do not support."""
    for name, value, most in (
        ("rows", rows, MAX_ROWS),
        ("experts", experts, 4096),
        ("top-k", top_k, min(experts, 16, MAX_PAIRS // max(rows, 1))),
        ("repeats", repeats, 100_000),
    ):
        if not 1 <= value <= most:
            raise InputError(f"--{name} {value}; expected 1 to {most}")


def expert_bytes(D: int, I: int) -> int:
    """Bytes of one expert: three matrices, with half a byte per element and one byte per group."""
    return 3 * D * I // 2 + 3 * D * I // mxfp4.GROUP


def random_weights(E: int, D: int, I: int, generator: torch.Generator) -> Weights:
    def codes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
        where = generator.device
        return torch.randint(low, high, shape, dtype=torch.uint8, device=where, generator=generator)

    def scales(*shape: int) -> Tensor:
        return codes(*shape, low=SCALES[0], high=SCALES[1])

    return Weights(
        codes(E, 2 * I, D // 2),
        scales(E, 2 * I, D // 32),
        codes(E, D, I // 2),
        scales(E, D, I // 32),
    )


def random_case(rows: int, D: int, pool: int | Tensor, k: int, generator: torch.Generator) -> Case:
    """Random inputs of one call. pool: the number of experts, or the expert ids to choose from."""
    where = generator.device
    ids = torch.arange(pool, device=where) if isinstance(pool, int) else pool
    noise = torch.rand(rows, len(ids), device=where, generator=generator)
    shares = torch.rand(rows, k, device=where, generator=generator)
    return Case(
        torch.randn(rows, D, device=where, generator=generator).bfloat16(),
        ids[noise.topk(k).indices].int(),
        shares / shares.sum(-1, keepdim=True),
    )


def check_cases(rows: int, D: int, E: int, k: int, generator: torch.Generator) -> list[Case]:
    """Two cases, with ordinary and with small inputs. The rows choose among only 2 k of all E
    experts, so that some rows share experts."""
    pool = torch.randperm(E, device=generator.device, generator=generator)[: 2 * k]
    case, other = (random_case(rows, D, pool, k, generator) for _ in range(2))
    return [case, Case(other.x * 0.01, other.experts, other.shares)]


def rotation(
    rows: int, D: int, E: int, k: int, each: int, cache: int, generator: torch.Generator
) -> tuple[int, list[tuple[int, Case]]]:
    """The number of weight sets, and the calls as (set, inputs), that exceed the cache.

    The experts that the calls use, of `each` bytes, are together at least three times `cache`
    bytes.
    """
    sets = -(-6 * cache // (E * each)) or 1
    calls: list[tuple[int, Case]] = []
    touched: set[tuple[int, int]] = set()
    while len(calls) < max(CALLS, sets) or len(touched) * each < 3 * cache:
        case, at = random_case(rows, D, E, k, generator), len(calls) % sets
        calls.append((at, case))
        touched |= {(at, e) for e in case.experts.flatten().tolist()}
    return sets, calls


def distinct(cases: list[Case]) -> float:
    """The mean number of distinct experts per call."""
    return sum(len(case.experts.unique()) for case in cases) / len(cases)


def mixture(weights: Weights, case: Case, dtype: torch.dtype) -> Tensor:
    """The output of the experts, [N, D] in dtype. It follows the reference step by step, one (row,
    expert) pair after the other."""
    _, _, I = weights.sizes
    gate_up, gate_up_scale, down, down_scale = weights.tensors
    total = case.x.new_zeros(case.x.shape, dtype=dtype)
    for row, x in enumerate(case.x.to(dtype)):
        parts: list[Tensor] = []
        for e, share in zip(case.experts[row].tolist(), case.shares[row].to(dtype), strict=True):
            first = mxfp4.dequantize(gate_up[e], gate_up_scale[e], dtype) @ x  # [2 I]
            hidden = silu(first[:I]) * first[I:]
            parts.append(mxfp4.dequantize(down[e], down_scale[e], dtype) @ hidden * share)
        total[row] = parts[0]
        for part in parts[1:]:
            total[row] += part
    return total


def judged(name: str, tested: Tensor, oracle: Tensor, rough: Tensor) -> tuple[float, list[str]]:
    """The largest error as a multiple of bfloat16's, and a line if it is more than the rule
    allows."""
    by_rule = judge.Judge()
    by_rule.add(name, "output", "", [oracle, rough, tested])
    (row,) = by_rule.report().rows
    line = (
        f"{name}: error {row.max_abs:.3g} is {row.x_bf16:.3g} times bfloat16's, "
        f"at {row.worst}, {row.nonfinite} not finite"
    )
    return row.x_bf16, [] if row.passed else [line]


def check(
    run: Run, weights: Weights, cases: list[Case], bits: bool = True
) -> tuple[float, list[str]]:
    """The largest error as a multiple of bfloat16's, and a line for each failed check.

    Each case is checked with 1, 2, ... and all of its rows. With `bits`, a repeated launch and a
    launch of each row alone also have to give the same bits.
    """
    worst, failed = 0.0, []
    for number, case in enumerate(cases):
        oracle, rough = (mixture(weights, case, d) for d in (torch.float64, torch.bfloat16))
        rows = len(case.x)
        alone = [run(case.rows(slice(m, m + 1))).clone() for m in range(rows)] if bits else []
        for n in range(1, rows + 1):
            name = f"inputs {number}, {n} of {rows} rows"
            part = case.rows(slice(n))
            out = run(part).clone()
            multiple, lines = judged(name, out, oracle[:n], rough[:n])
            worst, failed = max(worst, multiple), failed + lines
            if bits and not torch.equal(run(part), out):
                failed.append(f"{name}: other bits when launched again")
            if bits and not torch.equal(torch.cat(alone[:n]), out):
                failed.append(f"{name}: a row alone has other bits")
    return worst, failed
