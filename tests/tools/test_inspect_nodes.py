"""`tools.inspect --nodes` against the model that loading builds."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from qwen35.load import load
from tests.support.checkpoints import MXFP4, QWEN3_5, QWEN3_5_FP8, write
from tests.support.conversions import MEMBER
from tools.inspect import open_model
from tools.inspect_nodes import _ranges, describe_nodes, print_nodes
from weights.storage import DTYPE_NAMES

ROOT = Path(__file__).parents[2]


def described(model: str) -> dict[str, Any]:
    """The document of --nodes."""
    found = open_model(model)
    return describe_nodes(found.config, found.checkpoint)


def unfolded(document: dict[str, Any], path: str = "") -> dict[str, tuple[str, Any]]:
    """The class and the own parameters of every node, by name."""
    nodes = {path: (document["class"], document["parameters"])}
    for inner in document["nodes"]:
        for name in inner["names"]:
            nodes |= unfolded(inner, f"{path}.{name}" if path else name)
    return nodes


def built(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """The same of a model that was loaded."""
    return {
        path: (
            type(module).__name__,
            [
                {"name": name, "shape": list(p.shape), "dtype": DTYPE_NAMES[p.dtype]}
                for name, p in module.named_parameters(recurse=False)
            ],
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize(
    ("member", "dialect"),
    [(MEMBER, QWEN3_5), (MEMBER, MXFP4), (MEMBER, QWEN3_5_FP8), ("0.8B", QWEN3_5)],
    ids=["bf16", "mxfp4", "fp8", "tied"],
)
def test_every_node_is_the_one_that_loading_builds(
    tmp_path: Path, member: str, dialect: Any
) -> None:
    """Names, classes, shapes and dtypes, quantised experts and a tied head included."""
    changes = {} if member == "0.8B" else {"num_experts": 2, "num_experts_per_tok": 1}
    write(tmp_path, member, dialect, **changes)
    assert unfolded(described(str(tmp_path))) == built(load(tmp_path))


def test_alike_layers_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model has each kind of layer once, and 32 experts in one line of three matrices.
    No line is wider than a terminal."""
    document = described("tiny")
    layers = next(one for one in document["nodes"] if one["names"] == ["layers"])
    assert [one["names"] for one in layers["nodes"]] == [list("012456"), list("37")]
    print_nodes(document)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    words = Counter(line.split()[0] for line in lines)
    assert words["0-2,"] == 1 and words["0-31"] == 3
    assert any("weight [2048, 256] BF16" in line for line in lines)


def test_published_sizes_by_their_config() -> None:
    """All in BF16; parameters counted through the folded tree are those of the fact sheet."""

    def count(document: dict[str, Any]) -> int:
        own = sum(math.prod(one["shape"]) for one in document["parameters"])
        return own + sum(len(one["names"]) * count(one) for one in document["nodes"])

    document = described("35B-A3B")
    trunk = [one for one in document["nodes"] if one["names"] != ["mtp"]]
    assert round(sum(count(one) for one in trunk) / 1e9, 1) == 34.7


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([0], "0"),
        ([0, 1], "0-1"),
        ([0, 1, 2, 4, 5, 6, 8], "0-2, 4-6, 8"),
        ([3, 7, 11, 15], "3, 7, ... 15 (4)"),
        ([n for n in range(60) if n % 4 != 3], "0-2, 4-6, ... 56-58 (45)"),
    ],
)
def test_ranges_of_numbers(numbers: list[int], text: str) -> None:
    """Few are listed, of many the first and the last."""
    assert _ranges([str(number) for number in numbers]) == text


def test_the_command_line() -> None:
    """The tree for people, the document with --json."""
    run = [sys.executable, "-m", "tools.inspect", "tiny", "--nodes"]
    text = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert text.startswith("model ") and "GatedDeltaNet" in text
    done = subprocess.run([*run, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(described("tiny")))
