"""Memory that the rounds of the fast path ask for. The rounds themselves need a GPU or the emulator
(tests/fast/test_step.py)."""

import pytest

from fast.target import MAX_ROWS
from qwen35 import step_decoder
from qwen35.errors import InputError
from qwen35.generation import Generation
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


@pytest.mark.parametrize("depth", [MAX_ROWS, 100])
def test_a_depth_that_alone_keeps_the_rounds_from_the_fast_path_is_refused(
    monkeypatch: pytest.MonkeyPatch, depth: int
):
    """They would run as the reference's rounds in silence. On the reference's path any depth is right."""
    model = load("tiny")
    Generation(model, [1, 2], 4, Sampling(), frozenset(), depth)
    monkeypatch.setattr(step_decoder, "runs_as_step", lambda model, depth: depth < MAX_ROWS)
    said = f"draft_tokens = {depth}; expected at most 7, which the fast path verifies in one pass"
    with pytest.raises(InputError, match=said):
        Generation(model, [1, 2], 4, Sampling(), frozenset(), depth)
    Generation(model, [1, 2], 4, Sampling(), frozenset(), MAX_ROWS - 1)
