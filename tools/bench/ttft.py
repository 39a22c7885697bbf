"""Measure the time to first token by the length of a cached prefix, cold and with a cache hit.

A prompt is a prefix of whole blocks and a tail of --tail tokens. A tail of 64 tokens or more differs
in each run, because its whole blocks are stored as well. One token is generated. Cold runs
have no prefix cache, or store the prefix in memory or in a new folder. `total_ms` includes the
storing, which follows the first token and takes `keep_ms`. Hits come from memory (the GPU's, if the
model is on one), or from a folder that is opened again, so that its checks are included (its files
are in the page cache). All runs of a length take turns. Before that, their bits are compared, and the
exit status is 1 if they differ.

--model is a checkpoint, by default the embedded one. --config uses random weights and prompts of a
published size on a GPU instead, on the fast path: one rank's slice with --tp ranks, without the
all-reduces between them. The time to compile kernels and to capture the decode round is left out.

The parts of a hit are timed separately. `begin_ms` finds the stored prefix; with a folder it also
reads and checks it. `restore_ms` copies it, and `tail_ms` is the pass over the tail. `floor_ms` is
the sum of `tail_ms` and `copy_ms`, a plain copy of as many bytes into allocated memory of the
model's device.
"""

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from qwen35.cache import KV_CACHE_DTYPES
from qwen35.cli import Parser, at_least_one, device, output_file
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.generation import Generation, prefill
from qwen35.load import load, locate
from qwen35.paths import PATHS
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import Folder
from qwen35.prefix.keys import fingerprint, identity
from qwen35.progress import steps
from qwen35.sampling import Sampling
from qwen35.step_decoder import finish_prompt, prepared, runs_as_step
from qwen35.tokenizer import Tokenizer
from reference.linear import GRID
from reference.model import Model
from tools.bench import gpu, report
from tools.bench.language import HELDOUT
from tools.bench.step import SIZES, random_model, share_of
from weights.storage import whole

RANKS = 8  # default of --tp
TAIL = 17  # tokens after the prefix, unless --tail is given
DRAFTS = 3
CHUNK = 2048
LONG = 4096  # tokens; cold runs of at least this length use --cold-repeats
BUDGET = 1 << 40  # bytes: nothing is evicted

COLD, COLD_MEMORY, COLD_FOLDER = "cold", "cold, kept in memory", "cold, kept in a folder"
HIT_MEMORY, HIT_FOLDER = "hit in memory", "hit from a folder"

# Milliseconds by prefix length. They are quoted, not measured here.
ARTICLE = "article, 397B on eight MI355X"
QUOTED = {16_000: 150.0, 50_000: 190.0, 100_000: 428.0, 196_000: 730.0}

Opener = Callable[[], PrefixCache | None]


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    parser.add_model(default=None)
    add("--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384, 32000], metavar="N",
        help=f"measure prefixes of N tokens, multiples of {GRID} (default: 64 256 1024 4096 16384 "
        "32000)")  # fmt: skip
    add("--repeats", type=at_least_one, default=5, metavar="R",
        help="time each way R times (default: 5)")  # fmt: skip
    add("--cold-repeats", type=at_least_one, default=2, metavar="R",
        help=f"time cold runs of {LONG} tokens or more only R times (default: 2)")  # fmt: skip
    add("--config", choices=[*SIZES],
        help="time a model of this size with random weights, on a GPU, in place of a "
        "checkpoint")  # fmt: skip
    add("--tp", type=at_least_one, metavar="N",
        help=f"with --config: share the model among N ranks, and time one of them (default: "
        f"{RANKS})")  # fmt: skip
    add("--device", type=device, metavar="D",
        help="compute a checkpoint on D: cpu, cuda or cuda:N (default: cpu)")  # fmt: skip
    add("--path", choices=PATHS,
        help="run a checkpoint by the fast path, the reference, or the fast path wherever it can run "
        "(default: reference)")  # fmt: skip
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="store keys and values in the model's dtype (auto) or in e4m3 (fp8) (default: "
        "auto)")  # fmt: skip
    add("--tail", type=at_least_one, default=TAIL, metavar="N",
        help=f"let N tokens follow the prefix (default: {TAIL})")  # fmt: skip
    add("--prefill-chunk", type=at_least_one, default=CHUNK, metavar="N",
        help=f"compute N prompt tokens per pass, a multiple of {GRID} (default: {CHUNK})")  # fmt: skip
    add("--no-folder", action="store_true", help="measure no prefix cache in a folder")
    add("--plot", type=output_file, metavar="FILE",
        help="also draw the medians into FILE, which ends with .svg or .png")  # fmt: skip
    parser.set_defaults(threads=2)


@dataclass(frozen=True)
class Subject:
    """The model that is timed, and the `fingerprint` of its files. tail: tokens after the prefix.
    chunk: prompt tokens per pass."""

    model: Model
    checkpoint: str
    tail: int = TAIL
    chunk: int = CHUNK
    runs: Iterator[int] = field(default_factory=itertools.count)

    def with_tail(self, ids: list[int]) -> list[int]:
        """The ids, with a new tail if it has whole blocks, which an earlier run would have stored."""
        if self.tail < GRID:
            return ids
        first = 17 * next(self.runs) % len(ids)
        return ids[: -self.tail] + (ids + ids)[first : first + self.tail]

    def in_memory(self) -> PrefixCache:
        return PrefixCache(self.model, budget=BUDGET, warn=_stop)

    def in_folder(self, folder: Path) -> PrefixCache:
        store = Folder(folder, identity(self.model, self.checkpoint))
        return PrefixCache(
            self.model, budget=BUDGET, store=store, checkpoint=self.checkpoint, warn=_stop
        )

    def in_new_folder(self, folder: Path) -> PrefixCache:
        """A cache in an empty folder. The files of the run before are removed, which is not
        timed."""
        shutil.rmtree(folder, ignore_errors=True)
        return self.in_folder(folder)

    def first_token(
        self, ids: list[int], kept: PrefixCache | None, *, digest: bool = False
    ) -> tuple[Generation, float]:
        """Generate one token. Returns the finished generation, and the seconds until the prefix is
        stored."""
        generation = Generation(
            self.model, ids, 1, Sampling(), frozenset(), DRAFTS, self.chunk, kept, digest
        )
        started = self.now()
        for _ in generation:
            pass
        return generation, self.now() - started - generation.prepare_s

    def now(self) -> float:
        """The time in seconds, after the GPU has finished all launches."""
        if self.model.embed_tokens.weight.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def parts(self, ids: list[int], kept: PrefixCache) -> dict[str, float]:
        """The seconds of each part of a hit, as `Generation` does them."""
        room, whole = len(ids) + 1 + DRAFTS, len(ids)
        rounds = passes = None
        if runs_as_step(self.model, DRAFTS):
            rounds = prepared(self.model, len(ids), DRAFTS, Sampling(), 1)
            whole = len(ids) // GRID * GRID
            cache, passes = rounds.cache(), rounds.passes()
        else:
            cache = self.model.new_cache()
        started = self.now()
        reuse = kept.begin(ids, draft=True, chunk=self.chunk)
        found = self.now()
        hidden = kept.restore(reuse, cache, room=room, draft=True)
        restored = self.now()
        hidden = prefill(
            self.model, ids[:whole], cache, chunk=self.chunk, draft=True, hidden=hidden,
            passes=passes,
        )  # fmt: skip
        if rounds is not None:
            finish_prompt(rounds, cache, ids[whole:], hidden)
        ended = self.now()
        kept.release(reuse)
        return {"begin": found - started, "restore": restored - found, "tail": ended - restored}


def _stop(line: str) -> NoReturn:
    """Raise InputError for a warning of the cache, because a run with a fallback is not
    comparable."""
    raise InputError(f"prefix cache: {line}")


def at_length(
    subject: Subject, ids: list[int], *, repeats: int, cold_repeats: int, with_folder: bool = True
) -> tuple[list[report.Row], list[str]]:
    """All rows of one prompt, or no rows and the lines of `check`. It comes first, and is also the
    warm-up."""
    length = len(ids) - subject.tail
    with tempfile.TemporaryDirectory() as base:
        kept, folder = subject.in_memory(), Path(base, "kept")
        hits: dict[str, Callable[[], PrefixCache]] = {HIT_MEMORY: lambda: kept}
        colds: dict[str, Opener] = {COLD: lambda: None, COLD_MEMORY: subject.in_memory}
        if with_folder:
            hits[HIT_FOLDER] = lambda: subject.in_folder(folder)
            colds[COLD_FOLDER] = lambda: subject.in_new_folder(Path(base, "new"))
        if failed := check(subject, ids, hits):
            return [], failed
        nbytes: dict[str, int] = {}  # of the prefix
        for name, opened in hits.items():
            store = opened().store
            held = [one for one in store.segments().values() if one.end <= length]
            nbytes[name] = sum(store.size(one) for one in held)
        first: dict[str, list[float]] = {name: [] for name in (*colds, *hits)}
        total: dict[str, list[float]] = {name: [] for name in (*colds, *hits)}
        parts: dict[str, list[dict[str, float]]] = {name: [] for name in hits}
        copies: list[float] = []
        where = subject.model.embed_tokens.weight.device
        flat, there = torch.ones(2, nbytes[HIT_MEMORY], dtype=torch.uint8, device=where)
        for i in range(repeats):
            # If there are fewer cold rounds than hits, they are spread evenly.
            cold = i * cold_repeats % repeats < cold_repeats
            for name, opened in {**(colds if cold else {}), **hits}.items():
                generation, seconds = subject.first_token(subject.with_tail(ids), opened())
                first[name].append(generation.ttft_s)
                total[name].append(seconds)
            for name, opened in hits.items():
                parts[name].append(subject.parts(subject.with_tail(ids), opened()))
            started = subject.now()
            there.copy_(flat)
            copies.append(subject.now() - started)

    def row(name: str) -> report.Row:
        return {"name": name, "prefix_tokens": length} | report.spread(first[name])

    rows = [row(COLD) | {"total_ms": _ms(total[COLD])}]
    for name, kind in zip((COLD_MEMORY, COLD_FOLDER), hits, strict=False):
        cost = {
            "total_ms": _ms(total[name]),
            "keep_ms": _ms([t - f for t, f in zip(total[name], first[name], strict=True)]),
            "cost_of_cache": _ms(total[name]) / _ms(total[COLD]),
            "kept_bytes": nbytes[kind],
        }
        rows.append(row(name) | cost)
    tails = [taken["tail"] for name in hits for taken in parts[name]]  # the same work in both
    floor = {"copy_ms": _ms(copies), "floor_ms": _ms(copies) + _ms(tails)}
    for name in hits:
        of_parts = {f"{p}_ms": _ms([taken[p] for taken in parts[name]]) for p in parts[name][0]}
        ratio = {"cold_over_hit": _ms(first[COLD]) / _ms(first[name])}
        rows.append(row(name) | {"kept_bytes": nbytes[name]} | ratio | of_parts | floor)
    return rows, []


def check(
    subject: Subject, ids: list[int], hits: dict[str, Callable[[], PrefixCache]]
) -> list[str]:
    """Fill the caches of the hits. Returns a line for each run that has another token, other logits
    or another number of cached tokens than it should."""
    failed: list[str] = []
    length = len(ids) - subject.tail
    known: dict[tuple[int, ...], Generation] = {}
    for name, opened in hits.items():
        # The first run stores the prefix alone, so that a hit ends there.
        for cached, given in ((0, ids[: length + min(subject.tail, GRID - 1)]), (length, ids)):
            given = subject.with_tail(given) if cached else given
            if (*given,) not in known:
                known[*given,], _ = subject.first_token(given, None, digest=True)
            plain = known[*given,]
            one, _ = subject.first_token(given, opened(), digest=True)
            what = f"{name}, {len(given)} tokens, {cached} to be cached"
            if one.cached_tokens != cached:
                failed.append(f"{what}: {one.cached_tokens} are")
            if one.token_ids != plain.token_ids:
                failed.append(f"{what}: another token")
            if one.logits_sha256 != plain.logits_sha256:
                failed.append(f"{what}: other bits")
    return failed


def _ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def main(args: argparse.Namespace) -> int:
    if args.plot:
        _check_plot(args.plot)
    if args.prefill_chunk % GRID:
        raise InputError(f"--prefill-chunk {args.prefill_chunk}; expected a multiple of {GRID}")
    tail, context = args.tail, _config(args).max_position_embeddings
    longest = (context - tail - 1) // GRID * GRID
    for length in args.lengths:
        if length % GRID or not 0 < length <= longest:
            raise InputError(
                f"length {length}; expected a multiple of {GRID}, at most {longest}: {tail} tokens "
                f"and the first new one follow, the context is {context}"
            )
    subject, text = _random(args) if args.config else _of_checkpoint(args)
    model = subject.model
    name = f"{args.config} at TP {args.tp}, random weights" if args.config else args.model or "tiny"
    rows: list[report.Row] = []
    for length in steps(args.lengths, "lengths"):
        ids = [text[i % len(text)] for i in range(length + tail)]
        fewer = min(args.repeats, args.cold_repeats) if length >= LONG else args.repeats
        more, failed = at_length(
            subject, ids, repeats=args.repeats, cold_repeats=fewer, with_folder=not args.no_folder
        )
        for line in failed:
            print(line, file=sys.stderr)
        if failed:
            return 1
        rows += more
    for length, quoted in QUOTED.items():
        rows.append({"name": ARTICLE, "prefix_tokens": length, "median_ms": quoted, "quoted": True})
    config = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": model.kv_cache_dtype,
        "tail_tokens": tail,
        "draft_tokens": DRAFTS,
        "prefill_chunk": subject.chunk,
        "repeats": args.repeats,
        "cold_repeats_when_long": args.cold_repeats,
    }
    where = model.embed_tokens.weight.device
    on = {"device": torch.cuda.get_device_name(where)} if where.type == "cuda" else {}
    report.emit("ttft", config, rows, only_json=args.json, **on)
    if args.plot:
        plot(rows, args.plot, name, tail)
    return 0


def _config(args: argparse.Namespace) -> Config:
    """The config of what will be timed. InputError for options that have no effect on it."""
    if args.config is None:
        if args.tp is not None:
            raise InputError(f"--tp {args.tp} goes with --config; a checkpoint is timed whole")
        return Config.from_file(locate(args.model) / "config.json")
    args.tp = args.tp or RANKS
    given = {"MODEL": args.model, "--device": args.device, "--path": args.path}
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} {value}; expected none beside --config {args.config}")
    return share_of(args.config, args.tp)


def _of_checkpoint(args: argparse.Namespace) -> tuple[Subject, list[int]]:
    """The checkpoint, and the ids of held-out text."""
    folder = locate(args.model)
    model = load(
        folder, device=args.device or "cpu", path=args.path or "reference",
        kv_cache_dtype=args.kv_cache_dtype,
    )  # fmt: skip
    text = Tokenizer(folder).encode(HELDOUT.read_text(encoding="utf-8"))
    return Subject(model, fingerprint(folder), args.tail, args.prefill_chunk), text


def _random(args: argparse.Namespace) -> tuple[Subject, list[int]]:
    """A model of random weights on a GPU, and random ids."""
    where, _ = gpu.find()
    config = share_of(args.config, args.tp)
    with torch.inference_mode():
        model = random_model(config, where)
    model.kv_cache_dtype = args.kv_cache_dtype
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (1 << 18,), generator=generator).tolist()
    return Subject(model, "", args.tail, args.prefill_chunk), ids


def _check_plot(file: Path) -> None:
    """InputError if the plot could not be written at the end. It is called before the
    measurement."""
    if file.suffix not in (".svg", ".png"):
        raise InputError(f"{file}: a plot ends with .svg or .png")
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("matplotlib is not installed; pip install -e '.[plot]'") from None


def plot(rows: list[report.Row], file: Path, model: str, tail: int = TAIL) -> None:
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
        if not points:
            continue  # such as a folder with --no-folder
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
    axes.set_xlabel(f"prefix (tokens); {tail} more follow; lines: {model}")
    axes.set_ylabel("time to first token (ms)")
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    with whole(file) as unfinished:
        figure.savefig(unfinished, dpi=200, format=file.suffix.removeprefix("."))
