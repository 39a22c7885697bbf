"""A prefix cache in a folder of another model, without room or rights, or gone."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from qwen35.load import load
from qwen35.prefix import folder as prefix_files
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import FORMAT, Folder
from qwen35.prefix.keys import chained, fingerprint, identity
from qwen35.swap import swapped
from reference.model import Model
from tests.support.prefix_folders import (  # noqa: F401
    PLENTY,
    PROMPT,
    assert_healthy,
    assert_same,
    checkpoint,
    edit_metadata,
    files,
    flipped,
    made,
    metadata,
    model,
    opened,
    place,
    ran,
    random_ids,
    unfinished,
)

# --- foreign --------------------------------------------------------------------------------------


class Stand(nn.Module):
    """A node of somebody else's that computes the same."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @classmethod
    def from_reference(cls, module: nn.Module) -> nn.Module:
        return cls(module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def assert_foreign(place: Path, model: Model, words: list[str], **settings: Any) -> None:
    """No hit, told in one line, and the other one's files stay and are of use to it."""
    before = {file.name: file.read_bytes() for file in files(place)}
    kept = opened(place, model, **settings)
    (line,) = kept.store.problems()
    assert not [word for word in words if word not in line], line
    result = ran(model, PROMPT, kept)
    assert result.cached_tokens == 0
    assert_same(result, model)
    assert ran(model, PROMPT, opened(place, model, **settings)).cached_tokens == 320
    after = {file.name: file.read_bytes() for file in files(place)}
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before)


def test_another_checkpoint(place: Path, model: Model) -> None:
    assert_foreign(place, model, ["3 left alone", "checkpoint", "'a'", "'b'"], checkpoint="b")


def test_another_dtype(place: Path, checkpoint: Path) -> None:
    other = load(checkpoint, dtype=torch.bfloat16)
    assert_foreign(place, other, ["dtype", "'bfloat16'", "'float32'"])


def test_another_swap(place: Path, model: Model) -> None:
    """A node that another class stands for, though it computes the same."""
    with swapped(model, "layers.0.mlp.shared_expert", Stand):
        assert_foreign(place, model, ["path", "Stand", "'reference'"])
    assert ran(model, PROMPT, opened(place, model)).cached_tokens == 320


def test_an_identity_of_a_later_program(place: Path, model: Model) -> None:
    """It has a field that this program does not know, which may mean other bits. One line says so."""
    later = identity(model, "a") | {"kernel": "2"}
    store = Folder(place, later)
    cache = PrefixCache(model, budget=PLENTY, store=store, checkpoint="a")
    hashes = chained(prefix_files.root_of(later), PROMPT[:64])
    tensors = {"hidden": torch.zeros(1, 1, 64)}
    segment = prefix_files.Segment(hashes[0], 0, 64, (hashes[1],), False, 256)
    assert cache.store.write(segment, PROMPT[:64], tensors) is None
    (line,) = opened(place, model).store.problems()
    assert "kernel" in line and "'2'" in line


def test_a_later_format(place: Path, model: Model) -> None:
    """Is left alone, by every run; where it is in the way, it is written over or the run goes on."""
    absent = place / f"{hashlib.sha256(b'').hexdigest()}.safetensors"
    save_file({"hidden": torch.zeros(1)}, absent, {"format": "qwen35-prefix-2"})
    before = absent.read_bytes()
    for ids in (PROMPT, random_ids(200, seed=3)):
        kept = opened(place, model)
        (line,) = kept.store.problems()
        assert "1 left alone" in line and "'qwen35-prefix-2'" in line and repr(FORMAT) in line
        assert_same(ran(model, ids, kept), model)
    assert ran(model, PROMPT, opened(place, model)).cached_tokens == 320
    assert absent.read_bytes() == before


def test_a_later_format_and_no_room(place: Path, model: Model) -> None:
    """It is not evicted either."""
    file = files(place)[2]
    edit_metadata(file, format="qwen35-prefix-2")
    small = opened(place, model, budget=400_000)
    for seed in (4, 5, 6):
        assert_same(ran(model, random_ids(130, seed), small), model)
    assert metadata(file)["format"] == "qwen35-prefix-2"


def test_other_files_stay(place: Path, model: Model) -> None:
    """A folder may hold what is no segment."""
    others = [
        "notes.txt",
        "model.safetensors",
        f"{'A' * 64}.safetensors",
        f"{'a' * 63}.safetensors",
    ]
    for name in others:
        (place / name).write_text(name)
    assert opened(place, model).store.problems() == []
    ran(model, random_ids(300, seed=8), opened(place, model, budget=400_000))
    assert all((place / name).read_text() == name for name in others)


# --- no room, no rights ---------------------------------------------------------------------------


FAILURES: dict[str, Exception] = {
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "full, says safetensors": SafetensorError("Error: I/O error: No space\nleft on device"),
}


@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("begun", [False, True])
def test_nothing_can_be_written(
    error: Exception, begun: bool, place: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments that are there are used, and one line says that new ones are not kept."""

    def fail(tensors: Any, file: Path, claimed: Any) -> None:
        if begun:
            file.write_bytes(b"the beginning of a file")
        raise error

    def refuse(*arguments: Any) -> None:
        raise FAILURES["read-only"]

    before = {file.name: file.read_bytes() for file in files(place)}
    monkeypatch.setattr(prefix_files, "save_file", fail)
    monkeypatch.setattr(prefix_files.os, "utime", refuse)
    kept = opened(place, model)
    for _ in range(2):
        result = ran(model, PROMPT[:300] + random_ids(400, seed=2), kept)
        assert_same(result, model)
        assert result.cached_tokens == 256
    assert len(kept.lines) == 1
    assert "\n" not in kept.lines[0] and "nothing is kept beyond token 256: " in kept.lines[0]
    assert unfinished(place) == []
    assert {file.name: file.read_bytes() for file in files(place)} == before
    monkeypatch.undo()
    assert_healthy(place, model)


def test_damage_that_cannot_be_removed(
    place: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is read-only. The whole segments before the damage are used, and let go of
    afterwards."""
    healthy = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.parent == place:
            raise FAILURES["read-only"]
        healthy(self, missing_ok)

    def refuse(*arguments: Any) -> None:
        raise FAILURES["read-only"]

    file = files(place)[1]
    file.write_bytes(flipped(file.read_bytes(), -1))
    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(prefix_files, "save_file", refuse)
    kept = opened(place, model)
    result = ran(model, PROMPT, kept)
    assert_same(result, model)
    assert kept.lines
    assert not any(kept.store.in_use.values())
    assert result.cached_tokens == 128


# --- gone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made again"])
def test_the_folder_goes_in_mid_run(again: bool, place: Path, model: Model) -> None:
    """Between begin and finish; the run ends as ever, and so does one that begins without it."""
    kept = opened(place, model)
    ids = PROMPT + random_ids(200, seed=2)
    healthy = kept.cache.restore

    def restore(*arguments: Any, **settings: Any) -> Any:
        shutil.rmtree(place)
        if again:
            place.mkdir()
        return healthy(*arguments, **settings)

    kept.cache.restore = restore
    result = ran(model, ids, kept)
    assert result.cached_tokens == 320
    assert_same(result, model)
    kept.cache.restore = healthy
    later = ran(model, ids, kept)
    assert_same(later, model)
    if again:
        assert kept.store.problems() == []
        assert_healthy(place, model, ids)
    else:
        assert (later.cached_tokens, later.cache_reason) == (0, "it cannot be read")
        assert kept.lines and all(str(place) in line for line in kept.lines)
        assert not place.exists()


def test_the_fingerprint_tells_checkpoints_apart(tmp_path: Path, checkpoint: Path) -> None:
    """They differ in a weight near an end of a file, in the config, or in the time of a file's last
    change."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)  # with their times
    mark = fingerprint(checkpoint)
    assert fingerprint(copy) == mark and len(mark) == 16
    seen = {mark}
    weights = copy / "model.safetensors"
    times = weights.stat()
    weights.write_bytes(flipped(weights.read_bytes(), -1))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    seen.add(fingerprint(copy))
    os.utime(weights)
    seen.add(fingerprint(copy))
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    seen.add(fingerprint(copy))
    assert len(seen) == 4


@pytest.mark.parametrize("place", [0, 1 << 20, -1], ids=["first", "second MiB", "last"])
def test_the_fingerprint_reads_both_ends_of_a_large_file(tmp_path: Path, place: int) -> None:
    """A file of three MiB, of which the middle alone is not looked at."""
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    times = weights.stat()
    mark = fingerprint(tmp_path)
    weights.write_bytes(flipped(weights.read_bytes(), place))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (fingerprint(tmp_path) == mark) == (place == 1 << 20)
