"""`python -m qwen35.generate`: the command line over completion.py."""

import argparse
import time
from pathlib import Path
from typing import NoReturn

from fast.target import KERNELS
from qwen35.cache import KV_CACHE_DTYPES
from qwen35.cli import (
    SIZE_RULE,
    Parser,
    counted,
    device,
    folder_name,
    named,
    parse_ids,
    print_json,
    run,
    size,
)
from qwen35.completion import NEW_TOKENS, Completer, Completion, Settings
from qwen35.config import Config
from qwen35.conversation import converse
from qwen35.debugger import break_in
from qwen35.defaults import Defaults
from qwen35.errors import InputError
from qwen35.finite import NotFiniteError
from qwen35.generation import check_limits
from qwen35.load import DTYPES, load, locate
from qwen35.parallel.ranks import add_ranks, on_ranks
from qwen35.paths import PATHS
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.keys import fingerprint, identity
from qwen35.reading import read_text
from qwen35.requests import Line, parse_requests, read_lines
from qwen35.swap import parse_swap
from qwen35.terminal import say, show
from qwen35.tokenizer import Tokenizer
from reference.model import Model

KEPT_BYTES = 4 << 30  # default of --prefix-cache-bytes


def build_parser() -> Parser:
    """The parser. `completion.Settings` defines the options that a request may also have."""
    parser = Parser(
        "python -m qwen35.generate",
        "Continue a prompt with Qwen3.5. The text goes to standard output, progress and a line of "
        "figures to standard error. In a conversation (--chat, or messages in --requests), sampling "
        "options that are not given are as generation_config.json advises.",
    )
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?",
        help="the text to continue; with --chat it is the first message")  # fmt: skip
    add("--prompt-file", type=named, metavar="FILE",
        help="read the prompt from FILE, or from standard input if FILE is -")  # fmt: skip
    add("--prompt-ids", metavar="IDS", help="give the prompt as token ids, as in 1,2,3")
    parser.add_model(alone=False)
    add("--max-new-tokens", type=int, metavar="N",
        help=f"generate at most N tokens (default: {NEW_TOKENS}; in a conversation, as many as "
        "generation_config.json says or the context holds)")  # fmt: skip
    add("--temperature", type=float, metavar="T",
        help="draw tokens at temperature T; 0 always takes the likeliest one (default: 0)")  # fmt: skip
    add("--top-k", type=int, metavar="K",
        help="draw from the K likeliest tokens only (default: 0, from all)")  # fmt: skip
    add("--top-p", type=float, metavar="P",
        help="draw from the likeliest tokens whose probabilities sum to P only (default: 1, from "
        "all)")  # fmt: skip
    add("--min-p", type=float, metavar="P",
        help="leave out tokens less likely than P times the likeliest one (default: 0, "
        "none)")  # fmt: skip
    add("--repetition-penalty", type=float, metavar="R",
        help="divide positive logits of tokens in the prompt and the text by R, and multiply negative "
        "ones (default: 1, which changes nothing)")  # fmt: skip
    add("--presence-penalty", type=float, metavar="R",
        help="subtract R from the logits of tokens in the text so far (default: 0)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S",
        help="choose the random numbers by the integer S (default: 0)")  # fmt: skip
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end before TEXT, which is not printed; may be given more than once")  # fmt: skip
    add("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    add("--draft-tokens", type=int, metavar="K",
        help="draft K tokens with the MTP head in each round; the text does not depend on it (default: "
        "3, or 0 for a checkpoint without an MTP head)")  # fmt: skip
    add("--prefill-chunk", type=chunk, metavar="N|auto",
        help="compute N prompt tokens per pass, a multiple of 64; the text does not depend on it "
        "(default: auto, as many as fit into a GPU's memory: up to 8,192 on the fast path, 2,048 "
        "elsewhere)")  # fmt: skip
    add("--path", choices=PATHS, default="auto",
        help="run the fast path (each decode round is one graph of kernels on a GPU), the reference, "
        "or the fast path wherever it can run (default: auto)")  # fmt: skip
    add("--moe-kernel", choices=KERNELS, default="triton",
        help="compute MXFP4 experts and their router on the fast path with Triton's kernels, or on an "
        "MI355X with HIP kernels (default: triton)")  # fmt: skip
    add("--swap", action="append", default=[], metavar="PATTERN=MODULE:CLASS",
        help="replace the nodes whose names fit PATTERN by CLASS of MODULE or of FILE.py; may be given "
        "more than once")  # fmt: skip
    add("--device", type=device, default="cpu", metavar="D",
        help="compute on D: cpu, cuda or cuda:N (default: cpu)")  # fmt: skip
    add("--dtype", choices=DTYPES,
        help="use this dtype for activations and dense weights (default: the checkpoint's "
        "own)")  # fmt: skip
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="store keys and values in the model's dtype (auto) or in e4m3 (fp8), which halves their "
        "memory and changes the bits (default: auto)")  # fmt: skip
    add("--chat", action="store_true",
        help="hold a conversation, which an empty line ends; with --json, one turn of it")  # fmt: skip
    add("--system", metavar="TEXT", help="with --chat: begin with TEXT as the system message")
    add("--thinking", action=argparse.BooleanOptionalAction,
        help="in a conversation: ask for a thought before the answer, or for none (default: the chat "
        "template decides)")  # fmt: skip
    add("--allow-special-tokens", action="store_true",
        help="in a conversation: read the written form of a control token in a message as that token, "
        "not as text")  # fmt: skip
    add("--requests", type=named, metavar="FILE",
        help="answer the requests in FILE, or in standard input if FILE is -: each line is a JSON "
        "object, and gives one line of JSON")  # fmt: skip
    add("--prefix-cache", type=folder_name, metavar="DIR",
        help="keep the computed beginnings of prompts in DIR, and reuse those that are "
        "there")  # fmt: skip
    add("--prefix-cache-bytes", type=size, metavar="N",
        help="keep at most N bytes of them, in DIR, or in memory with --chat or --requests; 0 keeps "
        f"none. {SIZE_RULE} (default: 4G)")  # fmt: skip
    add("--break", dest="break_in", metavar="NODE",
        help="stop in pdb inside the forward of NODE, for example layers.3.linear_attn")  # fmt: skip
    add("--break-at", type=int, metavar="TOKEN",
        help="with --break: stop in the pass that computes the token at this position (default: 0, the "
        "first one of the prompt)")  # fmt: skip
    add_ranks(parser)
    add("--json", action="store_true",
        help="print one JSON document with the text, the ids and the figures")  # fmt: skip
    add("--logprobs", type=int, metavar="N",
        help="also give the log probability of each token, and those of the N likeliest at its "
        "place")  # fmt: skip
    add("--digest", action="store_true", help="also give the SHA-256 of all logits")
    return parser


def chunk(text: str) -> int | None:
    """Parse `--prefill-chunk`."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected auto or a number") from None


def main(args: argparse.Namespace) -> int:
    if args.break_at is not None and args.break_in is None:
        raise InputError(f"--break-at {args.break_at} goes with --break NODE")
    if args.break_in is not None and args.ranks.size > 1:
        raise InputError(f"--break {args.break_in} stops one process; --tp is {args.tp}")
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__
                           if name != "chat_template_kwargs"})  # fmt: skip
    prompt, lines = _prompt(args), _lines(args, settings)
    started = time.perf_counter()
    folder = locate(args.model, args.ranks)
    # Ids need no tokenizer. Without one, ids are printed, and the head's padding is unknown.
    needs_text = not (lines or isinstance(prompt, list))
    has_text = needs_text or (folder / "tokenizer.json").exists()
    tokenizer = Tokenizer(folder) if has_text else None
    config = Config.from_file(folder / "config.json")
    defaults = Defaults.of_folder(folder, config, tokenizer)
    if lines is None:
        _check(args, config, defaults, tokenizer, prompt, settings)
    model = _load(args, folder)
    load_s = time.perf_counter() - started
    at = args.break_at or 0
    waiting = [] if args.break_in is None else break_in(model, args.break_in, at)
    if model.mtp is None and args.draft_tokens is None:
        say(f"{folder}: no MTP head in this checkpoint, drafting is off")
    if defaults.warning:
        say(f"{folder}: {defaults.warning}")
    completer = Completer(model, tokenizer, defaults, _prefix_cache(args, model, folder))
    if lines is not None:
        status = _serve(lines, args.requests, completer, load_s)
    else:
        status = _answer(args, completer, prompt, settings, load_s)
    if waiting:
        more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        say(f"--break {args.break_in}: it did not stop in {waiting[0]}{more}, which did not run in a "
            f"pass over position {at}")  # fmt: skip
    return status


def _check(
    args: argparse.Namespace, config: Config, defaults: Defaults, tokenizer: Tokenizer | None,
    prompt: str | list[int] | None, settings: Settings,
) -> None:  # fmt: skip
    """InputError for a prompt or a setting that does not fit the checkpoint, before its weights are read,
    which may take minutes."""
    vocab = tokenizer.size if tokenizer else None
    check_limits(config, settings.draft_tokens, settings.logprobs, vocab)
    sampling = settings.sampling(defaults, vocab, conversation=args.chat)
    for name, reason in settings.idle(sampling.temperature, conversation=args.chat).items():
        raise InputError(f"--{name.replace('_', '-')} has no effect: {reason}")
    if prompt is None or args.chat:
        return
    if isinstance(prompt, str):
        assert tokenizer is not None, "a text needs one"
        prompt = tokenizer.encode(prompt, context=config.max_position_embeddings)
    config.check_prompt(prompt, new_tokens=1)


def _answer(
    args: argparse.Namespace, completer: Completer, prompt: str | list[int] | None,
    settings: Settings, load_s: float,
) -> int:  # fmt: skip
    """Answer the conversation or the prompt. Returns the exit status."""
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    if args.chat and not args.json:
        message = prompt if isinstance(prompt, str) else None
        converse(completer, settings, opening, message, args.ranks)
        return 0
    given = [*opening, {"role": "user", "content": prompt}] if args.chat else prompt
    completion = completer.complete(completer.prompt(given, settings), settings)
    show(completion, quiet=args.json)
    if args.json:
        print_json(_document(completion, load_s))
    return 0


def _prompt(args: argparse.Namespace) -> str | list[int] | None:
    """The prompt as text or ids, or None if a conversation asks for it."""
    sources = {
        "PROMPT": args.prompt,
        "--prompt-file": args.prompt_file,
        "--prompt-ids": args.prompt_ids,
        "--requests": args.requests,
    }
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} are given; one prompt is expected")
    if args.chat and (args.requests is not None or args.prompt_ids is not None):
        raise InputError("--chat goes with neither --requests nor --prompt-ids")
    if args.chat and args.json and not given:
        raise InputError("--chat --json is one turn: give the message as PROMPT or --prompt-file")
    if args.system is not None and not args.chat:
        raise InputError("--system: only --chat has it; a request has a message of role system")
    if not args.chat and args.requests is None:
        if args.prefix_cache_bytes is not None and args.prefix_cache is None:
            raise InputError(
                "--prefix-cache-bytes: one prompt has no prefix cache in memory; give "
                "--prefix-cache DIR, --chat or --requests"
            )
        for option, value in (("--thinking, --no-thinking", args.thinking is not None),
                              ("--allow-special-tokens", args.allow_special_tokens)):  # fmt: skip
            if value:
                raise InputError(f"{option}: only a conversation has it; give --chat or --requests")
    if args.prompt_ids is not None:
        return parse_ids(args.prompt_ids)
    if args.prompt_file is None:
        if args.prompt is None and not args.chat and args.requests is None:
            raise InputError("no prompt: give PROMPT, --prompt-file or --prompt-ids")
        return args.prompt
    return args.ranks.share(lambda: read_text(args.prompt_file))


def _lines(args: argparse.Namespace, settings: Settings) -> list[Line] | None:
    """The lines of --requests."""
    if args.requests is None:
        return None
    text = args.ranks.share(lambda: read_text(args.requests))
    return read_lines(text, args.requests, settings)


def _prefix_cache(args: argparse.Namespace, model: Model, folder: Path) -> PrefixCache | None:
    """The prefix cache: in the given folder, or in memory if there may be several prompts, or
    None."""
    budget = KEPT_BYTES if args.prefix_cache_bytes is None else args.prefix_cache_bytes
    if not budget or not (args.prefix_cache or args.chat or args.requests):
        return None
    store, ranks = None, args.ranks
    mark = fingerprint(folder) if args.prefix_cache else ""
    if args.prefix_cache:
        from qwen35.prefix.folder import Folder

        own = f"rank-{ranks.rank}-of-{ranks.size}" if ranks.size > 1 else ""
        store = Folder(args.prefix_cache / own, identity(model, mark))
        for line in store.problems():
            say(f"prefix cache: {line}")
    return PrefixCache(
        model, budget=budget // ranks.size, store=store, checkpoint=mark,
        warn=lambda line: say(f"prefix cache: {line}"),
    )  # fmt: skip


def _serve(lines: list[Line], file: str, completer: Completer, load_s: float) -> int:
    """Answer every request of a file, in order. All are checked before the first one runs.

    A request whose logits are NaN or infinite fails alone: its line has `error`, and the status is 2.
    """
    status = 0
    for request in parse_requests(lines, file, completer):
        try:
            show(request.completion, quiet=True)
            found = _document(request.completion, load_s)
        except NotFiniteError as error:
            found, status = {"error": str(error)}, 2
        print_json(found if request.id is None else {"id": request.id} | found)
    return status


def _load(args: argparse.Namespace, folder: Path) -> Model:
    """Load the model, and print a line if not all of it is the reference."""
    # A CPU has no fast path, so `auto` gives no warning there, unless a kernel of it is asked for.
    on_cpu = args.device.type == "cpu"
    quiet = args.path == "auto" and on_cpu and args.moe_kernel == "triton"
    path = "reference" if quiet else args.path
    swaps = [parse_swap(text) for text in args.swap]
    model = load(
        folder, dtype=DTYPES.get(args.dtype), device=args.device, path=path, swaps=swaps,
        kv_cache_dtype=args.kv_cache_dtype, moe_kernel=args.moe_kernel, ranks=args.ranks,
    )  # fmt: skip
    if args.ranks.size > 1:
        held = args.ranks.exchange(sum(weight.nbytes for weight in model.parameters()))
        say(f"{len(held)} ranks, each with {max(held) / 1e6:,.1f} MB of weights")
    fast = sum(type(layer).__module__.startswith("fast.") for layer in model.layers)
    if fast or swaps:
        own = f"; {counted(len(swaps), 'pattern')} swapped" if swaps else ""
        say(f"{fast} of {len(model.layers)} layers run on the fast path{own}")
    return model


def _document(completion: Completion, load_s: float) -> dict[str, object]:
    document = completion.document()
    document["timing"] = {"load_s": round(load_s, 4)} | document["timing"]
    return document


def command() -> NoReturn:
    """The console command `qwen35`."""
    parser = build_parser()
    run(parser, on_ranks(parser, main))


if __name__ == "__main__":
    command()
