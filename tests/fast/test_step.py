"""Whole rounds of the embedded model as gfx950 code in the emulator: text without the card."""

import copy
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from fast.launch import Launch, Scratch, Work
from fast.layer import DecoderLayer
from fast.mtp import MTP
from fast.step import Step, is_fast
from qwen35.cache import Cache
from qwen35.errors import InputError
from qwen35.generation import Generation, prefill
from qwen35.load import load
from qwen35.sampling import Sampling
from qwen35.tokenizer import Tokenizer
from reference.model import Model
from tests.support.decoding import decoder
from tests.support.fast_cases import CPU, TARGET, counters, emulated, poison, random
from tools.gfx950.target import compile_launch, emulate

PROMPT = "In the beginning God created the heaven and the"


class On:
    """Packs a class for the card, wherever the model is."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def from_reference(self, module: nn.Module) -> nn.Module:
        return self.kind.from_reference(module, TARGET)


@pytest.fixture
def small_blocks() -> None:
    """Whole rounds run with the blocks that are shipped."""


@pytest.fixture(scope="module")
def slow() -> Model:
    return load("tiny")


def with_fast_layers(slow: Model) -> Model:
    """A model with fast layers and a fast MTP head; its trunk's and head's own matrices are shared."""
    model = copy.copy(slow)
    model._modules = dict(slow._modules)
    model.layers = nn.ModuleList(On(DecoderLayer).from_reference(layer) for layer in slow.layers)
    model.mtp = On(MTP).from_reference(slow.mtp)  # pyright: ignore
    return model


@pytest.fixture(scope="module")
def quick(slow: Model) -> Model:
    return with_fast_layers(slow)


@pytest.fixture(scope="module")
def prompt(slow: Model) -> list[int]:
    assert slow.folder is not None
    return Tokenizer(slow.folder).encode(PROMPT)


def begun(slow: Model, prompt: list[int], drafts: int) -> tuple[Cache, int, Tensor]:
    """A prompt's cache, the token that follows, and the state before it [D]."""
    with torch.inference_mode():
        cache = slow.new_cache()
        hidden = prefill(slow, prompt, cache, chunk=64, draft=drafts > 0)
        return cache, int(slow.lm_head(hidden)[0, 0].argmax()), hidden[0, 0]


def start(step: Step, cache: Cache, token: int, hidden: Tensor) -> None:
    step.take(cache)
    step.begin(token, hidden)


def rounds(step: Step, count: int) -> list[list[int]]:
    """The new tokens of `count` rounds in the emulator, which poisons every scratch buffer first."""
    found = []
    for _ in range(count):
        for work in step.work:
            assert isinstance(work, Launch)
            if work.name.split()[0] not in ("accept", "norm", "pick"):  # these write what stays
                poison([work])
            emulate([work])
            assert not counters([work])
        fresh, *picked = step.report.tolist()
        found.append(picked[:fresh])
    return found


@pytest.mark.parametrize(("drafts", "count"), [(0, 3), (1, 2), (3, 4)])
def test_the_tokens_and_the_accepted_drafts_are_the_references(
    slow: Model, quick: Model, prompt: list[int], drafts: int, count: int
):
    step = Step(quick, 64, drafts)
    cache, token, hidden = begun(slow, prompt, drafts)
    start(step, cache, token, hidden)
    fresh = rounds(step, count)
    text = [token, *(t for part in fresh for t in part)]
    result = Generation(slow, prompt, len(text), Sampling(), frozenset(), drafts)
    assert text == [t for t, _ in result]
    assert [len(part) for part in fresh] == _accepted(slow, prompt, drafts, count)
    assert len(text) > 1 + count or drafts == 0


def _accepted(slow: Model, prompt: list[int], drafts: int, count: int) -> list[int]:
    """How many tokens each of the reference's rounds gives."""
    cache, token, hidden = begun(slow, prompt, drafts)
    plain = decoder(slow, cache, token, hidden[None, None], drafts)
    return [len(plain.round(100)) for _ in range(count)]


def test_the_depth_decides_no_bit_of_the_logits(slow: Model, quick: Model, prompt: list[int]):
    def logits(drafts: int, count: int) -> Tensor:
        step = Step(quick, 64, drafts)
        start(step, *begun(slow, prompt, drafts))
        kept = []
        for _ in range(count):
            (fresh,) = rounds(step, 1)
            kept.append(step.logits[: len(fresh)].clone())
        return torch.cat(kept)

    deep = logits(3, 1)
    assert torch.equal(logits(0, len(deep)), deep)


def test_the_trunks_kernels_are_the_same_machine_code_at_every_depth(quick: Model):
    """Triton compiles a kernel anew for a number that is 1, or that 16 divides: then a row's bits could
    depend on how many drafts are verified beside it."""

    def trunk(drafts: int, target: str) -> list[str]:
        work = Step(quick, 64, drafts).work
        first = max(i for i, one in enumerate(work) if one.name == "embed D=256")  # pyright: ignore
        layers = work[first + 1 : -4]
        assert len(layers) == 2 * 25
        return [compile_launch(one, target).text for one in layers[:25]]  # pyright: ignore

    for target in ("gfx950", "sm_90"):
        texts = [trunk(drafts, target) for drafts in (0, 1, 3, 7)]
        assert all(text == texts[0] for text in texts)


def test_a_state_goes_to_the_references_cache_and_back(
    slow: Model, quick: Model, prompt: list[int]
):
    """The reference continues from the fast path's state in the middle of a text."""
    step = Step(quick, 64, 3)
    cache, token, hidden = begun(slow, prompt, 3)
    start(step, cache, token, hidden)
    (fresh,) = rounds(step, 1)
    back = slow.new_cache()
    step.state.give(back)
    assert back.length == len(prompt) + len(fresh)
    other = Step(quick, 96, 3)
    start(other, back, fresh[-1], hidden)
    again = slow.new_cache()
    other.state.give(again)
    # The MTP head has not seen all new tokens yet, so its keys and values are not compared.
    for name, tensor in back.snapshot(mtp=False).items():
        assert torch.equal(tensor, again.snapshot(mtp=False)[name]), name
    by_reference = slow.lm_head(slow(torch.tensor([[fresh[-1]]]), back))[0, 0]
    result = Generation(slow, prompt, 2 + len(fresh), Sampling(), frozenset(), 0)
    assert int(by_reference.argmax()) == [t for t, _ in result][-1]


def test_a_step_with_more_room_takes_over_in_the_middle(
    slow: Model, quick: Model, prompt: list[int]
):
    small, large = Step(quick, 24, 3), Step(quick, 64, 3)
    start(small, *begun(slow, prompt, 3))
    rounds(small, 1)
    large.take_over(small)
    assert rounds(small, 1) == rounds(large, 1)


def extended(step: Step, parts: list[list[int]], cache: Cache, before: Tensor | None) -> Tensor:
    """The hidden state [D] after a prompt's tail, given in parts, all in the emulator."""

    def emulated_run(work: Iterable[Work], device: torch.device) -> None:
        emulate(work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fast.graph.run", emulated_run)
        step.take(cache)
        for part in parts:
            before = step.extend(part, before)
    assert before is not None
    return before


def test_a_prompts_tail_goes_through_passes_of_eight_rows(
    slow: Model, quick: Model, prompt: list[int]
):
    """The tail is a whole prompt: its 10 tokens are a full pass and one of two rows."""
    step = Step(quick, 64, 3)
    cache, token, hidden = begun(slow, prompt, 3)
    found = extended(step, [prompt], slow.new_cache(), None)
    assert step.length == len(prompt) == 10
    exact = load("tiny", dtype=torch.float64)
    truth = prefill(exact, prompt, exact.new_cache(), chunk=64, draft=False)[0, 0]
    error, yardstick = ((one.double() - truth).norm() for one in (found, hidden))
    assert error <= 2 * yardstick
    own = slow.new_cache()
    step.state.give(own)
    assert own.mtp is not None and cache.mtp is not None
    assert own.mtp.length == cache.mtp.length == len(prompt) - 1
    for name, tensor in cache.snapshot().items():
        given = own.snapshot()[name]
        assert given.shape == tensor.shape
        assert (given.float() - tensor.float()).norm() <= 0.05 * tensor.float().norm(), name
    step.begin(token, found)
    text = [t for part in rounds(step, 2) for t in part]
    result = Generation(slow, prompt, 1 + len(text), Sampling(), frozenset(), 0)
    assert [token, *text] == [t for t, _ in result] and len(text) > 3


def test_the_cuts_of_a_tail_decide_no_bit(slow: Model, quick: Model, prompt: list[int]):
    """The cache holds some tokens before the tail, as it does after whole blocks."""

    def computed(*cuts: int) -> dict[str, Tensor]:
        cache = slow.new_cache()
        before = prefill(slow, prompt[:3], cache, chunk=64, draft=True)[0, 0]
        edges = [3, *cuts, 12]
        parts = [(prompt + prompt)[first:last] for first, last in pairwise(edges)]
        step = Step(quick, 64, 1)
        hidden = extended(step, parts, cache, before)
        own = slow.new_cache()
        step.state.give(own)
        return own.snapshot() | {"hidden": hidden}

    whole = computed()
    for name, tensor in computed(6).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_nan_in_the_logits_is_told_apart_from_every_token(quick: Model):
    step = Step(quick, 64, 0)
    x = random(1, 1, 256).bfloat16()
    x[0, 3] = torch.nan
    launches = step._choose(x, step.head, step.logits, step.picked)
    emulated(launches)
    assert step.picked.tolist() == [-1]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_likeliest_token_is_the_lowest_of_those_that_tie(quick: Model, rows: int):
    """A head of 2,000 rows, every one of them there twice; ids from 1,500 on are never chosen."""
    head = (random(2, 1000, 256) / 16).bfloat16().repeat(2, 1)
    x = random(3, rows, 256).bfloat16()
    step = copy.copy(Step(quick, 64, 0))
    step.vocab, step.scratch = 1500, Scratch(CPU)
    logits, tokens = torch.empty(rows, 2000).bfloat16(), torch.empty(rows, dtype=torch.int32)
    emulated(step._choose(x, head, logits, tokens))
    exact = x.double() @ head.double().T
    assert (logits.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
    assert tokens.tolist() == logits[:, :1500].argmax(1).tolist()
    assert max(tokens.tolist()) < 1000


@pytest.mark.parametrize(
    ("drafts", "own", "fresh"),
    [([], [7], 1), ([5, 6], [5, 6, 9], 3), ([5, 6], [5, 8, 9], 2), ([5, 6], [4, 6, 9], 1)],
)
def test_drafts_are_accepted_up_to_the_first_that_is_not_the_models_own(
    quick: Model, drafts: list[int], own: list[int], fresh: int
):
    step = Step(quick, 64, len(drafts))
    step.rows_ids.copy_(torch.tensor([3, *drafts]))
    step.picked.copy_(torch.tensor(own))
    step.state.starts.copy_(torch.tensor([20, 19, 20][: 1 + len(drafts)]))
    emulated([step._accept()])
    assert step.report.tolist() == [fresh, *own]
    assert step.fresh.tolist() == [fresh] and step.rows_ids[0] == own[fresh - 1]
    after = 20 + fresh
    assert step.state.starts.tolist() == [after, 20, after][: 1 + len(drafts)]


def test_a_model_that_is_not_fast_has_no_step(slow: Model, quick: Model):
    assert is_fast(quick, 3) and not is_fast(slow, 0)
    with pytest.raises(InputError, match="a step needs a model whose layers and MTP head are all"):
        Step(slow, 64, 3)
    with pytest.raises(InputError, match="8 drafts a round; the fast path verifies 0 to 7"):
        Step(quick, 64, 8)


def test_a_prompt_longer_than_the_room_is_refused(slow: Model, quick: Model, prompt: list[int]):
    step = Step(quick, 8, 0)
    with pytest.raises(InputError, match="10 tokens; the fast path's cache holds 8"):
        start(step, *begun(slow, prompt, 0))
