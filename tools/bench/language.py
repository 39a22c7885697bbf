"""Measure bits per byte of held-out text beside `xz -9`, and tokens per forward pass."""

import argparse
import lzma
import math
from pathlib import Path

import torch

from qwen35.cache import KV_CACHE_DTYPES
from qwen35.cli import Parser, at_least_one, at_least_zero
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.generation import Generation, check_limits
from qwen35.load import DTYPES, TINY, load, locate
from qwen35.progress import steps
from qwen35.reading import read_text
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
    add("--dtype", choices=DTYPES,
        help="compute in this dtype (default: the checkpoint's own)")  # fmt: skip
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="store keys and values in the model's dtype (auto) or in e4m3 (fp8) (default: "
        "auto)")  # fmt: skip
    add("--text", type=Path, default=HELDOUT, metavar="FILE",
        help=f"measure the documents in FILE, which stand between lines {SEPARATOR} (default: the "
        "held-out text of the embedded model)")  # fmt: skip
    add("--documents", type=at_least_one, metavar="N",
        help="measure only the first N documents (default: all)")  # fmt: skip
    add("--prompt-tokens", type=at_least_one, default=GRID, metavar="N",
        help=f"continue the first N tokens of each document, {GRID} or more (default: "
        f"{GRID})")  # fmt: skip
    add("--new-tokens", type=at_least_one, default=128, metavar="N",
        help="generate at most N tokens after each document's beginning (default: 128)")  # fmt: skip
    add("--draft-tokens", type=at_least_zero, default=3, metavar="K",
        help="draft K tokens in each round (default: 3)")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="T",
        help="draw tokens at temperature T; 0 takes the likeliest ones (default: 0)")  # fmt: skip


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
    text = read_text(args.text)
    documents = [part.strip("\n") for part in text.split(f"\n{SEPARATOR}\n")][: args.documents]
    if not any(documents):
        raise InputError(f"{args.text}: no text; expected documents with {SEPARATOR} lines between")
    if args.prompt_tokens < GRID:
        raise InputError(f"--prompt-tokens {args.prompt_tokens}; expected at least {GRID}")
    folder = locate(args.model)
    tokenizer = Tokenizer(folder)
    sampling = Sampling(temperature=args.temperature, vocab=tokenizer.size)
    check_limits(Config.from_file(folder / "config.json"), args.draft_tokens, None, None)
    model = load(folder, dtype=DTYPES.get(args.dtype), kv_cache_dtype=args.kv_cache_dtype)
    start = tokenizer.encode(SEPARATOR)
    total_bits = total_bytes = predicted = forwards = tokens = 0
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
        {"name": "tokens per forward", "value": tokens / forwards if forwards else None},
        *(
            {"name": f"accepted at depth {i + 1}", "value": a / p if p else None}
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
