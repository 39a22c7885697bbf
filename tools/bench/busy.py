"""Measure the decode speed of the embedded model while other processes keep the cores busy.

Each run is a separate `python -m qwen35.generate`. Runs take place in turn on an idle machine and
beside busy loops. Three settings are compared: the threads and the waiting that the program
chooses, one thread per core, and one thread per core that spins while it waits, as torch's threads
do by default. `of_quiet` is the median speed relative to that of the idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qwen35.cli import Parser, at_least_one, at_least_two, thread_count
from qwen35.errors import InputError
from qwen35.progress import Progress
from qwen35.threads import ASKED
from tools.bench import report

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--busy", type=thread_count, default=2, metavar="N",
        help="run N busy loops in other processes (default: 2)")  # fmt: skip
    add("--new-tokens", type=at_least_two, default=150, metavar="N",
        help="generate N tokens in each run (default: 150)")  # fmt: skip
    add("--repeats", type=at_least_one, default=3, metavar="R",
        help="run each setting R times, with and without the loops (default: 3)")  # fmt: skip


@contextmanager
def beside(busy: int) -> Iterator[None]:
    """Run `busy` endless loops in other processes while the block runs."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def decoded(new_tokens: int, words: list[str], environment: dict[str, str]) -> float:
    """Tokens per second of one process. Settings of the user for threads and waiting are
    removed."""
    command = [
        sys.executable, "-m", "qwen35.generate", "In the beginning", "--ignore-eos", "--json",
        "--max-new-tokens", str(new_tokens), *words,
    ]  # fmt: skip
    own = {name: value for name, value in os.environ.items() if name not in (*WAITING, *ASKED)}
    done = subprocess.run(
        command, env=own | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"{' '.join(command[2:])}: {done.stderr.strip()}")
    return json.loads(done.stdout)["timing"]["tokens_per_s"]


def main(args: argparse.Namespace) -> int:
    cores = str(os.cpu_count() or 1)
    ways: dict[str, tuple[list[str], dict[str, str]]] = {
        "chosen by the program": ([], {}),
        "a thread for each core": (["--threads", cores], {}),
        "a thread for each core, which spins": (
            ["--threads", cores],
            {"GOMP_SPINCOUNT": "infinite"},
        ),
    }
    speeds: dict[tuple[str, int], list[float]] = {}
    with Progress("runs", args.repeats * 2 * len(ways)) as progress:
        for _ in range(args.repeats):
            for busy in (0, args.busy):
                with beside(busy):
                    for name, (words, environment) in ways.items():
                        speed = decoded(args.new_tokens, words, environment)
                        speeds.setdefault((name, busy), []).append(speed)
                        progress.update()
    rows: list[report.Row] = [
        {"threads": name, "busy": busy, "tokens_per_s": statistics.median(found), "min": min(found),
         "max": max(found),
         "of_quiet": statistics.median(found) / statistics.median(speeds[name, 0])}
        for (name, busy), found in sorted(speeds.items(), key=lambda item: [*ways].index(item[0][0]))
    ]  # fmt: skip
    described = {"new_tokens": args.new_tokens, "repeats": args.repeats, "cores": cores}
    report.emit("busy", described, rows, only_json=args.json)
    return 0
