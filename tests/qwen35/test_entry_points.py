"""`load`, `generate`, `trace`, `diff` in Python: the command line's forms work, others are one line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qwen35
from qwen35.arguments import shown
from qwen35.compare.trace import trace
from qwen35.errors import InputError
from qwen35.load import DTYPES, TINY, load
from qwen35.prefix.cache import PrefixCache
from qwen35.tokenizer import Tokenizer
from reference.model import Model

TEXT = "In the beginning"
IDS = Tokenizer(TINY).encode(TEXT)


@pytest.fixture(scope="module")
def model() -> Model:
    return load("tiny")


def in_one_line(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 200, message
    return message


# --- load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_by_its_name(name: str) -> None:
    assert load("tiny", dtype=name).dtype == DTYPES[name]


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "int8", 32])
def test_a_dtype_that_no_model_computes_in(dtype: Any) -> None:
    message = in_one_line(lambda: load("tiny", dtype=dtype))
    assert message.startswith(f"dtype = {dtype!r}; expected float32, bfloat16")
    assert in_one_line(lambda: qwen35.diff("tiny", IDS, dtype=dtype)) == message
    assert in_one_line(lambda: qwen35.diff("tiny", IDS, oracle_dtype=dtype)) == message


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cpux", "device 'cpux' is unknown"),
        (3.5, "device 3.5 is unknown"),
        ("meta", "device 'meta' cannot be used here"),
        ("cuda", "device 'cuda' cannot be used here"),
    ],
)
def test_a_device_that_is_not_here(device: Any, words: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert words in in_one_line(lambda: load("tiny", device=device))


@pytest.mark.parametrize("given", ["", 3, ["tiny"], torch.zeros(2), b"tiny"])
def test_what_names_no_checkpoint(given: Any) -> None:
    for call in (load, lambda m: qwen35.generate(m, TEXT), lambda m: trace(m, TEXT)):
        message = in_one_line(lambda call=call: call(given))
        assert message == f"model = {shown(given)}; expected 'tiny', a folder or a hub id"


# --- generate -------------------------------------------------------------------------------------


def test_a_prefix_cache_of_another_model(model: Model, tmp_path: Path) -> None:
    """It finds what it keeps by its own model's name, so this one would go on from the other's states."""
    other = load("tiny", dtype="float32")
    shutil.copytree(TINY, tmp_path / "copy")
    elsewhere = PrefixCache(load(tmp_path / "copy"), budget=1 << 30)
    with pytest.raises(
        InputError, match=f"a model with checkpoint {tmp_path / 'copy'}; this one has"
    ):
        qwen35.generate(model, TEXT, prefix_cache=elsewhere)
    for kept, message in (
        (3, "prefix_cache = 3; expected a PrefixCache"),
        (PrefixCache(other, budget=1 << 30),
         "prefix_cache was made for a model with dtype float32; this one has bfloat16"),
    ):  # fmt: skip
        given: Any = kept
        line = in_one_line(lambda given=given: qwen35.generate(model, TEXT, prefix_cache=given))
        assert line == message
    same = PrefixCache(load("tiny"), budget=1 << 30)
    assert qwen35.generate(model, TEXT, prefix_cache=same, max_new_tokens=1).token_ids


@pytest.mark.parametrize("budget", [-1, "4G", None, 1e9])
def test_a_budget_that_is_no_number_of_bytes(model: Model, budget: Any) -> None:
    message = in_one_line(lambda: PrefixCache(model, budget=budget))
    assert message == f"budget = {shown(budget)}; expected a number of bytes >= 0"


def test_arguments_of_another_kind(model: Model) -> None:
    calls: dict[str, Callable[[], object]] = {
        "on_text = 3; expected a function": lambda: qwen35.generate(model, TEXT, on_text=3),  # pyright: ignore
        "progress = 3; expected a function": lambda: qwen35.diff("tiny", IDS, progress=3),  # pyright: ignore
        "pattern = 3; expected a text": lambda: trace(model, TEXT, 3),  # pyright: ignore
        "pattern = 4; expected a text": lambda: qwen35.swap(model, 4, 4),  # pyright: ignore
        "swaps = 3; expected a list of pairs": lambda: load("tiny", swaps=3),  # pyright: ignore
    }
    for message, call in calls.items():
        assert in_one_line(call).startswith(message)


def test_a_model_by_its_name(model: Model) -> None:
    """`load` and `diff` take the same names. A folder is a name, too."""
    expected = qwen35.generate(model, TEXT, max_new_tokens=4).token_ids
    assert qwen35.generate("tiny", TEXT, max_new_tokens=4).token_ids == expected
    assert qwen35.generate(TINY, TEXT, max_new_tokens=4).token_ids == expected


@pytest.mark.parametrize("form", [tuple, torch.tensor, np.array, lambda ids: [*np.array(ids)]])
def test_ids_in_every_form(model: Model, form: Callable[[list[int]], Any]) -> None:
    expected = qwen35.generate(model, IDS, max_new_tokens=4).token_ids
    assert qwen35.generate(model, form(IDS), max_new_tokens=4).token_ids == expected
    traced = trace(model, form(IDS), "norm")["norm"]
    assert torch.equal(traced, trace(model, TEXT, "norm")["norm"])


@pytest.mark.parametrize(
    "prompt", [None, 5, b"text", torch.tensor([IDS]), [[1, 2]], [1, "a"], [1.0], torch.zeros(2)]
)
def test_what_is_no_prompt(model: Model, prompt: Any) -> None:
    message = in_one_line(lambda: qwen35.generate(model, prompt))
    assert message == f"prompt = {shown(prompt)}; expected a text, token ids or messages"
    for call in (trace, qwen35.diff):
        message = in_one_line(lambda call=call: call("tiny", prompt))
        assert message == f"ids = {shown(prompt)}; expected token ids or a text"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 5.5}, "max_new_tokens = 5.5; expected an integer"),
        ({"max_new_tokens": "5"}, "max_new_tokens = '5'; expected an integer"),
        ({"max_new_tokens": True}, "max_new_tokens = True; expected an integer"),
        ({"temperature": "hot"}, "temperature = 'hot'; expected a number"),
        ({"top_k": 1.5}, "top_k = 1.5; expected an integer"),
        ({"seed": None}, "seed = None; expected an integer"),
        ({"seed": 1.0}, "seed = 1.0; expected an integer"),
        ({"draft_tokens": "3"}, "draft_tokens = '3'; expected an integer"),
        ({"prefill_chunk": 64.0}, "prefill_chunk = 64.0; expected an integer"),
        ({"logprobs": True}, "logprobs = True; expected an integer"),
        ({"ignore_eos": 1}, "ignore_eos = 1; expected true or false"),
        ({"thinking": "no"}, "thinking = 'no'; expected true or false"),
        ({"stop": 5}, "stop = 5; expected a text or a list of texts"),
        ({"stop": [""]}, "stop = ['']; expected texts of at least one character"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs = [1]; expected an object"),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_of_another_kind(model: Model, setting: dict[str, Any], message: str) -> None:
    assert in_one_line(lambda: qwen35.generate(model, TEXT, **setting)) == message


def test_numbers_of_numpy_and_one_stop_text(model: Model) -> None:
    plain = qwen35.generate(model, TEXT, max_new_tokens=4, temperature=0.5)
    found = qwen35.generate(
        model, TEXT, max_new_tokens=np.int64(4), temperature=np.float64(0.5), ignore_eos=False
    )
    assert found.token_ids == plain.token_ids
    cut = qwen35.generate(model, TEXT, max_new_tokens=9, stop="e")
    assert cut.finish_reason == "stop" and "e" not in cut.text


# --- diff -----------------------------------------------------------------------------------------


def test_diff_takes_a_text_and_a_built_model(model: Model) -> None:
    """A built model is compared with the reference of its own folder."""
    chosen = "layers.0".__eq__
    by_ids = qwen35.diff("tiny", IDS, stages=chosen)
    assert qwen35.diff("tiny", TEXT, stages=chosen) == by_ids
    assert qwen35.diff(model, TEXT, stages=chosen) == by_ids
    assert qwen35.diff("tiny", TEXT, dtype="bfloat16", stages=chosen) == by_ids


def test_what_diff_does_not_take(model: Model) -> None:
    message = in_one_line(lambda: qwen35.diff(model, IDS, candidate="tiny"))
    assert "reference is a built model" in message
    for settings in ({"dtype": "float32"}, {"swaps": ["norm=reference.norm:RMSNorm"]}):
        message = in_one_line(lambda s=settings: qwen35.diff("tiny", IDS, candidate=model, **s))
        assert "this one is built" in message
    assert "mode = 'both'" in in_one_line(lambda: qwen35.diff("tiny", IDS, mode="both"))  # pyright: ignore
    assert "decode = '3'" in in_one_line(lambda: qwen35.diff("tiny", IDS, decode="3"))  # pyright: ignore
    assert "decode = -1" in in_one_line(lambda: qwen35.diff("tiny", IDS, decode=-1))
    stages: Any = "layers.3"
    assert "stages = 'layers.3'" in in_one_line(lambda: qwen35.diff("tiny", IDS, stages=stages))


def test_dir_shows_what_is_offered() -> None:
    assert [name for name in dir(qwen35) if not name.startswith("__")] == qwen35.__all__
