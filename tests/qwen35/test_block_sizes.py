"""Sizes around the block that a loop goes by: less than one, exactly one, one and a bit, several."""

import os
from pathlib import Path

import pytest

from qwen35.compare.diff import passes
from qwen35.parallel import checkpoint as parallel
from qwen35.parallel.checkpoint import contents
from qwen35.prefix.keys import chained, fingerprint
from qwen35.template import LONGEST, RENDER
from tests.support.checkpoints import write
from weights.checkpoint import Checkpoint
from weights.shard import Plan

LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 192, 200)
EIGHT = 8  # bytes, instead of a MiB


def changed(file: Path, place: int) -> None:
    """Another byte at a place; size and times stay."""
    content, times = bytearray(file.read_bytes()), file.stat()
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


# --- hashes


@pytest.mark.parametrize("length", LENGTHS)
def test_a_hash_for_each_whole_block(length: int) -> None:
    """A hash depends on all ids up to the end of its block, and on none behind it."""
    ids = [(7 * i) % 1000 for i in range(length)]
    hashes = chained("00", ids)
    assert len(set(hashes)) == len(hashes) == 1 + length // 64
    for end in range(0, length + 1, 64):
        assert chained("00", ids[:end]) == hashes[: end // 64 + 1]
    for place in {0, 1, 62, 63, 64, length - 1} & set(range(length)):
        other = chained("00", [*ids[:place], 5000, *ids[place + 1 :]])
        same = place // 64 + 1  # the root, and the blocks before the one that changed
        assert other[:same] == hashes[:same]
        assert not set(other[same:]) & set(hashes[same:])


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 15, 16, 17, 24, 40])
def test_a_fingerprint_looks_at_both_ends(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is shorter than an end, as long as one or both of them, or longer."""
    monkeypatch.setattr(parallel, "ENDS", EIGHT)
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(size))
    mark = fingerprint(tmp_path)
    for place in range(size):
        changed(file, place)
        in_an_end = place < EIGHT or place >= size - EIGHT
        assert (fingerprint(tmp_path) != mark) == in_an_end, place
        changed(file, place)
    assert fingerprint(tmp_path) == mark


@pytest.mark.parametrize("ends", [-1, 0, 1])
def test_ranks_look_at_both_ends_of_a_checkpoint(
    ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ends meet, leave one byte or two between them, or overlap."""
    write(tmp_path, "0.8B", seed=1)
    checkpoint = Checkpoint(tmp_path)
    plan, (file,) = Plan(checkpoint.config, 1), sorted(tmp_path.glob("*.safetensors"))
    size = file.stat().st_size
    monkeypatch.setattr(parallel, "ENDS", size // 2 + ends)
    mark = contents(checkpoint, plan)
    for place in (0, size // 2 - 1, size // 2, size - 1):
        changed(file, place)
        hidden = ends == -1 and place in (size // 2 - 1, size // 2)
        assert (contents(checkpoint, plan) == mark) == hidden, place
        changed(file, place)


# --- passes


@pytest.mark.parametrize("decode", range(8))
@pytest.mark.parametrize("prompt", [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 320, 400])
def test_the_passes_of_a_comparison(prompt: int, decode: int) -> None:
    """Each token once; a prompt's passes begin on the grid, the last four tokens come together."""
    plan = passes(prompt + decode, decode)
    assert [first for _, first, _ in plan] == [0, *(end for _, _, end in plan[:-1])]
    assert plan[-1][2] == prompt + decode
    prefill = [(first, end) for phase, first, end in plan if phase == "prefill"]
    decoded = [end - first for phase, first, end in plan if phase == "decode"]
    assert prefill[-1][1] == prompt and all(
        first % 64 == 0 and first < end for first, end in prefill
    )
    assert len(prefill) <= 3
    assert decoded == ([1] * (decode - 4) + [4] if decode > 4 else [1] * decode)


# --- what a process writes, in pieces


@pytest.mark.parametrize("length", [0, 1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 3 << 20])
def test_a_template_of_any_length_is_read_whole(length: int) -> None:
    """A pipe holds 64 KiB, and a read takes at most a MiB."""
    text = "".join(chr(97 + i * i % 26) for i in range(min(length, 5000)))
    text = (text * (length // 5000 + 1))[:length]
    assert length < LONGEST
    is_same = RENDER.render("{{ text }}", {"text": text}) == text
    assert is_same
