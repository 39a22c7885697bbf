"""The passes of a prompt over a step's own state, as captured graphs.

Without a graph, a pass of few rows waits for the host, which starts a thousand launches. There is one
graph for each of several sizes. It reads the first position and the number of rows from the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fast.graph import Pass
from fast.launch import Scratch, Work
from fast.linear import Norm
from fast.prefill.layer import on_layer
from fast.prefill.linear import normed
from fast.prefill.span import Span
from fast.state import Rope, State

# Rows. A longer pass takes the GPU longer than most hosts need to start it.
ROOMS = (64, 256, 1024, 2048)


class Prompt:
    """The passes of a prompt for a model whose layers are all fast, with the whole weights of each (no
    rank's part). They compute on `state`, and take 1 to 2,048 rows."""

    def __init__(self, model: Any, table: Tensor, state: State) -> None:
        self.model, self.table, self.state = model, table, state
        self.scratch = Scratch(table.device)
        self.passes: dict[int, PromptPass] = {}

    def prepare(self) -> None:
        """Compile and capture the smallest passes, which are the end of most prompts. It runs them once,
        which overwrites the state."""
        smallest = self._room(1)
        smallest.trunk.prepare()
        if self.state.mtp is not None:
            smallest.mtp.prepare()

    def trunk(self, ids: Sequence[int], first: int) -> Tensor:
        """Run the trunk over tokens from position `first` on. Returns their hidden states after the final
        norm, [N, D] bf16, which the next pass may overwrite."""
        chosen = self._room(len(ids))
        chosen.place(ids, first)
        chosen.trunk.run()
        return chosen.normed[: len(ids)]

    def draft(self, ids: Sequence[int], hidden: Tensor, first: int) -> None:
        """Run the MTP head over rows from position `first` on, for its keys and values. hidden [N, D]
        bf16; ids: the token after each of them."""
        chosen = self._room(len(ids))
        chosen.hidden[: len(ids)] = hidden
        chosen.place(ids, first)
        chosen.mtp.run()

    def extend(self, ids: Sequence[int], before: Tensor | None, first: int) -> Tensor:
        """Run trunk and MTP head over tokens from position `first` on. Returns the trunk's hidden state
        of the last, [D]. before: the hidden state of the token before them, or None at the start."""
        computed = self.trunk(ids, first).clone()
        if self.state.mtp is not None:
            skipped = before is None
            earlier = [] if before is None else [before[None]]
            following, behind = ids[skipped:], torch.cat([*earlier, computed[:-1]])
            if following:
                self.draft(following, behind, first - 1 + skipped)
        return computed[-1]

    def _room(self, rows: int) -> "PromptPass":
        room = next(room for room in ROOMS if room >= rows)
        if room not in self.passes:
            self.passes[room] = PromptPass(self.model, self.table, self.state, room, self.scratch)
        return self.passes[room]


class PromptPass:
    """Passes of up to `room` rows.

    ids [room] int64; start, filled: as in `Span`. hidden [room, D] bf16: the input of the MTP head.
    normed [room, D] bf16: the result of the trunk. All layers share the buffers between them.
    """

    def __init__(
        self, model: Any, table: Tensor, state: State, room: int, scratch: Scratch
    ) -> None:
        device, D = table.device, table.shape[1]
        self.ids = torch.zeros(room, dtype=torch.int64, device=device)
        self.start = torch.zeros(1, dtype=torch.int32, device=device)
        self.filled = torch.ones(1, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(room, D, dtype=torch.bfloat16, device=device)
        self.end = state.capacity
        span = Span(self.start, self.filled, self.end)
        rope: Rope = state.cosine, state.sine
        x = scratch("prompt rows", room, D)

        def look_up() -> None:
            torch.index_select(table, 0, self.ids, out=x)

        work: list[Work] = [look_up]
        out = x
        for layer, own in zip(model.layers, state.layers, strict=True):
            more, out = on_layer(layer, out, own, span, rope, scratch)
            work += more
        last, self.normed = normed(
            out, Norm.from_reference(model.norm), scratch, name="prompt normed"
        )
        self.trunk = Pass([*work, last], device)
        if state.mtp is not None:
            work, _ = model.mtp.prompt_work(x, self.hidden, state.mtp, span, rope, scratch)
            self.mtp = Pass([look_up, *work], device)

    def place(self, ids: Sequence[int], first: int) -> None:
        """Prepare for these tokens, from position `first` on."""
        assert len(ids) <= len(self.ids) and first + len(ids) <= self.end
        values = torch.tensor([first, len(ids)], dtype=torch.int32).to(self.start.device)
        self.start.copy_(values[:1])
        self.filled.copy_(values[1:])
        self.ids[: len(ids)] = torch.tensor(ids).to(self.ids.device)
