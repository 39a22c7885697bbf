"""Run the fast prefill nodes in the gfx950 emulator, and compare them with the reference.

Before it is written, every buffer is filled with NaN, or with indices that are outside of every
array. The kinds of findings are those of tests/support/fast_cases.py.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fast.launch import Scratch, Work
from fast.prefill import attention, deltanet, layer
from qwen35.cache import DeltaState, FP8KVCache, KVCache
from tests.support.fast_cases import CPU, NOWHERE, judged
from tests.support.fast_nodes import Outcome, Pass, fast_node, numbers
from tools.gfx950.emulator import EmulatorError
from tools.gfx950.target import emulate

WORK: dict[str, Callable[..., tuple[list[Work], Tensor]]] = {
    "linear_attn": deltanet.work, "self_attn": attention.work, "layer": layer.on_layer,
}  # fmt: skip


class Poisoned(Scratch):
    """Buffers that are filled with NaN or invalid indices."""

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        buffer = super().__call__(name, *shape, dtype=dtype)
        return buffer.fill_(torch.nan if dtype.is_floating_point else NOWHERE)


def state_of(what: Pass, dtype: torch.dtype) -> DeltaState | KVCache:
    """A copy of the state before the pass, in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(what.state, DeltaState):
        return DeltaState(
            what.state.conv.to(dtype, copy=True), what.state.recurrent.to(wide, copy=True)
        )
    if isinstance(what.state, FP8KVCache):
        return what.state.copy()
    k, v = (held.to(dtype, copy=True) for held in (what.state.k, what.state.v))
    return KVCache(k, v, length=what.length)


def slow(what: Pass, dtype: torch.dtype) -> Outcome:
    """The result of the reference in `dtype`, with all rows in one pass."""
    node, state = copy.deepcopy(what.node).to(dtype), state_of(what, dtype)
    out = node(what.x[None].to(dtype), state)[0]
    return Outcome(out, left(what, state))


def left(what: Pass, state: Any) -> dict[str, Tensor]:
    """The state after a pass: the new keys and values by position, or the delta net's state by
    head."""
    held = numbers(state)
    if isinstance(state, KVCache):
        return {name: rows[0, :, what.length :].transpose(0, 1) for name, rows in held.items()}
    return {name: tensor[0] for name, tensor in held.items()}


def prefilled(
    what: Pass, cuts: Sequence[int] = (), *, batch: int = 32, seed: int | None = None
) -> Outcome:
    """Run the rows in the emulator, in passes that end at `cuts` and at the last row."""
    node, state = fast_node(what.node), state_of(what, torch.bfloat16)
    outputs: list[Tensor] = []
    for first, last in zip([0, *cuts], [*cuts, len(what.x)], strict=True):
        rows = what.x[first:last]
        work, out = layer.on_state(WORK[what.kind], node, rows, state, Poisoned(CPU))
        emulate(work, batch=batch, seed=seed)
        outputs.append(out)
    return Outcome(torch.cat(outputs), left(what, state))


def prefill_findings(what: Pass, cuts: Sequence[int] = ()) -> list[str]:
    """The findings on the output of a pass, and on the state after it."""
    try:
        got = prefilled(what, cuts)
    except EmulatorError as error:
        return [f"memory: {error}"]
    yardstick, truth = slow(what, torch.bfloat16), slow(what, torch.float64)
    found = judged("out", got.out, yardstick.out, truth.out)
    for key, held in got.state.items():
        found += judged(key, held, yardstick.state[key], truth.state[key])
    return found


def cut_findings(what: Pass, cuts: Sequence[int]) -> list[str]:
    """Findings on bits that differ between several passes and a single one."""
    whole, parts = prefilled(what), prefilled(what, cuts)
    same = {"out": (parts.out, whole.out)}
    same |= {name: (parts.state[name], whole.state[name]) for name in whole.state}
    return [f"bits: {name}" for name, (a, b) in same.items() if not torch.equal(a, b)]
