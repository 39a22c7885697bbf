"""A prefix cache in a folder that is damaged, foreign, full, read-only, shared or gone: the run goes on,
and its tokens and logits are those of a run without any cache, bit by bit."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen35.cli import run
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.prefix.keys import chained, identity
from reference.model import Model
from tests.support.prefix_folders import (  # noqa: F401
    PROMPT,
    ROOT,
    TOKENS,
    alone,
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
    root,
    unfinished,
)

# --- a second process -----------------------------------------------------------------------------


def test_another_object_finds_them(place: Path, model: Model) -> None:
    """Whole; and of a prompt that goes on in another way, what they have in common."""
    assert_healthy(place, model)
    other = PROMPT[:200] + random_ids(130, seed=1)
    result = ran(model, other, opened(place, model))
    assert_same(result, model)
    assert result.cached_tokens == 128
    assert_healthy(place, model, other)


def test_with_and_without_drafts(tmp_path: Path, model: Model) -> None:
    """Segments without the MTP head's keys do not serve drafting, and are replaced by those with."""
    place = tmp_path / "prefixes"
    assert ran(model, PROMPT, opened(place, model), draft=0).cached_tokens == 0
    for draft, cached in ((0, 320), (2, 0), (2, 320), (0, 320)):
        result = ran(model, PROMPT, opened(place, model), draft=draft)
        assert result.cached_tokens == cached
        assert_same(result, model)
    assert len(files(place)) == 3


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python -m qwen35.generate`."""
    words = [sys.executable, "-m", "qwen35.generate", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_real_command_twice(tmp_path: Path, checkpoint: Path, model: Model) -> None:
    """The second process starts where the first one's prefill ended, with the same bits; both are those
    of this process without a cache."""
    arguments = (
        "--model", checkpoint, "--prompt-ids", ",".join(map(str, PROMPT)), "--dtype", "float32",
        "--max-new-tokens", TOKENS, "--prefix-cache", tmp_path / "prefixes", "--digest", "--json",
        "--ignore-eos",
    )  # fmt: skip
    expected = alone(model, PROMPT)
    for cached in (0, 320):
        status, out, err = command(*arguments)
        assert status == 0, err
        found = json.loads(out)
        assert found["cached_tokens"] == cached, err
        assert found["token_ids"] == expected.token_ids
        assert found["logits_sha256"] == expected.logits_sha256
    assert unfinished(tmp_path / "prefixes") == []


def test_bad_arguments(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the thing, and exit 2."""
    (tmp_path / "file").write_text("")
    common = ["--model", str(checkpoint), "--prompt-ids", "1,2", "--prefix-cache"]
    for arguments, words in (
        (["file"], ["--prefix-cache", str(tmp_path / "file"), "is a file"]),
        (["new", "--prefix-cache-bytes", "much"], ["--prefix-cache-bytes", "'much'"]),
        (["new", "--prefix-cache-bytes", "-1"], ["--prefix-cache-bytes"]),
    ):
        with pytest.raises(SystemExit) as left:
            run(build_parser(), main, [*common, str(tmp_path / arguments[0]), *arguments[1:]])
        out, err = capsys.readouterr()
        assert left.value.code == 2
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert not [word for word in words if word not in err], err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_one(tmp_path: Path, model: Model) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        opened(tmp_path / "file" / "below", model)


# --- damage ---------------------------------------------------------------------------------------


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte of the tensors": lambda c: flipped(c, header_end(c), 1),
    "a byte in the tensors": lambda c: flipped(c, (header_end(c) + len(c)) // 2),
    "last byte": lambda c: flipped(c, -1, 1),
    "length of the header": lambda c: flipped(c, 0, 1),
    "long header": lambda c: flipped(c, 7),
    "start of the header": lambda c: flipped(c, 8),
    "a byte in the header": lambda c: flipped(c, header_end(c) // 2),
    "an id": lambda c: flipped(c, c.index(b'"ids":"[') + 8, 1),
    "a checksum": lambda c: flipped(c, c.index(b'"sha256":"') + 12, 1),
    "no bytes": lambda c: b"",
    "8 bytes": lambda c: c[:8],
    "half a header": lambda c: c[: header_end(c) // 2],
    "header only": lambda c: c[: header_end(c)],
    "half of the tensors": lambda c: c[: (header_end(c) + len(c)) // 2],
    "last byte missing": lambda c: c[:-1],
    "a byte too many": lambda c: c + b"\0",
    "garbage": lambda c: random.Random(0).randbytes(len(c)),
    "zeros": lambda c: bytes(len(c)),
    "text": lambda c: b"not a segment",
}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage(damage: Callable[[bytes], bytes], which: int, place: Path, model: Model) -> None:
    """A run that meets it says so and computes again what was lost; the next one finds all whole."""
    file = files(place)[which]
    file.write_bytes(damage(file.read_bytes()))
    kept = opened(place, model)
    problems = kept.store.problems()
    result = ran(model, PROMPT, kept)
    assert_same(result, model)
    assert result.cached_tokens == [0, 128, 256][which]
    assert any("damaged" in line for line in problems + kept.lines)
    assert_healthy(place, model)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_under_an_open_cache(
    damage: Callable[[bytes], bytes], place: Path, model: Model
) -> None:
    """The damage is done in place, in a file that this process has looked at before."""
    kept = opened(place, model)
    assert ran(model, PROMPT, kept).cached_tokens == 320
    file = files(place)[1]
    content = damage(file.read_bytes())
    with file.open("r+b") as handle:
        handle.write(content)
        handle.truncate()
    for _ in range(2):
        assert_same(ran(model, PROMPT, kept), model)
    assert_same(ran(model, PROMPT, opened(place, model)), model)  # it may be the first to notice
    assert_healthy(place, model)


def test_any_bit_of_a_header(place: Path, model: Model) -> None:
    """Whatever it says then: the same tokens, and a run later all is whole."""
    chosen = random.Random(1)
    contents = {file: file.read_bytes() for file in files(place)}
    for _ in range(40):
        file, content = chosen.choice(list(contents.items()))
        at, bit = chosen.randrange(header_end(content)), 1 << chosen.randrange(8)
        file.write_bytes(flipped(content, at, bit))
        where = f"bit {bit} of byte {at}, {content[max(at - 9, 0) : at + 9]}"
        for cached in ([0, 128, 256, 320], [320]):
            result = ran(model, PROMPT, opened(place, model))
            assert result.logits_sha256 == alone(model, PROMPT).logits_sha256, where
            assert result.cached_tokens in cached, f"{where}: {result.cache_reason}"
        file.write_bytes(content)  # some bits do no harm, and stay


@pytest.mark.parametrize("first", ["0", "64", "192", "-128", "1_28", "128.0", "two", "9" * 30])
def test_a_position_that_is_not_its_own(first: str, place: Path, model: Model) -> None:
    """A header whose hashes are right and whose first token is not."""
    edit_metadata(files(place)[1], first=first)
    kept = opened(place, model)
    assert_same(ran(model, PROMPT, kept), model)
    assert_healthy(place, model)


def test_one_bit_of_a_position(tmp_path: Path, model: Model) -> None:
    """1024 becomes 9024, which is on the grid too."""
    place, ids = tmp_path / "prefixes", random_ids(1100)
    ran(model, ids, opened(place, model, interval=16))
    file = files(place)[1]
    content = file.read_bytes()
    at = content.index(b'"first":"1024"') + 9
    file.write_bytes(flipped(content, at, 8))
    assert metadata(file)["first"] == "9024"
    assert_same(ran(model, ids, opened(place, model, interval=16)), model)
    assert_healthy(place, model, ids)


def test_a_dtype_that_is_not_its_own(place: Path, model: Model) -> None:
    """F32 read as I32: names and bytes are right."""
    file = files(place)[1]
    content = file.read_bytes()
    at = content.index(b'"dtype":"F32"') + 9
    file.write_bytes(content[:at] + b"I" + content[at + 1 :])
    kept = opened(place, model)
    result = ran(model, PROMPT, kept)
    assert_same(result, model)
    assert result.cached_tokens == 128
    assert kept.lines or kept.store.problems()
    assert_healthy(place, model)


def test_an_identity_that_is_not_its_own(place: Path, model: Model) -> None:
    """The segment is not the first one, so that no hash covers its identity."""
    claimed = identity(model, "a") | {"dtype": "float16"}
    edit_metadata(files(place)[1], identity=json.dumps(claimed))
    assert_same(ran(model, PROMPT, opened(place, model)), model)
    assert_healthy(place, model)


@pytest.mark.parametrize("name", ["ids", "parent", "first", "identity", "sha256"])
@pytest.mark.parametrize("text", ["", "null", "{}", "[1.5]", "[" * 5000])
def test_metadata_of_any_kind(name: str, text: str, place: Path, model: Model) -> None:
    edit_metadata(files(place)[1], **{name: text})
    kept = opened(place, model)
    problems = kept.store.problems()
    assert_same(ran(model, PROMPT, kept), model)
    assert problems or kept.lines
    assert_healthy(place, model)


def test_a_file_under_another_key(place: Path, model: Model) -> None:
    """Renamed, whole as it is; and copied there."""
    first, middle, last = files(place)
    absent = place / f"{hashlib.sha256(b'').hexdigest()}.safetensors"
    shutil.copy(first, absent)
    middle.replace(last)
    kept = opened(place, model)
    assert "its name is not the hash" in " ".join(kept.store.problems())
    result = ran(model, PROMPT, kept)
    assert_same(result, model)
    assert result.cached_tokens == 128
    assert_healthy(place, model)
    assert not absent.exists()


def test_a_file_that_is_whole_again(place: Path, model: Model) -> None:
    """Once seen damaged, then written anew by somebody else, with the same size in the same place."""
    kept, file = opened(place, model), files(place)[1]
    content = file.read_bytes()
    file.write_bytes(flipped(content, 9))
    assert len(kept.store.problems()) == 1
    time.sleep(0.02)  # clocks of file systems are coarse
    file.write_bytes(content)
    assert kept.store.problems() == []
    result = ran(model, PROMPT + random_ids(200, 2), kept)
    assert_same(result, model)
    assert result.cached_tokens == 320
    assert file.read_bytes() == content


def test_another_file_in_the_place_of_one(place: Path, model: Model) -> None:
    """Whole as a file, of the same size, without a word on what it is."""
    kept, file = opened(place, model), files(place)[1]
    assert ran(model, PROMPT, kept).cached_tokens == 320
    spare = file.stat().st_size - 88
    described = {"x": {"dtype": "U8", "shape": [spare], "data_offsets": [0, spare]}}
    header = json.dumps(described).encode().ljust(80)
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(spare))
    assert_same(ran(model, PROMPT, kept), model)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("looked_at", [False, True])
def test_two_files_change_places(
    looked_at: bool, in_place: bool, tmp_path: Path, model: Model
) -> None:
    """Both are whole, and have the same size and shapes."""
    place = tmp_path / "prefixes"
    prompts = [PROMPT[:128] + [100 + id % 60 for id in random_ids(128, seed)] for seed in (1, 2)]
    kept = opened(place, model)
    for ids in prompts:
        ran(model, ids, kept)
    one, two = (place / f"{chained(root(model), ids)[-1]}.safetensors" for ids in prompts)
    contents = [file.read_bytes() for file in (two, one)]
    assert len({len(content) for content in contents}) == 1
    for file, content in zip((one, two), contents, strict=True):
        if not in_place:
            file.unlink()
        file.write_bytes(content)
    kept = kept if looked_at else opened(place, model)
    for ids in prompts:
        assert_same(ran(model, ids, kept), model)
    for ids in prompts:
        assert_healthy(place, model, ids)


def test_a_segment_that_others_continue_is_lost(tmp_path: Path, model: Model) -> None:
    """The rest of the chain is used again once the lost part is computed, wherever that part ended."""
    place, ids = tmp_path / "prefixes", PROMPT
    assert ran(model, ids[:192], opened(place, model, interval=32)).cached_tokens == 0
    assert ran(model, ids, opened(place, model, interval=32)).cached_tokens == 192
    head, _ = files(place)
    head.write_bytes(b"")
    assert_same(ran(model, ids, opened(place, model, interval=32)), model)
    assert_healthy(place, model)


def test_a_lost_segment_that_others_continue(place: Path, model: Model) -> None:
    """Deleted by hand: no error, no problem, computed again."""
    files(place)[0].unlink()
    kept = opened(place, model)
    result = ran(model, PROMPT, kept)
    assert (result.cached_tokens, kept.lines, kept.store.problems()) == (0, [], [])
    assert_healthy(place, model)


def test_a_folder_and_a_link_under_a_key(place: Path, model: Model, tmp_path: Path) -> None:
    """No segments; neither is followed nor deleted with what it leads to."""
    _, middle, last = files(place)
    (tmp_path / "elsewhere").write_bytes(middle.read_bytes())
    middle.unlink()
    middle.symlink_to(tmp_path / "elsewhere")
    last.unlink()
    last.mkdir()
    kept = opened(place, model)
    result = ran(model, PROMPT, kept)
    assert_same(result, model)
    assert result.cached_tokens == 128
    assert len(kept.lines) == 1
    assert (tmp_path / "elsewhere").exists() and last.is_dir() and not middle.is_symlink()
    assert unfinished(place) == []
