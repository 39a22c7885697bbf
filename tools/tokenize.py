"""`python -m tools.tokenize TEXT`: show the token ids of a text or a conversation, with their
pieces."""

import argparse
from pathlib import Path
from typing import Any

from qwen35.cli import Parser, counted, named, parse_ids, print_json, run
from qwen35.errors import InputError
from qwen35.load import TINY
from qwen35.messages import parse_messages
from qwen35.pieces import Piece, piece
from qwen35.reading import read_json, read_text
from qwen35.tokenizer import Prompt, Tokenizer
from weights.hub import is_hub_id, one_line

READ = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja"]


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.tokenize",
        "Print the token ids of a text or a conversation, and what each of them stands for.",
    )
    add = parser.add_argument
    add("text", nargs="?", metavar="TEXT",
        help="the text; the written form of a control token in it becomes that token")  # fmt: skip
    add("--file", type=named, metavar="FILE",
        help="read the text from FILE, or from standard input if FILE is -")  # fmt: skip
    add("--decode", metavar="IDS", help="print what these ids stand for, as in 1,2,3")
    add("--messages", type=named, metavar="FILE",
        help="read a conversation from FILE, a JSON list of objects with role and content, or from "
        "standard input if FILE is -")  # fmt: skip
    add("--chat", action="store_true",
        help="take the text as a user's message, and print the prompt that the chat template makes of "
        "it")  # fmt: skip
    add("--system", metavar="TEXT", help="with --chat: begin with TEXT as the system message")
    add("--thinking", action=argparse.BooleanOptionalAction,
        help="with a conversation: ask for a thought before the answer, or for none (default: the chat "
        "template decides)")  # fmt: skip
    add("--model", default="tiny", metavar="DIR|HUB_ID",
        help="use the tokenizer of this checkpoint (default: tiny, the embedded model)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document")
    return parser


def main(args: argparse.Namespace) -> int:
    source = _check(args)
    folder = _folder(args.model)
    if not (folder / "tokenizer.json").exists():
        raise InputError(f"{folder / 'tokenizer.json'}: no such file")
    tokenizer = Tokenizer(folder)
    prompt = _prompt(args, source, tokenizer)
    pieces = [piece(tokenizer, token) for token in prompt.ids]
    unknown = [token for token in prompt.ids if tokenizer.written(token) is None]
    if unknown:
        raise InputError(f"id {unknown[0]} is not in the vocabulary 0..{tokenizer.size - 1}")
    text = prompt.text
    if text is None:
        text = b"".join(one.raw or one.text.encode() for one in pieces).decode(errors="replace")
    if args.json:
        print_json({"text": text, "ids": prompt.ids, "pieces": [one.document() for one in pieces]})
    else:
        _show(pieces, text)
        if args.decode is not None:
            print(repr(text))
    return 0


def _check(args: argparse.Namespace) -> str:
    """The name of the one input that is given. InputError if the options do not fit together."""
    sources = {
        "TEXT": args.text, "--file": args.file, "--decode": args.decode, "--messages": args.messages,
    }  # fmt: skip
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        found = f"{given[0]} and {given[1]} are given" if given else "none is given"
        raise InputError(f"one of {', '.join(sources)} is expected; {found}")
    is_text = given[0] in ("TEXT", "--file")
    if args.chat and not is_text:
        raise InputError(f"--chat takes a text; {given[0]} is given")
    if args.system is not None and not args.chat:
        raise InputError("--system: only --chat has it")
    if args.thinking is not None and not (args.chat or args.messages):
        raise InputError("--thinking, --no-thinking: only --chat and --messages have it")
    return given[0]


def _folder(model: str) -> Path:
    """A folder, `tiny`, or a hub repository, of which only the tokenizer's files are downloaded."""
    folder = TINY if model == "tiny" else Path(model)
    if folder.is_dir():
        return folder
    if not is_hub_id(model):
        raise InputError(f"{model}: no such folder (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    with one_line(f"{model} (no such folder here)"):
        return Path(snapshot_download(model, allow_patterns=READ))


def _prompt(args: argparse.Namespace, source: str, tokenizer: Tokenizer) -> Prompt:
    if source == "--decode":
        return Prompt(parse_ids(args.decode))
    if source == "--messages":
        return tokenizer.chat(_messages(args.messages), thinking=args.thinking)
    text = args.text if source == "TEXT" else read_text(args.file)
    if not args.chat:
        return Prompt(tokenizer.encode(text), text)
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    return tokenizer.chat([*opening, {"role": "user", "content": text}], thinking=args.thinking)


def _messages(file: str) -> list[dict[str, Any]]:
    given = read_json(file)
    try:
        return parse_messages(given)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _show(pieces: list[Piece], text: str) -> None:
    """Print a line per token (position, id, kind, piece), and then the totals."""
    width = max(len("place"), len(str(len(pieces))))
    size = max([len("id"), *(len(str(one.id)) for one in pieces)])
    kind = max([len("kind"), *(len(_kind(one)) for one in pieces)])
    print(f"{'place':>{width}}  {'id':>{size}}  {'kind':{kind}}  piece")
    for place, one in enumerate(pieces):
        print(f"{place:>{width}}  {one.id:>{size}}  {_kind(one):{kind}}  {one}")
    controls = sum(one.is_control for one in pieces)
    print(
        f"{counted(len(pieces), 'token')}, {controls} of them control tokens; {len(text):,} characters, "
        f"{len(text.encode()):,} bytes"
    )


def _kind(one: Piece) -> str:
    return "control" if one.is_control else "text" if one.raw is None else "bytes"


if __name__ == "__main__":
    run(build_parser(), main)
