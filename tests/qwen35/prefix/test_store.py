"""The stores by themselves: their order, their pins, and copies."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.prefix.folder import Folder
from qwen35.prefix.keys import chained, root_of
from qwen35.prefix.store import Memory, Segment


def segment(key: str, nbytes: int = 12) -> Segment:
    return Segment("root", 0, 128, ("a block", key), False, nbytes)


def test_the_least_recently_used_comes_first() -> None:
    """A segment that is written once more, or pinned, becomes the newest."""
    store, x = Memory(), {"x": torch.zeros(3)}
    for key in "abca":
        assert store.write(segment(key), [], x) is None
    assert [*store.segments()] == ["b", "c", "a"]
    assert store.pin("b") is True and [*store.segments()] == ["c", "a", "b"]
    assert store.pin("other") is False and [*store.segments()] == ["c", "a", "b"]
    assert store.segments()["c"] == segment("c") and store.size(segment("c", 40)) == 40


def test_what_is_pinned_stays_until_every_pin_is_gone() -> None:
    store = Memory()
    store.write(segment("a"), [], {"x": torch.zeros(3)})
    assert store.is_free("a") and store.pin("a") and store.pin("a")
    for _ in range(2):
        assert not store.is_free("a") and store.remove("a") is False
        store.unpin("a")
    assert store.is_free("a") and store.remove("a") is True
    assert store.segments() == {} and store.remove_unreadable() == 0


def test_what_is_damaged_goes_though_it_is_in_use() -> None:
    store = Memory()
    for key in "ab":
        store.write(segment(key), [], {"x": torch.zeros(3)})
    store.pin("a")
    for _ in range(2):  # also where it is gone already
        store.discard("a")
        assert [*store.segments()] == ["b"]


def test_tensors_are_copied_when_they_are_stored() -> None:
    store, x = Memory(), torch.zeros(3)
    store.write(segment("a"), [], {"x": x})
    x.fill_(1)
    found = store.read(segment("a"))
    assert found is not None and found.keys() == {"x"} and not found["x"].any()


def test_a_folders_file_is_free_when_nobody_uses_it(tmp_path: Path) -> None:
    """Another store of the folder sees it so. A file that is gone is free, and may be discarded
    again."""
    mine, theirs = Folder(tmp_path, {"a": "b"}), Folder(tmp_path, {"a": "b"})
    root, key = chained(root_of({"a": "b"}), [1] * 64)
    one = Segment(root, 0, 64, (key,), False, 12)
    assert mine.write(one, [1] * 64, {"x": torch.zeros(3)}) is None
    assert theirs.segments().keys() == {key} and mine.is_free(key)
    assert theirs.pin(key)
    assert mine.is_free(key) is False and mine.remove(key) is False
    theirs.unpin(key)
    assert mine.is_free(key) is True
    for _ in range(2):
        mine.discard(key)
        assert theirs.segments() == {} and mine.is_free(key)
    assert mine.pin(key) is False and mine.remove(key) is True


@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_no_segment_hides_none(
    backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order the system lists a folder: other files, folders and links with such names, and
    what another process evicts between the list and the look at it."""
    store = Folder(tmp_path, {"a": "b"})
    keys = []
    for token in (1, 2):
        root, key = chained(root_of({"a": "b"}), [token] * 64)
        keys.append(key)
        one = Segment(root, 0, 64, (key,), False, 12)
        assert store.write(one, [token] * 64, {"x": torch.zeros(3)}) is None
    for first in "0f":
        name = f"{first * 64}.safetensors"
        (tmp_path / name).mkdir()
        (tmp_path / f"{first}.txt").touch()
        (tmp_path / f"{first * 63}e.safetensors").symlink_to(tmp_path / f"{keys[0]}.safetensors")
        (tmp_path / f"{first * 63}d.safetensors").touch()
    scandir = os.scandir

    def listed(folder: Any) -> list[os.DirEntry[str]]:
        entries = sorted(scandir(folder), key=lambda entry: entry.name, reverse=backwards)
        for first in "0f":
            (tmp_path / f"{first * 63}d.safetensors").unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(os, "scandir", listed)
    assert store.files().keys() == store.segments().keys() == {*keys}
