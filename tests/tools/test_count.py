"""`tools.count`: the bytes that a block's launches need and write, and one line for bad input."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from qwen35.config import Config
from tests.support.command import Cli, in_process
from tools.count import build_parser, main

SMALL = {"num_experts": 40, "hidden_size": 256, "moe_intermediate_size": 128}
SMALL |= {"num_experts_per_tok": 4, "shared_expert_intermediate_size": 32}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line, whose default is a small model."""
    published = Config.published
    small = replace(published("35B-A3B"), **SMALL)
    monkeypatch.setattr(
        Config, "published", lambda name: small if name == "397B-A17B" else published(name)
    )
    return in_process(build_parser, main, capsys)


def test_bytes_of_a_block(cli: Cli):
    """Weights are counted once. The HIP kernels write the sums, the choice, `hidden`, a share for each
    pair, the output and the counters, and nothing else."""
    status, out, _ = cli("--ranks", 1, "--rows", 2, "--json")
    found = json.loads(out)
    rows = {(row["kernel"], row["launch"].split()[0]): row for row in found["rows"]}
    assert status == 0 and (found["block_rows"], found["hit"]) == (2, 8)
    E, D, I, shared, N, k, pairs = 40, 256, 128, 32, 2, 4, 8
    M = E + 1 + 2 * shared
    router, experts = M * D * 2, pairs * 3 * D * (I // 2 + I // 32) + D * shared * 2
    assert rows["triton", "route"]["weights"] == rows["hip", "router"]["weights"] == router
    assert rows["hip", "experts"]["weights"] == experts
    assert rows["triton", "all"]["weights"] == rows["hip", "all"]["weights"] == router + experts
    tiles = -(-M // 16)
    assert rows["hip", "router"]["written"] == 4 * (N * M + 2 * N * k) + 8 * tiles
    # Each task raises a counter; those of experts that are not there are raised too, and all count.
    counters = 8 * (pairs * (2 * I // 64 + 1) + 128 - pairs + 1 + 256)
    written = pairs * N * I * 2 + pairs * D * 4 + N * D * 2
    assert rows["hip", "experts"]["written"] == written + counters
    for row in rows.values():
        assert row["weights_per_valu"] == round(row["weights"] / row["valu"], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", 9), "--rows 9; expected 1 to 8"),
        (("--rows", 0), "--rows 0; expected 1 to 8"),
        (("--ranks", 3), "does not divide by 3 ranks"),
        (("--config", "27B"), "27B has no experts"),
        (("--config", "400B"), "400B"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, arguments: tuple[object, ...], message: str):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err
