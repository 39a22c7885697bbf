"""The MTP head and the trunk's outputs, computed by transformers with our weights."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from reference.model import Model
from tests.support.oracle import (
    as_wide_as_the_input,
    dtype_of,
    load_into,
    their_attention_arguments,
    their_rope,
)


class OracleMTP(nn.Module):
    """The MTP head, built from parts of transformers, which has no class for it.

    Parameter names are the checkpoint's after `mtp.`. offset: the position of row 0. It should
    not matter, because RoPE is relative.
    """

    def __init__(self, theirs: Any, model: Model, offset: int = 0) -> None:
        super().__init__()
        assert model.mtp is not None
        config = type(theirs.config).from_dict(
            theirs.config.to_dict() | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        )
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        norm, layer = type(theirs.model.norm), type(theirs.model.layers[0])
        D, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = norm(D, eps)
        self.pre_fc_norm_hidden = norm(D, eps)
        self.fc = nn.Linear(2 * D, D, bias=False)
        self.layers = nn.ModuleList([layer(config, 0)])
        self.norm = norm(D, eps)
        self.to(dtype_of(model)).eval().requires_grad_(False)
        load_into(self, model.mtp, config.linear_num_key_heads, "")
        self.offset, self.config = offset, config
        self.__dict__["trunk"] = theirs  # not a submodule: not part of the head

    def new_cache(self) -> Any:
        return DynamicCache(config=self.config)

    def forward(self, ids: Tensor, hidden: Tensor, cache: Any) -> Tensor:
        """The head's output [1, T, D]. ids [1, T]: the tokens after those of hidden [1, T, D]."""
        past = cache.get_seq_length()
        with as_wide_as_the_input(hidden.dtype):
            embeds = self.trunk.model.embed_tokens(ids)
            halves = (self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(hidden))
            fused = self.fc(torch.cat(halves, dim=-1))
            arguments = their_attention_arguments(self.trunk, fused, cache, past)
            arguments["position_embeddings"] = their_rope(self.trunk, fused, past + self.offset)
            return self.norm(self.layers[0](fused, **arguments))


def their_hidden(theirs: Any, ids: Tensor, cache: Any = None) -> Tensor:
    """The trunk's hidden state after its final norm, [1, T, D]."""
    with as_wide_as_the_input(theirs.dtype):
        return theirs.model(
            ids, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state


def their_logits(theirs: Any, ids: Tensor, cache: Any = None) -> Tensor:
    """The logits, [1, T, vocab]."""
    with as_wide_as_the_input(theirs.dtype):
        return theirs(ids, past_key_values=cache, use_cache=cache is not None).logits
