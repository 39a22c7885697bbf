"""The experts' block in the residual stream, with a norm before it and another norm after it."""

import warnings

import torch
from torch import Tensor, nn

import reference.moe
from fast.launch import Launch, Scratch
from fast.linear import Norm, Stream
from fast.target import ROWS
from reference.norm import RMSNorm
from tests.support.fast_cases import (
    CPU,
    HALF_STEP,
    TARGET,
    counters,
    emulated,
    fast_block,
    integers,
    random,
    too_far,
    wide_block,
)
from tools.gfx950.emulator import EmulatorError


def norm(seed: int, D: int, eps: float = 1e-6) -> RMSNorm:
    made = RMSNorm(D, eps).bfloat16().requires_grad_(False)
    made.weight.copy_(random(seed, D) * 0.3)
    return made


def stream(x: Tensor, before: RMSNorm, parts: int) -> Stream:
    """The residual stream as an earlier launch writes it. Squares that belong to no row are NaN."""
    squares = torch.full((parts, ROWS[TARGET]), torch.nan)
    squares[:, : len(x)] = x.float().square().unflatten(1, (parts, -1)).sum(-1).T
    scaled = (x.float() * (1 + before.weight.float())).bfloat16()
    return Stream(x, scaled, squares, before.eps)


def clear_rows(
    block: reference.moe.SparseMoeBlock, before: RMSNorm, rows: int, seed: int = 0
) -> Tensor:
    """Random rows [rows, D] bf16 whose choice of experts does not depend on rounding: the sorted
    logits of the chosen experts and of the next one are at least four bf16 steps apart. The rows,
    and the halves of a row, differ in size."""
    D = len(before.weight)
    x = random(seed, 16 * rows, D) * 2.0 ** integers(seed + 1, -3, 3, 16 * rows, 1)
    x[:, : D // 2] *= 3
    x = x.bfloat16()
    logits = before(x.double()) @ block.gate.weight.double().T
    best = logits.sort(-1, descending=True).values[:, : block.gate.top_k + 1]
    clear = (best[:, :-1] - best[:, 1:]).amin(-1) > 4 * HALF_STEP * best.abs().amax(-1)
    assert clear.sum() >= rows, "too few rows whose choice is clear"
    return x[clear][:rows]


def stream_launches(
    block: nn.Module,
    before: RMSNorm,
    after: RMSNorm,
    x: Tensor,
    parts: int = 4,
    kernel: str = "triton",
) -> tuple[list[Launch], Stream]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fast_block(block, kernel).launches(
            stream(x, before, parts), Scratch(CPU), residual=x, then=Norm.from_reference(after)
        )


def stream_findings(
    block: reference.moe.SparseMoeBlock,
    before: RMSNorm,
    after: RMSNorm,
    x: Tensor,
    parts: int = 4,
    kernel: str = "triton",
) -> list[str]:
    """Findings on x + block(before(x)), on its choice of experts, and on the inputs of the norm
    `after`."""
    launches, out = stream_launches(block, before, after, x, parts, kernel)
    try:
        emulated(launches)
    except EmulatorError as error:
        return [f"memory: {error}"]
    found = counters(launches)
    ids, _ = block.gate(before(x))
    chosen = launches[0].arguments["experts"]
    if not torch.equal(chosen.long(), ids):
        found.append(f"choice: {chosen.tolist()}, expected {ids.tolist()}")
    wide = x.double()
    yardstick = x + block(before(x)[:, None])[:, 0]
    found += too_far(out.x, yardstick, wide + wide_block(block, before(wide), narrow=False))
    return found + left_findings(out, after)


def left_findings(out: Stream, after: RMSNorm) -> list[str]:
    """Findings on what a stream holds for the next norm: the bits of scaled rows, and the
    squares."""
    found: list[str] = []
    if not torch.equal(out.scaled, (out.x.float() * (1 + after.weight.float())).bfloat16()):
        found.append("numbers: scaled rows")
    blocks = out.x.double().square().unflatten(1, (len(out.squares), -1)).sum(-1).T
    squares = out.squares[:, : len(out.x)].double()
    if squares.isnan().any():
        found.append("unwritten: squares")
    elif not torch.allclose(squares, blocks, rtol=1e-5):
        found.append("numbers: squares")
    return found
