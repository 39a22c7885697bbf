"""A model hub on the loopback interface, with faults, for the real client of `huggingface_hub`.

It serves folders as repositories. It answers the client's requests: the list of a repository's
files at a commit, and a file, whole or in ranges. Each request is logged with the bytes that were
sent.
"""

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PIECE = 1 << 14


@dataclass
class Request:
    """One request for a file. file "" is the list of the repository's files. sent: bytes of the
    body."""

    method: str
    file: str
    first: int = 0
    sent: int = 0


@dataclass
class Faults:
    """The faults of the server.

    ranges: whether range requests are served. breaks: by file, how often its connection breaks
    after `after` bytes of a body. hold: a file whose body stops after as many bytes, sets `held`,
    and waits for `released`.
    """

    ranges: bool = True
    breaks: dict[str, int] = field(default_factory=dict)
    after: int = 1000
    hold: str = ""
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class HubServer:
    """A hub with repositories by name. A commit is the hash of the contents of a folder."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}  # by repository; the last is main
        self.faults = Faults()
        self.log: list[Request] = []
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def push(self, name: str, folder: Path) -> str:
        """Make a folder the main branch of a repository. Earlier commits stay. Returns the
        commit."""
        content = hashlib.sha1()
        for file in sorted(file for file in folder.iterdir() if file.is_file()):
            content.update(f"{file.name} {_sha256(file)}\n".encode())
        commit = content.hexdigest()
        commits = self.commits.setdefault(name, {})
        commits.pop(commit, None)
        commits[commit] = folder
        return commit

    def calm(self) -> None:
        """Remove all faults, and empty the log."""
        self.faults.released.set()
        self.faults = Faults()
        self.log = []

    def sent(self, file: str) -> int:
        """The bytes that were sent of a file."""
        return sum(request.sent for request in self.log if request.file == file)

    def fetched(self, file: str) -> list[Request]:
        """The GET requests for a file."""
        return [r for r in self.log if r.file == file and r.method == "GET"]

    def close(self) -> None:
        self.faults.released.set()
        self._server.shutdown()
        self._server.server_close()

    def note(self, request: Request) -> Request:
        with self._lock:
            self.log.append(request)
        return request

    def breaks(self, file: str) -> bool:
        """Return whether this body is to break. Decreases the count of breaks."""
        with self._lock:
            left = self.faults.breaks.get(file, 0)
            self.faults.breaks[file] = max(left - 1, 0)
        return left > 0


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionResetError):  # a client that was killed
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        try:
            if parts[:2] == ["api", "models"]:
                self._listing("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            elif len(parts) == 5 and parts[2] == "resolve":
                self._file("/".join(parts[:2]), parts[3], parts[4])
            else:
                self._fail("EntryNotFound")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client went away

    def _commit(self, name: str, revision: str) -> tuple[str, Path] | None:
        commits = self.server_of.commits.get(name)
        if not commits:
            return self._fail("RepoNotFound")
        commit = list(commits)[-1] if revision == "main" else revision
        return (commit, commits[commit]) if commit in commits else self._fail("RevisionNotFound")

    def _listing(self, name: str, revision: str) -> None:
        request = self.server_of.note(Request(self.command, ""))
        if (found := self._commit(name, revision)) is None:
            return
        commit, folder = found
        siblings = [
            {"rfilename": file.name, "size": file.stat().st_size, "blobId": "0" * 40}
            for file in sorted(folder.iterdir())
        ]
        listing = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": []}
        body = json.dumps(listing | {"siblings": siblings}).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        request.sent = len(body)
        self.wfile.write(body)

    def _file(self, name: str, revision: str, file: str) -> None:
        hub = self.server_of
        request = hub.note(Request(self.command, file))
        if (found := self._commit(name, revision)) is None:
            return
        commit, folder = found
        path = folder / file
        if not path.is_file():
            self._fail("EntryNotFound")
            return
        size = path.stat().st_size
        headers = {"ETag": f'"{_sha256(path)}"', "X-Repo-Commit": commit}
        asked = self.headers.get("Range") if hub.faults.ranges else None
        if hub.faults.ranges:
            headers["Accept-Ranges"] = "bytes"
        first, end = 0, size
        if asked:
            left, _, right = asked.removeprefix("bytes=").partition("-")
            first, end = int(left or 0), min(int(right) + 1 if right else size, size)
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        request.first = first
        self._head(206 if asked else 200, headers | {"Content-Length": str(end - first)})
        if self.command == "GET":
            self._body(path, first, end, request)

    def _body(self, path: Path, first: int, end: int, request: Request) -> None:
        hub, faults = self.server_of, self.server_of.faults
        holds = faults.hold == path.name
        stop = first + faults.after if holds or hub.breaks(path.name) else end
        with path.open("rb") as handle:
            handle.seek(first)
            for goal in (min(stop, end), end):
                while piece := handle.read(min(PIECE, goal - handle.tell())):
                    self.wfile.write(piece)
                    request.sent += len(piece)
                if handle.tell() < end:
                    self.wfile.flush()
                    if not holds:
                        self.close_connection = True
                        return
                    faults.held.set()
                    faults.released.wait(60)

    def _fail(self, reason: str) -> None:
        self._head(404, {"X-Error-Code": reason, "X-Error-Message": reason, "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


def _sha256(file: Path) -> str:
    stat = file.stat()
    key = str(file), stat.st_size, stat.st_mtime_ns
    if key not in _KNOWN:
        _KNOWN[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return _KNOWN[key]


_KNOWN: dict[tuple[str, int, int], str] = {}
