"""The router's part of `tools.bench hip_port`: checks and planted faults of fast/kernels/router.hip."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fast import router_hip
from fast.hip import HipLaunch
from fast.hip_compiler import ARCHITECTURE
from fast.launch import Scratch
from fast.linear import Stream
from fast.router import Choice, Router
from qwen35.progress import steps
from tools import cuda_port
from tools.bench import gpu, mixture, report, router
from tools.bench.port_faults import BATCH, Fault, ended, plant, tell
from tools.bench.router import Chosen, Sizes
from tools.cuda_port import PortLaunch, ported

TRITON, PORT = "router: Triton", "router: the HIP kernel's port"
# Sizes with one split and with several, tiles that are not full, and streamers without columns.
OTHERS = (
    (Sizes(24, 5, 16), 1152),
    (Sizes(130, 10, 0), 1024),
    (Sizes(256, 8, 512), 2048),
    (Sizes(11, 11, 3), 96),
)

STREAMED = "    stream(lds, a, tile, split, wave, lane);\n    meet();\n"
RAISED = "(before + 1) % (TILES * SPLITS) == 0"
FAULTS = (
    Fault("no fault", ()),
    Fault(
        "no release: a workgroup counted before its sums are stored",
        (('__builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");\n  u64 before', "u64 before"),),
    ),
    Fault(
        "no acquire: sums read as they were cached before the count",
        (('__builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");\n  choose', "choose"),),
    ),
    Fault("the last workgroup but one chooses", ((RAISED, RAISED.replace("1", "2")),)),
    Fault("the first workgroup chooses", ((RAISED, "before % (TILES * SPLITS) == 0"),)),
    Fault("the count of the first launch alone", ((RAISED, "before + 1 == TILES * SPLITS"),)),
    Fault(
        "a workgroup counted twice",
        (("__hip_atomic_fetch_add(counter, 1,", "__hip_atomic_fetch_add(counter, 2,"),),
    ),
    Fault(
        "one barrier too few before the sums are added",
        (
            ("    meet();  // the streamers' sums are there\n", ""),
            (STREAMED, STREAMED.replace("    meet();\n", "")),
        ),
    ),
    Fault(
        "one barrier too few before the choice",
        (("  meet();  // the messenger knows whether this workgroup is the last\n", ""),),
    ),
)


class Held(NamedTuple):
    """Copies of what a launch wrote, as in `fast.router.Choice`."""

    experts: Tensor
    weights: Tensor
    parts: Tensor

    @classmethod
    def of(cls, choice: Choice) -> "Held":
        return cls(choice.experts.clone(), choice.weights.clone(), choice.parts.clone())

    def differs(self, choice: Choice) -> Tensor:
        """Whether any bit differs, as a tensor on the card. NaNs are compared by their bits too."""
        pairs = zip(self, (choice.experts, choice.weights, choice.parts), strict=True)
        return torch.stack(
            [(a.view(torch.int32) != b.view(torch.int32)).any() for a, b in pairs]
        ).any()


class Subject:
    """The port with a router's weight, on one card; its launches share their buffers and the counter."""

    def __init__(self, weight: Tensor, sizes: Sizes, source: Path | None = None) -> None:
        self.router = Router(weight, sizes.E, sizes.k, True, ARCHITECTURE, "hip")
        self.sizes, self.source, self.device = sizes, source, weight.device
        self.scratch, self.launched = Scratch(weight.device), 0
        self.last: PortLaunch | None = None

    def launch(self, x: Tensor | Stream) -> tuple[PortLaunch, Choice]:
        value, choice = self.router.launch(x, self.scratch)
        assert isinstance(value, HipLaunch)
        return ported(value, self.source), choice

    def __call__(self, x: Tensor | Stream) -> Choice:
        launch, choice = self.launch(x)
        self.run(launch)
        return choice

    def run(self, launch: PortLaunch) -> None:
        launch()
        self.last, self.launched = launch, self.launched + 1

    def choose(self, x: Tensor) -> Chosen:
        """As `router.check` takes it."""
        return router.outputs(self(x), self.sizes)

    def settled(self) -> list[str]:
        """Wait for all launches. A finding if the counter does not stand where so many leave it."""
        assert self.last is not None
        ended(self.last.name)
        columns, splits, _ = self.last.grid
        counted, wanted = int(self.last.arguments["counter"][0]), self.launched * columns * splits
        if counted != wanted:
            return [f"counter: {counted} after {self.launched} launches, not {wanted}"]
        return []


def stream_of(x: Tensor, generator: torch.Generator) -> Stream:
    """Rows to be normalised, whose squares are in several parts; those of rows that are not there are
    NaN."""
    squares = torch.full((5, 16), torch.nan, device=x.device)
    squares[:, : len(x)] = torch.rand(5, len(x), device=x.device, generator=generator) * x.shape[1]
    return Stream(x, x, squares, 1e-6)


def normalised(
    subject: Subject, weight: Tensor, x: Tensor, generator: torch.Generator
) -> list[str]:
    """Findings on the sums of rows that are normalised first."""
    stream = stream_of(x, generator)
    mean = stream.squares[:, : len(x)].double().sum(0) / x.shape[1]
    rows = x.double() * (mean + stream.eps).rsqrt()[:, None]
    oracle, rough = (
        rows.to(dtype) @ weight.to(dtype).T for dtype in (torch.float64, torch.bfloat16)
    )
    sums = subject(stream).parts.sum(0)
    return mixture.judged("rows that are normalised first", sums, oracle, rough)[1]


def no_numbers(subject: Subject, x: Tensor) -> list[str]:
    """Findings on a last row that is no number: it has distinct experts, the first ones, and weights of
    NaN; the rows beside it keep their bits."""
    plain, found = Held.of(subject(x)), []
    for value in (torch.nan, -torch.nan, torch.inf):
        changed = x.clone()
        changed[-1, 7] = value
        got = Held.of(subject(changed))
        experts, weights = got.experts[-1].tolist(), got.weights[-1]
        if experts != list(range(subject.sizes.k)) or not weights.isnan().all():
            found.append(f"a row with {value}: experts {experts}, weights {weights.tolist()}")
        same = (
            torch.equal(got.experts[:-1], plain.experts[:-1]),
            torch.equal(got.weights[:-1], plain.weights[:-1]),
            torch.equal(got.parts[:, :-1], plain.parts[:, :-1]),
        )
        if not all(same):
            found.append(f"a row with {value} changes the bits of the rows beside it")
    return found


def check(
    subject: Subject, weight: Tensor, x: Tensor, generator: torch.Generator
) -> tuple[float, list[str]]:
    """The largest error as a multiple of bfloat16's, and findings."""
    worst, failed = router.check(subject.choose, weight, x, subject.sizes)
    failed += normalised(subject, weight, x, generator) + no_numbers(subject, x)
    return worst, failed + subject.settled()


def various(x: Tensor, generator: torch.Generator) -> list[Tensor | Stream]:
    """One to all rows, rows that are normalised first, and one that is no number."""
    changed = x.clone()
    changed[0, 7] = torch.nan
    return [*(x[:n] for n in range(1, len(x) + 1)), stream_of(x, generator), changed]


def endure(
    subject: Subject,
    inputs: list[Tensor | Stream],
    wanted: list[Held],
    launches: int,
    *,
    poisoned: bool = False,
) -> list[str]:
    """Findings of so many launches, one right after the other: outputs and the counter. poisoned: what
    a launch writes is overwritten before each."""
    bad = torch.zeros((), dtype=torch.int64, device=subject.device)
    found: list[str] = []
    made = [subject.launch(x) for x in inputs]
    for first in range(0, launches, BATCH):
        for at in range(first, min(first + BATCH, launches)):
            number = at % len(made)
            launch, choice = made[number]
            if poisoned:
                choice.experts.fill_(-1)
                choice.weights.fill_(torch.nan)
                choice.parts.fill_(torch.nan)
            subject.run(launch)
            # Otherwise nothing runs between two launches; each input is compared once in so many rounds.
            if poisoned or at % (len(made) + 1) == 0:
                bad += wanted[number].differs(choice)
        if found := subject.settled():
            break
    if wrong := int(bad):
        found.append(f"bits: {wrong} outputs of {subject.launched} launches differ")
    return found


def examine(
    name: str, sizes: Sizes, D: int, args: argparse.Namespace, generator: torch.Generator
) -> list[str]:
    """Findings of all checks at one size."""
    weight = router.random_weight(sizes, D, generator)
    x = torch.randn(args.rows, D, device=weight.device, generator=generator).bfloat16()
    subject = Subject(weight, sizes)
    worst, wrong = check(subject, weight, x, generator)
    if not wrong:
        inputs = various(x, generator)
        wanted = [Held.of(subject(one)) for one in inputs]
        wrong = endure(subject, inputs, wanted, args.launches)
    tell(
        f"{name}: {worst:.3g} times bfloat16's error, {subject.launched} launches, "
        f"{len(wrong)} findings"
    )
    return [f"{name}: {line}" for line in wrong]


def faults(
    sizes: Sizes, D: int, args: argparse.Namespace, generator: torch.Generator
) -> list[tuple[Fault, list[str]]]:
    """What `args.fault_launches` launches find of each fault."""
    weight = router.random_weight(sizes, D, generator)
    x = torch.randn(args.rows, D, device=weight.device, generator=generator).bfloat16()
    inputs, plain = various(x, generator), Subject(weight, sizes)
    wanted = [Held.of(plain(one)) for one in inputs]
    found: list[tuple[Fault, list[str]]] = []
    for fault in steps(FAULTS, "faults of the router"):
        with tempfile.TemporaryDirectory() as folder:
            source = plant(fault, router_hip.SOURCE, Path(folder))
            subject = Subject(weight, sizes, source)
            lines = endure(subject, inputs, wanted, args.fault_launches, poisoned=True)
            if not lines:
                lines = endure(subject, inputs, wanted, args.fault_launches)
        found.append((replace(fault, name=f"router, {fault.name}"), lines))
        tell(f"{found[-1][0].name}: {lines[0] if lines else 'nothing found'}")
    return found


def timed(
    tp: int, args: argparse.Namespace, device: torch.device, read: float, generator: torch.Generator
) -> list[report.Row]:
    """The port's time beside the Triton kernel's, over copies of the weights that exceed the cache."""
    sizes, D = Sizes(args.experts, args.top_k, mixture.intermediate(tp)), mixture.HIDDEN
    weight = router.random_weight(sizes, D, generator)
    number = router.copies(weight.nbytes, gpu.cache_bytes(device))
    weights = [weight, *(router.random_weight(sizes, D, generator) for _ in range(number - 1))]
    x = torch.randn(args.rows, D, device=device, generator=generator).bfloat16()
    graphs = {
        TRITON: gpu.Graph([router.launch(one, x, sizes, cuda_port.TARGET) for one in weights]),
        PORT: gpu.Graph([Subject(one, sizes).launch(x)[0] for one in weights]),
    }
    passes = [
        {name: graph.microseconds(args.repeats) for name, graph in graphs.items()} for _ in range(2)
    ]
    return [
        {"name": name, "tp": tp}
        | gpu.figures(passes[0][name], passes[1][name], weight.nbytes, read)
        for name in graphs
    ]
