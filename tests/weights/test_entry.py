"""Which tensor a tensor of scales belongs to."""

from typing import Any

import pytest

from qwen35.errors import InputError
from weights.entry import owner_of

LAYER = "model.layers.3.mlp"
EXPERTS = f"{LAYER}.experts"


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("weight", ["weight", "weight_packed"])
def test_the_scales_of_a_matrix(weight: str, suffix: str) -> None:
    owner = f"{LAYER}.up_proj.{weight}"
    assert owner_of(f"{LAYER}.up_proj.{suffix}", {owner: None, "other": None}) == owner  # pyright: ignore


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
@pytest.mark.parametrize(
    ("fused", "first"), [("gate_up_proj", "gate_proj"), ("down_proj", "down_proj")]
)
def test_the_scales_of_all_experts_of_a_layer(fused: str, first: str, suffix: str) -> None:
    """They belong to the fused tensor, or to the first expert's matrix where each has its own."""
    scale = f"{EXPERTS}.{fused}{suffix}"
    whole, separate = f"{EXPERTS}.{fused}", f"{EXPERTS}.0.{first}.weight"
    stored: dict[str, Any] = {separate: None, f"{EXPERTS}.0.up_proj.weight": None}
    assert owner_of(scale, stored) == separate
    assert owner_of(scale, stored | {whole: None}) == whole
    del stored[separate]
    with pytest.raises(InputError) as raised:
        owner_of(scale, stored)
    assert str(raised.value) == f"{scale} has no {whole} beside it"


def test_scales_of_nothing() -> None:
    scale = f"{LAYER}.up_proj.weight_scale_inv"
    with pytest.raises(InputError) as raised:
        owner_of(scale, {f"{LAYER}.down_proj.weight": None})  # pyright: ignore
    assert str(raised.value) == f"{scale} has no {LAYER}.up_proj.weight beside it"


@pytest.mark.parametrize(
    "name", [f"{LAYER}.up_proj.weight", f"{EXPERTS}.gate_up_proj", f"{LAYER}.down_proj_scale"]
)
def test_what_is_no_tensor_of_scales(name: str) -> None:
    assert owner_of(name, {}) is None
