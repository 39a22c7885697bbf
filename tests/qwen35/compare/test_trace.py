"""`tools.trace`: what the file holds, and that nothing stays on the model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qwen35.cli import run
from qwen35.compare.trace import trace
from qwen35.errors import InputError
from qwen35.load import TINY, load
from tests.support.family import small_model
from tools.trace import build_parser, main

IDS = [5, 17, 42, 7, 99, 3, 58]


def test_a_trace_is_what_the_nodes_returned() -> None:
    """The logits, a sum that must come out, the router's two outputs, the MTP head's rows."""
    model = small_model("397B-A17B")
    outputs = trace(model, IDS)
    with torch.inference_mode():
        logits = model.lm_head(model(torch.tensor([IDS]), model.new_cache()))
    assert torch.equal(outputs["lm_head"], logits)
    stream = outputs["layers.1"] + outputs["layers.2.linear_attn"] + outputs["layers.2.mlp"]
    assert torch.equal(outputs["layers.2"], stream)
    assert outputs["layers.0.mlp.gate.0"].shape == (len(IDS), model.config.num_experts_per_tok)
    assert outputs["mtp"].shape == (1, len(IDS) - 1, model.config.hidden_size)
    assert not [name for name in outputs if ".experts." in name]
    assert not [m for m in model.modules() if m._forward_hooks]


def test_a_pattern_chooses_nodes() -> None:
    """A glob over names; the inside of an expert when it is named; nothing is an error."""
    model = small_model("35B-A3B")
    assert set(trace(model, IDS, "layers.*.linear_attn")) == {
        f"layers.{i}.linear_attn" for i in (0, 1, 2, 4, 5, 6)
    }
    assert trace(model, IDS, "layers.0.mlp.experts.*.down_proj")
    with pytest.raises(InputError, match=r"layers\.9.*matches no node"):
        trace(model, IDS, "layers.9*")


def test_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors with the ids, the config's hash and the dtype in its metadata."""
    file = tmp_path / "trace.safetensors"
    arguments = ["tiny", "--ids", "1,2,3", "--dtype", "float32", "--json", "-o", str(file)]
    assert main(build_parser().parse_args(arguments)) == 0
    document = json.loads(capsys.readouterr().out)
    tensors = load_file(file)
    assert document["nodes"] == {name: list(t.shape) for name, t in tensors.items()}
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    assert json.loads(metadata["ids"]) == [1, 2, 3]
    assert metadata["dtype"] == "float32"
    model = load(TINY, dtype=torch.float32)
    with torch.inference_mode():
        logits = model.lm_head(model(torch.tensor([[1, 2, 3]]), model.new_cache()))
    assert torch.equal(tensors["lm_head"], logits)
    assert list(tmp_path.iterdir()) == [file]


def test_the_file_has_named_locals_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.safetensors"
    arguments = ["tiny", "--ids", "1,2,3", "--pattern", "layers.0.linear_attn", "--locals"]
    assert main(build_parser().parse_args([*arguments, "-o", str(file)])) == 0
    assert str(file) in capsys.readouterr().out
    tensors = load_file(file)
    assert tensors["layers.0.linear_attn"].shape == (1, 3, 256)
    assert tensors["layers.0.linear_attn:beta"].shape == (1, 3, 8)


def test_what_is_no_prompt_is_named() -> None:
    model = small_model("397B-A17B")
    assert model.folder is None
    line = "this model has no folder with a tokenizer; token ids are expected"
    for ids, words in (("a", line), (1.5, "ids = 1.5; expected token ids or a text")):
        with pytest.raises(InputError, match=f"^{words}$"):
            trace(model, ids)  # type: ignore[arg-type]


def test_code_without_a_module_is_no_hindrance() -> None:
    """A node may run such code with `eval`."""
    model = small_model("397B-A17B")
    model.norm.register_forward_hook(lambda *_: eval("None", {}))
    assert "norm:x" in trace(model, IDS, "norm", named_locals=True)


@pytest.mark.parametrize("named_locals", [False, True])
def test_the_callers_profiler_stays(named_locals: bool) -> None:
    """A tool that measures coverage has one, for example."""

    def profiler(*_: object) -> None: ...

    before = sys.getprofile()
    sys.setprofile(profiler)
    try:
        trace(small_model("397B-A17B"), IDS, named_locals=named_locals)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "--ids", "1,9999", "-o", "t"], ["9999", "2047"]),
        (["tiny", "--ids", "1,x", "-o", "t"], ["1,x"]),
        (["tiny", "--prompt", "", "-o", "t"], ["empty"]),
        (["tiny", "--ids", "1", "-o", "missing/t"], ["missing"]),
        (["tiny", "--ids", "1", "--pattern", "layer.0", "-o", "t"], ["layer.0"]),
        (["nowhere", "--ids", "1", "-o", "t"], ["nowhere"]),
        (["tiny", "--ids", "1", "--device", "cuda:99", "-o", "t"], ["device", "cuda:99"]),
    ],
)
def test_bad_input(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, status 2, no file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(build_parser(), main, arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())
