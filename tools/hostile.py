"""`python -m tools.hostile`: read thousands of damaged checkpoint folders, to test for crashes.

One file of a small folder is damaged: a JSON value is replaced by a hostile one, a key is removed
or added, or bytes are cut, changed or inserted. With --texts a chat template or a tokenizer is
replaced by one that does not end, grows or calls itself. Then `qwen35.generate` or `tools.inspect`
reads the folder in its own process. A run is right if it gives a text, or one line on standard
error and status 2 (status 1 if inspect finds a problem), within the limits of time and memory.
Every other run is printed with its number N, and `--first N --files 1`, beside the other options,
repeats it. The exit status is 1 if there is such a run.
"""

import argparse
import collections
import copy
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen35.cli import Parser, at_least_one, at_least_zero, print_json, run, thread_count
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import TINY
from qwen35.progress import Progress
from reference.model import Model
from tools.hostile_text import TEMPLATES, TOKENIZERS

PROGRAMS: dict[str, Any] = {
    "generate": import_module("qwen35.generate"),
    "inspect": import_module("tools.inspect"),
}
SECONDS, MEMORY = 5.0, 2**30  # limits of one command; bytes count beyond those that it begins with
LONGEST_LINE = 2000  # characters on standard error
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "full_attention_interval": 2, "head_dim": 16,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
TEXTS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
INDEX = "model.safetensors.index.json"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64 + 1, 10**10, 10**400, -(2**63), 0.5, -0.5,
    1e308, -1e308, 1e-320, float("nan"), float("inf"), "", "x", "tiny", "x" * 100_000, "\ud800", "\0",
    "../x", "é€\u2028", [], {}, [None], [[]], {"a": {}}, [0] * 10_000, ["x"] * 1000, {"x": 1}, "Infinity",
)  # fmt: skip
DEPTH = 100_000  # of nested brackets


@dataclass(frozen=True)
class Case:
    """One damaged folder. number: makes the same case again. file: the damaged file. what: the
    damage.

    command: the program, a key of PROGRAMS, and its arguments.
    """

    number: int
    file: str
    what: str
    command: tuple[str, ...]


def write_undamaged(folder: Path) -> None:
    """Write the undamaged folder: the embedded model's text files, and a smaller model in two
    files."""
    for name in (*TEXTS[:3], "chat_template.jinja"):
        shutil.copy(TINY / name, folder / name)
    document = json.loads((TINY / "config.json").read_bytes())
    text = document["text_config"] | SIZES
    del text["layer_types"]
    document["text_config"] = text
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    torch.manual_seed(0)
    model = Model(Config.from_dict(document)).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tensors = {
        name if name.startswith(("mtp.", "lm_head.")) else f"model.language_model.{name}": value.detach()
        for name, value in model.named_parameters()
    }  # fmt: skip
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


# --- damage


def places(document: Any) -> list[tuple[Any, Any]]:
    """All (container, key or index) pairs of a JSON document."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        container = waiting.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def damaged_json(text: str, chosen: random.Random) -> tuple[str, str]:
    """A document with one or two values changed, and a description of the changes."""
    document, done = json.loads(text), []
    for _ in range(chosen.choice((1, 1, 1, 2))):
        found = places(document)
        if not found:
            break
        # Often choose among the first places only, so that large lists (a vocabulary) do not hide
        # the few keys that matter.
        container, key = chosen.choice(found[: chosen.choice((8, 40, len(found)))])
        value = copy.deepcopy(chosen.choice(HOSTILE))
        deed = chosen.choice(("set", "set", "set", "set", "remove", "add", "nest"))
        if deed == "remove":
            del container[key]
        elif deed == "add" and isinstance(container, dict):
            container[chosen.choice(("extra", "", "a.b", "é", *map(str, container)))] = value
        elif deed == "nest":
            container[key] = {"inner": container[key]}
        else:
            container[key] = value
        done.append(f"{deed} {str(key)[:40]!r} {str(value)[:24]!r}")
    return json.dumps(document), "; ".join(done)


def damaged_bytes(content: bytes, chosen: random.Random) -> tuple[bytes, str]:
    """Bytes that are cut, changed or inserted, and a description of the change."""
    at = chosen.randrange(len(content) + 1) if content else 0
    deeds: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[:at],
        "empty": lambda: b"",
        "one byte": lambda: content[:at] + bytes([chosen.randrange(256)]) + content[at + 1 :],
        "no UTF-8": lambda: content[:at] + b"\xff" + content[at:],
        "a NUL": lambda: content[:at] + b"\0" + content[at:],
        "a byte-order mark": lambda: b"\xef\xbb\xbf" + content,
        "twice": lambda: content + content,
        "brackets": lambda: b"[" * DEPTH,
        "objects": lambda: b'{"a":' * DEPTH,
        "a number of 10,000 digits": lambda: b"9" * 10_000,
        "a list": lambda: b"[1, 2]",
    }
    name = chosen.choice([*deeds])
    return deeds[name](), f"{name} at {at}"


def damaged_header(content: bytes, chosen: random.Random) -> tuple[bytes, str]:
    """A safetensors file with a damaged header or header length, and a description of the
    damage."""
    length = int.from_bytes(content[:8], "little")
    text, rest = content[8 : 8 + length], content[8 + length :]
    if chosen.random() < 0.2:
        other = chosen.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        return other.to_bytes(8, "little") + text + rest, f"header length {other}"
    if chosen.random() < 0.3:
        raw, what = damaged_bytes(text, chosen)
    else:
        changed, what = damaged_json(text.decode(), chosen)
        raw = changed.encode()
    return len(raw).to_bytes(8, "little") + raw + rest, f"header: {what}"


def damage(folder: Path, number: int, seed: int) -> Case:
    """Damage a folder in place. `seed` and `number` determine the damage."""
    chosen = random.Random(f"{seed} {number}")
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    name = chosen.choice((*TEXTS, *TEXTS, "config.json", INDEX, "chat_template.jinja", *weights))
    file = folder / name
    content = file.read_bytes()
    if name in weights and chosen.random() < 0.8:
        raw, what = damaged_header(content, chosen)
    elif name.endswith(".json") and chosen.random() < 0.8:
        text, what = damaged_json(content.decode(), chosen)
        raw = text.encode()
    else:
        raw, what = damaged_bytes(content, chosen)
    file.write_bytes(raw)
    return Case(number, name, what, command(folder, chosen))


def command(folder: Path, chosen: random.Random) -> tuple[str, ...]:
    """The command that reads the folder. It is mostly generate, which reads all files."""
    generate = ("generate", "Hello", "--model", str(folder), "--max-new-tokens", "2", "--json")
    return chosen.choice(
        (generate, generate, (*generate, "--chat", "--draft-tokens", "0"), ("inspect", str(folder)))
    )


def special(folder: Path, number: int) -> Case:
    """Put the hostile template or tokenizer of this number into a folder."""
    if number < len(TEMPLATES):
        what, template = [*TEMPLATES.items()][number]
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        name = "chat_template.jinja"
    else:
        what, changes = [*TOKENIZERS.items()][number - len(TEMPLATES)]
        name = "tokenizer.json"
        document = json.loads((folder / name).read_bytes()) | changes
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    text = "a" * 60 + " b " + "ab" * 400
    asked = ("generate", text, "--model", str(folder), "--max-new-tokens", "2", "--json", "--chat")
    return Case(number, name, what, asked)


# --- one command in a process of its own


def outcome(case: Case, folder: Path) -> str:
    """Run a case in a forked process. Returns "text", "error", or a description of what is
    wrong."""
    out, err = folder / ".stdout", folder / ".stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_child(case, out, err)
    _, waited, used = os.wait4(child, 0)
    seconds = time.monotonic() - started
    status = os.waitstatus_to_exitcode(waited)
    said = err.read_text(encoding="utf-8", errors="replace")
    grown = used.ru_maxrss * 1024 - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if status == -signal.SIGALRM or seconds > SECONDS:
        return f"takes more than {SECONDS:g} s"
    if grown > MEMORY:
        return f"takes {grown / 2**20:.0f} MiB"
    return verdict(case.command[0], status, said)


def verdict(program: str, status: int, said: str) -> str:
    """What `outcome` returns for an exit status and the text on standard error."""
    # Warnings and notices may come before the error line.
    lines = [
        line
        for line in said.splitlines()
        if line.startswith("python -m") and ": warning: " not in line
    ]
    if status < 0:
        return f"ended by signal {-status}"
    if "Traceback" in said:
        return f"a traceback: {said.splitlines()[-1][:200]}"
    if max(map(len, said.splitlines()), default=0) > LONGEST_LINE:
        return f"a line of {max(map(len, said.splitlines()))} characters"
    if status == 0 or (status == 1 and program == "inspect"):
        return "text"
    if status != 2:
        return f"status {status}"
    return "error" if len(lines) == 1 else f"{len(lines)} lines: {said[:300]!r}"


def _be_child(case: Case, out: Path, err: Path) -> None:
    status = 99
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.alarm(int(2 * SECONDS))
        size = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        most = size * resource.getpagesize() + 3 * MEMORY  # a hard limit that protects the machine
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        module = PROGRAMS[case.command[0]]
        try:
            run(module.build_parser(), module.main, list(case.command[1:]))
        except SystemExit as left:
            status = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def examine(number: int, seed: int | None, undamaged: str) -> tuple[Case, str]:
    """Make a case and run it. seed: None for the templates and tokenizers. undamaged: the folder to
    copy."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(undamaged, folder, dirs_exist_ok=True)
        case = special(folder, number) if seed is None else damage(folder, number, seed)
        return case, outcome(case, folder)


# --- the command line


def build_parser() -> Parser:
    parser = Parser("python -m tools.hostile", __doc__ or "", computes=False)
    add = parser.add_argument
    add("--files", type=at_least_one, metavar="N",
        help="read N damaged folders (default: 1000; with --texts: all)")  # fmt: skip
    add("--first", type=at_least_zero, default=0, metavar="N",
        help="begin with the folder of this number (default: 0)")  # fmt: skip
    add("--seed", type=int, metavar="S", help="damage the folders by the seed S (default: 0)")
    add("--texts", action="store_true",
        help="read folders with hostile templates and tokenizers instead")  # fmt: skip
    add("--processes", type=thread_count, default=os.cpu_count() or 1, metavar="N",
        help="read N folders at a time (default: one for each core)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON document")
    return parser


def chosen_numbers(args: argparse.Namespace) -> range:
    """The numbers of the cases. InputError for options that --texts does not have."""
    if not args.texts:
        return range(args.first, args.first + (args.files or 1000))
    count = len(TEMPLATES) + len(TOKENIZERS)
    if args.seed is not None:
        raise InputError(f"--seed {args.seed} is for damaged files; --texts has none")
    if args.first >= count:
        raise InputError(f"--first {args.first}; expected at most {count - 1} with --texts")
    return range(args.first, min(count, args.first + (args.files or count)))


def main(args: argparse.Namespace) -> int:
    numbers = chosen_numbers(args)
    seed = None if args.texts else args.seed or 0
    torch.set_num_threads(1)
    found: dict[str, collections.Counter[str]] = {}
    wrong: list[tuple[Case, str]] = []
    with tempfile.TemporaryDirectory() as name, Progress("folders", len(numbers)) as progress:
        write_undamaged(Path(name))
        with ProcessPoolExecutor(args.processes, get_context("fork")) as pool:
            always = (itertools.repeat(seed), itertools.repeat(name))
            for case, what in pool.map(examine, numbers, *always, chunksize=4):
                is_right = what in ("text", "error")
                found.setdefault(case.file, collections.Counter())[
                    what if is_right else "wrong"
                ] += 1
                if not is_right:
                    wrong.append((case, what))
                progress.update()
    rows = [
        {"file": file, **{kind: counts[kind] for kind in ("text", "error", "wrong")}}
        for file, counts in sorted(found.items())
    ]
    if args.json:
        print_json(
            {"files": rows, "wrong": [vars(case) | {"outcome": what} for case, what in wrong]}
        )
    else:
        print(f"{'file':34} {'text':>6} {'error':>6} {'wrong':>6}")
        for row in rows:
            print(f"{row['file']:34} {row['text']:6} {row['error']:6} {row['wrong']:6}")
        for case, what in wrong:
            print(f"{case.number}: {case.file}: {case.what}: {case.command[0]}: {what}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(build_parser(), main)
