"""Gated full attention: grouped heads, q/k norm, partial RoPE, and a sigmoid gate on the output."""

import torch
from torch import Tensor, nn

from qwen35.cache import KVCache
from qwen35.config import Config
from reference.activation import sigmoid, wide
from reference.linear import DECODE_ROWS, GRID, Linear
from reference.norm import RMSNorm
from reference.rope import apply_rope, rope_table


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention with scale K^-1/2, computed in float32; the last query sees every key.

    q: [B, H, T, K]; k, v: [B, G, P, K] with P >= T, H a multiple of G; query head h reads kv head
    h // (H / G). Returns [B, H, T, K] in q's dtype.

    Queries are computed in tiles of GRID rows, in a decode pass one at a time, and a tile reads only the
    keys up to its last row. So the bits of a query's output depend on its own position alone.
    """
    B, H, T, K = q.shape
    G, P = k.shape[1:3]
    tile = 1 if T <= DECODE_ROWS else GRID
    scaled = (wide(q) * K**-0.5).view(B, G, H // G, T, K)
    keys, values = wide(k).transpose(2, 3), wide(v)  # [B, G, K, P], [B, G, P, K]
    outputs = []
    for first in range(0, T, tile):
        rows = scaled[:, :, :, first : first + tile].flatten(2, 3)  # [B, G, H/G * t, K]
        t = rows.shape[2] // (H // G)
        seen = P - T + first + t
        scores = rows @ keys[..., :seen]  # [B, G, H/G * t, seen]
        if t > 1:  # a single query sees every key that is there
            future = torch.ones(t, seen, dtype=torch.bool, device=q.device).triu(seen - t + 1)
            scores = scores.masked_fill(future.repeat(H // G, 1), -torch.inf)
        weights = scores.softmax(-1)
        outputs.append((weights @ values[:, :, :seen]).view(B, H, t, K))
    return torch.cat(outputs, dim=2).to(q.dtype)


class GatedAttention(nn.Module):
    """x: [B, T, D] at positions cache.length .. cache.length + T - 1 -> [B, T, D]; appends to `cache`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, H, G = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.rotary_dim = config.rotary_dim
        self.rope_theta = config.rope_theta
        self.q_proj = Linear(D, H * 2 * self.head_dim)  # each head's query, then its gate
        self.k_proj = Linear(D, G * self.head_dim)
        self.v_proj = Linear(D, G * self.head_dim)
        self.o_proj = Linear(H * self.head_dim, D)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:
        B, T, _ = x.shape
        q_and_gate = self.q_proj(x).view(B, T, -1, 2 * self.head_dim)
        q_raw, gate = q_and_gate.chunk(2, dim=-1)  # [B, T, H, K] each
        k_raw = self.k_proj(x).view(B, T, -1, self.head_dim)  # [B, T, G, K]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, G, T, K]

        positions = torch.arange(cache.length, cache.length + T, device=x.device)
        cos, sin = rope_table(positions, self.rotary_dim, self.rope_theta, x.dtype)
        q = apply_rope(self.q_norm(q_raw).transpose(1, 2), cos, sin)  # [B, H, T, K]
        k = apply_rope(self.k_norm(k_raw).transpose(1, 2), cos, sin)  # [B, G, T, K]

        keys, values = cache.append(k, v)  # [B, G, P, K]
        attended = causal_attention(q, keys, values).transpose(1, 2)  # [B, T, H, K]
        return self.o_proj((attended * sigmoid(gate)).reshape(B, T, -1))
