"""Prefill and decode, and `python -m qwen35.generate`."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwen35.cache import Cache
from qwen35.cli import Parser, parse_ids, run
from qwen35.config import as_ids
from qwen35.errors import InputError
from qwen35.load import DTYPES, load, locate
from qwen35.sampling import Sampling, pick
from qwen35.speculative import Decoder, DraftStats
from qwen35.tokenizer import Message, Tokenizer
from reference.linear import GRID
from reference.model import Model


def prefill(
    model: Model,
    ids: list[int],
    cache: Cache,
    *,
    chunk: int,
    draft: bool,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """Compute a prompt; returns the trunk's state of its last token, [1, 1, D].

    Passes begin and end on the 64-token grid, `chunk` tokens at a time; the tail beyond the grid is a
    pass of its own. What a token computes is the same at any chunk size. draft: also run the MTP head
    over the prompt (all rows but the last, whose next token is not known yet).
    """
    device = model.embed_tokens.weight.device
    whole = len(ids) // GRID * GRID
    edges = [*range(0, whole, chunk), whole, len(ids)]
    hidden = torch.empty(0)
    for first, last in pairwise(edges):
        if first == last:
            continue
        hidden = model(torch.tensor([ids[first:last]], device=device), cache)  # [1, T, D]
        following = ids[first + 1 : last + 1]
        if draft and following:
            model.draft(
                torch.tensor([following], device=device), hidden[:, : len(following)], cache
            )
        progress(last - first)
    return hidden[:, -1:]


@dataclass
class Generation:
    """One continuation of a prompt: iterate over it for (token, logits [V]); then read the figures."""

    model: Model
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: frozenset[int]
    draft_tokens: int
    prefill_chunk: int = 2048
    progress: Callable[[int], object] = lambda tokens: None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    draft: DraftStats = field(default_factory=DraftStats)
    ttft_s: float = 0.0
    decode_s: float = 0.0

    def __post_init__(self) -> None:
        self.model.config.check_prompt(self.prompt, new_tokens=1)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens = {self.max_new_tokens}; expected at least 1")
        if self.prefill_chunk < GRID or self.prefill_chunk % GRID:
            raise InputError(
                f"prefill_chunk = {self.prefill_chunk}; expected a multiple of {GRID}, the grid"
            )
        if self.draft_tokens < 0:
            raise InputError(f"draft_tokens = {self.draft_tokens}; expected an integer >= 0")
        if self.draft_tokens and self.model.mtp is None:
            raise InputError(
                f"draft_tokens = {self.draft_tokens}, but the checkpoint has no MTP head"
            )

    @torch.inference_mode()
    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        started = time.perf_counter()
        self.token_ids = []
        cache = self.model.new_cache()
        hidden = prefill(
            self.model, self.prompt, cache,
            chunk=self.prefill_chunk, draft=self.draft_tokens > 0, progress=self.progress,
        )  # fmt: skip
        logits = self.model.lm_head(hidden)[0, 0]  # [V]
        token = pick(logits, len(self.prompt), self.sampling)
        first = time.perf_counter()
        self.ttft_s = first - started
        decoder = Decoder(
            self.model, cache, token=token, hidden=hidden,
            depth=self.draft_tokens, sampling=self.sampling, stop=self.stop,
        )  # fmt: skip
        self.draft = decoder.stats
        room = self.model.config.max_position_embeddings - len(self.prompt)
        limit = min(self.max_new_tokens, room)
        fresh = [(token, logits)]
        while True:
            for token, logits in fresh:
                self.token_ids.append(token)
                self.decode_s = time.perf_counter() - first
                yield token, logits
            if self.token_ids[-1] in self.stop:
                self.finish_reason = "stop"
                return
            if len(self.token_ids) == limit:
                self.finish_reason = "length"
                return
            fresh = decoder.round(limit - len(self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: the first token, which prefill gives, is not counted."""
        return (len(self.token_ids) - 1) / self.decode_s if len(self.token_ids) > 1 else 0.0


def generation_config(folder: Path) -> dict[str, Any]:
    """`generation_config.json`, empty when there is none."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text())
        as_ids(document.get("eos_token_id") if isinstance(document, dict) else None)
    except (OSError, ValueError) as error:  # an InputError is a ValueError
        raise InputError(f"{path}: not readable: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: a JSON object was expected, not {type(document).__name__}")
    return document


def build_parser() -> Parser:
    parser = Parser("python -m qwen35.generate", "Generate text with Qwen3.5.")
    add = parser.add_argument
    add("prompt", nargs="?", help="the text to continue (with --chat: the first message)")
    add("--prompt-file", metavar="FILE", help="read the prompt from FILE, - for standard input")
    add("--prompt-ids", metavar="IDS", help="the prompt as token ids: 1,2,3")
    add("--model", metavar="DIR|HUB_ID", help="a checkpoint (default: the embedded one)")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("--temperature", type=float, metavar="T", help="0 is greedy, the default without --chat")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (0: all)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that sum to P")
    add("--seed", type=int, default=0, metavar="S")
    add("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    add("--draft-tokens", type=int, metavar="K", help="drafts of the MTP head a round (default 3)")
    add("--prefill-chunk", type=int, default=2048, metavar="N", help="prompt tokens a pass")
    add("--device", default="cpu", metavar="D")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    add("--chat", action="store_true", help="a conversation; an empty line ends it")
    add("--no-thinking", action="store_true", help="with --chat: answer without thinking first")
    add("--json", action="store_true", help="print one JSON document instead of a stream")
    return parser


def main(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    started = time.perf_counter()
    folder = locate(args.model)
    model = load(folder, dtype=DTYPES.get(args.dtype), device=_device(args.device))
    load_s = time.perf_counter() - started
    if args.draft_tokens is None:
        args.draft_tokens = 3 if model.mtp else 0
        if not model.mtp:
            _say(f"{folder}: no MTP head in this checkpoint, drafting is off")
    # Ids alone need no tokenizer: then ids are printed, and the head's padding cannot be told apart.
    known_text = (folder / "tokenizer.json").exists() or not isinstance(prompt, list)
    tokenizer = Tokenizer(folder) if known_text else None
    defaults = generation_config(folder)
    stop = as_ids(defaults.get("eos_token_id")) or model.config.eos_token_id

    def generation(ids: list[int]) -> Generation:
        return Generation(
            model, ids, args.max_new_tokens, _sampling(args, defaults, tokenizer),
            frozenset() if args.ignore_eos else frozenset(stop),
            args.draft_tokens, args.prefill_chunk,
        )  # fmt: skip

    if args.chat:
        assert tokenizer is not None and not isinstance(prompt, list)
        _converse(generation, tokenizer, prompt, thinking=not args.no_thinking)
        return 0
    if isinstance(prompt, str):
        assert tokenizer is not None
        prompt = tokenizer.encode(prompt)
    result = generation(prompt or [])
    text = _stream(result, tokenizer, quiet=args.json)
    if args.json:
        print(json.dumps(_document(result, text, load_s), ensure_ascii=False))
    return 0


def _prompt(args: argparse.Namespace) -> str | list[int] | None:
    """The prompt as text or ids; None where a conversation starts by asking for it."""
    sources = {
        "PROMPT": args.prompt,
        "--prompt-file": args.prompt_file,
        "--prompt-ids": args.prompt_ids,
    }
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} are given; one prompt is expected")
    if args.chat and (args.json or args.prompt_ids is not None):
        raise InputError("--chat goes with neither --json nor --prompt-ids")
    if args.prompt_ids is not None:
        return parse_ids(args.prompt_ids)
    if args.prompt_file is None:
        if args.prompt is None and not args.chat:
            raise InputError("no prompt: give PROMPT, --prompt-file or --prompt-ids")
        return args.prompt
    try:
        if args.prompt_file == "-":
            return sys.stdin.read()
        return Path(args.prompt_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{args.prompt_file}: not readable as text: {error}") from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device without values, such as meta, fails here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def _sampling(
    args: argparse.Namespace, defaults: dict[str, Any], tokenizer: Tokenizer | None
) -> Sampling:
    """What the options say; else a conversation takes the checkpoint's advice; a prompt is greedy."""
    advised = defaults if args.chat and defaults.get("do_sample") else {}

    def chosen(name: str, kind: type[float] | type[int], otherwise: float) -> Any:
        given = getattr(args, name)
        value = advised.get(name) if given is None else given
        try:
            return kind(otherwise if value is None else value)
        except (TypeError, ValueError):
            raise InputError(
                f"generation_config.json: {name} = {value!r}; expected a number"
            ) from None

    return Sampling(
        temperature=chosen("temperature", float, 0.0),
        top_k=chosen("top_k", int, 0),
        top_p=chosen("top_p", float, 1.0),
        seed=args.seed,
        vocab=tokenizer.size if tokenizer else None,
    )


def _stream(result: Generation, tokenizer: Tokenizer | None, *, quiet: bool) -> str:
    """Print the text as it comes and the closing line; return the text."""
    text = tokenizer.stream() if tokenizer else None
    pieces: list[str] = []
    bar = tqdm(total=len(result.prompt), desc="prefill", unit="tok", leave=False, disable=None)
    result.progress = bar.update
    try:
        for token, _ in result:
            bar.close()
            pieces.append(text.push(token) if text else f"{token} ")
            if not quiet:
                print(pieces[-1], end="", flush=True)
    finally:  # also when interrupted: what was printed stays, with its figures
        bar.close()
        if result.token_ids:
            if not quiet:
                print(flush=True)
            _say(
                f"{len(result.prompt)} prompt tokens (0 cached), first token after "
                f"{result.ttft_s:.3f} s, {len(result.token_ids)} tokens at "
                f"{result.tokens_per_s:.1f} tokens/s, "
                f"{result.draft.tokens_per_forward:.2f} tokens/forward"
            )
    return "".join(pieces)


def _converse(
    generation: Callable[[list[int]], Generation],
    tokenizer: Tokenizer,
    message: str | None,
    *,
    thinking: bool,
) -> None:
    """Turns until an empty line or the end of the input."""
    history: list[Message] = []
    while message := message or _ask():
        history.append({"role": "user", "content": message})
        ids = tokenizer.encode(tokenizer.render(history, thinking=thinking))
        answer = _stream(generation(ids), tokenizer, quiet=False)
        history.append({"role": "assistant", "content": answer})
        message = None


def _ask() -> str:
    print("> ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not text: {error}") from None


def _document(result: Generation, text: str, load_s: float) -> dict[str, Any]:
    return {
        "text": text,
        "token_ids": result.token_ids,
        "prompt_tokens": len(result.prompt),
        "cached_tokens": 0,
        "finish_reason": result.finish_reason,
        "path": "reference",
        "draft": {
            "proposed": result.draft.proposed,
            "accepted": result.draft.accepted,
            "tokens_per_forward": round(result.draft.tokens_per_forward, 4),
        },
        "timing": {
            "load_s": round(load_s, 4),
            "ttft_s": round(result.ttft_s, 4),
            "decode_s": round(result.decode_s, 4),
            "tokens_per_s": round(result.tokens_per_s, 2),
        },
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(build_parser(), main)
