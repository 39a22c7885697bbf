"""Sources of a conversion: what is opened, what has to stay as it is, how much room they need."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from qwen35.errors import InputError
from tests.support.checkpoints import write
from weights import source as sources
from weights.convert import convert
from weights.output import Options
from weights.source import Folder, Hub, Ranks, folder_source


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its identity is the size and the time of each file; it takes no room, and closing does nothing."""
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(3)}, file)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    source = folder_source(Path("."))
    assert type(source) is Folder and (source.name, source.is_hollow) == (str(tmp_path), False)
    assert source.folder == Path(".") and source.room() == 0
    stat = file.stat()
    assert source.identity == {"a.safetensors": [stat.st_size, stat.st_mtime_ns]}
    for _ in range(2):
        assert source.open("a.safetensors")["x"].read().tolist() == [1, 1, 1]
        source.close("a.safetensors")
    os.utime(file, ns=(0, 5))
    assert Folder(Path(".")).identity == {"a.safetensors": [stat.st_size, 5]}


def test_the_folders_of_ranks(tmp_path: Path) -> None:
    """They are opened as the checkpoint that they were cut from, file by file."""
    write(tmp_path / "in", "27B", num_hidden_layers=1, full_attention_interval=1)
    out = tmp_path / "out"
    convert(tmp_path / "in", out, Options("bf16", tp=2, shard_bytes=40_000))
    source = folder_source(out)
    assert isinstance(source, Ranks) and source.name == str(out)
    ranks = [out / f"rank-{rank}-of-2" for rank in range(2)]
    names = {str(file.relative_to(out)) for folder in ranks for file in folder.iterdir()}
    assert source.identity.keys() == names
    weights = sorted(file.name for file in ranks[0].glob("*.safetensors"))
    assert len(weights) > 1
    found = {file: source.open(file) for file in weights}
    whole = folder_source(tmp_path / "in").open("model.safetensors")
    assert sum(map(len, found.values())) == len(whole)
    for file, tensors in found.items():
        for name, stored in tensors.items():
            assert (stored.name, stored.file.name) == (name, file)
            assert torch.equal(stored.read(), whole[name].read())


class Repository:
    """In place of one on the hub, of one file; `fetched` is what was asked for."""

    def __init__(self, name: str, commit: str | None) -> None:
        self.name, self.commit = name, commit or "newest"
        self.headers: list[Path] = []
        self.sizes = {"a.safetensors": 7, "b.safetensors": 90, "c.safetensors": 30, "d.json": 1}

    def fetch(self, file: str, folder: Path | None) -> Path:
        path = (folder or Path("cache")) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.ones(3)}, path)
        return path

    def fetch_headers(self, folder: Path) -> None:
        self.headers.append(folder)


@pytest.mark.parametrize("keep", [False, True])
def test_a_repository(keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are removed after use, or stay in the cache. The record keeps the commit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "Repository", Repository)
    work = tmp_path / "target" / "work"
    half = work / "files" / "deep" / "x.incomplete"
    half.parent.mkdir(parents=True)
    half.touch()
    source = Hub("a/b", work, keep=keep)
    assert (source.name, source.folder, source.is_hollow) == ("a/b", work / "headers", True)
    assert source.repository.headers == [work / "headers"] and not half.exists()  # pyright: ignore
    assert source.identity == {"repository": "a/b", "commit": "newest"}
    assert json.loads((work / "source.json").read_text()) == source.identity
    file = (tmp_path / "cache" if keep else work / "files") / "a.safetensors"
    assert source.open("a.safetensors")["x"].read().tolist() == [1, 1, 1] and file.exists()
    for _ in range(2):
        source.close("a.safetensors")
        assert file.exists() is keep
    assert source.room() == (0 if keep else 30 + 90)
    (work / "source.json").write_text(json.dumps({"repository": "a/b", "commit": "older"}))
    assert Hub("a/b", work, keep=keep).identity["commit"] == "older"
    with pytest.raises(InputError) as raised:
        Hub("a/c", work, keep=keep)
    assert str(raised.value) == (
        f"{tmp_path / 'target'}: holds an unfinished conversion of a/b; asked for is a/c"
    )
    (work / "source.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"source\.json: not what a conversion writes"):
        Hub("a/b", work, keep=keep)


def test_the_room_is_that_of_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = object.__new__(Hub)
    hub.files = tmp_path
    for sizes, room in (({}, 0), ({"a": 5}, 5), ({"a": 9, "b": 1, "c": 7}, 16)):
        hub.repository = SimpleNamespace(sizes=sizes)  # pyright: ignore
        assert hub.room() == room
