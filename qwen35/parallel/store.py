"""The store that the ranks of a group share, and the exchange of JSON values in it."""

import json
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore (public all the same)

from qwen35.cli import one_line
from qwen35.errors import InputError

JOIN_S = 60.0  # seconds within which all ranks have to join


class Connection:
    """One rank's connection to the store of its group of `size` ranks.

    is_kept: whether torchrun hosts the store; otherwise rank 0 does. InputError if there is none
    within JOIN_S.
    """

    def __init__(self, rank: int, size: int, host: str, port: int, *, is_kept: bool) -> None:
        self.rank, self.size, self.is_kept = rank, size, is_kept
        self.host, self.port = host, port
        if not self.is_host:
            self._wait_for_port()
        self._store = self._connect(is_host=self.is_host)

    @property
    def is_host(self) -> bool:
        """Whether the store is in this process."""
        return self.rank == 0 and not self.is_kept

    def _connect(self, *, is_host: bool = False) -> Any:
        try:
            store = TCPStore(
                self.host, self.port, None, is_host, timedelta(seconds=JOIN_S),
                wait_for_workers=False,
            )  # fmt: skip
        except RuntimeError as error:
            reason = one_line(error).partition(". ")[0]
            raise InputError(f"no store at {self.host}:{self.port}: {reason}") from None
        return PrefixStore("qwen35", store)

    def _wait_for_port(self) -> None:
        """Wait until the port answers, because earlier attempts of TCPStore to connect print
        pages."""
        started = time.monotonic()
        while True:
            with suppress(OSError), socket.create_connection((self.host, self.port), timeout=2):
                return
            if time.monotonic() - started > JOIN_S:
                raise InputError(f"no answer from {self.host}:{self.port} within {JOIN_S:.0f} s")
            time.sleep(0.05)

    def part(self, name: str) -> Any:
        """A part of the store, for torch.distributed."""
        return PrefixStore(name, self._store)

    def another(self) -> Any:
        """The store over a second connection, for a second thread."""
        return self._connect()

    def exchange(self, name: str, value: Any, wait_s: float | None) -> list[Any]:
        """Send this rank's value, and return those of all ranks, in their order. name: must be used
        only once.

        wait_s: seconds after which a missing value is an InputError; None waits as long as it
        takes.
        """
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        found: list[Any] = []
        started = time.monotonic()
        for rank in range(self.size):
            key, pause = f"{name}/{rank}", 0.0005
            while not self._store.check([key]):
                if wait_s is not None and time.monotonic() - started > wait_s:
                    raise InputError(
                        f"rank {rank} of {self.size} has not joined within {wait_s:.0f} s"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
            found.append(json.loads(self._store.get(key)))
        return found
