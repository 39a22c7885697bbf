"""Stores for the segments of a prefix cache: the interface, and the store in memory."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Tokens first .. end of a prompt. blocks: the chained hash after each of its blocks; the last
    is its key. parent: the hash before the first block. drafts: whether it has the MTP head's keys
    and values."""

    parent: str
    first: int
    end: int
    blocks: tuple[str, ...]
    drafts: bool
    nbytes: int

    @property
    def key(self) -> str:
        return self.blocks[-1]


class Store(Protocol):
    """Holds segments: `Memory` here, `Folder` in prefix/folder.py.

    segments: all segments by key, the least recently used first. read: a segment's tensors; None where
    it is damaged. write: store a segment; returns a line when that failed. discard: remove a damaged one,
    even if it is in use. remove_unreadable: remove files whose metadata make no sense; returns the bytes
    of those that could not be removed. is_free: whether nobody uses it. remove: False where it is in use.
    size: bytes that a segment takes. pin: use a segment, which stays until `unpin`; False when it is
    gone. exclusive: nobody else changes the store while the block runs.
    """

    def segments(self) -> dict[str, Segment]: ...
    def read(self, segment: Segment) -> dict[str, Tensor] | None: ...
    def write(self, segment: Segment, ids: list[int], tensors: dict[str, Tensor]) -> str | None: ...
    def discard(self, key: str) -> None: ...
    def remove_unreadable(self) -> int: ...
    def is_free(self, key: str) -> bool: ...
    def remove(self, key: str) -> bool: ...
    def size(self, segment: Segment) -> int: ...
    def pin(self, key: str) -> bool: ...
    def unpin(self, key: str) -> None: ...
    def exclusive(self) -> AbstractContextManager[None]: ...


class Memory:
    """A store in this process. Segments are copied when they are stored, and when a cache reads
    them."""

    def __init__(self) -> None:
        # The least recently used first.
        self.held: dict[str, tuple[Segment, dict[str, Tensor]]] = {}
        self.pins: Counter[str] = Counter()

    def segments(self) -> dict[str, Segment]:
        return {key: segment for key, (segment, _) in self.held.items()}

    def read(self, segment: Segment) -> dict[str, Tensor] | None:
        return self.held[segment.key][1]

    def write(self, segment: Segment, ids: list[int], tensors: dict[str, Tensor]) -> str | None:
        self.held.pop(segment.key, None)
        self.held[segment.key] = segment, {name: t.clone() for name, t in tensors.items()}
        return None

    def discard(self, key: str) -> None:
        self.held.pop(key, None)

    def remove_unreadable(self) -> int:
        return 0

    def is_free(self, key: str) -> bool:
        return not self.pins[key]

    def remove(self, key: str) -> bool:
        if not self.is_free(key):
            return False
        del self.held[key]
        return True

    def size(self, segment: Segment) -> int:
        return segment.nbytes

    def pin(self, key: str) -> bool:
        """Pin a segment, which becomes the most recently used. Returns False if it is gone."""
        if key not in self.held:
            return False
        self.held[key] = self.held.pop(key)
        self.pins[key] += 1
        return True

    def unpin(self, key: str) -> None:
        self.pins[key] -= 1

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        yield
