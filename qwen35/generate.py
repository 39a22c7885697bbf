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
    parse_ids,
    print_json,
    read_text,
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
from qwen35.load import DTYPES, load, locate
from qwen35.parallel.ranks import Ranks, add_ranks, on_ranks
from qwen35.paths import PATHS
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.keys import fingerprint, identity
from qwen35.requests import parse_requests
from qwen35.swap import parse_swap
from qwen35.terminal import say, show
from qwen35.tokenizer import Tokenizer
from reference.model import Model


def build_parser() -> Parser:
    """The parser. `completion.Settings` defines the options that a request may also have."""
    parser = Parser("python -m qwen35.generate", "Generate text with Qwen3.5.")
    add = parser.add_argument
    add("prompt", nargs="?", help="the text to continue (with --chat: the first message)")
    add("--prompt-file", metavar="FILE", help="read the prompt from FILE, - for standard input")
    add("--prompt-ids", metavar="IDS", help="the prompt as token ids: 1,2,3")
    parser.add_model(alone=False)
    add("--max-new-tokens", type=int, metavar="N",
        help=f"most tokens to generate (default: {NEW_TOKENS}; in a conversation, all that the context "
        "holds)")  # fmt: skip
    add("--temperature", type=float, metavar="T", help="0 is greedy, the default without --chat")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (0: all)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that sum to P")
    add("--min-p", type=float, metavar="P",
        help="leave out tokens below P times the likeliest one's probability")  # fmt: skip
    add("--repetition-penalty", type=float, metavar="R",
        help="divide the logits of tokens seen, the prompt included, by R (1 is off)")  # fmt: skip
    add("--presence-penalty", type=float, metavar="R",
        help="subtract R from the logits of tokens generated so far (0 is off)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="seed of the random numbers (default 0)")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end before this text (may be given more than once)")  # fmt: skip
    add("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    add(
        "--draft-tokens",
        type=int,
        metavar="K",
        help="drafts per round of the MTP head (default 3; 0 without an MTP head)",
    )
    add(
        "--prefill-chunk",
        type=chunk,
        metavar="N|auto",
        help="prompt tokens per pass, a multiple of 64 (default: auto, as many as fit into a GPU's "
        "memory, up to 8,192 on the fast path; 2,048 elsewhere)",
    )
    add("--path", choices=PATHS, default="auto",
        help="fast: decoding as one graph of kernels on a GPU; auto: fast where it can run")  # fmt: skip
    add("--moe-kernel", choices=KERNELS, default="triton",
        help="of MXFP4 experts and their router on the fast path; hip: for an MI355X")  # fmt: skip
    add("--swap", action="append", default=[], metavar="PATTERN=MODULE:CLASS",
        help="put another class, or FILE.py:CLASS, in place of nodes (may be repeated)")  # fmt: skip
    add("--device", type=device, default="cpu", metavar="D",
        help="where to compute: cpu, cuda or cuda:N (default: cpu)")  # fmt: skip
    add("--dtype", choices=DTYPES,
        help="dtype of activations and dense weights (default: the checkpoint's own)")  # fmt: skip
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="dtype of keys and values: fp8 takes half the memory, auto is the model's own")  # fmt: skip
    add("--chat", action="store_true", help="hold a conversation; an empty line ends it")
    add("--system", metavar="TEXT", help="with --chat: the system message, which comes first")
    add("--thinking", action=argparse.BooleanOptionalAction,
        help="whether to think before an answer (default: the chat template decides)")  # fmt: skip
    add("--allow-special-tokens", action="store_true",
        help="read control tokens in a message as tokens, not as text")  # fmt: skip
    add(
        "--requests",
        metavar="FILE",
        help="answer the requests in FILE (- is standard input), one JSON object per line; each result "
        "is one line",
    )
    add("--prefix-cache", type=Path, metavar="DIR", help="keep the beginnings of prompts in DIR")
    add("--prefix-cache-bytes", type=size, metavar="N", default="4G",
        help="most bytes that the prefix cache keeps, in DIR, or in memory with --chat and --requests; "
        f"0 switches it off. {SIZE_RULE}. Default: 4G")  # fmt: skip
    add("--break", dest="break_in", metavar="NODE",
        help="stop in pdb inside this node's forward, for example layers.3.linear_attn")  # fmt: skip
    add("--break-at", type=int, metavar="TOKEN",
        help="with --break: stop in the pass that computes this position (default 0)")  # fmt: skip
    add_ranks(parser)
    add("--json", action="store_true", help="print one JSON document instead of a stream")
    add("--logprobs", type=int, metavar="N",
        help="give the log probabilities of each token, and of the N likeliest at its place")  # fmt: skip
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
    prompt = _prompt(args)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__
                           if name != "chat_template_kwargs"})  # fmt: skip
    started = time.perf_counter()
    folder = locate(args.model, args.ranks)
    # Ids need no tokenizer. Without one, ids are printed, and the head's padding is unknown.
    needs_text = not (args.requests or isinstance(prompt, list))
    has_text = needs_text or (folder / "tokenizer.json").exists()
    tokenizer = Tokenizer(folder) if has_text else None
    if isinstance(prompt, list) or (prompt and tokenizer and not args.chat):
        # The prompt is checked before the weights are read, which may take minutes.
        config = Config.from_file(folder / "config.json")
        context = config.max_position_embeddings
        ids = prompt if isinstance(prompt, list) else tokenizer.encode(prompt, context=context)  # pyright: ignore
        config.check_prompt(ids, new_tokens=1)
    model = _load(args, folder)
    load_s = time.perf_counter() - started
    at = args.break_at or 0
    waiting = [] if args.break_in is None else break_in(model, args.break_in, at)
    if model.mtp is None and args.draft_tokens is None:
        say(f"{folder}: no MTP head in this checkpoint, drafting is off")
    defaults = Defaults.of_folder(folder, model.config, tokenizer)
    if defaults.warning:
        say(f"{folder}: {defaults.warning}")
    completer = Completer(model, tokenizer, defaults, _prefix_cache(args, model, folder))
    status = _answer(args, completer, prompt, settings, load_s)
    if waiting:
        more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        say(f"--break {args.break_in}: it did not stop in {waiting[0]}{more}, which did not run in a "
            f"pass over position {at}")  # fmt: skip
    return status


def _answer(
    args: argparse.Namespace, completer: Completer, prompt: str | list[int] | None,
    settings: Settings, load_s: float,
) -> int:  # fmt: skip
    """Answer the requests, the conversation or the prompt. Returns the exit status."""
    if args.requests:
        return _serve(args.requests, completer, settings, load_s, args.ranks)
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
    if args.chat and (args.requests or args.prompt_ids is not None):
        raise InputError("--chat goes with neither --requests nor --prompt-ids")
    if args.chat and args.json and not given:
        raise InputError("--chat --json is one turn: give the message as PROMPT or --prompt-file")
    if args.system is not None and not args.chat:
        raise InputError("--system: only --chat has it; a request has a message of role system")
    if not (args.chat or args.requests):
        for option, value in (("--thinking, --no-thinking", args.thinking is not None),
                              ("--allow-special-tokens", args.allow_special_tokens)):  # fmt: skip
            if value:
                raise InputError(f"{option}: only a conversation has it; give --chat or --requests")
    if args.prompt_ids is not None:
        return parse_ids(args.prompt_ids)
    if args.prompt_file is None:
        if args.prompt is None and not args.chat and not args.requests:
            raise InputError("no prompt: give PROMPT, --prompt-file or --prompt-ids")
        return args.prompt
    return args.ranks.share(lambda: read_text(args.prompt_file))


def _prefix_cache(args: argparse.Namespace, model: Model, folder: Path) -> PrefixCache | None:
    """The prefix cache: in the given folder, or in memory if there may be several prompts, or
    None."""
    if not args.prefix_cache_bytes or not (args.prefix_cache or args.chat or args.requests):
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
        model, budget=args.prefix_cache_bytes // ranks.size, store=store, checkpoint=mark,
        warn=lambda line: say(f"prefix cache: {line}"),
    )  # fmt: skip


def _serve(file: str, completer: Completer, settings: Settings, load_s: float, ranks: Ranks) -> int:
    """Answer every request of a file, in order. All are checked before the first one runs.

    A request whose logits are NaN or infinite fails alone: its line has `error`, and the status is 2.
    """
    requests = parse_requests(ranks.share(lambda: read_text(file)), file, completer, settings)
    status = 0
    for request in requests:
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
