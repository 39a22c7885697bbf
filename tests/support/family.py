"""A small shape of every family member, and models with random weights of these shapes.

The structure is that of the member: 3:1 layers, head ratios, partial RoPE, top-k of many experts,
tied or untied embeddings. Sizes differ from each other, so that mix-ups show: K != V, I != shared I,
and H != HV but in the 0.8B. The only square matrices are those of keys and values where there are two
KV heads.
"""

from typing import Any

import torch

from qwen35.config import Config
from reference.model import Model

SHARED: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}


def _dense(heads: int, kv: int, value_heads: int, tied: bool, layers: int = 8) -> dict[str, Any]:
    return SHARED | {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": value_heads,
        "intermediate_size": 96,
        "tie_word_embeddings": tied,
    }


def _moe(heads: int, value_heads: int, experts: int, top_k: int, shared: int) -> dict[str, Any]:
    return SHARED | {
        "model_type": "qwen3_5_moe_text",
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": value_heads,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": shared,
        "tie_word_embeddings": False,
    }


FAMILY: dict[str, dict[str, Any]] = {
    "0.8B": _dense(4, 1, 4, True),
    "4B": _dense(8, 2, 8, True),
    "27B": _dense(6, 1, 12, False, layers=12),
    "35B-A3B": _moe(8, 4, 16, 4, 48),
    "122B-A10B": _moe(8, 8, 16, 4, 48),
    "397B-A17B": _moe(8, 8, 24, 5, 40),
    "Qwen3-Next": _moe(8, 4, 16, 4, 48) | {"model_type": "qwen3_next"},
}


def randomise(model: torch.nn.Module, seed: int, scale: float = 1.0) -> None:
    """Give all parameters random values in place, also norms, A_log and dt_bias."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        if p.dim() > 1:
            p.data.copy_(noise * scale * p.shape[-1] ** -0.5)
        elif name.endswith("linear_attn.norm.weight"):
            p.data.copy_(1 + 0.3 * noise)
        else:
            p.data.copy_(0.3 * noise)


def small_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    """A random model of a family member's shape, in eval mode and without gradients."""
    model = Model(Config.from_dict(FAMILY[name]))
    randomise(model, seed)
    return model.to(dtype).eval().requires_grad_(False)
