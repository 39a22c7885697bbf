"""Statistics of a trace's tensors, against numpy, and of tensors that have none."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen35.compare.trace_file import (
    BINS,
    config_hash,
    read_trace,
    save_trace,
    statistics_of,
    trace_statistics,
)
from qwen35.errors import InputError
from qwen35.load import TINY, load
from tests.support.family import small_model

X = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "tensor",
    [X, X.bfloat16(), X * 1e38, (X * 100).long(), X.relu(), X > 0, X[0, 0]],
    ids=["float32", "bfloat16", "large", "integers", "zeros", "bool", "scalar"],
)
def test_statistics_against_numpy(tensor: Tensor) -> None:
    found = statistics_of("x", tensor)
    wide = tensor.double().numpy().ravel()
    assert found.shape == tuple(tensor.shape)
    assert found.dtype == str(tensor.dtype).removeprefix("torch.")
    figures = [found.mean, found.std, found.low, found.high, found.max_abs, found.zeros]
    expected = [
        wide.mean(),
        wide.std(),
        wide.min(),
        wide.max(),
        abs(wide).max(),
        (wide == 0).mean(),
    ]
    assert figures == pytest.approx(expected, rel=1e-12)
    assert found.not_finite == 0
    assert sum(found.counts) == wide.size
    if wide.min() < wide.max():
        assert found.counts == np.histogram(wide, BINS)[0].tolist()


def test_what_is_not_finite_is_counted_apart() -> None:
    """The figures are those of the rest."""
    spoiled = torch.cat([X.flatten(), torch.tensor([math.nan, math.inf, -math.inf, 0.0])])
    found, clean = (
        statistics_of("x", spoiled),
        statistics_of("x", torch.cat([X.flatten(), X.new_zeros(1)])),
    )
    assert found.not_finite == 3 / 124
    assert found.zeros == 1 / 124
    for name in ("mean", "std", "low", "high", "max_abs", "counts"):
        assert getattr(found, name) == getattr(clean, name)


@pytest.mark.parametrize("tensor", [torch.full((3,), math.nan), torch.zeros(0, 4)])
def test_nothing_to_describe(tensor: Tensor) -> None:
    """All NaN, or empty: NaN, no error."""
    found = statistics_of("x", tensor)
    assert all(math.isnan(getattr(found, n)) for n in ("mean", "std", "low", "high", "max_abs"))
    assert sum(found.counts) == 0
    assert found.not_finite == (1 if tensor.numel() else 0)


def test_one_value(tmp_path: Path) -> None:
    """An interval without a width."""
    found = statistics_of("x", torch.full((5,), 2.0))
    assert (found.mean, found.std, found.low, found.high) == (2, 0, 2, 2)
    assert found.counts == [5] + [0] * (BINS - 1)


def test_nodes_come_in_the_order_of_layers(tmp_path: Path) -> None:
    """Layer 10 after layer 2; a pattern chooses; one that fits nothing names the nearest."""
    outputs = {f"layers.{i}": X for i in (10, 2, 1)} | {"lm_head": X}
    save_trace(tmp_path / "t", outputs, small_model("0.8B"), [1])
    names = [one.name for one in trace_statistics(tmp_path / "t")]
    assert names == ["layers.1", "layers.2", "layers.10", "lm_head"]
    assert [one.name for one in trace_statistics(tmp_path / "t", "*1*")] == [
        "layers.1",
        "layers.10",
    ]
    with pytest.raises(InputError, match=r"'layer\.2' matches no node; the nearest are layers\.2"):
        list(trace_statistics(tmp_path / "t", "layer.2"))
    with pytest.raises(InputError, match=r"nearest are layers\.1, layers\.2, layers\.10$"):
        list(trace_statistics(tmp_path / "t", "QQ"))


def test_any_names_are_sorted(tmp_path: Path) -> None:
    """Digits that are no numbers to Python, and more of them than it converts."""
    names = ["²", "x.9", "x.10", f"x.{'9' * 5000}"]
    save_trace(tmp_path / "t", dict.fromkeys(names[::-1], X), small_model("0.8B"), [1])
    found = [one.name for one in trace_statistics(tmp_path / "t")]
    assert sorted(found) == sorted(names) and found.index("x.9") < found.index("x.10")


def test_a_trace_is_read_with_its_ids(tmp_path: Path) -> None:
    """The reader has the same config."""
    file, model = tmp_path / "t", load(TINY)
    save_trace(file, {"a": X.T, "b": X.T}, model, [1, 2, 3])
    outputs, ids = read_trace(file, TINY)
    assert ids == [1, 2, 3] and outputs.keys() == {"a", "b"}
    assert torch.equal(outputs["a"], X.T) and torch.equal(outputs["b"], X.T)
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {
            "format": "qwen35-trace-1", "ids": "[1, 2, 3]",
            "config": config_hash(model.config), "dtype": "bfloat16",
        }  # fmt: skip


def test_a_trace_of_another_config_or_ids_is_one_line(tmp_path: Path) -> None:
    file, ours = tmp_path / "t", config_hash(load(TINY).config)
    assert len(ours) == 16 and int(ours, 16)
    other = small_model("0.8B")
    save_trace(file, {"a": X}, other, [1])
    line = f"{file}: traced with config {config_hash(other.config)}, {TINY} has {ours}"
    with pytest.raises(InputError, match=re.escape(line)):
        read_trace(file, TINY)
    metadata = {"format": "qwen35-trace-1", "config": ours}
    for more, line in (({}, f"{file}: "), ({"ids": "[1, x]"}, f"{file}: .*x")):
        save_file({"a": X}, file, metadata | more)
        with pytest.raises(InputError, match=line):
            read_trace(file, TINY)
    for format in ({}, {"format": "another"}):
        save_file({"a": X}, file, metadata | {"format": ""} | format)
        line = f"{file}: its format is {format.get('format', '')!r}; expected 'qwen35-trace-1'"
        with pytest.raises(InputError, match=re.escape(line)):
            read_trace(file, TINY)
    save_file({"a": X}, file)
    with pytest.raises(InputError, match="its format is None"):
        read_trace(file, TINY)


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/missing/t: cannot be written: "):
        save_trace(tmp_path / "missing/t", {"a": X}, small_model("0.8B"), [1])
