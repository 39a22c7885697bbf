"""Whole rounds of the embedded model on two ranks, as gfx950 code in the emulator."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from fast.allreduce import Gathered, exchange_of
from fast.launch import Launch, Work
from fast.layer import DecoderLayer
from fast.mtp import MTP
from fast.step import Step
from qwen35.cache import Cache
from qwen35.generation import Generation, prefill
from qwen35.load import load
from qwen35.parallel.ranks import Ranks
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from reference.model import Model
from tests.support.fast_cases import TARGET, poison
from tests.support.ranks import on_threads
from tools.gfx950.target import emulate

PROMPT = "In the beginning God created the heaven and the"
Begun = tuple[Cache, int, Tensor]


pytestmark = pytest.mark.filterwarnings("ignore:.*is not in configs.json")


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    folder = load("tiny").folder
    assert folder is not None
    return Tokenizer(folder).encode(PROMPT)


@pytest.fixture(scope="module")
def parts(prompt: list[int]) -> list[tuple[Model, dict[int, Begun]]]:
    """Each rank's part of the embedded model with fast layers, and by drafts what a step begins with: the
    part's cache of the prompt, the next token, and the state before it [D]."""

    def part(ranks: Ranks) -> tuple[Model, dict[int, Begun]]:
        model = load("tiny", ranks=ranks)
        begun = {}
        for drafts in (0, 3):
            cache = model.new_cache()
            hidden = prefill(model, prompt, cache, chunk=64, draft=drafts > 0)
            begun[drafts] = cache, int(model.lm_head(hidden)[0, 0].argmax()), hidden[0, 0]
        assert isinstance(exchange_of(model.layers[0].mlp), Gathered)  # pyright: ignore (a module)
        model.layers = nn.ModuleList(
            DecoderLayer.from_reference(layer, TARGET) for layer in model.layers
        )
        model.mtp = MTP.from_reference(model.mtp, TARGET)  # pyright: ignore
        return model, begun

    return on_threads(2, part)


def rounds(steps: Sequence[Step], count: int) -> list[list[int]]:
    """The new tokens of `count` rounds, the same on every rank. The ranks take turns, launch by launch;
    operations of torch, which exchange tensors, run at the same time."""
    found = []
    for _ in range(count):
        for at_once in zip(*(step.work for step in steps), strict=True):
            together(at_once)
        reports = [step.report.tolist() for step in steps]
        assert all(report == reports[0] for report in reports)
        assert all(torch.equal(step.logits, steps[0].logits) for step in steps)
        fresh, *picked = reports[0]
        found.append(picked[:fresh])
    return found


def together(at_once: Sequence[Work]) -> None:
    if all(isinstance(one, Launch) for one in at_once):
        for one in at_once:
            assert isinstance(one, Launch)
            if one.name.split()[0] not in ("accept", "norm", "pick"):
                poison([one])
            emulate([one])
        return
    with ThreadPoolExecutor(len(at_once)) as threads:
        for future in [threads.submit(torch.inference_mode()(one)) for one in at_once]:  # pyright: ignore
            future.result()


def test_two_ranks_give_the_references_tokens_at_any_depth_with_the_same_bits(
    parts: list[tuple[Model, dict[int, Begun]]], prompt: list[int]
):
    def continued(drafts: int, count: int) -> tuple[list[int], Tensor]:
        steps = [Step(model, 64, drafts) for model, _ in parts]
        for step, (_, begun) in zip(steps, parts, strict=True):
            cache, token, hidden = begun[drafts]
            step.take(cache)
            step.begin(token, hidden)
        tokens, logits = [], []
        for _ in range(count):
            (fresh,) = rounds(steps, 1)
            tokens += fresh
            logits.append(steps[0].logits[: len(fresh)].clone())
        return tokens, torch.cat(logits)

    deep, bits = continued(3, 2)
    assert len(deep) > 2
    plain, same = continued(0, 2)
    assert plain == deep[:2] and torch.equal(same, bits[:2])
    text = Generation(load("tiny"), prompt, 1 + len(deep), Sampling(), frozenset(), 0)
    first = parts[0][1][0][1]
    assert [first, *deep] == [token for token, _ in text]


def test_a_fast_part_shows_its_rank_and_its_exchange(parts: list[tuple[Model, dict[int, Begun]]]):
    text = repr(parts[1][0].layers[0])
    assert "rank 1 of 2, all-gather all-reduce" in text
    assert "(linear_attn): Summed(" in text and "GatedDeltaNet, rank 1 of 2" in text
