"""The passes of a prompt in a step's memory: what their launches are handed, and what they leave, on a
model whose numbers are exact (`tests/support/coded_model.py`)."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fast import prompt
from fast.launch import Launch, Work
from fast.prompt import Prompt
from fast.state import State
from tests.support.coded_model import (
    CONFIG,
    VOCABULARY,
    D,
    coded_model,
    compute_by_torch,
    hidden,
    read,
    weight_of_head,
)
from tests.support.plain_launches import in_turn
from tests.support.prefill_nodes import Poisoned

TARGET = "gfx950"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers hold NaN at first."""
    compute_by_torch(monkeypatch)
    monkeypatch.setattr(prompt, "Scratch", Poisoned)


def made(capacity: int, drafts: int = 1, target: str = TARGET) -> Prompt:
    model = coded_model(target, weight_of_head())
    state = State.empty(CONFIG, capacity, drafts, CPU)
    return Prompt(model, model.embed_tokens.weight, state)


def text(length: int) -> list[int]:
    return [(37 * i + 11) % VOCABULARY for i in range(length)]


def check_states(found: Prompt, ids: list[int]) -> None:
    """The trunk has read every token, and the head each token with the state before it."""
    assert found.state.layers[0].keys[0, : len(ids), 0].tolist() == ids  # pyright: ignore
    if found.state.mtp is not None:
        pairs = [[i, s] for i, s in zip(ids[1:], read(ids)[:-1], strict=True)]
        assert found.state.mtp.keys[0, : len(ids) - 1, :2].tolist() == pairs


@pytest.mark.parametrize("cuts", [
    (1,), (2,), (64,), (65,), (1, 2), (1, 65), (3, 8, 10), (64, 128), (64, 70, 334), (256, 257),
])  # fmt: skip
@pytest.mark.parametrize("drafts", [0, 1])
def test_passes_leave_what_a_text_leaves(cuts: tuple[int, ...], drafts: int):
    ids, before = text(cuts[-1]), None
    found = made(400, drafts)
    for first, last in zip((0, *cuts), cuts, strict=False):
        before = found.extend(ids[first:last], before, first)
        assert torch.equal(before, hidden(read(ids[:last])[-1]))
    check_states(found, ids)
    sizes = {last - first for first, last in zip((0, *cuts), cuts, strict=False)}
    trunk = {min(room for room in prompt.ROOMS if room >= size) for size in sizes}
    assert trunk <= set(found.passes) <= {64, 256, 1024}


@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_the_trunk_gives_the_state_after_each_token(target: str):
    """As many rows as it was given, also behind a longer pass in the same room."""
    found, ids = made(128, target=target), text(61)
    for first, count in ((0, 61), (0, 3), (3, 58)):
        out = found.trunk(ids[first : first + count], first)
        assert out.dtype == torch.bfloat16
        states = read(ids)[first : first + count]
        assert torch.equal(out, torch.stack([hidden(state) for state in states]))


def test_the_head_takes_each_token_with_a_given_state():
    found, ids = made(128), text(9)
    states = read(ids)
    given = torch.stack([hidden(state) for state in states[:-1]])
    found.draft(ids[1:5], given[:4], 0)
    found.draft(ids[5:], given[4:], 4)
    assert found.state.mtp is not None
    pairs = [[i, s] for i, s in zip(ids[1:], states[:-1], strict=True)]
    assert found.state.mtp.keys[0, :8, :2].tolist() == pairs
    chosen = found.passes[64]
    assert torch.equal(chosen.hidden[:4], given[4:])
    assert chosen.mtp.work[-1] is not chosen.trunk.work[-1]


def names(work: Iterable[Work]) -> list[str]:
    return [one.name if isinstance(one, Launch) else "torch" for one in work]


def test_the_launches_of_a_pass():
    found = made(128)
    found.extend(text(2), None, 0)
    chosen = found.passes[64]
    assert names(chosen.trunk.work) == ["torch", "torch", f"prefill norm D={D}"]
    norms = [f"prefill norm D={D}"] * 2
    assert names(chosen.mtp.work) == [
        "torch", *norms, "torch", f"prefill mtp_fc N={D} K={2 * D}", "torch",
    ]  # fmt: skip
    assert [list(x.shape) for x in (chosen.ids, chosen.start, chosen.filled, chosen.hidden)] == [
        [64], [1], [1], [64, D],
    ]  # fmt: skip
    assert chosen.hidden.dtype == torch.bfloat16 and chosen.normed.shape == (64, D)
    assert not hasattr(made_and_run(0), "mtp")


def made_and_run(drafts: int) -> Any:
    found = made(64, drafts)
    found.trunk(text(1), 0)
    return found.passes[64]


def test_all_buffers_lie_where_the_table_does():
    found = made(64)
    with torch.device("meta"):
        chosen = found._room(1)
    work = [one for one in (*chosen.trunk.work, *chosen.mtp.work) if isinstance(one, Launch)]
    given = [x for launch in work for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
    own = [chosen.ids, chosen.start, chosen.filled, chosen.hidden, chosen.normed]
    assert {x.device for x in (*given, *own)} == {CPU}
    assert chosen.trunk.device == chosen.mtp.device == CPU


def test_the_passes_of_all_rooms_have_their_buffers_from_one_place():
    """And a pass is made once."""
    found = made(400)
    before = found.extend(text(5), None, 0)
    first = found.passes[64]
    found.extend(text(70)[5:], before, 5)
    assert set(found.passes) == {64, 256} and found._room(64) is first
    shapes = {key[1] for key in found.scratch._held}
    assert {(64, D), (256, D)} <= shapes and isinstance(found.scratch, Poisoned)


@pytest.mark.parametrize(("rows", "first", "fits"), [
    (1, 0, True), (64, 0, True), (64, 36, True), (1, 99, True),
    (64, 37, False), (1, 100, False), (65, 0, False),
])  # fmt: skip
def test_rows_that_there_is_no_room_for_are_a_mistake(rows: int, first: int, fits: bool):
    """Of the room of a pass, and of the memory."""
    found = made(100)
    chosen = found._room(1)
    if fits:
        chosen.place(text(rows), first)
        assert (int(chosen.start), int(chosen.filled)) == (first, rows)
        assert chosen.ids[:rows].tolist() == text(rows)
        return
    with pytest.raises(AssertionError):
        chosen.place(text(rows), first)


@pytest.mark.parametrize("drafts", [0, 1])
def test_the_smallest_passes_are_prepared_and_then_replayed(
    drafts: int, monkeypatch: pytest.MonkeyPatch
):
    replayed: list[int] = []

    def captured(work: list[Work]) -> Any:
        def replay() -> None:
            replayed.append(len(work))
            in_turn(work)

        return SimpleNamespace(replay=replay)

    monkeypatch.setattr("fast.graph.captured", captured)
    found, ids = made(64, drafts), text(7)
    found.prepare()
    assert set(found.passes) == {64} and not replayed
    last = found.extend(ids, None, 0)
    assert torch.equal(last, hidden(read(ids)[-1])) and set(found.passes) == {64}
    chosen = found.passes[64]
    assert replayed == [len(chosen.trunk.work), *([len(chosen.mtp.work)] if drafts else [])]
    check_states(found, ids)
