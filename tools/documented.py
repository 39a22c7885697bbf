"""`python -m tools.documented`: list the commands and Python examples of README and docs.

The tests run the `small` examples of each page, in the order of the page. The other examples are in
`ELSEWHERE`, with the reason. `--run KIND` runs those too, together with the small ones of their
page, because these may write files that they read.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwen35.cli import Parser, print_json, run

ROOT = Path(__file__).parents[1]
PROGRAMS = (
    "python", "torchrun", "pytest", "pip", "qwen35", ".ci/run", "echo", "printf", "cat", "git",
)  # fmt: skip
SHELL = {"|", ">", "<", ";"}  # words that need a shell
KINDS = {
    "small": "a few seconds on a CPU",
    "minutes": "longer, on a CPU",
    "gpu": "needs a GPU",
    "setup": "installs packages, or runs all checks",
}
SMALL = "small"

# Commands, and lines of Python examples, that are not small, each with its kind and the reason.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "pip install torch==2.13.0 -e .": ("setup", "installs; the next line of the README includes it"),
    "pip install torch==2.13.0 -e '.[test]'": ("setup", "installs; .ci/run does it"),
    "pip install -e '.[fast]'": ("setup", "installs Triton; a part of .[test]"),
    "pip install -e '.[hip]'": ("setup", "installs; ziglang is among the tests' packages too"),
    "pytest": ("setup", "all checks; .ci/run does it"),
    "pytest -m slow": ("minutes", "larger forms of what pytest runs"),
    ".ci/run": ("setup", "all checks after an installation"),
    "python -m tools.exact": ("minutes", "one minute; tests/tools/test_exact.py has a part"),
    "python -m tools.exact --all": ("minutes", "an hour: 3,616 continuations"),
    "python -m tools.compile": ("minutes", "2 minutes; tests/tools/test_compile.py has a part"),
    "python -m tools.compile --hip": ("minutes", "15 s; tests/fast/test_moe_hip.py has a part"),
    "python -m tools.count": ("minutes", "30 s; tests/tools/test_count.py has a small block"),
    "python -m tools.project": ("minutes", "20 s; tests/tools/test_project.py has a small model"),
    "python -m tools.project --measured tools/project_h200.json": (
        "minutes", "20 s; tests/tools/test_project.py has a small model"),
    "python -m tools.emulate 'The whale' --max-new-tokens 8": (
        "minutes", "half a minute; tests/tools/test_emulate.py has a shorter text"),
    "python -m tools.emulate 'In the beginning' --check": (
        "minutes", "half a minute; tests/tools/test_emulate.py has a shorter text"),
    "python -m tools.emulate 'In the beginning' --model tiny-mxfp4 --moe-kernel hip --check": (
        "minutes", "half a minute; tests/tools/test_emulate.py has a shorter text"),
    "pytest tests/fast": ("minutes", "90 s; a part of all checks"),
    "python -m tools.bench language": ("minutes", "3 minutes: 146 documents"),
    "python -m tools.bench language tiny-mxfp4": ("minutes", "3 minutes: 146 documents"),
    "python -m tools.bench language --kv-cache-dtype fp8": ("minutes", "3 minutes: 146 documents"),
    "python -m tools.bench exactness": ("minutes", "a minute: repeated"),
    "python -m tools.bench generate": ("minutes", "5 minutes, beside transformers"),
    "python -m tools.bench mapped": ("minutes", "a minute: a file of 8 GB, with holes"),
    "python -m tools.bench ttft --plot FILE": ("minutes", "5 minutes; needs matplotlib"),
    "torchrun --nproc-per-node 2 -m qwen35.generate 'In the beginning' --tp 2": (
        "minutes", "starts processes; tests/qwen35/parallel has it"),
    "torchrun --nproc-per-node 4 -m qwen35.generate --tp 4 --chat": (
        "minutes", "starts processes"),
    "torchrun --nproc-per-node 2 -m qwen35.generate 'In the beginning' --model parts --tp 2": (
        "minutes", "starts processes; tests/qwen35/parallel has it"),
    "torchrun --nproc-per-node 2 -m tools.exact --tp 2": (
        "minutes", "2 minutes; tests/tools/test_over_ranks.py has a part"),
    "torchrun --nproc-per-node 2 -m tools.diff tiny --tp 2": (
        "minutes", "starts processes; tests/tools/test_over_ranks.py has a part"),
    "python -m tools.corpus corpus": ("setup", "fetches packages from Debian"),
    "python -m tools.documented --run minutes": ("minutes", "this command itself"),
    "python -m tools.mutate --folder mutants --module qwen35/sampling.py": (
        "minutes", "7 minutes: 200 changes; tests/tools/test_mutate.py has a part"),
    "python -m tools.hostile --files 20000": (
        "minutes", "a quarter of an hour; tests/tools/test_hostile.py has a part"),
    "python -m tools.hostile --texts": (
        "minutes", "half a minute; tests/tools/test_hostile.py has a part"),
    "python -m tools.fingerprint": (
        "minutes", "2 minutes; tests/tools/test_fingerprint.py has a part"),
    "python -m tools.train_tiny corpus trained": ("gpu", "8 minutes of training, after tools.corpus"),
    "python -m qwen35.generate 'The whale' --device cuda": ("gpu", "a GPU is asked for"),
    "python -m qwen35.generate 'In the beginning' --device cuda": ("gpu", "a GPU is asked for"),
    "python -m qwen35.generate 'In the beginning' --model path/to/Qwen3.5-397B-A17B-MXFP4 "
    "--device cuda --moe-kernel hip": ("gpu", "an MI355X is asked for"),
    "python -m tools.bench step --moe-kernel hip": ("gpu", "an MI355X is asked for"),
    "python -m tools.bench moe --moe-kernel hip": ("gpu", "an MI355X is asked for"),
    "python -m tools.exact --path fast --device cuda": ("gpu", "a minute"),
    "pytest tests/fast/test_faults_on_card.py": ("gpu", "a minute: skipped without one"),
    "python -m tools.bench hip_port": ("gpu", "some minutes"),
    "python -m tools.bench prefill": ("gpu", "a minute: random weights"),
    "python -m tools.bench ttft --config 397b --tp 8 --tail 63 --prefill-chunk 8192 "
    "--lengths 16384 50048 100352 196608 --no-folder": ("gpu", "3 minutes: random weights"),
    "torchrun --nproc-per-node 2 -m qwen35.generate 'In the beginning' --tp 2 --device cuda": (
        "gpu", "two of them"),
    "torchrun --nproc-per-node 2 -m tools.bench allreduce": ("gpu", "two of them"),
    "torchrun --nproc-per-node 2 -m tools.bench step --config 35b --tp 2": ("gpu", "two of them"),
    "python -m tools.bench step": ("gpu", "20 GB of random weights, a minute"),
    "python -m tools.bench stream --device cuda": ("gpu", "a minute"),
    "python -m tools.bench moe": ("gpu", "a minute"),
    "python -m tools.tune": ("gpu", "an hour: writes fast/configs.json"),
    'model = qwen35.load("path/to/Qwen3.5-35B-A3B", device="cuda", path="fast")': (
        "gpu", "a GPU is asked for"),
}  # fmt: skip

# Exit statuses other than 0 that a page promises.
STATUSES = {
    "python -m tools.diff tiny --against tiny-mxfp4 --report diff.html": 1,  # experts differ
}

# Commands to run before the first one of a page, and files that a page expects.
BEFORE = {"docs/diff.md": ["python -m tools.convert tiny tiny-mxfp4 --to mxfp4"]}
FILES = {
    "docs/diff.md": {"my_kernels.py": "from reference.moe import Experts as Reference\n\n\n"
                     "class Experts(Reference):\n    @classmethod\n"
                     "    def from_reference(cls, node):\n        node.__class__ = cls\n"
                     "        return node\n"},
    "docs/generate.md": {"requests.jsonl": '{"prompt": "In the beginning", "max_new_tokens": 4}\n'},
}  # fmt: skip

# Placeholders in commands, and what replaces them when they are run.
PLACEHOLDERS = {"MODEL": "tiny", "DIR": "kept", "FILE": "plot.svg"}
A_CHECKPOINT = re.compile(r"/?path/to/[\w.-]+")

FENCE = re.compile(r" *```(\w*)")
INLINE = re.compile(r"`([^`]+)`")
NAMED = re.compile(r"# (\w+\.py)\n")  # first line of an example that is a file
ANSWER = re.compile(r"(?:\(Pdb\)|>) (.*)")  # a line that the reader types into a running command


@dataclass(frozen=True)
class Example:
    """A command or a Python example of a page.

    text: the text of the page. words: the words of a command as a shell splits them, without
    comments; empty for Python. typed: lines that the page types into the command. printed: lines
    that it shows below a command with a `$` before it. inline: whether it is inline code in a
    sentence, which may name a command again.
    """

    page: str
    line: int
    text: str
    words: tuple[str, ...] = ()
    typed: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)
    inline: bool = False

    @property
    def is_python(self) -> bool:
        return not self.words

    @property
    def known(self) -> str | None:
        """The key of ELSEWHERE that matches this example, or None."""
        if self.is_python:
            return next((key for key in ELSEWHERE if key in self.text), None)
        return next((key for key in ELSEWHERE if tuple(shlex.split(key)) == self.words), None)

    @property
    def kind(self) -> str:
        return SMALL if self.known is None else ELSEWHERE[self.known][0]

    @property
    def status(self) -> int:
        return STATUSES.get(shlex.join(self.words), 0)

    @property
    def file(self) -> str | None:
        """The file name that a Python example is stored under, or None."""
        found = NAMED.match(self.text)
        return found[1] if found and self.is_python else None

    @property
    def input(self) -> str:
        """Standard input: the lines that the page types, or else lines that end a debugger or a
        conversation."""
        if self.typed:
            return "\n".join(self.typed) + "\n"
        return "c\n" * 9 if "--break" in self.words else "\n"

    def filled(self) -> "Example":
        """A copy whose placeholders are replaced by things that exist."""
        words = (PLACEHOLDERS.get(w, A_CHECKPOINT.sub("tiny", w)) for w in self.words)
        return replace(self, text=A_CHECKPOINT.sub("tiny", self.text), words=tuple(words))


def pages() -> list[str]:
    """README, CONTRIBUTING and the pages in docs, as paths relative to the checkout."""
    docs = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").glob("*.md"))
    docs.remove("docs/write-a-kernel.md")  # tests/tools/test_write_a_kernel.py follows it
    return ["README.md", "CONTRIBUTING.md", *docs]


def commands_of(page: str, line: int, text: str) -> Iterator[Example]:
    """Yield the commands of a shell line, split at `&&`. Yields nothing if the line is no command."""
    words = text.split()
    if not words or words[0] not in PROGRAMS or any(word.endswith(":") for word in words[2:3]):
        return  # a program's name before a colon begins a line of its output
    rest = shlex.split(text, comments=True)
    while rest:
        end = rest.index("&&") if "&&" in rest else len(rest)
        yield Example(page, line, text, tuple(rest[:end]))
        rest = rest[end + 1 :]


def examples(page: str, text: str) -> list[Example]:
    """All examples of a page, in order, from indented and fenced blocks, Python blocks and inline
    code."""
    found: list[Example] = []
    language: str | None = None  # of the fenced block that is open
    block: list[str] = []
    prose: list[str] = []  # the lines of a paragraph; inline code may span lines
    prompted = False  # whether the lines below are what a command with a `$` before it prints
    joined = ""  # a command that a backslash continues on the next line
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fence, stripped = FENCE.match(line), line.strip()
        if fence:
            if language == "python":
                found.append(Example(page, number - len(block), "\n".join(block) + "\n"))
            language = None if language is not None else fence[1]
            block = []
        elif language == "python":
            block.append(line)
        elif language is not None or line.startswith("    "):
            if answer := ANSWER.fullmatch(stripped):
                found[-1].typed.append(answer[1].partition("   #")[0].rstrip())
                continue
            joined += stripped.removeprefix("$ ")
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            fresh = list(commands_of(page, number, joined))
            if stripped.startswith("$ ") or fresh:
                prompted = stripped.startswith("$ ")
            elif prompted:
                found[-1].printed.append(stripped)
            found += fresh
            joined = ""
        prompted = prompted and line.startswith("    ")
        if fence or language is not None or line.startswith("    ") or not stripped:
            for inline in INLINE.findall(" ".join(prose)):
                start = number - len(prose)
                named = commands_of(page, start, inline)
                found += [replace(one, inline=True) for one in named]
            prose = []
        else:
            prose.append(stripped)
    return found


def documented() -> list[Example]:
    """The examples of all pages."""
    return [
        one for page in pages() for one in examples(page, (ROOT / page).read_text(encoding="utf-8"))
    ]


def stale(found: list[Example]) -> list[str]:
    """Entries of ELSEWHERE and STATUSES that no page has any more."""
    known = {one.known for one in found}
    promised = {shlex.join(one.words) for one in found}
    return [key for key in ELSEWHERE if key not in known] + [
        key for key in STATUSES if key not in promised
    ]


def prepare(page: str, folder: Path) -> list[Example]:
    """Put the files that a page expects into an empty folder. Returns the commands to run first."""
    (folder / "docs").symlink_to(ROOT / "docs")
    for name, text in FILES.get(page, {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    return [one for line in BEFORE.get(page, []) for one in commands_of(page, 0, line)]


def process(one: Example) -> list[str]:
    """The command line that runs an example."""
    if one.is_python:
        return [sys.executable, "-c", one.text]
    if SHELL & {*one.words}:
        return ["bash", "-c", f"set -euo pipefail; {one.text}"]
    return [sys.executable, *one.words[1:]] if one.words[0] == "python" else list(one.words)


def run_page(page: str, kinds: set[str]) -> list[str]:
    """Run a page's examples of these kinds as processes. Returns a line for each that fails."""
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = [one for one in documented() if one.page == page and one.kind in kinds]
        for example in [*prepare(page, folder), *own]:
            one = example.filled()
            if one.file:
                (folder / one.file).write_text(one.text, encoding="utf-8")
                continue
            what = shlex.join(one.words) or "Python"
            print(f"{page}:{one.line}: {what}", file=sys.stderr, flush=True)
            ours = ((), ("python",), ("qwen35",), ("torchrun",))
            is_ours = one.words[0:1] in ours or SHELL & {*one.words}
            ended = subprocess.run(
                process(one), cwd=folder if is_ours else ROOT, input=one.input, text=True, check=False,
                stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            if ended.returncode != one.status:
                failed.append(f"{page}:{one.line}: exit status {ended.returncode}: {one.text}")
    return failed


def build_parser() -> Parser:
    parser = Parser("python -m tools.documented", __doc__ or "", computes=False)
    add = parser.add_argument
    add("--run", nargs="+", choices=KINDS, default=[], metavar="KIND",
        help="run the examples of these kinds, and exit with 1 if one fails. "
        f"{'; '.join(f'{kind}: {what}' for kind, what in KINDS.items())} (default: list "
        "them)")  # fmt: skip
    add("--page", choices=pages(), metavar="PAGE",
        help="take only this page, as in docs/fast.md (default: all pages)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document")
    return parser


def main(args: argparse.Namespace) -> int:
    chosen = [args.page] if args.page else pages()
    wrong = stale(documented())
    if args.run:
        wrong += [line for page in chosen for line in run_page(page, {SMALL, *args.run})]
    rows = [
        {"page": one.page, "line": one.line, "kind": one.kind,
         "example": shlex.join(one.words) or one.text,
         "reason": ELSEWHERE[one.known][1] if one.known else ""}
        for one in documented() if one.page in chosen
    ]  # fmt: skip
    if args.json:
        print_json({"examples": rows, "wrong": wrong})
    else:
        for row in rows:
            reason = f"  ({row['reason']})" if row["reason"] else ""
            example = " ".join(row["example"].split())
            print(f"{row['page']}:{row['line']}  {row['kind']:7}  {example}{reason}")
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(build_parser(), main)
