"""A decoder layer for the rows of a prompt."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fast.launch import Scratch, Work, run
from fast.linear import Norm
from fast.prefill import attention, deltanet, moe
from fast.prefill.linear import normed
from fast.prefill.span import Span
from fast.state import Delta, Keys, Rope
from qwen35.cache import KVCache


def prefilled(work: Any, node: Any, x: Tensor, state: Any) -> Tensor:
    """Build the work of a pass with the function `work`, and run it. x [1, T, D] bf16 -> [1, T,
    D]. state: that of the reference, which is advanced."""
    todo, out = on_state(work, node, x[0], state, Scratch(x.device))
    run(todo, x.device)
    return out[None]


def on_state(
    work: Any, node: Any, x: Tensor, state: Any, scratch: Scratch
) -> tuple[list[Work], Tensor]:
    """The work of a pass over x [N, D] bf16, with the function `work` of a mixer or of a layer, and its
    output. The last of the work advances the reference's `state`."""
    end = N = len(x)
    mixer = getattr(node, "mixer", node)
    if isinstance(state, KVCache):
        end = state.length + N
        state.grow(end)
    own, start, rope = mixer.begin(x[None], state)
    todo, out = work(node, x, own, Span.of(start, x, end), rope, scratch)
    if isinstance(state, KVCache):
        advance = partial(mixer.end, own, state, N)
    else:  # `begin` places the first row of a delta net at position `taps`
        advance = partial(own.give, state, state.conv.shape[1] + N)
    return [*todo, advance], out


def on_layer(
    layer: Any, x: Tensor, state: Delta | Keys, span: Span, rope: Rope | None, scratch: Scratch
) -> tuple[list[Work], Tensor]:
    """The work of a `fast.layer.DecoderLayer` for x [N, D] bf16, and its output [N, D] bf16.

    The output is filled when the work runs. The work also advances `state` past the rows.
    """
    before: Norm = layer.input_layernorm
    between: Norm = layer.post_attention_layernorm
    first, rows = normed(x, before, scratch, name="normed")
    mixer: Any = deltanet if layer.is_linear else attention
    mix = partial(mixer.work, layer.mixer, rows, state, span, rope, scratch)
    mixing, mixed = added_over_ranks(layer, mix, x, scratch)
    second, rows = normed(mixed, between, scratch, name="normed")
    mlp: Any = layer.feed_forward
    feed_forward = moe.mlp if hasattr(mlp, "gate_up") else moe.block
    feeding, out = added_over_ranks(
        layer, partial(feed_forward, mlp, rows, span.filled, scratch), mixed, scratch
    )
    return [first, *mixing, second, *feeding], out


def added_over_ranks(
    layer: Any, work: Callable[..., tuple[list[Work], Tensor]], residual: Tensor, scratch: Scratch
) -> tuple[list[Work], Tensor]:
    """The work of a mixer or a feed-forward, summed over the ranks if the layer is a part, and its output
    with the residual."""
    if layer.ranks is None:
        return work(residual=residual)
    own, part = work()
    total, out = layer.ranks.total(part, residual, scratch)
    return [*own, total], out
