"""Ranks for the tests: as threads of one process if only numbers matter, or as processes."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qwen35.parallel.ranks import Ranks
from qwen35.parallel.reduce import ordered_sum

T = TypeVar("T")
ROOT = Path(__file__).parents[2]


class Meeting:
    """The exchange of values between the threads of one group."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.places: list[Any] = [None] * size

    def together(self, rank: int, value: Any) -> list[Any]:
        self.places[rank] = value
        self.barrier.wait()
        found = list(self.places)
        self.barrier.wait()
        return found


class Thread:
    """One rank's transport and connection."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.meeting = rank, meeting

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.together(self.rank, x))

    def sum(self, x: Tensor) -> Tensor:
        return ordered_sum(self.gather(x))

    def exchange(self, name: str, value: Any, wait_s: float | None) -> list[Any]:
        """Exchange values as JSON, like the real connection."""
        texts = self.meeting.together(self.rank, [name, json.dumps(value)])
        assert {text[0] for text in texts} == {name}
        return [json.loads(text[1]) for text in texts]


def on_threads(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """Run `work` as each rank of a group of threads, and return the results. Raises the first
    error."""
    meeting = Meeting(size)

    def one(rank: int) -> T:
        place: Any = Thread(rank, meeting)
        try:
            with torch.inference_mode():
                return work(Ranks(rank, size, place, place))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(one, rank) for rank in range(size)]
    errors = [e for future in futures if (e := future.exception())]
    own = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    for error in own or errors:
        raise error
    return [future.result() for future in futures]


_PORTS = count()


def free_port() -> int:
    """A port that nobody listens on now, nor takes before rank 0 does, seconds later.

    Each process has 100 ports, which it shares only with processes whose ids differ by a multiple of
    190. They are below torchrun's 29500 and those that the system gives to connections. A port of the
    system's choice may be given to another test, whose ranks then join the wrong group.
    """
    while True:
        port = 10_000 + os.getpid() % 190 * 100 + next(_PORTS) % 100
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def start(
    size: int,
    arguments: Sequence[object],
    *,
    of_rank: Callable[[int], Sequence[object]] = lambda rank: (),
    environment: Callable[[int], dict[str, str]] = lambda rank: {},
) -> list[subprocess.Popen[str]]:
    """Start `python -m ARGUMENTS` as `size` ranks over gloo, as torchrun does. of_rank,
    environment: further arguments and environment variables of one rank."""
    port = free_port()
    started = []
    for rank in range(size):
        of_group = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", *map(str, arguments), *map(str, of_rank(rank))]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | of_group | environment(rank), cwd=ROOT,
        )  # fmt: skip
        started.append(process)
    return started


def ended(
    processes: list[subprocess.Popen[str]], within_s: float = 60
) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each rank. All processes are killed in the end."""
    try:
        return [
            (process.returncode, out, err)
            for process in processes
            for out, err in [process.communicate(timeout=within_s)]
        ]
    finally:
        for process in processes:
            process.kill()
