"""Shows the progress of a command: a bar on a terminal, or a line every ten seconds in other
outputs."""

import math
import sys
from collections.abc import Iterable, Iterator, Sized
from threading import Event, Thread
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines, or between two updates of a bar's note
T = TypeVar("T")


class Progress:
    """Counts to `total`. A command that ends within ten seconds prints no line into a pipe.

    what: a plural noun for what is counted, such as "kernels". total: None if it is not known yet;
    `at` may set it later. note: a text that may be set, and that ends each line.
    """

    def __init__(self, what: str, total: int | None = None, *, is_bytes: bool = False) -> None:
        self.what, self.is_bytes, self.note = what, is_bytes, ""
        self._is_terminal = sys.stderr.isatty()
        units = {"unit": "B", "unit_scale": True, "unit_divisor": 1000} if is_bytes else {}
        # With an infinite delay the bar counts but shows nothing.
        self._bar = tqdm(
            desc=what, total=total, leave=False, delay=0 if self._is_terminal else math.inf, **units
        )  # fmt: skip
        self._ended = Event()
        self._thread = Thread(target=self._look, daemon=True)
        self._thread.start()

    def update(self, count: int = 1) -> None:
        """Count `count` more as done."""
        self._bar.update(count)

    def at(self, done: int, total: int) -> None:
        """Set the count and the total."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar. A second call does nothing."""
        self._ended.set()
        self._thread.join()
        self._bar.close()

    def line(self) -> str:
        """The progress as text, such as "kernels: 30 of 121 after 00:40, about 02:01 left"."""
        found = self._bar.format_dict
        done, total, elapsed = found["n"], found["total"], found["elapsed"]
        words = f"{self.what}: {self._count(done)}"
        if total:
            words += f" of {self._count(total)}"
        words += f" after {tqdm.format_interval(elapsed)}"
        if total and done:
            words += f", about {tqdm.format_interval(elapsed / done * (total - done))} left"
        return f"{words}; {self.note}" if self.note else words

    def _count(self, number: int) -> str:
        return f"{tqdm.format_sizeof(number)}B" if self.is_bytes else f"{number:,}"

    def _look(self) -> None:
        while not self._ended.wait(EVERY):
            if self._is_terminal:
                self._bar.set_postfix_str(self.note)
            else:
                print(self.line(), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def steps(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, and show the progress. total: their number, needed only if `items` has no
    length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total) as progress:
        for item in items:
            yield item
            progress.update()
