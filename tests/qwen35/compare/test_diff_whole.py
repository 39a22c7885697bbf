"""Healthy candidates pass a diff: other dtypes, roundings, lengths and engines; its memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35.compare.diff import diff
from qwen35.compare.trace import trace
from qwen35.errors import InputError
from qwen35.load import Loader, load
from tests.support.checkpoints import (
    QWEN3_5,
    Dialect,
    assert_names,
    write,
)
from tests.support.diffs import (  # noqa: F401
    FAULTS,
    IDS,
    MEMBERS,
    SIZES,
    assert_passes,
    assert_placed,
    failing,
    folder,
    standing_in,
)
from weights.convert import convert
from weights.output import Options

# --- other candidates


def test_a_built_model(folder: Path) -> None:
    """The same rows as the folder that it was built from, and its faults are placed."""
    model = load(folder, dtype=torch.bfloat16)
    assert diff(folder, IDS[:9], candidate=model) == diff(folder, IDS[:9], dtype=torch.bfloat16)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.roll(1, 0), requires_grad=False)
    assert_placed(diff(folder, IDS[:9], candidate=model), "lm_head")


class Same(nn.Module):
    """A feed-forward that calls the node that it stands for."""

    def __init__(self, node: nn.Module) -> None:
        super().__init__()
        self.node = node

    @classmethod
    def from_reference(cls, module: nn.Module) -> "Same":
        return cls(module)

    def forward(self, x: Tensor) -> Tensor:
        return self.node(x)


def test_the_swapped_nodes_are_told(folder: Path) -> None:
    """Of a folder and of a built model."""
    swaps = [("layers.1.mlp", Same)]
    model = load(folder, dtype=torch.bfloat16, swaps=swaps)
    options: Any = {"stages": "layers.1".__eq__}
    for report in (
        diff(folder, IDS[:9], candidate=model, **options),
        diff(folder, IDS[:9], swaps=swaps, dtype=torch.bfloat16, **options),
    ):
        assert report.swapped == {"layers.1.mlp": f"{__name__}:Same"}
    assert diff(folder, IDS[:9], **options).swapped == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 96}, ["hidden_size", "64", "96"]),
        ({"vocab_size": 192}, ["vocab_size", "160", "192"]),
        ({"num_experts": 16}, ["num_experts", "12", "16"]),
        ({"num_hidden_layers": 4}, ["num_hidden_layers", "2", "4"]),
        pytest.param(
            {"num_key_value_heads": 4},
            ["num_key_value_heads", "2", "4"],
        ),
        pytest.param(
            {"linear_num_value_heads": 4},
            ["linear_num_value_heads", "8", "4"],
        ),
    ],
)
def test_other_shapes(
    changes: dict[str, int], words: list[str], folder: Path, tmp_path: Path
) -> None:
    write(tmp_path, *MEMBERS["moe"][:2], **SIZES | changes)
    with pytest.raises(InputError) as caught:
        diff(folder, IDS[:9], candidate=tmp_path)
    assert_names(caught, words)


def test_a_candidate_without_mtp(folder: Path, tmp_path: Path) -> None:
    """A difference of shape as any other."""
    write(tmp_path, "397B-A17B", Dialect(mtp=False), seed=7, **SIZES)
    with pytest.raises(InputError, match="mtp"):
        diff(folder, IDS[:9], candidate=tmp_path)


def test_mxfp4_differs_in_its_experts(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mxfp4"
    convert(folder, target, Options("mxfp4"))
    report = diff(folder, IDS, candidate=target)
    nodes = {row.node for row in failing(report)}
    blocks = {"layers.0.mlp.experts", "layers.1.mlp.experts"}
    assert blocks <= nodes
    assert all(any(block.startswith(node) for block in blocks) for node in nodes), nodes
    assert report.rows[0].node in blocks


def test_a_trace(folder: Path) -> None:
    """One pass, compared free; a node is told by its name. A part of a trace gives a part of the rows."""
    report = diff(folder, IDS, candidate=trace(load(folder, dtype=torch.float32), IDS))
    assert_passes(report)
    assert report.tokens.compared == report.tokens.equal == len(IDS)
    taken = trace(load(folder, dtype=torch.bfloat16), IDS)
    report = diff(folder, IDS, candidate=taken)
    assert_passes(report)
    assert {row.phase for row in report.rows} == {"prefill"}
    taken["layers.1.self_attn"] = taken["layers.1.self_attn"] + 1
    rows = failing(diff(folder, IDS, candidate=taken))
    assert [row.node for row in rows] == ["layers.1.self_attn"]
    part = {name: output for name, output in taken.items() if name.endswith("input_layernorm")}
    assert len(diff(folder, IDS, candidate=part).rows) == len(part)


def test_a_trace_of_nothing(folder: Path) -> None:
    with pytest.raises(InputError):
        diff(folder, IDS[:9], candidate={"layers.O": torch.zeros(1)})


def test_a_trace_with_experts_that_are_not_there(folder: Path) -> None:
    taken = trace(load(folder, dtype=torch.bfloat16), IDS[:9])
    wrong = taken["layers.1.mlp.gate.0"].clone()
    wrong[3, 1] = 12
    taken["layers.1.mlp.gate.0"] = wrong
    with pytest.raises(InputError) as caught:
        diff(folder, IDS[:9], candidate=taken)
    assert_names(caught, ["layers.1.mlp.gate", "12"])


def test_what_has_no_counterpart_is_told(folder: Path) -> None:
    """A node that stands for several hides those inside."""

    class Fused(nn.Module):
        @classmethod
        def from_reference(cls, module: nn.Module) -> nn.Module:
            fresh = cls()
            fresh.held = [module]  # in a list: no child
            return fresh

        def forward(self, x: Tensor) -> Tensor:
            return self.held[0](x)

    report = diff(folder, IDS[:9], swaps=[("layers.1.mlp", Fused)])
    assert_passes(report)
    assert "layers.1.mlp.gate" in report.unmatched
    assert all(node.startswith("layers.1.mlp.") for node in report.unmatched)
    assert "layers.1.mlp" in {row.node for row in report.rows}
    assert not diff(folder, IDS[:9]).unmatched


def test_a_trace_of_other_ids(folder: Path) -> None:
    """Too short: another shape is a failing row, or refused."""
    taken = trace(load(folder, dtype=torch.bfloat16), IDS[:9])
    assert not diff(folder, IDS[:12], candidate=taken).passed


def test_chosen_stages(folder: Path) -> None:
    """Rows of these alone, equal to those of the whole run; none chosen is refused."""
    node, forward = FAULTS["decay_after_the_read"]
    swaps = [(node, standing_in(forward))]
    for mode in ("local", "free"):
        whole = diff(folder, IDS[:20], swaps=swaps, mode=mode)
        part = diff(
            folder, IDS[:20], swaps=swaps, mode=mode, stages=["layers.1", "norm"].__contains__
        )
        wanted = [r for r in whole.rows if r.node.startswith("layers.1") or r.node == "norm"]
        by_key = lambda row: (row.node, row.tensor, row.phase)  # noqa: E731
        assert sorted(part.rows, key=by_key) == sorted(wanted, key=by_key)
    with pytest.raises(InputError) as caught:
        diff(folder, IDS[:20], stages=lambda stage: False)
    assert_names(caught, ["layers.1", "lm_head", "mtp"])


@pytest.mark.parametrize(
    ("ids", "words"), [([], ["empty"]), ([5, 160], ["160", "159"]), ([-1], ["-1"])]
)
def test_bad_ids(ids: list[int], words: list[str], folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        diff(folder, ids)
    assert_names(caught, words)


# --- memory


@pytest.mark.parametrize("mode", ["local", "free"])
def test_one_stage_of_each_side_is_alive(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve layers, three sides: never the weights of four stages, and none are left."""
    write(tmp_path, "27B", QWEN3_5, num_hidden_layers=12)
    alive: list[str] = []
    most = 0
    healthy = Loader.stage

    def stage(self: Loader, name: str) -> nn.Module:
        nonlocal most
        module = healthy(self, name)
        alive.append(name)
        most = max(most, len(alive))
        weakref.finalize(next(module.parameters()), alive.remove, name)
        return module

    monkeypatch.setattr(Loader, "stage", stage)
    collects = gc.isenabled()
    gc.disable()  # what reference cycles keep alive counts
    try:
        assert_passes(diff(tmp_path, IDS[:6], mode=mode))
        assert most <= 3, most
        assert not alive
    finally:
        if collects:
            gc.enable()
