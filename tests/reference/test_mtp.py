"""The MTP head against one built of transformers' parts, for dense and for MoE members."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35.config import Config
from reference.model import Model
from tests.support.family import FAMILY, small_model
from tests.support.oracle import (
    EXACT,
    pair,
    random,
    relative,
    state_errors,
    token_ids,
    within_twice,
)
from tests.support.oracle_mtp import OracleMTP, their_hidden

MEMBERS = ("0.8B", "27B", "35B-A3B", "397B-A17B", "Qwen3-Next")
LENGTHS = (2, 64, 100)
CHAIN = 3

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Drafted:
    """Outputs of the first pass [1, T, D], of each chained step [1, 1, D], the drafts, logits."""

    outputs: list[Tensor]
    drafts: list[int]
    logits: Tensor
    cache: Any


def draft_ours(model: Model, ids: Tensor, hidden: Tensor) -> Drafted:
    """First pass over ids[1:] with the trunk's states of ids[:-1], then chained steps."""
    cache = model.new_cache()
    outputs, drafts, logits = [], [], []
    following = ids[:, 1:]
    for _ in range(CHAIN + 1):
        outputs.append(model.draft(following, hidden, cache))
        logits.append(model.lm_head(outputs[-1][:, -1:]))
        drafts.append(int(logits[-1].argmax()))
        following, hidden = torch.tensor([drafts[-1:]]), outputs[-1][:, -1:]
    return Drafted(outputs, drafts, torch.cat(logits, 1), cache.mtp)


def draft_theirs(
    name: str, dtype: torch.dtype, ids: Tensor, hidden: Tensor, offset: int = 0
) -> Drafted:
    model, theirs = pair(name, dtype)
    oracle = OracleMTP(theirs, model, offset)
    cache = oracle.new_cache()
    outputs, drafts, logits = [], [], []
    following = ids[:, 1:]
    for _ in range(CHAIN + 1):
        outputs.append(oracle(following, hidden, cache))
        logits.append(theirs.lm_head(outputs[-1][:, -1:]))
        drafts.append(int(logits[-1].argmax()))
        following, hidden = torch.tensor([drafts[-1:]]), outputs[-1][:, -1:]
    return Drafted(outputs, drafts, torch.cat(logits, 1), cache.layers[0])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MEMBERS)
def test_drafting_float64(name: str, length: int) -> None:
    """Trunk and head end to end: the prompt, then three chained steps, and the head's cache."""
    model, theirs = pair(name, torch.float64)
    ids = token_ids(length + 1, model)
    ours = draft_ours(model, ids, model(ids[:, :-1], model.new_cache()))
    oracle = draft_theirs(name, torch.float64, ids, their_hidden(theirs, ids[:, :-1]))
    assert ours.drafts == oracle.drafts
    for got, expected in zip(ours.outputs, oracle.outputs, strict=True):
        assert relative(got, expected) < EXACT
    assert relative(ours.logits, oracle.logits) < EXACT
    assert max(state_errors(ours.cache, oracle.cache).values()) < EXACT
    assert ours.cache.length == length + CHAIN


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MEMBERS)
def test_first_pass_float32(name: str, length: int) -> None:
    """Both heads get the same hidden states, so that the head alone is compared, by the two-times
    rule."""
    model, _ = pair(name)
    ids = token_ids(length + 1, model)
    hidden = random(1, length, model.config.hidden_size, seed=3, dtype=torch.float32)
    ours = draft_ours(model, ids, hidden)
    yardstick = draft_theirs(name, torch.float32, ids, hidden)
    truth = draft_theirs(name, torch.float64, ids, hidden.double())
    assert ours.drafts == yardstick.drafts == truth.drafts
    for step in range(CHAIN + 1):
        outputs = (d.outputs[step] for d in (ours, yardstick, truth))
        error, most = within_twice(*outputs)
        assert error <= most, f"step {step}"


@pytest.mark.parametrize("name", ["27B", "397B-A17B"])
def test_passes_continue(name: str) -> None:
    """The prompt in two passes and then rows of fresh tokens, as in speculative decoding."""
    model, theirs = pair(name, torch.float64)
    ids = token_ids(135, model)
    hidden = their_hidden(theirs, ids[:, :-1])
    oracle = OracleMTP(theirs, model)
    expected = oracle(ids[:, 1:], hidden, oracle.new_cache())
    cache, cuts = model.new_cache(), [64, 64, 4, 2]
    parts = zip(ids[:, 1:].split(cuts, 1), hidden.split(cuts, 1), strict=True)
    got = torch.cat([model.draft(following, states, cache) for following, states in parts], 1)
    assert relative(got, expected) < EXACT


@pytest.mark.parametrize("name", ["0.8B", "397B-A17B"])
def test_swapped_halves_of_fc_are_noticed(name: str) -> None:
    """The embedding's half comes first: the other order must be noticed."""
    model = small_model(name, seed=7)
    hidden = random(1, 8, 64, seed=3, dtype=torch.float32)
    ids = token_ids(9, model)
    yardstick = draft_theirs(name, torch.float32, ids, hidden).outputs[0]
    truth = draft_theirs(name, torch.float64, ids, hidden.double()).outputs[0]
    error, most = within_twice(draft_ours(model, ids, hidden).outputs[0], yardstick, truth)
    assert error <= most
    first, second = model.mtp.fc.weight.data.chunk(2, dim=1)
    model.mtp.fc.weight.data = torch.cat((second, first), dim=1)
    assert relative(draft_ours(model, ids, hidden).outputs[0], truth) > 0.1


@pytest.mark.parametrize("name", MEMBERS)
def test_the_first_position_does_not_matter(name: str) -> None:
    """Row t may be called position t or t + 1, as engines differ: RoPE sees differences only."""
    model, theirs = pair(name, torch.float64)
    ids = token_ids(41, model)
    hidden = their_hidden(theirs, ids[:, :-1])
    ours = draft_ours(model, ids, hidden)
    shifted = draft_theirs(name, torch.float64, ids, hidden, offset=1)
    assert ours.drafts == shifted.drafts
    # The RoPE table is float32, and the angles of other positions round otherwise: by half a unit in the
    # last place of the largest angle, 40 radians. Of a wrong formula nothing would be left.
    assert relative(ours.logits, shifted.logits) < 41 * torch.finfo(torch.float32).eps
    # The shift is real: the keys that are kept differ.
    assert relative(ours.cache.k[:, :, : ours.cache.length], shifted.cache.keys) > 1e-3


def test_a_model_with_one_expert_has_it_in_the_head_too() -> None:
    one = {"num_experts": 1, "num_experts_per_tok": 1}
    model = Model(Config.from_dict(FAMILY["397B-A17B"] | one))
    trunk, head = model.layers[3], model.mtp.layers[0]
    shapes = {name: p.shape for name, p in trunk.named_parameters()}
    assert "mlp.experts.0.down_proj.weight" in shapes
    assert {name: p.shape for name, p in head.named_parameters()} == shapes


@pytest.mark.parametrize("fill", [100.0, torch.nan])
def test_what_lies_beyond_the_length_is_not_read(fill: float) -> None:
    """Chained steps that were taken back leave their keys behind, which stay unread."""
    model, _ = pair("397B-A17B")
    ids, hidden = token_ids(8, model), random(1, 8, 64, seed=4, dtype=torch.float32)

    def rows(dirty: bool) -> Tensor:
        cache = model.new_cache()
        model.draft(ids[:, :6], hidden[:, :6], cache)
        model.draft(ids[:, :3], hidden[:, :3], cache)
        cache.mtp.rollback(3)
        if dirty:
            for held in (cache.mtp.k, cache.mtp.v):
                held[:, :, cache.mtp.length :] = fill
        return model.draft(ids[:, 6:], hidden[:, 6:], cache)

    assert torch.equal(rows(dirty=True), rows(dirty=False))
