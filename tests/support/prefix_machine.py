"""A state machine of random operations on a prefix cache, compared with runs without it.

Prompts are made of a few blocks, so that they have common prefixes. They are submitted, continued
with their own answers, forked, and abandoned in the middle. Caches are restarted, shrunk, damaged
and kept in use. After every step the bytes are within the budget, every segment has its parent, and
no segment stays pinned without a user.
"""

import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from qwen35.cache import Cache
from qwen35.config import Config
from qwen35.generation import Generation, prefill
from qwen35.prefix.cache import PrefixCache, Reuse
from qwen35.prefix.folder import Folder
from qwen35.prefix.keys import identity
from qwen35.prefix.store import Memory
from qwen35.sampling import Sampling
from reference.linear import GRID
from reference.model import Model
from tests.support.family import FAMILY, randomise

VOCABULARY = 16
TOKENS = 3  # new tokens of an answer
SAMPLING = Sampling(temperature=1.0, seed=3)
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "full_attention_interval": 2}


@cache
def small(seed: int) -> Model:
    """A random model with one delta-net layer, one attention layer and an MTP head."""
    model = Model(Config.from_dict(FAMILY["27B"] | SIZES))
    randomise(model, seed)
    return model.eval().requires_grad_(False)


@cache
def block(letter: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(letter)
    return tuple(torch.randint(VOCABULARY, (GRID,), generator=generator).tolist())


@dataclass(frozen=True)
class Answer:
    """The result of one generation. It does not depend on the cache."""

    tokens: tuple[int, ...]
    digest: str
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]


def answer(
    model: Model, prompt: tuple[int, ...], depth: int, chunk: int, prefix_cache: PrefixCache | None
) -> Answer:
    result = Generation(
        model, list(prompt), TOKENS, SAMPLING, frozenset(), depth, chunk, prefix_cache, digest=True
    )
    for _ in result:
        pass
    stats = result.draft
    return Answer(
        tuple(result.token_ids), result.logits_sha256, tuple(stats.proposed), tuple(stats.accepted)
    )


@cache
def cold_answer(seed: int, prompt: tuple[int, ...], depth: int) -> Answer:
    return answer(small(seed), prompt, depth, GRID, None)


def tensors_of(state: Cache, hidden: Tensor) -> dict[str, Tensor]:
    """All tensors of the state after a prefill, by name."""
    found = {"hidden": hidden}
    for i, layer in enumerate([*state.layers, state.mtp]):
        if layer is not None:
            found |= {f"{i}.{name}": tensor for name, tensor in layer.tensors().items()}
    return found


@cache
def cold_state(seed: int, prompt: tuple[int, ...], draft: bool) -> dict[str, Tensor]:
    model = small(seed)
    state = model.new_cache()
    with torch.inference_mode():
        hidden = prefill(model, list(prompt), state, chunk=GRID, draft=draft)
    return tensors_of(state, hidden)


def warm_state(
    cache: PrefixCache, reuse: Reuse, prompt: tuple[int, ...], chunk: int, draft: bool
) -> dict[str, Tensor]:
    """The state after a prefill that uses the prefix cache. Missing segments are noted in
    `reuse`."""
    state = cache.model.new_cache()
    with torch.inference_mode():
        before = cache.restore(reuse, state, room=len(prompt) + 1, draft=draft)
        hidden = prefill(
            cache.model, list(prompt), state, chunk=chunk, draft=draft, hidden=before,
            stops=reuse.stops,
            at_stop=lambda end, h: cache.keep(reuse, state, h, end, draft=draft),
        )  # fmt: skip
    return tensors_of(state, hidden)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [
        name
        for name, tensor in found.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]
    assert not wrong, wrong


LETTERS = st.lists(st.integers(0, 2), max_size=3)
TAILS = st.sampled_from([0, 1, 4, 30, 61, 62, 63])
DEPTHS = st.integers(0, 3)
CHUNKS = st.sampled_from([GRID, 2 * GRID, 8 * GRID])


class Machine(RuleBasedStateMachine):
    """The operations. Subclasses choose the store."""

    models = 1  # how many models share the store

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, ...]] = []
        self.held: list[tuple[PrefixCache, Reuse, tuple[int, ...], bool]] = []
        self.limit = 0
        self.damaged = False
        self.warned: list[str] = []

    # Methods of a store

    def restarted(self) -> None:
        """Begin a new process. A store in memory is lost, and a folder stays."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        raise NotImplementedError

    def pins(self) -> int:
        raise NotImplementedError

    def store(self, seed: int) -> Any:
        raise NotImplementedError

    # Steps

    @initialize(budget=st.sampled_from([1, 4, 10, 10_000]), interval=st.sampled_from([1, 2, 32]))
    def begin(self, budget: int, interval: int) -> None:
        """Open the caches. The unit of a budget is about one block with its snapshot."""
        self.interval = interval
        self.unit = 150_000
        self.budget = budget * self.unit
        self.limit = self.budget
        self.restarted()
        self.open()

    def open(self) -> None:
        self.caches = [
            PrefixCache(
                small(seed), budget=self.budget, interval=self.interval, store=self.store(seed),
                checkpoint=str(seed), warn=self.warned.append,
            )
            for seed in range(self.models)
        ]  # fmt: skip

    def ask(self, prompt: tuple[int, ...], depth: int, chunk: int, seed: int) -> None:
        cache = self.caches[seed]
        assert answer(small(seed), prompt, depth, chunk, cache) == cold_answer(seed, prompt, depth)
        # Segments in use without the MTP head's keys are not replaced.
        if self.budget >= 1000 * self.unit and not self.held:
            again = cache.begin(list(prompt), draft=depth > 0)
            cache.release(again)
            assert again.length == len(prompt) // GRID * GRID, again.reason
        self.asked = [*self.asked[-8:], prompt]

    @rule(letters=LETTERS, tail=TAILS, depth=DEPTHS, chunk=CHUNKS, seed=st.integers(0, 1))
    def submit(self, letters: list[int], tail: int, depth: int, chunk: int, seed: int) -> None:
        prompt = sum((block(letter) for letter in letters), ()) + block(3)[: tail or 1]
        self.ask(prompt if tail else prompt[:-1] or block(3)[:1], depth, chunk, seed % self.models)

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 8), more=TAILS, depth=DEPTHS, chunk=CHUNKS, seed=st.integers(0, 1))
    def go_on(self, which: int, more: int, depth: int, chunk: int, seed: int) -> None:
        """Submit the next turn: a prompt, its answer, and more."""
        seed %= self.models
        prompt = self.asked[which % len(self.asked)]
        longer = prompt + cold_answer(seed, prompt, depth).tokens + block(4)[:more]
        self.ask(longer[-7 * GRID :] if len(longer) > 7 * GRID else longer, depth, chunk, seed)

    @rule(letters=LETTERS, tail=st.sampled_from([61, 62, 63]), depth=DEPTHS, more=TAILS)
    def converse(self, letters: list[int], tail: int, depth: int, more: int) -> None:
        """Submit two turns. The first answer ends just after the end of a block."""
        prompt = sum((block(letter) for letter in letters), ()) + block(3)[:tail]
        self.ask(prompt, depth, GRID, 0)
        self.ask(prompt + cold_answer(0, prompt, depth).tokens + block(4)[:more], depth, GRID, 0)

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 8), at=st.integers(1, 300), depth=DEPTHS, chunk=CHUNKS)
    def fork(self, which: int, at: int, depth: int, chunk: int) -> None:
        """Submit two continuations of the same prefix."""
        start = self.asked[which % len(self.asked)][:at]
        for letter in (5, 6):
            self.ask(start + block(letter)[:40], depth, chunk, 0)

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 8), at=st.integers(0, 300), depth=DEPTHS, chunk=CHUNKS)
    def almost(self, which: int, at: int, depth: int, chunk: int) -> None:
        """Submit a prompt with one changed token."""
        prompt = list(self.asked[which % len(self.asked)])
        prompt[at % len(prompt)] ^= 1
        self.ask(tuple(prompt), depth, chunk, 0)

    @rule(first=st.permutations([0, 1, 2]), tail=TAILS, depth=DEPTHS, chunk=CHUNKS)
    def meet_again(self, first: list[int], tail: int, depth: int, chunk: int) -> None:
        """Submit two prompts with different first blocks and the same second block."""
        for letter in first[:2]:
            self.ask(block(letter) + block(first[2]) + block(3)[:tail], depth, chunk, 0)

    @rule(letters=LETTERS, tail=TAILS, draft=st.booleans(), chunk=CHUNKS)
    def prefill_alone(self, letters: list[int], tail: int, draft: bool, chunk: int) -> None:
        """Prefill without generation, and compare every tensor of the state, also the MTP
        head's."""
        prompt = sum((block(letter) for letter in letters), ()) + block(3)[: tail + 1]
        cache = self.caches[0]
        reuse = cache.begin(list(prompt), draft=draft)
        found = warm_state(cache, reuse, prompt, chunk, draft)
        assert_same(found, cold_state(0, prompt, draft))
        cache.finish(reuse, list(prompt))

    @rule(letters=LETTERS, tail=TAILS, depth=DEPTHS)
    def abandon(self, letters: list[int], tail: int, depth: int) -> None:
        """Stop a generation after the first token, as Ctrl-C does."""
        prompt = sum((block(letter) for letter in letters), ()) + block(3)[: tail + 1]
        steps = iter(
            Generation(
                small(0), list(prompt), TOKENS, SAMPLING, frozenset(), depth, GRID, self.caches[0]
            )
        )
        next(steps)
        steps.close()  # pyright: ignore[reportAttributeAccessIssue] (a generator)

    @precondition(lambda self: len(self.held) < 3)
    @rule(letters=LETTERS, draft=st.booleans(), chunk=CHUNKS)
    def hold(self, letters: list[int], draft: bool, chunk: int) -> None:
        """Begin a run that stays open while other steps follow."""
        prompt = sum((block(letter) for letter in letters), ()) + block(3)[:5]
        cache = self.caches[0]
        reuse = cache.begin(list(prompt), draft=draft)
        self.held.append((cache, reuse, prompt, draft))

    @precondition(lambda self: self.held)
    @rule(finish=st.booleans(), chunk=CHUNKS)
    def let_go(self, finish: bool, chunk: int) -> None:
        cache, reuse, prompt, draft = self.held.pop(0)
        found = warm_state(cache, reuse, prompt, chunk, draft)
        assert_same(found, cold_state(0, prompt, draft))
        if finish:
            cache.finish(reuse, list(prompt))
        else:
            cache.release(reuse)

    @precondition(lambda self: not self.held)
    @rule(budget=st.sampled_from([0, 1, 3, 6, 10_000]))
    def restart(self, budget: int) -> None:
        """Restart with another budget."""
        self.budget = budget * self.unit
        self.restarted()
        self.limit = max(self.budget, sum(self.sizes().values()))
        self.open()

    # After every step

    @invariant()
    def within_the_budget(self) -> None:
        total = sum(self.sizes().values())
        assert total <= self.limit, (total, self.limit)
        self.limit = max(self.budget, total)

    @invariant()
    def no_orphans_and_no_leaks(self) -> None:
        if not hasattr(self, "caches"):
            return
        segments = self.caches[0].store.segments()
        for segment in () if self.damaged else segments.values():
            assert segment.first == 0 or segment.parent in segments
        for _, reuse, _, _ in self.held:
            assert set(reuse.pinned) <= segments.keys()
        assert self.pins() == sum(len(reuse.pinned) for _, reuse, _, _ in self.held)

    def teardown(self) -> None:
        for holder, reuse, _, _ in self.held:
            holder.release(reuse)


class InMemory(Machine):
    """The machine with a store in memory."""

    def restarted(self) -> None:
        self.memory = Memory()

    def store(self, seed: int) -> Memory:
        return self.memory

    def sizes(self) -> dict[str, int]:
        """The bytes of the segments, counted from their tensors."""
        held = self.memory.held if hasattr(self, "memory") else {}
        return {key: sum(t.nbytes for t in tensors.values()) for key, (_, tensors) in held.items()}

    def pins(self) -> int:
        return sum(self.memory.pins.values())


class InFolder(Machine):
    """The machine with caches of two checkpoints in one folder. Files are damaged, and writers
    die."""

    models = 2

    def restarted(self) -> None:
        if not hasattr(self, "folder"):
            self.folder = Path(tempfile.mkdtemp())

    def store(self, seed: int) -> Folder:
        return Folder(self.folder, identity(small(seed), str(seed)))

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors")) if hasattr(self, "folder") else []

    def sizes(self) -> dict[str, int]:
        return {file.name: file.stat().st_size for file in self.files()}

    def pins(self) -> int:
        return sum(len(held) for cache in self.caches for held in cache.store.in_use.values())  # pyright: ignore

    @precondition(lambda self: self.asked and not self.held)
    @rule(
        which=st.integers(0, 8), file=st.integers(0, 8), at=st.integers(0, 999), cut=st.booleans()
    )
    def damage(self, which: int, file: int, at: int, cut: bool) -> None:
        """Cut off or change a file that a prompt would use, and then submit the prompt."""
        prompt = self.asked[which % len(self.asked)]
        reuse = self.caches[0].begin(list(prompt), draft=False)
        used = [self.folder / f"{key}.safetensors" for key in reuse.pinned]
        self.caches[0].release(reuse)
        if not used:
            return
        damaged = used[file % len(used)]
        content = bytearray(damaged.read_bytes())
        place = at * len(content) // 1000
        content[place : place + 16] = bytes(byte ^ 0x10 for byte in content[place : place + 16])
        damaged.write_bytes(content[:place] if cut else content)
        self.damaged = True  # its children have no parent until it is computed again
        self.ask(prompt, 1, GRID, 0)

    @rule()
    def die_while_writing(self) -> None:
        """Leave a partial file with the name of an unfinished segment."""
        (self.folder / f".{64 * 'a'}.unfinished").write_bytes(b"half")

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(getattr(self, "folder", "/nonexistent"), ignore_errors=True)
