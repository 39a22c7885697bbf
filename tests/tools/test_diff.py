"""`tools.diff` as a stranger uses it: what it prints, writes and returns, and one line for bad input."""

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35.cli import run
from qwen35.compare.judge import Judge
from qwen35.compare.trace import trace
from qwen35.compare.trace_file import save_trace
from qwen35.load import TINY, load
from reference.moe import MLP
from tests.support.checkpoints import QWEN3_5, write
from tools.diff import build_parser, main, print_rows
from weights.convert import convert
from weights.output import Options

IDS = "5,17,42,7,99,3,58,12,31"
HERE = "tests.tools.test_diff"


class Swapped(nn.Module):
    """An MLP whose gate and up change places."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.mlp = mlp

    @classmethod
    def from_reference(cls, module: MLP) -> "Swapped":
        return cls(module)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.mlp.up_proj(x)) * self.mlp.gate_proj(x)
        return self.mlp.down_proj(hidden)


class Raises(Swapped):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x[:, :3]


class ReturnsAnotherShape(Swapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)[:, :-1]


class ReturnsOneChannel(Swapped):
    """Which broadcasts: nothing else breaks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)[:, :1]


class ReturnsIntegers(Swapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x).int()


class Healthy(Swapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        run(build_parser(), main, [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of random weights."""
    path = tmp_path_factory.mktemp("diff") / "model"
    write(path, "35B-A3B", QWEN3_5)
    return path


def test_a_healthy_model_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0, a table for people; and one document of the keys that scripts rely on."""
    status, out, err = command(capsys, folder, "--random", 70, "--seed", 3)
    assert (status, err) == (0, "")
    assert "DIFF" not in out and "rows pass" in out
    status, out, err = command(capsys, folder, "--ids", IDS, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["pass"] is True
    keys = {"node", "shape", "max_abs", "rel_rms", "x_bf16", "worst", "pass"}
    assert all(keys <= row.keys() for row in document["rows"])


def test_a_swapped_node_is_the_first_row(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1; the page holds every row and nothing from elsewhere."""
    swap = f"layers.2.mlp.shared_expert={HERE}:Swapped"
    page = tmp_path / "out.html"
    status, out, _ = command(capsys, folder, "--ids", IDS, "--swap", swap, "--report", page)
    assert status == 1
    assert out.splitlines()[1].startswith("DIFF")
    assert "layers.2.mlp.shared_expert " in out.splitlines()[1]
    text = page.read_text()
    assert "layers.2.mlp.shared_expert" in text and "layers.7.self_attn" in text
    assert "src=" not in text and "@import" not in text


@pytest.mark.parametrize("mode", ["local", "free"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Raises", ["test_diff.py:", "RuntimeError"]),
        ("ReturnsAnotherShape", ["test_diff.py:", "returned bfloat16 [3, 63]"]),
        ("ReturnsOneChannel", ["test_diff.py:", "returned bfloat16 [3, 1]; expected [3, 64]"]),
        ("ReturnsIntegers", ["test_diff.py:", "returned int32 [3, 64]"]),
        ("NoSuchClass", [HERE]),
    ],
)
def test_a_candidate_that_breaks_is_not_one_that_differs(
    kind: str, words: list[str], mode: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2 and a line with the node and the place in the file; --debug shows the rest."""
    node = "layers.2.mlp.shared_expert"
    arguments = [folder, "--ids", IDS, "--mode", mode, "--swap", f"{node}={HERE}:{kind}"]
    status, out, err = command(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in [node, *words] if word not in err], err
    status, out, err = command(capsys, *arguments, "--debug")
    assert (status, out) == (2, "") and "Traceback" in err


def test_a_swap_that_passes_is_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table, the JSON and the page list it, with what it takes to run it again."""
    swap = f"layers.[26].mlp.shared_expert={HERE}:Healthy"
    page = tmp_path / "out.html"
    arguments = [folder, "--random", 9, "--seed", 3, "--swap", swap, "--layers", "1-2"]
    status, out, _ = command(capsys, *arguments)
    nodes = ["layers.2.mlp.shared_expert", "layers.6.mlp.shared_expert"]
    assert status == 0
    assert f"{HERE}:Healthy stands for {', '.join(nodes)}\n" in out
    assert f"not compared, though swapped: {nodes[1]}\n" in out
    status, out, _ = command(capsys, *arguments, "--json", "--report", page)
    document = json.loads(out)
    assert document["swapped"] == dict.fromkeys(nodes, f"{HERE}:Healthy")
    made = document["run"]
    assert made["tokens"] == "9 random ids of seed 3"
    assert made["command"].startswith(f"python -m tools.diff {folder} --random 9 --seed 3 --swap ")
    assert made["torch"] == torch.__version__.split("+")[0] or made["torch"] == torch.__version__
    assert {"qwen35", "triton", "processor", "GPU", "device"} <= made.keys()
    text = html.unescape(page.read_text())
    assert not [value for value in made.values() if value.split(" --json")[0] not in text]
    assert f"{HERE}:Healthy stands for {', '.join(nodes)}" in text


def test_rows_say_where_the_worst_element_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token, pass and channel, for people and for scripts."""
    swap = f"layers.2.mlp.shared_expert={HERE}:Swapped"
    arguments = [folder, "--random", 75, "--swap", swap, "--layers", "2"]
    _, out, _ = command(capsys, *arguments, "--json")
    row = json.loads(out)["rows"][0]
    first, end = row["span"]
    assert row["position"] == first + row["worst"][0] < end
    assert row["channel"] == [row["worst"][1]] and row["shape"] == [end - first, 64]
    _, out, _ = command(capsys, *arguments)
    tokens = f"{first}-{end - 1}" if end - first > 1 else f"{first}"
    at = f"worst at token {row['position']}, channel {row['channel'][0]}"
    assert f"{row['shape']}, {row['phase']} {tokens}, {at}" in out.splitlines()[1]


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        (0, ["20 of 60 rows shown, worst first", "all 60 rows pass"]),
        (30, ["30 of 60 rows shown, worst first", "30 of 60 rows differ"]),
        (42, ["40 of 42 failing rows shown", "42 of 60 rows differ"]),
    ],
)
def test_a_table_says_what_it_leaves_out(
    failing: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    judge, exact = Judge(), torch.ones(1, 2, 4)
    for i in range(60):
        tested = exact + (9 if i < failing else 0)
        judge.add(f"n{i}", "output", "prefill", [exact, exact + 0.01, tested])
    print_rows(judge.report())
    out = capsys.readouterr().out
    assert not [word for word in words if word not in out], out
    assert out.count("DIFF") == min(failing, 40)


def test_layers_choose_what_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only those layers are compared. The swap outside of them is not seen."""
    swap = f"layers.6.mlp.shared_expert={HERE}:Swapped"
    status, out, _ = command(
        capsys, folder, "--ids", IDS, "--swap", swap, "--layers", "1-2", "--json"
    )
    assert status == 0
    layers = {row["node"].split(".")[1] for row in json.loads(out)["rows"]}
    assert layers == {"1", "2"}


def test_mxfp4_against_bf16(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the routed experts differ, and the nodes that contain them."""
    convert(folder, tmp_path / "mxfp4", Options("mxfp4"))
    status, out, _ = command(
        capsys, folder, "--against", tmp_path / "mxfp4", "--random", 70, "--json"
    )
    assert status == 1
    failing = [row for row in json.loads(out)["rows"] if not row["pass"]]
    assert failing[0]["node"].endswith(".mlp.experts")
    assert all(
        row["node"].endswith((".experts", ".mlp")) or row["node"].count(".") == 1 for row in failing
    )


def test_a_trace_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model as that library computes it in float32: the whole trunk agrees."""
    pytest.importorskip("transformers")
    status, out, _ = command(
        capsys, "tiny", "--against", "transformers", "--dtype", "float32", "--ids", IDS, "--json"
    )
    assert status == 0
    document = json.loads(out)
    found = {row["node"] for row in document["rows"]}
    assert {"layers.0.linear_attn", "layers.3.self_attn", "layers.7.mlp", "lm_head"} <= found
    assert document["tokens"]["equal"] == document["tokens"]["compared"] == 9


def test_a_trace_from_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ids are used; a change in one node is found there; other ids and other configs are refused."""
    ids = [int(i) for i in IDS.split(",")]
    model = load(folder, dtype=torch.float32)
    outputs = trace(model, ids)
    save_trace(tmp_path / "good.safetensors", outputs, model, ids)
    assert command(capsys, folder, "--against", tmp_path / "good.safetensors")[0] == 0
    # In the first layer: later on, bfloat16's own errors, added up, are as large as this one.
    outputs["layers.0.linear_attn"] = 1.5 * outputs["layers.0.linear_attn"]
    save_trace(tmp_path / "bad.safetensors", outputs, model, ids)
    status, out, _ = command(capsys, folder, "--against", tmp_path / "bad.safetensors", "--json")
    assert status == 1
    assert json.loads(out)["rows"][0]["node"] == "layers.0.linear_attn"
    refused: list[tuple[Any, ...]] = [
        (folder, "--against", tmp_path / "good.safetensors", "--ids", "1,2"),
        (TINY, "--against", tmp_path / "good.safetensors"),
        (folder, "--against", tmp_path / "good.safetensors", "--prompt", "x"),
    ]
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refused.append((folder, "--against", tmp_path / "cut.safetensors"))
    refused.append((folder, "--against", folder / "model.safetensors"))
    for arguments in refused:
        status, out, err = command(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1), err


def test_a_trace_of_a_model_without_mtp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.json speaks of a head that the file lacks."""
    write(tmp_path / "model", "35B-A3B", replace(QWEN3_5, mtp=False))
    model = load(tmp_path / "model", dtype=torch.float32)
    file = tmp_path / "trace.safetensors"
    save_trace(file, trace(model, [1, 2, 3]), model, [1, 2, 3])
    assert command(capsys, tmp_path / "model", "--against", file)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--swap", f"layers.9*={HERE}:Swapped"), ["layers.9*", "matches no node", "layers."]),
        (("--layers", "99"), ["--layers 99; expected A-B within the layers 0 to"]),
        (("--layers", "1-0"), ["--layers 1-0; expected A-B within the layers 0 to"]),
        (("--swap", "layers.1"), ["PATTERN=MODULE:CLASS"]),
        (
            ("--swap", "norm=a:B", "--against", "transformers"),
            ["--swap 'norm=a:B' goes with MODEL"],
        ),
        (("--swap", "layers.1=nowhere:X"), ["nowhere"]),
        (("--swap", f"layers.1={HERE}:IDS"), ["from_reference"]),
        (("--layers", "x"), ["'x'", "0-3"]),
        (("--seed", "3"), ["--seed 3 draws random ids; the ids are given"]),
        (("--seed", "3", "--against", "x.safetensors"), ["--seed 3 draws random ids"]),
        (
            ("--decode", "3", "--against", "x.safetensors"),
            ["--decode 3: x.safetensors is one pass"],
        ),
        (("--decode", "3", "--against", "transformers"), ["--decode 3: transformers is one pass"]),
        (
            ("--dtype", "float32", "--against", "x.safetensors"),
            ["--dtype is no option beside a trace"],
        ),
        (("--random", "99999999"), ["not allowed with argument --ids"]),
        (("--report", ""), ["--report: ''; expected the name of a file"]),
        (("--report", "/"), ["--report: '/' is a folder"]),
        (("--layers", "9" * 5000), ["--layers '999", "0-3"]),
        (("--mode", "local", "--against", "t.safetensors"), ["--mode local", "t.safetensors"]),
        (("--mode", "local", "--against", "transformers"), ["--mode local", "transformers"]),
        (("--decode", -1), ["-1"]),
        (("--ids", "1,99999999"), ["99999999"]),
        (("--against", TINY), ["in the reference", "in the candidate"]),
        (("--report", "nowhere/at/all.html"), ["nowhere/at/all.html"]),
        (("--device", "cuda:99"), ["device", "cuda:99"]),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[Any, ...], words: list[str]
) -> None:
    """Exit status 2, and what disagrees with what."""
    ids = () if "--ids" in arguments else ("--ids", IDS)
    status, out, err = command(capsys, folder, *ids, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert not [word for word in words if word not in err], err


def test_more_random_ids_than_the_context_has(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not drawn: a thousand million would take all memory."""
    status, out, err = command(capsys, folder, "--random", 10**9)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"--random {10**9}; the context has " in err
