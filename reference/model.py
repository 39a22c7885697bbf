"""The model: embedding, decoder layers, final norm, head, and the MTP head beside them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from qwen35.cache import Cache
from qwen35.config import Config
from reference.layer import DecoderLayer
from reference.linear import Linear
from reference.mtp import MTP
from reference.norm import RMSNorm


class Model(nn.Module):
    """Qwen3.5. Parameter names are the checkpoint's, less its prefix.

    ids: [B, T] (int64), the tokens after those that `cache` has seen -> hidden states [B, T, D] after
    the final norm; updates `cache`. `lm_head` turns hidden states into logits [B, T, vocab].

    A pass of at most DECODE_ROWS tokens is a decode pass; a longer one is prefill and must start on
    the 64-token grid (see `qwen35.generation.prefill`).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.folder: Path | None = None  # the checkpoint's folder, with the tokenizer
        self.kv_cache_dtype = "auto"  # for new caches, one of qwen35.cache.KV_CACHE_DTYPES
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, kind, config.is_sparse(i))
            for i, kind in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight  # pyright: ignore (a Parameter)
        self.mtp = MTP(config) if config.mtp_num_hidden_layers else None

    def forward(self, ids: Tensor, cache: Cache) -> Tensor:
        hidden = self.embed_tokens(ids)  # [B, T, D]
        for layer, state in zip(self.layers, cache.layers, strict=True):
            hidden = layer(hidden, state)
        cache.advance(ids.shape[1])
        return self.norm(hidden)

    def draft(self, ids: Tensor, hidden: Tensor, cache: Cache) -> Tensor:
        """Run one MTP pass, which updates `cache` -> [B, T, D]. hidden [B, T, D] of T tokens; ids [B, T]:
        the token after each of them."""
        assert self.mtp is not None and cache.mtp is not None, "this model has no MTP head"
        return self.mtp(self.embed_tokens(ids), hidden, cache.mtp)

    def new_cache(self, batch: int = 1) -> Cache:
        """An empty cache in this model's dtype and on its device."""
        device = self.embed_tokens.weight.device
        return Cache.empty(self.config, self.dtype, device, batch, self.kv_cache_dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.embed_tokens.weight.dtype
