"""`tools.trace --show`: a saved trace for people and as JSON, without a model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen35.cli import run
from qwen35.compare.trace_file import save_trace
from tests.support.family import small_model
from tools import trace
from tools.trace import build_parser, main

ROOT = Path(__file__).parents[2]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nodes; one has a NaN among eight numbers, and zeros."""
    file = tmp_path_factory.mktemp("traces") / "t.safetensors"
    x = torch.tensor([[0.0, 0, 1, 1], [1, 2, -4, float("nan")]])
    outputs = {"layers.10.mlp": x, "layers.2.mlp": torch.ones(3, dtype=torch.bfloat16)}
    save_trace(file, outputs, small_model("0.8B"), [1, 2])
    return file


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line in this process, where loading a model is an error."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(trace, "load", never)
    monkeypatch.setattr(trace, "locate", never)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(build_parser(), main, [*map(str, arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_table(cli: Cli, saved: Path) -> None:
    status, out, _ = cli("--show", saved)
    assert status == 0
    assert out.splitlines() == [
        "node           shape   dtype      mean   std  |max|  zeros  non-finite  histogram",
        f"layers.2.mlp   [3]     bfloat16      1     0      1   0.0%           0  |█{' ' * 23}|",
        f"layers.10.mlp  [2, 4]  float32   0.143  1.81      4  25.0%        0.12  |▄{' ' * 15}▇   █  ▄|",
    ]


def test_a_histogram(cli: Cli, saved: Path) -> None:
    """The nodes that are asked for have one, with all counts."""
    status, out, _ = cli("--show", saved, "--node", "layers.1*.mlp")
    assert status == 0
    table, histogram = out.split("\n\n")
    assert len(table.splitlines()) == 2
    title, *rows = histogram.splitlines()
    assert title == "layers.10.mlp: from -4 to 2"
    assert len(rows) == 24
    counts = [int(row.split()[1]) for row in rows]
    assert (sum(counts), counts[0], counts[16], counts[20]) == (7, 1, 2, 3)
    assert rows[0].split() == ["-4", "1", "█" * 17]
    assert rows[20].split() == ["1", "3", "█" * 50]


def test_as_json(cli: Cli, saved: Path, tmp_path: Path) -> None:
    """Statistics that a tensor of NaN alone does not have are null."""
    found = json.loads(cli("--show", saved, "--pattern", "*10*", "--json")[1])
    (node,) = found["nodes"]
    assert (node["name"], node["shape"], node["low"], node["high"]) == (
        "layers.10.mlp",
        [2, 4],
        -4,
        2,
    )
    save_trace(tmp_path / "n", {"x": torch.tensor([float("nan")])}, small_model("0.8B"), [1])
    (node,) = json.loads(cli("--show", tmp_path / "n", "--json")[1])["nodes"]
    assert (node["mean"], node["not_finite"]) == (None, 1)


def test_a_terminal_without_the_bars(saved: Path) -> None:
    """Letters that every encoding has, and no question marks."""
    found = subprocess.run(
        [sys.executable, "-m", "tools.trace", "--show", saved, "--node", "layers.2*"], cwd=ROOT,
        capture_output=True, timeout=120,
        env={"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert b"|@      " in found.stdout
    assert b"?" not in found.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--show", "missing"], ["missing: no such file"]),
        (["--show", "."], [".: is a folder; expected a file"]),
        (["--show", ""], ["--show: ''; expected the name of a file"]),
        (["--show", "cut"], ["cut", "not a whole trace"]),
        (["--show", "other"], ["other", "format is None", "qwen35-trace-1"]),
        (["--show", "t", "--node", "layer.9"], ["'layer.9' matches no node", "layers.10.mlp"]),
        (["tiny", "--show", "t"], ["--show reads a file", "tiny is given"]),
        (["--show", "t", "-o", "x"], ["--show reads a file", "-o x is given"]),
        (["--show", "t", "--locals"], ["--show reads a file", "--locals is given"]),
        (["--show", "t", "--dtype", "float32"], ["--dtype float32 is given"]),
        (["--show", "t", "--device", "cpu"], ["--device cpu is given"]),
        (["--show", "t", "--ids", "1"], ["--ids", "--show"]),
        (["tiny", "--ids", "1"], ["-o FILE is expected"]),
        (["tiny", "--ids", "1", "-o", "x", "--node", "y"], ["--node goes with --show"]),
        (["tiny", "-o", "x"], ["--prompt", "--ids", "--show"]),
    ],
)
def test_bad_input(
    cli: Cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], words: list[str],
) -> None:  # fmt: skip
    """One line, status 2, no file."""
    monkeypatch.chdir(tmp_path)
    Path("t").write_bytes(saved.read_bytes())
    Path("cut").write_bytes(saved.read_bytes()[:-1])
    save_file({"x": torch.ones(1)}, "other")
    before = {*Path().iterdir()}
    status, out, err = cli(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err
    assert {*Path().iterdir()} == before
