"""`tools.diff --tp` and `tools.exact --tp`: a model over ranks against the whole one and itself."""

import json
from typing import Any

import pytest

from qwen35.compare.diff import diff
from qwen35.compare.judge import Mode, Report
from qwen35.errors import InputError
from qwen35.load import TINY
from qwen35.parallel.ranks import Ranks
from tests.support.ranks import ended, on_threads, start
from tools.diff import build_parser, main

IDS = [(37 * i + 11) % 2000 for i in range(76)]


def compared(ranks: Ranks, mode: Mode = "local") -> Report:
    chosen = ("embed_tokens", "layers.2", "layers.3")
    return diff(
        TINY, IDS, mode=mode, decode=5, ranks=ranks,
        stages=lambda name: name in chosen or (mode == "free" and name in ("norm", "lm_head", "mtp")),
    )  # fmt: skip


def test_a_sharded_model_passes_node_by_node() -> None:
    """The nodes are what follows each sum, and the routers; states are compared as wholes. Four
    ranks share key heads."""
    for mode, size in (("local", 4), ("free", 2)):
        reports = on_threads(size, lambda ranks, mode=mode: compared(ranks, mode))
        assert all(report.passed for report in reports)
        first, *others = ([(row.node, row.x_bf16) for row in r.rows] for r in reports)
        assert all(other == first for other in others)
        nodes = {row.node for row in reports[0].rows}
        assert nodes >= {"embed_tokens", "layers.2.linear_attn", "layers.2.mlp", "layers.2.mlp.gate",
                         "layers.2.input_layernorm", "layers.3.self_attn", "layers.3"}  # fmt: skip
        assert "layers.2.linear_attn.out_proj" in reports[0].unmatched
        states = {row.tensor: row.shape for row in reports[0].rows}
        assert states["recurrent"] == [1, 8, 64, 32] and states["k"][1] == 2
    assert {"lm_head", "mtp"} <= nodes


def test_a_sum_that_is_left_out_is_seen() -> None:
    """It is seen at each node that has a sum, and at no norm."""

    def faulty(ranks: Ranks) -> Report:
        transport: Any = ranks.transport
        ranks.transport = type("Lost", (), {"gather": transport.gather, "sum": lambda self, x: x})()
        return compared(ranks)

    for report in on_threads(2, faulty):
        failed = {row.node for row in report.rows if not row.passed}
        wanted = {"layers.2.linear_attn", "layers.2.mlp", "layers.3.self_attn", "layers.3.mlp"}
        assert failed >= wanted | {"embed_tokens"}
        assert not any("norm" in node or node.endswith("gate") for node in failed)


@pytest.mark.slow
def test_exactness_over_ranks() -> None:
    """The command, as torchrun starts it, with groups of other processes over one cache folder."""
    command = ["tools.exact", "--tp", 2, "--lengths", 65, "--depths", 3, "--chunks", 64,
               "--new-tokens", 3, "--json"]  # fmt: skip
    (status, out, err), other = ended(start(2, command), within_s=240)
    assert status == 0, err
    document = json.loads(out)
    assert document["pass"] and not document["differ"]
    assert document["cells"] == 2 * (5 + 2)
    assert isinstance(document["departures"], list)
    assert other == (0, "", "")


def test_a_trace_is_not_cut() -> None:
    args = build_parser().parse_args(["tiny", "--against", "t.safetensors", "--tp", "2"])
    args.ranks = Ranks(0, 2)
    with pytest.raises(
        InputError, match=r"--against t\.safetensors is not cut over ranks; --tp is 2"
    ):
        main(args)
