"""Offsets into tensors of more than 2^31 elements: 32 bits would wrap in silence, so kernels use 64 for
the tensors that may be so large, and launches refuse all others."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fast import catalogue, launch
from fast.launch import NARROW, Launch, Scratch
from fast.linear import product
from fast.moe import Experts
from fast.prefill import linear as prefill_linear
from fast.prefill import moe as prefill_moe
from fast.prefill.span import number_of_rows
from fast.target import TARGETS
from qwen35.config import Config
from qwen35.errors import InputError
from qwen35.load import lay_out
from tests.support.offsets import overflows, ttir

pytest.importorskip("triton")

META = torch.device("meta")
CONTEXT = 524_352  # more than twice the positions of the published model, here all in one pass
VOCABULARY, EXPERTS = 1 << 20, 1 << 14
# What integers that a kernel reads and does not limit are at most; the pairs of a pass are 10 a row.
LOADED = {
    "start": (0, CONTEXT - 8), "count": (1, 8), "tile_expert": (0, EXPERTS),
    "tile_first": (0, 10 * CONTEXT), "filled": (1, VOCABULARY),
}  # fmt: skip
# Not seen by bounds alone: only the difference of a position and the pass's first one counts; lanes
# behind the first rows of a pass are off, so that nothing is read by their offsets.
KNOWN = {("attention.attend", "projected"), ("prefill.deltanet.mix", "before")}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def largest(target: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Every kernel at the sizes of the published model, with that context and a vocabulary four times as
    large, once more with 32 times as many experts, and products with a matrix of 2^32 elements."""
    monkeypatch.setattr(catalogue, "RANKS", (1,))
    monkeypatch.setattr(catalogue, "CAPACITY", CONTEXT)
    monkeypatch.setattr(catalogue, "PREFILL_ROWS", CONTEXT)
    whole = Config.published(catalogue.PUBLISHED)
    wider = replace(whole, vocab_size=VOCABULARY)
    monkeypatch.setattr(Config, "published", classmethod(lambda cls, name: wider))
    yield from catalogue.launches(target, lay_out)
    for node in (Experts(EXPERTS, 4096, 1024, target, META, fp4=fp4) for fp4 in (False, True)):
        for rows in (8, CONTEXT):
            given = empty(rows, 4096), empty(rows, 10, dtype=torch.int32), empty(rows, 10)
            if rows == 8:
                work, _ = node.launches(*given, Scratch(META))
            else:
                filled = number_of_rows(given[0])
                work, _ = prefill_moe.experts(node, *given, filled, Scratch(META))
            yield from (one for one in work if isinstance(one, Launch))
    weight = empty(VOCABULARY, 4096)
    yield product(empty(8, 4096), weight, target, Scratch(META), name="wide")[0]
    x, residual = empty(VOCABULARY, 4096), empty(VOCABULARY, VOCABULARY)
    yield prefill_linear.product(
        x, weight, target, Scratch(META), number_of_rows(x), name="wide", residual=residual
    )[0]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is not in configs.json")
@pytest.mark.parametrize("target", TARGETS)
def test_no_offset_overflows(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = set[str]()
    for one in largest(target, monkeypatch):
        wide |= {
            name
            for name, value in one.arguments.items()
            if isinstance(value, torch.Tensor) and value.numel() > NARROW
        }
        kernel = f"{one.kernel.__module__}.{one.kernel.__name__}".removeprefix("fast.kernels.")
        found = overflows(ttir(one, target), one, LOADED)
        assert {(kernel, base) for base, _ in found} <= KNOWN, (one.name, found)
    assert wide == launch.WIDE


@pytest.mark.parametrize("beyond", [False, True])
def test_a_tensor_that_its_offsets_cannot_count_is_refused(beyond: bool) -> None:
    """An example is the keys of 2^22 positions, two heads and 256 channels."""
    numel = NARROW + beyond
    given = {"keys": torch.empty(1, device=META).expand(numel), "weight": empty(NARROW + 1)}
    if not beyond:
        Launch("attend", None, (1, 1, 1), given, {})
        return
    said = f"attend: keys has {numel} elements; its offsets have 32 bits and reach {NARROW}"
    with pytest.raises(InputError, match=re.escape(said)):
        Launch("attend", None, (1, 1, 1), given, {})
