"""A model repository on the Hugging Face hub, at one commit: headers first, then file by file."""

import errno
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, httpx

from qwen35.errors import InputError
from weights.storage import whole

WEIGHTS = ".safetensors"
# Endings of the small files that belong to a model.
BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken")
PROBABLY = 1 << 17  # bytes of the first request; most headers are shorter
ATTEMPTS = 3  # per request for a header
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones


class Repository:
    """A repository at one commit, by default that of `main`. InputError if the hub has no such
    repository.

    sizes: bytes of each file in the repository's top folder.
    """

    def __init__(self, name: str, commit: str | None = None) -> None:
        self.name = name
        with one_line(f"{name} (no such folder here)"):
            info = HfApi().model_info(name, revision=commit, files_metadata=True)
        self.commit = info.sha or commit or "main"
        self.sizes = {
            file.rfilename: file.size or 0
            for file in info.siblings or []
            if Path(file.rfilename).name == file.rfilename
        }

    def fetch(self, file: str, folder: Path | None) -> Path:
        """Download one file into `folder`, or into the hub's own cache (None), and return its path.

        If the connection breaks, the download is resumed, a few times at most.
        """
        with one_line(f"{self.name}/{file}"):
            return Path(hf_hub_download(self.name, file, revision=self.commit, local_dir=folder))

    def fetch_headers(self, folder: Path, beside: tuple[str, ...] = BESIDE) -> None:
        """Make a checkpoint folder without weights.

        It has the small files whose names end as in `beside`, and the header of each safetensors file,
        followed by a hole as long as the tensors.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.sizes:
            if file.endswith(beside):
                self.fetch(file, folder)
        files = [file for file in self.sizes if file.endswith(WEIGHTS)]
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda file: self._fetch_header(file, folder / file), files):
                pass

    def _fetch_header(self, file: str, hollow: Path) -> None:
        content = self._first_bytes(file, PROBABLY)
        end = 8 + int.from_bytes(content[:8], "little")
        if len(content) < 8 or end > LONGEST_HEADER:
            raise InputError(
                f"{self.name}/{file}: {len(content)} bytes are there and a header of {end - 8} bytes is "
                f"claimed; at most {LONGEST_HEADER} are expected"
            )
        if end > len(content):
            content = self._first_bytes(file, end)
        with whole(hollow) as unfinished, unfinished.open("wb") as handle:
            handle.write(content[:end])
            handle.truncate(max(self.sizes[file], handle.tell()))

    def _first_bytes(self, file: str, count: int) -> bytes:
        """The first `count` bytes of a file, or all of a shorter one."""
        url = hf_hub_url(self.name, file, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes=0-{count - 1}"}
        with one_line(f"{self.name}/{file}"):
            for attempt in range(ATTEMPTS):
                try:
                    return _read_stream(url, headers, count)
                except httpx.TransportError:
                    if attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(attempt)
        raise AssertionError("unreachable")


def _read_stream(url: str, headers: dict[str, str], count: int) -> bytes:
    content = bytearray()
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        response.raise_for_status()
        for piece in response.iter_bytes():
            content += piece
            if len(content) >= count:  # a server may send more than the range
                break
    return bytes(content[:count])


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder here has the form owner/name."""
    path = Path(name)
    return len(path.parts) == 2 and not path.is_absolute() and not name.startswith(".")


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn errors of the hub's client into an InputError of one line that names `what`."""
    try:
        yield
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        httpx.HTTPError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            error.filename = error.filename or what.partition(" (")[0]
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{what}: cannot be fetched from the hub: {lines[0]}") from None
