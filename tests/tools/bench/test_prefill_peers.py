"""`tools.bench prefill --peers` compares the same operation, and the launches that belong to it."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from fast.launch import Work
from fast.prefill.layer import on_state
from tests.support.fast_cases import CPU
from tests.support.fast_nodes import Pass, a_pass, fast_node
from tests.support.prefill_nodes import WORK, Poisoned, state_of
from tools.bench import gpu, prefill_peers
from tools.gfx950.target import emulate


def work_of(what: Pass) -> list[Work]:
    node, state = fast_node(what.node), state_of(what, torch.bfloat16)
    return on_state(WORK[what.kind], node, what.x, state, Poisoned(CPU))[0]


@pytest.mark.parametrize("length, fp8", [(0, False), (37, False), (37, True)])
def test_torch_attends_to_the_same_keys(length: int, fp8: bool) -> None:
    """Behind a context, and without one. Ours is gated; the gate is taken back. A cache in e4m3 is
    decoded by a launch that counts as ours."""
    what = a_pass("self_attn", 21, length=length, fp8=fp8)
    work = work_of(what)
    emulate(work)
    _, theirs = prefill_peers.attention(work)
    *before, launch = prefill_peers.kernels_of(work, ["decode", "attend"])
    assert len(before) == fp8
    a = launch.arguments
    gates = a["projected"][:, : 2 * a["H"] * a["K"]].view(21, a["H"], 2, a["K"])[:, :, 1]
    read = a["out"].float().view(21, a["H"], a["K"]) / gates.float().sigmoid()
    other = theirs()
    assert isinstance(other, torch.Tensor)
    assert torch.allclose(read, other[0].transpose(0, 1).float(), rtol=0.05, atol=0.02)


def test_the_launches_of_the_delta_rule() -> None:
    what = a_pass("linear_attn", 70)
    work = work_of(what)
    names = [
        one.name.split()[1] for one in prefill_peers.kernels_of(work, prefill_peers.DELTA_RULE)
    ]
    assert names == ["solve", "scan", "read"]


def test_the_published_model_in_transformers() -> None:
    model = prefill_peers.in_transformers("35B-A3B", torch.device("meta"))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == 34.7
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training


def test_the_row_of_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of theirs starts without a cache, and keeps one. Its head sees the last row alone."""
    calls: list[dict[str, object]] = []

    def passes(call: Callable[[], object], repeats: int) -> list[float]:
        call()
        return [30.0] * repeats

    ids = torch.zeros(1, 9, dtype=torch.int64)
    monkeypatch.setattr(gpu, "events", passes)
    monkeypatch.setattr(
        prefill_peers, "in_transformers", lambda *_: lambda given, **more: calls.append(more)
    )
    (row,) = prefill_peers.row_of_model("35B-A3B", 20.0, ids, 3)
    assert row["us"] == 20 and row["peer_us"] == row["peer_us_again"] == 30
    assert row["peer_over_ours"] == 1.5
    assert calls == [{"use_cache": True, "logits_to_keep": 1}] * 2
