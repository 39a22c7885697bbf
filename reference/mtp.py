"""The multi-token-prediction head: one decoder layer that guesses the token after the next."""

import torch
from torch import Tensor, nn

from qwen35.cache import KVCache
from qwen35.config import Config
from reference.layer import DecoderLayer
from reference.linear import Linear
from reference.norm import RMSNorm


class MTP(nn.Module):
    """Row t takes the embedding of token t + 1 and the trunk's hidden state of token t (after its final
    norm); through the shared lm_head its output proposes token t + 2.

    embeds, hidden: [B, T, D] -> [B, T, D]. To draft further, feed the output back as `hidden`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(D, eps)
        self.pre_fc_norm_hidden = RMSNorm(D, eps)
        self.fc = Linear(2 * D, D)  # columns: the embedding's half first, then the hidden state's
        sparse = config.num_experts > 0
        self.layers = nn.ModuleList([DecoderLayer(config, "full_attention", sparse)])
        self.norm = RMSNorm(D, eps)

    def forward(self, embeds: Tensor, hidden: Tensor, cache: KVCache) -> Tensor:
        both = (self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(hidden))
        fused = self.fc(torch.cat(both, dim=-1))  # [B, T, D]
        return self.norm(self.layers[0](fused, cache))
