"""Prefix cache: stores the results of prefill for later prompts with the same prefix.

A *segment* is a sequence of whole 64-token blocks. It has their keys and values (also those of the
MTP head) and a snapshot of the delta nets' states after its last token. Each segment continues
another one, its parent, or begins at token 0. A segment is stored and evicted as a whole, so a hit
ends where a segment ends. Only a segment without children that is not in use is evicted, the least
recently used first.

The key of a segment is a chained hash of the ids of its parents and its own, block by block. The
chain starts with everything that the bits depend on (`identity`), so another checkpoint, dtype or
swap has other keys. Only results of prefill are stored, because decoding computes other bits (the
recurrent form, products of 4 rows).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen35.arguments import shown
from qwen35.cache import Cache, KVCache
from qwen35.errors import InputError
from qwen35.parallel.nodes import ranks_of
from qwen35.prefix.keys import chained, identity, root_of
from qwen35.prefix.store import Memory, Segment, Store
from reference.linear import GRID
from reference.model import Model

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by a tensor's name
INTERVAL = 32  # blocks between snapshots: 2,048 tokens, or a chunk if that is longer


@dataclass
class Reuse:
    """The state of one prompt in the cache, from `begin` to `finish`.

    length: the number of reused tokens. reason: why there are not more.
    stops: the positions at which prefill calls `keep`.
    hashes: the chained hashes before the first block and after each block.
    chain: the reused segments, in order, with their tensors.
    pinned: the keys of segments that must not be evicted.
    kept: the end and the tensors of each segment that prefill has computed.
    """

    length: int
    reason: str
    stops: list[int]
    hashes: list[str]
    chain: list[tuple[Segment, dict[str, Tensor]]]
    pinned: list[str]
    kept: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)


class PrefixCache:
    """Stores the prefixes of one model's prompts, in memory or in a folder.

    budget: the limit for the bytes of all segments. interval: blocks between snapshots (None:
    INTERVAL, or the blocks of a chunk if those are more). There is always a snapshot after the last
    whole block of a prompt, and where a prompt departs from stored segments. warn: called with a
    line for each error. The run then goes on without the cache.
    """

    def __init__(
        self,
        model: Model,
        *,
        budget: int,
        interval: int | None = None,
        store: Store | None = None,
        checkpoint: str = "",
        warn: Callable[[str], object] = lambda line: None,
    ) -> None:
        if not isinstance(budget, int) or budget < 0:
            raise InputError(f"budget = {shown(budget)}; expected a number of bytes >= 0")
        self.model, self.budget, self.interval = model, budget, interval
        self.store, self.checkpoint, self.warn = store or Memory(), checkpoint, warn
        self.evicted: dict[str, None] = {}  # keys, the latest last; used to explain misses
        self.warned: set[str] = set()
        self._described: dict[tuple[int, bool, bool, str], Shapes] = {}  # results of `described`

    def begin(self, ids: list[int], *, draft: bool, chunk: int = GRID) -> Reuse:
        """Find the longest stored prefix of `ids`, and pin it until `finish` or `release`. chunk:
        tokens per pass of the prefill that follows."""
        hashes = chained(root_of(identity(self.model, self.checkpoint)), ids)
        pinned: list[str] = []
        try:
            found = self._begin(ids, hashes, draft, chunk, pinned)
        except OSError as error:
            for key in pinned:
                self.store.unpin(key)
            self._warn_once(f"it cannot be read, and is not used: {error}")
            found = Reuse(0, "it cannot be read", [], hashes, [], [])
        self._agree(found)
        return found

    def _agree(self, reuse: Reuse) -> None:
        """Reuse only what every rank has, and stop where any rank stops, because ranks make the
        same passes."""
        ranks = ranks_of(self.model)
        if ranks.size == 1:
            return
        ends = [segment.end for segment, _ in reuse.chain]
        everyone = ranks.exchange({"ends": ends, "stops": reuse.stops})
        length = max(set.intersection(*({0, *of_rank["ends"]} for of_rank in everyone)))
        kept = sum(end <= length for end in ends)
        for key in reuse.pinned[kept:]:
            self.store.unpin(key)
        if length < reuse.length:
            reuse.reason = f"{reuse.length} tokens are kept on rank {ranks.rank}, fewer on another"
        reuse.length, reuse.chain, reuse.pinned = length, reuse.chain[:kept], reuse.pinned[:kept]
        stops = {stop for of_rank in everyone for stop in of_rank["stops"] + of_rank["ends"]}
        reuse.stops = sorted(stop for stop in stops if stop > length)

    def _begin(
        self, ids: list[int], hashes: list[str], draft: bool, chunk: int, pinned: list[str]
    ) -> Reuse:
        with self.store.exclusive():
            held = self.store.segments()
            ends = (i * GRID for i in range(len(hashes) - 1, 0, -1) if hashes[i] in held)
            best = next((way for end in ends if (way := _way(held, end, hashes, draft))), [])
            for segment in best:
                if not self.store.pin(segment.key):
                    break
                pinned.append(segment.key)
        chain: list[tuple[Segment, dict[str, Tensor]]] = []
        for segment in best[: len(pinned)]:
            tensors = self.store.read(segment)
            if tensors is None or not self._fits(segment, tensors):
                self._warn_once(
                    f"tokens {segment.first} to {segment.end - 1} are damaged, and left out"
                )
                self.store.discard(segment.key)
                del held[segment.key]
                break
            chain.append((segment, tensors))
        for key in pinned[len(chain) :]:
            self.store.unpin(key)
        length = chain[-1][0].end if chain else 0
        known = {block for segment in held.values() for block in segment.blocks}
        matched = next((i for i in range(len(hashes) - 1, 0, -1) if hashes[i] in known), 0) * GRID
        whole = len(ids) // GRID * GRID
        # A snapshot ends a pass, so snapshots closer than a chunk would cut each pass into pieces.
        step = self.interval * GRID if self.interval else max(INTERVAL * GRID, chunk)
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
        """Copy the reused segments into an empty cache with room for `room` tokens. Returns the
        trunk's hidden state of the last token, [1, 1, D], or None if nothing is reused."""
        into.reserve(room)  # at the start, because views in `kept` would keep old buffers alive
        if not reuse.chain:
            return None
        parts = [tensors for _, tensors in reuse.chain]
        into.restore(parts, reuse.length, mtp=draft)
        return parts[-1]["hidden"].to(self.model.embed_tokens.weight.device, copy=True)

    def keep(self, reuse: Reuse, computed: Cache, hidden: Tensor, end: int, *, draft: bool) -> None:
        """Note the results of prefill up to token `end`, a stop. They are views until `finish`
        copies them, because no later pass writes into these positions."""
        first = reuse.kept[-1][0] if reuse.kept else reuse.length
        tensors = {"hidden": hidden.clone()} | computed.snapshot(first, mtp=draft)
        reuse.kept.append((end, tensors))

    def finish(self, reuse: Reuse, ids: list[int]) -> None:
        """Store the noted results, as far as the budget allows, and unpin the segments."""
        try:
            self._keep_all(reuse, ids)
        except OSError as error:
            self._warn_once(f"nothing is kept: {error}")
        self.release(reuse)

    def _keep_all(self, reuse: Reuse, ids: list[int]) -> None:
        first = reuse.length
        with self.store.exclusive():
            for end, tensors in reuse.kept:
                blocks = reuse.hashes[first // GRID : end // GRID + 1]
                nbytes = sum(tensor.nbytes for tensor in tensors.values())
                drafts = "mtp.k" in tensors
                segment = Segment(blocks[0], first, end, tuple(blocks[1:]), drafts, nbytes)
                if not self._put(segment, ids[first:end], tensors, reuse):
                    break
                first = end

    def release(self, reuse: Reuse) -> None:
        """Unpin the segments, without storing anything."""
        for key in reuse.pinned:
            self.store.unpin(key)
        reuse.pinned, reuse.kept, reuse.chain = [], [], []

    def _put(
        self, segment: Segment, ids: list[int], tensors: dict[str, Tensor], reuse: Reuse
    ) -> bool:
        held = self.store.segments()
        there = held.get(segment.key)
        parent_is_there = segment.first == 0 or segment.parent in held
        # A stored segment with this key may be useless: without drafts, or without its parent.
        is_new = _way(held, segment.end, reuse.hashes, segment.drafts) is None
        if parent_is_there and is_new and (there is None or self.store.is_free(segment.key)):
            if not self._make_room(segment, there):
                return False
            problem = self.store.write(segment, ids, tensors)
            if problem:
                beyond = f" beyond token {segment.first}" if segment.first else ""
                self._warn_once(f"nothing is kept{beyond}: {problem}")
                return False
        if parent_is_there and self.store.pin(segment.key):
            reuse.pinned.append(segment.key)
        return parent_is_there

    def _make_room(self, segment: Segment, there: Segment | None) -> bool:
        """Evict segments until this one fits. Returns False if it cannot fit."""
        size = self.store.size(segment)
        if size > self.budget:
            blocks = (segment.end - segment.first) // GRID
            self._warn_once(
                f"{blocks} blocks and their snapshot take {size:,} bytes, the budget is "
                f"{self.budget:,}; they are not kept"
            )
            return False
        held = self.store.segments()
        total = self.store.remove_unreadable() + sum(self.store.size(s) for s in held.values())
        total -= self.store.size(there) if there else 0
        while total + size > self.budget:
            continued = {s.parent for s in held.values()}
            free = (s for s in held.values() if s.key not in continued and s.key != segment.key)
            gone = next((s for s in free if self.store.remove(s.key)), None)
            if gone is None:
                self._warn_once("not all is kept: what fills the budget is in use")
                return False
            del held[gone.key]
            total -= self.store.size(gone)
            self.evicted[gone.key] = None
            while len(self.evicted) > 4096:
                del self.evicted[next(iter(self.evicted))]
        return True

    def _fits(self, segment: Segment, tensors: dict[str, Tensor]) -> bool:
        """Whether the tensors have the names, shapes and dtypes of this segment."""
        described = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        return described == self.described(segment.first, segment.end, segment.drafts)

    def described(self, first: int, end: int, drafts: bool) -> Shapes:
        """The shapes and dtypes of a segment's tensors, by name."""
        kind = end - first, first == 0, drafts, self.model.kv_cache_dtype
        if kind in self._described:
            return self._described[kind]
        empty = self.model.new_cache()
        found: Shapes = {"hidden": ((1, 1, self.model.config.hidden_size), self.model.dtype)}
        states = {f"layers.{i}": state for i, state in enumerate(empty.layers)}
        if drafts and empty.mtp is not None:
            states["mtp"] = empty.mtp
        for node, state in states.items():
            rows = end - first - (node == "mtp" and first == 0)
            for name, tensor in state.tensors().items():
                B, G, *rest = tensor.shape
                shape = (B, G, rows, rest[-1]) if isinstance(state, KVCache) else (B, G, *rest)
                found[f"{node}.{name}"] = shape, tensor.dtype
        self._described[kind] = found
        return found

    def _reason(
        self, length: int, matched: int, whole: int, hashes: list[str], held: dict[str, Segment]
    ) -> str:
        """A text that says why a hit ends at `length`."""
        if length == whole:
            return "all whole blocks" if whole else f"no whole block of {GRID} tokens"
        gone = [i * GRID for i in range(len(hashes)) if hashes[i] in self.evicted]
        gone = [end for end in gone if end > length]
        if any(i * GRID > length and key in held for i, key in enumerate(hashes)):
            later = max(i * GRID for i, key in enumerate(hashes) if key in held)
            return f"{later} tokens are kept, but without what drafting needs, or damaged"
        if matched > length:
            return f"{matched} tokens are kept, but the last delta-net states among them are at {length}"
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
    held: dict[str, Segment], end: int, hashes: list[str], draft: bool
) -> list[Segment] | None:
    """The segments from token 0 to token `end`. None if one is missing, lacks the MTP head's
    tensors with `draft`, or does not fit the hashes."""
    way: list[Segment] = []
    key = hashes[end // GRID]
    while end > 0:
        segment = held.get(key)
        if segment is None or (draft and not segment.drafts) or segment.end != end:
            return None
        first = segment.first // GRID
        if (
            hashes[first] != segment.parent
            or [*segment.blocks] != hashes[first + 1 : end // GRID + 1]
        ):
            return None
        way.insert(0, segment)
        key, end = segment.parent, segment.first
    return way
