"""Scales beside weights that are not quantised, and buffers that the config says anyway."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen35.errors import InputError
from tests.support.checkpoints import edit_tensors, write
from weights.checkpoint import Checkpoint

LAYERS = "model.language_model.layers"
ONES, HALF, OTHER = (
    f"{LAYERS}.{i}.mlp.{p}_proj.weight_scale_inv" for i, p in ((0, "gate"), (0, "up"), (1, "down"))
)


def folder(tmp_path: Path, **tensors: Tensor) -> Path:
    write(tmp_path, "27B", num_hidden_layers=2, full_attention_interval=2)
    scales = {ONES: torch.ones(1, 1), HALF: torch.full((1, 1), 0.5), OTHER: torch.zeros(1, 1)}
    edit_tensors(tmp_path, lambda held: held.update(scales | tensors))
    return tmp_path


def test_scales_that_are_not_one_are_told(tmp_path: Path) -> None:
    """By kind, wherever they stand in the file; unless the numbers are not there."""
    checkpoint = Checkpoint(folder(tmp_path))
    assert checkpoint.ignored[HALF] == (
        f"{HALF.removesuffix('_scale_inv')} is not quantised, so it has no scales"
    )
    before = [*checkpoint.problems]
    checkpoint.check_idle()
    end = "(1 x): not applied, though it is not 1: the weight beside it is not quantised"
    assert checkpoint.problems == [
        *before,
        f"layers.*.mlp.up_proj.weight_scale_inv {end}",
        f"layers.*.mlp.down_proj.weight_scale_inv {end}",
    ]
    hollow = Checkpoint(tmp_path, is_hollow=True)
    hollow.check_idle()
    assert hollow.problems == before


def test_a_weight_that_waits_for_its_scale_is_refused(tmp_path: Path) -> None:
    weight = HALF.removesuffix("_scale_inv")
    codes = torch.randn(96, 64).to(torch.float8_e4m3fn).bfloat16()
    checkpoint = Checkpoint(folder(tmp_path, **{weight: codes}))
    with pytest.raises(InputError) as raised:
        checkpoint.check_idle()
    assert str(raised.value) == (
        f"{tmp_path}: {weight} has dtype BF16 and holds FP8 numbers (e4m3) to which {HALF} was not "
        "applied"
    )


def test_what_is_put_aside_has_a_reason(tmp_path: Path) -> None:
    name = f"{LAYERS}.1.self_attn.rotary_emb.inv_freq"
    checkpoint = Checkpoint(folder(tmp_path, **{name: torch.ones(4)}))
    assert checkpoint.ignored[name] == "computed from the config"
    assert [stored.name for stored in checkpoint.computed] == [name]
    visual = [reason for key, reason in checkpoint.ignored.items() if ".visual." in key]
    assert {*visual} == {"the vision tower, of which nothing is used"}
