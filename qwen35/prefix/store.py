"""Stores for the segments of a prefix cache: the interface, and the store in memory."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The stored results of the tokens from `first` to `end` - 1 of a prompt.

    parent: the chained hash before its first block.
    blocks: the chained hash after each of its blocks. The last one is its key.
    drafts: whether it has the keys and values of the MTP head.
    nbytes: the bytes of its tensors.
    """

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
    """The interface of a store: `Memory` here, `Folder` in prefix/folder.py.

    segments: returns all segments by key, the least recently used first.
    read: returns the tensors of a segment, or None if it is damaged.
    write: stores a segment. Returns None, or a line on an error.
    discard: removes a damaged segment, even if it is in use.
    remove_unreadable: removes files with invalid metadata. Returns the bytes of those that it could not
        remove.
    is_free: whether nobody uses a segment.
    remove: removes a segment. Returns False if it is in use.
    size: the bytes that a segment takes.
    pin: uses a segment, which then stays until `unpin`. Returns False if it is gone.
    exclusive: while the block runs, nobody else changes the store.
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
