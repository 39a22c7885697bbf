"""Helpers of the tests of the prefix cache in a folder."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen35.generation import Generation
from qwen35.load import load
from qwen35.prefix import folder as prefix_files
from qwen35.prefix.cache import PrefixCache
from qwen35.prefix.folder import UNFINISHED, Folder
from qwen35.prefix.keys import identity
from qwen35.sampling import Sampling
from reference.model import Model
from tests.support.checkpoints import write

ROOT = Path(__file__).parents[2]

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
    """A checkpoint with a delta net, then attention, and an MTP head."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, "397B-A17B", seed=7, **SIZES)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load(checkpoint, dtype=torch.float32)


@dataclass
class Opened:
    """A prefix cache on a folder, and its warnings."""

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
    """A finished generation."""
    result = Generation(
        model, ids, TOKENS, Sampling(), frozenset(), draft,
        prefix_cache=kept and kept.cache, digest=True,
    )  # fmt: skip
    for _ in result:
        pass
    return result


ALONE: dict[tuple[torch.dtype, tuple[int, ...]], Generation] = {}  # runs without any cache


def alone(model: Model, ids: list[int]) -> Generation:
    """A generation without a prefix cache. It is computed once."""
    key = model.dtype, tuple(ids)
    if key not in ALONE:
        ALONE[key] = ran(model, ids)
    return ALONE[key]


def assert_same(result: Generation, model: Model) -> None:
    """Assert that the result has the tokens and logits of a run without a cache."""
    expected = alone(model, result.prompt)
    assert expected.cached_tokens == 0
    assert result.finish_reason == "length"
    assert result.token_ids == expected.token_ids
    assert result.logits_sha256 == expected.logits_sha256


def assert_healthy(place: Path, model: Model, ids: list[int] | None = None) -> None:
    """Assert that a folder has no problems and no unfinished files, and that a run from it is right
    and reuses all whole blocks."""
    again = opened(place, model)
    result = ran(model, ids or PROMPT, again)
    assert_same(result, model)
    assert result.cached_tokens == len(result.prompt) // 64 * 64, result.cache_reason
    assert again.lines == again.store.problems() == []
    assert unfinished(place) == []


def files(place: Path) -> list[Path]:
    """The files of the segments, sorted by their first token."""
    return sorted(place.glob("*.safetensors"), key=lambda file: int(metadata(file)["first"]))


def unfinished(place: Path) -> list[str]:
    return [name for name in os.listdir(place) if name.endswith(UNFINISHED)]


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as handle:
        return handle.metadata()


def edit_metadata(file: Path, **changes: str) -> None:
    """Write the same tensors again with changed metadata."""
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
    """A copy of the folder `made`, for one test."""
    return Path(shutil.copytree(made, tmp_path / "prefixes"))


def flipped(content: bytes, at: int, bits: int = 0xFF) -> bytes:
    changed = bytearray(content)
    changed[at] ^= bits
    return bytes(changed)


def root(model: Model, checkpoint: str = "a") -> str:
    return prefix_files.root_of(identity(model, checkpoint))
