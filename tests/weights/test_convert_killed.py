"""Conversions that are killed at any step and started again; their memory."""

import builtins
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.cli import run
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import TINY
from reference.model import Model
from tests.support.checkpoints import (
    QUANTIZED_SIZES,
    QWEN3_5,
    QWEN3_6,
    SINGLE,
    write,
    write_hole,
)
from tests.support.conversions import (  # noqa: F401
    ALL_LINEAR,
    LITTLE,
    MEMBER,
    TO_MXFP4,
    contents,
    little,
    stop_at,
    untouched,
)
from tests.support.family import FAMILY
from tests.support.memory import peak_anonymous_memory
from tools.convert import build_parser, main
from weights.checkpoint import UNFINISHED, Checkpoint
from weights.convert import FINISHED, convert

ROOT = Path(__file__).parents[2]


# --- killed ---------------------------------------------------------------------------------------


class Counted:
    """A file opened for writing, each write of which is a step; half of a fatal one is written."""

    def __init__(self, handle: Any, step: Callable[[Callable[[], object]], object]) -> None:
        self.handle, self.step = handle, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def __enter__(self) -> "Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def write(self, content: Any) -> None:
        half = content[: len(content) // 2]
        self.step(lambda: (self.handle.write(half), self.handle.flush()))
        self.handle.write(content)


def die_at(last: int) -> list[str]:
    """Make this process kill itself before the last-th thing that it does to the disk.

    Returns a list that grows by the name of each such thing.
    """
    steps: list[str] = []

    def step(name: str, at_the_end: Callable[[], object] = lambda: None) -> None:
        steps.append(name)
        if len(steps) == last:
            at_the_end()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            step(f"{event} {args[0]}")

    open_path = Path.open

    def counted(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return open_path(path, mode, *args, **kwargs)
        step(f"open {path}")
        handle = open_path(path, mode, *args, **kwargs)
        return Counted(handle, lambda fatal: step(f"write {path}", fatal))

    sys.addaudithook(audit)
    setattr(Path, "open", counted)  # noqa: B010
    # The machine stays up, so nothing has to reach the disk.
    setattr(os, "fsync", lambda number: step(f"fsync {number}"))  # noqa: B010
    return steps


def serve_children() -> None:
    """A child for each line of JSON on stdin, which runs the command line; the imports are paid once.

    Prints the child's process id, and its exit status when it has ended.
    """
    torch.set_num_threads(1)
    torch.cat([torch.empty(1, device="meta")] * 2)  # imports half of torch
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_child(task)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _be_child(task: dict[str, Any]) -> None:
    status = 99
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(f"{task['said']}.{name}", flags), number)
        if task["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest_file"],) * 2)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        steps = die_at(task["die_at"]) if task["die_at"] is not None else []
        try:
            run(build_parser(), main, task["args"])
        except SystemExit as left:
            status = int(left.code or 0)
        setattr(Path, "open", builtins.open)  # noqa: B010
        if steps:
            print(json.dumps(steps))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Children:
    """Runs of `python -m tools.convert` in children of one process that has its imports behind it."""

    def __init__(self, place: Path, **environment: str) -> None:
        self.said = place / "said"
        command = "from tests.weights.test_convert_killed import serve_children; serve_children()"
        self.server = subprocess.Popen(
            [sys.executable, "-c", command], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | environment,
        )  # fmt: skip

    def start(self, *args: object, die_at: int | None = None, largest_file: int = 0) -> int:
        """Start one; returns its process id."""
        assert self.server.stdin and self.server.stdout
        task = {"args": [str(a) for a in args], "said": str(self.said), "die_at": die_at}
        self.server.stdin.write(json.dumps(task | {"largest_file": largest_file}) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> tuple[int, str, str]:
        """Exit status (negative: a signal's), stdout and stderr of the one that was started."""
        assert self.server.stdout
        status = int(self.server.stdout.readline())
        out, err = (Path(f"{self.said}.{name}").read_text() for name in ("stdout", "stderr"))
        return status, out, err

    def run(self, *args: object, die_at: int | None = None, largest_file: int = 0) -> Any:
        self.start(*args, die_at=die_at, largest_file=largest_file)
        return self.wait()

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """Closed at the end of the module."""
    started = Children(tmp_path_factory.mktemp("children"))
    yield started
    started.close()


def is_complete(folder: Path) -> bool:
    """Return whether a folder can be read as a checkpoint. If not, the error must be one line."""
    try:
        Checkpoint(folder)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_every_step(tmp_path: Path, children: Children, size: int) -> None:
    """It is killed before each write, fsync, rename and removal. The folder is no checkpoint unless
    it is whole, and the next run makes the same bytes of it."""
    source, alone, target = (tmp_path / name for name in ("in", "alone", "out"))
    write(source, MEMBER, replace(QWEN3_5, mtp=False, visual=False), tokenizer=True, **LITTLE,
          moe_intermediate_size=64)  # fmt: skip
    args = ("--to", "mxfp4", "--tp", size, "--shard-bytes", 150_000)
    status, out, err = children.run(source, alone, *args, die_at=0)
    assert status == 0, err
    steps = json.loads(out.splitlines()[-1])
    wanted = contents(alone)
    assert 2 <= len(list(alone.rglob("*.safetensors"))) // size <= 6
    with untouched(source):
        # With ranks there are more steps, but other ones only between the renames of two ranks' files.
        renames = [i for i, step in enumerate(steps, 1) if step.startswith("os.rename")]
        for last in range(1, len(steps) + 1) if size == 1 else renames:
            status, _, _ = children.run(source, target, *args, die_at=last)
            assert status == -signal.SIGKILL, steps[last - 1]
            unfinished = (target / UNFINISHED).exists()
            if is_complete(target):
                assert not unfinished, steps[last - 1]
            if not unfinished and target.exists() and any(target.iterdir()):
                # All is there, and something that is about to be removed.
                left = {name: c for name, c in contents(target).items() if FINISHED not in name}
                assert left == wanted, steps[last - 1]
            done = {f: f.stat().st_ino for f in target.rglob("*.safetensors")}
            status, _, err = children.run(source, target, *args, die_at=0)
            if status:  # it was whole before
                assert "already" in err and not unfinished, (steps[last - 1], err)
            assert contents(target) == wanted, steps[last - 1]
            # Of the file that was just to be renamed, one rank may have it and another not.
            redone = [file for file, inode in done.items() if file.stat().st_ino != inode]
            assert len(redone) < size, steps[last - 1]
            shutil.rmtree(target)


def test_killed_again_and_again(tmp_path: Path, children: Children) -> None:
    """Forty output files with a kill in every few of them: each run goes on where the last one ended,
    and touches no file that was finished."""
    source, alone, target = (tmp_path / name for name in ("in", "alone", "out"))
    write(source, MEMBER, QWEN3_6, **QUANTIZED_SIZES)
    args = ("--to", "mxfp4", "--shard-bytes", 60_000)
    assert children.run(source, alone, *args)[0] == 0
    total = len(list(alone.glob("*.safetensors")))
    assert total >= 30
    chosen = random.Random(1)
    seen: dict[str, tuple[int, int]] = {}
    runs = 0
    while runs < 100:
        status, _, err = children.run(source, target, *args, die_at=chosen.randint(15, 120))
        finished = {f.name: f.stat() for f in target.glob("*.safetensors")}
        now = {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in finished.items()}
        assert {name: now[name] for name in seen} == seen
        seen = now
        if status == 0:
            break
        assert status == -signal.SIGKILL, err
        runs += 1
        if is_complete(target):  # killed while it cleared up
            assert children.run(source, target, *args)[0] == 0
            break
    assert contents(target) == contents(alone)
    assert runs > 5


def test_the_process_killed_at_random_times(tmp_path: Path) -> None:
    """The command itself, by the clock: a part of a second after its work has begun."""
    source, alone, target = TINY, tmp_path / "alone", tmp_path / "out"
    options = replace(ALL_LINEAR, shard_bytes=200_000)
    convert(source, alone, options)
    assert len(list(alone.glob("*.safetensors"))) >= 30
    command = [sys.executable, "-m", "tools.convert", "tiny", str(target), "--to", "mxfp4"]
    command += ["--what", "all-linear", "--shard-bytes", "200000"]
    chosen = random.Random(0)
    for _ in range(2):
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            before = len(list(target.glob("*.safetensors"))) if target.exists() else 0
            while process.poll() is None:
                found = list(target.glob("*.safetensors")) if target.exists() else []
                if len(found) > before + 5:
                    time.sleep(chosen.uniform(0, 0.03))
                    process.kill()
                    break
                time.sleep(0.001)
        assert process.returncode == -signal.SIGKILL
        assert not is_complete(target)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert contents(target) == contents(alone)


def test_a_disk_that_fills_up(tmp_path: Path, children: Children) -> None:
    """A write that fails (here: a limit to the size of a file) is one line, without half a file; with
    room again the same command finishes."""
    source, alone, target = (tmp_path / name for name in ("in", "alone", "out"))
    write(source, MEMBER, **LITTLE)
    args = (source, target, "--to", "mxfp4", "--shard-bytes", 25_000)
    status, out, err = children.run(*args, largest_file=24_000)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert "File too large" in err
    assert f"the same command continues it: python -m tools.convert {source} {target}" in err
    assert not list(target.rglob("*.partial"))
    assert not is_complete(target)
    assert children.run(*args)[0] == 0
    convert(source, alone, replace(TO_MXFP4, shard_bytes=25_000))
    assert contents(target) == contents(alone)


def test_finished_files_are_not_written_again(little: Path) -> None:
    """Neither opened for writing nor replaced."""
    options = replace(TO_MXFP4, shard_bytes=20_000)
    target = little.parent / "out"
    stop_at(little, target, options, 0.6)
    before = {file: file.stat() for file in target.glob("*.safetensors")}
    assert len(before) > 2
    convert(little, target, options)
    for file, stat in before.items():
        now = file.stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


@pytest.mark.parametrize("gone", ["model-*.safetensors", f"{UNFINISHED}/0*.json"])
def test_a_file_is_finished_with_its_errors_or_not_at_all(little: Path, gone: str) -> None:
    """If either of the two is missing, both are written again."""
    target, alone = little.parent / "out", little.parent / "alone"
    options = replace(TO_MXFP4, shard_bytes=20_000)
    stop_at(little, target, options, 0.6)
    first = min(target.glob(gone))
    first.unlink()
    convert(little, target, options)
    convert(little, alone, options)
    assert contents(target) == contents(alone)


def test_a_lock_that_outlived_its_process_is_none(little: Path) -> None:
    """A kill leaves the file behind, not the lock; while it is held, nobody else gets in."""
    target = little.parent / "out"
    stop_at(little, target, TO_MXFP4, 0.1)
    lock = target / UNFINISHED / "lock"
    assert lock.exists()
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            convert(little, target, TO_MXFP4)
    convert(little, target, TO_MXFP4)
    assert not (target / UNFINISHED).exists()


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_small(tmp_path: Path) -> None:
    """A source of 2 GB, of which a part of the size of one expert is in memory at a time."""
    if shutil.disk_usage(tmp_path).free < 4e9:
        pytest.skip("needs 4 GB of disk")
    sizes = FAMILY["35B-A3B"] | LITTLE | {
        "hidden_size": 2048, "num_experts": 80, "moe_intermediate_size": 1024,
    }  # fmt: skip
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(sizes))
    with torch.device("meta"):
        model = Model(replace(Config.from_dict(sizes), mtp_num_hidden_layers=0))
    described: dict[str, tuple[str, tuple[int, ...]]] = {
        f"model.language_model.{name}": ("BF16", tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if ".experts." not in name and not name.startswith("lm_head.")
    }
    described["lm_head.weight"] = "BF16", (sizes["vocab_size"], 2048)
    for layer in range(2):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        described[f"{experts}.gate_up_proj"] = "BF16", (80, 2048, 2048)
        described[f"{experts}.down_proj"] = "BF16", (80, 2048, 1024)
    assert write_hole(source / SINGLE, described) > 2e9
    try:
        command = [sys.executable, "-m", "tools.convert", str(source), str(target), "--to", "mxfp4"]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            peak = peak_anonymous_memory(process.pid, lambda: process.poll() is None)
            _, err = process.communicate()
        assert process.returncode == 0, err
        assert sum(file.stat().st_size for file in target.iterdir()) > 0.5e9
        assert 0 < peak < 0.6 * 2**30, peak
    finally:
        shutil.rmtree(target, ignore_errors=True)
