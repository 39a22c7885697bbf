"""Measure bits per byte of held-out text beside `xz -9`, and tokens per forward pass."""

import argparse
import lzma
import math
from pathlib import Path

import torch

from qwen35.cache import KV_CACHE_DTYPES
from qwen35.cli import Parser, at_least_one, at_least_zero, read_text
from qwen35.errors import InputError
from qwen35.generation import Generation
from qwen35.load import DTYPES, TINY, load, locate
from qwen35.progress import steps
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from reference.linear import GRID
from reference.model import Model
from tools.bench import report

HELDOUT = TINY / "heldout.txt"
SEPARATOR = "<|endoftext|>"


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    parser.add_model()
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto")
    add("--text", type=Path, default=HELDOUT, help=f"documents with {SEPARATOR} lines between")
    add("--documents", type=at_least_one, help="use the first N documents only (default: all)")
    add(
        "--prompt-tokens",
        type=at_least_one,
        default=64,
        help="of a document, before it is continued",
    )
    add(
        "--new-tokens", type=at_least_one, default=128, help="drafted and counted for each document"
    )
    add("--draft-tokens", type=at_least_zero, default=3)
    add("--temperature", type=float, default=0.0, help="of the continuations; 0 is greedy")


@torch.inference_mode()
def bits(model: Model, ids: list[int]) -> float:
    """The total bits of ids[1:], each given all ids before it."""
    cache = model.new_cache()
    total = 0.0
    for first in range(0, len(ids) - 1, 2048):
        part = torch.tensor([ids[first : min(first + 2048, len(ids) - 1)]])
        logits = model.lm_head(model(part, cache))[0].float()
        targets = torch.tensor(ids[first + 1 : first + 1 + part.shape[1]])
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    return total / math.log(2)


def main(args: argparse.Namespace) -> int:
    folder = locate(args.model)
    model = load(folder, dtype=DTYPES.get(args.dtype), kv_cache_dtype=args.kv_cache_dtype)
    tokenizer = Tokenizer(folder)
    text = read_text(args.text)
    documents = [part.strip("\n") for part in text.split(f"\n{SEPARATOR}\n")][: args.documents]
    if not any(documents):
        raise InputError(f"{args.text}: no text; expected documents with {SEPARATOR} lines between")
    if args.prompt_tokens < GRID:
        raise InputError(f"--prompt-tokens {args.prompt_tokens}; expected at least {GRID}")
    start = tokenizer.encode(SEPARATOR)
    total_bits = total_bytes = predicted = forwards = tokens = 0
    sampling = Sampling(temperature=args.temperature, vocab=tokenizer.size)
    accepted, proposed = [0] * args.draft_tokens, [0] * args.draft_tokens
    for document in steps(documents, "held-out documents"):
        ids = start + tokenizer.encode(document)
        total_bits += bits(model, ids)
        total_bytes += len(document.encode())
        predicted += len(ids) - 1
        generation = Generation(
            model, ids[: args.prompt_tokens], args.new_tokens, sampling,
            frozenset(start), args.draft_tokens,
        )  # fmt: skip
        for _ in generation:
            pass
        forwards += generation.draft.forwards
        tokens += generation.draft.tokens
        accepted = [a + b for a, b in zip(accepted, generation.draft.accepted, strict=True)]
        proposed = [a + b for a, b in zip(proposed, generation.draft.proposed, strict=True)]
    packed = len(lzma.compress("\n".join(documents).encode(), preset=9))
    ours, theirs = total_bits / total_bytes, packed * 8 / total_bytes
    rows = [
        {"name": "bits per byte", "value": ours},
        {"name": "perplexity per token", "value": 2 ** (total_bits / predicted)},
        {"name": "bits per byte, xz -9", "value": theirs},
        {"name": "ratio to xz -9", "value": ours / theirs},
        {"name": "tokens per forward", "value": tokens / forwards if forwards else 0.0},
        *(
            {"name": f"accepted at depth {i + 1}", "value": a / p if p else 0.0}
            for i, (a, p) in enumerate(zip(accepted, proposed, strict=True))
        ),
    ]
    config = {
        "model": args.model,
        "bytes": total_bytes,
        "documents": len(documents),
        "draft_tokens": args.draft_tokens,
        "kv_cache_dtype": args.kv_cache_dtype,
        "temperature": args.temperature,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "decode_tokens": tokens,
    }
    report.emit("language", config, rows, only_json=args.json)
    return 0
