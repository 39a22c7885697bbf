"""Check on an NVIDIA card how the workgroups of the HIP kernels depend on each other.

The same sources, fast/kernels/moe.hip and router.hip, are built for sm_90 by fast/kernels/port_sm90.h:
the barrier, the counters with their epochs, the fences and the order of the tasks are those of gfx950;
the arithmetic is the port's.

At each size the error is compared with a float64 oracle, and the bits with those of a repeated launch, of
rows alone and (experts) of grids of other sizes, for ordinary and for unusual routings and rows. Then
come --launches launches, one right after the other; every few outputs are compared, and the counters.
Then faults are planted in the synchronisation at the first size, and the table says which of them
--fault-launches launches find: a fence that is left out may have no effect on this card. Last, the
kernels are timed beside Triton's, which says nothing about gfx950. The exit status is 1 if a kernel
without a fault has a finding.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fast import moe_hip
from fast.launch import Scratch
from fast.moe import Experts
from qwen35.cli import Parser, at_least_one, at_least_zero
from qwen35.errors import InputError
from qwen35.progress import steps
from tools import cuda_port
from tools.bench import gpu, mixture, moe, port_router, report
from tools.bench.mixture import Case, Weights
from tools.bench.port_faults import BATCH, Fault, ended, plant, tell
from tools.bench.router import Sizes
from tools.cuda_port import PortLaunch, ported

TRITON, PORT = "Triton, two launches", "the HIP kernel's port, one launch"
PATIENCE = 100_000_000  # ns after which a kernel with a planted fault gives a wait up
COMPARED = 5  # about every fifth output of plain launches is compared


FETCH = "if (gates < downs) fetch(lds, gates % 2, a, task(gates), epochs, lane);"
LAST_GATE = "if (gates > 0) publish_gate(lds, (gates - 1) % 2, a, task(gates - 1), inverse, lane);"
FAULTS = (
    Fault("no fault", ()),
    Fault(
        "no release: a counter raised before the stores are done",
        (('__builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");', ""),),
    ),
    Fault(
        "no acquire: data read as it was cached before the wait",
        (
            (
                '__builtin_amdgcn_s_sleep(1);\n  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");',
                "__builtin_amdgcn_s_sleep(1);",
            ),
        ),
    ),
    Fault(
        "no fence between the messenger's wait and the streamers' sums",
        (('__builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");', ""),),
    ),
    Fault("down does not wait", (("wait_for(arrived(a, task.u), epochs * GATE_BLOCKS);", ""),)),
    Fault(
        "down waits for one block of gate-up less",
        (("epochs * GATE_BLOCKS);", "epochs * GATE_BLOCKS - 1);"),),
    ),
    Fault(
        "the sum waits for one expert less",
        (("epochs * MAX_PAIRS);", "epochs * MAX_PAIRS - 1);"),),
    ),
    Fault(
        "the sum does not wait",
        (("stored(a, block * SUMMED / COLUMNS), epochs", "stored(a, 0), 0 * epochs"),),
    ),
    Fault(
        "the epoch is not counted",
        (("if (lane == 0) *epoch(a, workgroup) = epochs;", ""),),
    ),
    Fault(
        "nobody arrives for experts that are not in the list",
        (("add(arrived(a, u), GATE_BLOCKS);", ";"),),
    ),
    Fault(
        "one buffer of hidden rows instead of two",
        (("fetch(lds, (i + 1) % 2", "fetch(lds, i % 2"),),
        workgroups=3,
    ),
    Fault(
        "one buffer of sums instead of two",
        (
            ("gate_task(lds, i % 2, w[b]", "gate_task(lds, 0, w[b]"),
            ("publish_gate(lds, (i - 1) % 2", "publish_gate(lds, 0"),
            ("publish_gate(lds, (gates - 1) % 2", "publish_gate(lds, 0"),
        ),
        workgroups=3,
    ),
    Fault(
        "a deadlock: one block more than there are",
        (("epochs * GATE_BLOCKS);", "epochs * GATE_BLOCKS + 1);"),),
    ),
    Fault(
        "a deadlock: the last down task is not published",
        (
            (
                "if (gates < i && i <= downs) publish_down",
                "if (gates < i && i < downs) publish_down",
            ),
        ),
    ),
    Fault(
        "a deadlock: waits for a task that it has not published",
        ((LAST_GATE, ""), (FETCH, f"{FETCH}\n  {LAST_GATE}")),
        workgroups=1,
    ),
)


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--tp", type=int, nargs="+", default=[8, 4, 2, 1], metavar="N",
        help="check the shapes of one of N ranks, which share each expert (default: 8 4 2 "
        "1)")  # fmt: skip
    mixture.add_sizes(parser)
    add("--repeats", type=int, default=50, metavar="R",
        help="time R replays of each graph (default: 50)")  # fmt: skip
    add("--launches", type=at_least_one, default=5000, metavar="N",
        help="run N launches, one right after the other, at each size (default: 5000)")  # fmt: skip
    add("--fault-launches", type=at_least_zero, default=300, metavar="N",
        help="run N launches with each planted fault; 0 plants none (default: 300)")  # fmt: skip


class Subject:
    """The port with experts' weights, on one card; its launches share their buffers and counters."""

    def __init__(
        self,
        weights: Weights,
        *,
        workgroups: int | None = None,
        source: Path | None = None,
        packed: Experts | None = None,
        **sizes: int,
    ) -> None:
        self.packed = packed or Experts.from_tensors(*weights.tensors, target="gfx950")
        self.device = weights.down.device
        self.workgroups = workgroups or moe_hip.workgroups_of(self.device)
        self.source, self.sizes = source, sizes
        self.scratch, self.launched = Scratch(self.device), 0
        self.last: PortLaunch | None = None

    def launch(self, case: Case) -> tuple[PortLaunch, Tensor]:
        value, out = moe_hip.launch(
            self.packed, case.x, case.experts, case.shares, self.scratch, workgroups=self.workgroups
        )
        return ported(value, self.source, **self.sizes), out

    def __call__(self, case: Case) -> Tensor:
        launch, out = self.launch(case)
        self.run(launch)
        return out

    def run(self, launch: PortLaunch) -> None:
        launch()
        self.last, self.launched = launch, self.launched + 1

    def settled(self) -> list[str]:
        """Wait for all launches. Findings: waits that were given up, counters that do not stand where
        so many launches leave them. Ends the process if a launch does not end."""
        assert self.last is not None
        ended(self.last.name)
        if stuck := self.last.given_up():
            return [f"stuck: {stuck}"]
        counters = self.last.arguments["counters"][:, 0].tolist()
        arrived, others = counters[: cuda_port.MAX_PAIRS], counters[cuda_port.MAX_PAIRS :]
        stored = self.launched * cuda_port.MAX_PAIRS
        epochs = [n for n in others if n not in (0, stored)]
        fits = len(set(arrived)) == 1 and arrived[0] and arrived[0] % self.launched == 0
        if not fits or epochs != [self.launched] * self.workgroups:
            return [
                f"counters: {sorted(set(arrived))}, {sorted(set(others))} in {self.launched} launches"
            ]
        return []


def unusual(
    rows: int, D: int, E: int, k: int, generator: torch.Generator
) -> Iterator[tuple[str, Case]]:
    """Cases whose rows choose the same experts, one expert alone, different ones, one twice."""
    some = torch.randperm(E, device=generator.device, generator=generator)
    twice = some[:k].repeat(rows, 1)
    twice[:, -1] = twice[:, 0]
    ends = torch.tensor([0, E - 1] * k, device=generator.device)[:k].expand(rows, k)
    different = some[: rows * k].view(rows, k) if rows * k <= E else None
    for name, ids in (
        ("the same", some[:k].repeat(rows, 1)),
        ("one", some[:1].expand(rows, k)),
        ("different", different),
        ("one twice", twice),
        ("the first and the last", ends),
    ):
        if ids is not None:
            case = mixture.random_case(rows, D, E, k, generator)
            yield name, replace(case, experts=ids.int().contiguous())


def check(
    subject: Subject, weights: Weights, args: argparse.Namespace, generator: torch.Generator
) -> tuple[float, list[str]]:
    """The largest error as a multiple of bfloat16's, and findings."""
    E, D, _ = weights.sizes
    rows, k = args.rows, args.top_k
    cases = mixture.check_cases(rows, D, E, k, generator)
    subject(cases[0])
    if failed := subject.settled():  # at once, not after hundreds of launches
        return 0.0, failed
    cases += [case for _, case in unusual(rows, D, E, k, generator)]
    worst, failed = mixture.check(subject, weights, cases)
    for number, case in enumerate(cases):
        plain = subject(case).clone()
        for workgroups in (1, 2, 7, 33, subject.workgroups - 1):
            other = Subject(weights, workgroups=workgroups, packed=subject.packed)
            if not torch.equal(other(case), plain):
                failed.append(f"inputs {number}: other bits with {workgroups} workgroups")
            failed += other.settled()
    case = cases[0]
    plain = subject(case).clone()
    ids, x = case.experts.clone(), case.x.clone()
    ids[0, -1], ids[-1, 0], x[0, 7] = -1, E, torch.nan
    nan = subject(replace(case, experts=ids)).isnan().all(-1).tolist()
    if nan != [row in (0, rows - 1) for row in range(rows)]:
        failed.append(f"ids of no expert: rows of NaN {nan}")
    got = subject(replace(case, x=x))
    if not got[0].isnan().all() or not torch.equal(got[1:], plain[1:]):
        failed.append("a NaN in row 0 does not come out in that row alone")
    return worst, failed + subject.settled()


def endure(
    subject: Subject,
    cases: list[Case],
    wanted: list[Tensor],
    launches: int,
    *,
    poisoned: bool = False,
) -> list[str]:
    """Findings of so many launches, one right after the other: outputs that are not as wanted, and
    counters.

    poisoned: fill the buffers that workgroups pass to each other with NaN before each launch, and
    compare every output. Otherwise nothing runs between most of the launches, and about every fifth
    output is compared, in time those of all cases.
    """
    bad = torch.zeros((), dtype=torch.int64, device=subject.device)
    every = 1 if poisoned else coprime(COMPARED, len(cases))
    found: list[str] = []
    compared = 0
    made = [subject.launch(case) for case in cases]
    for first in range(0, launches, BATCH):
        for at in range(first, min(first + BATCH, launches)):
            number = at % len(cases)
            launch, out = made[number]
            if poisoned:
                for name in ("hidden", "partial"):
                    launch.arguments[name].fill_(torch.nan)
            subject.run(launch)
            if at % every == every - 1:
                bad += (out != wanted[number]).any()
                compared += 1
        if found := subject.settled():
            break
    if wrong := int(bad):
        found.append(f"bits: {wrong} of {compared} compared outputs differ")
    return found


def coprime(least: int, count: int) -> int:
    """The smallest number from `least` on that has no factor in common with `count`, so that every
    so many launches are of each of `count` cases in turn."""
    return next(n for n in range(least, least + count + 1) if math.gcd(n, count) == 1)


def captured(subject: Subject, cases: list[Case], wanted: list[Tensor], launches: int) -> list[str]:
    """Findings of a replayed graph of all cases. Every second output is compared."""
    bad = torch.zeros((), dtype=torch.int64, device=subject.device)

    def one(number: int) -> None:
        out = subject(cases[number])
        if number % 2:
            bad.add_((out != wanted[number]).any())

    before, replays = subject.launched, -(-launches // len(cases))
    graph = gpu.Graph([lambda number=number: one(number) for number in range(len(cases))])
    for _ in range(replays):
        graph.graph.replay()
    subject.launched = before + (1 + replays) * len(cases)  # once before the capture
    found = subject.settled()
    return found + ([f"bits: {int(bad)} outputs of a replayed graph differ"] if int(bad) else [])


def various(args: argparse.Namespace, D: int, generator: torch.Generator) -> list[Case]:
    """Cases of one to all rows, ordinary and unusual."""
    E, k = args.experts, args.top_k
    cases = [mixture.random_case(rows, D, E, k, generator) for rows in range(1, args.rows + 1)]
    return cases + [case for _, case in unusual(args.rows, D, E, k, generator)]


def faults(
    args: argparse.Namespace, weights: Weights, packed: Experts, generator: torch.Generator
) -> list[tuple[Fault, list[str]]]:
    """Each fault, with the findings of the launches of a kernel that has it."""
    cases = various(args, packed.D, generator)
    plain = Subject(weights, packed=packed)
    wanted = [plain(case).clone() for case in cases]
    found: list[tuple[Fault, list[str]]] = []
    for fault in steps(FAULTS, "faults"):
        with tempfile.TemporaryDirectory() as folder:
            source = plant(fault, moe_hip.SOURCE, Path(folder))
            subject = Subject(
                weights,
                workgroups=fault.workgroups,
                source=source,
                packed=packed,
                PATIENCE=PATIENCE,
            )
            lines = endure(subject, cases, wanted, args.fault_launches, poisoned=True)
            if not lines:
                lines = endure(subject, cases, wanted, args.fault_launches)
            found.append((fault, lines))
            tell(f"{fault.name}: {lines[0] if lines else 'nothing found'}")
    return found


def timed(
    tp: int, args: argparse.Namespace, device: torch.device, read: float, generator: torch.Generator
) -> list[report.Row]:
    E, k, D, I = args.experts, args.top_k, mixture.HIDDEN, mixture.intermediate(tp)
    each = mixture.expert_bytes(D, I)
    sets, rotation = mixture.rotation(args.rows, D, E, k, each, gpu.cache_bytes(device), generator)
    moved = mixture.distinct([case for _, case in rotation]) * each
    graphs: dict[str, gpu.Graph] = {}
    weights = [mixture.random_weights(E, D, I, generator) for _ in range(sets)]
    prepare = [moe.ours(one) for one in weights]
    graphs[TRITON] = gpu.Graph([prepare[at](case) for at, case in rotation])
    subjects = [Subject(one) for one in weights]
    launches = [subjects[at].launch(case)[0] for at, case in rotation]
    graphs[PORT] = gpu.Graph(launches)
    passes = [
        {name: graph.microseconds(args.repeats) for name, graph in graphs.items()} for _ in range(2)
    ]
    if stuck := launches[0].given_up():
        raise InputError(f"TP {tp}: {stuck}")
    return [
        {"name": name, "tp": tp} | gpu.figures(passes[0][name], passes[1][name], moved, read)
        for name in graphs
    ]


def main(args: argparse.Namespace) -> int:
    mixture.check_sizes(args.rows, args.experts, args.top_k, args.repeats)
    cuda_port.check_pairs(f"--rows {args.rows} --top-k {args.top_k}", args.rows * args.top_k)
    for tp in args.tp:
        mixture.intermediate(tp)
    device, target = gpu.find()
    if target != cuda_port.TARGET:
        raise InputError(f"the port is built for {cuda_port.TARGET}; this is {target}")
    compiler = cuda_port.find()
    tell(f"{compiler.name} {compiler.version}")
    read = gpu.read_gb_s(device)
    rows: list[report.Row] = []
    failed: list[str] = []
    planted: list[tuple[Fault, list[str]]] = []
    with torch.inference_mode():
        generator = torch.Generator(device).manual_seed(0)
        for sizes, D in port_router.OTHERS:
            name = f"router, {sizes.k} of {sizes.E}, D={D}"
            failed += port_router.examine(name, sizes, D, args, generator)
        for tp in steps(args.tp, "sizes"):
            generator = torch.Generator(device).manual_seed(tp)
            D, I = mixture.HIDDEN, mixture.intermediate(tp)
            weights = mixture.random_weights(args.experts, D, I, generator)
            subject = Subject(weights)
            worst, wrong = check(subject, weights, args, generator)
            tell(f"TP {tp}: {worst:.3g} times bfloat16's error, {len(wrong)} findings")
            if not wrong:
                cases = various(args, D, generator)
                wanted = [subject(case).clone() for case in cases]
                wrong = endure(subject, cases, wanted, args.launches)
                wrong += captured(subject, cases, wanted, args.launches)
                tell(f"TP {tp}: {subject.launched} launches, {len(wrong)} findings")
            sizes, name = Sizes(args.experts, args.top_k, I), f"router, TP {tp}"
            wrong = [f"TP {tp}: {line}" for line in wrong]
            wrong += port_router.examine(name, sizes, D, args, generator)
            failed += wrong
            if not wrong and args.fault_launches and not planted:
                planted = faults(args, weights, subject.packed, generator)
                planted += port_router.faults(sizes, D, args, generator)
            del weights, subject
            torch.cuda.empty_cache()
            if not wrong:
                rows += timed(tp, args, device, read, generator)
                rows += port_router.timed(tp, args, device, read, generator)
                torch.cuda.empty_cache()
    for line in failed:
        tell(line)
    rows += [
        {"name": f"planted: {fault.name}", "found": found[0] if found else "no"}
        for fault, found in planted
    ]
    gpu.emit("hip_port", args, target, device, read, rows, "launches", "fault_launches")
    return 1 if failed or any(found for fault, found in planted if not fault.edits) else 0
