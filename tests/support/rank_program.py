"""A program for several ranks: `python -m tests.support.rank_program OUT --tp N`.

It continues a prompt in many ways, and writes the results of each rank. With --do it fails in one
of the ways that tests check.
"""

import argparse
import json
import os
import signal
import time
from itertools import count, islice
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save_file

from qwen35.cli import Parser, run
from qwen35.errors import InputError
from qwen35.load import TINY, load
from qwen35.parallel.ranks import Ranks, add_ranks, on_ranks
from qwen35.parallel.reduce import ordered_sum
from tools.exact import cells, differing, prompt_of

WAYS = [("greedy", 3, 4096), ("sampled", 2, 64)]


def build_parser() -> Parser:
    parser = Parser("rank_program", "Continue a prompt on several ranks.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--do", choices=FAILURES)
    parser.add_argument("--on", type=int, help="rank that does it")
    add_ranks(parser)
    return parser


def die(ranks: Ranks) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hang(ranks: Ranks) -> NoReturn:
    os.kill(os.getpid(), signal.SIGSTOP)
    raise AssertionError


def refuse(ranks: Ranks) -> NoReturn:
    raise InputError("what rank 1 was given is bad")


def everywhere(ranks: Ranks) -> NoReturn:
    time.sleep(0.1 * (ranks.size - ranks.rank))  # rank 0 raises it last
    raise InputError("what everyone was given is bad")


def bug(ranks: Ranks) -> NoReturn:
    raise KeyError("a name")


def stop_reading(ranks: Ranks) -> NoReturn:
    raise BrokenPipeError


FAILURES = {f.__name__: f for f in (die, hang, refuse, everywhere, bug, stop_reading)}


def fail(args: argparse.Namespace) -> NoReturn:
    """Fail between sums over the ranks."""
    for number in count():
        args.ranks.sum(torch.ones(100))
        if number == 20 and args.on in (None, args.ranks.rank):
            FAILURES[args.do](args.ranks)
    raise AssertionError


def check_sums(ranks: Ranks) -> None:
    """Sums of few and of many elements, and of a number that the ranks do not divide."""
    for shape in ((3, 5), (600, 1024), (1001, 1001)):
        parts = [
            torch.randn(shape, generator=torch.Generator().manual_seed(rank)).bfloat16()
            for rank in range(ranks.size)
        ]
        assert torch.equal(ranks.sum(parts[ranks.rank]), ordered_sum(torch.stack(parts)))


def main(args: argparse.Namespace) -> int:
    if args.do:
        fail(args)
    ranks: Ranks = args.ranks
    check_sums(ranks)
    model = load(TINY, ranks=ranks)
    prompt = prompt_of(70, 2000)
    # The first three cells: no cache, a miss, a hit of 64 tokens.
    found = [cell for way in WAYS for cell in islice(cells(model, prompt, *way, tokens=4), 3)]
    with torch.inference_mode():
        cache = model.new_cache()
        logits = model.lm_head(model(torch.tensor([prompt]), cache))
    out = args.out / f"rank-{ranks.rank}"
    save_file({"logits": logits} | cache.snapshot(), out.with_suffix(".safetensors"))
    documents = [vars(cell) for cell in found]
    out.with_suffix(".json").write_text(json.dumps(documents), encoding="utf-8")
    print(f"{len(found)} ways, {len(differing(found))} differ")
    return 0


if __name__ == "__main__":
    parser = build_parser()
    run(parser, on_ranks(parser, main))
