"""`tools.inspect --prefix-cache` of a folder, against the files themselves."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen35.cli import run
from qwen35.generation import Generation
from qwen35.prefix import folder as prefix_files
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import Folder
from qwen35.prefix.keys import chained, identity, root_of
from qwen35.sampling import Sampling
from reference.model import Model
from tests.support.family import small_model
from tools import inspect_prefix
from tools.inspect import build_parser, main

Cli = Callable[..., tuple[int, str, str]]
PROMPT = [i * 7 % 160 for i in range(300)]


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model("0.8B")


def fill(folder: Path, model: Model, ids: list[int], *, checkpoint: str, draft: int = 1) -> None:
    store = Folder(folder, identity(model, checkpoint))
    cache = PrefixCache(model, budget=1 << 30, interval=2, store=store, checkpoint=checkpoint)
    result = Generation(model, ids, 1, Sampling(), frozenset(), draft, prefix_cache=cache)
    for _ in result:
        pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """Segments 0..128, 128..256; after the first one also 128..192 and, on from there, 192..256; of
    another checkpoint, and without drafts, 0..64."""
    folder = tmp_path_factory.mktemp("prefixes")
    fill(folder, model, PROMPT[:256], checkpoint="a")
    fill(folder, model, PROMPT[:128] + PROMPT[:64], checkpoint="a")
    fill(folder, model, PROMPT[:128] + PROMPT[:128], checkpoint="a")
    fill(folder, model, PROMPT[:64], checkpoint="b", draft=0)
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(made, tmp_path / "prefixes"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process: exit status, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(build_parser(), main, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def document(cli: Cli, folder: Path, status: int = 0) -> dict[str, Any]:
    """The document of a run that is expected to exit so."""
    found, out, err = cli("--prefix-cache", folder, "--json")
    assert (found, err) == (status, "")
    assert out.count("\n") == 1
    return json.loads(out)


def row_of(found: dict[str, Any], ids: list[int], model: Model, checkpoint: str = "a") -> Any:
    """The row of the segment that ends where these ids end."""
    key = chained(root_of(identity(model, checkpoint)), ids)[-1]
    return next(row for row in found["segments"] if row["key"] == key)


def test_a_tree_of_segments(cli: Cli, folder: Path, model: Model) -> None:
    """Each after its parent, with positions, depth and size."""
    found = document(cli, folder)
    assert found.keys() == {"segments", "identities", "problems", "bytes"}
    assert found["problems"] == []
    rows = found["segments"]
    assert len(rows) == 5
    places = {row["key"]: i for i, row in enumerate(rows)}
    for i, row in enumerate(rows):
        parent = places[row["parent"]] if row["parent"] else None
        assert row["depth"] == (0 if parent is None else rows[parent]["depth"] + 1)
        assert parent is None or parent < i
        assert row["first"] == (0 if parent is None else rows[parent]["end"])
        assert row["bytes"] == (folder / f"{row['key']}.safetensors").stat().st_size
    branch = PROMPT[:128] + PROMPT[:128]
    start, one, two, three = (
        row_of(found, ids, model) for ids in (PROMPT[:128], PROMPT[:256], branch[:192], branch)
    )
    assert [row["depth"] for row in (start, one, two, three)] == [0, 1, 1, 2]
    assert places[three["key"]] == places[two["key"]] + 1  # what continues follows at once
    assert (two["first"], two["end"]) == (128, 192)
    assert all(row["drafts"] for row in (start, one, two, three))
    assert not row_of(found, PROMPT[:64], model, "b")["drafts"]


def test_identities_and_bytes(cli: Cli, folder: Path, model: Model) -> None:
    """Each with its fields; every byte of the files counted once."""
    found = document(cli, folder)
    fields = {row["fields"]["checkpoint"]: row["fields"] for row in found["identities"]}
    assert fields == {name: identity(model, name) for name in "ab"}
    assert {r["fields"]["checkpoint"]: r["segments"] for r in found["identities"]} == {
        "a": 4,
        "b": 1,
    }
    assert found["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert found["bytes"] == sum(row["bytes"] for row in found["identities"])
    for row in found["identities"]:
        own = [one["bytes"] for one in found["segments"] if one["root"] == row["root"]]
        assert sum(own) == row["bytes"]
        assert row["root"] == root_of(row["fields"])


def test_when_it_was_used(cli: Cli, folder: Path, model: Model) -> None:
    """The order of trees and of branches: the longest unused first."""
    found = document(cli, folder)
    keys = {
        name: row_of(found, PROMPT[:n], model, name)["key"] for name, n in (("a", 256), ("b", 64))
    }
    for name, used in (("a", 2_000_000_000), ("b", 1_000_000_000)):
        os.utime(folder / f"{keys[name]}.safetensors", (used, used))
    found = document(cli, folder)
    assert found["segments"][0]["key"] == keys["b"]
    assert found["segments"][-1]["key"] == keys["a"]
    assert found["segments"][0]["used"][:4] == "2001"
    assert found["segments"][-1]["used"][:4] == "2033"


def test_for_people(cli: Cli, folder: Path) -> None:
    """The same in lines: an identity's fields, then its segments, indented by depth."""
    found = document(cli, folder)
    status, out, err = cli("--prefix-cache", folder)
    assert (status, err) == (0, "")
    for row in found["segments"]:
        (line,) = [one for one in out.splitlines() if one.lstrip().startswith(row["key"][:12])]
        assert len(line) - len(line.lstrip()) == 2 * (row["depth"] + 1)
        after = row["parent"][:12] if row["parent"] else "start"
        words = [
            f"after {after}",
            f"{row['first']}..{row['end']}",
            f"{row['bytes']:,}",
            row["used"],
        ]
        assert not [word for word in words if word not in line], line
        assert ("drafts" in line) == row["drafts"]
    for identity_row in found["identities"]:
        for name, text in identity_row["fields"].items():
            assert f"{name} {text}" in out
    assert f"{found['bytes']:,} bytes in all" in out
    assert out.endswith("no problems\n")


def test_damage_makes_it_exit_1(cli: Cli, folder: Path, model: Model) -> None:
    """It is named; what continued it is named too, and still listed."""
    key = row_of(document(cli, folder), PROMPT[:128], model)["key"]
    (folder / f"{key}.safetensors").write_bytes(b"damage")
    found = document(cli, folder, status=1)
    damaged, *orphans = found["problems"]
    assert damaged["key"] == key and "damaged" in damaged["problem"]
    assert len(orphans) == 2
    assert all(key[:12] in row["problem"] for row in orphans)
    assert len(found["segments"]) == 4
    assert found["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    status, out, _ = cli("--prefix-cache", folder)
    assert status == 1
    assert out.count("problem: ") == 3
    assert f"problem: {key[:12]}: damaged" in out


def test_another_format_is_no_damage(cli: Cli, folder: Path, model: Model) -> None:
    """It is named, and the status is 0."""
    key = row_of(document(cli, folder), PROMPT[:64], model, "b")["key"]
    file = folder / f"{key}.safetensors"
    with safe_open(file, framework="pt") as handle:
        claimed = handle.metadata() | {"format": "qwen35-prefix-2"}
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, claimed)
    found = document(cli, folder)
    (problem,) = found["problems"]
    assert problem["key"] == key and "'qwen35-prefix-2'" in problem["problem"]
    assert len(found["identities"]) == 1


def test_nothing_is_changed(cli: Cli, folder: Path, model: Model) -> None:
    """The order of use stays, and so does what somebody else is writing. No lock is waited for."""
    (folder / ".half.unfinished").write_bytes(b"half")
    (folder / "notes.txt").write_text("notes")
    (folder / f"{'0' * 64}.safetensors").mkdir()
    before = {e.name: (e.stat().st_mtime_ns, e.stat().st_ino) for e in os.scandir(folder)}
    store = Folder(folder, identity(model, "a"))
    os.utime(folder, (5, 5))
    for key in store.segments():
        assert store.pin(key)
    times = {e.name: e.stat().st_mtime_ns for e in os.scandir(folder)}
    (folder / "lock").touch()
    os.utime(folder, (5, 5))
    locked = prefix_files.fcntl.flock
    locked(store.lock, prefix_files.fcntl.LOCK_EX)  # would be waited for without end
    assert len(document(cli, folder)["segments"]) == 5
    assert folder.stat().st_mtime == 5
    assert {e.name: e.stat().st_mtime_ns for e in os.scandir(folder) if e.name != "lock"} == times
    assert before.keys() == times.keys()


def test_no_tensor_is_read(cli: Cli, folder: Path) -> None:
    """Their bytes may all be wrong: that shows when they are used."""
    for file in folder.iterdir():
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:start] + bytes(len(content) - start))
    assert document(cli, folder)["problems"] == []


def test_evicted_meanwhile(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that goes between its listing and its opening, or while it is opened, is not there."""
    healthy, seen = inspect_prefix.examine, []

    def late(file: Path) -> prefix_files.Found:
        seen.append(file)
        if len(seen) == 1:
            file.unlink()
        if len(seen) == 2:
            file.unlink()
            return prefix_files.Found(1, None, {}, "damaged: no such file")
        return healthy(file)

    monkeypatch.setattr(inspect_prefix, "examine", late)
    found = document(cli, folder)
    assert len(seen) == 5 and len(found["segments"]) == 3
    assert not any("damaged" in row["problem"] for row in found["problems"])


def test_a_deep_chain(cli: Cli, tmp_path: Path, model: Model) -> None:
    """Two thousand segments, each on from the one before."""
    store = Folder(tmp_path, identity(model, "a"))
    ids = [i % 160 for i in range(64 * 2000)]
    hashes = chained(root_of(store.identity), ids)
    for i in range(2000):
        segment = prefix_files.Segment(hashes[i], 64 * i, 64 * i + 64, (hashes[i + 1],), False, 4)
        own = ids[64 * i : 64 * i + 64]
        metadata = {
            "format": prefix_files.FORMAT, "identity": json.dumps(store.identity),
            "parent": segment.parent, "first": str(segment.first), "ids": json.dumps(own),
        }  # fmt: skip
        save_file({"hidden": torch.zeros(1)}, tmp_path / f"{segment.key}.safetensors", metadata)
    found = document(cli, tmp_path)
    assert [row["depth"] for row in found["segments"]] == list(range(2000))


def test_an_empty_folder(cli: Cli, tmp_path: Path) -> None:
    found = document(cli, tmp_path)
    assert found == {"segments": [], "identities": [], "problems": [], "bytes": 0}
    assert cli("--prefix-cache", tmp_path)[1] == "0 bytes in all\nno problems\n"


def test_control_characters_are_not_printed(cli: Cli, tmp_path: Path, model: Model) -> None:
    """A file may say anything of itself."""
    store = Folder(tmp_path, identity(model, "a\x1b[2J\nb"))
    hashes = chained(root_of(store.identity), PROMPT[:64])
    segment = prefix_files.Segment(hashes[0], 0, 64, (hashes[1],), False, 4)
    assert store.write(segment, PROMPT[:64], {"hidden": torch.zeros(1)}) is None
    _, out, _ = cli("--prefix-cache", tmp_path)
    assert "\x1b" not in out
    assert repr("a\x1b[2J\nb") in out


def test_bad_input(cli: Cli, tmp_path: Path) -> None:
    """One line, exit 2, and no folder is made."""
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["--prefix-cache", tmp_path / "absent"], [str(tmp_path / "absent"), "no such folder"]),
        (
            ["--prefix-cache", tmp_path / "file"],
            [str(tmp_path / "file"), "is a file; expected the name of a folder"],
        ),
        (["tiny", "--prefix-cache", tmp_path], ["MODEL", "--prefix-cache", "both"]),
        (["--nodes", "--prefix-cache", tmp_path], ["--nodes", "--prefix-cache"]),
        ([], ["MODEL", "--prefix-cache", "neither"]),
        (["--json"], ["MODEL", "--prefix-cache", "neither"]),
    ):
        status, out, err = cli(*arguments)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1, err
        assert not [word for word in words if word not in err], err
    assert not (tmp_path / "absent").exists()
