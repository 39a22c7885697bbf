"""Time to first token against the length of a kept prefix: cold and hit, with equal bits.

A prompt is a prefix of whole blocks and a tail of 17 tokens, and one token is generated. Cold runs keep
nothing, keep the prefix in memory, or in a new folder. `total_ms` goes on until it is kept; that comes
after the first token is out and takes `keep_ms`. Hits come from memory, or from a folder that is opened
anew, so that its checks are paid (its files are in the page cache). All runs of a length take turns,
after a check that their bits are equal.

Where a hit's time goes, timed apart: `begin_ms` finds what is kept, and from a folder also reads and
checks it, `restore_ms` copies it, `tail_ms` is the pass over the tail. `floor_ms` is that pass and
`copy_ms`, a plain copy of as many bytes into memory that is already there.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from qwen35.cli import Parser
from qwen35.errors import InputError
from qwen35.generation import Generation, prefill
from qwen35.load import load, locate
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import Folder
from qwen35.prefix.keys import fingerprint, identity
from qwen35.progress import steps
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from reference.linear import GRID
from reference.model import Model
from tools.bench import report
from tools.bench.language import HELDOUT
from weights.storage import whole

TAIL = 17  # tokens behind the prefix
DRAFTS = 3
CHUNK = 2048
LONG = 4096  # tokens, from which on a cold run is repeated less often
BUDGET = 1 << 40  # bytes: nothing is evicted

COLD, COLD_MEMORY, COLD_FOLDER = "cold", "cold, kept in memory", "cold, kept in a folder"
HIT_MEMORY, HIT_FOLDER = "hit in memory", "hit from a folder"

# Milliseconds by tokens: quoted, not measured here.
ARTICLE = "article, 397B on eight MI355X"
QUOTED = {16_000: 150.0, 50_000: 190.0, 100_000: 428.0, 196_000: 730.0}

Opener = Callable[[], PrefixCache | None]


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    parser.add_model()
    add("--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384, 32000],
        metavar="N", help=f"of the prefix, in tokens: multiples of {GRID}")  # fmt: skip
    add("--repeats", type=int, default=5)
    add("--cold-repeats", type=int, default=2, help=f"of cold runs from {LONG} tokens on")
    parser.set_defaults(threads=2)
    add("--plot", type=Path, metavar="FILE", help="also draw it: .svg or .png")


@dataclass(frozen=True)
class Subject:
    """The model that is timed, and the `fingerprint` of its files."""

    model: Model
    checkpoint: str

    def in_memory(self) -> PrefixCache:
        return PrefixCache(self.model, budget=BUDGET, warn=_stop)

    def in_folder(self, folder: Path) -> PrefixCache:
        store = Folder(folder, identity(self.model, self.checkpoint))
        return PrefixCache(
            self.model, budget=BUDGET, store=store, checkpoint=self.checkpoint, warn=_stop
        )

    def in_new_folder(self, folder: Path) -> PrefixCache:
        """What the run before has left there goes, outside of what is timed."""
        shutil.rmtree(folder, ignore_errors=True)
        return self.in_folder(folder)

    def first_token(
        self, ids: list[int], kept: PrefixCache | None, *, digest: bool = False
    ) -> tuple[Generation, float]:
        """A generation of one token that has ended, and its seconds until all is kept."""
        generation = Generation(
            self.model, ids, 1, Sampling(), frozenset(), DRAFTS, CHUNK, kept, digest
        )
        started = time.perf_counter()
        for _ in generation:
            pass
        return generation, time.perf_counter() - started

    @torch.inference_mode()
    def parts(self, ids: list[int], kept: PrefixCache) -> dict[str, float]:
        """Seconds of what a hit consists of, done as `Generation` does it."""
        cache, room = self.model.new_cache(), len(ids) + 1 + DRAFTS
        started = time.perf_counter()
        reuse = kept.begin(ids, draft=True)
        found = time.perf_counter()
        hidden = kept.restore(reuse, cache, room=room, draft=True)
        restored = time.perf_counter()
        prefill(self.model, ids, cache, chunk=CHUNK, draft=True, hidden=hidden)
        ended = time.perf_counter()
        kept.release(reuse)
        return {"begin": found - started, "restore": restored - found, "tail": ended - restored}


def _stop(line: str) -> NoReturn:
    """What the cache goes on without is no measurement."""
    raise InputError(f"prefix cache: {line}")


def at_length(
    subject: Subject, ids: list[int], *, repeats: int, cold_repeats: int
) -> list[report.Row]:
    """All rows of one prompt, after the check of its bits; that check is also the warm-up."""
    length = len(ids) - TAIL
    with tempfile.TemporaryDirectory() as base:
        kept, folder = subject.in_memory(), Path(base, "kept")
        hits: dict[str, Callable[[], PrefixCache]] = {
            HIT_MEMORY: lambda: kept,
            HIT_FOLDER: lambda: subject.in_folder(folder),
        }
        check(subject, ids, hits)
        nbytes = {
            HIT_MEMORY: sum(segment.nbytes for segment in kept.store.segments().values()),
            HIT_FOLDER: sum(file.stat().st_size for file in folder.iterdir()),
        }
        colds: dict[str, Opener] = {
            COLD: lambda: None,
            COLD_MEMORY: subject.in_memory,
            COLD_FOLDER: lambda: subject.in_new_folder(Path(base, "new")),
        }
        first: dict[str, list[float]] = {name: [] for name in (*colds, *hits)}
        total: dict[str, list[float]] = {name: [] for name in (*colds, *hits)}
        parts: dict[str, list[dict[str, float]]] = {name: [] for name in hits}
        copies: list[float] = []
        flat, there = torch.ones(2, nbytes[HIT_MEMORY], dtype=torch.uint8)
        for i in range(repeats):
            # Fewer cold rounds than hits, if so, are spread evenly among them.
            cold = i * cold_repeats % repeats < cold_repeats
            for name, opened in {**(colds if cold else {}), **hits}.items():
                generation, seconds = subject.first_token(ids, opened())
                first[name].append(generation.ttft_s)
                total[name].append(seconds)
            for name, opened in hits.items():
                parts[name].append(subject.parts(ids, opened()))
            started = time.perf_counter()
            there.copy_(flat)
            copies.append(time.perf_counter() - started)

    def row(name: str) -> report.Row:
        return {"name": name, "prefix_tokens": length} | report.spread(first[name])

    rows = [row(COLD) | {"total_ms": _ms(total[COLD])}]
    for name, kind in ((COLD_MEMORY, HIT_MEMORY), (COLD_FOLDER, HIT_FOLDER)):
        cost = {
            "total_ms": _ms(total[name]),
            "keep_ms": _ms([t - f for t, f in zip(total[name], first[name], strict=True)]),
            "cost_of_cache": _ms(total[name]) / _ms(total[COLD]),
            "kept_bytes": nbytes[kind],
        }
        rows.append(row(name) | cost)
    tails = [taken["tail"] for name in hits for taken in parts[name]]  # the same work, both
    floor = {"copy_ms": _ms(copies), "floor_ms": _ms(copies) + _ms(tails)}
    for name in hits:
        of_parts = {f"{p}_ms": _ms([taken[p] for taken in parts[name]]) for p in parts[name][0]}
        ratio = {"cold_over_hit": _ms(first[COLD]) / _ms(first[name])}
        rows.append(row(name) | {"kept_bytes": nbytes[name]} | ratio | of_parts | floor)
    return rows


def check(subject: Subject, ids: list[int], hits: dict[str, Callable[[], PrefixCache]]) -> None:
    """Fill what hits come from; cold or hit, the token and the bits of its logits are the same."""
    plain, _ = subject.first_token(ids, None, digest=True)
    for name, opened in hits.items():
        for cached in (0, len(ids) - TAIL):
            one, _ = subject.first_token(ids, opened(), digest=True)
            assert one.cached_tokens == cached, f"{name}: {one.cached_tokens}, not {cached}"
            assert one.token_ids == plain.token_ids, f"{name}, {cached} cached: another token"
            assert one.logits_sha256 == plain.logits_sha256, f"{name}, {cached} cached: other bits"


def _ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def main(args: argparse.Namespace) -> int:
    if args.plot:
        _check_plot(args.plot)
    for name, count in (("repeats", args.repeats), ("cold-repeats", args.cold_repeats)):
        if count < 1:
            raise InputError(f"--{name} {count}; expected at least 1")
    folder = locate(args.model)
    model = load(folder)
    longest = (model.config.max_position_embeddings - TAIL - 1) // GRID * GRID
    for length in args.lengths:
        if length % GRID or not 0 < length <= longest:
            raise InputError(
                f"length {length}; expected a multiple of {GRID}, at most {longest}: {TAIL} tokens "
                f"and the first new one follow, the context is {model.config.max_position_embeddings}"
            )
    text = Tokenizer(folder).encode(HELDOUT.read_text(encoding="utf-8"))
    subject = Subject(model, fingerprint(folder))
    rows: list[report.Row] = []
    for length in steps(args.lengths, "lengths"):
        ids = [text[i % len(text)] for i in range(length + TAIL)]
        fewer = min(args.repeats, args.cold_repeats) if length >= LONG else args.repeats
        rows += at_length(subject, ids, repeats=args.repeats, cold_repeats=fewer)
    for length, quoted in QUOTED.items():
        rows.append({"name": ARTICLE, "prefix_tokens": length, "median_ms": quoted, "quoted": True})
    config = {
        "model": args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tail_tokens": TAIL,
        "draft_tokens": DRAFTS,
        "prefill_chunk": CHUNK,
        "repeats": args.repeats,
        "cold_repeats_when_long": args.cold_repeats,
    }
    report.emit("ttft", config, rows, only_json=args.json)
    if args.plot:
        label = "the embedded model" if args.model == "tiny" else Path(args.model).name
        plot(rows, args.plot, label)
    return 0


def _check_plot(file: Path) -> None:
    """InputError, before anything is measured, when there would be no plot at the end."""
    if file.suffix not in (".svg", ".png"):
        raise InputError(f"{file}: a plot ends with .svg or .png")
    if not file.parent.is_dir():
        raise InputError(f"{file}: {file.parent} is no folder")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"{file}: cannot be written")
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("matplotlib is not installed; pip install -e '.[plot]'") from None


def plot(rows: list[report.Row], file: Path, model: str) -> None:
    """Medians by length, both axes logarithmic, with the range of the runs as bars."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    from matplotlib.ticker import NullLocator  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    looks = {
        COLD: ("o-", "#b2432f", COLD),
        HIT_FOLDER: ("s-", "#c98a1b", HIT_FOLDER),
        HIT_MEMORY: ("^-", "#2a6f97", HIT_MEMORY),
        ARTICLE: ("D", "#555555", f"{ARTICLE} (quoted)"),
    }
    for name, (look, color, label) in looks.items():
        points = [row for row in rows if row["name"] == name]
        middle = [row["median_ms"] for row in points]
        low = [row["median_ms"] - row.get("min_ms", row["median_ms"]) for row in points]
        high = [row.get("max_ms", row["median_ms"]) - row["median_ms"] for row in points]
        axes.errorbar(
            [row["prefix_tokens"] for row in points], middle, yerr=[low, high],
            fmt=look, color=color, label=label, capsize=3, markersize=5,
        )  # fmt: skip
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.06)
    axes.set_xlabel(f"prefix (tokens); {TAIL} more follow; lines: {model}")
    axes.set_ylabel("time to first token (ms)")
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    with whole(file) as unfinished:
        figure.savefig(unfinished, dpi=200, format=file.suffix.removeprefix("."))
