"""Memory that the rounds of the fast path ask for. The rounds themselves need a GPU or the emulator
(tests/fast/test_step.py)."""

import pytest

from fast.target import MAX_ROWS
from qwen35 import step_decoder
from qwen35.load import load
from qwen35.sampling import Sampling


@pytest.mark.parametrize(("room", "depth"), [(1, 0), (1, 3), (5, 3), (100, 7)])
def test_there_is_room_for_a_round_and_for_the_last_pass_over_a_tail(
    monkeypatch: pytest.MonkeyPatch, room: int, depth: int
):
    """That pass has eight rows, however few tokens are left of the prompt."""
    asked: list[int] = []
    monkeypatch.setattr(
        step_decoder, "_rounds", lambda model, depth, capacity, sampling: asked.append(capacity)
    )
    step_decoder.prepared(load("tiny"), 1022, depth, Sampling(), room)
    assert asked[0] >= 1022 + MAX_ROWS - 1
    assert asked[0] >= 1022 + room + 1 + depth
