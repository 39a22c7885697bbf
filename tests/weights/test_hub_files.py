"""The files of a hub repository, with the real client in this process and a server on the loopback
interface (tests/weights/test_hub.py has whole commands)."""

import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import httpx
from safetensors.torch import save_file

from qwen35.errors import InputError
from tests.support.hub_server import HubServer
from weights import hub as client
from weights.hub import Repository, is_hub_id, one_line

NAME, A, B = "someone/model", "a.safetensors", "b.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of weights, one with a long header, and small files of which one is not needed."""
    made = tmp_path / "in"
    made.mkdir()
    save_file({"x": torch.randn(1000)}, made / A)
    save_file({f"a tensor {i}": torch.zeros(1) for i in range(20)}, made / B)
    for name in ("config.json", "chat_template.jinja", "README.md"):
        (made / name).write_text(f"this is {name}")
    (made / "empty.json").touch()
    return made


@pytest.fixture(scope="module")
def started() -> Iterator[HubServer]:
    hub = HubServer()
    yield hub
    hub.close()


@pytest.fixture
def server(
    started: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> HubServer:
    """The only hub that there is, with one repository and no faults."""
    started.calm()
    started.commits.clear()
    started.push(NAME, folder)
    template = f"{started.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", started.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return started


def line(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as raised:
        call(*arguments)
    return str(raised.value)


def header_of(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + struct.unpack("<Q", content[:8])[0]]


def sent(server: HubServer, file: str, expected: list[int]) -> bool:
    """Whether the server sends so many bytes of a file in its answers. It counts them when they are on
    their way."""
    for _ in range(500):
        if [request.sent for request in server.fetched(file)] == expected:
            return True
        time.sleep(0.01)
    return False


def test_a_repository_is_read_at_one_commit(
    server: HubServer, folder: Path, tmp_path: Path
) -> None:
    """By default the newest one, which stays when another one comes."""
    repository = Repository(NAME)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert (repository.name, repository.sizes) == (NAME, sizes)
    other = tmp_path / "newer"
    shutil.copytree(folder, other)
    (other / "config.json").write_text("a newer one")
    save_file({"y": torch.zeros(7)}, other / A)
    newer = server.push(NAME, other)
    assert Repository(NAME).commit == newer != repository.commit
    assert Repository(NAME, repository.commit).commit == repository.commit
    for target in (tmp_path / "out", None):
        path = repository.fetch("config.json", target)
        assert path.read_text() == "this is config.json"
    repository.fetch_headers(tmp_path / "headers")
    assert (tmp_path / "headers" / A).read_bytes().startswith(header_of(folder / A))


@pytest.mark.parametrize(
    ("sha", "asked", "commit"), [("1", "2", "1"), (None, "2", "2"), (None, None, "main")]
)
def test_a_hub_that_does_not_say_the_commit(
    sha: str | None, asked: str | None, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in (("a", 5), ("b", None))]
    files.append(SimpleNamespace(rfilename="deep/c", size=7))
    info = SimpleNamespace(sha=sha, siblings=files)
    monkeypatch.setattr(client.HfApi, "model_info", lambda *_, **__: info)
    repository = Repository(NAME, asked)
    assert (repository.commit, repository.sizes) == (commit, {"a": 5, "b": 0})


def test_a_repository_that_is_not_there(server: HubServer) -> None:
    said = line(Repository, "someone/else")
    assert said.startswith(
        "someone/else (no such folder here): cannot be fetched from the hub: 404"
    )
    assert "\n" not in said


def test_a_file_goes_into_a_folder_or_into_the_cache(
    server: HubServer, folder: Path, tmp_path: Path
) -> None:
    repository = Repository(NAME)
    for target, below in ((tmp_path / "out", "out"), (None, "cache")):
        path = repository.fetch(A, target)
        assert path.read_bytes() == (folder / A).read_bytes()
        assert path.is_relative_to(tmp_path / below)
    said = line(repository.fetch, "c.json", tmp_path)
    assert said.startswith(f"{NAME}/c.json: cannot be fetched from the hub: ")


@pytest.mark.parametrize("probably", [8, 64, 1 << 17])
def test_headers_are_followed_by_holes(
    probably: int, server: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the tensors. What is longer than the first request is asked for once more, and no
    byte of a tensor that the first request did not bring."""
    monkeypatch.setattr(client, "PROBABLY", probably)
    out = tmp_path / "out" / "deep"
    Repository(NAME).fetch_headers(out)
    files = {"config.json", "chat_template.jinja", "empty.json", A, B}
    assert {file.name for file in out.iterdir() if file.is_file()} == files
    for small in files - {A, B}:
        assert (out / small).read_bytes() == (folder / small).read_bytes()
    for file in (A, B):
        whole, header = (folder / file).read_bytes(), header_of(folder / file)
        found = (out / file).read_bytes()
        assert len(found) == len(whole) and found == header + bytes(len(whole) - len(header))
        longer = [len(header)] if probably < len(header) else []
        assert sent(server, file, [min(probably, len(whole)), *longer])
    Repository(NAME).fetch_headers(out)  # what is there is no obstacle
    only = tmp_path / "only"
    Repository(NAME).fetch_headers(only, beside=(".md",))
    assert {file.name for file in only.iterdir() if file.is_file()} == {"README.md", A, B}


def test_a_server_that_sends_more_than_was_asked_for(
    server: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PROBABLY", 64)
    server.faults.ranges = False
    Repository(NAME).fetch_headers(tmp_path / "out")
    for file in (A, B):
        header = header_of(folder / file)
        assert (tmp_path / "out" / file).read_bytes().startswith(header)
        assert not any((tmp_path / "out" / file).read_bytes()[len(header) :])


@pytest.mark.parametrize(
    ("content", "held", "claimed"),
    [(b"short", 5, int.from_bytes(b"short", "little")), (struct.pack("<Q", 1 << 60), 8, 1 << 60)],
)
def test_a_header_that_is_none(
    content: bytes, held: int, claimed: int, server: HubServer, folder: Path, tmp_path: Path
) -> None:
    (folder / A).write_bytes(content)
    server.push(NAME, folder)
    assert line(Repository(NAME).fetch_headers, tmp_path / "out") == (
        f"{NAME}/{A}: {held} bytes are there and a header of {claimed} bytes is claimed; "
        "at most 100000000 are expected"
    )
    assert not (tmp_path / "out" / A).exists()


@pytest.mark.parametrize(("breaks", "comes"), [(1, True), (2, True), (3, False)])
def test_a_connection_that_breaks(
    breaks: int, comes: bool, server: HubServer, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Twice it is tried again, the first time at once."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(client, "BESIDE", ())
    server.faults.breaks, server.faults.after = {A: breaks}, 20
    repository = Repository(NAME)
    if comes:
        repository.fetch_headers(tmp_path / "out", beside=())
        assert (tmp_path / "out" / A).read_bytes().startswith(header_of(folder / A))
    else:
        said = line(repository.fetch_headers, tmp_path / "out", ())
        assert said.startswith(f"{NAME}/{A}: cannot be fetched from the hub: ")
    assert waited[:2] == [0, 1][: min(breaks, 2)]
    assert len(server.fetched(A)) == min(breaks, 2) + 1


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("owner/name", True), ("name", False), ("a/b/c", False), ("/owner/name", False),
        ("./name", False), ("../name", False), ("/name", False),
    ],
)  # fmt: skip
def test_what_looks_like_a_repository(name: str, is_id: bool) -> None:
    assert is_hub_id(name) is is_id


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx.ConnectError("refused\nby somebody"), "refused"),
        (httpx.ConnectError(""), "ConnectError"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    ],
)
def test_an_error_of_the_client_is_one_line(error: Exception, said: str) -> None:
    with pytest.raises(InputError) as raised, one_line("a/b"):
        raise error
    assert str(raised.value) == f"a/b: cannot be fetched from the hub: {said}"
