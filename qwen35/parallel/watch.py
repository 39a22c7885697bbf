"""Ends all ranks if one fails, with one line that rank 0 prints, and one exit status.

Each rank has a thread that writes heartbeats into the group's store, and reads those of the other
ranks. The thread has its own connection, because the main thread may be in a collective or wait for
a terminal. A rank that fails writes its error into the store. The first error that is written
counts.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from qwen35.cli import one_line, reason_of
from qwen35.parallel.store import JOIN_S, Connection

PERIOD_S = 0.2  # seconds between heartbeats
SILENCE_S = 7.0  # seconds without a heartbeat after which a rank counts as dead
BROKEN_S = 2.0  # the same, after a connection to another rank broke
GRACE_S = 0.5  # time for rank 0 to find the same error by itself
SHOWN_S = 5.0  # time for rank 0 to print an error


class RankLostError(RuntimeError):
    """A collective failed, most likely because another rank has ended."""


class Watch:
    """Watches all ranks while the block runs. At its end the ranks wait for each other.

    An exception that leaves the block is the error of all ranks. Rank 0 prints its message, if it
    has one (a closed stdout has none), and each rank exits with its status. Other ranks print only
    the traceback of a crash. Output of libraries to file descriptor 2 is shown only with debug.
    """

    def __init__(self, prog: str, rank: int, *, debug: bool) -> None:
        self.prog, self.rank, self.debug = prog, rank, debug
        self.silence_s = SILENCE_S
        self.connection: Connection | None = None
        self.stopped = threading.Event()
        self.ending = threading.Lock()  # held by the thread that ends this process
        self.stderr = sys.stderr

    def start(self, connect: Callable[[], Connection]) -> Connection:
        """Join the other ranks. InputError if they do not join in time."""
        connection = connect()
        self.own = connection.another()
        self.own.set(f"alive/{self.rank}", "0")
        connection.exchange("here", None, JOIN_S)
        self.connection = connection
        threading.Thread(target=self._look, daemon=True).start()
        return connection

    def __enter__(self) -> "Watch":
        # Libraries write pages when a connection breaks, which would hide the one line.
        if not self.debug:
            own = os.dup(sys.stderr.fileno())
            self.stderr = sys.stderr = open(
                own, "w", buffering=1, errors="backslashreplace", encoding="utf-8"
            )
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if self.rank:
            nothing = open(os.devnull, "w", encoding="utf-8")  # until the process ends
            sys.stdout = sys.stderr = nothing
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self.connection is None:
            return
        if error is None:
            self.connection.exchange("ended", None, None)
            self.stopped.set()
            self._part(wait_s=5.0)
            return
        if isinstance(error, RankLostError):
            self.silence_s = BROKEN_S
            time.sleep(SILENCE_S)  # the thread finds the dead rank meanwhile, and ends this process
        message, status = _told(error)
        if _is_crash(error) or (self.debug and self.rank == 0):
            traceback.print_exception(error, file=self.stderr)
        with suppress(RuntimeError):  # the store may be gone
            self._post(message, status)
        if self.rank:  # the thread ends this process once rank 0 has printed
            time.sleep(GRACE_S + 2 * SHOWN_S)
            os._exit(status)
        with self.ending:
            self.stopped.set()
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            self._say(message)
            os._exit(status)  # handlers at exit may wait for ranks that are gone

    def _post(self, message: str, status: int) -> None:
        """Write an error into the store, unless there is one already."""
        said = {"rank": self.rank, "message": message, "status": status}
        self.own.compare_set("error", "", json.dumps(said))

    def _say(self, message: str) -> None:
        """Print the error, and wait until the other ranks know that it is printed."""
        if message:
            print(f"{self.prog}: {one_line(message)}", file=self.stderr, flush=True)
        with suppress(RuntimeError):
            self.own.set("shown", "yes")
            self._part(wait_s=2.0)

    def _part(self, wait_s: float) -> None:
        """Write into the store that this rank has left. The store's host waits for the others to
        leave."""
        assert self.connection is not None
        self.own.set(f"gone/{self.rank}", "yes")
        others = [f"gone/{rank}" for rank in range(self.connection.size) if rank != self.rank]
        started = time.monotonic()
        while self.connection.is_host and time.monotonic() - started < wait_s:
            if all(self.own.check([key]) for key in others):
                return
            time.sleep(0.01)

    # --- in the thread

    def _look(self) -> None:
        assert self.connection is not None
        ranks = range(self.connection.size)
        # The last heartbeat of each rank, and when it was seen.
        seen = [("", time.monotonic()) for _ in ranks]
        beat = 0
        while not self.stopped.wait(PERIOD_S):
            beat += 1
            try:
                self.own.set(f"alive/{self.rank}", str(beat))
                if self.own.check(["error"]):
                    self._end(**json.loads(self.own.get("error")))
                    return
                now = time.monotonic()
                for rank in ranks:
                    sign = self.own.get(f"alive/{rank}").decode()
                    if sign != seen[rank][0]:
                        seen[rank] = sign, now
                    elif now - seen[rank][1] > self.silence_s and rank != self.rank:
                        self._post(f"rank {rank} has ended or hangs: no sign of life from it", 2)
            except RuntimeError:
                self._end_alone()
                return

    def _end(self, rank: int, message: str, status: int) -> None:
        """End this process with the error of a rank."""
        if self.rank == 0:
            if rank:
                self.stopped.wait(GRACE_S)
            with self.ending:
                if self.stopped.is_set():  # the main thread prints its own error
                    return
                named = message.startswith("rank ") or not rank
                self._say(message if named else f"rank {rank}: {message}")
                os._exit(status)
        started = time.monotonic()
        while not self.own.check(["shown"]):
            if time.monotonic() - started > SHOWN_S:  # rank 0 has ended itself
                if rank == self.rank:
                    self._say(message)
                break
            time.sleep(0.02)
        with suppress(RuntimeError):
            self.own.set(f"gone/{self.rank}", "yes")
        os._exit(status)

    def _end_alone(self) -> None:
        """End this process after the store is gone, because the process that hosted it has
        ended."""
        assert self.connection is not None
        if self.stopped.is_set():
            return
        keeper = "torchrun" if self.connection.is_kept else "rank 0"
        if self.rank == (0 if self.connection.is_kept else 1):
            print(f"{self.prog}: {keeper} has ended", file=self.stderr, flush=True)
        os._exit(2)


def _told(error: BaseException) -> tuple[str, int]:
    """The message and exit status of an error, as in `qwen35.cli.run`."""
    if isinstance(error, KeyboardInterrupt):
        return "", 130
    if isinstance(error, BrokenPipeError):
        return "", 0
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else 1
    if isinstance(error, RankLostError):
        return f"the connection to another rank broke: {error}", 2
    return reason_of(error) or f"{type(error).__name__}: {error}", 2


def _is_crash(error: BaseException) -> bool:
    """Whether an error needs its traceback, because it is neither bad input nor a lost rank."""
    is_lost = isinstance(error, RankLostError)
    return isinstance(error, Exception) and not is_lost and reason_of(error) is None
