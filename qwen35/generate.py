"""`python -m qwen35.generate`: the command line over generation.py."""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qwen35.cli import Parser, parse_ids, run
from qwen35.config import as_ids
from qwen35.errors import InputError
from qwen35.generation import Generation
from qwen35.load import DTYPES, load, locate
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.keys import fingerprint, identity
from qwen35.requests import parse_request
from qwen35.sampling import Sampling
from qwen35.tokenizer import Message, Tokenizer
from reference.model import Model


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
    add(
        "--requests",
        metavar="FILE",
        help="one JSON request a line, - for standard input; one result a line",
    )
    add("--prefix-cache", type=Path, metavar="DIR", help="keep the beginnings of prompts in DIR")
    add("--prefix-cache-bytes", type=size, metavar="N", default="4G",
        help="budget of what is kept, in DIR or (--chat, --requests) in memory; 0 is off")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document instead of a stream")
    add("--digest", action="store_true", help="also give the SHA-256 of all logits")
    return parser


def size(text: str) -> int:
    """Bytes, written as 1000000, 64M or 4G."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of bytes, as in 64M or 4G")
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


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
    known_text = (folder / "tokenizer.json").exists() or not (
        args.requests or isinstance(prompt, list)
    )
    tokenizer = Tokenizer(folder) if known_text else None
    defaults = generation_config(folder)
    stop = as_ids(defaults.get("eos_token_id")) or model.config.eos_token_id

    prefix_cache = _prefix_cache(args, model, folder)

    def generation(ids: list[int], args: argparse.Namespace = args) -> Generation:
        return Generation(
            model, ids, args.max_new_tokens, _sampling(args, defaults, tokenizer),
            frozenset() if args.ignore_eos else frozenset(stop),
            args.draft_tokens, args.prefill_chunk, prefix_cache, args.digest,
        )  # fmt: skip

    if args.requests:
        return _serve(args, generation, tokenizer, load_s)
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
        "--requests": args.requests,
    }
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} are given; one prompt is expected")
    if args.chat and (args.json or args.requests or args.prompt_ids is not None):
        raise InputError("--chat goes with none of --json, --requests and --prompt-ids")
    if args.prompt_ids is not None:
        return parse_ids(args.prompt_ids)
    if args.prompt_file is None:
        if args.prompt is None and not args.chat and not args.requests:
            raise InputError("no prompt: give PROMPT, --prompt-file or --prompt-ids")
        return args.prompt
    return _text(args.prompt_file)


def _text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable as text: {error}") from None


def _prefix_cache(args: argparse.Namespace, model: Model, folder: Path) -> PrefixCache | None:
    """In the folder asked for; in memory where several prompts come one after the other."""
    if not args.prefix_cache_bytes or not (args.prefix_cache or args.chat or args.requests):
        return None
    store = None
    mark = fingerprint(folder) if args.prefix_cache else ""
    if args.prefix_cache:
        from qwen35.prefix.folder import Folder

        store = Folder(args.prefix_cache, identity(model, mark))
        for line in store.problems():
            _say(f"prefix cache: {line}")
    return PrefixCache(
        model, budget=args.prefix_cache_bytes, store=store, checkpoint=mark,
        warn=lambda line: _say(f"prefix cache: {line}"),
    )  # fmt: skip


def _serve(
    args: argparse.Namespace,
    generation: Callable[..., Generation],
    tokenizer: Tokenizer | None,
    load_s: float,
) -> int:
    """Every request of a file, in order. All are checked before the first one runs."""
    queue: list[tuple[Any, Generation]] = []
    for number, line in enumerate(_text(args.requests).splitlines(), 1):
        if line.strip():
            where = f"{args.requests}, line {number}"
            try:
                request = parse_request(line, tokenizer, thinking=not args.no_thinking)
                own = argparse.Namespace(**vars(args) | request.settings)
                queue.append((request.id, generation(request.prompt, own)))
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
    if not queue:
        raise InputError(f"{args.requests}: no request in it")
    for name, result in queue:
        found = _document(result, _stream(result, tokenizer, quiet=True), load_s)
        named = found if name is None else {"id": name} | found
        print(json.dumps(named, ensure_ascii=False), flush=True)
    return 0


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
                f"{len(result.prompt)} prompt tokens ({result.cached_tokens} cached), first token after "
                f"{result.ttft_s:.3f} s, {len(result.token_ids)} tokens at "
                f"{result.tokens_per_s:.1f} tokens/s, "
                f"{result.draft.tokens_per_forward:.2f} tokens/forward"
            )
            if result.prefix_cache:
                _say(f"prefix cache: {result.cached_tokens} tokens; {result.cache_reason}")
            if result.digest and not quiet:
                _say(f"logits_sha256 {result.logits_sha256}")
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
    found: dict[str, Any] = {
        "text": text,
        "token_ids": result.token_ids,
        "prompt_tokens": len(result.prompt),
        "cached_tokens": result.cached_tokens,
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
    if result.prefix_cache:
        found["cache_reason"] = result.cache_reason
    if result.digest:
        found["logits_sha256"] = result.logits_sha256
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(build_parser(), main)
