"""A decoder layer for the rows of a prompt."""

from typing import Any

from torch import Tensor

from fast.launch import Scratch, Work, run
from fast.linear import Norm
from fast.prefill import attention, deltanet, moe
from fast.prefill.linear import normed


def prefilled(work: Any, node: Any, x: Tensor, *state: Any) -> Tensor:
    """Build the work of a pass with the function `work`, and run it. x [1, T, D] bf16 -> [1, T,
    D]."""
    scratch = Scratch(x.device)
    todo, out = work(node, x[0], *state, scratch)
    run(todo, x.device)
    return out[None]


def work(layer: Any, x: Tensor, state: Any, scratch: Scratch) -> tuple[list[Work], Tensor]:
    """The work of a `fast.layer.DecoderLayer` for x [N, D] bf16, and its output [N, D] bf16.

    The output is filled when the work runs. The work also advances `state` past the rows.
    """
    before: Norm = layer.input_layernorm
    between: Norm = layer.post_attention_layernorm
    first, rows = normed(x, before, scratch, name="normed")
    mixer = deltanet if layer.is_linear else attention
    mixing, mixed = mixer.work(layer.mixer, rows, state, scratch, residual=x)
    second, rows = normed(mixed, between, scratch, name="normed")
    mlp: Any = layer.feed_forward
    feed_forward = moe.mlp if hasattr(mlp, "gate_up") else moe.block
    feeding, out = feed_forward(mlp, rows, scratch, residual=mixed)
    return [first, *mixing, second, *feeding], out
