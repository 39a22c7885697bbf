"""Faults that several tests plant."""

import torch
from torch import Tensor


def delta_rule_with_late_decay(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The delta rule with a fault: the state decays after it is read, not before."""
    outputs, states = [], []
    for t in range(q.shape[1]):
        recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        delta = beta[:, t, :, None] * (v[:, t] - recalled)
        decayed = g[:, t, :, None, None].exp() * state
        state = decayed + k[:, t, :, :, None] * delta[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        states.append(state)
    return torch.stack(outputs, 1), states
