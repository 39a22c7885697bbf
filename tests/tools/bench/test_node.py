"""`tools.bench node` without a GPU: what it gives the nodes, checks, counts, times and refuses."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35.cli import Parser, run
from reference.norm import RMSNorm
from tools.bench import gpu, node

HERE = "tests.tools.bench.test_node"
NORM = "layers.*.input_layernorm"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Same(nn.Module):
    """A node that calls the one that it replaces."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @classmethod
    def from_reference(cls, module: Any) -> "Same":
        return cls(module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.inner(*inputs)


class PlainWeight(Same):
    """A norm that forgets the 1 of its weight."""

    def forward(self, *inputs: Tensor) -> Tensor:
        inner: Any = self.inner
        return inputs[0] / inputs[0].square().mean(-1, keepdim=True).sqrt() * inner.weight


class Narrow(Same):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)[..., :1]


class Broken(Same):
    def forward(self, *inputs: Tensor) -> Tensor:
        raise TypeError("no kernel\nyet")


class NoGraph:
    """Runs the calls; one of the first graph, which is the replacement's, takes 2 us, others 6."""

    made, launches = 0, None

    def __init__(self, calls: list[Callable[[], Tensor]]) -> None:
        for call in calls:
            call()
        NoGraph.made += 1
        self.us = 2.0 if NoGraph.made == 1 else 6.0

    def microseconds(self, repeats: int) -> list[float]:
        TURNS.append(self.us)
        return [self.us] * repeats


TURNS: list[float] = []


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is the CPU, with a cache of 16 KB and 1000 GB/s."""
    monkeypatch.setattr(gpu, "find", lambda: (torch.device("cpu"), "sm_90"))
    monkeypatch.setattr(gpu, "Graph", NoGraph)
    monkeypatch.setattr(gpu, "read_gb_s", lambda device: 1000.0)
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 16384)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(NoGraph, "made", 0)
    TURNS.clear()


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    parser = Parser("bench node", "")
    parser.add_argument("--json", action="store_true")
    node.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        run(parser, node.main, [*map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_both_are_timed_in_turn_with_what_they_read(
    card: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 norms of 256 weights and 3 rows: 2048 bytes each, so that 4 copies make four caches."""
    status, out, err = command(
        capsys, "--swap", f"{NORM}={HERE}:Same", "--rows", 3, "--repeats", 7, "--json"
    )
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert (document["op"], document["device"], document["read_gb_s"]) == ("node", "a GPU", 1000.0)
    assert document["config"] == {
        "target": "sm_90", "model": "embedded", "swap": f"{NORM}={HERE}:Same", "nodes": 8, "rows": 3,
        "repeats": 7,
    }  # fmt: skip
    ours, reference = document["rows"]
    assert (ours["name"], reference["name"]) == (f"{HERE}:Same", "reference")
    assert (ours["us"], reference["us"], ours["times_faster"]) == (2.0, 6.0, 3.0)
    assert ours["read_bytes"] == 256 * 2 + 3 * 256 * 2
    assert ours["calls"] == 8 * 4 and not ours["in_cache"]
    assert ours["floor_us"] == pytest.approx(2048 / 1000 * 1e-3)
    assert ours["share_of_read"] == pytest.approx(ours["floor_us"] / 2.0)
    assert 0 < ours["err_x_bf16"] <= 1
    assert TURNS == [2.0, 6.0, 2.0, 6.0]


def test_what_stays_in_the_cache_has_no_share_of_memory(
    card: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(node, "MOST", 20)
    _, out, _ = command(capsys, "--swap", f"{NORM}={HERE}:Same", "--json")
    ours = json.loads(out)["rows"][0]
    assert ours["in_cache"] and ours["calls"] == 16 and "share_of_read" not in ours


def test_a_node_with_routed_experts_is_not_timed_itself(
    card: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its bytes are not told either, because a pass reads only some of its weights."""
    _, out, _ = command(capsys, "--swap", f"layers.1.mlp={HERE}:Same", "--json")
    ours, reference = json.loads(out)["rows"]
    assert ours["us"] == 2.0 and ours["read_bytes"] is None and "floor_us" not in ours
    assert "us" not in reference and "wait for the host" in reference["error"]


def test_what_is_wrong_is_not_timed(card: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = command(capsys, "--swap", f"{NORM}={HERE}:PlainWeight")
    assert (status, out) == (1, "") and TURNS == []
    assert err.count("\n") == 8 and err.startswith("layers.0.input_layernorm: error ")
    assert "times bfloat16's" in err


@pytest.mark.parametrize(
    ("swap", "words"),
    [
        (f"layers.0.linear_attn={HERE}:Same", ["layers.0.linear_attn takes a DeltaState"]),
        (f"layers.0.mlp.gate={HERE}:Same", ["layers.0.mlp.gate gives 2 tensors"]),
        (f"layers.0.mlp.experts.*={HERE}:Same", ["layers.0.mlp.experts.", "does not run"]),
        (f"{NORM}={HERE}:Narrow", ["layers.0.input_layernorm", "[1, 4, 1]", "[1, 4, 256]"]),
        (f"{NORM}={HERE}:Broken", ["layers.0.input_layernorm: TypeError: no kernel yet"]),
        (f"{NORM}x={HERE}:Same", ["matches no node"]),
        ("layers.0", ["PATTERN=MODULE:CLASS"]),
    ],
)
def test_what_cannot_be_timed_is_one_line_with_the_node(
    card: None, capsys: pytest.CaptureFixture[str], swap: str, words: list[str]
) -> None:
    status, out, err = command(capsys, "--swap", swap)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err


@needs_no_gpu
def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = command(capsys, "--swap", f"{NORM}={HERE}:Same")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "gfx950 and sm_90; this is cpu" in err


def test_copies_exceed_the_cache_or_reach_the_most() -> None:
    assert [node.copies(total, 8, 100) for total in (1, 399, 400, 401)] == [128, 2, 1, 1]
    assert node.copies(1, 5000, 100) == 1


def test_replacements_are_made_from_copies() -> None:
    """The reference does not see what `from_reference` does to its node."""
    norm = RMSNorm(8, 1e-6)

    class Greedy(Same):
        @classmethod
        def from_reference(cls, module: Any) -> "Same":
            del module.weight
            return cls(module)

    made = node.cases({"norm": (norm, (torch.ones(1, 8),))}, Greedy, 3)
    assert len(made) == 3 and all(hasattr(case.node, "weight") for case in made)
    assert len({id(case.node) for case in made}) == 3 and made[0].node is norm
