"""What a debugger shows for a state, and a text that is given instead of ids."""

from pathlib import Path

import pytest
import torch

import qwen35
from qwen35.cache import FP8KVCache
from qwen35.errors import InputError
from qwen35.load import TINY, load
from qwen35.tokenizer import Tokenizer
from tests.support.command import outcome
from tools.trace import build_parser, main


def test_a_state_is_one_line_with_shapes_and_the_largest_number() -> None:
    model = load(TINY)
    cache = model.new_cache()
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), cache)
    delta, attention = cache.layers[0], cache.layers[3]
    assert "\n" not in repr(delta) + repr(attention)
    assert repr(delta).startswith("DeltaState(conv [1, 3, ") and "float32 |max| " in repr(delta)
    assert repr(delta).endswith("goes back 3 tokens)")
    largest = float(delta.tensors()["recurrent"].abs().max())
    assert f"|max| {largest:.3g}" in repr(delta)
    assert repr(attention).startswith("KVCache(k [1, ") and "length 3 of " in repr(attention)
    assert len(repr(cache)) < 2000


def test_an_empty_state_and_one_without_memory() -> None:
    empty = FP8KVCache.empty((1, 2, 16), torch.bfloat16, "cpu")
    assert repr(empty).startswith("FP8KVCache(k [1, 2, 0, 16] float8_e4m3fn, v ")
    held = torch.zeros(1, 2, 3, 16)
    empty.append(held, held)
    assert "k_scale [1, 2, 3, 1] uint8" in repr(empty)
    none = load(TINY).new_cache().layers[0]
    none.recurrent = none.recurrent.to("meta")  # pyright: ignore (a delta net's)
    assert "|max|" in repr(none)  # of the convolution's rows alone


def test_a_trace_takes_a_text() -> None:
    model = qwen35.load("tiny")
    ids = Tokenizer(str(TINY)).encode("In the beginning")
    mine, theirs = (qwen35.trace(model, what, "layers.0") for what in ("In the beginning", ids))
    assert mine.keys() == theirs.keys() and torch.equal(mine["layers.0"], theirs["layers.0"])
    model.folder = None
    with pytest.raises(InputError, match="no folder with a tokenizer"):
        qwen35.trace(model, "text")


def test_a_trace_into_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("tiny", "--prompt", "hi", "-o", tmp_path)
    status, out, err = outcome(build_parser, main, capsys, *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "is a folder; expected the name of a file" in err


def test_a_completion_is_its_text_and_not_its_model() -> None:
    """The last line of a notebook's cell shows this repr."""
    completion = qwen35.generate(load(TINY), "In the beginning", max_new_tokens=3)
    assert repr(completion) == f"Completion({completion.text!r}, 3 tokens, length)"
    assert repr(completion.generation) == (
        "Generation(4 prompt tokens, 3 of at most 3 tokens, length)"
    )
    longer = qwen35.generate(load(TINY), "In the beginning", max_new_tokens=40)
    assert repr(longer) == f"Completion({longer.text[:60] + '...'!r}, 40 tokens, length)"
