"""Gated delta net: linear attention with a matrix per head as memory. Each token decays and corrects it.

Each value head has a state S [K, V]. A token multiplies it by exp(g), compares the value that it then
returns for key k with v, and writes the difference with strength beta. `recurrent` does this token by
token; `chunk` computes the same from 64 tokens at once (Yang et al. 2024, arXiv 2412.06464).
"""

import torch
from einops import repeat
from torch import Tensor, nn

from qwen35.cache import DeltaState
from qwen35.config import Config
from reference.activation import sigmoid, silu, softplus, wide
from reference.linear import DECODE_ROWS, GRID, Linear
from reference.norm import RMSNormGated


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gated delta rule, one token after the other.

    q, k: [B, T, HV, K], normalised, q scaled; v: [B, T, HV, V]; g: [B, T, HV] log decay <= 0;
    beta: [B, T, HV] in 0..1; state: [B, HV, K, V]. All float32 (or float64).
    Returns the read-outs [B, T, HV, V] and the state after each token (new tensors).
    """
    B, _, HV, _ = v.shape
    outputs, states = [], []
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, g.exp()[..., None], beta[..., None]))
    memory = state.flatten(0, 1)  # [B * HV, K, V]
    for q_t, k_t, v_t, decay, strength in zip(*(x.split(1, dim=1) for x in rows), strict=True):
        decayed = memory * decay
        recalled = k_t @ decayed  # [B * HV, 1, V], what the memory holds for this key
        delta = strength * (v_t - recalled)
        memory = torch.baddbmm(decayed, k_t.transpose(1, 2), delta)
        outputs.append(q_t @ memory)  # [B * HV, 1, V]
        states.append(memory.unflatten(0, (B, HV)))
    return torch.cat(outputs, dim=1).unflatten(0, (B, HV)).transpose(1, 2), states


def chunk(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gated delta rule, GRID tokens at a time. Arguments and read-outs are those of `recurrent`; the
    states are those after each chunk.

    Inside a chunk the corrections of earlier tokens enter those of later ones through a unit lower
    triangular system (the WY form); only the state passes from chunk to chunk.
    """
    outputs, states = [], []
    by_head = (x.transpose(1, 2).contiguous() for x in (q, k, v, g, beta))
    for q_c, k_c, v_c, g_c, beta_c in zip(*(x.split(GRID, dim=2) for x in by_head), strict=True):
        log_decay = g_c.cumsum(-1)[..., None]  # [B, HV, C, 1], since the chunk's start
        # decay[i, j] = exp(sum of g over j+1..i), lower triangle: above it, exp would overflow.
        decay = (log_decay - log_decay.transpose(2, 3)).tril().exp().tril()  # [B, HV, C, C]
        strength = beta_c[..., None]  # [B, HV, C, 1]
        k_t = k_c.transpose(2, 3)

        overlap = (strength * k_c) @ k_t * decay  # only what is below the diagonal counts
        from_start = log_decay.exp()
        # Each token's correction, if no token of the chunk came before it.
        wanted = strength * (v_c - from_start * (k_c @ state))
        delta = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)

        inner = q_c @ k_t * decay  # [B, HV, C, C]
        outputs.append(from_start * (q_c @ state) + inner @ delta)  # [B, HV, C, V]
        to_end = decay[..., -1, :, None]  # [B, HV, C, 1]
        state = from_start[:, :, -1:] * state + (k_c * to_end).transpose(2, 3) @ delta
        states.append(state)
    return torch.cat(outputs, dim=2).transpose(1, 2), states


def causal_conv1d(rows: Tensor, weight: Tensor) -> Tensor:
    """Depthwise causal convolution over time, then SiLU, in float32.

    rows: [B, taps - 1 + T, C], the last taps - 1 inputs before the pass, then its own; weight:
    [C, 1, taps], whose last tap is the current token's. Returns [B, T, C]. The taps are added one after
    the other, since a library's convolution may sum in another order for another T.
    """
    taps = wide(weight)[:, 0].unbind(-1)  # [C] each
    rows_wide = wide(rows)
    T = rows.shape[1] - (len(taps) - 1)
    mixed = rows_wide[:, :T] * taps[0]
    for j in range(1, len(taps)):
        mixed = torch.addcmul(mixed, rows_wide[:, j : j + T], taps[j])
    return silu(mixed)


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last axis (the sum, not the mean: eps is not scaled)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class GatedDeltaNet(nn.Module):
    """x: [B, T, D], the tokens after those that `state` has seen -> [B, T, D]; updates `state`.

    A decode pass (T <= DECODE_ROWS) runs token by token and leaves the state after each token, so that
    rejected drafts can be rolled back.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_k_heads = config.linear_num_key_heads
        self.num_v_heads = config.linear_num_value_heads
        self.head_k_dim = config.linear_key_head_dim
        self.head_v_dim = config.linear_value_head_dim
        value_dim = self.num_v_heads * self.head_v_dim
        self.in_proj_qkv = Linear(D, config.conv_dim)  # rows: all of q, all of k, all of v
        self.in_proj_z = Linear(D, value_dim)
        self.in_proj_b = Linear(D, self.num_v_heads)
        self.in_proj_a = Linear(D, self.num_v_heads)
        taps = config.linear_conv_kernel_dim
        self.conv1d = nn.Conv1d(
            config.conv_dim, config.conv_dim, taps, groups=config.conv_dim, bias=False
        )
        self.A_log = nn.Parameter(torch.zeros(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.ones(self.num_v_heads))
        self.norm = RMSNormGated(self.head_v_dim, config.rms_norm_eps, config.output_gate_type)
        self.out_proj = Linear(value_dim, D)

    def forward(self, x: Tensor, state: DeltaState) -> Tensor:
        B, T, _ = x.shape
        rows = torch.cat((state.conv, self.in_proj_qkv(x)), dim=1)  # [B, taps - 1 + T, C]
        mixed = causal_conv1d(rows, self.conv1d.weight)  # [B, T, C], float32
        z = self.in_proj_z(x).view(B, T, self.num_v_heads, self.head_v_dim)
        beta = sigmoid(wide(self.in_proj_b(x)))  # [B, T, HV]
        a = wide(self.in_proj_a(x))
        g = -wide(self.A_log).exp() * softplus(a + wide(self.dt_bias))  # [B, T, HV], log decay

        value_dim = self.num_v_heads * self.head_v_dim
        qk_flat, v_flat = mixed.split([mixed.shape[-1] - value_dim, value_dim], dim=-1)
        v = v_flat.unflatten(-1, (-1, self.head_v_dim))  # [B, T, HV, V]
        qk = l2norm(qk_flat.unflatten(-1, (2, -1, self.head_k_dim)))  # [B, T, 2, H, K]
        # A key head serves HV / H consecutive value heads.
        shared = self.num_v_heads // self.num_k_heads
        q, k = repeat(qk, "B T two H K -> two B T (H shared) K", shared=shared)  # [B, T, HV, K]

        rule = recurrent if T <= DECODE_ROWS else chunk
        scaled_q = q * self.head_k_dim**-0.5
        read, states = rule(scaled_q, k, v, g=g, beta=beta, state=state.recurrent)  # [B, T, HV, V]
        state.advance(rows, states)
        return self.out_proj(self.norm(read.to(x.dtype), z).flatten(2))
