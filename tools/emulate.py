"""`python -m tools.emulate PROMPT`: generate text with gfx950 machine code, without a GPU.

The reference computes the prompt. Each decode round (drafts, verification, acceptance) is the list
of launches that a GPU captures as a graph. Here every launch is compiled for gfx950 and executed by
the emulator (docs/emulator.md). Decoding is greedy, and ends at an end-of-text token of the config.
--check compares the tokens with those of the reference, and exits with 1 if they differ.
"""

import argparse
import sys
import time
import warnings

import torch

from fast import hip_compiler
from fast.launch import Launch
from fast.moe import Experts
from fast.shapes import check_hip, check_shapes
from fast.step import Step
from fast.target import KERNELS
from qwen35.cli import CHECKPOINT, Parser, counted, one_line, print_json, run
from qwen35.errors import InputError
from qwen35.generation import Generation, prefill
from qwen35.load import load, locate
from qwen35.paths import FAST, Packed, unfit_triton
from qwen35.progress import steps
from qwen35.sampling import Sampling
from qwen35.swap import swap
from qwen35.terminal import say
from qwen35.tokenizer import Tokenizer
from tools.gfx950.target import emulate

TARGET = "gfx950"
WORKGROUPS = 16  # of a persistent kernel: fewer than a card's are quicker here, with the same bits


def build_parser() -> Parser:
    parser = Parser("python -m tools.emulate", __doc__ or "")
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="the text to continue")
    parser.add_model(f"{CHECKPOINT}; a large one takes too long", alone=False)
    add("--max-new-tokens", type=int, default=8, metavar="N",
        help="generate at most N tokens, of which the reference computes the first (default: "
        "8)")  # fmt: skip
    add("--draft-tokens", type=int, default=3, metavar="K",
        help="draft K tokens with the MTP head in each round (default: 3)")  # fmt: skip
    add("--moe-kernel", choices=KERNELS, default="triton",
        help="compute MXFP4 experts and their router with Triton's kernels or with HIP kernels (default: "
        "triton)")  # fmt: skip
    add("--check", action="store_true",
        help="also run the reference, and exit with 1 if its tokens differ")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document")
    return parser


def ended(tokens: list[int], stop: frozenset[int]) -> list[int]:
    """The tokens up to the first one that is in `stop`. A round may give some that come after it."""
    end = next((at for at, token in enumerate(tokens, 1) if token in stop), len(tokens))
    return tokens[:end]


@torch.inference_mode()
def main(args: argparse.Namespace) -> int:
    if line := unfit_triton():  # InputError where Triton is missing, before anything is read
        say(line)
    folder = locate(args.model)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(args.prompt)
    if args.max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {args.max_new_tokens}; expected at least 1")
    model = load(folder, dtype=torch.bfloat16)
    model.config.check_prompt(ids, args.max_new_tokens)
    check_shapes(model.config)
    if args.moe_kernel == "hip":
        check_hip(model.config)
        hip_compiler.find()
    if args.draft_tokens and model.mtp is None:
        raise InputError(f"draft_tokens = {args.draft_tokens}, but the checkpoint has no MTP head")
    expected: list[int] = []
    stop = frozenset(model.config.eos_token_id)
    if args.check:
        settings = Sampling(vocab=tokenizer.size), stop, args.draft_tokens
        expected = [t for t, _ in Generation(model, ids, args.max_new_tokens, *settings)]
    cache = model.new_cache()
    hidden = prefill(model, ids, cache, chunk=64, draft=args.draft_tokens > 0)
    token = int(model.lm_head(hidden)[0, 0, : tokenizer.size].argmax())
    room = len(ids) + args.max_new_tokens + 1 + args.draft_tokens
    with warnings.catch_warnings():
        # Which configuration is fastest for a shape does not matter here.
        warnings.filterwarnings("ignore", ".*is not in configs.json")
        for pattern, kind in FAST.items():
            if pattern != "mtp" or model.mtp is not None:
                swap(model, pattern, Packed(kind, target=TARGET, kernel=args.moe_kernel))
        for node in model.modules():
            if isinstance(node, Experts):
                node.workgroups = WORKGROUPS
        step = Step(model, room, args.draft_tokens, vocab=tokenizer.size)
    step.take(cache)
    step.begin(token, hidden[0, 0])

    started, instructions, rounds = time.perf_counter(), 0, 0
    tokens = [token]
    while len(tokens) < args.max_new_tokens and stop.isdisjoint(tokens):
        rounds += 1
        for work in steps(step.work, f"launches of round {rounds}"):
            assert isinstance(work, Launch)
            instructions += emulate([work], races=False).instructions
        fresh, *picked = step.report.tolist()
        tokens += picked[:fresh]
    tokens = ended(tokens[: args.max_new_tokens], stop)
    seconds = time.perf_counter() - started
    same = not args.check or tokens == expected
    compared = same if rounds else None  # the reference computes the first token on both sides
    if args.json:
        print_json({
            "text": tokenizer.decode(tokens), "token_ids": tokens, "rounds": rounds,
            "launches_a_round": len(step.work), "instructions": instructions,
            "seconds": round(seconds, 2), **({"same_as_reference": compared} if args.check else {}),
        })  # fmt: skip
    else:
        print(tokenizer.decode(tokens))
        line = (
            f"{counted(len(tokens), 'token')} in {counted(rounds, 'round')} of {len(step.work)} "
            f"launches, {instructions:,} instructions of {TARGET} in {seconds:.1f} s"
        )
        if not rounds:
            line = (
                f"1 token, by the reference; nothing ran on {TARGET}, as no second one was needed"
            )
        elif args.check:
            line += "; the reference's tokens" if same else f"; the reference gives {expected}"
        print(one_line(line), file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    run(build_parser(), main)
