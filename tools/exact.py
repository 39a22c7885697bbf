"""`python -m tools.exact`: check the exactness contract on any checkpoint and machine.

Each prompt is continued in many ways. They differ in the drafting depth, in the prefill chunk, and
in what a prefix cache holds of the prompt: nothing, each possible length, in memory, on disk in
another process, after eviction. All ways have to give the same tokens and the same bits of logits.
Ways of the same depth also have to give the same drafts. Without options one prompt is continued,
which takes less than a minute for the embedded model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fast.target import KERNELS
from qwen35.cache import KV_CACHE_DTYPES
from qwen35.cli import Parser, at_least_one, at_least_zero, counted, device, print_json, run
from qwen35.errors import InputError
from qwen35.generation import Generation
from qwen35.load import DTYPES, load, locate
from qwen35.parallel.ranks import ALONE, Ranks, add_ranks, on_ranks
from qwen35.paths import PATHS
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.store import Memory
from qwen35.progress import Progress
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from reference.linear import GRID
from reference.model import Model

LENGTHS = (1, 63, 64, 65, 127, 128, 129, 700, 3000)
DEPTHS = (0, 1, 2, 3)
CHUNKS = (64, 128, 512, 4096)
FEW_LENGTHS = (130,)  # without --all
FEW_WAYS = ((0, 64), (3, 512))  # (depth, chunk) pairs, without --all
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, top_k=20, seed=5)}
# Environment variables that torchrun sets. Another process group that is started here must not see
# them.
OF_TORCHRUN = (
    "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_",
)  # fmt: skip
AMPLE = 1 << 40  # a budget that nothing exceeds


@dataclass(frozen=True)
class Cell:
    """One way to continue one prompt, and its result.

    digest: the SHA-256 of the logits. drafts: per depth, how many were proposed and how many were
    accepted. problem: what is wrong if the prefix cache did not provide the tokens that it should.
    """

    length: int
    sampling: str
    depth: int
    chunk: int
    cache: str
    tokens: tuple[int, ...]
    digest: str
    drafts: tuple[tuple[int, ...], tuple[int, ...]]
    problem: str = ""


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.exact",
        "Continue prompts in many ways (drafting depths, prefill chunks, prefix caches, processes), and "
        "compare the bits of all logits. The exit status is 1 if a bit differs.",
    )
    add = parser.add_argument
    parser.add_model()
    add("--all", action="store_true",
        help="try all lengths, depths and chunks: 3,616 continuations, which take an hour")  # fmt: skip
    for name, kind, few, every, more, what in (
        ("--lengths", at_least_one, FEW_LENGTHS, LENGTHS, "", "continue prompts of N tokens"),
        ("--depths", at_least_zero, [depth for depth, _ in FEW_WAYS], DEPTHS, " or --chunks",
         "draft N tokens per round"),
        ("--chunks", at_least_one, [chunk for _, chunk in FEW_WAYS], CHUNKS, " or --depths",
         "compute N prompt tokens per pass"),
    ):  # fmt: skip
        few, every = (", ".join(map(str, numbers)) for numbers in (few, every))
        add(name, type=kind, nargs="+", metavar="N",
            help=f"{what} (default: {few}; with --all{more}: {every})")  # fmt: skip
    add("--hits", type=at_least_one, metavar="N",
        help="try N lengths of the part of a prompt that is in the prefix cache, spread from the "
        "shortest to the longest (default: every multiple of 64)")  # fmt: skip
    add("--new-tokens", type=at_least_one, default=12, metavar="N",
        help="generate N tokens in each continuation (default: 12)")  # fmt: skip
    add("--dtype", choices=DTYPES,
        help="compute in this dtype (default: the checkpoint's own)")  # fmt: skip
    add("--device", type=device, default="cpu", metavar="D",
        help="compute on D: cpu, cuda or cuda:N (default: cpu)")  # fmt: skip
    add("--path", choices=PATHS, default="reference",
        help="check this path; fast also lists where its tokens first differ from the reference's "
        "(default: reference)")  # fmt: skip
    add("--moe-kernel", choices=KERNELS, default="triton",
        help="compute MXFP4 experts and their router on the fast path with Triton's kernels, or on an "
        "MI355X with HIP kernels (default: triton)")  # fmt: skip
    add_ranks(parser)
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="store keys and values in the model's dtype (auto) or in e4m3 (fp8) (default: "
        "auto)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document")
    return parser


def walk(args: argparse.Namespace) -> tuple[Sequence[int], list[tuple[int, int]]]:
    """The prompt lengths, and the (depth, chunk) pairs for each. --depths are combined with all
    chunks, and --chunks with all depths, unless both are given."""
    lengths = args.lengths or (LENGTHS if args.all else FEW_LENGTHS)
    if not (args.all or args.depths or args.chunks):
        return lengths, list(FEW_WAYS)
    return lengths, list(product(args.depths or DEPTHS, args.chunks or CHUNKS))


def prompt_of(length: int, vocabulary: int) -> list[int]:
    """Fixed pseudo-random ids. A shorter prompt is a prefix of a longer one."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (length,), generator=generator).tolist()


def continued(
    model: Model,
    prompt: list[int],
    name: str,
    depth: int,
    chunk: int,
    tokens: int,
    vocab: int | None,
) -> Callable[[str, PrefixCache | None, int], Cell]:
    """A function (label, prefix_cache, expected) that continues a prompt and returns its cell.

    expected: how many tokens the prefix cache has to provide. Another number is the cell's problem.
    """
    sampling = replace(SAMPLINGS[name], vocab=vocab)

    def go(label: str, prefix_cache: PrefixCache | None, expected: int) -> Cell:
        result = Generation(
            model, prompt, tokens, sampling, frozenset(), depth, chunk, prefix_cache, True
        )
        for _ in result:
            pass
        drafts = tuple(result.draft.proposed), tuple(result.draft.accepted)
        return Cell(
            len(prompt), name, depth, chunk, label, tuple(result.token_ids),
            result.logits_sha256, drafts,
            unexpected(result.cached_tokens, expected, result.cache_reason),
        )  # fmt: skip

    return go


def unexpected(cached: int, expected: int, reason: str) -> str:
    """The problem of a cell that took over so many tokens from the prefix cache, or ""."""
    return "" if cached == expected else f"{cached} tokens cached, not {expected}: {reason}"


def hit_lengths(length: int, hits: int | None) -> list[int]:
    """How many tokens of a prompt the cache holds in one continuation each: every multiple of GRID, or
    only `hits` of them, the first and the last among them."""
    blocks = length // GRID
    count = blocks if hits is None else min(hits, blocks)
    # One hit alone is the longest one.
    apart = (blocks - 1) / (count - 1) if count > 1 else 0.0
    return [GRID * (blocks - round(apart * back)) for back in reversed(range(count))]


def cells(
    model: Model,
    prompt: list[int],
    name: str,
    depth: int,
    chunk: int,
    tokens: int,
    vocab: int | None = None,
    hits: int | None = None,
) -> Iterator[Cell]:
    """One prompt with every state of a prefix cache in memory. `states` is their number. hits: as in
    `hit_lengths`."""
    go = continued(model, prompt, name, depth, chunk, tokens, vocab)
    whole = len(prompt) // GRID * GRID
    yield go("none", None, 0)
    every_block = PrefixCache(model, budget=AMPLE, interval=1)
    yield go("miss", every_block, 0)
    assert isinstance(every_block.store, Memory)
    for length in hit_lengths(len(prompt), hits):
        part = Memory()
        held = every_block.store.held
        part.held = {key: own for key, own in held.items() if own[0].end <= length}
        yield go(f"hit {length}", PrefixCache(model, budget=AMPLE, store=part), length)
    if whole:
        store = Memory()
        small = PrefixCache(model, budget=AMPLE, store=store)
        stored = go("", small, 0)
        small.budget = sum(segment.nbytes for segment in store.segments().values())
        other = [(i + 1) % model.config.vocab_size for i in prompt]
        evicting = continued(model, other, name, depth, chunk, 1, vocab)("", small, 0)
        evicted = go("evicted", small, 0)
        yield replace(evicted, problem=stored.problem or evicting.problem or evicted.problem)
        yield go("refilled", small, whole)


def states(length: int, hits: int | None = None) -> int:
    """The number of cache states for a prompt of this length: none, miss, each hit, evicted,
    refilled."""
    tried = len(hit_lengths(length, hits))
    return 2 + tried + (2 if tried else 0)


def in_other_processes(
    args: argparse.Namespace, prompts: list[list[int]], depth: int, chunk: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run two processes one after the other on one cache folder (with --tp: two groups of
    processes). Yields (label, document) for each continuation. InputError if a process fails."""
    launcher = [sys.executable]
    if args.tp > 1:
        # Standalone: a port of its own, since the outer launcher holds the default one.
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.tp]
    environment = {n: v for n, v in os.environ.items() if not n.startswith(OF_TORCHRUN)}
    with tempfile.TemporaryDirectory() as scratch:
        requests = Path(scratch) / "requests"
        lines = [
            {"id": [name, len(prompt)], "prompt_ids": prompt, "temperature": s.temperature,
             "top_k": s.top_k, "seed": s.seed}
            for prompt in prompts for name, s in SAMPLINGS.items()
        ]  # fmt: skip
        requests.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        command = [
            *launcher, "-m", "qwen35.generate", "--model", args.model, "--requests", requests,
            "--prefix-cache", f"{scratch}/kept", "--draft-tokens", depth, "--digest", "--ignore-eos",
            "--prefill-chunk", chunk, "--max-new-tokens", args.new_tokens,
            "--device", args.device.type if args.tp > 1 else args.device,
            "--path", args.path, "--kv-cache-dtype", args.kv_cache_dtype, "--tp", args.tp,
            "--moe-kernel", args.moe_kernel,
            *(["--dtype", args.dtype] if args.dtype else []),
            *(["--threads", args.threads] if args.threads else []),
        ]  # fmt: skip
        for label in ("first process", "from disk"):
            with (Path(scratch) / "errors").open("w+", encoding="utf-8") as errors:
                with subprocess.Popen(
                    [*map(str, command)], stdout=subprocess.PIPE, stderr=errors, text=True,
                    env=environment,
                ) as process:  # fmt: skip
                    for line in process.stdout or ():
                        yield label, json.loads(line)
                errors.seek(0)
                if process.returncode:
                    raise InputError(own_error(errors.read()))


def own_error(text: str) -> str:
    """The error message of a failed process, without the lines that torchrun adds. If torchrun itself
    fails, it is its last line."""
    own = [line for line in text.splitlines() if line.startswith("python -m qwen35.generate: ")]
    own = [line for line in own if ": warning: " not in line]
    lines = [line for line in text.splitlines() if line.strip()]
    return own[-1] if own else lines[-1] if lines else "a process that continues the prompts failed"


def continuations(
    model: Model,
    args: argparse.Namespace,
    prompts: list[list[int]],
    depth: int,
    chunk: int,
    vocab: int | None,
) -> Iterator[Cell]:
    """Continue all prompts at one depth and chunk: in this process, then in two others that share a
    cache folder. With several ranks, rank 0 starts these."""
    ranks: Ranks = args.ranks
    for prompt in prompts:
        for name in SAMPLINGS:
            yield from cells(model, prompt, name, depth, chunk, args.new_tokens, vocab, args.hits)
    others = partial(in_other_processes, args, prompts, depth, chunk)
    for label, document in others() if ranks.size == 1 else ranks.share(lambda: list(others())):
        (name, length), draft = document["id"], document["draft"]
        problem = ""
        if label == "from disk":
            cached, reason = document["cached_tokens"], document["cache_reason"]
            problem = unexpected(cached, length // GRID * GRID, reason)
        drafts = tuple(draft["proposed"]), tuple(draft["accepted"])
        tokens, digest = tuple(document["token_ids"]), document["logits_sha256"]
        yield Cell(length, name, depth, chunk, label, tokens, digest, drafts, problem)


def differing(found: list[Cell]) -> list[Cell]:
    """The cells that have a problem, or that differ: in tokens or bits from the first cell of the
    same prompt and sampling, or in drafts from the first of these with the same depth."""
    first: dict[tuple[Any, ...], Cell] = {}
    wrong: list[Cell] = []
    for cell in found:
        plain = first.setdefault((cell.length, cell.sampling), cell)
        same_depth = first.setdefault((cell.length, cell.sampling, cell.depth), cell)
        same = (plain.tokens, plain.digest) == (cell.tokens, cell.digest)
        if cell.problem or not same or same_depth.drafts != cell.drafts:
            wrong.append(cell)
    return wrong


def _load(
    args: argparse.Namespace, folder: Path, path: str, moe_kernel: str, ranks: Ranks
) -> Model:
    return load(
        folder, dtype=DTYPES.get(args.dtype), device=args.device, path=path,
        kv_cache_dtype=args.kv_cache_dtype, moe_kernel=moe_kernel, ranks=ranks,
    )  # fmt: skip


def departures(
    args: argparse.Namespace,
    prompts: list[list[int]],
    found: list[Cell],
    vocab: int | None,
) -> list[dict[str, Any]]:
    """Where each text first differs from the reference's, as rows. margin: the distance between the
    two tokens' logits in the reference. A correct kernel differs by rounding only, so margins are
    small."""
    model = _load(args, locate(args.model), "reference", "triton", ALONE)
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        for name, sampling in SAMPLINGS.items():
            tokens = next(
                cell.tokens for cell in found if (cell.length, cell.sampling) == (len(prompt), name)
            )
            text = Generation(
                model, prompt, args.new_tokens, replace(sampling, vocab=vocab), frozenset(), 0
            )
            for at, ((theirs, logits), ours) in enumerate(zip(text, tokens, strict=True)):
                if ours != theirs:
                    margin = float((logits[theirs].double() - logits[ours].double()).abs())
                    rows.append({"length": len(prompt), "sampling": name, "at": at, "token": ours,
                                 "reference": theirs, "margin": margin})  # fmt: skip
                    break
    return rows


def main(args: argparse.Namespace) -> int:
    ranks: Ranks = args.ranks
    folder = locate(args.model, ranks)
    model = _load(args, folder, args.path, args.moe_kernel, ranks)
    vocabulary = model.config.vocab_size
    vocab = Tokenizer(folder).size if (folder / "tokenizer.json").exists() else None
    lengths, ways = walk(args)
    prompts = [prompt_of(length, vocabulary) for length in lengths]
    for prompt, (depth, chunk) in product(prompts, ways):
        # It refuses what is bad about any of them before the first one runs.
        Generation(model, prompt, args.new_tokens, Sampling(), frozenset(), depth, chunk)
    found: list[Cell] = []
    of_a_way = sum(len(SAMPLINGS) * (states(length, args.hits) + 2) for length in lengths)
    with Progress("continuations", len(ways) * of_a_way) as progress:
        for depth, chunk in ways:
            progress.note = f"depth {depth}, chunk {chunk}; {len(differing(found))} differ so far"
            for cell in continuations(model, args, prompts, depth, chunk, vocab):
                found.append(cell)
                progress.update()
    wrong = differing(found)
    everyone = ranks.exchange([[*cell.tokens, cell.digest] for cell in found])
    apart = [any(other != same[0] for other in same) for same in zip(*everyone, strict=True)]
    other_ranks = [cell for cell, is_apart in zip(found, apart, strict=True) if is_apart]
    wrong += [cell for cell in other_ranks if cell not in wrong]
    is_other = args.path == "fast" or ranks.size > 1  # its rounding differs from the reference
    left = ranks.share(partial(departures, args, prompts, found, vocab)) if is_other else []
    if args.json:
        rows = [vars(cell) for cell in wrong]
        document = {"pass": not wrong, "cells": len(found), "differ": rows}
        print_json(document | ({"departures": left} if is_other else {}))
    else:
        for row in left:
            print(
                f"NEAR  {row['length']} tokens, {row['sampling']}: token {row['at']} is "
                f"{row['token']}, the reference's {row['reference']} (logits {row['margin']:.3g} apart)"
            )
        for cell in wrong[:20]:
            problem = f"; {cell.problem}" if cell.problem else ""
            print(
                f"DIFF  {cell.length} tokens, {cell.sampling}, depth {cell.depth}, "
                f"chunk {cell.chunk}, cache {cell.cache}{problem}"
            )
        compared = counted(len(found), "continuation")
        print(f"{compared} of {counted(len(prompts), 'prompt')}, {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = build_parser()
    run(parser, on_ranks(parser, main))
