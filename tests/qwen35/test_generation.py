"""Prefill by itself."""

import pytest
import torch

from qwen35.generation import prefill
from tests.support.family import small_model


@pytest.mark.parametrize(("draft", "rows"), [(False, 0), (True, 69)])
def test_the_drafting_head_runs_only_where_drafts_are_wanted(draft: bool, rows: int) -> None:
    """It stays one token behind."""
    model = small_model("27B")
    cache = model.new_cache()
    with torch.inference_mode():
        hidden = prefill(model, [1] * 70, cache, chunk=64, draft=draft)
    assert cache.mtp is not None
    assert (cache.length, cache.mtp.length) == (70, rows)
    assert hidden.shape == (1, 1, 64)
