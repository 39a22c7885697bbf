"""A prefix cache in a folder: its budget, and several processes at once."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from qwen35.generation import Generation
from qwen35.prefix import folder as prefix_files
from qwen35.prefix.folder import UNFINISHED, examine
from qwen35.prefix.keys import chained
from qwen35.sampling import Sampling
from reference.model import Model
from tests.support.prefix_folders import (  # noqa: F401
    PROMPT,
    ROOT,
    TOKENS,
    alone,
    assert_healthy,
    assert_same,
    checkpoint,
    files,
    made,
    model,
    opened,
    place,
    ran,
    random_ids,
    root,
)

# --- the budget -----------------------------------------------------------------------------------


def total(place: Path) -> int:
    return sum(file.stat().st_size for file in place.iterdir())


def test_a_budget_below_one_block(tmp_path: Path, model: Model) -> None:
    """One line, whatever the number of runs, and nothing is kept."""
    kept = opened(tmp_path / "prefixes", model, budget=1000)
    for _ in range(2):
        result = ran(model, PROMPT, kept)
        assert_same(result, model)
        assert result.cached_tokens == 0
    assert len(kept.lines) == 1
    assert "1,000" in kept.lines[0]
    assert os.listdir(tmp_path / "prefixes") == []


def test_the_budget_holds_for_the_files(tmp_path: Path, model: Model) -> None:
    """Their actual sizes together; each segment that is there can be reached."""
    place, budget = tmp_path / "prefixes", 900_000
    chosen, most = random.Random(5), 0
    prompts = [PROMPT[: chosen.randrange(1, 330)] + random_ids(n * 23, n) for n in range(20)]
    for ids in prompts:
        kept = opened(place, model, budget=budget)
        result = ran(model, ids, kept, draft=chosen.choice([0, 2]))
        assert_same(result, model)
        assert kept.lines == []
        assert total(place) <= budget
        most = max(most, total(place))
        held = kept.store.segments()
        assert all(s.first == 0 or s.parent in held for s in held.values())
    assert most > 0.7 * budget


def test_the_longest_unused_goes_first(tmp_path: Path, model: Model) -> None:
    """A prompt that is used again outlives one that came later, also across processes' objects."""
    place = tmp_path / "prefixes"
    prompts = [random_ids(130, seed) for seed in range(4)]
    for ids in prompts[:3]:
        ran(model, ids, opened(place, model))
    budget = total(place) + 50_000  # a fourth does not fit
    assert ran(model, prompts[0], opened(place, model)).cached_tokens == 128
    kept = opened(place, model, budget=budget)
    ran(model, prompts[3], kept)
    held = kept.store.segments()
    there = [chained(root(model), ids)[-1] in held for ids in prompts]
    assert there == [True, False, True, True]
    gone = ran(model, prompts[1], kept)
    assert gone.cached_tokens == 0
    assert gone.cache_reason == "the snapshot at 128 was evicted"


def test_the_end_goes_before_the_beginning(place: Path, model: Model) -> None:
    """The end of a chain is evicted first, even if its beginning was used the longest ago."""
    first, middle, last = files(place)
    for age, file in enumerate((last, middle, first)):
        os.utime(file, (1000 - age, 1000 - age))
    new = random_ids(64, seed=9)
    kept = opened(place, model, budget=total(place))
    ran(model, new, kept)
    assert first.exists() and not last.exists()
    assert total(place) <= kept.cache.budget
    held = kept.store.segments()
    assert all(s.first == 0 or s.parent in held for s in held.values())


def test_what_is_in_use_stays(place: Path, model: Model) -> None:
    """Another process's object cannot evict it before it is let go."""
    reader = opened(place, model)
    reuse = reader.cache.begin(PROMPT, draft=True)
    assert reuse.length == 320
    chain = files(place)
    other, ids = opened(place, model, budget=250_000), random_ids(130, seed=11)
    result = ran(model, ids, other)
    assert_same(result, model)
    assert all(file.exists() for file in chain)
    reader.cache.release(reuse)
    ran(model, ids, other)
    assert not any(file.exists() for file in chain)
    assert ran(model, ids, opened(place, model)).cached_tokens == 128


def test_a_run_that_is_given_up_lets_go(place: Path, model: Model) -> None:
    """Whoever stops after the first token keeps nothing and holds nothing."""
    kept = opened(place, model)
    result = Generation(
        model, PROMPT + random_ids(200, 2), TOKENS, Sampling(), frozenset(), 2,
        prefix_cache=kept.cache,
    )  # fmt: skip
    tokens = iter(result)
    next(tokens)
    assert any(kept.store.in_use.values())
    tokens.close()
    assert not any(kept.store.in_use.values())
    assert len(files(place)) == 3


# --- several processes ----------------------------------------------------------------------------


WORKER = """
import json, os, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qwen35.load import load
from tests.support.prefix_folders import opened, ran

model, place = load(Path(sys.argv[1]), dtype=torch.float32), Path(sys.argv[2])

def answer(kept, result):
    print(json.dumps({"lines": kept.lines, "problems": kept.store.problems(),
        "logits_sha256": result.logits_sha256, "cached": result.cached_tokens}), flush=True)

for line in sys.stdin:
    what, number, ids = json.loads(line)
    if what == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    if what != "publish":
        kept = opened(place, model)
        answer(kept, ran(model, ids, kept))
    else:
        child = os.fork()
        if child:
            print(json.dumps({"pid": child}), flush=True)
            os.waitpid(child, 0)
            print(json.dumps({"ended": child}), flush=True)
        else:
            kept = opened(place, model)
            written = []
            write = kept.store.write
            kept.store.write = lambda *segment: written.append(segment) or write(*segment)
            ran(model, ids, kept)
            while True:
                for segment in written:
                    with kept.store.exclusive():
                        kept.store.remove(segment[0].key)
                        write(*segment)
"""


class Worker:
    """A process with the model loaded, that runs prompts with a prefix cache in a folder."""

    def __init__(self, checkpoint: Path, place: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(checkpoint), str(place)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def tell(self, what: str, number: int, ids: list[int]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([what, number, ids]) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, what: str, number: int, ids: list[int]) -> dict[str, Any]:
        self.tell(what, number, ids)
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def workers(tmp_path: Path, checkpoint: Path) -> Iterator[Callable[[], Worker]]:
    """Starts workers on one folder and sees to their end."""
    started: list[Worker] = []

    def start() -> Worker:
        started.append(Worker(checkpoint, tmp_path / "prefixes"))
        return started[-1]

    yield start
    for worker in started:
        worker.end()


def test_two_processes_write_the_same(
    tmp_path: Path, model: Model, workers: Callable[[], Worker]
) -> None:
    """They write at the same time, again and again. Both finish with the same bits, and the folder
    is whole."""
    place, pair = tmp_path / "prefixes", [workers(), workers()]
    for worker in pair:
        assert "pid" not in worker.ask("run", 0, [1, 2, 3])  # both have started
    for seed in range(8):
        ids = random_ids(400, 100 + seed)
        for worker in pair:
            worker.tell("run", 0, ids)
        answers = [worker.hear() for worker in pair]
        assert {answer["logits_sha256"] for answer in answers} == {alone(model, ids).logits_sha256}
        assert all(answer["lines"] == answer["problems"] == [] for answer in answers)
        assert_healthy(place, model, ids)


def test_a_write_is_alone_and_whole(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else can take the folder's lock meanwhile, and no segment's name is there half-written."""
    place, seen = tmp_path / "prefixes", []
    kept, other = opened(place, model), opened(place, model)

    def watched(tensors: Any, file: Path, claimed: Any) -> None:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other.store.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(file.name)
        save_file(tensors, file, claimed)
        assert not prefix_files.NAME.fullmatch(file.name)

    monkeypatch.setattr(prefix_files, "save_file", watched)
    assert_same(ran(model, PROMPT, kept), model)
    assert len(seen) == 3
    fcntl.flock(other.store.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of afterwards


def test_a_writer_is_killed(tmp_path: Path, model: Model, workers: Callable[[], Worker]) -> None:
    """It is killed at any moment. Its locks go with it, and what it left half-written is never used
    and is removed."""
    place, worker, chosen = tmp_path / "prefixes", workers(), random.Random(17)
    ids = random_ids(700, seed=3)
    for _ in range(6):
        pid = worker.ask("publish", 0, ids)["pid"]
        until = time.monotonic() + 20
        while not (place.is_dir() and list(place.glob("*.safetensors"))):
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(chosen.uniform(0.1, 0.6))
        os.kill(pid, signal.SIGKILL)
        assert worker.hear() == {"ended": pid}
        kept = opened(place, model)
        assert kept.store.problems() == []
        assert_same(ran(model, ids, kept), model)
        assert kept.lines == []
        assert_healthy(place, model, ids)


def test_a_file_that_may_not_grow(
    tmp_path: Path, model: Model, workers: Callable[[], Worker]
) -> None:
    """The system itself refuses a write, in the middle of a file."""
    answer = workers().ask("limited", 50_000, PROMPT)
    assert answer["logits_sha256"] == alone(model, PROMPT).logits_sha256
    assert len(answer["lines"]) == 1 and "nothing is kept: " in answer["lines"][0]
    assert os.listdir(tmp_path / "prefixes") == []


def test_what_a_dead_process_left_goes(place: Path, model: Model) -> None:
    """The beginning of a file, under its unfinished name."""
    left = place / f".{chained(root(model), PROMPT)[-1]}{UNFINISHED}"
    left.write_bytes(files(place)[2].read_bytes()[:5000])
    assert opened(place, model).store.problems() == []
    assert_healthy(place, model)


def test_evicted_while_the_problems_are_counted(
    place: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may remove a file between its listing and its opening: that is no problem."""

    def late(file: Path) -> prefix_files.Found:
        file.unlink(missing_ok=True)
        return examine(file)

    store = opened(place, model).store
    monkeypatch.setattr(prefix_files, "examine", late)
    assert store.problems() == []
