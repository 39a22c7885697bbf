"""Errors of a candidate, beside bfloat16's own: one row a tensor, worst first."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BINS = 24  # of a histogram: errors from 2^-16 to 2^7 times the yardstick's largest
MOST = 1e300  # stands for infinity, which JSON lacks


@dataclass
class Row:
    """One tensor of one node in one phase, over all its passes.

    tensor: "output", or a field of the node's state. max_abs: the largest error against the oracle; bf16:
    the yardstick's; floor: half a unit in the last place of the largest output; x_bf16: max_abs over the
    larger of the two. worst: index of that error in its pass. rel_rms: of the errors, over that of the
    oracle. nonfinite: NaN and infinite elements. flips: tokens whose experts are not the oracle's.
    margin: of such tokens, the widest gap between the last expert chosen and the next, in the oracle's
    probabilities. unsure: tokens left out because rounding alone may flip their experts. histogram:
    elements by log2(error / yardstick's largest), from 2^-16.
    """

    node: str
    tensor: str
    phase: str
    shape: list[int] = field(default_factory=list)
    max_abs: float = 0.0
    rel_rms: float = 0.0
    bf16: float = 0.0
    floor: float = 0.0
    x_bf16: float = 0.0
    worst: list[int] = field(default_factory=list)
    nonfinite: int = 0
    flips: int = 0
    margin: float = 0.0
    unsure: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    passed: bool = True


@dataclass
class Tokens:
    """The most likely token at each position beside the oracle's: how many, how many equal, where the
    first other one stands, and how far apart the oracle's logits of the two are there."""

    compared: int = 0
    equal: int = 0
    first: int | None = None
    margin: float | None = None


@dataclass
class Report:
    """rows: worst first; of two failing nodes the inner one before the one that contains it."""

    rows: list[Row]
    tokens: Tokens

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)


class Judge:
    """Collects comparisons of [oracle, yardstick, candidate]."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.squares: dict[
            int, tuple[float, float]
        ] = {}  # by id of a row: of the oracle, of the errors
        self.tokens = Tokens()

    def add(
        self, node: str, tensor: str, phase: str, results: list[Any], unsure: Tensor | None = None
    ) -> Row:
        """One pass. results: three tensors of one shape. unsure [N]: tokens to leave out."""
        row = self.rows.setdefault((node, tensor, phase), Row(node, tensor, phase))
        oracle, rough, tested = (result.double() for result in results)
        row.shape = list(tested.shape)
        if tested.shape != oracle.shape:
            row.max_abs = MOST
            return row
        if not oracle.numel():  # a state that no pass has filled
            return row
        kept = torch.ones(oracle.shape, dtype=torch.bool, device=oracle.device)
        if unsure is not None:
            kept = (~unsure)[:, None].expand(len(unsure), oracle.numel() // len(unsure))
            kept = kept.reshape(oracle.shape)
            row.unsure += int(unsure.sum())
        broken = ~tested.isfinite() & oracle.isfinite() & kept
        row.nonfinite += int(broken.sum())
        error = torch.where(kept, tested - oracle, 0.0).abs()
        error = torch.where(broken, MOST, error)
        rough_error = torch.where(kept, rough - oracle, 0.0).abs().max().item()
        largest = torch.where(kept, oracle, 0.0).abs().max().item()
        floor = torch.finfo(results[2].dtype).eps / 2 * largest
        row.bf16, row.floor = max(row.bf16, rough_error), max(row.floor, floor)
        most, at = error.flatten().max(0)
        if most.item() > row.max_abs or not row.worst:
            row.max_abs = most.item()
            row.worst = [int(i) for i in torch.unravel_index(at, oracle.shape)]
        unit = max(rough_error, floor, torch.finfo(torch.float64).tiny)
        bins = (error / unit).log2().floor().clamp(-16, BINS - 17).add(16).long()
        for i, count in enumerate(bins[kept].bincount(minlength=BINS).tolist()):
            row.histogram[i] += count
        of_oracle, of_errors = self.squares.get(id(row), (0.0, 0.0))
        self.squares[id(row)] = (
            of_oracle + torch.where(kept, oracle, 0.0).square().sum().item(),
            of_errors + error.clamp(max=1e150).square().sum().item(),
        )
        return row

    def add_choice(
        self,
        node: str,
        phase: str,
        results: list[tuple[Tensor, Tensor]],
        experts: int,
        gap: Tensor | None = None,
        unsure: Tensor | None = None,
    ) -> None:
        """A router's outputs, experts [N, k] and weights [N, k] on each side, compared as weights of all
        experts [N, E]; tokens that chose others than the oracle are counted. gap [N]: `Row.margin`."""
        dense = [
            weights.new_zeros(len(weights), experts).scatter_(1, chosen, weights)
            for chosen, weights in results
        ]
        row = self.add(node, "output", phase, dense, unsure)
        sets = [
            torch.zeros_like(d, dtype=torch.bool).scatter_(1, chosen, True)
            for d, (chosen, _) in zip(dense, results, strict=True)
        ]
        if sets[2].shape != sets[0].shape:
            return
        flipped = (sets[0] != sets[2]).any(-1)
        row.flips += int(flipped.sum())
        if gap is not None and flipped.any():
            row.margin = max(row.margin, gap[flipped].max().item())

    def add_tokens(self, oracle: Tensor, tested: Tensor) -> None:
        """Logits [B, T, V] of the next positions."""
        if oracle.shape != tested.shape:  # a failing row says so
            return
        ours, theirs = (logits.flatten(0, 1).argmax(-1) for logits in (oracle, tested))
        different = (ours != theirs).nonzero().flatten()
        if self.tokens.first is None and len(different):
            at = int(different[0])
            logits = oracle.flatten(0, 1)[at].double()
            self.tokens.first = self.tokens.compared + at
            self.tokens.margin = (logits[ours[at]] - logits[theirs[at]]).item()
        self.tokens.compared += len(ours)
        self.tokens.equal += len(ours) - len(different)

    def report(self) -> Report:
        """Judge every row, and put them in order."""
        for row in self.rows.values():
            of_oracle, of_errors = self.squares.get(id(row), (0.0, 0.0))
            row.rel_rms = math.sqrt(of_errors / of_oracle) if of_oracle else 0.0
            unit = max(row.bf16, row.floor)
            if row.max_abs < MOST:
                row.x_bf16 = row.max_abs / unit if unit else (MOST if row.max_abs else 0.0)
            else:
                row.x_bf16 = MOST
            row.passed = row.max_abs <= 2 * row.bf16 + row.floor and not row.nonfinite
        failing = {row.node for row in self.rows.values() if not row.passed}

        def place(row: Row) -> tuple[bool, bool, float]:
            explained = any(node.startswith(f"{row.node}.") for node in failing)
            return row.passed, explained, -row.x_bf16

        return Report(sorted(self.rows.values(), key=place), self.tokens)
