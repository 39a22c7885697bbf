"""`tools.bench prefill --peers` compares the same operation, and the launches that belong to it."""

import pytest
import torch

pytest.importorskip("triton")

from tests.support.fast_cases import CPU
from tests.support.fast_nodes import a_pass, fast_node
from tests.support.prefill_nodes import WORK, Poisoned, state_of
from tools.bench import prefill_peers
from tools.gfx950.target import emulate


@pytest.mark.parametrize("length", [0, 37])
def test_torch_attends_to_the_same_keys(length: int) -> None:
    """Behind a context, and without one. Ours is gated; the gate is taken back."""
    what = a_pass("self_attn", 21, length=length)
    work, _ = WORK["self_attn"](
        fast_node(what.node), what.x, state_of(what, torch.bfloat16), Poisoned(CPU)
    )
    emulate(work)
    ours, theirs = prefill_peers.attention(work)
    a = vars(ours)["arguments"]
    gates = a["projected"][:, : 2 * a["H"] * a["K"]].view(21, a["H"], 2, a["K"])[:, :, 1]
    read = a["out"].float().view(21, a["H"], a["K"]) / gates.float().sigmoid()
    other = theirs()
    assert isinstance(other, torch.Tensor)
    assert torch.allclose(read, other[0].transpose(0, 1).float(), rtol=0.05, atol=0.02)


def test_the_launches_of_the_delta_rule() -> None:
    what = a_pass("linear_attn", 70)
    work, _ = WORK["linear_attn"](
        fast_node(what.node), what.x, state_of(what, torch.bfloat16), Poisoned(CPU)
    )
    names = [
        one.name.split()[1] for one in prefill_peers.kernels_of(work, prefill_peers.DELTA_RULE)
    ]
    assert names == ["solve", "write", "erase", "scan", "read"]
