"""`python -m tools.fingerprint`: hash all kinds of output, to check a refactor.

Run it on both commits, on the same machine, and compare what it prints:

    git worktree add ../before HEAD~1
    python -m tools.fingerprint --checkout ../before > before.txt
    python -m tools.fingerprint > after.txt
    diff before.txt after.txt

It runs the command lines of a checkout, each in its own process, and reads their documents and
files. Therefore a checkout may be older than this tool. No digest contains a time, a path or a
version. If a command fails, or prints another document than it should, its line has the error
instead of a digest, and the exit status is 1.

text     tokens, accepted drafts and logits of two prompts, each greedy and sampled
trace    the output of every node
locals   the named locals of every node's forward
convert  all files of a conversion of the embedded checkpoint
diff     the rows of a comparison of the embedded checkpoint with its MXFP4 conversion
emulate  tokens and number of instructions of one decode round in gfx950 code
compile  the table of all kernels for a target
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qwen35.cli import Parser, folder_name, one_line, print_json, run
from qwen35.errors import InputError
from qwen35.progress import steps

ROOT = Path(__file__).parents[1]
PROMPT = "The whale had not been seen since the morning, and the old man stood at the rail. " * 6
REQUESTS = (
    {"prompt": "The whale"},
    {"prompt": PROMPT},
    {"prompt": "The whale", "temperature": 0.8, "top_k": 20, "seed": 5},
    {"prompt": PROMPT, "temperature": 1.0, "top_p": 0.9, "seed": 6},
)
# The parts of a document that are the same on every run.
TEXT = ("text", "token_ids", "prompt_tokens", "finish_reason", "draft", "logits_sha256")
EMULATED = ("text", "token_ids", "rounds", "launches_a_round", "instructions")


class CommandError(Exception):
    """A command line of the checkout failed. The message has the last line that it printed, or what
    its document lacks."""


@dataclass(frozen=True)
class Runner:
    """Runs the command lines of a checkout. scratch: a folder for the files that they write."""

    checkout: Path
    scratch: Path

    def __call__(self, module: str, *arguments: object, fine: tuple[int, ...] = (0,)) -> str:
        """The standard output of `python -m MODULE ARGUMENTS`. fine: the exit statuses of success.
        CommandError for other statuses."""
        # An installed copy of the project must not stand in for a file that an old checkout lacks.
        if not list(self.checkout.glob(f"{module.replace('.', '/')}*")):
            raise CommandError(f"{module}: this checkout has no such command")
        ended = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True, text=True, check=False, cwd=self.checkout,
            env=os.environ | {"PYTHONPATH": str(self.checkout)},
        )  # fmt: skip
        if ended.returncode not in fine:
            lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
            raise CommandError(f"{module}: {lines[-1]}")
        return ended.stdout

    def documents(
        self, module: str, *arguments: object, fine: tuple[int, ...] = (0,)
    ) -> list[dict[str, Any]]:
        """The JSON documents that a command prints, one a line. CommandError if a line is none."""
        lines = self(module, *arguments, fine=fine).splitlines()
        try:
            found = [json.loads(line) for line in lines]
        except ValueError as error:
            raise CommandError(f"{module}: no JSON document: {error}") from None
        if not found or not all(isinstance(one, dict) for one in found):
            raise CommandError(f"{module}: no JSON document is printed")
        return found

    def converted(self, name: str, *options: object, source: object = "tiny") -> Path:
        """The folder of a conversion, which is made on the first call. source: the checkpoint to
        convert."""
        folder = self.scratch / name
        if not folder.exists():
            self("tools.convert", source, folder, *options)
        return folder


def text(runner: Runner, *options: object) -> str:
    """The digest of the continuations of REQUESTS."""
    requests = runner.scratch / "requests.jsonl"
    requests.write_text("\n".join(map(json.dumps, REQUESTS)), encoding="utf-8")
    found = runner.documents(
        "qwen35.generate", "--requests", requests, "--max-new-tokens", 24, "--digest", *options
    )
    return of_documents(found, TEXT)


def trace(runner: Runner, *, locals_of_nodes: bool) -> str:
    """The digest of every node's output, or of the named locals (the tensors with a colon in the
    name)."""
    file = runner.scratch / "trace.safetensors"
    if not file.exists():
        ids = ",".join(str(7 * i % 1000) for i in range(70))
        runner("tools.trace", "tiny", "--ids", ids, "--locals", "-o", file)
    return of_tensors(file, lambda name: (":" in name) == locals_of_nodes)


def mxfp4(runner: Runner) -> Path:
    """The embedded checkpoint with MXFP4 experts."""
    return runner.converted("mxfp4", "--to", "mxfp4")


def in_bf16(runner: Runner, ranks: int) -> Path:
    """The MXFP4 conversion, converted back to bf16; with more than one rank, a folder for each."""
    return runner.converted(f"bf16-{ranks}", "--to", "bf16", "--tp", ranks, source=mxfp4(runner))


def compared(runner: Runner) -> str:
    """The digest of a comparison. Its exit status is 1, because MXFP4 experts have larger errors than
    bf16."""
    options = "tiny", "--against", mxfp4(runner), "--json"
    return of_documents(
        runner.documents("tools.diff", *options, fine=(0, 1)), ("pass", "mode", "rows")
    )


def emulated(runner: Runner) -> str:
    """The digest of one decode round with MXFP4 experts in gfx950 code."""
    options = "--model", mxfp4(runner), "--max-new-tokens", 2, "--json"
    return of_documents(runner.documents("tools.emulate", "The whale", *options), EMULATED)


def compiled(runner: Runner, target: str) -> str:
    """The digest of the table of all kernels for a target. CommandError if a kernel does not compile,
    because then it has no row."""
    (found,) = runner.documents("tools.compile", "--target", target, "--json", fine=(0, 1))
    if worse := found.get("worse"):
        raise CommandError(f"tools.compile: {worse[0]}")
    return of_documents(sorted(found["kernels"], key=lambda row: row["name"]), None)


LINES: dict[str, Callable[[Runner], str]] = {
    "text drafts=0": lambda runner: text(runner, "--draft-tokens", 0),
    "text drafts=3": lambda runner: text(runner, "--draft-tokens", 3),
    "text kv-cache=fp8": lambda runner: text(runner, "--kv-cache-dtype", "fp8"),
    "trace": lambda runner: trace(runner, locals_of_nodes=False),
    "locals": lambda runner: trace(runner, locals_of_nodes=True),
    "convert to=mxfp4": lambda runner: of_folder(mxfp4(runner)),
    "convert to=bf16": lambda runner: of_folder(in_bf16(runner, ranks=1)),
    "convert to=fp8": lambda runner: of_folder(runner.converted("fp8", "--to", "fp8")),
    "convert to=bf16 tp=2": lambda runner: of_folder(in_bf16(runner, ranks=2)),
    "diff": compared,
    "emulate": emulated,
    "compile target=gfx950": lambda runner: compiled(runner, "gfx950"),
    "compile target=sm_90": lambda runner: compiled(runner, "sm_90"),
}
KINDS = tuple(dict.fromkeys(name.split()[0] for name in LINES))


def of_documents(documents: Iterable[dict[str, Any]], keys: Sequence[str] | None) -> str:
    """The SHA-256 of JSON documents, in their order. keys: those that count (None: all). CommandError
    if a document lacks one, as an older checkout's may."""
    total = hashlib.sha256()
    for document in documents:
        if missing := [key for key in keys or () if key not in document]:
            raise CommandError(f"the document of this checkout has no {missing[0]!r}")
        part = document if keys is None else {key: document[key] for key in keys}
        total.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return total.hexdigest()


def of_tensors(file: Path, wanted: Callable[[str], bool]) -> str:
    """The SHA-256 of the wanted tensors of a safetensors file, in the order of their names. It
    covers name, dtype, shape and bytes."""
    total = hashlib.sha256()
    with safe_open(file, "pt") as held:
        for name in sorted(filter(wanted, held.keys())):
            tensor = held.get_tensor(name)
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def of_folder(folder: Path) -> str:
    """The SHA-256 of the relative names and contents of all files in a folder."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def build_parser() -> Parser:
    parser = Parser(
        "python -m tools.fingerprint",
        "Print one SHA-256 for each kind of output. Two commits that print the same lines compute the "
        "same.",
    )
    add = parser.add_argument
    add("--checkout", type=folder_name, default=ROOT, metavar="DIR",
        help="run the project in DIR, a checkout of any commit (default: this one)")  # fmt: skip
    add("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND",
        help=f"hash only these kinds of output, of {', '.join(KINDS)} (default: all)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document")
    return parser


def main(args: argparse.Namespace) -> int:
    checkout = args.checkout.resolve()
    if not (checkout / "qwen35").is_dir():
        raise InputError(f"{args.checkout} is no checkout of this project: it has no folder qwen35")
    found: dict[str, str] = {}
    failed = 0
    names = [name for name in LINES if name.split()[0] in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        runner = Runner(checkout, Path(scratch))
        for name in steps(names, "outputs"):
            try:
                found[name] = LINES[name](runner)
            except CommandError as error:
                found[name] = f"failed: {one_line(error)}"
                failed += 1
            if not args.json:
                print(f"{name:24} {found[name]}", flush=True)
    if args.json:
        print_json(found)
    return 1 if failed else 0


if __name__ == "__main__":
    run(build_parser(), main)
