"""Every module and the whole trunk against transformers, for every family member.

Modules get the same inputs on both sides. In float64 (see support/oracle.py) they agree to rounding,
which proves the formulas; float32 then only has to show that nothing is lost on the way: our error may be
twice that of transformers' own float32, whatever a processor makes of either.
"""

from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from qwen35.load import TINY, load
from qwen35.tokenizer import Tokenizer
from tests.support.family import FAMILY, randomise, small_model
from tests.support.oracle import (
    COMPARISONS,
    EXACT,
    LENGTHS,
    SCALES,
    pair,
    relative,
    state_errors,
    their_model,
    token_ids,
    within_twice,
)
from tests.support.oracle_mtp import their_hidden, their_logits

MOE_ONLY = ("Router", "Experts", "SparseMoeBlock")

pytestmark = pytest.mark.filterwarnings("ignore")


def has_experts(name: str) -> bool:
    return "num_experts" in FAMILY[name]


@pytest.mark.parametrize("module", COMPARISONS)
@pytest.mark.parametrize("name", FAMILY)
def test_module(name: str, module: str) -> None:
    """Lengths around the chunk of 64, usual and small inputs; mixers and layers then decode.

    float64 proves the formula. float32 may err twice as much as transformers' float32 does.
    """
    if module in MOE_ONLY and not has_experts(name):
        pytest.skip("a dense member")
    compare = COMPARISONS[module]
    for length, scale in product(LENGTHS, SCALES):
        exact = compare(*pair(name, torch.float64), length, scale)
        rounded = compare(*pair(name), length, scale)
        assert exact and exact.keys() == rounded.keys(), "nothing was compared"
        for what, (wide, truth) in exact.items():
            where = f"{what}, {length} tokens, inputs x{scale}"
            assert relative(wide, truth) <= EXACT, where
            error, most = within_twice(*rounded[what], truth)
            assert error <= most, where


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FAMILY)
def test_logits(name: str, length: int) -> None:
    """End to end. float64 must agree to rounding; float32 must err no more than twice as much as
    transformers' float32 does.

    A fixed bound would say little: the layers enlarge each other's rounding, and with weights this
    large transformers itself is 3e-4 away from its own float64 logits of standard deviation 1.

    A single token has no float32 check here (one row is luck): test_cached_decode has it.
    """
    model, theirs = pair(name)
    wide_model, wide_theirs = pair(name, torch.float64)
    ids = token_ids(length, model)
    truth = their_logits(wide_theirs, ids)
    wide_logits = wide_model.lm_head(wide_model(ids, wide_model.new_cache()))
    assert relative(wide_logits, truth) < EXACT
    if length > 1:
        logits = model.lm_head(model(ids, model.new_cache()))
        error, most = within_twice(logits, their_logits(theirs, ids), truth)
        assert error <= most


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FAMILY)
def test_logits_with_weights_as_they_are_initialised(name: str, length: int) -> None:
    """Matrices of standard deviation 0.02, transformers' own: the two-times rule, over all logits."""
    model = small_model(name)
    randomise(model, seed=1, scale=0.02 * model.config.hidden_size**0.5)
    ids = token_ids(length, model)
    found = their_logits(their_model(name, model), ids)
    logits = model.lm_head(model(ids, model.new_cache()))
    wide = model.to(torch.float64)
    truth = their_logits(their_model(name, wide), ids)
    assert relative(wide.lm_head(wide(ids, wide.new_cache())), truth) < EXACT
    floor = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (logits - truth).abs().max() <= 2 * (found - truth).abs().max() + floor


def test_logits_of_the_embedded_model() -> None:
    """The trained checkpoint as transformers itself loads it, in float32: the two-times rule."""
    model = load(TINY, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    )
    text = (TINY / "heldout.txt").read_text()[:2000]
    ids = torch.tensor([Tokenizer(TINY).encode(text)])
    logits = model.lm_head(model(ids, model.new_cache()))
    assert ids.shape[1] > 400
    wide = load(TINY, dtype=torch.float64)
    truth = wide.lm_head(wide(ids, wide.new_cache()))
    error, most = within_twice(logits, theirs(ids).logits, truth)
    assert error <= most


@pytest.mark.parametrize("name", ["4B", "397B-A17B"])
def test_float64_without_the_switch_is_no_more_exact_than_float32(name: str) -> None:
    """Why the oracle needs its switch: as it is, transformers rounds to float32 inside.

    Should it stop doing so one day, this fails and the switch can go.
    """
    model, theirs = pair(name, torch.float64)
    ids = token_ids(65, model)
    narrow = theirs(ids, use_cache=False).logits
    assert 1e-9 < relative(narrow, their_logits(theirs, ids)) < 1e-4


def seeds(length: int) -> range:
    """Several sequences where one is short, so that the two-times rule has rows to go by."""
    return range(2 if length == 1 else 1)


def decode(
    name: str, dtype: torch.dtype, length: int, seed: int
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Prompt and single tokens through both: our logits, theirs, errors of the states."""
    model, theirs = pair(name, dtype)
    steps = 16 if length == 1 else 4
    ids = token_ids(length + steps, model, seed)
    cache, their_cache = model.new_cache(), DynamicCache(config=theirs.config)
    logits, expected = [], []
    for part in ids.split([length, *[1] * steps], dim=1):
        logits.append(model.lm_head(model(part, cache)))
        expected.append(their_logits(theirs, part, their_cache))
    assert cache.length == their_cache.get_seq_length() == length + steps
    errors = {
        f"layer {i} {what}": error
        for i, state in enumerate(cache.layers)
        for what, error in state_errors(state, their_cache.layers[i]).items()
    }
    return torch.cat(logits, 1), torch.cat(expected, 1), errors


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FAMILY)
def test_cached_decode(name: str, length: int) -> None:
    """Both caches are in use. In float64 every layer's state at the end is compared, too. In
    float32 a state carries the rounding of all layers before it, and test_module compares each
    alone."""
    logits, yardstick, truths = [], [], []
    for seed in seeds(length):
        wide_logits, truth, states = decode(name, torch.float64, length, seed)
        assert relative(wide_logits, truth) < EXACT
        assert max(states.values()) < EXACT, states
        ours, theirs, _ = decode(name, torch.float32, length, seed)
        logits.append(ours)
        yardstick.append(theirs)
        truths.append(truth)
    error, most = within_twice(*(torch.cat(x) for x in (logits, yardstick, truths)))
    assert error <= most


@pytest.mark.parametrize("taps", [2, 7])
def test_other_numbers_of_taps(taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every published model has four, so that a number three would pass for taps - 1."""
    name = f"27B with {taps} taps"
    monkeypatch.setitem(FAMILY, name, FAMILY["27B"] | {"linear_conv_kernel_dim": taps})
    for length in (1, 65):
        logits, truth, states = decode(name, torch.float64, length, seed=0)
        assert relative(logits, truth) < EXACT
        assert max(states.values()) < EXACT, states


@pytest.mark.parametrize("name", ["0.8B", "27B", "397B-A17B", "Qwen3-Next"])
def test_second_prefill_pass(name: str) -> None:
    """A pass of many tokens that goes on from both caches, in float64."""
    model, theirs = pair(name, torch.float64)
    ids = token_ids(150, model, seed=2)
    cache, their_cache = model.new_cache(), DynamicCache(config=theirs.config)
    for part in ids.split([64, 86], dim=1):
        got, expected = model(part, cache), their_hidden(theirs, part, their_cache)
        assert relative(got, expected) < EXACT
