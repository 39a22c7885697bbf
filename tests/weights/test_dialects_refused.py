"""Checkpoints whose tensors or claims are wrong, each refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35.errors import InputError
from qwen35.load import load
from tests.support.checkpoints import (
    FP4_E8M0,
    MXFP4,
    MXFP4_SHARED,
    QWEN3_5_FP8,
    QWEN3_NEXT_FP8,
    Dialect,
    assert_names,
    edit_json,
    edit_tensors,
)
from tests.support.dialects import RUN, Written, cli, copied, quiet_load, repacked, written  # noqa: F401
from weights.checkpoint import Checkpoint

# --- bad tensors ----------------------------------------------------------------------------------


Tensors = dict[str, Tensor]


Change = Callable[[Tensors], object]


PREFIX = "model.language_model."


EXPERT = f"{PREFIX}layers.1.mlp.experts.3.up_proj"  # [192, 160]


Q = f"{PREFIX}layers.1.self_attn.q_proj"  # [512, 160]


GATE = f"{PREFIX}layers.0.mlp.gate"


U8 = torch.uint8


def _set(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


BAD_MXFP4: dict[str, tuple[Change, list[str]]] = {
    "no scale": (
        lambda t: t.pop(f"{EXPERT}.weight_scale"),
        [f"{EXPERT}.weight ", "U8", "0 tensors of scales", f"{EXPERT}.weight_scale", "BF16"],
    ),
    "a scale without its weight": (
        lambda t: t.pop(f"{EXPERT}.weight"),
        [f"{EXPERT}.weight_scale has no {EXPERT}.weight"],
    ),
    "a scale of a module that is not there": (
        _set("model.language_model.layers.9.x.weight_scale", torch.ones(1, 1, dtype=U8)),
        ["layers.9.x.weight_scale has no", "layers.9.x.weight"],
    ),
    "both scales": (
        _set(f"{EXPERT}.weight_scale_inv", torch.ones(2, 2)),
        [f"{EXPERT}.weight ", "2 tensors of scales", "one is expected"],
    ),
    "too few groups": (
        _set(f"{EXPERT}.weight_scale", torch.ones(192, 4, dtype=U8)),
        [f"{EXPERT}.weight_scale", "[192, 4]", "[192, 5]"],
    ),
    "transposed scales": (
        _set(f"{EXPERT}.weight_scale", torch.ones(5, 192, dtype=U8)),
        [f"{EXPERT}.weight_scale", "[5, 192]", "[192, 5]"],
    ),
    "flat scales": (
        _set(f"{EXPERT}.weight_scale", torch.ones(960, dtype=U8)),
        [f"{EXPERT}.weight_scale", "[960]", "[192, 5]"],
    ),
    "float scales": (
        _set(f"{EXPERT}.weight_scale", torch.ones(192, 5)),
        [f"{EXPERT}.weight_scale", "F32", "U8"],
    ),
    "integer scales": (
        _set(f"{EXPERT}.weight_scale", torch.ones(192, 5, dtype=torch.int32)),
        [f"{EXPERT}.weight_scale", "I32", "U8"],
    ),
    "K is no multiple of 32": (
        lambda t: t.update({
            f"{EXPERT}.weight": torch.ones(192, 72, dtype=U8),
            f"{EXPERT}.weight_scale": torch.ones(192, 4, dtype=U8),
        }),
        [f"{EXPERT}.weight ", "[192, 72]", "[192, 4]"],
    ),
    "another K": (
        lambda t: t.update({
            f"{EXPERT}.weight": torch.ones(192, 64, dtype=U8),
            f"{EXPERT}.weight_scale": torch.ones(192, 4, dtype=U8),
        }),
        ["layers.1.mlp.experts.3.up_proj.weight", "[192, 128]", "[192, 160]"],
    ),
    "unpacked": (
        _set(f"{EXPERT}.weight", torch.ones(192, 160, dtype=U8)),
        [f"{EXPERT}.weight_scale", "[192, 5]", "[192, 10]"],
    ),
    "three axes": (
        _set(f"{EXPERT}.weight", torch.ones(2, 96, 80, dtype=U8)),
        [f"{EXPERT}.weight", "U8", "[2, 96, 80]", "two axes"],
    ),
    "fused": (
        lambda t: t.update({
            f"{PREFIX}layers.0.mlp.experts.gate_up_proj": torch.ones(8, 384, 80, dtype=U8)
        }),
        [f"{PREFIX}layers.0.mlp.experts.gate_up_proj", "U8", "BF16"],
    ),
    "bytes where nothing is quantised": (
        _set(f"{PREFIX}layers.0.linear_attn.A_log", torch.ones(8, dtype=U8)),
        [f"{PREFIX}layers.0.linear_attn.A_log", "U8", "F32"],
    ),
    "a norm in four bits": (
        lambda t: t.update({
            f"{PREFIX}norm.weight": torch.ones(80, dtype=U8),
            f"{PREFIX}norm.weight_scale": torch.ones(5, dtype=U8),
        }),
        [f"{PREFIX}norm.weight", "U8", "[80]", "two axes"],
    ),
    "weights of another integer": (
        _set(f"{EXPERT}.weight", torch.ones(192, 80, dtype=torch.int32)),
        [f"{EXPERT}.weight", "I32", "U8"],
    ),
    "signed bytes": (
        _set(f"{EXPERT}.weight", torch.ones(192, 80, dtype=torch.int8)),
        [f"{EXPERT}.weight", "I8", "U8"],
    ),
    "e8m0 for weights": (
        _set(f"{EXPERT}.weight", torch.ones(192, 80, dtype=U8).view(torch.float8_e8m0fnu)),
        [f"{EXPERT}.weight", "F8_E8M0", "U8"],
    ),
    "a NaN scale of a dense module": (
        lambda t: t[f"{PREFIX}layers.0.mlp.shared_expert.up_proj.weight_scale"][7].fill_(255),
        [f"{PREFIX}layers.0.mlp.shared_expert.up_proj.weight", "255", "254"],
    ),
}  # fmt: skip


def scale_of(change: Callable[[Tensor], object], name: str = f"{Q}.weight_scale_inv") -> Change:
    return lambda tensors: change(tensors[name])


BAD_FP8: dict[str, tuple[Change, list[str]]] = {
    "no scale": (
        lambda t: t.pop(f"{Q}.weight_scale_inv"),
        [f"{Q}.weight ", "F8_E4M3", "0 tensors of scales", f"{Q}.weight_scale_inv"],
    ),
    "a scale without its weight": (
        lambda t: t.pop(f"{Q}.weight"),
        [f"{Q}.weight_scale_inv has no {Q}.weight"],
    ),
    "both scales": (
        _set(f"{Q}.weight_scale", torch.ones(4, 2)),
        [f"{Q}.weight ", "2 tensors of scales"],
    ),
    "blocks missing": (
        _set(f"{Q}.weight_scale_inv", torch.ones(4, 1)),
        [f"{Q}.weight_scale_inv", "[4, 1]", "[512, 160]", "[4, 2]", "[512, 1]"],
    ),
    "channels missing": (
        _set(f"{Q}.weight_scale_inv", torch.ones(511, 1)),
        [f"{Q}.weight_scale_inv", "[511, 1]", "[512, 1]"],
    ),
    "a channel of the other axis": (
        _set(f"{Q}.weight_scale_inv", torch.ones(1, 160)),
        [f"{Q}.weight_scale_inv", "[1, 160]", "[512, 1]"],
    ),
    "three axes of scales": (
        _set(f"{Q}.weight_scale_inv", torch.ones(4, 2, 1)),
        [f"{Q}.weight_scale_inv", "[4, 2, 1]", "[4, 2]"],
    ),
    "integers for scales": (
        _set(f"{Q}.weight_scale_inv", torch.ones(4, 2, dtype=torch.int32)),
        [f"{Q}.weight_scale_inv", "I32", "BF16"],
    ),
    "FP8 for scales": (
        _set(f"{Q}.weight_scale_inv", torch.ones(4, 2).to(torch.float8_e4m3fn)),
        [f"{Q}.weight_scale_inv", "F8_E4M3", "F32"],
    ),
    "three axes": (
        _set(f"{Q}.weight", torch.ones(2, 256, 160).to(torch.float8_e4m3fn)),
        [f"{Q}.weight", "F8_E4M3", "[2, 256, 160]", "two axes"],
    ),
    "the other FP8": (
        _set(f"{Q}.weight", torch.ones(512, 160).to(torch.float8_e5m2)),
        [f"{Q}.weight", "F8_E5M2", "F8_E4M3"],
    ),
    "another shape": (
        _set(f"{Q}.weight", torch.ones(500, 160).to(torch.float8_e4m3fn)),
        ["layers.1.self_attn.q_proj.weight", "[500, 160]", "[512, 160]"],
    ),
    "a NaN scale": (scale_of(lambda s: s[3, 1].fill_(torch.nan)), [f"{Q}.weight", "finite"]),
    "an infinite scale": (scale_of(lambda s: s[0, 0].fill_(-torch.inf)), [f"{Q}.weight", "finite"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD_MXFP4.values(), ids=BAD_MXFP4.keys())
def test_bad_mxfp4_is_named(copied: Callable[..., Path], change: Change, words: list[str]) -> None:
    """The error at load names the tensor, and both values if there are two."""
    check_bad(copied(MXFP4_SHARED), change, words)


@pytest.mark.parametrize(("change", "words"), BAD_FP8.values(), ids=BAD_FP8.keys())
def test_bad_fp8_is_named(copied: Callable[..., Path], change: Change, words: list[str]) -> None:
    """The error at load names the tensor, and both values if there are two."""
    check_bad(copied(QWEN3_5_FP8), change, words)


def check_bad(folder: Path, change: Change, words: list[str]) -> None:
    """Assert that loading after `change` is an error with these words."""
    edit_tensors(folder, change)
    with pytest.raises(InputError) as caught:
        load(folder)
    assert_names(caught, words)


def test_quantised_grouped_projections_that_the_heads_do_not_divide(copied: Any) -> None:
    """Qwen3-Next's packing is undone after decoding; the shape is checked before."""
    folder = copied(QWEN3_NEXT_FP8)
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    edit_tensors(
        folder,
        lambda t: t.update({
            name: torch.ones(385, 160).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(4, 2)
        }),
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        load(folder)
    assert_names(caught, [name, "[385, 160]"])


def _nan_byte(scale: Tensor) -> None:
    scale[5].fill_(255)


@pytest.mark.parametrize(
    ("dialect", "change", "words"),
    [
        (MXFP4, _nan_byte, ["255", "254"]),
        (repacked(MXFP4, group=FP4_E8M0), lambda s: _nan_byte(s.view(U8)), ["255", "254"]),
        (QWEN3_5_FP8, lambda s: s[1].fill_(torch.nan), ["finite"]),
        (QWEN3_5_FP8, lambda s: s[1].fill_(torch.inf), ["finite"]),
    ],
    ids=["mxfp4", "mxfp4 in e8m0", "fp8 nan", "fp8 inf"],
)
def test_an_experts_nan_scale_is_found_at_use(
    copied: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    dialect: Dialect,
    change: Callable[[Tensor], object],
    words: list[str],
) -> None:
    """Experts are not read at load; the run that hits one ends with status 2 and its name."""
    folder = copied(dialect)

    def damage(tensors: Tensors) -> None:
        for name in tensors:
            if ".layers.1.mlp.experts." in name and "up_proj.weight_scale" in name:
                change(tensors[name])

    edit_tensors(folder, damage)
    quiet_load(folder)
    status, out, err = cli(capsys, *RUN, "--model", folder)
    assert status == 2
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("python -m qwen35.generate: model.language_model.layers.1.mlp.experts.")
    assert not [word for word in ["up_proj.weight", *words] if word not in line], line
    assert err.count("\n") == 1


# --- bad claims -----------------------------------------------------------------------------------


BAD_CLAIMS: dict[str, tuple[Any, list[str]]] = {
    "a list": (["fp8"], ["quantization_config", "['fp8']"]),
    "a word": ("fp8", ["quantization_config", "'fp8'"]),
    "a number": (8, ["quantization_config", "8"]),
    "exclude is a word": (
        {"quant_method": "quark", "exclude": "lm_head"},
        ["exclude", "'lm_head'", "list"],
    ),
    "exclude is an object": (
        {"quant_method": "quark", "exclude": {"lm_head": True}},
        ["exclude", "lm_head", "list"],
    ),
    "exclude holds a number": (
        {"quant_method": "quark", "exclude": ["lm_head", 3]},
        ["exclude", "3", "list"],
    ),
    "the FP8 list is a word": (
        {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
        ["modules_to_not_convert", "'lm_head'", "list"],
    ),
} | {
    f"blocks {block!r}": (
        {"quant_method": "fp8", "weight_block_size": block},
        ["weight_block_size", repr(block), "[128, 128]"],
    )
    for block in (
        ["128", "128"], [128], [128, 128, 128], [128, 0], [128, -1], [128.0, 128.0], [True, True], 128,
        {"n": 1},
    )
}  # fmt: skip


@pytest.mark.parametrize(("claim", "words"), BAD_CLAIMS.values(), ids=BAD_CLAIMS.keys())
def test_a_bad_claim_is_one_line(
    written: Written, tmp_path: Path, claim: Any, words: list[str]
) -> None:
    """The file, the key, its value and what was expected."""
    folder, _ = written(QWEN3_5_FP8)
    shutil.copy(folder / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=claim)
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert_names(caught, [str(tmp_path / "config.json"), "quantization_config", *words])


def test_blocks_that_are_not_the_files(copied: Callable[..., Path]) -> None:
    """A wrong weight_block_size shows as scales of another shape."""
    folder = copied(QWEN3_5_FP8)
    claim = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=claim | {"weight_block_size": [64, 64]})
    with pytest.raises(InputError) as caught:
        load(folder)
    assert_names(caught, ["weight_scale_inv", "64 x 64"])
