"""Conversions of hub repositories, over the real client and a server on the loopback interface."""

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen35.errors import InputError
from tests.support.checkpoints import (
    INDEX,
    QUANTIZED_SIZES,
    QWEN3_5,
    QWEN3_5_FP8,
    edit_json,
    write,
    write_index,
)
from tests.support.conversions import contents
from tests.support.dialects import quiet_load
from tests.support.hub_server import HubServer
from tests.weights.test_convert_killed import Children, is_complete
from tools.inspect import describe, open_model
from weights.checkpoint import UNFINISHED, Checkpoint
from weights.convert import convert
from weights.hub import PROBABLY, Repository, one_line
from weights.output import Options
from weights.source import Hub

ROOT = Path(__file__).parents[2]
MEMBER = "397B-A17B"
DIALECT = replace(QWEN3_5, fused_trunk=False, shards=4)
NAME = "someone/model"
SHARDS = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
TO_MXFP4 = ("--to", "mxfp4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in`: a repository of four shards. `wanted`: its conversion from the folder. `hf`: the cache."""
    place = tmp_path_factory.mktemp("hub")
    write(place / "in", MEMBER, DIALECT, tokenizer=True, **QUANTIZED_SIZES)
    (place / "in" / "README.md").write_text("not needed")
    convert(place / "in", place / "wanted", Options("mxfp4"))
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[HubServer]:
    started = HubServer()
    yield started
    started.close()


def environment(server: HubServer, place: Path) -> dict[str, str]:
    """The only hub there is, for the real client."""
    return {
        "HF_ENDPOINT": server.address, "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def children(place: Path, server: HubServer) -> Iterator[Children]:
    """Command lines that know no other hub than the server."""
    started = Children(place, **environment(server, place))
    yield started
    started.close()


@pytest.fixture
def hub(server: HubServer, place: Path) -> Iterator[HubServer]:
    """The server without faults, with one repository, and no cache from the tests before."""
    server.calm()
    server.commits.clear()
    server.push(NAME, place / "in")
    shutil.rmtree(place / "hf", ignore_errors=True)
    yield server
    server.calm()


def check_one_line(ended: tuple[int, str, str], *words: str) -> None:
    """Exit status 2, and one line of the program with these words (the client may warn before it)."""
    status, out, err = ended
    lines = [line for line in err.splitlines() if line.startswith("python -m tools.convert:")]
    assert (status, out, len(lines)) == (2, "", 1), err
    assert "Traceback" not in err
    assert not [word for word in words if word not in lines[0]], lines[0]


def header_length(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


def test_the_same_as_from_a_folder(
    hub: HubServer, children: Children, place: Path, tmp_path: Path
) -> None:
    """Every file, byte for byte; each shard is fetched once, in order, and dropped before the next."""
    target = tmp_path / "out"
    pid = children.start(NAME, target, *TO_MXFP4)
    most = 0
    while Path(f"/proc/{pid}/stat").exists() and not (target / "config.json").exists():
        found = list((target / UNFINISHED / "files").glob("*.safetensors"))
        most = max(most, len(found))
        time.sleep(0.002)
    status, _, err = children.wait()
    assert status == 0, err
    assert contents(target) == contents(place / "wanted")
    assert most <= 2
    whole = [r.file for r in hub.log if r.file in SHARDS and r.method == "GET"][len(SHARDS) :]
    assert whole == SHARDS
    for shard in SHARDS:
        file = place / "in" / shard
        size = file.stat().st_size
        assert hub.sent(shard) <= size + max(PROBABLY, header_length(file) + 8)
        assert len(hub.fetched(shard)) == 2
    for small in ("config.json", "tokenizer.json", INDEX):
        assert hub.sent(small) == (place / "in" / small).stat().st_size
    assert hub.sent("README.md") == 0
    assert not list((place / "hf").rglob("*.safetensors"))


def test_inspect_downloads_no_weights(hub: HubServer, place: Path) -> None:
    """The document is that of the folder; of each shard no more is sent than its header may need."""
    command = [sys.executable, "-m", "tools.inspect", NAME, "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment(hub, place), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == describe(open_model(str(place / "in")))
    for shard in SHARDS:
        limit = max(PROBABLY, header_length(place / "in" / shard))
        assert len(hub.fetched(shard)) == 1
        assert hub.sent(shard) <= limit + 2**16  # what a socket holds beyond what is read
    assert hub.sent("tokenizer.json") == 0


@pytest.mark.parametrize("has_id", [True, False])
def test_inspect_finds_every_end(hub: HubServer, place: Path, tmp_path: Path, has_id: bool) -> None:
    """tokenizer_config.json names one; only where it has no id for it is tokenizer.json fetched."""
    folder = tmp_path / "in"
    shutil.copytree(place / "in", folder)
    edit_json(folder / "tokenizer_config.json", eos_token="<think>")
    if has_id:
        added = {"259": {"content": "<think>", "special": False, "normalized": False}}
        edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    hub.push("someone/ends", folder)
    command = [sys.executable, "-m", "tools.inspect", "someone/ends", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment(hub, place), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["stop_ids"]["259"] == ["tokenizer_config.json"]
    assert document == describe(open_model(str(folder)))
    assert bool(hub.sent("tokenizer.json")) is not has_id


def test_room_for_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files at a time, since a scale may lie in the next one; none where they go to the cache. The
    check of the disk counts it beside the output."""
    source = object.__new__(Hub)
    source.repository = object.__new__(Repository)
    source.repository.sizes = {"a": 5, "b": 70, "c": 600}
    source.files = tmp_path
    assert source.room() == 670
    source.files = None
    assert source.room() == 0
    write(tmp_path / "in", MEMBER, DIALECT, **QUANTIZED_SIZES)
    monkeypatch.setattr("weights.source.Folder.room", lambda self: 10**18)
    with pytest.raises(InputError, match=r"10\d{17} bytes are needed"):
        convert(tmp_path / "in", tmp_path / "out", Options("mxfp4"))
    assert not (tmp_path / "out").exists()


def test_the_source_can_be_kept(
    hub: HubServer, children: Children, place: Path, tmp_path: Path
) -> None:
    """It is kept in the hub's own cache, where the next run finds it. The target holds no copy."""
    for target in (tmp_path / "a", tmp_path / "b"):
        status, _, err = children.run(NAME, target, *TO_MXFP4, "--keep-source")
        assert status == 0, err
        assert contents(target) == contents(place / "wanted")
    cached = {file.name: file for file in (place / "hf").rglob("*.safetensors")}
    assert sorted(cached) == SHARDS
    for shard, file in cached.items():
        assert file.read_bytes() == (place / "in" / shard).read_bytes()
        assert sum(r.sent == file.stat().st_size for r in hub.fetched(shard)) == 1


def test_a_connection_that_breaks_once(
    hub: HubServer, children: Children, place: Path, tmp_path: Path
) -> None:
    """It breaks in the middle of a shard's tensors, and the client takes it up again."""
    assert sum(r.method == "GET" for r in hub.log) == 0
    hub.faults.after = PROBABLY + 50_000  # beyond what is asked for as a header
    hub.faults.breaks = {}
    hub.faults.hold = ""
    hub.faults.breaks[SHARDS[1]] = 2  # the header's request counts, and is over before
    status, _, err = children.run(NAME, tmp_path / "out", *TO_MXFP4)
    assert status == 0, err
    assert contents(tmp_path / "out") == contents(place / "wanted")
    assert len(hub.fetched(SHARDS[1])) == 3


@pytest.mark.parametrize("part", ["header", "shard"])
def test_a_connection_that_keeps_breaking(
    hub: HubServer, children: Children, place: Path, tmp_path: Path, part: str
) -> None:
    """One line that names the file; when the hub is well again, the same command goes on."""
    hub.faults.after = 100 if part == "header" else PROBABLY + 1000
    hub.faults.breaks = {SHARDS[2]: 1000}
    target = tmp_path / "out"
    check_one_line(children.run(NAME, target, *TO_MXFP4), NAME, SHARDS[2])
    assert not is_complete(target)
    finished = {f: f.stat().st_ino for f in target.glob("*.safetensors")}
    assert len(finished) == (0 if part == "header" else 2)
    assert target.exists() == (part == "shard")
    hub.calm()
    status, _, err = children.run(NAME, target, *TO_MXFP4)
    assert status == 0, err
    assert contents(target) == contents(place / "wanted")
    assert all(file.stat().st_ino == inode for file, inode in finished.items())
    if part == "shard":
        assert max(r.sent for r in hub.fetched(SHARDS[0])) <= PROBABLY


def kill_in_shard(hub: HubServer, children: Children, target: Path, shard: str, name: str) -> None:
    """Kill a conversion while it fetches this shard."""
    hub.faults.hold, hub.faults.after = shard, PROBABLY + 10_000
    pid = children.start(name, target, *TO_MXFP4)
    assert hub.faults.held.wait(30)
    os.kill(pid, signal.SIGKILL)
    assert children.wait()[0] == -signal.SIGKILL
    assert not is_complete(target)
    hub.calm()


def test_killed_in_a_shard(hub: HubServer, children: Children, place: Path, tmp_path: Path) -> None:
    """Killed, and main has moved on: the rest is taken from the commit that was begun with, and what is
    done is not fetched again."""
    target = tmp_path / "out"
    kill_in_shard(hub, children, target, SHARDS[2], NAME)
    done = {file: file.stat().st_ino for file in target.glob("*.safetensors")}
    assert len(done) == 2
    write(tmp_path / "later", MEMBER, DIALECT, tokenizer=True, seed=7, **QUANTIZED_SIZES)
    hub.push(NAME, tmp_path / "later")
    status, _, err = children.run(NAME, target, *TO_MXFP4)
    assert status == 0, err
    assert contents(target) == contents(place / "wanted")
    assert all(file.stat().st_ino == inode for file, inode in done.items())
    for shard in SHARDS[:2]:
        assert hub.sent(shard) <= PROBABLY
    status, _, _ = children.run(NAME, tmp_path / "new", *TO_MXFP4)
    assert status == 0
    convert(tmp_path / "later", tmp_path / "later-wanted", Options("mxfp4"))
    assert contents(tmp_path / "new") == contents(tmp_path / "later-wanted")


def test_killed_among_the_headers(
    hub: HubServer, children: Children, place: Path, tmp_path: Path
) -> None:
    """The process is killed before anything is converted. The commit is settled already."""
    target = tmp_path / "out"
    hub.faults.hold, hub.faults.after = SHARDS[3], 10
    pid = children.start(NAME, target, *TO_MXFP4)
    assert hub.faults.held.wait(30)
    os.kill(pid, signal.SIGKILL)
    children.wait()
    hub.calm()
    write(tmp_path / "later", MEMBER, DIALECT, seed=7, **QUANTIZED_SIZES)
    hub.push(NAME, tmp_path / "later")
    assert children.run(NAME, target, *TO_MXFP4)[0] == 0
    assert contents(target) == contents(place / "wanted")


def test_another_repository_into_an_unfinished_target(
    hub: HubServer, children: Children, place: Path, tmp_path: Path
) -> None:
    """Both names are said, and the first conversion goes on unharmed, at its commit."""
    write(tmp_path / "other", MEMBER, DIALECT, seed=3, **QUANTIZED_SIZES)
    (tmp_path / "other" / "added_tokens.json").write_text("{}")
    hub.push("someone/other", tmp_path / "other")
    target = tmp_path / "out"
    kill_in_shard(hub, children, target, SHARDS[1], NAME)
    check_one_line(children.run("someone/other", target, *TO_MXFP4), NAME, "someone/other")
    check_one_line(children.run(place / "in", target, *TO_MXFP4), "unfinished", NAME)
    hub.push(NAME, tmp_path / "other")
    assert children.run(NAME, target, *TO_MXFP4)[0] == 0
    assert contents(target) == contents(place / "wanted")


def test_what_is_not_there(hub: HubServer, children: Children, tmp_path: Path) -> None:
    """An unknown repository, no name at all, and a repository without weights."""
    target = tmp_path / "out"
    check_one_line(children.run("someone/nothing", target, *TO_MXFP4), "someone/nothing", "404")
    assert not target.exists()
    check_one_line(children.run("no!/name?", target, *TO_MXFP4), "no!/name?")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("soon")
    hub.push("someone/empty", tmp_path / "empty")
    check_one_line(children.run("someone/empty", target, *TO_MXFP4), "config.json")
    assert not target.exists()


def test_a_server_without_ranges(
    hub: HubServer, children: Children, place: Path, tmp_path: Path
) -> None:
    """It sends whole files; the client hangs up when it has the header."""
    big = tmp_path / "big"
    shutil.copytree(place / "in", big)
    for shard in SHARDS:  # so large that a socket's buffers do not take it
        file = big / shard
        size = header_length(file)
        header = json.loads(file.read_bytes()[8:size])
        end = max(d["data_offsets"][1] for n, d in header.items() if n != "__metadata__")
        name = f"model.visual.{shard[6:11]}.weight"
        header[name] = {"dtype": "BF16", "shape": [1 << 24], "data_offsets": [end, end + (1 << 25)]}
        text = json.dumps(header).encode()
        body = file.read_bytes()[size:] + bytes(1 << 25)
        file.write_bytes(struct.pack("<Q", len(text)) + text + body)
        index = json.loads((big / INDEX).read_text())
        index["weight_map"][name] = shard
        (big / INDEX).write_text(json.dumps(index))
    hub.push("someone/big", big)
    hub.faults.ranges = False
    hub.faults.hold = SHARDS[3]  # the conversion waits for its last shard, headers being complete
    hub.faults.after = 1 << 25
    children.start("someone/big", tmp_path / "out", *TO_MXFP4)
    assert hub.faults.held.wait(30)
    for shard in SHARDS:
        assert hub.fetched(shard)[0].sent < 20e6
    hub.faults.released.set()
    status, _, err = children.wait()
    assert status == 0, err
    convert(big, tmp_path / "wanted", Options("mxfp4"))
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_scales_in_the_next_shard(hub: HubServer, children: Children, tmp_path: Path) -> None:
    """Weight and scales lie in turn in two shards; both are there when they are needed."""
    write(tmp_path / "in", MEMBER, QWEN3_5_FP8, **QUANTIZED_SIZES)
    hub.push("someone/fp8", tmp_path / "in")
    places = json.loads((tmp_path / "in" / INDEX).read_text())["weight_map"]
    pairs = [(n, n.removesuffix("_scale_inv")) for n in places if n.endswith("_scale_inv")]
    assert any(places[scale] > places[weight] for scale, weight in pairs)
    for to in ("mxfp4", "bf16"):
        assert children.run("someone/fp8", tmp_path / to, "--to", to)[0] == 0
        convert(tmp_path / "in", tmp_path / f"{to}-wanted", Options(to))  # pyright: ignore
        assert contents(tmp_path / to) == contents(tmp_path / f"{to}-wanted")
    for shard in set(places.values()):
        assert sum(r.sent > PROBABLY for r in hub.fetched(shard)) == 2  # once a conversion


@pytest.mark.parametrize("equal", [True, False])
def test_what_headers_do_not_tell(
    hub: HubServer, children: Children, tmp_path: Path, equal: bool
) -> None:
    """A head beside the embedding that the config ties it to, and a copy in a file that no index lists:
    their numbers are compared in the output. Of two such files with one name the choice is said."""
    write(tmp_path / "in", "0.8B", replace(QWEN3_5, shards=4))
    places = json.loads((tmp_path / "in" / INDEX).read_text())["weight_map"]
    name = "model.language_model.embed_tokens.weight"
    embedding = load_file(tmp_path / "in" / places[name])[name]
    head = {"lm_head.weight": embedding if equal else embedding.flip(0)}
    save_file(head, tmp_path / "in" / "model-00005-of-00005.safetensors")
    write_index(tmp_path / "in", places | {"lm_head.weight": "model-00005-of-00005.safetensors"})
    copied = {"mtp.embed_tokens.weight": embedding, "mtp.norm.weight": torch.ones(64)}
    save_file(copied, tmp_path / "in" / "mtp.safetensors")
    hub.push("someone/tied", tmp_path / "in")
    status, _, err = children.run("someone/tied", tmp_path / "out", "--to", "fp8")
    assert status == 0, err
    assert "mtp.safetensors: in no index; not read from it, since model-0" in err
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["tie_word_embeddings"] is equal
    assert "mtp.embed_tokens.weight" in Checkpoint(tmp_path / "out").stored
    assert quiet_load(tmp_path / "out").config.tie_word_embeddings is equal


@pytest.mark.parametrize("damage", ["2^60 bytes", "seven bytes", "no JSON"])
def test_a_hostile_header(
    hub: HubServer, children: Children, place: Path, tmp_path: Path, damage: str
) -> None:
    """One line that names the file, before anything is made of it."""
    bad = tmp_path / "bad"
    shutil.copytree(place / "in", bad)
    raw: Any = (bad / SHARDS[1]).read_bytes()
    content = {
        "2^60 bytes": struct.pack("<Q", 1 << 60) + raw[8:],
        "seven bytes": raw[:7],
        "no JSON": raw[:8] + b"[" * 1000 + raw[1008:],
    }
    (bad / SHARDS[1]).write_bytes(content[damage])
    hub.push("someone/bad", bad)
    check_one_line(children.run("someone/bad", tmp_path / "out", *TO_MXFP4), SHARDS[1])
    assert not (tmp_path / "out").exists()


def test_files_that_would_leave_the_folder(
    hub: HubServer, children: Children, place: Path, tmp_path: Path
) -> None:
    """An index is content of a stranger: it names files of its own folder or is refused."""
    bad = tmp_path / "bad"
    shutil.copytree(place / "in", bad)
    index = re.sub(r'"model-00004-of-00004', '"../model-00004-of-00004', (bad / INDEX).read_text())
    (bad / INDEX).write_text(index)
    hub.push("someone/bad", bad)
    check_one_line(children.run("someone/bad", tmp_path / "out", *TO_MXFP4), INDEX, "../model")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_a_header_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names its file. An error without a name would be taken for one of standard output."""
    repository = object.__new__(Repository)
    repository.name, repository.sizes = "a/b", {"x.safetensors": 1 << 62}
    monkeypatch.setattr(repository, "_first_bytes", lambda *_: (2).to_bytes(8, "little") + b"{}")
    with pytest.raises(OSError) as caught:
        repository._fetch_header("x.safetensors", tmp_path / "x.safetensors")
    assert caught.value.filename == str(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_a_download_fills_is_named() -> None:
    """The hub's client writes without names."""
    for name in (None, "cache/x"):
        full = OSError(errno.ENOSPC, "No space left on device", name)
        with pytest.raises(OSError) as caught, one_line("a/b (no such folder here)"):
            raise full
        assert caught.value.filename == (name or "a/b")
