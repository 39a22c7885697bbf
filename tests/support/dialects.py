"""Helpers of the tests of checkpoint dialects."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen35.generate import build_parser, main
from qwen35.load import load
from reference.model import Model
from tests.support.checkpoints import QUANTIZED_SIZES, Dialect, Packing, write
from tests.support.command import outcome

MEMBER = "397B-A17B"


def repacked(dialect: Dialect, **packings: Packing) -> Dialect:
    """The dialect with other packings. packings: a new packing for each `Packing.serves`."""
    changed = tuple((glob, packings.get(p.serves, p)) for glob, p in dialect.quantized)
    return replace(dialect, quantized=changed)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Dialect], tuple[Path, dict[str, Tensor]]]:
    """A function that gives the folder of a dialect, which is written once, and its parameters."""
    known: dict[Dialect, tuple[Path, dict[str, Tensor]]] = {}

    def folder(dialect: Dialect) -> tuple[Path, dict[str, Tensor]]:
        if dialect not in known:
            path = tmp_path_factory.mktemp("dialect")
            known[dialect] = path, write(path, MEMBER, dialect, **QUANTIZED_SIZES)
        return known[dialect]

    return folder


Written = Callable[[Dialect], tuple[Path, dict[str, Tensor]]]


@pytest.fixture
def copied(written: Written, tmp_path: Path) -> Callable[[Dialect], Path]:
    """A function that copies a dialect's folder, with one weight file, for tests that damage it."""

    def copy(dialect: Dialect) -> Path:
        shutil.copytree(written(replace(dialect, shards=1))[0], tmp_path / "model")
        return tmp_path / "model"

    return copy


def quiet_load(folder: Path, dtype: torch.dtype | None = None) -> Model:
    """Load a model; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(folder, dtype=dtype)


def cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run `python -m qwen35.generate` in this process. Returns status, stdout and stderr."""
    return outcome(build_parser, main, capsys, *args)


RUN = ("--prompt-ids", "5,6,7", "--max-new-tokens", 6, "--ignore-eos")
