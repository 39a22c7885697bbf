"""How many tokens of a prompt go through the model in one pass, if nobody says it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen35.chunk import LARGEST, chosen_chunk, row_bytes
from qwen35.config import Config
from qwen35.generate import build_parser
from qwen35.generation import Generation
from qwen35.load import load
from qwen35.sampling import Sampling
from tests.support.ranks import on_threads

WHOLE = Config.published("397B-A17B")


def on_a_card(monkeypatch: pytest.MonkeyPatch, free: int, unused: int = 0) -> Any:
    """A model of 397B's sizes that seems to be on a GPU with so many free bytes, and with so many that
    torch holds without using them."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: unused + 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    weight = SimpleNamespace(device=torch.device("cuda", 0))
    table = SimpleNamespace(weight=weight)
    return SimpleNamespace(embed_tokens=table, lm_head=None, config=WHOLE)


def test_a_pass_takes_what_fits_into_free_memory(monkeypatch: pytest.MonkeyPatch):
    row = row_bytes(WHOLE)
    for free, unused, chunk in (
        (8192 * row, 0, 8192),
        (4096 * row, 4096 * row, 8192),
        (8192 * row - 1, 0, 4096),
        (300 * row, 0, 256),
        (0, 0, 64),
    ):
        assert chosen_chunk(on_a_card(monkeypatch, free, unused), "fast") == chunk
    assert chosen_chunk(on_a_card(monkeypatch, 1 << 50), "reference") == LARGEST["reference"]


def test_a_row_of_the_397b_takes_less_than_two_megabytes():
    """Its 10 slots alone have 10 x (4,096 + 1,024) numbers."""
    assert 2 * 10 * (4096 + 1024) < row_bytes(WHOLE) < 2 << 20
    assert row_bytes(Config.published("27B")) > 2 * 8 * 5120


def test_on_a_cpu_the_chunk_is_the_references(monkeypatch: pytest.MonkeyPatch):
    assert chosen_chunk(load("tiny"), "reference") == 2048


def test_ranks_take_the_least_of_theirs(monkeypatch: pytest.MonkeyPatch):
    def chosen(ranks: Any) -> int:
        model: Any = load("tiny", ranks=ranks)
        monkeypatch.setitem(LARGEST, f"rank {ranks.rank}", 1024 >> ranks.rank)
        return chosen_chunk(model, f"rank {ranks.rank}")

    assert on_threads(2, chosen) == [512, 512]


def test_memory_for_the_whole_text_is_reserved_at_the_start(monkeypatch: pytest.MonkeyPatch):
    """A buffer that grows needs both sizes at a time."""
    from qwen35.cache import KVCache

    model = load("tiny")
    reserved: list[int] = []
    plain = KVCache.reserve

    def noted(self: KVCache, capacity: int) -> None:
        if capacity > self.capacity:
            reserved.append(capacity)
        plain(self, capacity)

    monkeypatch.setattr(KVCache, "reserve", noted)
    for _ in Generation(model, [5] * 130, 6, Sampling(), frozenset(), 3, 64):
        pass
    assert set(reserved) == {130 + 6 + 3}


def test_the_option_takes_auto_or_a_number():
    parser = build_parser()
    for words, value in (
        (["--prefill-chunk", "auto"], None),
        ([], None),
        (["--prefill-chunk", "128"], 128),
    ):
        assert parser.parse_args(["x", *words]).prefill_chunk == value


def test_another_word_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["x", "--prefill-chunk", "most"])
    assert "--prefill-chunk: 'most'; expected auto or a number" in capsys.readouterr().err
