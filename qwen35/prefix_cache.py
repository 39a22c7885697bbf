"""Prefix cache: what prefill computed of a prompt's beginning, kept for the next prompt that begins so.

A *stretch* is a run of whole 64-token blocks: their keys and values, the MTP head's too, and at its end a
snapshot of the delta nets' states. Each stretch continues another, its parent, or begins at token 0. What
depends on one another is one object, so it lives and dies together: a hit ends where a stretch ends, and
only a stretch that none continues, and that nobody uses, is evicted, the longest unused first.

A stretch's key is a chained hash, of its parent's and of its own ids, block by block. The chain starts
with all that decides about bits (`identity`), so another checkpoint, dtype or swap has other keys. Only
what prefill computed is kept: decode's states are other bits (the recurrent form, products of 4 rows).
"""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qwen35.cache import Cache, KVCache
from qwen35.trace import nodes
from reference.linear import GRID
from reference.model import Model

INTERVAL = 32  # blocks between snapshots: 2,048 tokens


@dataclass(frozen=True)
class Stretch:
    """Tokens first .. end of a prompt. blocks: the chained hash after each of its blocks, the last one
    its key; parent: the hash before the first. drafts: whether it has the MTP head's keys and values."""

    parent: str
    first: int
    end: int
    blocks: tuple[str, ...]
    drafts: bool
    nbytes: int

    @property
    def key(self) -> str:
        return self.blocks[-1]


class Home(Protocol):
    """Where stretches are: `Memory` here, `Folder` in prefix_files.py.

    stretches: those that are there, by key, the longest unused first. read: its tensors, None for one
    that is damaged. write: put one there; gives a line when that failed. discard: remove a damaged one,
    whoever uses it. clutter: remove what says nothing sensible of itself;
    gives the bytes of what would not go. is_free: nobody uses it. remove: False for one that is in use.
    size: bytes that one takes. pin: use one, which keeps it there until `unpin`; False when it is gone.
    exclusive: nobody else changes anything while the block runs.
    """

    def stretches(self) -> dict[str, Stretch]: ...
    def read(self, stretch: Stretch) -> dict[str, Tensor] | None: ...
    def write(self, stretch: Stretch, ids: list[int], tensors: dict[str, Tensor]) -> str | None: ...
    def discard(self, key: str) -> None: ...
    def clutter(self) -> int: ...
    def is_free(self, key: str) -> bool: ...
    def remove(self, key: str) -> bool: ...
    def size(self, stretch: Stretch) -> int: ...
    def pin(self, key: str) -> bool: ...
    def unpin(self, key: str) -> None: ...
    def exclusive(self) -> AbstractContextManager[None]: ...


class Memory:
    """Stretches of this process. One is copied when it is written and when it is read into a cache."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[Stretch, dict[str, Tensor]]] = {}  # the longest unused first
        self.pins: Counter[str] = Counter()

    def stretches(self) -> dict[str, Stretch]:
        return {key: stretch for key, (stretch, _) in self.held.items()}

    def read(self, stretch: Stretch) -> dict[str, Tensor] | None:
        return self.held[stretch.key][1]

    def write(self, stretch: Stretch, ids: list[int], tensors: dict[str, Tensor]) -> str | None:
        self.held.pop(stretch.key, None)
        self.held[stretch.key] = stretch, {name: t.clone() for name, t in tensors.items()}
        return None

    def discard(self, key: str) -> None:
        self.held.pop(key, None)

    def clutter(self) -> int:
        return 0

    def is_free(self, key: str) -> bool:
        return not self.pins[key]

    def remove(self, key: str) -> bool:
        if not self.is_free(key):
            return False
        del self.held[key]
        return True

    def size(self, stretch: Stretch) -> int:
        return stretch.nbytes

    def pin(self, key: str) -> bool:
        """Use it: it becomes the one that was used last. False when it is gone."""
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


@dataclass
class Reuse:
    """What the cache has of one prompt, from `begin` to `finish`.

    length: tokens that are taken over. reason: why not more. stops: positions at which prefill calls
    `keep`. hashes: before the first block and after each. chain: the stretches taken over, in order.
    pinned: keys of what must stay. kept: ends, and tensors, of the stretches that prefill has computed.
    """

    length: int
    reason: str
    stops: list[int]
    hashes: list[str]
    chain: list[tuple[Stretch, dict[str, Tensor]]]
    pinned: list[str]
    kept: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)


class PrefixCache:
    """Keeps the beginnings of one model's prompts, in memory or in a folder.

    budget: bytes, of all stretches together. interval: blocks between snapshots. A prompt's last whole
    block has one in any case, and so has the point where a prompt leaves what is already kept.
    warn: gets a line for what went wrong; the run goes on without.
    """

    def __init__(
        self,
        model: Model,
        *,
        budget: int,
        interval: int = INTERVAL,
        home: Home | None = None,
        checkpoint: str = "",
        warn: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.model, self.budget, self.interval = model, budget, interval
        self.home, self.checkpoint, self.warn = home or Memory(), checkpoint, warn
        self.evicted: dict[str, None] = {}  # keys, the latest last, for explanations
        self.warned: set[str] = set()

    def begin(self, ids: list[int], *, draft: bool) -> Reuse:
        """Find the longest beginning of `ids` that is kept, and hold it until `finish` or `release`."""
        hashes = chained(root_of(identity(self.model, self.checkpoint)), ids)
        pinned: list[str] = []
        try:
            return self._begin(ids, hashes, draft, pinned)
        except OSError as error:
            for key in pinned:
                self.home.unpin(key)
            self._warn_once(f"it cannot be read, and is not used: {error}")
            return Reuse(0, "it cannot be read", [], hashes, [], [])

    def _begin(self, ids: list[int], hashes: list[str], draft: bool, pinned: list[str]) -> Reuse:
        with self.home.exclusive():
            held = self.home.stretches()
            ways = {key: way for key in hashes[1:] if (way := _way(held, key, hashes, draft))}
            best = max(ways.values(), key=lambda way: way[-1].end, default=[])
            for stretch in best:
                if not self.home.pin(stretch.key):
                    break
                pinned.append(stretch.key)
        chain: list[tuple[Stretch, dict[str, Tensor]]] = []
        for stretch in best[: len(pinned)]:
            tensors = self.home.read(stretch)
            if tensors is None or not self._fits(stretch, tensors):
                self._warn_once(
                    f"tokens {stretch.first} to {stretch.end - 1} are damaged, and left out"
                )
                self.home.discard(stretch.key)
                del held[stretch.key]
                break
            chain.append((stretch, tensors))
        for key in pinned[len(chain) :]:
            self.home.unpin(key)
        length = chain[-1][0].end if chain else 0
        known = {block for stretch in held.values() for block in stretch.blocks}
        matched = next((i for i in range(len(hashes) - 1, 0, -1) if hashes[i] in known), 0) * GRID
        whole = len(ids) // GRID * GRID
        step = self.interval * GRID
        stops = {*range(step, whole + 1, step), whole, matched}
        stops |= {i * GRID for i, key in enumerate(hashes) if key in held}
        return Reuse(
            length=length,
            reason=self._reason(length, matched, whole, hashes, held),
            stops=sorted(stop for stop in stops if stop > length),
            hashes=hashes,
            chain=chain,
            pinned=pinned[: len(chain)],
        )

    def restore(self, reuse: Reuse, into: Cache, *, room: int, draft: bool) -> Tensor | None:
        """Copy what is taken over into an empty cache, with room for that many tokens; returns the
        trunk's state of the last token, [1, 1, D], or None where there is nothing."""
        for state in [*into.layers, into.mtp]:
            if isinstance(
                state, KVCache
            ):  # at once: buffers that grow leave parts behind in `kept`
                state.reserve(room)
        if not reuse.chain:
            return None
        _, last = reuse.chain[-1]
        states = {f"layers.{i}": state for i, state in enumerate(into.layers)}
        if draft and into.mtp is not None:
            states["mtp"] = into.mtp
        for node, state in states.items():
            if isinstance(state, KVCache):
                for _, tensors in reuse.chain:
                    state.append(*(tensors[f"{node}.{n}"].to(state.k.device) for n in ("k", "v")))
            else:
                state.conv = last[f"{node}.conv"].to(state.conv.device, copy=True)
                state.recurrent = last[f"{node}.recurrent"].to(state.conv.device, copy=True)
        into.length = reuse.length
        return last["hidden"].to(self.model.embed_tokens.weight.device, copy=True)

    def keep(self, reuse: Reuse, computed: Cache, hidden: Tensor, end: int, *, draft: bool) -> None:
        """Note what prefill has computed up to token `end`, a stop. Nothing is copied before `finish`:
        no later pass writes into these positions."""
        first = reuse.kept[-1][0] if reuse.kept else reuse.length
        tensors = {"hidden": hidden.clone()}
        for i, state in enumerate(computed.layers):
            of_layer = state.tensors()
            if isinstance(state, KVCache):
                of_layer = {name: t[:, :, first:end] for name, t in of_layer.items()}
            tensors |= {f"layers.{i}.{name}": tensor for name, tensor in of_layer.items()}
        if draft and computed.mtp is not None:
            rows = slice(max(first - 1, 0), end - 1)
            tensors |= {f"mtp.{name}": t[:, :, rows] for name, t in computed.mtp.tensors().items()}
        reuse.kept.append((end, tensors))

    def finish(self, reuse: Reuse, ids: list[int]) -> None:
        """Keep what was noted, as far as the budget goes, and let go of what was held."""
        try:
            self._keep_all(reuse, ids)
        except OSError as error:
            self._warn_once(f"nothing is kept: {error}")
        self.release(reuse)

    def _keep_all(self, reuse: Reuse, ids: list[int]) -> None:
        first = reuse.length
        with self.home.exclusive():
            for end, tensors in reuse.kept:
                blocks = reuse.hashes[first // GRID : end // GRID + 1]
                nbytes = sum(tensor.nbytes for tensor in tensors.values())
                drafts = "mtp.k" in tensors
                stretch = Stretch(blocks[0], first, end, tuple(blocks[1:]), drafts, nbytes)
                if not self._put(stretch, ids[first:end], tensors, reuse):
                    break
                first = end

    def release(self, reuse: Reuse) -> None:
        """Let go of what was held, without keeping anything."""
        for key in reuse.pinned:
            self.home.unpin(key)
        reuse.pinned, reuse.kept, reuse.chain = [], [], []

    def _put(
        self, stretch: Stretch, ids: list[int], tensors: dict[str, Tensor], reuse: Reuse
    ) -> bool:
        held = self.home.stretches()
        there = held.get(stretch.key)
        parent_is_there = stretch.first == 0 or stretch.parent in held
        # One of this key may be there and be of no use: without drafts, or continuing what is gone.
        is_new = _way(held, stretch.key, reuse.hashes, stretch.drafts) is None
        if parent_is_there and is_new and (there is None or self.home.is_free(stretch.key)):
            if not self._make_room(stretch, there):
                return False
            problem = self.home.write(stretch, ids, tensors)
            if problem:
                self._warn_once(f"nothing is kept: {problem}")
                return False
        if parent_is_there and self.home.pin(stretch.key):
            reuse.pinned.append(stretch.key)
        return parent_is_there

    def _make_room(self, stretch: Stretch, there: Stretch | None) -> bool:
        """Evict until the stretch fits. False when it cannot."""
        size = self.home.size(stretch)
        if size > self.budget:
            blocks = (stretch.end - stretch.first) // GRID
            self._warn_once(
                f"{blocks} blocks and their snapshot take {size:,} bytes, the budget is "
                f"{self.budget:,}; they are not kept"
            )
            return False
        held = self.home.stretches()
        total = self.home.clutter() + sum(self.home.size(s) for s in held.values())
        total -= self.home.size(there) if there else 0
        while total + size > self.budget:
            continued = {s.parent for s in held.values()}
            free = (s for s in held.values() if s.key not in continued and s.key != stretch.key)
            gone = next((s for s in free if self.home.remove(s.key)), None)
            if gone is None:
                self._warn_once("not all is kept: what fills the budget is in use")
                return False
            del held[gone.key]
            total -= self.home.size(gone)
            self.evicted[gone.key] = None
            while len(self.evicted) > 4096:
                del self.evicted[next(iter(self.evicted))]
        return True

    def _fits(self, stretch: Stretch, tensors: dict[str, Tensor]) -> bool:
        """Whether these are the tensors that a stretch of this model has."""
        described = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        return described == self.described(stretch.first, stretch.end, stretch.drafts)

    def described(
        self, first: int, end: int, drafts: bool
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors of a stretch: shapes and dtypes by name."""
        empty = self.model.new_cache()
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "hidden": ((1, 1, self.model.config.hidden_size), self.model.dtype)
        }
        states = {f"layers.{i}": state for i, state in enumerate(empty.layers)}
        if drafts and empty.mtp is not None:
            states["mtp"] = empty.mtp
        for node, state in states.items():
            rows = end - first - (node == "mtp" and first == 0)
            for name, tensor in state.tensors().items():
                B, G, *rest = tensor.shape
                shape = (B, G, rows, rest[-1]) if isinstance(state, KVCache) else (B, G, *rest)
                found[f"{node}.{name}"] = shape, tensor.dtype
        return found

    def _reason(
        self, length: int, matched: int, whole: int, hashes: list[str], held: dict[str, Stretch]
    ) -> str:
        """Why a hit ends where it does."""
        if length == whole:
            return "all whole blocks" if whole else f"no whole block of {GRID} tokens"
        gone = [i * GRID for i in range(len(hashes)) if hashes[i] in self.evicted]
        gone = [end for end in gone if end > length]
        if any(i * GRID > length and key in held for i, key in enumerate(hashes)):
            later = max(i * GRID for i, key in enumerate(hashes) if key in held)
            return f"{later} tokens are kept, but without what drafting needs, or damaged"
        if matched > length:
            return f"{matched} tokens are kept, but the last snapshot in them is at {length}"
        if gone:
            return f"the snapshot at {max(gone)} was evicted"
        if not held:
            return "nothing is kept yet"
        return f"block {length // GRID}, tokens {length} to {length + GRID - 1}, is not kept"

    def _warn_once(self, line: str) -> None:
        if line not in self.warned:
            self.warned.add(line)
            self.warn(line)


def _way(
    held: dict[str, Stretch], key: str, hashes: list[str], draft: bool
) -> list[Stretch] | None:
    """The stretches from token 0 to a key; None when one is missing, or lacks what drafting needs."""
    way: list[Stretch] = []
    end = hashes.index(key) * GRID
    while end > 0:
        stretch = held.get(key)
        if stretch is None or (draft and not stretch.drafts) or stretch.end != end:
            return None
        first = stretch.first // GRID
        if (
            hashes[first] != stretch.parent
            or [*stretch.blocks] != hashes[first + 1 : end // GRID + 1]
        ):
            return None
        way.insert(0, stretch)
        key, end = stretch.parent, stretch.first
    return way


def chained(root: str, ids: list[int]) -> list[str]:
    """The root and the hash after each whole block of `ids`, each over the one before and 64 ids."""
    hashes = [root]
    for first in range(0, len(ids) // GRID * GRID, GRID):
        block = np.array(ids[first : first + GRID], dtype="<i8").tobytes()
        hashes.append(hashlib.sha256(bytes.fromhex(hashes[-1]) + block).hexdigest())
    return hashes


def root_of(identity: dict[str, str]) -> str:
    """The hash that a chain of blocks starts with."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def identity(model: Model, checkpoint: str) -> dict[str, str]:
    """All that the bits of a state depend on, but for the tokens: the same for two processes that may
    share them. checkpoint: `fingerprint` of its files."""
    device = model.embed_tokens.weight.device
    classes = [f"{n}={type(m).__module__}.{type(m).__name__}" for n, m in nodes(model, "*").items()]
    swapped = [
        line for line in classes if not line.partition("=")[2].startswith(("reference.", "torch."))
    ]
    return {
        "checkpoint": checkpoint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "path": "; ".join(swapped) or "reference",
        "nodes": hashlib.sha256("\n".join(classes).encode()).hexdigest()[:16],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "torch": torch.__version__,
    }


@cache
def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
    )


def fingerprint(folder: Path) -> str:
    """Sixteen hex digits of a checkpoint's files: names, sizes, times of change, config.json, and of each
    weight file its first and last MiB. Not every byte: 400 GB would take minutes."""
    total = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        stat = file.stat()
        total.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        with file.open("rb") as handle:
            total.update(handle.read(1 << 20))
            handle.seek(max(0, stat.st_size - (1 << 20)))
            total.update(handle.read(1 << 20))
    return total.hexdigest()[:16]
