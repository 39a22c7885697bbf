"""Judges the errors of a candidate relative to those of bfloat16: one row per tensor, worst first.

In `local` mode a row passes if its largest error against the oracle is at most twice the
yardstick's, plus half an ULP (unit in the last place) of its largest output. In `free` mode errors
have accumulated, and the largest one is a matter of chance. There the RMS of the errors must be at
most twice the yardstick's, plus half an ULP; tensors with fewer than 32 elements only have to be
finite.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qwen35.cli import counted

Mode = Literal["local", "free"]
MODES: tuple[str, ...] = get_args(Mode)
BINS = 24  # of a histogram; each is a factor of 2 wide, see `Row`
MOST = 1e300  # replaces infinity, which JSON lacks
FEWEST = 32  # fewest elements whose mean square is judged
PRINTED = 10  # rows in the repr of a report


@dataclass
class Row:
    """One tensor of one node in one phase, over all its passes.

    tensor: "output", or a field of the node's state.
    elements: the number of elements that were compared.
    max_abs: the candidate's largest error against the oracle. bf16: the yardstick's.
    floor: half a unit in the last place of the largest output.
    rel_rms, bf16_rms: the RMS of the candidate's and of the yardstick's errors, divided by the RMS of
        the oracle.
    x_bf16: the candidate's error divided by the yardstick's, or by the floor if that is larger. Errors
        are the largest ones (local) or the RMS (free).

    The next five describe the element with the error max_abs.
    span: the first token of its pass, and the token after the last one.
    shape: that of the tensor in this pass.
    worst: the index of the element.
    position: that of its token in the sequence, or None if it has no token, as in a recurrent state.
    channel: its other indices, a head before a channel. In a router it is an expert, in logits a token.

    nonfinite: the number of NaN and infinite elements.
    flips: the number of tokens whose experts are not the oracle's.
    margin: the widest gap of such a token between the probabilities of its last chosen expert and of the
        next one, by the oracle.
    unsure: the number of tokens that are left out because rounding alone may flip their experts.
    histogram: counts of elements by floor(log2(error / unit)), from -16 or less to 7 or more. The unit
        of a pass is the larger of the yardstick's largest error and the floor.
    """

    node: str
    tensor: str
    phase: str
    elements: int = 0
    max_abs: float = 0.0
    bf16: float = 0.0
    floor: float = 0.0
    rel_rms: float = 0.0
    bf16_rms: float = 0.0
    x_bf16: float = 0.0
    span: list[int] = field(default_factory=list)
    shape: list[int] = field(default_factory=list)
    worst: list[int] = field(default_factory=list)
    position: int | None = None
    channel: list[int] = field(default_factory=list)
    nonfinite: int = 0
    flips: int = 0
    margin: float = 0.0
    unsure: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    passed: bool = True

    @property
    def name(self) -> str:
        """The node, and which tensor of its state."""
        return self.node if self.tensor == "output" else f"{self.node}/{self.tensor}"

    @property
    def place(self) -> str:
        """Where the largest error is: `prefill 128-193, worst at token 163, channel 140`."""
        tokens = ""
        if self.span:
            first, end = self.span
            tokens = f" {first}" if end - first == 1 else f" {first}-{end - 1}"
        token = [] if self.position is None else [f"token {self.position}"]
        heads = [f"head {self.channel[0]}"] if len(self.channel) > 1 else []
        rest = self.channel[len(heads) :]
        channel = [f"channel {rest[0] if len(rest) == 1 else rest}"] if rest else []
        at = ", ".join([*token, *heads, *channel])
        return f"{self.phase}{tokens}, worst at {at}" if at else f"{self.phase}{tokens}"


@dataclass
class Tokens:
    """The candidate's most likely token at each position, compared with the oracle's.

    compared, equal: the number of positions, and of those with the same token.
    first: the first position with another token, or None.
    margin: the difference of the oracle's logits of the two tokens there.
    """

    compared: int = 0
    equal: int = 0
    first: int | None = None
    margin: float | None = None


@dataclass(repr=False)
class Report:
    """The result of a comparison.

    rows: worst first. A failing node comes before a failing node that contains it.
    tokens: the most likely tokens.
    unmatched: nodes that the candidate did not call, or that its trace lacks.
    swapped: the swapped nodes of the candidate, name -> `module:class`.

    A report is true if it has passed, so that `assert qwen35.diff(...)` checks something.
    """

    rows: list[Row]
    tokens: Tokens
    unmatched: list[str]
    swapped: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    @property
    def failing(self) -> list[Row]:
        """The rows that fail. They come first in `rows`."""
        return [row for row in self.rows if not row.passed]

    def __repr__(self) -> str:
        """One line if all rows pass, or a table of the first failing ones."""
        if self.passed:
            worst = max(self.rows, key=lambda row: row.x_bf16, default=None)
            most = f", at most {times(worst)} x bf16: {worst.name}, {worst.place}" if worst else ""
            return f"pass: {len(self.rows)} rows{most}"
        count = len(self.failing)
        lines = [f"FAIL: {count} of {len(self.rows)} rows differ", *table(self.failing[:PRINTED])]
        if count > PRINTED:
            lines.append(f"{PRINTED} of {count} failing rows shown; all are in .failing")
        return "\n".join(lines)


def times(row: Row) -> str:
    """The error of a row as a multiple of bfloat16's, with three digits."""
    return "inf" if row.x_bf16 >= MOST else f"{row.x_bf16:.3g}"


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a table: a header, then one for each row."""
    lines = [f"{'':4}  {'x bf16':>8}  {'max |d|':>8}  {'rel rms':>8}  node, shape and place"]
    for row in rows:
        verdict = "ok" if row.passed else "DIFF"
        most = "inf" if row.max_abs >= MOST else f"{row.max_abs:.2e}"
        broken = f", {row.nonfinite} not finite" if row.nonfinite else ""
        flips = f", {counted(row.flips, 'token')} with other experts" if row.flips else ""
        lines.append(
            f"{verdict:4}  {times(row):>8}  {most:>8}  {row.rel_rms:>8.2e}  "
            f"{row.name} {row.shape}, {row.place}{broken}{flips}"
        )
    return lines


def place_of(
    tensor: str, index: Sequence[int], shape: Sequence[int], span: Sequence[int]
) -> tuple[int | None, list[int]]:
    """The position in the sequence of one element of a node's tensor, and its other indices.

    tensor, span: as in `Row`. Without a span, the pass begins with the first token.

    Outputs have the shape [N, ...] or [B, T, ...]. Keys, values and their scales have [B, G, P, ...]
    and begin with the first token of the sequence. conv has [B, taps - 1, C] and ends with the last
    token of the pass. recurrent has [B, HV, K, V].
    """
    axis = 0 if len(shape) <= 2 else 1
    first, end = span or (0, shape[axis])
    if tensor == "recurrent":
        return None, list(index[1:])
    if tensor == "conv":
        position = end - shape[1] + index[1]
        return position if position >= 0 else None, list(index[2:])  # before the first token: zeros
    if tensor != "output":
        return index[2], [index[1], *index[3:]]
    return first + index[axis], list(index[axis + 1 :])


class Judge:
    """Collects comparisons of [oracle, yardstick, candidate]."""

    def __init__(self, mode: Mode = "local", experts: int = 0) -> None:
        self.mode, self.experts = mode, experts
        self.rows: dict[tuple[str, str, str], Row] = {}
        # By row, the sums of squares of the oracle, its rounding, the yardstick's errors and the
        # candidate's.
        self.squares: dict[tuple[str, str, str], Tensor] = {}
        self.tokens = Tokens()
        self.unmatched: set[str] = set()

    def add(
        self,
        node: str,
        tensor: str,
        phase: str,
        results: list[Any],
        unsure: Tensor | None = None,
        span: Sequence[int] = (),
    ) -> Row:
        """Add a node's tensor of one pass. results: one tensor per side. unsure [N]: tokens to
        leave out. span: the first token of the pass, and the one after the last."""
        key = node, tensor, phase
        row = self.rows.setdefault(key, Row(*key))
        oracle, rough, tested = (result.double() for result in results)
        if tested.numel() == oracle.numel():  # another library may have other axes
            tested = tested.reshape(oracle.shape)
        row.shape = row.shape or list(tested.shape)
        if tested.shape != oracle.shape:
            row.max_abs, row.shape, row.span = MOST, list(tested.shape), list(span)
        if tested.shape != oracle.shape or not oracle.numel():  # a state before its first token
            return row
        kept = torch.ones_like(oracle, dtype=torch.bool)
        if unsure is not None:
            kept.view(len(unsure), -1)[unsure] = False
            row.unsure += int(unsure.sum())
        row.elements += int(kept.sum())
        broken = ~tested.isfinite() & oracle.isfinite() & kept
        row.nonfinite += int(broken.sum())
        error, rough_error = (((t - oracle) * kept).abs() for t in (tested, rough))
        error = error.where(~broken, MOST).where(kept, 0.0)
        outputs = oracle.where(kept, 0.0)
        half_ulp = torch.finfo(results[2].dtype).eps / 2
        floor = half_ulp * outputs.abs().max().item()
        of_bf16 = rough_error.max().item()
        row.bf16, row.floor = max(row.bf16, of_bf16), max(row.floor, floor)
        most, at = error.flatten().max(0)
        if most.item() > row.max_abs or not (row.worst or row.max_abs):
            row.max_abs, row.shape, row.span = most.item(), list(oracle.shape), list(span)
            row.worst = [int(i) for i in torch.unravel_index(at, oracle.shape)]
            row.position, row.channel = place_of(tensor, row.worst, row.shape, span)
        unit = max(of_bf16, floor, torch.finfo(torch.float64).tiny)
        bins = (error / unit).log2().floor().clamp(-16, BINS - 17).add(16).long()
        counts = bins[kept].bincount(minlength=BINS).tolist()
        row.histogram = [held + count for held, count in zip(row.histogram, counts, strict=True)]
        parts = outputs, half_ulp * outputs, rough_error, error.clamp(max=1e150)
        squares = torch.stack([part.square().sum() for part in parts])
        self.squares[key] = self.squares.get(key, 0.0) + squares
        return row

    def add_choice(
        self,
        node: str,
        phase: str,
        results: list[Any],
        gap: Tensor,
        unsure: Tensor,
        span: Sequence[int] = (),
    ) -> None:
        """Add a router's outputs in one pass: experts [N, k] and weights [N, k] on each side.

        They are compared as weights of all experts [N, E]. Tokens with other experts than the oracle's
        are counted. gap: [N], the gap of each token as in `Row.margin`.
        """
        dense = [
            weights.new_zeros(len(weights), self.experts).scatter_(1, chosen, weights)
            for chosen, weights in results
        ]
        row = self.add(node, "output", phase, dense, unsure, span)
        if dense[2].shape == dense[0].shape:
            _, k = results[0][0].shape
            # The weights of experts that were not chosen are zeros on all sides.
            row.elements -= int((~unsure).sum()) * (self.experts - k)
            flipped = ((dense[0] != 0) != (dense[2] != 0)).any(-1)
            row.flips += int(flipped.sum())
            row.margin = max(row.margin, gap.where(flipped, 0.0).max().item())

    def add_states(self, node: str, phase: str, states: Any, span: Sequence[int] = ()) -> None:
        """Add the tensors of one state on each side."""
        of_sides: list[dict[str, Tensor]] = [state.tensors() for state in states]
        for name in of_sides[0]:
            self.add(node, name, phase, [tensors[name] for tensors in of_sides], span=span)

    def add_tokens(self, oracle: Tensor, tested: Tensor) -> None:
        """Compare the likeliest tokens of logits [B, T, V] of the next positions."""
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
        """Judge every row, and sort the rows, worst first."""
        for key, row in self.rows.items():
            of_oracle, *roots = self.squares.get(key, torch.zeros(4)).sqrt().tolist()
            row.bf16_rms, row.rel_rms = (
                root / of_oracle if of_oracle else 0.0 for root in roots[1:]
            )
            is_free = self.mode == "free" and row.max_abs < MOST
            floor, bf16, error = roots if is_free else (row.floor, row.bf16, row.max_abs)
            unit = max(floor, bf16)
            row.x_bf16 = min(error / unit, MOST) if unit else MOST * bool(error)
            too_few = is_free and row.elements < FEWEST
            row.passed = (error <= 2 * bf16 + floor or too_few) and not row.nonfinite
            if row.max_abs == MOST:
                row.x_bf16, row.passed = MOST, False
        failing = {row.node for row in self.rows.values() if not row.passed}

        def place(row: Row) -> tuple[bool, bool, float]:
            explained = any(node.startswith(f"{row.node}.") for node in failing)
            return row.passed, explained, -row.x_bf16

        return Report(sorted(self.rows.values(), key=place), self.tokens, sorted(self.unmatched))
