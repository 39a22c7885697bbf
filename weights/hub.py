"""A model repository on the Hugging Face hub, at one commit: headers first, then file by file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, httpx

from qwen35.errors import InputError
from weights.storage import INDEX

WEIGHTS = ".safetensors"
BESIDE = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".tiktoken",
)  # the small files that belong to a model
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones


class Repository:
    """commit: that of `main` unless given. sizes: bytes of each file in the repository's top folder."""

    def __init__(self, name: str, commit: str | None = None) -> None:
        self.name = name
        with _one_line(name):
            info = HfApi().model_info(name, revision=commit, files_metadata=True)
        self.commit = info.sha or commit or "main"
        self.sizes = {
            file.rfilename: file.size or 0
            for file in info.siblings or []
            if Path(file.rfilename).name == file.rfilename
        }

    def fetch(self, file: str, folder: Path | None) -> Path:
        """Download one file into `folder`, or into the hub's own cache (None), and return its path.

        What a broken connection left is continued.
        """
        with _one_line(f"{self.name}/{file}"):
            return Path(hf_hub_download(self.name, file, revision=self.commit, local_dir=folder))

    def fetch_headers(self, folder: Path) -> None:
        """Make a checkpoint folder without weights: the small files, and of each safetensors file its
        header, followed by a hole as long as its tensors. Enough for all that is known from headers."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.sizes:
            if file.endswith(BESIDE):
                self.fetch(file, folder)
        single = [] if INDEX in self.sizes else [f for f in self.sizes if f == f"model{WEIGHTS}"]
        for file in single or [f for f in self.sizes if f.endswith(WEIGHTS)]:
            header = self._first_bytes(file, 8)
            length = int.from_bytes(header, "little")
            if len(header) < 8 or length > LONGEST_HEADER:
                raise InputError(
                    f"{self.name}/{file}: claims a header of {length} bytes; "
                    f"at most {LONGEST_HEADER} are expected"
                )
            with (folder / file).open("wb") as hollow:
                hollow.write(self._first_bytes(file, 8 + length))
                hollow.truncate(max(self.sizes[file], hollow.tell()))

    def _first_bytes(self, file: str, count: int) -> bytes:
        url = hf_hub_url(self.name, file, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes=0-{count - 1}"}
        with _one_line(f"{self.name}/{file}"):
            request = get_session().stream("GET", url, headers=headers, follow_redirects=True)
            with request as response:
                response.raise_for_status()
                content = b""
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) >= count:  # a server may send more than the range
                        break
        return content[:count]


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line that names `what`."""
    try:
        yield
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        httpx.HTTPError,
        OSError,
    ) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{what}: not to be had from the hub: {lines[0]}") from None
