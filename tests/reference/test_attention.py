"""Attention by itself; against transformers see test_modules.py."""

import torch

from reference.attention import causal_attention


def test_the_mask_is_where_the_queries_are() -> None:
    q, k = torch.empty(2, 4, 130, 8, device="meta"), torch.empty(2, 2, 140, 8, device="meta")
    out = causal_attention(q, k, k)
    assert out.is_meta and out.shape == q.shape
