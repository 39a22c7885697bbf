"""One decoder layer: a mixer and a feed-forward, each behind a norm and added to the residual stream."""

from torch import Tensor, nn

from qwen35.cache import DeltaState, KVCache
from qwen35.config import Config, LayerType
from reference.attention import GatedAttention
from reference.deltanet import GatedDeltaNet
from reference.moe import MLP, SparseMoeBlock
from reference.norm import RMSNorm


class DecoderLayer(nn.Module):
    """x: [B, T, D] -> [B, T, D]. `state` is the mixer's: KVCache or DeltaState, updated in place.

    The mixer is called `self_attn` or `linear_attn`, as in the checkpoint.
    """

    def __init__(self, config: Config, layer_type: LayerType, sparse: bool) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.is_linear = layer_type == "linear_attention"
        self.input_layernorm = RMSNorm(D, eps)
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = SparseMoeBlock(config) if sparse else MLP(D, config.intermediate_size)

    def forward(self, x: Tensor, state: KVCache | DeltaState) -> Tensor:
        mixer = self.linear_attn if self.is_linear else self.self_attn
        after_mixer = x + mixer(self.input_layernorm(x), state)
        return after_mixer + self.mlp(self.post_attention_layernorm(after_mixer))
