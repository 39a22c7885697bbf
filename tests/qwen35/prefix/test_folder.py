"""A prefix cache in a folder that is damaged, foreign, full, read-only, shared or gone: the run goes on,
and its tokens and logits are those of a run without any cache, bit by bit."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qwen35.cli import run
from qwen35.errors import InputError
from qwen35.generate import build_parser, main
from qwen35.generation import Generation
from qwen35.load import load
from qwen35.prefix import folder as prefix_files
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import FORMAT, UNFINISHED, Folder, examine
from qwen35.prefix.keys import chained, fingerprint, identity
from qwen35.sampling import Sampling
from qwen35.swap import swapped
from reference.model import Model
from tests.support.checkpoints import write

ROOT = Path(__file__).parents[3]
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 12, "num_experts_per_tok": 3,
    "max_position_embeddings": 16384,
}  # fmt: skip
PLENTY = 1 << 30
TOKENS = 6


def random_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(160, (length,), generator=generator).tolist()


PROMPT = random_ids(330)  # segments end at 128, 256 and 320


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta net, then attention, with an MTP head."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, "397B-A17B", seed=7, **SIZES)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load(checkpoint, dtype=torch.float32)


@dataclass
class Opened:
    """A prefix cache on a folder, and the lines that it gave."""

    cache: PrefixCache
    store: Folder
    lines: list[str] = field(default_factory=list)


def opened(
    place: Path, model: Model, *, budget: int = PLENTY, interval: int = 2, checkpoint: str = "a"
) -> Opened:
    store, lines = Folder(place, identity(model, checkpoint)), []
    cache = PrefixCache(
        model, budget=budget, interval=interval, store=store, checkpoint=checkpoint,
        warn=lines.append,
    )  # fmt: skip
    return Opened(cache, store, lines)


def ran(model: Model, ids: list[int], kept: Opened | None = None, draft: int = 2) -> Generation:
    """A generation that has come to its end."""
    result = Generation(
        model, ids, TOKENS, Sampling(), frozenset(), draft,
        prefix_cache=kept and kept.cache, digest=True,
    )  # fmt: skip
    for _ in result:
        pass
    return result


ALONE: dict[tuple[torch.dtype, tuple[int, ...]], Generation] = {}  # runs without any cache


def alone(model: Model, ids: list[int]) -> Generation:
    """Without any cache, computed once."""
    key = model.dtype, tuple(ids)
    if key not in ALONE:
        ALONE[key] = ran(model, ids)
    return ALONE[key]


def assert_same(result: Generation, model: Model) -> None:
    """As without any cache."""
    expected = alone(model, result.prompt)
    assert expected.cached_tokens == 0
    assert result.finish_reason == "length"
    assert result.token_ids == expected.token_ids
    assert result.logits_sha256 == expected.logits_sha256


def assert_healthy(place: Path, model: Model, ids: list[int] | None = None) -> None:
    """No problems, nothing unfinished; and a run from it is right, and taken over whole."""
    again = opened(place, model)
    result = ran(model, ids or PROMPT, again)
    assert_same(result, model)
    assert result.cached_tokens == len(result.prompt) // 64 * 64, result.cache_reason
    assert again.lines == again.store.problems() == []
    assert unfinished(place) == []


def files(place: Path) -> list[Path]:
    """The segments, by where they begin."""
    return sorted(place.glob("*.safetensors"), key=lambda file: int(metadata(file)["first"]))


def unfinished(place: Path) -> list[str]:
    return [name for name in os.listdir(place) if name.endswith(UNFINISHED)]


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as handle:
        return handle.metadata()


def edit_metadata(file: Path, **changes: str) -> None:
    """The same tensors with another header, in a new file."""
    claimed = metadata(file) | changes
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, claimed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """A folder that holds PROMPT in three segments."""
    folder = tmp_path_factory.mktemp("made")
    result = ran(model, PROMPT, opened(folder, model))
    assert_same(result, model)
    assert result.cached_tokens == 0
    assert [metadata(file)["first"] for file in files(folder)] == ["0", "128", "256"]
    return folder


@pytest.fixture
def place(tmp_path: Path, made: Path) -> Path:
    """A copy of it, for one test."""
    return Path(shutil.copytree(made, tmp_path / "prefixes"))


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
        (["file"], [str(tmp_path / "file"), "prefix cache"]),
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


def flipped(content: bytes, at: int, bits: int = 0xFF) -> bytes:
    changed = bytearray(content)
    changed[at] ^= bits
    return bytes(changed)


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
    """In place, in a file that this process has looked at before."""
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
    """Of a segment that is not the first one: no hash covers it."""
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
    """Of the same size and shapes, each whole."""
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


def root(model: Model, checkpoint: str = "a") -> str:
    return prefix_files.root_of(identity(model, checkpoint))


def test_a_segment_that_others_continue_is_lost(tmp_path: Path, model: Model) -> None:
    """What remains of the chain is of use again once the lost part is computed, wherever it ended."""
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
    """With a field that this one does not know: other bits, and a line that says so."""
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
    """What is there is used; of the rest one line says that it is not kept."""

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
    assert "\n" not in kept.lines[0] and "nothing is kept" in kept.lines[0]
    assert unfinished(place) == []
    assert {file.name: file.read_bytes() for file in files(place)} == before
    monkeypatch.undo()
    assert_healthy(place, model)


def test_damage_that_cannot_be_removed(
    place: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a read-only folder: what is whole before it is used, and let go of afterwards."""
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
    """Of one chain, even where its beginning was used the longest ago."""
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
from tests.qwen35.prefix.test_folder import opened, ran

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
    """At once, several times: both come to their ends, with the same bits, and the folder is whole."""
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
    """At any moment: its locks go with it, what it left half-written is never used and goes too."""
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
    assert len(answer["lines"]) == 1 and "nothing is kept" in answer["lines"][0]
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
    assert_same(ran(model, ids, kept), model)
    if again:
        assert kept.store.problems() == []
        assert_healthy(place, model, ids)
    else:
        assert kept.lines and all(str(place) in line for line in kept.lines)
        assert not place.exists()


def test_the_fingerprint_tells_checkpoints_apart(tmp_path: Path, checkpoint: Path) -> None:
    """By any weight near an end of a file, by the config, by when a file was changed."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)  # with their times
    mark = fingerprint(checkpoint)
    assert fingerprint(copy) == mark
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
