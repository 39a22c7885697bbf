"""The decoder drafts what a drafter without any memory would draft.

Wrong drafts cannot change the tokens, only waste passes, so no comparison of tokens sees them.
"""

import torch

from qwen35.generation import prefill
from qwen35.load import TINY, load
from qwen35.sampling import Sampling, pick
from qwen35.tokenizer import Tokenizer
from reference.model import Model
from tests.support.decoding import decoder


@torch.inference_mode()
def drafts_from_scratch(model: Model, ids: list[int], depth: int, vocab: int) -> list[int]:
    """The drafts after `ids`: trunk and head over the whole sequence, then the chain, fresh caches."""
    cache = model.new_cache()
    hidden = model(torch.tensor([ids[:-1]]), cache)
    state = model.draft(torch.tensor([ids[1:]]), hidden, cache)[:, -1:]
    drafts = [int(model.lm_head(state)[0, 0, :vocab].argmax())]
    while len(drafts) < depth:
        state = model.draft(torch.tensor([drafts[-1:]]), state, cache)
        drafts.append(int(model.lm_head(state)[0, 0, :vocab].argmax()))
    return drafts


@torch.inference_mode()
def rounds(stop: frozenset[int]) -> tuple[set[int], set[int]]:
    """Check twelve rounds of drafts. Returns the tokens that were drafted, and those of the text."""
    model, tokenizer = load(TINY, dtype=torch.float64), Tokenizer(TINY)
    ids = tokenizer.encode((TINY / "heldout.txt").read_text()[:2000])[:70]
    sampling = Sampling(temperature=0.7, seed=5, vocab=tokenizer.size)
    cache = model.new_cache()
    hidden = prefill(model, ids, cache, chunk=64, draft=True)
    token = pick(model.lm_head(hidden)[0, 0], len(ids), sampling)
    drafting = decoder(model, cache, token, hidden, 3, sampling, stop)
    drafted: list[list[int]] = []
    draft = drafting._draft
    drafting._draft = lambda depth: drafted.append(draft(depth)) or drafted[-1]
    sequence = [*ids, token]
    accepted = []
    for _ in range(12):
        picked = [token for token, _ in drafting.round(limit=10)]
        assert drafted[-1] == drafts_from_scratch(model, sequence, 3, tokenizer.size)
        assert cache.mtp is not None
        assert cache.mtp.length == len(sequence) - 1
        sequence += picked
        accepted.append(len(picked) - 1)
    assert 0 in accepted and max(accepted) > 1
    return {token for drafts in drafted for token in drafts}, set(sequence[len(ids) :])


def test_every_round_drafts_as_from_scratch() -> None:
    """float64 avoids near-ties. The prompt crosses the grid, and some drafts are refused. If a
    refused draft would have ended the text, the head goes on from the same state."""
    drafted, text = rounds(frozenset())
    refused = drafted - text
    assert refused
    assert rounds(frozenset(refused)) == (drafted, text)
