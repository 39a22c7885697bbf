"""The whole model by itself: what it is made with, and its caches; against transformers see
test_modules.py."""

import pytest
import torch

from qwen35.config import Config
from reference.model import Model
from tests.support.family import FAMILY, small_model
from tests.support.oracle import token_ids


def test_what_a_new_model_has() -> None:
    tied, untied = (Model(Config.from_dict(FAMILY[name])) for name in ("4B", "397B-A17B"))
    assert tied.folder is None and tied.kv_cache_dtype == "auto"
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_a_cache_is_where_its_model_is(kv_cache_dtype: str) -> None:
    model = small_model("4B", dtype=torch.bfloat16).to("meta")
    model.kv_cache_dtype = kv_cache_dtype
    cache = model.new_cache(batch=3)
    of_keys = torch.bfloat16 if kv_cache_dtype == "auto" else torch.float8_e4m3fn
    assert cache.layers[0].recurrent.is_meta and len(cache.layers[0].recurrent) == 3
    assert cache.layers[3].k.is_meta and cache.layers[3].k.dtype == of_keys


def test_a_cache_of_another_number_of_layers_is_an_error() -> None:
    model = small_model("4B")
    cache = model.new_cache()
    cache.layers.pop()
    with pytest.raises(ValueError, match="shorter"):
        model(token_ids(3, model), cache)


def test_a_draft_needs_a_head() -> None:
    model = small_model("4B")
    ids, hidden = token_ids(3, model), torch.zeros(1, 3, 64)
    assert model.draft(ids, hidden, model.new_cache()).shape == hidden.shape
    model.mtp = None
    with pytest.raises(AssertionError, match="no MTP head"):
        model.draft(ids, hidden, small_model("4B").new_cache())
