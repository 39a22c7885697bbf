"""Scales that only serve run time: set aside, listed, reachable; the weights do not depend on them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen35.errors import InputError
from qwen35.load import load
from tests.support.checkpoints import (
    FP8_TENSOR,
    MIXERS,
    MXFP4_SHARED,
    QUANTIZED_SIZES,
    Dialect,
    assert_names,
    edit_tensors,
    logits_of,
    write,
    write_plain,
)
from tests.support.dialects import cli
from tests.support.family import FAMILY
from tests.weights.test_claims import inspected, loaded
from weights.checkpoint import Checkpoint
from weights.convert import convert
from weights.output import Options

MEMBER = "397B-A17B"
SIZES = FAMILY[MEMBER] | QUANTIZED_SIZES
RUN = ("--prompt-ids", "5,6,7", "--max-new-tokens", 6, "--ignore-eos")
PREFIX = "model.language_model."
ATTENTION = f"{PREFIX}layers.1.self_attn"
EXPERT = f"{PREFIX}layers.0.mlp.experts"

# One scale a matrix, and what Quark's FP8-KV and static FP8 exports, modelopt, llm-compressor and
# transformers put beside: one number each, or one a head or an expert.
STATIC = Dialect(
    fused_trunk=False,
    quantized=tuple((glob, FP8_TENSOR) for glob in (*MIXERS, "layers.*.mlp.experts.*")),
    claim="quark",
)
KEYS_AND_VALUES: dict[str, tuple[int, ...]] = {
    f"{ATTENTION}.k_scale": (),
    f"{ATTENTION}.v_scale": (2,),  # KV heads
    f"{ATTENTION}.kv_scale": (1,),
    f"{ATTENTION}.k_proj.output_scale": (),
    f"{ATTENTION}.v_proj.output_scale": (1,),
    f"{ATTENTION}.k_proj.k_scale": (1,),
    f"{ATTENTION}.v_proj.v_scale": (1, 1),
    f"{ATTENTION}.attn.k_scale": (2, 1, 1),
    "mtp.layers.0.self_attn.k_scale": (),
}
OTHERS: dict[str, tuple[int, ...]] = {
    f"{ATTENTION}.q_scale": (8,),  # heads
    f"{ATTENTION}.prob_scale": (),
    f"{ATTENTION}.q_proj.output_scale": (),
    f"{ATTENTION}.q_proj.input_scale": (),
    f"{ATTENTION}.o_proj.input_global_scale": (1,),
    f"{ATTENTION}.k_proj.activation_scale": (),
    f"{PREFIX}layers.0.linear_attn.out_proj.input_scale": (1,),
    f"{PREFIX}layers.0.linear_attn.out_proj.input_scale_inv": (1,),
    f"{EXPERT}.3.up_proj.input_scale": (),
    f"{EXPERT}.gate_up_proj_activation_scale": (8,),  # experts
    f"{EXPERT}.down_proj_activation_scale": (8,),
    f"{EXPERT}.down_proj_input_scale": (1,),
}
ALL = KEYS_AND_VALUES | OTHERS


def bare(name: str) -> str:
    return name.removeprefix(PREFIX)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A static FP8 folder with all of them, each of another value, in F32 and BF16."""
    folder = tmp_path_factory.mktemp("static")
    expected = write(folder, MEMBER, STATIC, **QUANTIZED_SIZES)
    scales = {
        name: torch.full(shape, 0.5 + i).to(torch.bfloat16 if i % 2 else torch.float32)
        for i, (name, shape) in enumerate(ALL.items())
    }
    edit_tensors(folder, lambda tensors: tensors.update(scales))
    return folder, expected


def test_they_change_nothing(static: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """No warning, and the logits of a plain folder of the decoded values."""
    folder, expected = static
    write_plain(tmp_path, expected, torch.bfloat16, SIZES)
    model, lines = loaded(folder)
    assert lines == []
    assert torch.equal(logits_of(model), logits_of(load(tmp_path)))


def test_they_are_reachable_by_name(static: tuple[Path, dict[str, Tensor]]) -> None:
    """All of them, and nothing else; no entry is missing or added."""
    folder, expected = static
    checkpoint = Checkpoint(folder)
    assert checkpoint.run_time.keys() == {bare(name) for name in ALL}
    assert checkpoint.entries.keys() == expected.keys()
    for i, (name, shape) in enumerate(ALL.items()):
        stored = checkpoint.run_time[bare(name)]
        assert (stored.name, stored.shape) == (name, shape)
        assert (stored.read().float() == 0.5 + i).all()
    assert (checkpoint.problems, checkpoint.notes, checkpoint.idle) == ([], [], {})


def test_inspect_lists_them(
    static: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Under one reason; that is no problem."""
    status, out = inspected(static[0], capsys)
    assert status == 0
    assert "a scale for run time; the weights are exact without it" in out
    assert "note: " not in out
    assert "no problems" in out


def test_generate_is_silent(
    static: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Six tokens, and not a word on scales."""
    status, out, err = cli(capsys, *RUN, "--model", static[0])
    assert (status, len(out.split())) == (0, 6)
    assert "warning" not in err


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{ATTENTION}.k_scale", torch.ones(64, 160)),
        (f"{ATTENTION}.k_proj.output_scale", torch.ones(64)),
        (f"{ATTENTION}.k_proj.input_scale", torch.ones(160)),
        (f"{ATTENTION}.v_scale", torch.ones(3)),
        (f"{ATTENTION}.v_scale", torch.ones(2, 2)),
        (f"{ATTENTION}.v_scale", torch.ones(1, dtype=torch.int32)),
        (f"{EXPERT}.3.up_proj.input_scale", torch.ones(2, 4)),
        (f"{EXPERT}.gate_up_proj_activation_scale", torch.ones(9)),
        (f"{ATTENTION}.scale", torch.ones(1)),
        (f"{ATTENTION}.k_scales", torch.ones(1)),
        (f"{PREFIX}layers.1.k_scale.weight", torch.ones(1)),
    ],
    ids=lambda value: (
        value.removeprefix(PREFIX) if isinstance(value, str) else str(tuple(value.shape))
    ),
)
def test_what_only_looks_like_one_is_refused(tmp_path: Path, name: str, tensor: Tensor) -> None:
    """A tensor of a weight's size, of another count, of integers, or of another name."""
    write(tmp_path, MEMBER, STATIC, **QUANTIZED_SIZES)
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert_names(caught, [name])


@pytest.mark.parametrize(
    "options",
    [Options("mxfp4"), Options("mxfp4", what="all-linear"), Options("bf16")],
    ids=["experts", "all-linear", "bf16"],
)
def test_a_conversion_keeps_those_of_the_cache(
    static: tuple[Path, dict[str, Tensor]], tmp_path: Path, options: Options
) -> None:
    """Keys and values are what they were; activations of FP8 layers are none any more."""
    convert(static[0], tmp_path / "out", options)
    converted = Checkpoint(tmp_path / "out")
    assert converted.run_time.keys() == {bare(name) for name in KEYS_AND_VALUES}
    before = Checkpoint(static[0]).run_time
    for name, stored in converted.run_time.items():
        assert torch.equal(stored.read(), before[name].read())
    assert (converted.problems, converted.notes) == ([], [])
    excluded = converted.document.get("quantization_config", {}).get("exclude", [])
    assert not [name for name in excluded if "_scale" in name]


def test_every_rank_gets_those_of_the_cache(
    static: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Whole: a rank picks its heads."""
    convert(static[0], tmp_path / "out", Options("bf16", tp=2))
    for rank in range(2):
        files = (tmp_path / "out" / f"rank-{rank}-of-2").glob("*.safetensors")
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for name, shape in KEYS_AND_VALUES.items():
            assert tuple(tensors[name].shape) == shape
        assert not tensors.keys() & OTHERS.keys()


def test_beside_mxfp4(tmp_path: Path) -> None:
    """The formats do not matter to them."""
    expected = write(tmp_path / "a", MEMBER, replace(MXFP4_SHARED, shards=1), **QUANTIZED_SIZES)
    scale = {f"{ATTENTION}.k_scale": torch.tensor(0.25)}
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update(scale))
    write_plain(tmp_path / "b", expected, torch.bfloat16, SIZES)
    model, lines = loaded(tmp_path / "a")
    assert lines == []
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "b")))
